"""Weighted draws, the same for every world size: no state, and no limit of 2**24 samples as in torch.multinomial.

Draw p inverts the cumulative weights at a uniform number that is a function of (seed, p). Nothing is shuffled, consumed
or shared. So rank r of W computes its own draws, a resume costs nothing, and any other world size continues the same
sequence.

Example: weights 1, 0, 3 have cumulative weights 1, 1, 4. A uniform number 0.12 points at 0.48 and draws sample 0;
0.49 points at 1.96 and draws sample 2. Sample 1 has no width and is never drawn.

Shapes: N samples or positions.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from trainer.data.order.plan import Located
from trainer.errors import ConfigError, DataError
from trainer.seeds import Purpose, uniform_doubles

_EPOCH_STRIDE = 1 << 40
"""Epoch e draws from position e * 2**40 on, so that its draws do not depend on the length of epochs."""
_DRAWS_A_CHUNK = 4096


class WeightedOrder:
    """Draws samples with replacement, each with a chance in proportion to its weight."""

    def __init__(self, weights: ArrayLike, *, seed: int) -> None:
        """Add up the weights.

        Raises:
            DataError: a weight is negative or not finite, or all are zero.
        """
        weights_N = np.asarray(weights, dtype=np.float64)
        if weights_N.ndim != 1 or not len(weights_N) or not np.isfinite(weights_N).all() or (weights_N < 0).any():
            raise DataError("sampling weights must be one finite number >= 0 for each sample: fix the weights")
        if not weights_N.any():
            raise DataError("all sampling weights are zero: at least one sample must have a weight above zero")
        self.seed = seed
        self._cumulative_N = np.cumsum(weights_N)
        self._last = int(np.flatnonzero(weights_N)[-1])

    def draw(self, position_N: ArrayLike, purpose: Purpose = Purpose.WEIGHTED_DRAW) -> NDArray[np.int64]:
        """Return the sample drawn at each position >= 0; a sample of weight zero is never drawn."""
        target_N = uniform_doubles(self.seed, purpose, position_N) * self._cumulative_N[-1]
        found_N: NDArray[np.int64] = np.searchsorted(self._cumulative_N, target_N, side="right").astype(np.int64)
        return np.minimum(found_N, self._last)  # rounding may put a target on the total itself, past the last sample

    def locate(self, position: ArrayLike) -> Located:
        """Return the draw at each position; a draw has no neighbours, so it is its own block."""
        sample_N = self.draw(position)
        return Located(sample_N, sample_N, sample_N)

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` other draws for a position whose sample is bad."""
        return self.draw(np.arange(position * count, (position + 1) * count), Purpose.SUBSTITUTE)

    def reads_blocks(self, num_ranks: int) -> bool:
        """Return False: draws come from all over the set."""
        del num_ranks
        return False


