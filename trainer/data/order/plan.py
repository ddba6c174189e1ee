"""Position -> sample: pure integer arithmetic, no I/O, no state, no table.

A *position* counts samples over the whole run, across epochs. Step ``s`` owns positions ``[s*G, (s+1)*G)`` where G is
the global batch, and rank r of W reads every W-th of them. World size, micro batch and number of workers never
enter `Plan`, so a run resumes anywhere from one integer: the samples that the optimizer has consumed.

The order of an epoch is random and still reads sequentially. Its N samples are cut into *blocks* of neighbours, the
blocks are permuted, and the result is laid over L *lanes*: position q of the epoch is row q // L of lane q % L. Inside
a lane, samples are permuted within *windows* of a few blocks. A rank whose W divides L meets only L / W lanes and so
reads L / W runs of neighbours at a time; other world sizes get the same batches and read more.

Each epoch also rotates the numbering by a random offset, so that block borders move and neighbours part.
Every step is a bijection of range(N), hence the law: each epoch visits every sample exactly once.

Shapes: N positions.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.seeds import Purpose, random_words, shuffled, uniform_integers

PLAN_VERSION = 2
"""Changes whenever the same (seed, position) would give another sample; a resume across versions is refused."""


class Located(NamedTuple):
    """Where the positions of a run lie, each array int64 of shape (N,)."""

    sample_N: NDArray[np.int64]
    first_N: NDArray[np.int64]
    """First sample of the block in which the sample stands: the neighbours that the same rank reads soon."""
    last_N: NDArray[np.int64]
    """Last sample of that block."""


class Order(Protocol):
    """What a run visits when: `Plan`, or an order of the modules `sampler` and `mixture`."""

    @property
    def seed(self) -> int:
        """Root of the order's randomness."""

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and its block."""

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return the samples to try, in this order, where the one at a position is bad."""

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of so many ranks reads whole blocks."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The order in which a run visits ``num_samples`` samples."""

    num_samples: int
    seed: int
    num_lanes: int = 192
    block_samples: int = 128
    window_blocks: int = 8

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_lanes", "block_samples", "window_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a plan needs at least 1")

    @property
    def block_size(self) -> int:
        """Samples a block: ``block_samples``, less in small sets so that every lane still mixes whole windows."""
        return max(1, min(self.block_samples, self.num_samples // (self.num_lanes * self.window_blocks)))

    def sample_at(self, position: int) -> int:
        """Return the sample index at one position; see `samples_at`."""
        return int(self.samples_at([position])[0])

    def samples_at(self, position: ArrayLike) -> NDArray[np.int64]:
        """Return the sample index in [0, num_samples) at each position >= 0, as int64 of shape (N,)."""
        return self.locate(position)[0]

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and the block of neighbours that are read together with it."""
        epoch_N, offset_N = np.divmod(np.atleast_1d(np.asarray(position, dtype=np.int64)), self.num_samples)
        index_N = self._unblock(epoch_N, self._unlane(epoch_N, offset_N))
        first_N = index_N - index_N % self.block_size
        last_N = np.minimum(first_N + self.block_size, self.num_samples) - 1
        rotation_N = self._epoch_draw(epoch_N, Purpose.EPOCH_ROTATION, self.num_samples)
        sample_N, first_N, last_N = ((x_N + rotation_N) % self.num_samples for x_N in (index_N, first_N, last_N))
        parted_N = first_N > last_N  # a block over the end of the set goes on at its beginning: keep our side of it
        return Located(
            sample_N,
            np.where(parted_N & (sample_N <= last_N), 0, first_N),
            np.where(parted_N & (sample_N >= first_N), self.num_samples - 1, last_N),
        )

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return the samples to try, in this order, where the one at a position is bad."""
        return uniform_integers(self.seed, Purpose.SUBSTITUTE, position, count, self.num_samples)

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of so many ranks reads whole blocks: it has lanes of its own."""
        return self.num_lanes % num_ranks == 0

    def _unlane(self, epoch_N: NDArray[np.int64], offset_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of a position in the sequence of permuted blocks, whose L equal cuts are the lanes."""
        num_lanes = min(self.num_lanes, self.num_samples)
        short_rows, long_lanes = divmod(self.num_samples, num_lanes)  # the first lanes are one row longer
        row_N, lane_N = np.divmod(offset_N, num_lanes)
        rows_N = short_rows + (lane_N < long_lanes)
        start_N = lane_N * short_rows + np.minimum(lane_N, long_lanes)

        window_rows = self.block_size * self.window_blocks
        windows_a_lane = -(-self.num_samples // (num_lanes * window_rows)) + 1
        window_N = row_N // window_rows
        first_N = window_N * window_rows
        row_N = first_N + shuffled(
            row_N - first_N,
            np.minimum(window_rows, rows_N - first_N),
            seed=self.seed,
            purpose=Purpose.WINDOW_ORDER,
            which=(epoch_N * num_lanes + lane_N) * windows_a_lane + window_N,
        )
        return start_N + row_N

    def _unblock(self, epoch_N: NDArray[np.int64], place_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Undo the permutation of blocks. The one short block stands at a random slot and keeps its own samples."""
        size = self.block_size
        num_full, short = divmod(self.num_samples, size)
        short_slot_N = self._epoch_draw(epoch_N, Purpose.BLOCK_ORDER, num_full + 1)
        after_N = place_N - short_slot_N * size
        in_short_N = (after_N >= 0) & (after_N < short)
        slot_N, inside_N = np.divmod(np.where(after_N >= short, place_N - short, place_N), size)
        block_N = shuffled(
            np.where(in_short_N, 0, slot_N), num_full, seed=self.seed, purpose=Purpose.BLOCK_ORDER, which=epoch_N
        )
        return np.where(in_short_N, num_full * size + after_N, block_N * size + inside_N)

    def _epoch_draw(self, epoch_N: NDArray[np.int64], purpose: Purpose, bound: int) -> NDArray[np.int64]:
        """Draw one integer in [0, bound) an epoch. The bias of the modulus is below bound / 2**62."""
        epochs, inverse = np.unique(epoch_N, return_inverse=True)
        words = random_words(self.seed, purpose, ~epochs.astype(np.uint64), 2).astype(np.int64)
        return (((words[:, 0] << 30) ^ words[:, 1]) % bound)[inverse]


@dataclass(frozen=True, slots=True)
class Repeated:
    """An order of which every batch holds each of its samples several times, for as many views of one decoding.

    Of the G positions of a step the i-th, the (i + G/R)-th and so on are one sample, so that all of them fall to one
    rank wherever ranks and R divide G. A pass over the samples takes R times as many positions.
    """

    order: Order
    repeats: int
    """R."""
    global_batch: int
    """G, a multiple of R."""

    @property
    def seed(self) -> int:
        """Root of the order's randomness."""
        return self.order.seed

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and its block."""
        return self.order.locate(self._turn(np.asarray(position, dtype=np.int64)))

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return the samples to try, in this order, where the one at a position is bad."""
        return self.order.substitutes(int(self._turn(np.array(position))), count)

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of so many ranks reads whole blocks."""
        return self.order.reads_blocks(num_ranks)

    def _turn(self, position_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions in the order that is repeated."""
        step_N, place_N = np.divmod(position_N, self.global_batch)
        num_samples = self.global_batch // self.repeats
        turned_N: NDArray[np.int64] = step_N * num_samples + place_N % num_samples
        return turned_N


def positions_of(step: int, *, rank: int, num_ranks: int, global_batch: int) -> NDArray[np.int64]:
    """List the positions that one rank reads in one step: every ``num_ranks``-th of the step's own.

    Returns:
        position_N: int64 of shape (global_batch // num_ranks,), ascending.
    """
    return np.arange(step * global_batch + rank, (step + 1) * global_batch, num_ranks, dtype=np.int64)


def evenly_spaced(num_wanted: int, num_all: int) -> list[int]:
    """Choose up to ``num_wanted`` of ``range(num_all)``, evenly from beginning to end."""
    count = min(num_wanted, num_all)
    return [i * num_all // count for i in range(count)]
