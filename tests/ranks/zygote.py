"""Starts whole runs of launch/pretrain.py in a second instead of ten: imports once, then forks the ranks of every run.

Reads one JSON object a line: {"words": [...], "ranks": 2, "port": 29800, "log": PATH, "fault": {...} or null} and
answers with the ranks' wait statuses. The runs are real: own processes, own process group, real signals. A fault is
{"phase", "nth", "action", "rank"}: the nth time that this rank comes to that phase it does the action:

    kill       SIGKILL to itself        kill all   SIGKILL to every process of the run
    stop       SIGSTOP to itself        eio        OSError(EIO), from then on
    full       no file of this process may grow beyond a megabyte, from then on

The phases are put around the product's own functions from here; the product knows nothing of them. As DeepSpeed's
launcher does, the others are ended some time after a rank has failed.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch import pretrain
from launch.command_line import run
from trainer import checkpoint, engine, lease

GRACE_S = 20.0


def act(fault: dict[str, Any]) -> None:
    if fault["action"] == "eio":
        raise OSError(errno.EIO, "Input/output error")
    if fault["action"] == "full":
        # Python ignores SIGXFSZ, so that the kernel's answer is an error, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    elif fault["action"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault["action"] == "kill all":
        os.killpg(0, signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def always(*words: Any) -> bool:
    return True


PHASES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "step": (engine.Engine, "step", always),
    "shard": (torch, "save", always),
    "sync": (checkpoint, "sync_files", always),
    "manifest": (checkpoint, "_write_manifest", always),
    "rename": (lease.Lease, "move", lambda self, source, target: target.name.startswith("step-")),
    "latest": (lease.Lease, "write", lambda self, path, text: path.name == "latest"),
    "latest rename": (lease.Lease, "move", lambda self, source, target: target.name == "latest"),
    "pruning": (lease.Lease, "discard", always),
    "pruned": (lease.shutil, "rmtree", lambda path: Path(path).name.startswith("step-")),
}
"""Phase -> the function that it begins with, and for which of its words."""


def arm(fault: dict[str, Any]) -> None:
    """Put the fault before the function that the phase means; of a shard, half is written first."""
    owner, name, applies = PHASES[fault["phase"]]
    original, seen = getattr(owner, name), 0

    def wrapped(*words: Any, **more: Any) -> Any:
        nonlocal seen
        seen += applies(*words)
        if applies(*words) and (seen == fault["nth"] or (fault["action"] == "eio" and seen > fault["nth"])):
            if fault["phase"] == "shard" and fault["action"] != "full":
                original(*words, **more)
                with words[1].open("r+b") as file:
                    file.truncate(words[1].stat().st_size // 2)
            act(fault)
        return original(*words, **more)

    setattr(owner, name, wrapped)


def rank(order: dict[str, Any], number: int) -> None:
    """Become a rank; never returns."""
    os.setpgid(0, 0 if number == 0 else order["group"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": order["ranks"], "LOCAL_SIZE": order["ranks"]}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])}
    fault = order.get("fault")
    if fault and fault["rank"] == number:
        arm(fault)
    sys.argv[0] = "pretrain.py"
    run(lambda: pretrain.main(order["words"]))


def start(order: dict[str, Any]) -> list[int]:
    """Fork the ranks of a run."""
    Path(order["log"]).touch()
    pids: list[int] = []
    for number in range(order["ranks"]):
        order["group"] = pids[0] if pids else 0
        pid = os.fork()
        if pid == 0:
            try:
                rank(order, number)
            finally:
                os._exit(70)
        pids.append(pid)
        if number == 0:
            os.setpgid(pid, pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    """Wait for all; once one has failed, the others have `GRACE_S` to find out by themselves."""
    status: dict[int, int] = {}
    deadline = None
    while len(status) < len(pids):
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            status[pid] = code
            if code and deadline is None:
                deadline = time.monotonic() + GRACE_S
        elif deadline is not None and time.monotonic() > deadline:
            os.killpg(pids[0], signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.01)
    return [status[pid] for pid in pids]


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pids = start(order)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"status": wait(pids)}), flush=True)


if __name__ == "__main__":
    main()
