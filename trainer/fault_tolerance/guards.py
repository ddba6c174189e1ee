"""What ends a run early and in order: too many unreadable samples, bad steps, loss spikes, signals."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from trainer.data.stream import Batch
from trainer.distributed.engine import StepResult
from trainer.distributed.world import World
from trainer.errors import DataError
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.checkpoint import Progress
from trainer.fault_tolerance.nonfinite import BadSteps, SpikeWatch
from trainer.fault_tolerance.watchdog import set_phase
from trainer.fault_tolerance.watchdog_process import Phase

logger = logging.getLogger(__name__)

_MIN_SAMPLES_FOR_SHARE = 10_000
"""With fewer samples read, one bad image would already be a large share."""
_SAME_REQUEST_S, _SAME_KEY_S = 5.0, 1.0
"""So long after the first signal another one is the same request; the second is for Ctrl-C."""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(slots=True)
class BadSamples:
    """Counts substituted samples, and stops a run with too many."""

    max_share: float
    reasons: Counter[str] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)
    num_read: int = 0

    def note(self, batch: Batch) -> None:
        """Add the counts of one batch."""
        self.num_read += len(batch.keys)
        self.reasons.update(batch.bad)
        self.keys = (self.keys + batch.bad_keys)[:20]

    def record(self) -> list[Any]:
        """Return this rank's counts, for `agree`."""
        return [dict(self.reasons), self.keys, self.num_read]

    def agree(self, found: Sequence[Sequence[Any]]) -> dict[str, int]:
        """Sum the reasons over the ranks, alike on each.

        Args:
            found: the `record` of each rank.

        Raises:
            DataError: when the share of bad samples is above the limit.
        """
        reasons: Counter[str] = sum((Counter(f[0]) for f in found), Counter())
        num_read, num_bad = sum(f[2] for f in found), reasons.total()
        if num_bad > self.max_share * max(num_read, _MIN_SAMPLES_FOR_SHARE):
            keys = [key for f in found for key in f[1]][:10]
            raise DataError(
                f"{num_bad} of {num_read} samples could not be decoded ({dict(reasons)}), which is above "
                f"max_bad_sample_share {self.max_share}; among them {', '.join(keys)}: repair the shards, or raise it"
            )
        return dict(reasons)


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, which a scheduler sends before it takes the machine away, and Ctrl-C.

    A second request ends the process at once, with 128 + signal. Schedulers and terminals signal every process of a
    job, and launchers pass signals on, so a signal within 5 seconds of the first counts as the same request. A second
    Ctrl-C counts after 1 second, because people do not wait.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked to stop, or 0."""
        self._first_s = 0.0
        for number in _STOP_SIGNALS:
            signal.signal(number, self._note)

    @property
    def seen(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.number != 0

    def close(self) -> None:
        """Ignore signals from now on: everything is saved, and srun signals the other ranks when the first has left."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = name_of_signal(number), time.monotonic()
        if not self.seen:
            self.number, self._first_s = number, now
            once_more = "; once more leaves at once, without saving" if number == signal.SIGINT else ""
            logger.warning("got %s: saving after this step or the next, then leaving%s", name, once_more)
        elif now >= self._first_s + (_SAME_KEY_S if number == self.number == signal.SIGINT else _SAME_REQUEST_S):
            logger.warning("got %s, the second request: leaving at once, without saving", name)
            set_phase(Phase.LEAVING)
            os._exit(128 + number)


def name_of_signal(number: int) -> str:
    """Name a signal as its sender knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@dataclass(frozen=True, slots=True)
class Guards:
    """What may end a run, or send it back to a checkpoint: data, numbers, signals, newer attempts at the same run."""

    bad_samples: BadSamples
    bad_steps: BadSteps
    spikes: SpikeWatch
    stop: StopRequest
    lease: Lease

    def must_go_back(self, progress: Progress, result: StepResult, batches: Sequence[Batch], world: World) -> bool:
        """Look at a step that was done; True if the loss spikes and the run must go back. All ranks call.

        Raises:
            DataError: on all ranks, when too many steps in a row could not be applied.
        """
        for batch in batches:
            self.bad_samples.note(batch)
        self.bad_steps.note(progress, result, batches, world)
        return self.spikes.note(progress, result)
