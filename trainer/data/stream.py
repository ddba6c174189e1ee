"""Executes a plan: positions -> bytes -> pixels -> batches, as a webdataset pipeline.

webdataset supplies the container format and the composition of stages. Its URL handling, its decoders and its shuffle
buffer stay out: the first two run code that stands in data, the third cannot be resumed
(webdataset issues 490, 271). The source stage is ours and asks the plan.

Shapes: B samples of a micro batch, S image side, N patches.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from trainer.data.decode import decode_image
from trainer.data.plan import Plan, positions_of
from trainer.data.shards import SampleRef, ShardIndex, ShardReader
from trainer.errors import DataError, SampleError, TrainerError
from trainer.seeds import Purpose, random_words, uniforms

Augment = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
_MAX_SUBSTITUTES = 100


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of every global batch that falls to one rank, and how it is cut into micro batches."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def micro_batches_per_step(self) -> int:
        """Gradient accumulation steps; the configuration has checked that nothing is left over."""
        return self.global_batch // (self.num_ranks * self.micro_batch)

    def positions(self, micro_step: int) -> NDArray[np.int64]:
        """Return the positions of one micro batch, counted over the whole run."""
        step, part = divmod(micro_step, self.micro_batches_per_step)
        mine = positions_of(step, rank=self.rank, num_ranks=self.num_ranks, global_batch=self.global_batch)
        return mine[part * self.micro_batch : (part + 1) * self.micro_batch]


@dataclass(slots=True)
class Batch:
    """What travels from the data plane to the loop."""

    images_BCHW: Tensor
    """uint8 RGB, channels last in memory."""
    noise_BN: Tensor
    """Uniform numbers in [0, 1), float32: the only randomness of the masks."""
    positions: list[int]
    keys: list[str]
    labels: list[int]
    bad: dict[str, int] = field(default_factory=dict)
    """How many samples had to be substituted, by reason."""
    bad_keys: list[str] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """Move the tensors to page-locked memory; the DataLoader's pin thread calls this."""
        self.images_BCHW, self.noise_BN = self.images_BCHW.pin_memory(), self.noise_BN.pin_memory()
        return self


@dataclass(slots=True)
class Loaded:
    """One decoded and augmented sample on its way into a batch."""

    position: int
    ref: SampleRef
    image_SSC: NDArray[np.uint8]
    bad: list[tuple[str, str]]


class SampleLoader:
    """Turns a position into pixels. A bad sample gives way to another, the same one for every world size."""

    def __init__(self, index: ShardIndex, plan: Plan, augment: Augment) -> None:
        self._index, self._plan, self._augment = index, plan, augment
        self._reader = ShardReader()

    def __call__(self, item: tuple[int, int]) -> Loaded:
        """Load the (position, sample index) pair.

        Raises:
            DataError: storage failed for good, or a hundred substitutes were bad as well.
        """
        position, sample = item
        bad: list[tuple[str, str]] = []
        for attempt in range(_MAX_SUBSTITUTES):
            ref = self._index.sample(sample)
            try:
                image_HWC = decode_image(self._reader.read(ref))
                return Loaded(position, ref, self._augment(image_HWC, position), bad)
            except SampleError as error:
                bad.append((error.reason, ref.key))
                sample = self._substitute(position, attempt)
        raise DataError(
            f"position {position}: {_MAX_SUBSTITUTES} samples in a row could not be decoded, the last one {ref.key} "
            f"in {ref.shard} ({bad[-1][0]}): verify the shards and write them anew with tools/make_shards.py"
        )

    def _substitute(self, position: int, attempt: int) -> int:
        words = random_words(self._plan.seed, Purpose.SUBSTITUTE, position, 2 * _MAX_SUBSTITUTES)[0]
        draw = (int(words[2 * attempt]) << 32) | int(words[2 * attempt + 1])
        return draw % self._plan.num_samples


class PlannedPositions:
    """Source stage: (position, sample) pairs of one worker, micro batch after micro batch, without end."""

    def __init__(self, plan: Plan, share: Slice, first_step: int) -> None:
        self._plan, self._share = plan, share
        self._first_micro_step = first_step * share.micro_batches_per_step

    def __call__(self) -> Iterator[tuple[int, int]]:
        """Interleave the workers by micro batch: the DataLoader takes from them in turn, so order is kept."""
        worker = get_worker_info()
        start, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for micro_step in itertools.count(self._first_micro_step + start, stride):
            positions = self._share.positions(micro_step)
            yield from zip(positions.tolist(), self._plan.samples_at(positions).tolist(), strict=True)


class ChosenSamples:
    """Source stage: the given samples once, in the given order; a sample's own number serves as its position."""

    def __init__(self, samples: list[int]) -> None:
        self._samples = samples

    def __call__(self) -> Iterator[tuple[int, int]]:
        """Yield (position, sample) pairs."""
        return zip(self._samples, self._samples, strict=True)


class Collate:
    """Copies samples into one buffer a batch and draws their mask noise."""

    def __init__(self, *, seed: int, noise_per_sample: int, purpose: Purpose = Purpose.MASK) -> None:
        self._seed, self._noise_per_sample, self._purpose = seed, noise_per_sample, purpose

    def __call__(self, samples: list[Loaded]) -> Batch:
        """Build the batch; see `Batch`."""
        images_BSSC = torch.empty((len(samples), *samples[0].image_SSC.shape), dtype=torch.uint8)
        for row, sample in zip(images_BSSC.numpy(), samples, strict=True):
            row[...] = sample.image_SSC
        positions = [sample.position for sample in samples]
        bad = [pair for sample in samples for pair in sample.bad]
        return Batch(
            images_BCHW=images_BSSC.permute(0, 3, 1, 2),
            noise_BN=torch.from_numpy(uniforms(self._seed, self._purpose, positions, self._noise_per_sample)),
            positions=positions,
            keys=[sample.ref.key for sample in samples],
            labels=[sample.ref.label for sample in samples],
            bad=dict(Counter(reason for reason, _ in bad)),
            bad_keys=[key for _, key in bad],
        )


def train_stream(
    index: ShardIndex, plan: Plan, share: Slice, augment: Augment, *, first_step: int, noise_per_sample: int
) -> wds.DataPipeline:
    """Compose the endless stream of one rank's micro batches from ``first_step`` on."""
    return wds.DataPipeline(
        PlannedPositions(plan, share, first_step),
        wds.map(SampleLoader(index, plan, augment)),
        wds.batched(share.micro_batch, collation_fn=Collate(seed=plan.seed, noise_per_sample=noise_per_sample)),
    )


def fixed_stream(
    index: ShardIndex, samples: list[int], view: Augment, *, batch: int, noise_per_sample: int
) -> wds.DataPipeline:
    """Compose one pass over chosen samples in their own order, with masks that never change.

    The seed of masks and substitutes is 0 whatever the run's seed, so that held-out figures of runs compare.
    """
    return wds.DataPipeline(
        ChosenSamples(samples),
        wds.map(SampleLoader(index, Plan(len(index), seed=0), view)),
        wds.batched(
            batch,
            collation_fn=Collate(seed=0, noise_per_sample=noise_per_sample, purpose=Purpose.HELD_OUT_MASK),
        ),
    )


class Guarded(torch.utils.data.IterableDataset[Batch | TrainerError]):
    """Passes a worker's failure on as a value, so that its message reaches the user without worker tracebacks."""

    def __init__(self, stream: wds.DataPipeline) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Batch | TrainerError]:
        try:
            yield from self._stream
        except TrainerError as error:
            yield error
