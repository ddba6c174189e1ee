"""One training loop on one screen: wait for data, step, log, validate, probe, draw, save.

The loop knows the order. The task knows what is trained, the engine knows DeepSpeed, the monitor knows files, the
checkpoint module knows commits, and the guards know what ends a run early. The host waits for the device at the end of
a step only, inside the engine (`Engine.step`).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor
from torch.profiler import record_function

from trainer.data.loader import to_device
from trainer.data.stream import Batch
from trainer.distributed.engine import Engine, StepResult
from trainer.fault_tolerance.checkpoint import Progress, Saver
from trainer.fault_tolerance.guards import Guards
from trainer.fault_tolerance.ledger import Ledger
from trainer.fault_tolerance.watchdog import compare_waits, data_wait_record, set_phase
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.training.monitor import Monitor
from trainer.training.profiling import StepProfiler
from trainer.training.schedule import Schedule
from trainer.training.throughput import Speedometer


class Task(Protocol):
    """What pre-training and fine-tuning do differently. Every method is called on all ranks."""

    flops_per_image: int
    """Of one training step, for the MFU."""
    val_every: int
    """Steps between two calls of `validate`."""
    draw_every: int | None
    """Steps between two calls of `draw`; None for a task that draws nothing."""
    probe_every: int | None
    """Steps between two calls of `probe`, which is also called before the first step; None without probes."""
    tags: frozenset[str]
    """Names in TensorBoard of the figures that validation and probes record."""

    def loss_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the model's forward turns into the loss of a micro batch, which is on the device already."""

    def validate(self, step: int, monitor: Monitor) -> None:
        """Measure the model on the validation data, and record the figures."""

    def draw(self, step: int, monitor: Monitor) -> None:
        """Record pictures."""

    def probe(self, step: int, monitor: Monitor) -> None:
        """Measure the encoder's features on labelled data, and record the figures."""

    def finish(self, step: int) -> None:
        """Do what belongs after the last step of the schedule; not called for a run that was asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a run leaves behind: figures, the ledger of its samples, checkpoints."""

    monitor: Monitor
    ledger: Ledger
    speed: Speedometer
    saver: Saver
    profiler: StepProfiler

    def step_done(self, step: int, result: StepResult, batches: Sequence[Batch]) -> None:
        """Count a step; the ledger lists only samples that moved the weights."""
        for batch in batches:
            if result.applied:
                self.ledger.consumed(step, batch.positions, batch.keys)
        self.speed.step_done()
        self.monitor.step_done()

    def save(self, progress: Progress, engine: Engine) -> None:
        """Commit a checkpoint, and bring the other records to disk; all ranks call."""
        engine.check_finite()
        self.ledger.flush()
        self.saver.save(progress, engine.capture)
        self.monitor.flush()


class Outcome(Enum):
    """How `train` ended."""

    FINISHED = "the last step is done"
    STOPPED = "a rank was asked to stop"
    SPIKED = "the loss jumped and stayed, and the run must go back"


def train(
    engine: Engine,
    batches: Iterator[Batch],
    progress: Progress,
    task: Task,
    schedule: Schedule,
    records: Records,
    guards: Guards,
) -> Outcome:
    """Train until the last step, until any rank is asked to stop, or until the loss spikes.

    The state is saved at the end, but not of a spike.
    """
    if progress.step == 0 and task.probe_every:  # what random or given weights can do already
        set_phase(Phase.MEASURING)
        with records.speed.paused():
            task.probe(0, records.monitor)
    while progress.step < schedule.last_step:
        records.profiler.before_step(progress.step + 1)
        set_phase(Phase.DATA, progress.step + 1)
        micro_batches = _wait_for(batches, engine.accumulation, records.speed)
        set_phase(Phase.STEP, progress.step + 1)
        learning_rate = schedule.learning_rate_at(progress.step)
        result = engine.step(
            (task.loss_inputs(to_device(batch, engine.device)) for batch in micro_batches),
            learning_rate=learning_rate,
            seed=schedule.seed_at(progress.step),
            stop=guards.stop.seen,
        )
        progress.step += 1
        step = progress.step
        records.step_done(step, result, micro_batches)
        if guards.must_go_back(progress, result, micro_batches, engine.world):
            return Outcome.SPIKED

        # Every condition below is the same on all ranks, so that all of them enter the same collectives.
        if schedule.due(step, schedule.log_every) or result.stop:
            engine.world.on_main(guards.lease.check)
            _log(progress, engine, result, learning_rate, records, guards)
        with records.speed.paused():
            _look(step, task, schedule, records.monitor)
            if schedule.due(step, schedule.save_every) or result.stop:
                set_phase(Phase.SAVING, step)
                records.save(progress, engine)
        if result.stop:
            return Outcome.STOPPED
    return Outcome.FINISHED


def _look(step: int, task: Task, schedule: Schedule, monitor: Monitor) -> None:
    """Validate, probe and draw, as far as each is due; all ranks call."""
    if schedule.due(step, task.val_every):
        set_phase(Phase.MEASURING, step)
        task.validate(step, monitor)
    if task.probe_every and schedule.due(step, task.probe_every):
        set_phase(Phase.MEASURING, step)
        task.probe(step, monitor)
    if task.draw_every and schedule.due(step, task.draw_every):
        set_phase(Phase.DRAWING, step)
        task.draw(step, monitor)


def _wait_for(batches: Iterator[Batch], count: int, speed: Speedometer) -> list[Batch]:
    start = time.perf_counter()
    with record_function("wait for data"):
        ready = [next(batches) for _ in range(count)]
    speed.waited(time.perf_counter() - start)
    return ready


def _log(
    progress: Progress,
    engine: Engine,
    result: StepResult,
    learning_rate: float,
    records: Records,
    guards: Guards,
) -> None:
    """Record the figures of a step; all ranks call, because they add up bad samples and compare their waiting.

    Both travel in one gather: with a thousand ranks, each gather is a wait of the whole job.
    """
    grad_norm, rates = engine.grad_norm(), records.speed.read()
    local = [guards.bad_samples.record(), data_wait_record(rates["data_wait_share"])]
    bad_samples, waits = zip(*engine.world.gather_over_ranks(local), strict=True)
    values: dict[str, Any] = {
        "loss": result.loss,
        "lr": learning_rate,
        "grad_norm": grad_norm,
        **rates,
        "skipped_steps": progress.skipped_steps,
        "rollbacks": len(progress.skips),
        **{f"bad_samples_{reason}": count for reason, count in guards.bad_samples.agree(bad_samples).items()},
    }
    compare_waits(progress.step, waits)
    records.monitor.scalars(progress.step, values)
