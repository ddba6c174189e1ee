"""What the doctor says of hosts that are not alike, and that it leaves nothing behind."""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.launcher.runner import fetch_hostfile

from tests.helpers.runs import ROOT, TINY, argv_of, environment
from trainer.config.recipes import RECIPES
from trainer.config.scoring_settings import EvaluationSettings
from trainer.detection.evaluation import evaluate
from trainer.distributed import devices
from trainer.distributed.devices import unusable_gpus
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.training import readiness as doctor


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    """Two hosts that are alike."""
    one = doctor.facts_of(World(), *RECIPES["demo"](), shards=[]) | {"host": "hosta"}
    return [one, copy.deepcopy(one) | {"host": "hostb", "rank": 1}]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, ""),
        (
            {"versions": {"torch": "1.0"}},
            "FAIL  versions      hosta has .*, but hostb has torch 1.0: use",
        ),
        ({"devices": 999}, "warn  devices       hosta: .*, hostb: 999 x CPU"),
        ({"devices": 1, "device": "H100"}, "FAIL  devices       hosta: .*, hostb: 1 x H100; some hosts have no GPU"),
        ({"time": 0.0}, "warn  clocks        differ by .* hostb is behind"),
        ({"compiles": "Lion", "compiler": []}, "FAIL  compiler      hostb: DeepSpeed compiles the optimizer Lion"),
        (
            {"shared_memory": 64_000_000, "device": "H100", "local_size": 2},
            "warn  shared memory hostb: /dev/shm has 64 MB free, .* 1.0 GB",
        ),
        (
            {"unusable_gpus": "this host has 1 NVIDIA GPUs (nvidia0), but CUDA cannot use them (old driver)"},
            "FAIL  devices       hostb: this host has 1 NVIDIA GPUs .*DS_ACCELERATOR=cpu is set",
        ),
        ({"open_files": 256}, "warn  open files    hostb: only 256 open files are allowed: ulimit -n 4096"),
        (
            {"read": {"problem": "/d/a.tar cannot be read (gone)", "bytes": 0, "s": 0.0}},
            "FAIL  shards        hostb: /d/a.tar cannot be read",
        ),
    ],
)
def test_a_host_that_differs_is_named(facts: list[dict[str, Any]], change: dict[str, Any], line: str) -> None:
    known = [facts[0], facts[1] | change]
    lines = [str(finding) for finding in doctor.judge_facts(known, ["/d/a.tar"])]
    bad = [text for text in lines if not text.startswith("ok ")]
    assert bool(bad) == bool(change), lines
    assert not change or re.match(line, bad[-1]), bad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only a remark\n", "names no host"),
        ("hosta\n", "line 1 is 'hosta'"),
        ("hosta slots=0\n", "line 1 is 'hosta slots=0'"),
        ("hosta slots=8\n\nhosta slots=8\n", "line 3 is 'hosta slots=8'"),
        ("hosta; rm -rf / slots=8\n", "line 1 is"),
    ],
)
def test_a_hostfile_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match="hostfile .*" + message):
        doctor.read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        doctor.read_hostfile(tmp_path / "none")


def test_hosts_and_slots_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# a cluster\nhost-a.example slots=4\n\nhostb slots=2 # half\n")
    assert doctor.read_hostfile(tmp_path / "hosts") == dict(fetch_hostfile(str(tmp_path / "hosts")))


@pytest.mark.slow
def test_a_machine_is_examined_and_left_as_it_was(shards: Path, tmp_path: Path) -> None:
    def ask(**changes: str) -> subprocess.CompletedProcess[str]:
        flags = TINY | {"data": str(shards), "output_dir": str(tmp_path / "out")} | changes
        start = [sys.executable, str(ROOT / "launch" / "doctor.py"), *argv_of(flags)]
        return subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=120)

    done = ask()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 10
    assert "FAIL" not in done.stdout
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "logs"]
    done = ask(keep_checkpoints="1000000000")
    assert done.returncode == 2
    assert "FAIL  output        " in done.stdout
    done = ask(global_batch="7")
    assert done.returncode == 2
    assert "global_batch is 7, but must be divisible" in done.stderr


@pytest.mark.parametrize(("given", "patience_s"), [(10, 50), (900, 900)])
def test_ranks_wait_as_long_for_the_last_of_them_as_a_training_does(
    monkeypatch: pytest.MonkeyPatch, given: int, patience_s: int
) -> None:
    class AskedError(Exception):
        pass

    def connect(world: World, **limits: int) -> World:
        raise AskedError(limits)

    monkeypatch.setattr(doctor, "connect", connect)
    recipe, runtime = RECIPES["demo"]()
    runtime = dataclasses.replace(runtime, start_timeout_s=given, oversubscribe=True, num_threads=1)
    with pytest.raises(AskedError, match=f"'timeout_s': {patience_s}, 'start_timeout_s': {patience_s}"):
        doctor.examine(recipe, runtime)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs here work")
def test_gpus_that_cuda_cannot_use_are_refused_unless_the_user_wants_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert unusable_gpus(tmp_path) == ""
    for number in range(2):
        (tmp_path / f"nvidia{number}").touch()
    said = "this host has 2 NVIDIA GPUs (nvidia0, nvidia1), but CUDA cannot use them ("
    assert unusable_gpus(tmp_path).startswith(said)
    monkeypatch.setattr(devices.unusable_gpus, "__defaults__", (tmp_path,))
    with pytest.raises(ConfigError, match="to compute on the CPU anyway, set DS_ACCELERATOR=cpu"):
        devices.use_devices(World(), RECIPES["demo"]()[1])
    with pytest.raises(ConfigError, match="to compute on the CPU anyway, set DS_ACCELERATOR=cpu"):
        evaluate(EvaluationSettings(models="none=nowhere", test_sets="none=nowhere"))
    for name, value in (("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")):
        with monkeypatch.context() as told:
            told.setenv(name, value)
            assert unusable_gpus(tmp_path) == ""


def test_the_first_line_of_a_training_names_its_device(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        devices.use_devices(World(), RECIPES["demo"]()[1])
    assert re.fullmatch(r"device: \d+ x .+, for 1 ranks on this host", caplog.records[0].getMessage())
