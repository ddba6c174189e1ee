"""Executes an order: positions -> bytes -> pixels -> batches, as a webdataset pipeline.

webdataset supplies the container format and the composition of stages. Its URL handling, decoders and shuffle buffer
are not used: the first two run code from the data, the third cannot be resumed (webdataset issues 490, 271). The source
stage here asks the plan for samples instead.

Shapes: B samples of a micro batch, R views of one of them, S image side [pixels], N patches, K draws of a view.
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

from trainer.data.byte_ranges import ByteRangeReader
from trainer.data.order.plan import Located, Order, Plan, positions_of
from trainer.data.shards.index import SampleRef, ShardIndex
from trainer.data.shards.reader import ShardReader
from trainer.data.transforms.faces import Box
from trainer.data.transforms.views import Photo, Seen, View
from trainer.errors import DataError, SampleError, TrainerError
from trainer.seeds import Purpose, uniforms

_MAX_SUBSTITUTES = 100
_MICRO_BATCHES_A_CHUNK = 8
"""Micro batches that are located together: numpy is faster on long arrays."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of every global batch that one rank reads, and how it is cut into micro batches.

    Examples, as positions of micro batches 0, 1, 2:

        global 12, micro 3, rank 1 of 2               [1 3 5]  [7 9 11]  [13 15 17]
        global 16, micro 4, rank 0 of 2, 2 repeats    [0 8 2 10]  [4 12 6 14]  [16 24 18 26]
        global 16, micro 4, rank 1 of 2, groups of 2  [1 9 3 11]  [5 13 7 15]  [17 25 19 27]

    With 2 repeats, positions 0 and 8 are the same sample (see `plan.Repeated`); with groups of 2, positions 1 and 9 are
    two samples that are mixed. Both pairs stand side by side in one micro batch.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    num_ranks: int = 1
    repeats: int = 1
    """Views of each sample in the batch; they stand side by side in one micro batch, so this divides it."""
    group: int = 1
    """Number of evenly spaced positions of a step that stand side by side, because their samples are mixed. Which ones
    these are depends on the global batch alone. Not together with `repeats`."""

    @property
    def micro_batches_per_step(self) -> int:
        """Gradient accumulation steps; the configuration has checked that the division is exact."""
        return self.global_batch // (self.num_ranks * self.micro_batch)

    def positions(self, micro_step: int) -> NDArray[np.int64]:
        """Return the positions of one micro batch, counted over the whole run."""
        step, part = divmod(micro_step, self.micro_batches_per_step)
        mine = positions_of(step, rank=self.rank, num_ranks=self.num_ranks, global_batch=self.global_batch)
        # Column-wise: positions of the first and second half (repeats or group 2) become neighbours.
        mine = mine.reshape(self.repeats * self.group, -1).T.ravel()
        return mine[part * self.micro_batch : (part + 1) * self.micro_batch]


@dataclass(slots=True)
class Batch:
    """One micro batch on its way from the loader to the training loop."""

    images_BCHW: Tensor
    """uint8 RGB, channels last in memory."""
    noise_BN: Tensor
    """Uniform numbers in [0, 1), float32: the only randomness of the masks."""
    positions: list[int]
    keys: list[str]
    labels: list[int]
    bad: dict[str, int] = field(default_factory=dict)
    """Reason -> number of substituted samples."""
    bad_keys: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """For each sample why it could not be read, or ""; only for streams that substitute nothing."""
    face_boxes: list[Box | None] = field(default_factory=list)
    """For each sample the face that it was cropped to when it was loaded, in its photograph [pixels]."""

    def pin_memory(self) -> "Batch":
        """Move the tensors to page-locked memory; the DataLoader's pin thread calls this."""
        self.images_BCHW, self.noise_BN = self.images_BCHW.pin_memory(), self.noise_BN.pin_memory()
        return self


@dataclass(frozen=True, slots=True)
class Request:
    """The positions and samples of one batch, before anything is read."""

    position_B: NDArray[np.int64]
    located: Located


