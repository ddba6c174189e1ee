"""Shards, runs and ranks for the tests: everything real, only small."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)

TINY = {
    "recipe": "demo",
    "encoder_depth": "2",
    "image_size": "32",
    "patch_size": "8",
    "decoder_width": "32",
    "decoder_depth": "2",
    "global_batch": "8",
    "micro_batch": "4",
    "epochs": "4",
    "warmup_epochs": "1",
    "num_lanes": "4",
    "log_every": "1",
    "progress_bar": "false",
    "oversubscribe": "true",
    "num_workers": "1",
    "num_threads": "1",
}
"""A run of seconds: flags on top of the demo recipe."""


def jpeg(number: int, height: int = 40, width: int = 36) -> bytes:
    """A smooth picture that differs for every number."""
    y, x = np.mgrid[:height, :width]
    image_HWC = np.stack([(y * (number % 7 + 1)) % 256, (x * (number % 5 + 1)) % 256, (x + y + number) % 256], axis=2)
    file = io.BytesIO()
    Image.fromarray(image_HWC.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def members_of(numbers: range) -> list[tuple[str, bytes]]:
    """A jpg and a json for each number."""
    found = []
    for number in numbers:
        found += [
            (f"face{number:04d}.jpg", jpeg(number)),
            (f"face{number:04d}.json", json.dumps({"label": number % 2}).encode()),
        ]
    return found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 64 samples together; returns their folder."""
    for number, samples in enumerate((range(20), range(20, 50), range(50, 64))):
        write_tar(tmp_path / "shards" / f"s-{number:03d}.tar", members_of(samples))
    return tmp_path / "shards"


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def command(flags: dict[str, str], *, ranks: int = 0, port: int = 29600, script: str = "pretrain.py") -> list[str]:
    """The command line of a run; 0 ranks starts the script without the launcher."""
    words = [str(ROOT / "launch" / script), *(word for n, v in flags.items() for word in (f"--{n}", v))]
    if not ranks:
        return [sys.executable, *words]
    launcher = "from deepspeed.launcher.runner import main; main()"
    return [sys.executable, "-c", launcher, "--num_gpus", str(ranks), "--master_port", str(port), *words]


@pytest.fixture
def pretrain() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs launch/pretrain.py to its end and returns the completed process."""

    def run(flags: dict[str, str], *, ranks: int = 0, port: int = 29600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(flags, ranks=ranks, port=port), env=environment(), capture_output=True, text=True, timeout=300
        )

    return run


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
