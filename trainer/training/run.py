"""A training run from its start to its end, as pre-training and detection share it.

In the order of a run: `prepare` looks at this process alone, `join` meets the other ranks and opens the data, `begin`
takes the output folder, `Training.train` trains, `leave` prints the summary.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from trainer.config.provenance import versions
from trainer.config.record import to_dict
from trainer.config.settings import Recipe, Runtime
from trainer.data.loader import Loader
from trainer.data.order.mixture import Source
from trainer.data.order.plan import PLAN_VERSION, Order
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import broadcast_sources, byte_range_reader, describe_shares, open_sets
from trainer.data.stream import Slice, Stream, train_stream
from trainer.data.transforms.views import View
from trainer.distributed.devices import use_devices
from trainer.distributed.ds_config import engine_settings
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import World, world_from_environment
from trainer.errors import ConfigError
from trainer.fault_tolerance import checkpoint, resume
from trainer.fault_tolerance.exit_codes import EXIT_REQUEUE
from trainer.fault_tolerance.guards import BadSamples, Guards, StopRequest, name_of_signal
from trainer.fault_tolerance.ledger import Ledger
from trainer.fault_tolerance.nonfinite import BadSteps, SpikeWatch
from trainer.fault_tolerance.resume import Run
from trainer.fault_tolerance.watchdog import backend_timeout_s, set_phase, start_watchdog
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.log import print_and_log, start_console, start_logging
from trainer.progress import announce
from trainer.seeds import step_seed
from trainer.startup import EXIT_INTERRUPTED
from trainer.training.dry_run import describe
from trainer.training.loop import Outcome, Records, Task, train
from trainer.training.model_cost import BuildModel
from trainer.training.monitor import Monitor, labelled_views
from trainer.training.plausible import doubts
from trainer.training.profiling import StepProfiler
from trainer.training.schedule import Schedule, learning_rate_at
from trainer.training.throughput import Speedometer

logger = logging.getLogger(__name__)

_MAX_ROLLBACKS = 3
"""To one checkpoint: more of the same data left out would not help."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training ended, alike on every rank."""

    step: int
    total_steps: int
    signal: int = 0
    """The signal that asked to stop, or 0."""

    @property
    def exit_code(self) -> int:
        """0 finished; 85 queue the same command again; 130 a person pressed Ctrl-C, so a scheduler must not go on."""
        if not self.signal:
            return 0
        return EXIT_INTERRUPTED if self.signal == SIGINT else EXIT_REQUEUE

    @property
    def is_complete(self) -> bool:
        """Whether the whole schedule is done."""
        return not self.signal and self.step == self.total_steps

    def __str__(self) -> str:
        again = "start the same command again to go on"
        if self.signal:
            where = f"at step {self.step} of {self.total_steps}, saved"
            return f"Stopped by {name_of_signal(self.signal)} {where}: {again}."
        if self.step < self.total_steps:
            return (
                f"Stopped at step {self.step} of {self.total_steps}, as --stop_at_step says; saved. "
                "Without it the same command goes on."
            )
        return f"Finished: step {self.step} of {self.total_steps}."


def prepare(recipe: Recipe, runtime: Runtime) -> tuple[World, dict[str, Any]]:
    """Start the console, choose the device, and fill in DeepSpeed's settings; needs no other rank."""
    world = world_from_environment()
    start_console(is_main=world.is_main, rank=world.rank)
    use_devices(world, runtime)
    return world, engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)


def show(
    recipe: Recipe,
    runtime: Runtime,
    ds_config: Mapping[str, Any],
    found: Mapping[str, list[Source]] | None,
    world: World,
    build: BuildModel,
) -> Ending:
    """Print what a training would do, on the rank that has found the shards, and end: the whole of --dry_run."""
    if found is not None:
        print(describe(recipe, runtime, ds_config, found, world, build))
    return Ending(0, 0)


@dataclass(frozen=True, slots=True)
class DataSets:
    """The shards that each data setting names, and their indices; the same on all ranks."""

    sources: dict[str, list[Source]]
    index: dict[str, ShardIndex]


def join(
    world: World, recipe: Recipe, runtime: Runtime, found: dict[str, list[Source]] | None
) -> tuple[World, DataSets]:
    """Meet the other ranks, check the output folder, start log and watchdog, open the data; all ranks call.

    Args:
        world: this process among its ranks, not connected yet.
        recipe: what the run computes.
        runtime: all else.
        found: the shards by setting, on rank 0.

    Raises:
        ConfigError: a rank is missing, or the output folder belongs to something else.
        DataError: a shard breaks the rules.
    """
    announce(f"connecting {world.size} ranks" if world.size > 1 else "looking at the output")
    world = connect(world, timeout_s=backend_timeout_s(runtime), start_timeout_s=runtime.start_timeout_s)
    output = Path(runtime.output_dir)
    world.on_main(lambda: resume.check_run(recipe, runtime))  # before the first file is written into the folder
    start_logging(output, is_main=world.is_main, rank=world.rank)
    start_watchdog(output, world, runtime)
    sources = broadcast_sources(found, world)
    return world, DataSets(sources, open_sets(sources, recipe, runtime, world))


