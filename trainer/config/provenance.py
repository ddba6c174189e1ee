"""What computed the numbers of a run, and how it was started: recorded in every output, for people."""

import contextlib
import functools
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.config.command_line import given_settings
from trainer.errors import TrainerError, without_secrets


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change a number."""
    names = ("torch", "deepspeed", "timm", "webdataset", "albumentations", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def describe_start(argv: Sequence[str], *, num_ranks: int, local_size: int) -> dict[str, Any]:
    """Record how a run was started: the recipe's name, the command, the folder, the commit, the host and the time."""
    with contextlib.suppress(TrainerError):
        return {
            "recipe_name": given_settings(argv[1:]).get("recipe", ""),
            "command": command_line(argv, num_ranks=num_ranks, local_size=local_size),
            "folder": str(Path.cwd()),
            "git_commit": git_commit(Path(__file__).parent),
            "host": socket.gethostname(),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "num_ranks": num_ranks,
        }
    return {}


def command_line(argv: Sequence[str], *, num_ranks: int, local_size: int) -> str:
    """Write down a command that starts the same again, on one host with ``local_size`` ranks."""
    own = [arg for arg in argv if not arg.startswith("--local_rank")]  # the launcher adds it
    start = ["deepspeed", "--num_gpus", str(local_size)] if num_ranks > 1 else ["python"]
    return without_secrets(shlex.join([*start, *own]))


@functools.cache
def git_commit(folder: Path) -> str:
    """Return the commit of the code that runs, with + where files have changed since; empty outside of git."""
    answers = []
    for git_args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(folder), *git_args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    commit, changes = answers
    return commit + "+" * bool(changes)