class DistributedWeightedSampler(Sampler[int]):
    """Weighted sampling for several ranks, with the interface of torch's samplers.

    Rank r takes draws r, r + num_replicas, r + 2 * num_replicas, ... of one global sequence, so the draws of an epoch
    are the same for every world size. Without replacement, an epoch is an order of all samples in which heavier ones
    tend to come first (Efraimidis and Spirakis 2006: ascending -ln(u) / w); it costs a sort of N numbers an epoch.

    Args:
        weights: one number >= 0 for each sample; they need not add up to one.
        num_samples: draws an epoch over all ranks; None means one for each sample, rounded down to a multiple of the
            world size.
        num_replicas: world size; None asks torch.distributed.
        rank: this rank; None asks torch.distributed.
        replacement: whether a sample may be drawn twice in an epoch.
        seed: root of the sequence.

    Raises:
        ConfigError: num_samples, rank and world size contradict each other.
        DataError: a weight is negative or not finite, or all are zero.
    """

    def __init__(
        self,
        weights: ArrayLike,
        num_samples: int | None = None,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        replacement: bool = True,
        seed: int = 0,
    ) -> None:
        self._weights_N = np.asarray(weights, dtype=np.float64)
        self._order = WeightedOrder(self._weights_N, seed=seed)
        has_ranks = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else (dist.get_world_size() if has_ranks else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if has_ranks else 0)
        self.replacement, self.seed, self.epoch = replacement, seed, 0
        available = len(self._weights_N) if replacement else int(np.count_nonzero(self._weights_N))
        self.num_samples = available - available % self.num_replicas if num_samples is None else num_samples
        self._consumed = 0
        if not 0 <= self.rank < self.num_replicas:
            raise ConfigError(f"rank is {self.rank}, but must be from 0 to {self.num_replicas - 1}: pass both or none")
        if self.num_samples < 1 or self.num_samples % self.num_replicas:
            raise ConfigError(
                f"num_samples is {self.num_samples}, but must be a multiple of the {self.num_replicas} ranks above 0"
            )
        if not replacement and self.num_samples > available:
            raise ConfigError(
                f"num_samples is {self.num_samples}, but only {available} samples have a weight above zero: "
                "draw with replacement=True, or fewer"
            )

    def __len__(self) -> int:
        """Draws of this rank in an epoch."""
        return self.num_samples // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's draws of the epoch, from the position that `load_state_dict` set."""
        permuted_N = None if self.replacement else self._permutation()
        start, self._consumed = self._consumed, 0
        for begin in range(start + self.rank, self.num_samples, self.num_replicas * _DRAWS_A_CHUNK):
            end = min(self.num_samples, begin + self.num_replicas * _DRAWS_A_CHUNK)
            place_N = np.arange(begin, end, self.num_replicas)
            if permuted_N is None:
                drawn_N = self._order.draw(self.epoch * _EPOCH_STRIDE + place_N)
            else:
                drawn_N = permuted_N[place_N]
            yield from drawn_N.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `__iter__` yields, from its start."""
        self.epoch, self._consumed = epoch, 0

    def state_dict(self, *, num_consumed: int = 0) -> dict[str, Any]:
        """Return what another sampler needs to continue, with any number of ranks.

        Args:
            num_consumed: draws of this epoch that training has used, over all ranks. Only the caller knows it: loader
                workers fetch ahead.

        Raises:
            ConfigError: num_consumed is no multiple of the ranks, or above num_samples.
        """
        if num_consumed % self.num_replicas or not 0 <= num_consumed <= self.num_samples:
            raise ConfigError(
                f"num_consumed is {num_consumed}, but must be a multiple of the {self.num_replicas} ranks up to "
                f"{self.num_samples}: count the draws of all ranks"
            )
        return {"epoch": self.epoch, "num_consumed": num_consumed} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; takes no time, whatever the position.

        Raises:
            ConfigError: the state has other weights, another seed or another length, or does not fit the ranks.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ConfigError(
                    f"the sampler's {name} is {expected}, but the state has {state.get(name)}: restore it"
                )
        if state["num_consumed"] % self.num_replicas:
            raise ConfigError(
                f"{state['num_consumed']} draws were consumed, which {self.num_replicas} ranks cannot share"
            )
        self.epoch, self._consumed = int(state["epoch"]), int(state["num_consumed"])

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._weights_N.tobytes()).hexdigest()[:16]
        return {
            "seed": self.seed,
            "num_samples": self.num_samples,
            "replacement": self.replacement,
            "weights_sha256": digest,
        }

    def _permutation(self) -> NDArray[np.int64]:
        count = len(self._weights_N)
        draw_N = uniform_doubles(self.seed, Purpose.WEIGHTED_ORDER, self.epoch * _EPOCH_STRIDE + np.arange(count))
        with np.errstate(divide="ignore"):  # weight zero: an infinite arrival time, so it comes last
            arrival_N = -np.log1p(-draw_N) / self._weights_N
        return np.argsort(arrival_N, kind="stable")[: self.num_samples]


def class_weights(labels: ArrayLike, *, num_classes: int | None = None) -> NDArray[np.float64]:
    """Weigh samples so that every class has the same chance: 1 / (size of the sample's class).

    Args:
        labels: class of each sample, integers from 0.
        num_classes: how many classes there must be; None takes those that occur.

    Raises:
        DataError: a sample has no class, or a class has no sample.

    Example: labels 0, 0, 0, 1 give weights 1/3, 1/3, 1/3, 1.
    """
    labels_N = np.asarray(labels, dtype=np.int64)
    if not len(labels_N) or labels_N.min() < 0:
        number = int(np.argmin(labels_N)) if len(labels_N) else 0
        raise DataError(f"sample {number} has no label: balancing by class needs a label 0, 1, ... for each sample")
    counts = np.bincount(labels_N, minlength=num_classes or 0)
    if num_classes is not None and len(counts) > num_classes:
        raise DataError(f"a sample has label {len(counts) - 1}, but labels go from 0 to {num_classes - 1}: fix it")
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise DataError(
            f"no sample has label {', '.join(map(str, empty[:10].tolist()))}: add some, or renumber the labels"
        )
    return (1.0 / counts)[labels_N]


def make_balanced_sampler(
    labels: Sequence[int] | NDArray[Any], *, num_classes: int | None = None, **options: Any
) -> DistributedWeightedSampler:
    """Build a sampler that draws every class equally often.

    Args:
        labels: class of each sample, integers from 0.
        num_classes: see `class_weights`.
        options: of `DistributedWeightedSampler`.

    Raises:
        DataError: a sample has no class, or a class has no sample.
    """
    return DistributedWeightedSampler(class_weights(labels, num_classes=num_classes), **options)
