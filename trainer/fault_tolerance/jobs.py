"""Outputs that a command computes once: the same command goes on or leaves them, another one is refused.

A job is described by whatever its output depends on. The description stands in the unfinished output and beside the
finished one, so that a later start can compare.
"""

import fcntl
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import ConfigError

logger = logging.getLogger(__name__)

_NAMES = {"images": "other images, or changed ones", "detector": "another detector", "model": "another model"}


def refuse_other_job(
    description: Mapping[str, Any], found: Mapping[str, Any], *, setting: str, output: Path, path: Path
) -> None:
    """Refuse an output that another job has written, or begun.

    Args:
        description: of this job.
        found: what the file says of its job; empty if it says nothing.
        setting: the flag that names the output, for messages.
        output: its value.
        path: the file that was found.

    Raises:
        ConfigError: the jobs differ; the message has the first difference.
    """
    differing = [name for name, value in description.items() if found.get(name) != value]
    if found and not differing:
        return
    what = "is not of this command"
    if found:
        name = differing[0]
        values = f"{name} {found.get(name)!r} instead of {description[name]!r}"
        what = f"is of {_NAMES.get(name, values)}"
    where = "it" if path == output else path.name
    raise ConfigError(f"{setting} is {output}, but {where} exists and {what}: name another, or remove it")


def open_alone(path: Path, *, setting: str, output: Path) -> BinaryIO:
    """Open a file to append, and keep other commands from it until it is closed.

    Raises:
        ConfigError: the folder cannot be written, or another command has the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigError(
            f"{setting} is {output}, but {path} cannot be written ({error.strerror}): name another place"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"{setting} is {output}, but another command writes it now: wait for its end") from error
    except OSError as error:  # Lustre without -o flock, for example: it works as well without the lock
        logger.warning("%s cannot be locked (%s): start no second command for it", path, error.strerror)
    return file
