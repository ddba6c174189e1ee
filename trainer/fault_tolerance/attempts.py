"""Which attempt at a run may change its output: the newest one, and no other.

A scheduler that lost sight of a node starts the run again elsewhere while the old ranks may still live, and a cut node
comes back. So every start takes the next number in OUTPUT/attempts::

    attempts/000007/lease.json    who took it: host, process, time, number of ranks
    attempts/000007/start.json    the step that it began from
    attempts/000007/end.json      how it ended, where it could say so
    attempts/000007/drafts/       everything unfinished of this attempt

Every change of the output is one rename into or out of the attempt's own drafts. A new attempt first takes the drafts
of all older ones away, in one rename each; from then on no rename of theirs can succeed. The file system decides, in
one order for all, without clocks. Files that are appended to are born among the drafts and renamed into place: what an
older process still writes goes into a file without a name.
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
    """One attempt's right to change the output; the same value on every rank."""

    folder: Path

    @property
    def number(self) -> int:
        """Of the attempt, from 1."""
        return int(self.folder.name)

    def draft(self, name: str) -> Path:
        """Return a path for something unfinished, which nobody else uses."""
        return self.folder / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"

    def check(self) -> None:
        """Raise `SupersededError` if a newer attempt has taken over."""
        newest = max(_numbers(self.folder.parent), default=0)
        if newest > self.number or not (self.folder / "drafts").is_dir():
            raise SupersededError(
                f"attempt {self.number} ends: attempt {newest} has taken over {self.folder.parent.parent}, nothing was "
                "written since; look at the newer attempt's log, this one needs no mending"
            )

    def move(self, source: Path, target: Path) -> None:
        """Rename into or out of the drafts, on stable storage when this returns.

        Raises:
            SupersededError: a newer attempt has taken over.
            OSError: the storage refuses.
        """
        try:
            source.replace(target)
        except FileNotFoundError:
            self.check()
            raise
        sync_folder(target.parent)

    def write(self, path: Path, text: str) -> None:
        """Replace a small file: readers see the old text or the new one, also after a power cut.

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
        """Put a file with this text into its place and return it open for more.

        The handle stays with this inode: once a newer attempt has replaced the file, it writes into nothing.

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
        """Give a file a new inode with the same content: an older attempt that has it open writes into nothing.

        Raises:
            SupersededError, OSError: as `move`.
        """
        draft = self.draft(path.name)
        shutil.copyfile(path, draft)
        self.move(draft, path)

    def discard(self, path: Path) -> None:
        """Remove a file or folder of the output; a kill leaves it whole or leaves a draft."""
        trash = self.draft(path.name)
        self.move(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def began(self, step: int, total_steps: int | None = None) -> None:
        """Record where this attempt starts, and how long the schedule is."""
        told = {"step": step} if total_steps is None else {"step": step, "total_steps": total_steps}
        self.write(self.folder / "start.json", json.dumps(told) + "\n")

    def ended(self, how: str) -> None:
        """Record how this attempt ends; an attempt without this was killed or crashed."""
        self.write(self.folder / "end.json", json.dumps({"end": how, "time": _now()}) + "\n")


def acquire(output: Path, *, num_ranks: int) -> Lease:
    """Take the next number and the drafts of every older attempt away. Call on one rank.

    Raises:
        CheckpointError: the output cannot be written to.
    """
    attempts = output / "attempts"
    try:
        attempts.mkdir(parents=True, exist_ok=True)
        ours = {"host": socket.gethostname(), "pid": os.getpid(), "time": _now(), "num_ranks": num_ranks}
        folder = _take_number(attempts, json.dumps(ours) + "\n")
        for number in _numbers(attempts):
            if number < int(folder.name):
                _fence(attempts / f"{number:06d}")
    except OSError as error:
        raise CheckpointError(
            f"{attempts} cannot be written ({error}): mend the storage, or check --output_dir"
        ) from error
    return Lease(folder)


def check_crash_loop(lease: Lease, step: int, *, limit: int) -> None:
    """Stop a run that dies again and again without getting anywhere.

    Args:
        lease: of this attempt.
        step: where it would start.
        limit: how many attempts before it may have died in a row without a newer checkpoint; 0 for any number.

    Raises:
        ConfigError: so many have.
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
            f"{step} and died before another checkpoint: read the end of their logs in OUTPUT/logs, remove the "
            f"cause, start with --max_restarts {len(failed_attempts) + limit}, or save more often with --save_every"
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the output of a run tells of one start."""

    number: int
    host: str
    time: str
    """When it was started, in ISO form."""
    num_ranks: int
    first_step: int | None
    """Where it began; None if it ended before."""
    total_steps: int | None
    """Length of the schedule, where it was recorded."""
    end: str
    """How it said to have ended; empty where it crashed, was killed, or still runs."""
    pid: int = 0


def attempts_of(output: Path) -> list[Attempt]:
    """Read what is known of every start, oldest first."""
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
    """Make a complete attempt beside the others and give it a number by a rename, which only one process wins."""
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
            continue  # another start was faster: its folder is not empty, so the rename fails
        sync_folder(attempts)
        return folder


def _fence(attempt: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # fenced before, perhaps just now by another start
        (attempt / "drafts").rename(attempt / f".fenced-{uuid.uuid4().hex[:8]}")
        sync_folder(attempt)
    for taken in attempt.glob(".fenced-*"):
        shutil.rmtree(taken, ignore_errors=True)  # a process that still writes there can hinder this; the fence stands


def _numbers(attempts: Path) -> set[int]:
    return {int(path.name) for path in attempts.iterdir() if _NUMBER.fullmatch(path.name)}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
