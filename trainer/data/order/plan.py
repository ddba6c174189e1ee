"""Position -> sample: pure integer arithmetic, no I/O, no state, no table.

A *position* counts samples over the whole run, across epochs. Step ``s`` owns positions ``[s*G, (s+1)*G)`` where G is
the global batch, and rank r of W reads every W-th of them. World size, micro batch and number of workers never
enter `Plan`, so one integer is enough to resume a run anywhere: the number of samples that the optimizer has consumed.

The order of an epoch is random and still reads sequentially. Its N samples are cut into *blocks* of neighbours, the
blocks are permuted, and the result is laid over L *lanes*: position q of the epoch is row q // L of lane q % L. Inside
a lane, samples are permuted within *windows* of a few blocks. If W divides L, a rank owns L / W lanes and reads
L / W runs of neighbours at a time. Other world sizes get the same batches but read more.

Each epoch also rotates the sample numbers by a random offset, so block borders move between epochs.
Every stage is a bijection of range(N). Therefore each epoch visits every sample exactly once.

Example: N = 11, L = 2, blocks of 4 samples, windows of 1 block, seed 0, epoch 0. The stages in the order of `locate`:

    position q of the epoch     0  1  2  3  4  5  6  7  8  9 10
    lane and window: place      3  7  0  8  1  9  2  6  5 10  4    lane 0 is places 0-5, lane 1 is places 6-10
    block order: index          3  4  0  5  1  6  2 10  9  7  8    the blocks stand as 0-3, 8-10, 4-7
    rotation by 4: sample       7  8  4  9  5 10  6  3  2  0  1    (index + 4) % 11

Shapes: N positions.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.seeds import Purpose, random_words, shuffled, uniform_integers

PLAN_VERSION = 2
"""Changes whenever the same (seed, position) would give another sample; resume refuses another version."""


class Located(NamedTuple):
    """The samples at N positions of a run, and their blocks; each array is int64 of shape (N,)."""

    sample_N: NDArray[np.int64]
    first_N: NDArray[np.int64]
    """First sample of the block that holds the sample: the same rank reads its neighbours soon."""
    last_N: NDArray[np.int64]
    """Last sample of that block."""


class Order(Protocol):
    """Which sample a run visits at which position: `Plan`, `sampler.WeightedOrder` or `mixture.Mixture`."""

    @property
    def seed(self) -> int:
        """Root of the order's randomness."""

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and its block."""

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` samples to try, in this order, in place of a bad one at the position."""

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of ``num_ranks`` ranks reads whole blocks."""


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
        """Samples a block: ``block_samples``, or fewer in small sets, so that every lane still fills a window.

        Example: 192 lanes with windows of 8 blocks. 100,000 samples give 100,000 // 1536 = 65 samples a block, not 128.
        """
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
        # The rotation can push a block over the end of the set: of 11 samples, block 4..7 rotated by 5 is 9, 10, 0, 1.
        # Then first > last, and only the side that holds the sample is one run of neighbours: 9..10 or 0..1.
        parted_N = first_N > last_N
        return Located(
            sample_N,
            np.where(parted_N & (sample_N <= last_N), 0, first_N),
            np.where(parted_N & (sample_N >= first_N), self.num_samples - 1, last_N),
        )

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` samples to try, in this order, in place of a bad one at the position."""
        return uniform_integers(self.seed, Purpose.SUBSTITUTE, position, count, self.num_samples)

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of ``num_ranks`` ranks reads whole blocks, because it owns its lanes."""
        return self.num_lanes % num_ranks == 0

    def _unlane(self, epoch_N: NDArray[np.int64], offset_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place of each position in the sequence of permuted blocks, which L lanes cut into equal parts."""
        num_lanes = min(self.num_lanes, self.num_samples)
        # The first lanes are one row longer. Example: 22 samples on 3 lanes give 8, 7 and 7 rows, which start at places
        # 0, 8 and 15. Offset 4 is row 1 of lane 1, so its place is 8 + 1 = 9 before the window is permuted.
        short_rows, long_lanes = divmod(self.num_samples, num_lanes)
        row_N, lane_N = np.divmod(offset_N, num_lanes)
        rows_N = short_rows + (lane_N < long_lanes)
        start_N = lane_N * short_rows + np.minimum(lane_N, long_lanes)

        # Rows are permuted inside their window only; the last window of a lane may be shorter. `which` numbers all
        # windows of all epochs, so that no two share a permutation; one spare window a lane covers the longer lanes.
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
        """Undo the permutation of blocks. The one short block stands at a random slot and keeps its own samples.

        Example: 11 samples in blocks of 4 are 2 full blocks and a short one of 3. With the short block at slot 1,
        places 0-3 are a full block, places 4-6 are the short one (samples 8-10), and places 7-10 are a full block.
        """
        size = self.block_size
        num_full, short = divmod(self.num_samples, size)
        short_slot_N = self._epoch_draw(epoch_N, Purpose.BLOCK_ORDER, num_full + 1)
        after_N = place_N - short_slot_N * size  # below 0: in front of the short block
        in_short_N = (after_N >= 0) & (after_N < short)
        slot_N, inside_N = np.divmod(np.where(after_N >= short, place_N - short, place_N), size)
        block_N = shuffled(
            np.where(in_short_N, 0, slot_N), num_full, seed=self.seed, purpose=Purpose.BLOCK_ORDER, which=epoch_N
        )
        return np.where(in_short_N, num_full * size + after_N, block_N * size + inside_N)

    def _epoch_draw(self, epoch_N: NDArray[np.int64], purpose: Purpose, bound: int) -> NDArray[np.int64]:
        """Draw one integer in [0, bound) for each epoch. The bias of the modulus is below bound / 2**62."""
        epochs, inverse = np.unique(epoch_N, return_inverse=True)
        # ~epoch counts down from 2**64 - 1. `shuffled` draws for BLOCK_ORDER as well, at positions from 0 upwards.
        words = random_words(self.seed, purpose, ~epochs.astype(np.uint64), 2).astype(np.int64)
        return (((words[:, 0] << 30) ^ words[:, 1]) % bound)[inverse]


