"""Steps that were skipped because a number was not finite, and losses that jump.

The engine decides, the same on all ranks, whether a step is applied. `BadSteps` counts the steps that were not, logs
the samples behind them, and ends the run after too many in a row. `SpikeWatch` compares the loss of every applied step
with the ones before it. Its decision is a pure function of numbers that are equal on all ranks, so all of them decide
alike without talking to each other.
"""

import json
import logging
import math
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.stream import Batch
from trainer.distributed.engine import StepResult
from trainer.distributed.world import World
from trainer.errors import DataError
from trainer.fault_tolerance.checkpoint import Progress
from trainer.files import write_atomically

logger = logging.getLogger(__name__)

WINDOW = 128
"""How many losses a new one is compared with, at most."""
_MIN_WINDOW = 32
"""With fewer losses nothing is called a spike."""
_LEAST_SPREAD = 1e-3
"""Of the median: losses that hardly differ must not make a spike of a rounding error."""
_MAX_KEYS = 8
"""Samples of a micro batch that a message names."""


@dataclass(slots=True)
class BadSteps:
    """Counts steps that were not applied, and ends a run that meets too many in a row."""

    max_in_a_row: int
    folder: Path
    """Where the report is written, OUTPUT/logs."""
    scales_loss: bool
    """Under fp16 a gradient may overflow under a finite loss: the loss scale was too high, and has been lowered."""
    in_a_row: int = 0

    def note(self, progress: Progress, result: StepResult, batches: Sequence[Batch], world: World) -> None:
        """Count a step, and log the samples behind one that was skipped; all ranks call.

        Raises:
            DataError: on all ranks, when so many steps in a row could not be applied.
        """
        if result.applied:
            self.in_a_row = 0
            return
        progress.skipped_steps += 1
        if self.scales_loss and math.isfinite(result.loss):
            logger.info("step %d was skipped: its gradients overflowed, and the loss scale is lowered", progress.step)
            return
        self.in_a_row += 1
        ranks = world.gather_over_ranks(_evidence(result, batches, world))
        suspects = "; ".join(_suspects(ranks)) or (
            "the loss was finite on every rank and only a gradient was not, so look for a faulty device first"
        )
        if world.is_main:
            logger.warning("step %d was skipped, the weights are as before: %s", progress.step, suspects)
        if self.in_a_row >= self.max_in_a_row:
            path = self.folder / f"nonfinite-step-{progress.step:08d}.json"
            world.on_main(lambda: _report(path, {"step": progress.step, "in_a_row": self.in_a_row, "ranks": ranks}))
            raise DataError(
                f"{self.in_a_row} steps in a row up to step {progress.step} had a loss or gradient that is not finite "
                f"({suspects}); nothing was saved since the last checkpoint, and {path} has all samples: repair these "
                "samples or the device, lower learning_rate, or set clip_grad_norm 1.0"
            )


def _evidence(result: StepResult, batches: Sequence[Batch], world: World) -> dict[str, Any]:
    """Collect the losses and samples of this rank's step. JSON has no NaN, so a loss that is not finite is a text."""
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "micro_batches": [
            {"loss": loss if math.isfinite(loss) else str(loss), "positions": batch.positions, "keys": batch.keys}
            for loss, batch in zip(result.micro_losses, batches, strict=True)
        ],
    }


def _suspects(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"loss {part['loss']} on rank {found['rank']} ({found['host']}) of {', '.join(part['keys'][:_MAX_KEYS])}"
        + ", ..." * (len(part["keys"]) > _MAX_KEYS)
        for found in ranks
        for part in found["micro_batches"]
        if isinstance(part["loss"], str)
    ]


def _report(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def is_spike(loss: float, recent: Sequence[float], threshold: float) -> bool:
    """Whether a loss is more than ``threshold`` MADs (median absolute deviations) above the median of recent ones.

    Median and MAD hardly move when a few of the recent losses were spikes themselves. Of recent losses 0.48 to 0.52 the
    median is 0.50 and the MAD about 0.01, so with a threshold of 10 a loss above 0.60 is a spike. Of losses that rise
    evenly the next one is about 2 MADs above the median.
    """
    if not threshold or len(recent) < _MIN_WINDOW:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(other - median) for other in recent)
    return loss - median > threshold * max(deviation, _LEAST_SPREAD * abs(median))


@dataclass(frozen=True, slots=True)
class SpikeWatch:
    """Watches the losses of applied steps; what it remembers is part of the progress, so a resume is exact."""

    threshold: float
    """In median absolute deviations; 0 watches nothing."""
    patience: int
    """This many spikes in a row are one incident; fewer are noise."""
    goes_back: bool
    """Whether an incident ends in a rollback, or in a line of the log only."""

    def note(self, progress: Progress, result: StepResult) -> bool:
        """Look at the loss of a step; returns whether the run must go back to a checkpoint, the same on all ranks."""
        if not self.threshold or not result.applied:
            return False
        if not is_spike(result.loss, progress.recent_losses, self.threshold):
            progress.spiking_since = None
        elif progress.spiking_since is None:
            progress.spiking_since, progress.num_spikes = progress.step, 0
        progress.recent_losses = [*progress.recent_losses, result.loss][-WINDOW:]
        if progress.spiking_since is None:
            return False
        progress.num_spikes += 1
        logger.info("the loss jumped to %.6g at step %d", result.loss, progress.step)
        return self.goes_back and progress.num_spikes == self.patience
