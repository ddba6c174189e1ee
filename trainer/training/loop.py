"""One training loop on one screen.

The loop knows steps, batches and dates; the engine knows DeepSpeed, the monitor knows files, the checkpoint module
knows commits, numerics what is done about losses that are not finite or jump. Each step reads the device once, inside
the engine, where the ranks agree.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from trainer.data.loader import to_device
from trainer.data.stream import Batch
from trainer.distributed.engine import Engine, StepResult
from trainer.fault_tolerance.checkpoint import Progress
from trainer.fault_tolerance.guards import BadSamples, Guards
from trainer.fault_tolerance.ledger import Ledger
from trainer.fault_tolerance.watchdog import compare_waits, set_phase, where_we_wait
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.training.monitor import Monitor
from trainer.training.throughput import Speedometer

logger = logging.getLogger(__name__)


Inputs = Callable[[Batch], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Intervals:
    """When things happen, in optimizer steps; everything also happens at the last step."""

    last_step: int
    log_every: int
    save_every: int
    val_every: int
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


class Outcome(Enum):
    """How `train` ended."""

    FINISHED = "the last step is done"
    STOPPED = "a rank was asked to stop"
    SPIKED = "the loss jumped and stayed, and the run must go back"


def train(
    engine: Engine,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    inputs: Inputs,
    learning_rate_at: Callable[[int], float],
    seed_at: Callable[[int], int],
    accumulation: int,
    dates: Intervals,
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
        set_phase(Phase.DATA, progress.step + 1)
        micro_batches = _wait_for(batches, accumulation, speed)
        set_phase(Phase.STEP, progress.step + 1)
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
        if dates.due(step, dates.val_every):
            set_phase(Phase.MEASURING, step)
            hooks.measure(step)
        if dates.due(step, dates.picture_every):
            set_phase(Phase.DRAWING, step)
            hooks.picture(step)
        if dates.due(step, dates.save_every) or result.stop:
            set_phase(Phase.SAVING, step)
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
