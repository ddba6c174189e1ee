"""One training loop on one screen.

The loop knows steps, batches and dates; the engine knows DeepSpeed, the monitor knows files, the checkpoint module
knows commits, numerics what is done about losses that are not finite or jump. Each step reads the device once, inside
the engine, where the ranks agree.
"""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

from torch import Tensor

from trainer.checkpoint import Progress
from trainer.data.loader import to_device
from trainer.data.stream import Batch
from trainer.distributed.engine import Engine, StepResult
from trainer.errors import DataError
from trainer.guardian import Phase
from trainer.lease import Lease
from trainer.monitor import Ledger, Monitor, Speedometer
from trainer.numerics import BadSteps, SpikeWatch
from trainer.watchdog import compare_waits, mark, where_we_wait

logger = logging.getLogger(__name__)

_ENOUGH_FOR_A_SHARE = 10_000
"""With fewer samples read, one bad image would already be a large share."""
_SAME_REQUEST_S, _SAME_KEY_S = 5.0, 1.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

Inputs = Callable[[Batch], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Dates:
    """When things happen, in optimizer steps; everything also happens at the last step."""

    last_step: int
    log_every: int
    save_every: int
    heldout_every: int
    picture_every: int

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return step % every == 0 or step == self.last_step


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop does at its dates; each is called on all ranks."""

    save: Callable[[], Any]
    measure: Callable[[int], None]
    picture: Callable[[int], None]


@dataclass(slots=True)
class BadSamples:
    """Counts substituted samples and stops a run whose data is rotten."""

    max_share: float
    reasons: Counter[str] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)
    num_read: int = 0

    def note(self, batch: Batch) -> None:
        """Add what one batch met."""
        self.num_read += len(batch.keys)
        self.reasons.update(batch.bad)
        self.keys = (self.keys + batch.bad_keys)[:20]

    def agree(self, engine: Engine) -> dict[str, int]:
        """Sum the reasons over the ranks.

        Raises:
            DataError: on all ranks, when the share of bad samples is above the limit.
        """
        found = engine.world.gather_over_ranks([dict(self.reasons), self.keys, self.num_read])
        reasons: Counter[str] = sum((Counter(f[0]) for f in found), Counter())
        num_read, num_bad = sum(f[2] for f in found), reasons.total()
        if num_bad > self.max_share * max(num_read, _ENOUGH_FOR_A_SHARE):
            keys = [key for f in found for key in f[1]][:10]
            raise DataError(
                f"{num_bad} of {num_read} samples could not be decoded ({dict(reasons)}), which is above "
                f"max_bad_sample_share {self.max_share}; among them {', '.join(keys)}: mend the shards or raise it"
            )
        return dict(reasons)


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, which a scheduler sends before it takes the machine away, and Ctrl-C.

    A second signal ends the process at once, with 128 + signal. Schedulers and terminals signal every process of a job
    and launchers pass on what they get, so what arrives within a few seconds of the first is the same request; a second
    Ctrl-C counts earlier, because people do not wait.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked, or 0."""
        self._came_s = 0.0
        for number in _STOP_SIGNALS:
            signal.signal(number, self._note)

    @property
    def seen(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.number != 0

    def close(self) -> None:
        """Ignore the signals from here on: all is saved, and srun ends the others when the first rank has left."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = name_of_signal(number), time.monotonic()
        if not self.seen:
            self.number, self._came_s = number, now
            once_more = "; once more leaves at once, without saving" if number == signal.SIGINT else ""
            logger.warning("got %s: saving after this step or the next, then leaving%s", name, once_more)
        elif now >= self._came_s + (_SAME_KEY_S if number == self.number == signal.SIGINT else _SAME_REQUEST_S):
            logger.warning("got %s, the second request: leaving at once, without saving", name)
            mark(Phase.LEAVING)
            os._exit(128 + number)


def name_of_signal(number: int) -> str:
    """Name a signal as its sender knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Outcome(Enum):
    """How `train` ended."""

    FINISHED = "the last step is done"
    STOPPED = "a rank was asked to stop"
    SPIKED = "the loss jumped and stayed, and the run must go back"


@dataclass(frozen=True, slots=True)
class Guards:
    """What looks after the data, the numbers, the wishes of the scheduler and newer attempts at the same run."""

    bad_samples: BadSamples
    bad_steps: BadSteps
    spikes: SpikeWatch
    stop: StopRequest
    lease: Lease


def train(
    engine: Engine,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    inputs: Inputs,
    learning_rate_at: Callable[[int], float],
    seed_at: Callable[[int], int],
    accumulation: int,
    dates: Dates,
    hooks: Hooks,
    monitor: Monitor,
    ledger: Ledger,
    speed: Speedometer,
    guards: Guards,
) -> Outcome:
    """Train until the last step, until any rank is asked to stop, or until the loss spikes.

    The state is saved at the end, but not of a spike.
    """
    while progress.step < dates.last_step:
        mark(Phase.DATA, progress.step + 1)
        micro_batches = _wait_for(batches, accumulation, speed)
        mark(Phase.STEP, progress.step + 1)
        learning_rate = learning_rate_at(progress.step)
        result = engine.step(
            (inputs(to_device(batch, engine.device)) for batch in micro_batches),
            learning_rate=learning_rate,
            seed=seed_at(progress.step),
            stop=guards.stop.seen,
        )
        progress.step += 1
        step = progress.step
        for batch in micro_batches:
            guards.bad_samples.note(batch)
            if result.applied:
                ledger.consumed(step, batch.positions, batch.keys)
        speed.step_done()
        monitor.step_done()
        guards.bad_steps.note(progress, result, micro_batches, engine.world)
        if guards.spikes.note(progress, result):
            return Outcome.SPIKED

        if dates.due(step, dates.log_every) or result.stop:
            engine.world.on_main(guards.lease.check)
            _log(progress, engine, result, learning_rate, monitor=monitor, speed=speed, bad=guards.bad_samples)
        if dates.due(step, dates.heldout_every):
            mark(Phase.MEASURING, step)
            hooks.measure(step)
        if dates.due(step, dates.picture_every):
            mark(Phase.DRAWING, step)
            hooks.picture(step)
        if dates.due(step, dates.save_every) or result.stop:
            mark(Phase.SAVING, step)
            engine.check_finite()
            ledger.flush()
            hooks.save()
            monitor.flush()
        if result.stop:
            return Outcome.STOPPED
    return Outcome.FINISHED


def _wait_for(batches: Iterator[Batch], count: int, speed: Speedometer) -> list[Batch]:
    start = time.perf_counter()
    ready = [next(batches) for _ in range(count)]
    speed.waited(time.perf_counter() - start)
    return ready


def _log(
    progress: Progress,
    engine: Engine,
    result: StepResult,
    learning_rate: float,
    *,
    monitor: Monitor,
    speed: Speedometer,
    bad: BadSamples,
) -> None:
    """Tell the monitor how the run stands."""
    values: dict[str, Any] = {
        "loss": result.loss,
        "lr": learning_rate,
        "grad_norm": engine.grad_norm(),
        **speed.read(),
        "skipped_steps": progress.skipped_steps,
        "rollbacks": len(progress.skips),
        **{f"bad_samples_{reason}": count for reason, count in bad.agree(engine).items()},
    }
    compare_waits(progress.step, engine.world.gather_over_ranks(where_we_wait(values["data_wait_share"])))
    monitor.scalars(progress.step, values)
