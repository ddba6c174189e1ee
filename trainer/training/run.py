"""A training run from its last checkpoint to its end, as pre-training and detection share it."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from trainer.config.record import to_dict
from trainer.config.settings import Recipe, Runtime
from trainer.data.loader import Loader
from trainer.data.order.mixture import Source
from trainer.data.order.plan import Order
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import byte_range_reader
from trainer.data.stream import Batch, Slice, Stream, train_stream
from trainer.data.transforms.views import View
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import without_secrets
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.exit_codes import EXIT_REQUEUE
from trainer.fault_tolerance.guards import BadSamples, Guards, StopRequest, name_of_signal
from trainer.fault_tolerance.ledger import Ledger
from trainer.fault_tolerance.nonfinite import BadSteps, SpikeWatch
from trainer.fault_tolerance.resume import claim, describe_start, resume, versions
from trainer.log import print_and_log
from trainer.seeds import step_seed
from trainer.startup import EXIT_INTERRUPTED
from trainer.training.dry_run import describe
from trainer.training.loop import Hooks, Inputs, Intervals, Outcome, train
from trainer.training.model_cost import BuildModel
from trainer.training.monitor import Monitor
from trainer.training.plausible import doubts
from trainer.training.schedule import learning_rate_at
from trainer.training.throughput import Speedometer

logger = logging.getLogger(__name__)

_LABEL_PIXELS = 14
_CLASS_WORDS = {0: "bona fide", 1: "morph"}
_MAX_ROLLBACKS = 3
"""To one checkpoint: more of the same data left out would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a run is made of."""

    engine: Engine
    index: ShardIndex
    order: Order
    identity: checkpoint.Identity
    lease: Lease
    recipe: Recipe
    runtime: Runtime
    view: View
    noise_per_sample: int
    inputs: Inputs
    flops_per_image: int
    measure: Callable[[Monitor, int], None]
    measure_every: int
    picture: Callable[[Monitor, int], None]
    picture_every: int
    at_end: Callable[[int], None]
    """Called on all ranks after the last step."""
    repeats: int = 1
    """Views of each sample in a batch."""
    group: int = 1
    """Samples that are mixed with each other."""
    show_labels: bool = False
    """Draw some images of the first step with the names of their classes."""

    def run(self) -> "Ending":
        """Train to the end of the schedule, or until a signal asks to stop. The state is saved either way.

        After a loss spike the run goes back to a checkpoint in the same process, exactly as a restart would.
        """
        stop, progress = StopRequest(), self._resume()
        while (outcome := self._train_from(progress, stop)) is Outcome.SPIKED:
            if self.engine.world.on_main(functools.partial(self._rewind, progress)):
                progress = self._resume()
        if outcome is Outcome.FINISHED:
            self.at_end(progress.step)
        stop.close()
        total_steps = self.recipe.num_steps(len(self.index))
        if outcome is Outcome.FINISHED:
            return Ending(progress.step, total_steps)
        asked = self.engine.world.gather_over_ranks(stop.number)
        return Ending(progress.step, total_steps, next(filter(None, asked)))

    def _resume(self) -> checkpoint.Progress:
        output, runtime = Path(self.runtime.output_dir), self.runtime
        progress = resume(self.engine, output / "checkpoints", self.identity, runtime)
        length = {"step": progress.step, "total_steps": self.recipe.num_steps(len(self.index))}
        claim(self.lease, output, self.recipe, runtime, self.engine.world, **length)
        return progress

    def _rewind(self, spiked: checkpoint.Progress) -> bool:
        root = Path(self.runtime.output_dir, "checkpoints")
        found = checkpoint.rewind(root, spiked, lease=self.lease, max_attempts=_MAX_ROLLBACKS)
        if found is None:
            logger.warning("the loss spikes since step %s, but no checkpoint is older: going on", spiked.spiking_since)
            return False
        logger.warning(
            "the loss spikes since step %s: back to %s, and the data up to step %d are left out",
            *(spiked.spiking_since, found.name, spiked.step),
        )
        return True

    def _train_from(self, progress: checkpoint.Progress, stop: StopRequest) -> Outcome:
        """Join the parts and run the loop."""
        engine, recipe, runtime, world = self.engine, self.recipe, self.runtime, self.engine.world
        output, images = Path(runtime.output_dir), len(self.index)
        total_steps = recipe.num_steps(images)
        last_step = min(total_steps, runtime.stop_at_step or total_steps)
        share = Slice(recipe.global_batch, runtime.micro_batch, world.rank, world.size, self.repeats, self.group)
        logger.info(
            "%d steps of %d images over %d ranks (%g epochs of %d images), from step %d, %s, ZeRO stage %d",
            *(total_steps, recipe.global_batch, world.size, recipe.num_epochs(images), images, progress.step),
            *(engine.precision, engine.zero_stage),
        )
        if world.is_main:
            self._warn_of_odd_sizes(total_steps)
        loader = Loader(
            self._stream(share, progress.data_step),
            num_workers=runtime.num_workers,
            prefetch=runtime.prefetch,
            pin_memory=engine.device.type == "cuda",
        )
        monitor = Monitor(
            output,
            lease=self.lease,
            first_step=progress.step,
            total_steps=total_steps,
            is_main=world.is_main,
            progress_bar=runtime.progress_bar,
            epoch_at=functools.partial(self._epoch_at, progress.data_step - progress.step),
            last_step=last_step,
        )
        self._describe(monitor, progress.step)
        ledger = Ledger(
            Path(runtime.sample_ledger) if runtime.sample_ledger else None,
            lease=self.lease,
            first_step=progress.step,
            rank=world.rank,
        )
        saver = checkpoint.Saver(
            output / "checkpoints",
            self.identity,
            versions(),
            lease=self.lease,
            world=world,
            keep=runtime.keep_checkpoints,
            background=runtime.background_saves,
        )
        with saver, contextlib.closing(ledger), contextlib.closing(monitor):
            return train(
                engine,
                iter(loader),
                progress,
                inputs=self.inputs,
                learning_rate_at=functools.partial(
                    learning_rate_at,
                    peak=recipe.peak_learning_rate,
                    floor=recipe.min_learning_rate,
                    warmup_steps=recipe.num_warmup_steps(images),
                    total_steps=total_steps,
                ),
                seed_at=lambda step: step_seed(recipe.seed, step, world.rank),
                accumulation=share.micro_batches_per_step,
                dates=Intervals(
                    last_step, runtime.log_every, runtime.save_every, self.measure_every, self.picture_every
                ),
                hooks=Hooks(
                    save=functools.partial(saver.save, progress, engine.capture),
                    measure=functools.partial(self.measure, monitor),
                    picture=functools.partial(self.picture, monitor),
                ),
                monitor=monitor,
                ledger=ledger,
                speed=Speedometer(
                    global_batch=recipe.global_batch, flops_per_image=self.flops_per_image, num_ranks=world.size
                ),
                guards=Guards(
                    bad_samples=BadSamples(runtime.max_bad_sample_share),
                    bad_steps=BadSteps(runtime.max_bad_steps, output / "logs", engine.precision == "fp16"),
                    spikes=SpikeWatch(recipe.spike_threshold, recipe.spike_patience, recipe.on_spike == "rollback"),
                    stop=stop,
                    lease=self.lease,
                ),
            )

    def _stream(self, share: Slice, first_step: int) -> Stream:
        return train_stream(
            self.index,
            self.order,
            share,
            self.view,
            first_step=first_step,
            noise_per_sample=self.noise_per_sample,
            spans=byte_range_reader(self.runtime),
        )

    def _epoch_at(self, left_out: int, step: int) -> float:
        return (step + left_out) * self.recipe.global_batch / len(self.index)

    def _warn_of_odd_sizes(self, total_steps: int) -> None:
        step_flops = float(self.flops_per_image * self.recipe.global_batch)
        world = self.engine.world
        threads = torch.get_num_threads() * world.size if self.engine.device.type == "cpu" else None
        for text in doubts(
            global_batch=self.recipe.global_batch,
            num_images=len(self.index),
            total_steps=total_steps,
            num_ranks=world.size,
            step_flops=step_flops,
            cpu_threads=threads,
            spare_workers=self.runtime.num_workers * world.local_size - len(os.sched_getaffinity(0)),
        ):
            logger.warning("%s", text)

    def _describe(self, monitor: Monitor, step: int) -> None:
        """Show what runs, and once what the first step sees."""
        if not self.engine.world.is_main:
            return
        recipe, start = to_dict(self.recipe), describe_start(sys.argv, self.engine.world)
        told = {"recipe": recipe, "runtime": to_dict(self.runtime), "versions": versions(), "start": start}
        monitor.describe(step, {name: _table(values) for name, values in told.items()}, recipe)
        if step == 0 and self.show_labels:
            share = Slice(
                self.recipe.global_batch, self.runtime.micro_batch, 0, self.engine.world.size, group=self.group
            )
            batch = next(iter(Loader(self._stream(share, 0))))
            monitor.picture(0, "training_views", labelled_views(batch), file="training-views")


def labelled_views(batch: Batch, num_shown: int = 16) -> torch.Tensor:
    """Draw the first images of a batch, each above the name of its class; uint8 (3, H, W)."""
    tiles = []
    for image_CHW, label in zip(batch.images_BCHW[:num_shown], batch.labels[:num_shown], strict=True):
        size = image_CHW.shape[-1]
        tile = Image.new("RGB", (size, size + _LABEL_PIXELS), "white")
        tile.paste(Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()))
        ImageDraw.Draw(tile).text((2, size), _CLASS_WORDS.get(label, str(label)), fill="black")
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    tiles += [torch.full_like(tiles[0], 255)] * (-len(tiles) % min(8, len(tiles)))
    rows = [torch.cat(tiles[i : i + 8], dim=2) for i in range(0, len(tiles), 8)]
    return torch.cat(rows, dim=1)


def _table(values: Mapping[str, Any]) -> str:
    """Write a table in Markdown."""
    rows = (f"| {name} | `{without_secrets(str(value))}` |" for name, value in values.items())
    return "\n".join(["| | |", "|---|---|", *rows])


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training ended, alike on every rank."""

    step: int
    total_steps: int
    signal: int = 0
    """The signal that asked to stop, or 0."""

    @property
    def exit_code(self) -> int:
        """0 finished; 85 queue the same command again; 130 a person pressed Ctrl-C, and no scheduler shall go on."""
        if not self.signal:
            return 0
        return EXIT_INTERRUPTED if self.signal == SIGINT else EXIT_REQUEUE

    @property
    def is_complete(self) -> bool:
        """Whether the schedule is done, so that the next command is another one."""
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


def show(
    recipe: Recipe,
    runtime: Runtime,
    ds_config: Mapping[str, Any],
    found: Mapping[str, list[Source]] | None,
    world: World,
    build: BuildModel,
) -> Ending:
    """Print what a training would do, on the rank that has found the shards, and end."""
    if found is not None:
        print(describe(recipe, runtime, ds_config, found, world, build))
    return Ending(0, 0)


def record_end(output: Path, ending: Ending, lease: Lease) -> None:
    """Record how a run has ended, and print it with its newest checkpoint. On one rank."""
    lease.ended("stopped by a signal" if ending.signal else "finished")
    print_and_log(f"\n{ending}")
    if found := checkpoint.newest_manifest(output / "checkpoints"):
        print_and_log(f"  checkpoint   {found[0]}")
