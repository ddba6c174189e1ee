"""Hosts on this machine, and what a run on them left behind: see tests/cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.runs import ROOT, TINY, environment

SCRIPT = str(ROOT / "tests" / "cluster" / "hosts.sh")


class Lab:
    """Hosts on this machine; they share its files."""

    def __init__(self, folder: Path, hosts: str) -> None:
        self.folder, self.hosts = folder, hosts.split()
        self._about = {"DIR": str(folder), "HOSTS": hosts, "LAB": f"t{os.getpid()}"}
        path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
        self.environment = environment() | {
            "PATH": path,
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "TRAINER_PYTHON": sys.executable,
        }

    def __call__(self, *words: str) -> None:
        """Up, down, slurm, cut, heal or crash."""
        done = subprocess.run([SCRIPT, *words], env=self.environment | self._about, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, host: str, words: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [SCRIPT, "on", host, "/usr/bin/env", "-C", str(ROOT), *words],
                env=self.environment | self._about | more,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def on(self, host: str, *words: str, code: int | None = 0, **more: str) -> str:
        """Run a command on a host from the project's folder; returns what it printed."""
        done = subprocess.run(
            [SCRIPT, "on", host, "/usr/bin/env", "-C", str(ROOT), *words],
            env=self.environment | self._about | more,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert code is None or done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def slurm(self, *words: str, **more: Any) -> str:
        return self.on("head", *words, **{"SLURM_CONF": f"{self.folder}/slurm/slurm.conf"} | more)


def wait_for(seen: Callable[[], Any], what: Callable[[], str], timeout_s: float = 150) -> Any:
    """Look again and again until something is there."""
    deadline = time.monotonic() + timeout_s
    while not (found := seen()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return found


def num_steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def flags_of(shards: Path, output: Path, steps: int, **changes: str) -> dict[str, str]:
    """The words of a small training of so many steps."""
    where = {"data": str(shards), "output_dir": str(output), "sample_ledger": f"{output}-ledger"}
    short = {
        "epochs": str(steps * 8 / 64),
        "warmup_epochs": "0",
        "save_every": "10",
        "num_workers": "0",
        "start_timeout_s": "60",
    }
    return TINY | where | short | changes


def consumed(output: Path) -> list[int]:
    """The positions that the optimizer consumed, from the ledgers of all ranks, in order."""
    lines = [line for path in Path(f"{output}-ledger").iterdir() for line in path.read_text().splitlines()]
    return sorted(json.loads(line)["position"] for line in lines)
