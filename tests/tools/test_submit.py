"""Jobs for SLURM: what is written, and what is refused before it waits in a queue."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.runs import ROOT
from tools import submit
from trainer.config.command_line import call, without_settings
from trainer.errors import ConfigError

SLURM = ROOT / "launch" / "slurm"
SIZE = ["--nodes", "4", "--gpus", "8"]
WORDS = [*SIZE, "--recipe", "mae_vit_base", "--micro_batch", "128", "--data", "/d", "--output_dir", "/runs/a"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", script]
    environment = {"PATH": os.environ["PATH"], "TRAINER_HOME": str(ROOT)} | variables
    return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_a_job_holds_its_size_and_every_word_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    awkward = ["--data", "/my shards/*.tar", "--sweep", "mask_ratio 0.6,0.75", "--partition", "gpu", "--dry_run"]
    assert call(submit.main, submit.CLI, [*WORDS[:-4], "--output_dir", "/runs/a", *awkward]) == 0
    lines = capsys.readouterr().out.splitlines()
    for asked in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "signal=B:USR1@600", "array=0-1", "partition=gpu"):
        assert f"#SBATCH --{asked}" in lines
    assert "#SBATCH --requeue" in lines
    assert "export TRAINER_SWEEP='mask_ratio 0.6 0.75'" in lines
    assert lines[-1].startswith("train pretrain ")
    read = bash(f"printf '%s|' {lines[-1].removeprefix('train pretrain ')}").stdout
    assert "|--data|/my shards/*.tar|" in "|" + read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "nodes is 0, but must be at least 1"),
        (["--nodes", "5"], "global_batch is 4096, but must be divisible by ranks x micro_batch = 40 x 128"),
        (["--time", "tomorrow"], "time is 'tomorrow', but must look like 24:00:00"),
        (["--sweep", "mask_ratio"], "must be a setting and its values"),
        (["--sweep", "mask_ratio 0.5 1.5"], "mask_ratio is 1.5"),
        (["--sweep", "global_batch 4096 6000"], "global_batch is 6000, but must be divisible"),
        (["--sweep", "recipe mae_vit_base mae_vit_large"], "recipe is given twice, in --sweep and as --recipe"),
        (["--output_dir", ""], "output_dir is ''"),
    ],
)
def test_what_the_training_would_refuse_is_refused_here(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(submit.main, submit.CLI, [*without_settings(WORDS, [words[0].removeprefix("--")]), "--dry_run", *words])
    assert message in str(caught.value)


def test_paths_that_all_nodes_need_must_be_named() -> None:
    with pytest.raises(ConfigError, match="output_dir is not given"):
        call(submit.main, submit.CLI, [*WORDS[:-2], "--dry_run"])


@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate"])
def test_outside_slurm_the_scripts_say_how_to_submit(script: str) -> None:
    done = bash(f"bash launch/slurm/{script}.sbatch")
    assert done.returncode == 2
    assert done.stderr == "error: SLURM_JOB_ID is not set: submit with sbatch, or with tools/submit.py\n"
    done = bash(f"bash launch/slurm/{script}.sbatch", TRAINER_HOME="/nowhere")
    assert done.returncode == 2
    assert "TRAINER_HOME is /nowhere" in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "3", "SLURM_JOB_NUM_NODES": "2"}, "3 tasks on 2 nodes: ask for --ntasks-per-node"),
        ({"TRAINER_ENVIRONMENT": "/nowhere.sh"}, "TRAINER_ENVIRONMENT is /nowhere.sh, which is no file here"),
        ({"TRAINER_PYTHON": "no-such-python"}, "TRAINER_PYTHON is no-such-python, which is no program here"),
    ],
)
def test_a_job_that_cannot_start_says_why(variables: dict[str, str], message: str) -> None:
    done = bash("source launch/slurm/common.sh; prepare", **JOB | variables)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("sweep", "element", "words", "expected"),
    [
        ("", "", "--output_dir /runs/a", "--output_dir /runs/a"),
        ("mask_ratio 0.6 0.75", "1", "--output_dir /runs/a", "--output_dir /runs/a/mask_ratio-0.75 --mask_ratio 0.75"),
        ("seed 1 2", "0", "--output_dir=/runs/a --epochs 3", "--output_dir=/runs/a/seed-1 --epochs 3 --seed 1"),
    ],
)
def test_an_element_of_a_sweep_has_its_value_and_its_own_output(
    sweep: str, element: str, words: str, expected: str
) -> None:
    script = f'source launch/slurm/common.sh; set_argv {words}; echo "${{argv[@]}}"'
    done = bash(script, TRAINER_SWEEP=sweep, SLURM_ARRAY_TASK_ID=element)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(("element", "message"), [("", "this is no job array"), ("2", "has 2 values: fit --array")])
def test_an_element_without_a_value_is_refused(element: str, message: str) -> None:
    done = bash("source launch/slurm/common.sh; set_argv", TRAINER_SWEEP="seed 1 2", SLURM_ARRAY_TASK_ID=element)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    scripts = [*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch"), *(ROOT / "tests" / "cluster").glob("*.sh")]
    assert len(scripts) == 6
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
