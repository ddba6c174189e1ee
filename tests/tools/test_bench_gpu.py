"""The bench of a GPU: what it does where cases fail, and every part once on the CPU, as its rehearsal runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT, environment
from tools.bench import gpu, gpu_parts, step
from trainer.config.command_line import call
from trainer.distributed.measured import Figures, Row, read_figures
from trainer.errors import ConfigError

BENCH = ROOT / "tools" / "bench" / "gpu.py"
GUIDE = ROOT / "tools" / "bench" / "README.md"
FAULTS = """
import os, subprocess, sys, time
from pathlib import Path
from tools.bench import gpu
from tools.bench.gpu_parts import Case

def works(bench):
    print("a library prints this")
    count = Path(os.environ["COUNTS"], "works")
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    return {"kind": "pretrain", "step_ms": 12.0, "mfu": 0.5}

def fails(bench):
    if Path(os.environ["COUNTS"], "mended").exists():
        return {"step_ms": 13.0}
    raise RuntimeError("CUDA out of memory.\\nTried to allocate 2.00 GiB")

def hangs(bench):
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["COUNTS"], "child").write_text(str(child.pid))
    time.sleep(600)

gpu.__file__ = __file__
gpu.cases = lambda: iter([
    Case("step", "fails", fails, 60), Case("step", "hangs", hangs, 1),
    Case("peers", "dies", lambda bench: os._exit(9), 60),
    Case("peers", "works", works, 60), Case("compile", "graphs", works, 60, "gpu"),
])
gpu.command()
"""


def run_bench(script: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(script), "--device", "cpu", "--output", str(folder / "gpu.json"), *argv]
    env = environment() | {"COUNTS": str(folder)}
    return subprocess.run(words, env=env, capture_output=True, text=True, cwd=folder, timeout=500)


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_a_case_that_fails_hangs_or_dies_is_a_row_and_the_next_start_tries_only_these_again(tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text(FAULTS)
    done = run_bench(script, tmp_path)
    assert done.returncode == 1, done.stderr
    figures = read_figures(tmp_path / "gpu.json")
    errors = {row.name: row.error for row in figures.rows}
    assert errors["fails"] == "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert errors["hangs"] == "it was ended after 10 s"
    assert errors["dies"].startswith("its process ended with 9")
    assert errors["works"] == ""
    assert "graphs" not in errors, "a rehearsal has none"
    assert is_gone(int((tmp_path / "child").read_text())), "what a case started ends with it"
    assert figures.mfu("pretrain", "any", 1.0) is None, "a rehearsal measures nothing"
    for text in (done.stdout, (tmp_path / "gpu.md").read_text()):
        assert "Rehearsal on a CPU with tiny models: no figure of any GPU" in text
        assert "| peers | works | 12.0 ms, MFU 50.0% |" in text
        assert "| step | fails | **failed**: RuntimeError: CUDA out of memory." in text
    assert "a library prints this" in (tmp_path / "gpu.log").read_text()

    (tmp_path / "mended").touch()
    run_bench(script, tmp_path)
    assert read_figures(tmp_path / "gpu.json").find("step", "fails") == Row("step", "fails", {"step_ms": 13.0})
    assert (tmp_path / "works").read_text() == "x", "it has its figures"
    assert run_bench(script, tmp_path, "--parts", "peers").returncode == 1
    assert (tmp_path / "works").read_text() == "xx", "a part that is named runs again"
    short = run_bench(script, tmp_path, "--budget_s", "1")
    assert "no time was left for step/hangs, peers/dies: the same command goes on" in short.stdout


def test_every_part_takes_less_than_ten_minutes_and_every_case_has_a_name_of_its_own() -> None:
    cases = list(gpu_parts.cases())
    for part in gpu.PARTS:
        assert sum(case.limit_s for case in cases if case.part == part) <= gpu_parts.PART_LIMIT_S, part
    assert len({case.key for case in cases}) == len(cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_nothing_is_measured_and_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"so nothing was measured: .*rehearse with --device cpu"):
        call(gpu.main, gpu.CLI, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "machine,smok"], r"parts has 'smok', but takes only machine, smoke"),
        (["--budget_s", "-1"], "budget_s is -1"),
        (["--output", "nowhere/gpu.json"], r"output is 'nowhere/gpu\.json'"),
        (["--output", "gpu.txt"], r"must be a \.json file"),
        (["--folder", "nowhere"], "folder is 'nowhere'.*create it"),
        (["--device", "tpu"], "must be one of cuda, cpu"),
    ],
)
def test_wrong_settings_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(gpu.main, gpu.CLI, argv)


def test_figures_of_another_gpu_are_never_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Figures("NVIDIA A100-SXM4-80GB").write(path)
    with pytest.raises(ConfigError, match=r"has figures of NVIDIA A100-SXM4-80GB, but this is NVIDIA H100"):
        gpu.begin(path, "NVIDIA H100 80GB HBM3", rehearsal=False)
    with pytest.raises(ConfigError, match=r"but this is CPU \(rehearsal\)"):
        gpu.begin(path, gpu.REHEARSAL, rehearsal=True)
    assert gpu.begin(path, "NVIDIA A100-SXM4-80GB", rehearsal=False).rows == []


def test_the_guide_shows_the_figures_of_the_repository_or_says_not_measured() -> None:
    _, _, section = GUIDE.read_text().partition("\n## One GPU\n")
    section = section.partition("\n## ")[0]
    figures = ROOT / "tools" / "bench" / "gpu.json"
    if figures.exists():
        found = read_figures(figures)
        assert not found.rehearsal
        assert gpu.table(found) in section
    else:
        assert "**Not measured.**" in section
        assert not re.search(r"\d+ ms|images/s \||MFU \d", section), "there is no figure to show"


STARTS_PROCESSES = ("machine", "loader", "save", "resume")
"""Parts that start processes themselves, and one as the bench starts it."""
IN_TURN = """
import json, os, sys
from pathlib import Path
import deepspeed
from tools.bench import gpu_parts
from trainer.training import pretraining

