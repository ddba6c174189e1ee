"""The rank's side of the watchdog: start its guardian, tell it the phase, and explain the loss of another rank.

A process has one watchdog, as it has one log. A mark costs a microsecond, takes no lock and makes no system call: it
is written into memory that the guardian (`watchdog_process`) shares. Without `start` nothing is watched and marks do
nothing.
"""

import contextlib
import faulthandler
import json
import logging
import mmap
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.settings import Runtime
from trainer.fault_tolerance import watchdog_process as guardian
from trainer.fault_tolerance.watchdog_process import PHASE_RECORD, Phase, beat_interval_s, tell, verdict_path

if TYPE_CHECKING:
    from trainer.distributed.world import World  # imports torch, which a command line can do without

logger = logging.getLogger(__name__)

_AFTER_AN_ERROR_S = 300
"""A rank that reported its error must be gone after this; interpreters have hung while they left."""
_LATE_RATIO, _LATE_SHARE, _LATE_WINDOWS = 1.5, 0.1, 3
BACKEND_MARGIN_S = 60
"""The backend's own time-out comes so much later than ours, so that one message names the rank."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank may stay in a phase, in seconds; 0 is for ever."""

    timeout_s: int
    data_timeout_s: int
    save_timeout_s: int

    def of_phases(self) -> dict[int, tuple[str, int]]:
        """Return phase -> name and value of the setting that limits it."""
        slow = ("save_timeout_s", self.save_timeout_s)
        return {
            Phase.DATA: ("data_timeout_s", self.data_timeout_s),
            Phase.STEP: ("timeout_s", self.timeout_s),
            **dict.fromkeys((Phase.MEASURING, Phase.DRAWING, Phase.SAVING, Phase.LEAVING), slow),
            **dict.fromkeys((Phase.FAILED, Phase.LOST), ("the time to leave after an error", _AFTER_AN_ERROR_S)),
        }


@dataclass(slots=True)
class _Watch:
    logs: Path
    attempt: str
    rank: int
    num_ranks: int
    memory: mmap.mmap
    process: "subprocess.Popen[bytes]"
    num_marks: int = 0
    step: int = 0
    slow: "SlowRanks" = field(default_factory=lambda: SlowRanks())


class SlowRanks:
    """Finds the rank whose data come late, window after window, while the others wait for it in their collectives."""

    def __init__(self) -> None:
        self._windows: Counter[int] = Counter()

    def after(self, wait_share_of: Sequence[float]) -> list[int]:
        """Return the ranks that have now waited for data far longer than the median, in several windows in a row.

        Args:
            wait_share_of: share of the last window that each rank waited for data, in rank order.
        """
        usual = statistics.median_low(wait_share_of)
        for rank, share in enumerate(wait_share_of):
            late = share > max(_LATE_RATIO * usual, usual + _LATE_SHARE)
            self._windows[rank] = self._windows[rank] + 1 if late else 0
        return [rank for rank, count in self._windows.items() if count and count % _LATE_WINDOWS == 0]


_watch: _Watch | None = None


def start(logs: Path, attempt: str, *, rank: int, num_ranks: int, limits: Limits) -> None:
    """Start the guardian of this rank.

    Args:
        logs: where heartbeats, stacks and the verdict go.
        attempt: names this start of the run, the same on every rank.
        rank: this rank.
        num_ranks: how many there are.
        limits: how long phases may last.
    """
    global _watch
    (logs / "heartbeats").mkdir(parents=True, exist_ok=True)
    marks_fd, stacks_fd = os.memfd_create("marks"), os.memfd_create("stacks")
    os.ftruncate(marks_fd, PHASE_RECORD.size)
    faulthandler.register(guardian.DUMP_SIGNAL, file=stacks_fd, all_threads=True)
    settings = {
        **{"logs": str(logs.absolute()), "attempt": attempt, "rank": rank, "num_ranks": num_ranks},
        **{"pid": os.getpid(), "host": socket.gethostname(), "limits": limits.of_phases()},
        **{"marks_fd": marks_fd, "stacks_fd": stacks_fd},
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, json.dumps(settings)],
        pass_fds=(marks_fd, stacks_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the group of the rank must not end it first
    )
    _watch = _Watch(logs, attempt, rank, num_ranks, mmap.mmap(marks_fd, PHASE_RECORD.size), process)
    set_phase(Phase.STARTING, 0)


