"""Probes during a pre-training: does the encoder learn more than pixels? Measured on a fixed labelled set.

All ranks embed the set, each a part of its batches, without a mask; rank 0 computes the figures of
`trainer.probes.measures`. A batch has the same images on any number of ranks, so equal weights give equal features. The
training does not notice: nothing is drawn at random, and the model is in training mode again afterwards.

The images are read and decoded once, before training, and stay in host memory: 2,048 images of 224 pixels take 308 MB
over all ranks.

Shapes: N samples, B of a batch, D features.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from trainer.config.settings import PretrainRecipe, PretrainRuntime
from trainer.data.loader import Loader
from trainer.data.order.plan import evenly_spaced
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import byte_range_reader, pixels_of
from trainer.data.stream import fixed_stream
from trainer.data.transforms.views import CenterView
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import DataError
from trainer.fault_tolerance.ledger import read_metrics
from trainer.log import print_and_log
from trainer.probes.labelled_set import IDENTITY, LabelledSet, choose

logger = logging.getLogger(__name__)

GROUP = "probe"
SETTING = "--probe_data"
_BATCH = 64
_MAX_ROWS = 12
_COST_LIMIT = 0.02
_MIN_INTERVAL = 500
_COLUMNS = {
    "knn_accuracy": "kNN",
    "linear_accuracy": "linear",
    "rank_me": "rank",
    "feature_std": "std",
    "eer": "EER",
    "tar_at_far_0.01": "TAR@FAR=1%",
    "tar_at_far_0.001": "TAR@FAR=0.1%",
}
_VERIFICATION = ("eer", "tar_at_far_0.01", "tar_at_far_0.001")
"""Figures of identities only."""
_PLAIN = ("rank_me", "feature_std")
"""Figures that are no shares."""


class Probe:
    """A labelled set, of which this rank holds the images of every so-manyth batch."""

    def __init__(self, recipe: PretrainRecipe, runtime: PretrainRuntime, index: ShardIndex, world: World) -> None:
        """Choose the samples and read their images; all ranks call.

        Raises:
            DataError: the set cannot be probed by that field; the same on all ranks.
        """
        from trainer.probes.measures import measure  # imports scikit-learn, which takes seconds

        self._world, self._measure = world, measure
        chosen = choose(index, runtime.probe_field, num_samples=runtime.probe_samples, setting=SETTING)
        batches = batches_of(chosen.sample_N.tolist(), rank=world.rank, num_ranks=world.size)
        stream = fixed_stream(
            index,
            [sample for batch in batches for sample in batch],
            CenterView(size=recipe.image_size, pixels=pixels_of(recipe)),
            batch=_BATCH,
            noise_per_sample=1,
            spans=byte_range_reader(runtime),
            substitute=False,
        )
        read = world.together(lambda: list(Loader(stream, num_workers=runtime.num_workers)))
        self._images = [batch.images_BCHW for batch in read]
        failed = {s for batch in read for s, why in zip(batch.positions, batch.failures, strict=True) if why}
        unreadable = {sample for some in world.gather_over_ranks(sorted(failed)) for sample in some}
        self._set = chosen.without(unreadable, setting=SETTING)
        self._is_measured = torch.isin(torch.from_numpy(chosen.sample_N), torch.from_numpy(self._set.sample_N))
        self._begun_s, self._spent_s, self._count = time.perf_counter(), 0.0, 0
        if world.is_main:
            logger.info("%s: %s", SETTING, describe(self._set, len(unreadable)))

    @property
    def tags(self) -> set[str]:
        """Return the names of the figures in TensorBoard."""
        names = {*_COLUMNS, "chance"} - (set() if self._set.field == IDENTITY else set(_VERIFICATION))
        return {f"{GROUP}/{name}" for name in names}

    def interval(self, given: int | None, *, forward_flops: int, step_flops: int) -> int:
        """Return the steps from probe to probe, and log on rank 0 what share of the FLOPs the probes take.

        Args:
            given: by the user; None chooses.
            forward_flops: of the encoder on one image.
            step_flops: of one training step.
        """
        probe_flops = forward_flops * _BATCH * len(self._images) * self._world.size
        every = given or affordable_interval(probe_flops, step_flops)
        if self._world.is_main:
            share = probe_flops / (every * step_flops)
            logger.info("%s: a probe every %d steps, %.2g %% of the training's FLOPs", SETTING, every, 100 * share)
        return every

    def measure(self, engine: Engine, step: int) -> dict[str, float]:
        """Embed the set and compute all figures; all ranks call, with equally many forwards on each.

        Returns:
            figures: those of `measures.measure`, and ``seconds``; only ``seconds`` if the features are not finite.
        """
        start = time.perf_counter()
        feature_ND = self._features(engine)
        figures = self._world.on_main(lambda: self._figures(feature_ND, step))
        seconds = time.perf_counter() - start
        self._spent_s, self._count = self._spent_s + seconds, self._count + 1
        return figures | {"seconds": seconds}

    def print_table(self, metrics: Path) -> None:
        """Print the figures of the whole run, also those from before a restart, and what they cost in this start."""
        rows = {row["step"]: row for row in read_metrics(metrics) if f"{GROUP}_knn_accuracy" in row}
        classes = len(self._set.names)
        print_and_log(f"  probe by {self._set.field}: {describe(self._set)}, chance {100 / classes:.3g} %")
        for line in table(list(rows.values())):
            print_and_log(f"    {line}")
        if self._count:
            share = self._spent_s / (time.perf_counter() - self._begun_s)
            remedy = ": raise --probe_every, or lower --probe_samples" if share > _COST_LIMIT else ""
            each = f"{self._count} of {self._spent_s / self._count:.3g} s each"
            print_and_log(f"    probing took {100 * share:.2g} % of the time ({each}){remedy}")

    def _features(self, engine: Engine) -> Tensor:
        """Return the features of the chosen samples in their order, float32 on the CPU; all ranks call."""
        parts = [engine.evaluate(images.to(engine.device), None, None, want="features") for images in self._images]
        gathered_ND = engine.concat_over_ranks(torch.cat(parts)).cpu()
        # Rank r's j-th batch is batch j * ranks + r of the set.
        ordered_ND = rearrange(gathered_ND, "(r j b) d -> (j r b) d", r=self._world.size, b=_BATCH)
        return ordered_ND[: len(self._is_measured)][self._is_measured]

    def _figures(self, feature_ND: Tensor, step: int) -> dict[str, float]:
        try:
            verify = self._set.field == IDENTITY
            return self._measure(feature_ND.numpy(), self._set.class_N, self._set.people, verify=verify)
        except DataError as error:
            logger.warning("step %d cannot be probed: %s", step, error)
            return {}


def affordable_interval(probe_flops: int, step_flops: int) -> int:
    """Return how many steps, 500 or more, take so many FLOPs that a probe adds at most 2 % to them.

    Example: a probe of 2,048 images at 35 GFLOP takes 7.2e13, a step of 32 images at 57 GFLOP 1.8e12 FLOP. 2 % of 1,965
    steps pay for the probe.
    """
    return max(_MIN_INTERVAL, math.ceil(probe_flops / (_COST_LIMIT * step_flops)))


def batches_of(samples: list[int], *, rank: int, num_ranks: int) -> list[list[int]]:
    """Return this rank's batches: every so-manyth, equally many on every rank, because ZeRO-3 forwards are collective.

    What is missing to whole batches is filled with the first sample, whose copies are not measured. With batches of 2,
    samples 5 6 7 8 9 on 2 ranks: rank 0 has [5 6] [9 5], rank 1 has [7 8] [5 5].
    """
    per_rank = math.ceil(len(samples) / (_BATCH * num_ranks))
    filled = samples + samples[:1] * (per_rank * num_ranks * _BATCH - len(samples))
    batches = [filled[i : i + _BATCH] for i in range(0, len(filled), _BATCH)]
    return batches[rank::num_ranks]


def describe(found: LabelledSet, num_unreadable: int = 0) -> str:
    """Describe a set in a few words."""
    text = f"{len(found.sample_N):,} images of {len(found.names):,} classes"
    if found.people is not None:
        text += f" and {len({p for persons in found.people for p in persons}):,} people, who are kept apart"
    if found.num_single:
        text += f"; {found.num_single:,} classes of one image are left out"
    return text + (f"; {num_unreadable:,} images cannot be read and are left out" if num_unreadable else "")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Write a line for each of some steps, the first and the last among them; shares in percent."""
    names = [name for name in _COLUMNS if any(f"{GROUP}_{name}" in row for row in rows)]
    shown = [rows[i] for i in evenly_spaced(_MAX_ROWS - 1, len(rows))]
    shown += rows[-1:] if rows and shown[-1] is not rows[-1] else []
    if not rows:
        return []
    cells = [[f"{row['step']:>8}", *(_cell(name, row.get(f"{GROUP}_{name}")) for name in names)] for row in shown]
    return ["".join(line) for line in ([f"{'step':>8}", *(f"{_COLUMNS[name]:>14}" for name in names)], *cells)]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return f"{'-':>14}"
    return f"{value:>14.3g}" if name in _PLAIN else f"{100 * value:>12.1f} %"
