"""The laws of the CPU on a GPU: `make gpu` runs them where one is. Here the same bodies run on the CPU, marked slow.

No GPU has run them yet. Weights and losses of a resumed run are compared bit for bit on the CPU only: attention,
gathers and cuDNN add in another order each time on a GPU, so there the losses are held to a bound.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT, TINY, argv_of, ledger, metrics

BF16_BOUND = 0.02
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = pytest.mark.parametrize("device", [GPU, pytest.param("cpu", marks=pytest.mark.slow)])


def run(script: Path, argv: list[str], folder: Path, device: str) -> None:
    """Run a script alone on the device; a GPU is DeepSpeed's own choice where it finds one."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *argv], env=environment, cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def steps(folder: Path, device: str, config: str, stage: int, *, micro_batch: int = 4, mode: str = "off") -> Any:
    folder.mkdir()
    argv = [str(ROOT / "ds_configs" / f"{config}.json"), str(micro_batch), str(folder), str(stage), mode]
    run(ROOT / "tests" / "ranks" / "engine_worker.py", argv, folder, device)
    return json.loads((folder / "rank-0.json").read_text())


@DEVICES
def test_all_stages_follow_the_cpu_in_fp32_within_bf16(tmp_path: Path, device: str) -> None:
    exact = steps(tmp_path / "exact", "cpu", "cpu_fp32", 1)
    fp32 = steps(tmp_path / "fp32", device, "cpu_fp32", 0)
    assert fp32["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    for config, stage in (("zero1_bf16", 1), ("zero2_bf16", 2), ("zero3_bf16", 3), ("zero3_offload", 3)):
        found = steps(tmp_path / config, device, config, stage)
        assert found["losses"] == pytest.approx(exact["losses"], rel=BF16_BOUND), config
        assert found["copy_is_equal"], config


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_and_replayed_graphs_compute_the_same(tmp_path: Path, mode: str) -> None:
    plain = steps(tmp_path / "plain", "cuda", "zero1_bf16", 1, micro_batch=8)
    compiled = steps(tmp_path / mode, "cuda", "zero1_bf16", 1, micro_batch=8, mode=mode)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=BF16_BOUND)
    assert compiled["copy_is_equal"]


@DEVICES
def test_a_run_with_loader_workers_resumes_with_the_same_samples_and_losses(
    shards: Path, tmp_path: Path, device: str
) -> None:
    """The loader pins its batches on a GPU (trainer/training/run.py)."""
    flags = TINY | {"data": f"{shards}/*.tar", "save_every": "100", "num_workers": "2"}
    for name, stops in (("whole", ["6"]), ("halves", ["3", "6"])):
        for stop in stops:
            places = {"output_dir": str(tmp_path / name), "sample_ledger": str(tmp_path / name / "ledger")}
            argv = argv_of(flags | places | {"stop_at_step": stop})
            run(ROOT / "launch" / "pretrain.py", argv, tmp_path, device)
    assert ledger(tmp_path / "halves" / "ledger") == ledger(tmp_path / "whole" / "ledger")
    whole, halves = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "halves"))
    assert len(whole) == 6
    assert halves == (whole if device == "cpu" else pytest.approx(whole, rel=BF16_BOUND))
