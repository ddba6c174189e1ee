"""One training loop on one screen.

The loop knows steps, batches and dates; the engine knows DeepSpeed, the monitor knows files, the checkpoint module
knows commits. No value is read from the device between logging steps.
"""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Progress
from trainer.data.loader import to_device
from trainer.data.stream import Batch
from trainer.engine import Engine
from trainer.errors import DataError
from trainer.guardian import Phase
from trainer.monitor import Ledger, Monitor, Speedometer
from trainer.watchdog import compare_waits, mark, where_we_wait

logger = logging.getLogger(__name__)

_ENOUGH_FOR_A_SHARE = 10_000
"""With fewer samples read, one bad image would already be a large share."""
_SAME_REQUEST_S = 5.0

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

    save: Callable[[], None]
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
    """Remembers SIGTERM and SIGUSR1, which a scheduler sends before it takes the machine away.

    A second signal ends the process at once, with 128 + signal. Schedulers signal every process of a job and launchers
    pass on what they get, so what arrives within a few seconds of the first is the same request.
    """

    def __init__(self) -> None:
        self.seen = False
        self._ends_s = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.seen:
            self.seen, self._ends_s = True, now + _SAME_REQUEST_S
            logger.warning("got %s: saving at the next logging step, then leaving", name)
        elif now >= self._ends_s:
            logger.warning("got %s, the second request: leaving at once, without saving", name)
            mark(Phase.LEAVING)
            os._exit(128 + number)


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
    bad: BadSamples,
    stop: StopRequest,
) -> bool:
    """Train until the last step, or until any rank is asked to stop.

    Returns:
        finished: False if the run was asked to stop; the state is saved either way.
    """
    while progress.step < dates.last_step:
        mark(Phase.DATA, progress.step + 1)
        micro_batches = _wait_for(batches, accumulation, speed)
        mark(Phase.STEP, progress.step + 1)
        learning_rate = learning_rate_at(progress.step)
        loss = engine.step(
            (inputs(to_device(batch, engine.device)) for batch in micro_batches),
            learning_rate=learning_rate,
            seed=seed_at(progress.step),
        )
        progress.step += 1
        step = progress.step
        for batch in micro_batches:
            ledger.consumed(step, batch.positions, batch.keys)
            bad.note(batch)
        speed.step_done()
        monitor.step_done()

        leaving = False
        if dates.due(step, dates.log_every):
            _log(step, engine, loss, learning_rate, monitor=monitor, speed=speed, bad=bad)
            leaving = engine.world.any_over_ranks(stop.seen)  # every rank leaves at the same step
        if dates.due(step, dates.heldout_every):
            mark(Phase.MEASURING, step)
            hooks.measure(step)
        if dates.due(step, dates.picture_every):
            mark(Phase.DRAWING, step)
            hooks.picture(step)
        if dates.due(step, dates.save_every) or leaving:
            mark(Phase.SAVING, step)
            _require_finite(engine, loss, step)
            ledger.flush()
            hooks.save()
            monitor.flush()
        if leaving:
            return False
    return True


def _wait_for(batches: Iterator[Batch], count: int, speed: Speedometer) -> list[Batch]:
    start = time.perf_counter()
    ready = [next(batches) for _ in range(count)]
    speed.waited(time.perf_counter() - start)
    return ready


def _log(
    step: int,
    engine: Engine,
    loss: Tensor,
    learning_rate: float,
    *,
    monitor: Monitor,
    speed: Speedometer,
    bad: BadSamples,
) -> None:
    """Read the device, once, and tell the monitor."""
    values: dict[str, Any] = {
        "loss": _require_finite(engine, loss, step),
        "lr": learning_rate,
        "grad_norm": engine.grad_norm(),
        **speed.read(),
        **{f"bad_samples_{reason}": count for reason, count in bad.agree(engine).items()},
    }
    compare_waits(step, engine.world.gather_over_ranks(where_we_wait(values["data_wait_share"])))
    monitor.scalars(step, values)


def _require_finite(engine: Engine, loss: Tensor, step: int) -> float:
    """Return the loss over all ranks; a run that lost its numbers stops on all ranks and saves nothing."""
    value = engine.mean_over_ranks(loss)
    if not torch.isfinite(value):
        raise DataError(
            f"the loss at step {step} is {float(value)}; nothing was saved since the last checkpoint: "
            "lower learning_rate, set clip_grad_norm 1.0, or look at the samples of this step with --sample_ledger"
        )
    return float(value)