def begin(engine: Engine, data: DataSets, recipe: Recipe, runtime: Runtime, *, init_sha256: str) -> Run:
    """Say what the run is, compare it with what the output folder holds, and take the folder; all ranks call."""
    train_index, train_sources = data.index["data"], data.sources["data"]
    if (profiled := runtime.profiled_steps) and profiled[0] > (last := recipe.num_steps(len(train_index))):
        raise ConfigError(
            f"profile_steps is {runtime.profile_steps}, but the schedule ends at step {last}: choose earlier ones"
        )
    identity = checkpoint.Identity(
        recipe=to_dict(recipe),
        data_fingerprint=train_index.fingerprint,
        data_shares=describe_shares(train_index, train_sources),
        plan_version=PLAN_VERSION,
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        num_ranks=engine.world.size,
        init=init_sha256,
    )
    return resume.begin(engine, recipe, runtime, identity)


def leave(run: Run, ending: Ending, print_more: Callable[[], None]) -> Ending:
    """Record how the run has ended, print a summary, and leave the process group; all ranks call.

    Args:
        run: that has ended.
        ending: how.
        print_more: prints what a newcomer wants to know of this task; called on rank 0.
    """

    def summarise() -> None:
        run.lease.ended("stopped by a signal" if ending.signal else "finished")
        print_and_log(f"\n{ending}")
        if found := checkpoint.newest_manifest(run.checkpoints):
            print_and_log(f"  checkpoint   {found[0]}")
        print_more()

    set_phase(Phase.LEAVING)
    run.world.on_main(summarise)
    disconnect()
    return ending


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What training batches are made of."""

    index: ShardIndex
    order: Order
    view: View
    noise_per_sample: int
    """Uniform numbers for each sample: the only randomness that the model's forward gets."""
    repeats: int = 1
    """Views of each sample in a batch."""
    group: int = 1
    """Samples that are mixed with each other."""
    show_labels: bool = False
    """Draw some images of the first step with the names of their classes."""


