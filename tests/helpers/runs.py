"""Starts commands and ranks for the tests, and reads what a run wrote: everything real, only small."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 20.0

TINY = {
    "recipe": "demo",
    "encoder_depth": "2",
    "image_size": "32",
    "patch_size": "8",
    "decoder_width": "32",
    "decoder_depth": "2",
    "decoder_type": "self",
    "predict_share": "1",
    "learning_rate": "1e-3",
    "crop_scale_min": "0.6",
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

_SMALL = {name: TINY[name] for name in ("encoder_depth", "image_size", "patch_size", "global_batch", "micro_batch")}
TINY_DETECTOR = _SMALL | {
    "recipe": "detector_demo",
    "use_lora": "false",
    "use_residual_branch": "false",
    "view_resize": "antialias",
    "crop_scale_min": "0.8",
    "balance_by": "label",
    "epochs": "6",
    "num_lanes": "4",
    "learning_rate": "3e-3",
    "log_every": "5",
    "val_every": "10",
    "progress_bar": "false",
    "oversubscribe": "true",
    "num_workers": "0",
    "num_threads": "1",
}
"""The same for a fine-tuning: flags on top of the detector_demo recipe."""


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def argv_of(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def command(flags: dict[str, str], *, ranks: int, port: int, script: str = "pretrain.py") -> list[str]:
    """The command line of a run under DeepSpeed's launcher."""
    launcher = "from deepspeed.launcher.runner import main; main()"
    start = [sys.executable, "-c", launcher, "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*start, str(ROOT / "launch" / script), *argv_of(flags)]


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

    def until(self, seen: Callable[[], Any], timeout: float = 200) -> None:
        """Wait until this is seen of the run, which must not end before."""
        deadline = time.monotonic() + timeout
        while not seen():
            assert self.poll() is None, self.err.read_text()[-5000:]
            assert time.monotonic() < deadline, self.err.read_text()[-5000:]
            time.sleep(0.005)

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
        code = forks().start(ROOT / "launch" / script, argv_of(flags), out, err, ranks=ranks).wait(timeout)
        return subprocess.CompletedProcess([script], code, out.read_text(), err.read_text())


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def ledger(folder: Path) -> dict[int, list[tuple[int, str]]]:
    """Step -> its (position, key) pairs over all ranks."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path in folder.iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(row["step"], []).append((row["position"], row["key"]))
    return {step: sorted(pairs) for step, pairs in found.items()}


def steps_done(output: Path) -> int:
    """Last step whose metrics stand on disk whole."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
