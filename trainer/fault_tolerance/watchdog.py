"""The rank's side of the watchdog: start the watchdog process, report the phase, and explain the loss of another rank.

A process has one watchdog, as it has one log. `set_phase` costs a microsecond, takes no lock and makes no system call:
it writes into memory that the watchdog process (`watchdog_process`) shares. Without `start` it does nothing.
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
from trainer.fault_tolerance import watchdog_process
from trainer.fault_tolerance.watchdog_process import PHASE_RECORD, Phase, beat_interval_s, report_culprit, verdict_path

if TYPE_CHECKING:
    from trainer.distributed.world import World  # imports torch, which a command line can do without

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT_S = 300
"""A rank that reported its error must have ended after this time; interpreters have hung at exit."""
_LATE_RATIO, _LATE_SHARE, _LATE_WINDOWS = 1.5, 0.1, 3
BACKEND_MARGIN_S = 60
"""The backend's own time-out comes this much later than the watchdog's, whose message names the rank."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank may stay in a phase, in seconds; 0 means no limit."""

    timeout_s: int
    data_timeout_s: int
    save_timeout_s: int

    def of_phases(self) -> dict[int, tuple[str, int]]:
        """Return phase -> name and value of the setting that limits it."""
        slow = ("save_timeout_s", self.save_timeout_s)
        return {
            Phase.DATA: ("data_timeout_s", self.data_timeout_s),
            Phase.STEP: ("timeout_s", self.timeout_s),
            # NCCL connects at its first collective, in DeepSpeed's start; before it, indices of any size are built.
            **dict.fromkeys((Phase.CONNECTING, Phase.MEASURING, Phase.DRAWING, Phase.SAVING), slow),
            Phase.LEAVING: ("the time to leave", _EXIT_TIMEOUT_S),  # all is saved; NCCL may hang at its end
            **dict.fromkeys((Phase.FAILED, Phase.LOST), ("the time to leave after an error", _EXIT_TIMEOUT_S)),
        }


@dataclass(slots=True)
class _Watch:
    logs: Path
    attempt: str
    rank: int
    num_ranks: int
    memory: mmap.mmap
    process: "subprocess.Popen[bytes]"
    num_records: int = 0
    step: int = 0
    slow: "SlowRanks" = field(default_factory=lambda: SlowRanks())


class SlowRanks:
    """Finds the rank that waits for data window after window, while the others wait for it in their collectives."""

    def __init__(self) -> None:
        self._windows: Counter[int] = Counter()

    def after(self, wait_share_of: Sequence[float]) -> list[int]:
        """Return the ranks that have now waited for data far longer than the median, for 3, 6, 9... windows in a row.

        With a median of 10 % a rank is late above 20 % (the median plus 10 points is more than 1.5 times the median);
        with a median of 40 %, above 60 %.

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
    """Start the watchdog process of this rank.

    Args:
        logs: folder of heartbeats, stacks and the verdict.
        attempt: name of this start of the run, the same on every rank.
        rank: this rank.
        num_ranks: number of ranks.
        limits: how long phases may last.
    """
    global _watch
    (logs / "heartbeats").mkdir(parents=True, exist_ok=True)
    phase_fd, stacks_fd = os.memfd_create("phase"), os.memfd_create("stacks")
    os.ftruncate(phase_fd, PHASE_RECORD.size)
    faulthandler.register(watchdog_process.DUMP_SIGNAL, file=stacks_fd, all_threads=True)
    settings = {
        **{"logs": str(logs.absolute()), "attempt": attempt, "rank": rank, "num_ranks": num_ranks},
        **{"pid": os.getpid(), "host": socket.gethostname(), "limits": limits.of_phases()},
        **{"phase_fd": phase_fd, "stacks_fd": stacks_fd},
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog_process.__file__, json.dumps(settings)],
        pass_fds=(phase_fd, stacks_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the rank's process group must not end the watchdog process first
    )
    _watch = _Watch(logs, attempt, rank, num_ranks, mmap.mmap(phase_fd, PHASE_RECORD.size), process)
    set_phase(Phase.STARTING, 0)


def set_phase(phase: Phase, step: int | None = None) -> None:
    """Report to the watchdog process that this rank enters a phase; without a step, of the same step as before."""
    if _watch is not None:
        _watch.num_records += 1
        _watch.step = _watch.step if step is None else step
        PHASE_RECORD.pack_into(_watch.memory, 0, _watch.num_records, _watch.step, phase)


def data_wait_record(share: float) -> list[Any]:
    """Return this rank's host and the share of the last window that it waited for data, for `compare_waits`."""
    return [socket.gethostname(), share]


def compare_waits(step: int, found: Sequence[Sequence[Any]]) -> None:
    """Warn, on rank 0, about ranks that delay the others because their data come late.

    Args:
        step: the step that ended the window.
        found: the `data_wait_record` of each rank, in rank order.
    """
    if _watch is None or _watch.rank:
        return
    shares = [share for _, share in found]
    for rank in _watch.slow.after(shares):
        logger.warning(
            "step %d: rank %d on %s waits for data %.0f %% of the time, the median is %.0f %%: the others wait for it",
            *(step, rank, found[rank][0], 100 * shares[rank], 100 * statistics.median_low(shares)),
        )


def explain_loss(error: BaseException) -> str | None:
    """Return one message that names the lost rank, if the error means that a rank was lost; else None.

    The watchdog process of the lost rank usually reports first; then the message only points to its file. If its host
    is lost too, this rank names the culprit from the heartbeats, once for the job.
    """
    if not _is_loss(error):
        return None
    set_phase(Phase.LOST)
    reason = re.sub(r"^\[.*?\] ", "", str(error)).partition(". ")[0].encode("ascii", "replace").decode()
    if _watch is None:
        return (
            f"the ranks could not connect ({reason}): check that every host was started and reaches MASTER_ADDR, "
            "or raise --timeout_s"
        )
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the launcher ends this rank too, but the message must come first
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
        # A connection broke, so some rank is gone with its watchdog process: two missed heartbeats name it.
        report_culprit(_watch.logs, _watch.attempt, _watch.num_ranks, headline, silent_beats=2)
    return f"this run lost a rank: {verdict} names it; start the same command again to continue"


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed: torch's own errors, or gloo's, which are plain RuntimeErrors with known texts."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    is_from_gloo = any(text in str(error) for text in ("/gloo/", "pair closure"))
    return "DistError" in kinds or (isinstance(error, RuntimeError) and is_from_gloo)


_NO_TIMEOUT_S = 30 * 86400


def backend_timeout_s(runtime: Runtime) -> int:
    """Return the time-out of the backend's collectives, later than the watchdog's, which names the rank."""
    return runtime.timeout_s + BACKEND_MARGIN_S if runtime.timeout_s else _NO_TIMEOUT_S


def start_watchdog(output: Path, world: "World", runtime: Runtime) -> None:
    """Watch this rank from now on."""
    limits = Limits(runtime.timeout_s, runtime.data_timeout_s, runtime.save_timeout_s)
    attempt = world.on_main(lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    start(output / "logs", attempt, rank=world.rank, num_ranks=world.size, limits=limits)