@dataclass(frozen=True, slots=True)
class Repeated:
    """An order whose batches hold each sample R times: one decoding gives R views.

    Of the G positions of a step, i, i + G/R, i + 2G/R, ... are the same sample. One rank reads all of them if
    the number of ranks divides G/R. A pass over the samples takes R times as many positions.

    Example: G = 8, R = 2. Steps 0 and 1 read positions 0 1 2 3 0 1 2 3 and 4 5 6 7 4 5 6 7 of the order inside.
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
        return self.order.locate(self._inner_position(np.asarray(position, dtype=np.int64)))

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` samples to try, in this order, in place of a bad one at the position."""
        return self.order.substitutes(int(self._inner_position(np.array(position))), count)

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of ``num_ranks`` ranks reads whole blocks."""
        return self.order.reads_blocks(num_ranks)

    def _inner_position(self, position_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of each sample in the order that is repeated."""
        step_N, place_N = np.divmod(position_N, self.global_batch)
        num_samples = self.global_batch // self.repeats
        inner_N: NDArray[np.int64] = step_N * num_samples + place_N % num_samples
        return inner_N


def positions_of(step: int, *, rank: int, num_ranks: int, global_batch: int) -> NDArray[np.int64]:
    """List the positions that one rank reads in one step: every ``num_ranks``-th of the step.

    Returns:
        position_N: int64 of shape (global_batch // num_ranks,), ascending.

    Example: step 2 of a global batch of 16 owns positions 32-47; rank 1 of 4 reads 33, 37, 41 and 45.
    """
    return np.arange(step * global_batch + rank, (step + 1) * global_batch, num_ranks, dtype=np.int64)


def evenly_spaced(num_wanted: int, num_all: int) -> list[int]:
    """Choose up to ``num_wanted`` of ``range(num_all)``, evenly spaced: 4 of 10 are 0, 2, 5, 7."""
    count = min(num_wanted, num_all)
    return [i * num_all // count for i in range(count)]