folder, keys = Path(sys.argv[1]), json.loads(sys.argv[2])
bench = gpu_parts.Bench(True, folder / "gpu.json", folder)
cases = {case.key: case for case in gpu_parts.cases()}
for number, key in enumerate(keys):
    if not os.fork():
        try:
            said = {"values": cases[key].measure(bench), "error": ""}
        except Exception as error:
            said = {"values": {}, "error": gpu_parts.why(error)}
        (folder / f"{number}.json").write_text(json.dumps(said))
        os._exit(0)
    os.wait()
"""
FIRST = {case.part: case.key for case in reversed(list(gpu_parts.cases())) if case.place != "gpu"}


@pytest.mark.slow
@pytest.mark.parametrize("part", STARTS_PROCESSES)
def test_a_part_runs_on_the_cpu_as_its_rehearsal(part: str, tmp_path: Path) -> None:
    done = run_bench(BENCH, tmp_path, "--folder", str(tmp_path), "--only", FIRST[part])
    found: dict[str, Any] = json.loads(done.stdout)
    check(part, found, done.stderr)


@pytest.mark.slow
def test_the_other_parts_run_on_the_cpu_as_their_rehearsal(tmp_path: Path) -> None:
    """In forks of one process, because most of the time of a rehearsal goes into its imports."""
    script = tmp_path / "parts.py"
    script.write_text(IN_TURN)
    parts = [part for part in gpu.PARTS if part not in STARTS_PROCESSES]
    # That compiled training equals the plain one is a law of tests/distributed; here the case's own lines run.
    words = [sys.executable, str(script), str(tmp_path), json.dumps([FIRST[part] for part in parts])]
    env = environment() | {"TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, part in enumerate(parts):
        check(part, json.loads((tmp_path / f"{number}.json").read_text()), done.stderr)


def check(part: str, found: dict[str, Any], stderr: str) -> None:
    assert found["error"] == "", found["error"] + stderr[-3000:]
    assert found["values"]
    assert "mfu" not in json.dumps(found), "a CPU has none"
    if part == "resume":
        assert found["values"]["weights_resume_bitwise"]
        assert found["values"]["losses_repeat_bitwise"]


@pytest.mark.slow
def test_this_form_transformers_and_the_published_form_have_one_loss_before_they_are_timed() -> None:
    settings = step.Settings(
        model="vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=2, micro_batch=4, repeats=1,
        variants=("exact", step.PUBLISHED, "depth4"),
    )  # fmt: skip
    measured, best = step.measure(settings)
    losses = {name: found.first_loss for name, found in measured.items()}
    assert losses[step.PUBLISHED] == pytest.approx(losses["exact"], rel=1e-5)
    assert losses[step.PEER] == pytest.approx(losses["exact"], rel=1e-5)
    assert losses["depth4"] != pytest.approx(losses["exact"], rel=1e-3)
    assert best > 0
    assert measured[step.PEER].flops == measured["exact"].flops
