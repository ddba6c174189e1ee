"""launch/pretrain.py with a fault: FAULT is null or {"phase", "nth", "action", "rank"}.

The nth time that this rank comes to that phase it does the action:

    kill       SIGKILL to itself        kill all   SIGKILL to every process of the run
    stop       SIGSTOP to itself        eio        OSError(EIO), from then on
    full       no file of this process may grow beyond a megabyte, from then on

The phases are put around the product's own functions from here; the product knows nothing of them.
"""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch import pretrain
from trainer.distributed import engine
from trainer.fault_tolerance import attempts as lease
from trainer.fault_tolerance import checkpoint


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


FAULT = json.loads(os.environ["FAULT"])
if FAULT and FAULT["rank"] == int(os.environ["RANK"]):
    arm(FAULT)
pretrain.command()