class PlannedRequests:
    """Source stage: the micro batches of one worker, one after the other, endlessly."""

    def __init__(self, order: Order, share: Slice, first_step: int) -> None:
        self._order, self._share = order, share
        self._first_micro_step = first_step * share.micro_batches_per_step

    def __call__(self) -> Iterator[Request]:
        """Yield this worker's micro batches."""
        start, _, stride = _slice_of_worker()  # worker 1 of 4 yields micro batches 1, 5, 9, ...
        micro_steps = itertools.count(self._first_micro_step + start, stride)
        while True:
            positions = [self._share.positions(next(micro_steps)) for _ in range(_MICRO_BATCHES_A_CHUNK)]
            located = self._order.locate(np.concatenate(positions))
            parts = zip(*(np.split(array, _MICRO_BATCHES_A_CHUNK) for array in located), strict=True)
            for position_B, part in zip(positions, parts, strict=True):
                yield Request(position_B, Located(*part))

    def expected_positions(self) -> Iterator[NDArray[np.int64]]:
        """Yield the positions of every batch of the whole stream, in the order in which they must arrive."""
        return map(self._share.positions, itertools.count(self._first_micro_step))


class ChosenRequests:
    """Source stage: the given samples once, in the given order; the position of a sample is its number."""

    def __init__(self, samples: list[int], batch: int) -> None:
        self._samples, self._batch = np.array(samples, dtype=np.int64), batch

    def __call__(self) -> Iterator[Request]:
        """Yield this worker's batches; the last batch of the stream may be shorter."""
        for sample_B in itertools.islice(self.expected_positions(), *_slice_of_worker()):
            yield Request(sample_B, Located(sample_B, sample_B, sample_B))

    def expected_positions(self) -> Iterator[NDArray[np.int64]]:
        """Yield the positions of every batch of the whole stream, in the order in which they must arrive."""
        for start in range(0, len(self._samples), self._batch):
            yield self._samples[start : start + self._batch]


def _slice_of_worker() -> tuple[int, int | None, int]:
    """Return the slice of the stream's batches that this loader worker loads.

    The DataLoader takes batches from its workers in turn, so worker w of W must load batches w, w + W, w + 2W, ...
    """
    worker = get_worker_info()
    return (worker.id, None, worker.num_workers) if worker else (0, None, 1)


class Stream(torch.utils.data.IterableDataset[Batch]):
    """Requests and their loading; knows the positions that must arrive, so that the receiver can compare."""

    def __init__(self, requests: PlannedRequests | ChosenRequests, load: Callable[[Request], Batch]) -> None:
        self._requests, self._pipeline = requests, wds.DataPipeline(requests, wds.map(load))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._pipeline)

    def expected_positions(self) -> Iterator[list[int]]:
        """Yield the positions of every batch in order, for any number of workers; endless if the stream is."""
        return (position_B.tolist() for position_B in self._requests.expected_positions())


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a `BatchLoader` reads; a stream for training and one over chosen samples differ in these."""

    noise_per_sample: int
    """Uniform numbers for the mask of each sample."""
    purpose: Purpose
    """The purpose of those numbers, for `trainer.seeds`."""
    whole_blocks: bool = False
    """Read a sample's whole block, because this rank reads the rest of it soon."""
    repeats: int = 1
    """Number of consecutive positions that are one sample, which is read and decoded once."""
    substitute: bool = True
    """Replace a bad sample by another one; otherwise its image stays black and its failure is recorded."""


