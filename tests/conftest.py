"""Shards, runs and ranks for the tests: everything real, only small."""

import contextlib
import functools
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)
# The same cases in every run, so that main does not fail by luck; `make faults` draws new ones.
settings.register_profile("trainer", deadline=None, derandomize="TRAINER_MUTANTS" not in os.environ)
settings.load_profile("trainer")

GRACE_S = 20.0

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


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _icc_profile(name: bytes, space: bytes, tags: dict[bytes, bytes], gamma: float) -> bytes:
    """A small ICC profile, version 2.1; the given tags, and a curve for each that has no content."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78) + b"\0",
        b"cprt": b"text\0\0\0\0free" + bytes(4),
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        **{tag: content or curve for tag, content in tags.items()},
    }
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acspAPPL" + bytes(24)
    head += struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def display_p3() -> bytes:
    """The ICC profile of a phone: Display P3's colourants (adapted to D50) with a plain gamma of 2.2."""
    colourants = {
        b"rXYZ": _xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": _xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": _xyz(0.15710, 0.06657, 0.78407),
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"")
    return _icc_profile(b"Display P3", b"RGB ", colourants | curves, 2.2)


def grey_profile(gamma: float) -> bytes:
    """The ICC profile of a grey scanner."""
    return _icc_profile(b"Scanner", b"GRAY", {b"kTRC": b""}, gamma)


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


def words_of(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def command(flags: dict[str, str], *, ranks: int, port: int, script: str = "pretrain.py") -> list[str]:
    """The command line of a run under DeepSpeed's launcher."""
    launcher = "from deepspeed.launcher.runner import main; main()"
    start = [sys.executable, "-c", launcher, "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*start, str(ROOT / "launch" / script), *words_of(flags)]


class Run:
    """The ranks of a run, with the face of a Popen; its pid leads their process group.

    As under DeepSpeed's launcher, the others are ended some time after one has failed, and its exit code counts.
    """

    def __init__(self, forks: "Forks", pids: list[int], out: Path, err: Path) -> None:
        self._forks, self.pids, self.pid = forks, pids, pids[0]
        self.out, self.err, self.codes = out, err, dict.fromkeys(pids)
        self._failed_s = 0.0

    @property
    def returncode(self) -> int | None:
        codes = list(self.codes.values())
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            self.codes[pid] = self._forks.poll(pid)
            if self.codes[pid] and not self._failed_s:
                self._failed_s = time.monotonic()
        if self.returncode is None and self._failed_s and time.monotonic() > self._failed_s + GRACE_S:
            self.kill()
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.err.read_text()[-5000:])
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Forks:
    """Starts Python scripts as forks of a process that has imported everything: see ranks/fork_server.py."""

    def __init__(self) -> None:
        words = [sys.executable, str(ROOT / "tests" / "ranks" / "fork_server.py")]
        self._server = subprocess.Popen(
            words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def poll(self, pid: int) -> int | None:
        status = self._ask({"poll": pid})["status"]
        return None if status is None else os.waitstatus_to_exitcode(status)

    def start(
        self, script: Path, words: list[str], out: Path, err: Path | None = None, *, ranks: int = 0, **variables: str
    ) -> Run:
        """Start a script as so many ranks of one host, or alone without any variable of a rank."""
        pids: list[int] = []
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks or 1):
            size = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env = environment() | (address | size if ranks else {}) | variables
            order = {"start": [str(script), *words], "env": env, "out": str(out), "err": str(err or out)}
            pids.append(self._ask(order | {"group": pids[0] if pids else 0})["pid"])
        return Run(self, pids, out, err or out)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(60)


@functools.cache
def forks() -> Forks:
    """The server of this session."""
    return Forks()


@pytest.fixture(scope="session", autouse=True)
def _end_of_session() -> Iterator[None]:
    yield
    if forks.cache_info().currsize:
        forks().close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    flags: dict[str, str], *, ranks: int = 0, script: str = "pretrain.py", timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run a script of launch/ to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = forks().start(ROOT / "launch" / script, words_of(flags), out, err, ranks=ranks).wait(timeout)
        return subprocess.CompletedProcess([script], code, out.read_text(), err.read_text())


def run_worker(name: str, words: list[str], folder: Path, *, ranks: int) -> list[dict[str, Any]]:
    """Run a script of tests/ranks/ on so many ranks; returns what each wrote as rank-R.json."""
    started = forks().start(ROOT / "tests" / "ranks" / name, words, folder / "log", ranks=ranks)
    assert started.wait(600) == 0, (folder / "log").read_text()[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
