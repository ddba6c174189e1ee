"""Only the newest attempt at a run may change its output; older ones are fenced off by a rename.

A scheduler that loses contact with a node starts the run again elsewhere. The old ranks may still be alive, and may
write again when the network returns. So every start takes the next number in OUTPUT/attempts::

    attempts/000007/lease.json    who took it: host, process, time, number of ranks
    attempts/000007/start.json    the step that it began from
    attempts/000007/end.json      how it ended; missing where it crashed or was killed
    attempts/000007/drafts/       the unfinished files of this attempt

Every change of the output is one rename into or out of the attempt's own drafts folder. A new attempt first renames the
drafts folder of every older one. After that, no rename of an older attempt can find its source::

    attempt 7 (cut off)                           attempt 8 (new)
    writes 000007/drafts/step-500                 creates 000008
                                                  renames 000007/drafts to 000007/.fenced-1a2b3c4d
    renames 000007/drafts/step-500
      to checkpoints/step-500: no such file
    finds 000008, ends with SupersededError       goes on from checkpoints/step-400

The rename of attempt 7 comes either before the fence, and attempt 8 sees a finished checkpoint, or after it, and fails.
The file system puts both in one order for all hosts; no clock takes part.

A file that is appended to is also created in the drafts folder and renamed into place. A newer attempt replaces it in
the same way, so the old process keeps writing to an inode that has lost its name.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from trainer.errors import CheckpointError, ConfigError, SupersededError
from trainer.files import read_json, sync_folder, write_synced

_NUMBER = re.compile(r"\d{6,}")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one attempt to change the output; the same value on every rank."""

    folder: Path

    @property
    def number(self) -> int:
        """Number of the attempt, from 1."""
        return int(self.folder.name)

    def draft(self, name: str) -> Path:
        """Return a new path in the drafts folder."""
        return self.folder / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"

    def check(self) -> None:
        """Raise `SupersededError` if a newer attempt has taken over."""
        newest = max(_numbers(self.folder.parent), default=0)
        if newest > self.number or not (self.folder / "drafts").is_dir():
            raise SupersededError(
                f"attempt {self.number} ends: attempt {newest} has taken over {self.folder.parent.parent}; nothing was "
                "written since and this attempt needs no action: see the log of the newer one"
            )

    def move(self, source: Path, target: Path) -> None:
        """Rename into or out of the drafts folder; the rename is on stable storage when this returns.

        Raises:
            SupersededError: a newer attempt has taken over.
            OSError: the storage fails.
        """
        try:
            source.replace(target)
        except FileNotFoundError:
            self.check()
            raise
        sync_folder(target.parent)

    def write(self, path: Path, text: str) -> None:
        """Replace a small file: readers see the old text or the new one, even after a power failure.

        Raises:
            SupersededError, OSError: as `move`.
        """
        draft = self.draft(path.name)
        try:
            write_synced(draft, text)
        except FileNotFoundError:
            self.check()
            raise
        self.move(draft, path)

    def append_to(self, path: Path, kept: str) -> TextIO:
        """Replace a file by one with this text, and return it open for appending.

        The handle stays with this inode. Once a newer attempt has replaced the file, what is appended here is lost.

        Raises:
            SupersededError, OSError: as `move`.
        """
        draft = self.draft(path.name)
        try:
            file = draft.open("w")
        except FileNotFoundError:
            self.check()
            raise
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
        self.move(draft, path)
        return file

    def detach(self, path: Path) -> None:
        """Copy a file to a new inode under the same name: an older attempt that has it open no longer writes to it.

        Raises:
            SupersededError, OSError: as `move`.
        """
        draft = self.draft(path.name)
        shutil.copyfile(path, draft)
        self.move(draft, path)

    def discard(self, path: Path) -> None:
        """Remove a file or folder of the output atomically; a kill leaves it unchanged, or as a draft."""
        trash = self.draft(path.name)
        self.move(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def began(self, step: int, total_steps: int | None = None) -> None:
        """Record the step at which this attempt starts, and the length of the schedule."""
        start = {"step": step} if total_steps is None else {"step": step, "total_steps": total_steps}
        self.write(self.folder / "start.json", json.dumps(start) + "\n")

    def ended(self, how: str) -> None:
        """Record how this attempt ends; an attempt without this was killed or crashed."""
        self.write(self.folder / "end.json", json.dumps({"end": how, "time": _now()}) + "\n")


def acquire(output: Path, *, num_ranks: int) -> Lease:
    """Take the next number and fence off every older attempt. Call on one rank.

    Raises:
        CheckpointError: the output cannot be written to.
    """
    attempts = output / "attempts"
    try:
        attempts.mkdir(parents=True, exist_ok=True)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": _now(), "num_ranks": num_ranks}
        folder = _take_number(attempts, json.dumps(holder) + "\n")
        for number in _numbers(attempts):
            if number < int(folder.name):
                _fence(attempts / f"{number:06d}")
    except OSError as error:
        raise CheckpointError(
            f"{attempts} cannot be written ({error}): repair the storage, or check --output_dir"
        ) from error
    return Lease(folder)


def check_crash_loop(lease: Lease, step: int, *, limit: int) -> None:
    """Stop a run that fails again and again at the same step.

    With a limit of 3: attempts 4, 5 and 6 all began at step 500 and were killed. Attempt 7 would begin there too, so it
    is refused. Attempts that were refused before they trained do not count. An attempt that ended by itself or began at
    another step ends the count.

    Args:
        lease: of this attempt.
        step: where it would start.
        limit: how many attempts in a row may have failed without a newer checkpoint; 0 means any number.

    Raises:
        ConfigError: the limit is reached.
    """
    failed_attempts = []
    for number in sorted(_numbers(lease.folder.parent) - {lease.number}, reverse=True):
        folder = lease.folder.parent / f"{number:06d}"
        end = read_json(folder / "end.json").get("end", "")
        if end.startswith("refused"):
            continue
        if end or read_json(folder / "start.json").get("step", step) != step:
            break
        failed_attempts.append(number)
    if limit and len(failed_attempts) >= limit:
        raise ConfigError(
            f"max_restarts is {limit}, and attempts {failed_attempts[-1]} to {failed_attempts[0]} all began at step "
            f"{step} and failed before another checkpoint: read the end of their logs in OUTPUT/logs, remove the "
            f"cause, start with --max_restarts {len(failed_attempts) + limit}, or save more often with --save_every"
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """The record of one start of a run."""

    number: int
    host: str
    time: str
    """When it started, as an ISO 8601 date."""
    num_ranks: int
    first_step: int | None
    """Where it began; None if it ended before that."""
    total_steps: int | None
    """Length of the schedule, where it was recorded."""
    end: str
    """How it ended, as it recorded; empty where it crashed, was killed, or still runs."""
    pid: int = 0


def attempts_of(output: Path) -> list[Attempt]:
    """Read the record of every start, oldest first."""
    found = []
    for number in sorted(_numbers(output / "attempts")) if (output / "attempts").is_dir() else []:
        folder = output / "attempts" / f"{number:06d}"
        lease, start, end = (read_json(folder / name) for name in ("lease.json", "start.json", "end.json"))
        found.append(
            Attempt(
                number,
                str(lease.get("host", "?")),
                str(lease.get("time", "?")),
                int(lease.get("num_ranks", 0)),
                start.get("step"),
                start.get("total_steps"),
                str(end.get("end", "")),
                int(lease.get("pid", 0)),
            )
        )
    return found


def _take_number(attempts: Path, text: str) -> Path:
    """Create a complete attempt folder, then rename it to the next number; only one of several starts can win that."""
    draft = attempts / f".new-{uuid.uuid4().hex}"
    (draft / "drafts").mkdir(parents=True)
    write_synced(draft / "lease.json", text)
    while True:
        folder = attempts / f"{max(_numbers(attempts), default=0) + 1:06d}"
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            continue  # another start took this number: its folder is not empty, so the rename failed
        sync_folder(attempts)
        return folder


def _fence(attempt: Path) -> None:
    """Take the drafts folder of an older attempt away and remove it."""
    with contextlib.suppress(FileNotFoundError):  # another start has fenced it already
        (attempt / "drafts").rename(attempt / f".fenced-{uuid.uuid4().hex[:8]}")
        sync_folder(attempt)
    for fenced in attempt.glob(".fenced-*"):
        shutil.rmtree(fenced, ignore_errors=True)  # may fail while an old process writes there; the fence holds anyway


def _numbers(attempts: Path) -> set[int]:
    return {int(path.name) for path in attempts.iterdir() if _NUMBER.fullmatch(path.name)}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