@dataclass(frozen=True, slots=True)
class Training:
    """The steps of a run, from its newest checkpoint to its end.

    A restart, and a rollback after a loss spike, keep two things, and a checkpoint holds both: the engine's state
    (weights, moments, loss scale) and `Progress` (steps, data left out, recent losses). `_train_from` builds all else
    from these two and the settings: batches, schedule, records, guards.
    """

    run: Run
    task: Task
    data: TrainingData

    def train(self) -> Ending:
        """Train to the end of the schedule, or until a signal asks to stop. The state is saved either way.

        After a loss spike the run goes back to a checkpoint in the same process, exactly as a restart would.
        """
        stop, progress = StopRequest(), self._resume()
        while (outcome := self._train_from(progress, stop)) is Outcome.SPIKED:
            if self.run.world.on_main(functools.partial(self._rewind, progress)):
                progress = self._resume()
        if outcome is Outcome.FINISHED:
            self.task.finish(progress.step)
        stop.close()
        if outcome is Outcome.FINISHED:
            return Ending(progress.step, self._total_steps)
        signals = self.run.world.gather_over_ranks(stop.number)  # 0 from ranks that got none
        return Ending(progress.step, self._total_steps, next(filter(None, signals)))

    def _resume(self) -> checkpoint.Progress:
        progress = resume.resume(self.run)
        resume.record_start(self.run, progress.step, self._total_steps)
        return progress

    def _rewind(self, spiked: checkpoint.Progress) -> bool:
        found = checkpoint.rewind(self.run.checkpoints, spiked, lease=self.run.lease, max_attempts=_MAX_ROLLBACKS)
        if found is None:
            logger.warning("the loss spikes since step %s, but no checkpoint is older: going on", spiked.spiking_since)
            return False
        logger.warning(
            "the loss spikes since step %s: back to %s, and the data up to step %d are left out",
            *(spiked.spiking_since, found.name, spiked.step),
        )
        return True

    def _train_from(self, progress: checkpoint.Progress, stop: StopRequest) -> Outcome:
        self._log_start(progress)
        schedule, batches = self._schedule(), self._batches(progress.data_step)
        with self._records(progress, schedule) as records:
            return train(self.run.engine, iter(batches), progress, self.task, schedule, records, self._guards(stop))

    @property
    def _total_steps(self) -> int:
        return self.run.recipe.num_steps(len(self.data.index))

    def _log_start(self, progress: checkpoint.Progress) -> None:
        engine, recipe, images = self.run.engine, self.run.recipe, len(self.data.index)
        logger.info(
            "%d steps of %d images over %d ranks (%g epochs of %d images), from step %d, %s, ZeRO stage %d",
            *(self._total_steps, recipe.global_batch, engine.world.size, recipe.num_epochs(images), images),
            *(progress.step, engine.precision, engine.zero_stage),
        )
        if engine.world.is_main:
            self._warn_of_odd_sizes()

    def _schedule(self) -> Schedule:
        recipe, runtime = self.run.recipe, self.run.runtime
        return Schedule(
            last_step=min(self._total_steps, runtime.stop_at_step or self._total_steps),
            log_every=runtime.log_every,
            save_every=runtime.save_every,
            learning_rate_at=functools.partial(
                learning_rate_at,
                peak=recipe.peak_learning_rate,
                floor=recipe.min_learning_rate,
                warmup_steps=recipe.num_warmup_steps(len(self.data.index)),
                total_steps=self._total_steps,
            ),
            seed_at=lambda step: step_seed(recipe.seed, step, self.run.world.rank),
        )

    def _batches(self, first_step: int) -> Loader:
        """Load this rank's batches from a step of the data on, which rollbacks have moved ahead of the optimizer's."""
        return Loader(
            self._stream(first_step, rank=self.run.world.rank),
            num_workers=self.run.runtime.num_workers,
            prefetch=self.run.runtime.prefetch,
            pin_memory=self.run.engine.device.type == "cuda",
        )

    def _stream(self, first_step: int, *, rank: int) -> Stream:
        recipe, runtime, data = self.run.recipe, self.run.runtime, self.data
        return train_stream(
            data.index,
            data.order,
            Slice(recipe.global_batch, runtime.micro_batch, rank, self.run.world.size, data.repeats, data.group),
            data.view,
            first_step=first_step,
            noise_per_sample=data.noise_per_sample,
            spans=byte_range_reader(runtime),
        )

    @contextlib.contextmanager
    def _records(self, progress: checkpoint.Progress, schedule: Schedule) -> Iterator[Records]:
        """Open what the run leaves behind; rows of steps beyond ``progress`` are cut away.

        On leaving, the checkpoint that is being written is finished last, because the loop may have failed.
        """
        run, recipe, runtime, world = self.run, self.run.recipe, self.run.runtime, self.run.world
        monitor = Monitor(
            run.output,
            lease=run.lease,
            first_step=progress.step,
            total_steps=self._total_steps,
            is_main=world.is_main,
            progress_bar=runtime.progress_bar,
            epoch_at=functools.partial(self._epoch_at, progress.data_step - progress.step),
            last_step=schedule.last_step,
        )
        self._describe(monitor, progress.step)
        folder = Path(runtime.sample_ledger) if runtime.sample_ledger else None
        ledger = Ledger(folder, lease=run.lease, first_step=progress.step, rank=world.rank)
        saver = checkpoint.Saver(
            run.checkpoints,
            run.identity,
            versions(),
            lease=run.lease,
            world=world,
            keep=runtime.keep_checkpoints,
            background=runtime.background_saves,
        )
        speed = Speedometer(
            global_batch=recipe.global_batch, flops_per_image=self.task.flops_per_image, num_ranks=world.size
        )
        profiler = StepProfiler(runtime.profiled_steps, run.output / "profile", is_main=world.is_main)
        with saver, contextlib.closing(ledger), contextlib.closing(monitor), contextlib.closing(profiler):
            yield Records(monitor=monitor, ledger=ledger, speed=speed, saver=saver, profiler=profiler)

    def _guards(self, stop: StopRequest) -> Guards:
        recipe, runtime = self.run.recipe, self.run.runtime
        return Guards(
            bad_samples=BadSamples(runtime.max_bad_sample_share),
            bad_steps=BadSteps(runtime.max_bad_steps, self.run.output / "logs", self.run.engine.precision == "fp16"),
            spikes=SpikeWatch(recipe.spike_threshold, recipe.spike_patience, recipe.on_spike == "rollback"),
            stop=stop,
            lease=self.run.lease,
        )

    def _epoch_at(self, steps_left_out: int, step: int) -> float:
        return (step + steps_left_out) * self.run.recipe.global_batch / len(self.data.index)

    def _warn_of_odd_sizes(self) -> None:
        engine, recipe = self.run.engine, self.run.recipe
        threads = torch.get_num_threads() * engine.world.size if engine.device.type == "cpu" else None
        for text in doubts(
            global_batch=recipe.global_batch,
            num_images=len(self.data.index),
            total_steps=self._total_steps,
            num_ranks=engine.world.size,
            step_flops=float(self.task.flops_per_image * recipe.global_batch),
            cpu_threads=threads,
            spare_workers=self.run.runtime.num_workers * engine.world.local_size - len(os.sched_getaffinity(0)),
        ):
            logger.warning("%s", text)

    def _describe(self, monitor: Monitor, step: int) -> None:
        """Show what runs, and once what the first step sees."""
        if not self.run.world.is_main:
            return
        monitor.describe(step, resume.what_starts(self.run), {"train/loss", *self.task.tags})
        if step == 0 and self.data.show_labels:
            batch = next(iter(Loader(self._stream(0, rank=0))))
            monitor.picture(0, "training_views", labelled_views(batch), file="training-views")