class BatchLoader:
    """Turns a request into pixels. A bad sample is replaced by another one, the same for every world size.

    Args:
        index: location of the samples.
        order: chooses the substitutes of bad samples.
        view: decodes, crops and distorts.
        spans: reads the bytes.
        options: see `LoadOptions`.
    """

    def __init__(
        self, index: ShardIndex, order: Order, view: View, spans: ByteRangeReader, options: LoadOptions
    ) -> None:
        self._index, self._order, self._view = index, order, view
        self._reader, self._options = ShardReader(spans), options

    def __call__(self, request: Request) -> Batch:
        """Load one batch.

        Raises:
            DataError: the storage failed permanently, or a hundred substitutes were bad as well.
        """
        size, position_B, repeats = self._view.size, request.position_B, self._options.repeats
        images_BSSC = torch.empty((len(position_B), size, size, 3), dtype=torch.uint8)
        # The R views of a sample stand side by side, so every R-th position is another sample.
        located = Located(*(array[::repeats] for array in request.located))
        read = self._index.samples(located.sample_N)
        payloads = self._reader.read_all(read, self._index.blocks(*located) if self._options.whole_blocks else None)
        bad: list[tuple[str, str]] = []
        draws_BK, rows_BSSC = self._view.draw(position_B), images_BSSC.numpy()
        landmarks = self._landmarks(read, draws_BK)
        keys, labels, failures = [], [], [""] * len(position_B)
        boxes: list[Box | None] = []
        for i, (ref, payload) in enumerate(zip(read, payloads, strict=True)):
            mine = slice(i * repeats, (i + 1) * repeats)
            try:
                photo = Photo(self._reader.check(ref, payload), ref.label, landmarks.get(i))
                seen = self._view(photo, draws_BK[mine], rows_BSSC[mine])
            except SampleError as error:
                bad += [(error.reason, ref.key)] * repeats
                if self._options.substitute:
                    ref, seen = self._substitute(int(position_B[mine.start]), bad, draws_BK[mine], rows_BSSC[mine])
                else:
                    failures[mine], rows_BSSC[mine], seen = [error.reason] * repeats, 0, Seen([ref.label] * repeats)
            keys += [ref.key] * repeats
            boxes += [seen.face_box] * repeats
            labels += seen.labels
        noise_BN = uniforms(self._order.seed, self._options.purpose, position_B, self._options.noise_per_sample)
        return Batch(
            images_BCHW=images_BSSC.permute(0, 3, 1, 2),
            noise_BN=torch.from_numpy(noise_BN),
            positions=position_B.tolist(),
            keys=keys,
            labels=labels,
            bad=dict(Counter(reason for reason, _ in bad)),
            bad_keys=[key for _, key in bad],
            failures=failures,
            face_boxes=boxes,
        )

    def _landmarks(self, refs: list[SampleRef], draws_BK: NDArray[np.float32]) -> dict[int, NDArray[np.float32] | None]:
        parts = np.split(draws_BK, len(refs))
        wanted = [
            i
            for i, (ref, draws_RK) in enumerate(zip(refs, parts, strict=True))
            if any(self._view.wants_landmarks(ref.label, draws_K) for draws_K in draws_RK)
        ]
        return dict(zip(wanted, self._reader.read_landmarks([refs[i] for i in wanted]), strict=True)) if wanted else {}

    def _substitute(
        self, position: int, bad: list[tuple[str, str]], draws_RK: NDArray[np.float32], out_RSSC: NDArray[np.uint8]
    ) -> tuple[SampleRef, Seen]:
        for ref in self._index.samples(self._order.substitutes(position, _MAX_SUBSTITUTES)):
            try:
                return ref, self._view(Photo(self._reader.read(ref), ref.label), draws_RK, out_RSSC)
            except SampleError as error:
                bad += [(error.reason, ref.key)] * self._options.repeats
        raise DataError(
            f"position {position}: {_MAX_SUBSTITUTES} samples in a row could not be decoded, the last one {ref.key} "
            f"in {ref.shard} ({bad[-1][0]}): check and repair the shards with tools/check_shards.py --repair"
        )


def train_stream(
    index: ShardIndex,
    order: Order,
    share: Slice,
    view: View,
    *,
    first_step: int,
    noise_per_sample: int,
    spans: ByteRangeReader | None = None,
) -> Stream:
    """Build the endless stream of one rank's micro batches from ``first_step`` on."""
    options = LoadOptions(
        noise_per_sample=noise_per_sample,
        purpose=Purpose.MASK,
        whole_blocks=order.reads_blocks(share.num_ranks),
        repeats=share.repeats,
    )
    load = BatchLoader(index, order, view, spans or ByteRangeReader(), options)
    return Stream(PlannedRequests(order, share, first_step), load)


def fixed_stream(
    index: ShardIndex,
    samples: list[int],
    view: View,
    *,
    batch: int,
    noise_per_sample: int,
    spans: ByteRangeReader | None = None,
    substitute: bool = True,
) -> Stream:
    """Build one pass over chosen samples in the given order, with masks that never change.

    The seed of masks and substitutes is 0 whatever the run's seed, so that validation figures of runs are comparable.
    """
    options = LoadOptions(noise_per_sample=noise_per_sample, purpose=Purpose.HELD_OUT_MASK, substitute=substitute)
    load = BatchLoader(index, Plan(len(index), seed=0), view, spans or ByteRangeReader(), options)
    return Stream(ChosenRequests(samples, batch), load)


class Guarded(torch.utils.data.IterableDataset[Batch | TrainerError]):
    """Yields a worker's error as a value, so that its message reaches the user without worker tracebacks."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Batch | TrainerError]:
        try:
            yield from self._stream
        except TrainerError as error:
            yield error