def set_phase(phase: Phase, step: int | None = None) -> None:
    """Tell the guardian that this rank enters a phase, of the step it was in unless told."""
    if _watch is not None:
        _watch.num_marks += 1
        _watch.step = _watch.step if step is None else step
        PHASE_RECORD.pack_into(_watch.memory, 0, _watch.num_marks, _watch.step, phase)


def where_we_wait(share: float) -> list[Any]:
    """Return this rank's host and the share of the last window that it waited for data, for `compare_waits`."""
    return [socket.gethostname(), share]


def compare_waits(step: int, found: Sequence[Sequence[Any]]) -> None:
    """Warn, on rank 0, of ranks that keep the others waiting because their data come late.

    Args:
        step: the step that ended the window.
        found: what `where_we_wait` gave on each rank, in rank order.
    """
    if _watch is None or _watch.rank:
        return
    shares = [share for _, share in found]
    for rank in _watch.slow.after(shares):
        logger.warning(
            "step %d: rank %d on %s waits for data %.0f %% of the time, a usual rank %.0f %%: the others wait for it",
            *(step, rank, found[rank][0], 100 * shares[rank], 100 * statistics.median_low(shares)),
        )


def explain_loss(error: BaseException) -> str | None:
    """Say in one message which rank was lost, if that is what the error means; None for any other error.

    The guardian of the lost rank usually speaks first; then the message only points to its words. Where its host is
    gone as well, this rank names the culprit from the heartbeats, once for the job.
    """
    if not _is_loss(error):
        return None
    set_phase(Phase.LOST)
    reason = re.sub(r"^\[.*?\] ", "", str(error)).partition(". ")[0].encode("ascii", "replace").decode()
    if _watch is None:
        return (
            f"the ranks could not connect ({reason}): see that every host was started and reaches MASTER_ADDR, "
            "or raise --timeout_s"
        )
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the launcher ends us too, but not before the message
    with contextlib.suppress(OSError):
        stacks = _watch.logs / "stacks"
        stacks.mkdir(exist_ok=True)
        text = "".join(traceback.format_exception(error))
        (stacks / f"rank-{_watch.rank:05d}.txt").write_text(text, encoding="utf-8")
    verdict = verdict_path(_watch.logs, _watch.attempt)
    deadline = time.monotonic() + 3 * beat_interval_s(_watch.num_ranks)
    while not verdict.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not verdict.exists():
        headline = f"rank {_watch.rank} lost another rank ({reason})"
        # Some rank is gone with its guardian, so that two heartbeats missed are enough to tell which.
        tell(_watch.logs, _watch.attempt, _watch.num_ranks, headline, silent_beats=2)
    return f"this run lost a rank: {verdict} names it; start the same command again to go on"


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed: torch's own errors, or gloo's, which are plain RuntimeErrors of a known wording."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    wording = any(words in str(error) for words in ("/gloo/", "pair closure"))
    return "DistError" in kinds or (isinstance(error, RuntimeError) and wording)


_FOR_EVER_S = 30 * 86400


def backend_timeout_s(runtime: Runtime) -> int:
    """Return the time-out of the backend's collectives: beyond the watchdog's, which names the rank."""
    return runtime.timeout_s + BACKEND_MARGIN_S if runtime.timeout_s else _FOR_EVER_S


def start_watchdog(output: Path, world: "World", runtime: Runtime) -> None:
    """Watch this rank from here on."""
    limits = Limits(runtime.timeout_s, runtime.data_timeout_s, runtime.save_timeout_s)
    attempt = world.on_main(lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    start(output / "logs", attempt, rank=world.rank, num_ranks=world.size, limits=limits)
