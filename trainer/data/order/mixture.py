"""Mixtures: several shard sets or groups of samples, of which every global batch holds its exact share.

Each group runs through its own shuffled plan, so groups keep their law (every sample once before any twice) and read
sequentially, whatever their sizes. A batch's seats are dealt by largest remainder, and what rounding took from a group
is carried over to the next batch: after any number of batches a group has its share of all samples to within one.

Inside a batch the groups alternate in short runs. Positions that one rank takes then fall on the same lanes of each
group in every step, and each rank sees all groups.

Shapes: N positions, G groups, R runs of neighbours, S seats of a batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from trainer.data.order.plan import Located, Plan
from trainer.data.shards.index import NO_GROUP, ShardIndex, list_shards
from trainer.data.storage import place_of
from trainer.errors import ConfigError, DataError
from trainer.seeds import Purpose, random_words

_MAX_PERIOD = 100_000
_MAX_RUN = 48
"""Seats of one group in a row; a number with many divisors keeps ranks on their lanes."""
_WIDE = 4
"""A block that spans more than this many times its samples is not worth reading whole."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of the shard sets that the user named."""

    shards: list[str]
    share: Fraction | None
    """Part of every batch, in relation to the other sources; None where the user gave no shares."""


def read_sources(text: str, *, setting: str) -> list[Source]:
    """Read ``a/*.tar``, ``a/*.tar@0.5,b/*.tar@0.5`` or the name of a YAML file into shard sets.

    The YAML is a list of ``{shards: PATTERNS, share: NUMBER}``. Without shares there is one source.

    Raises:
        ConfigError: a share is no number above 0, is missing, or a shard belongs to two sources.
    """
    pairs = _read_yaml(Path(text), setting) if text.endswith((".yaml", ".yml")) else _read_flag(text)
    given = [share is not None for _, share in pairs]
    if any(given) and not all(given):
        pattern = pairs[given.index(False)][0]
        raise ConfigError(f"{setting}: {pattern!r} has no share, but others have one: write it as {pattern}@0.5")
    if not any(given):
        return [Source(list_shards(",".join(pattern for pattern, _ in pairs), setting=setting), None)]
    sources = [Source(list_shards(pattern, setting=setting), _share(share, setting)) for pattern, share in pairs]
    owner: dict[str, str] = {}
    for (pattern, _), source in zip(pairs, sources, strict=True):
        for shard in map(place_of, source.shards):
            if owner.setdefault(shard, pattern) != pattern:
                raise ConfigError(f"{setting}: {shard} belongs to {owner[shard]!r} and {pattern!r}: keep it in one")
    return sources


def _read_flag(text: str) -> list[tuple[str, str | None]]:
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]
    matches = [(part, re.fullmatch(r"(.+)@([^@/*]*)", part)) for part in parts]
    return [(match[1], match[2]) if match else (part, None) for part, match in matches]


def _read_yaml(path: Path, setting: str) -> list[tuple[str, str | None]]:
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error}): write a list of {{shards, share}}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{setting}: {path} must hold a list of {{shards: 'a/*.tar', share: 0.5}}")
    pairs = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("shards"), str) or set(entry) - {"shards", "share"}:
            raise ConfigError(
                f"{setting}: {path}, entry {number} is {entry!r}, but must be {{shards: TEXT, share: NUMBER}}"
            )
        pairs.append((entry["shards"], None if entry.get("share") is None else str(entry["share"])))
    return pairs


def _share(text: str | None, setting: str) -> Fraction:
    try:
        share = Fraction(text or "")
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if share <= 0:
        raise ConfigError(f"{setting}: the share {text!r} must be a number above 0, for example @0.5")
    return share


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that belong together, as runs of neighbours in the index."""

    name: str
    start_R: NDArray[np.int64]
    """First sample of each run."""
    end_R: NDArray[np.int64]
    """How many of the group's samples stand up to the end of each run."""

    def __len__(self) -> int:
        return int(self.end_R[-1])

    def samples(self, number_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample that is the group's n-th, counted from 0."""
        run_N = np.searchsorted(self.end_R, number_N, side="right")
        before_N: NDArray[np.int64] = np.where(run_N > 0, self.end_R[run_N - 1], 0)
        return self.start_R[run_N] + number_N - before_N


def groups_of_sources(index: ShardIndex, sources: Sequence[Source]) -> list[Group]:
    """Return one group a source; the index lists the shards of the sources one after the other."""
    groups, first_shard = [], 0
    for number, source in enumerate(sources):
        first, end = index.samples_of_shards(first_shard, first_shard + len(source.shards))
        first_shard += len(source.shards)
        groups.append(Group(f"source {number + 1}", np.array([first]), np.array([end - first])))
    return groups


def groups_by_value(codes_N: NDArray[np.integer[Any]], names: Sequence[str]) -> list[Group]:
    """Return one group for each code 0, 1, ... that occurs, named by ``names``.

    Raises:
        DataError: a sample has no code.
    """
    if codes_N.min() < 0:
        raise DataError(
            f"sample {int(np.argmin(codes_N))} has no value to balance by: give each sample one, or set balance_by none"
        )
    start_R = np.flatnonzero(np.diff(codes_N, prepend=NO_GROUP))
    length_R = np.diff(start_R, append=len(codes_N))
    code_R = codes_N[start_R]
    return [
        Group(names[code], start_R[code_R == code].astype(np.int64), np.cumsum(length_R[code_R == code]))
        for code in np.unique(code_R).tolist()
    ]


class Quotas:
    """How many seats of each batch every group gets: largest remainder, rounding carried over."""

    def __init__(self, shares: Sequence[Fraction], batch: int) -> None:
        """Deal until nothing is carried over; from there on everything repeats.

        Raises:
            ConfigError: that takes too long.
        """
        total = sum(shares, Fraction(0))
        parts = [share / total for share in shares]
        unit = lcm(*(part.denominator for part in parts))
        weights = [int(part * unit) for part in parts]  # seats are counted in 1/unit
        taken, rows = [0] * len(parts), [[0] * len(parts)]
        for step in range(1, _MAX_PERIOD + 1):
            quota = _largest_remainder(
                [w * batch * step - t * unit for w, t in zip(weights, taken, strict=True)], unit, batch
            )
            taken = [t + q for t, q in zip(taken, quota, strict=True)]
            rows.append(taken)
            if all(t * unit == w * batch * step for w, t in zip(weights, taken, strict=True)):
                break
        else:
            raise ConfigError(f"the shares {', '.join(map(str, shares))} have too many digits: round them, as 0.35")
        self._taken_PG = np.array(rows, dtype=np.int64)

    def before(self, batch_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the seats (N, G) that each group has got before each batch, counted over the whole run."""
        cycle_N, rest_N = np.divmod(batch_N, len(self._taken_PG) - 1)
        taken_NG: NDArray[np.int64] = cycle_N[:, None] * self._taken_PG[-1] + self._taken_PG[rest_N]
        return taken_NG


def _largest_remainder(wanted: Sequence[int], unit: int, seats: int) -> list[int]:
    """Deal seats to groups that want ``wanted / unit`` of them, which adds up to ``seats``; none gets less than 0."""
    dealt = [max(0, want // unit) for want in wanted]
    remainder = [want - unit * have for want, have in zip(wanted, dealt, strict=True)]
    while (missing := seats - sum(dealt)) != 0:
        by_need = sorted(range(len(dealt)), key=lambda g: (-remainder[g], g))
        chosen = by_need[0] if missing > 0 else next(g for g in reversed(by_need) if dealt[g] > 0)
        step = 1 if missing > 0 else -1
        dealt[chosen] += step
        remainder[chosen] -= step * unit
    return dealt


class Mixture:
    """The order of a run over groups with shares; world size and micro batch never enter it."""

    def __init__(
        self,
        groups: Sequence[Group],
        shares: Sequence[Fraction],
        *,
        batch: int,
        seed: int,
        num_meeting: int = 1,
        **plan: int,
    ) -> None:
        """Join the groups.

        Args:
            groups: of one index.
            shares: one a group, in relation to each other.
            batch: global batch, in which every group gets its quota.
            seed: run seed.
            num_meeting: so many seats of a batch, evenly spread, are mixed with each other (`stream.Slice.group`): runs
                are then as long as lets several groups meet there, which runs that divide the distance would not.
            plan: further settings of each group's `Plan`.

        Raises:
            ConfigError: a batch has fewer seats than there are groups, or shares repeat too late.
        """
        if batch < len(groups):
            raise ConfigError(f"global_batch is {batch}, but must hold the {len(groups)} groups of the data at least")
        self.seed, self._groups, self._batch = seed, list(groups), batch
        self._quotas = Quotas(shares, batch)
        seeds = random_words(seed, Purpose.GROUP_SEED, np.arange(len(groups)), 2).astype(np.uint64).tolist()
        self._plans = [
            Plan(len(group), (high << 31) ^ low, **plan) for group, (high, low) in zip(groups, seeds, strict=True)
        ]
        smallest = min(int(share / sum(shares) * batch) for share in shares)
        self._run = min(_MAX_RUN, max(1, smallest // 4))
        if num_meeting > 1:
            quota = np.diff(self._quotas.before(np.arange(2)), axis=0)[0].tolist()
            longest, most = self._run, max(self._run, min(_MAX_RUN, batch // num_meeting))
            fewest = {run: _fewest_meeting(_seated(quota, run)[0], num_meeting) for run in range(1, most + 1)}
            self._run = max(fewest, key=lambda run: (fewest[run], run == longest, gcd(run, _MAX_RUN), run))
        self._layouts: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and its block."""
        group_N, number_N = self._seat(np.atleast_1d(np.asarray(position, dtype=np.int64)))
        found = np.empty((3, len(group_N)), dtype=np.int64)
        for number, (group, plan) in enumerate(zip(self._groups, self._plans, strict=True)):
            mine_N = group_N == number
            if mine_N.any():
                located = plan.locate(number_N[mine_N])
                found[:, mine_N] = [group.samples(x_N) for x_N in located]
                too_wide_N = found[2] - found[1] > _WIDE * plan.block_size
                found[1:, mine_N & too_wide_N] = found[0, mine_N & too_wide_N]
        return Located(*found)

    def group_at(self, position: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the group that each position belongs to."""
        return self._seat(np.atleast_1d(np.asarray(position, dtype=np.int64)))[0]

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return the samples to try where the one at a position is bad: of the same group, so that quotas hold."""
        number = int(self.group_at(position)[0])
        return self._groups[number].samples(self._plans[number].substitutes(position, count))

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of so many ranks stays on lanes of its own."""
        return self._run % num_ranks == 0 and self._plans[0].reads_blocks(num_ranks)

    def _seat(self, position_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the group of each position, and which sample of the group's own run it is, from 0."""
        batch_N, seat_N = np.divmod(position_N, self._batch)
        batches, inverse = np.unique(batch_N, return_inverse=True)
        before_BG, after_BG = self._quotas.before(batches), self._quotas.before(batches + 1)
        group_N, number_N = np.empty_like(position_N), np.empty_like(position_N)
        quotas, kind = np.unique(after_BG - before_BG, axis=0, return_inverse=True)
        for which, quota in enumerate(quotas.tolist()):
            mine_N = kind.reshape(-1)[inverse] == which
            group_S, number_S = self._layout(tuple(quota))
            group_N[mine_N], number_N[mine_N] = group_S[seat_N[mine_N]], number_S[seat_N[mine_N]]
        return group_N, before_BG[inverse, group_N] + number_N

    def _layout(self, quota: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if quota not in self._layouts:
            self._layouts[quota] = _seated(quota, self._run)
        return self._layouts[quota]


def _seated(quota: Sequence[int], run: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seat a batch: runs of every group, spread evenly. Returns each seat's group, and its number in the group."""
    group_S = np.repeat(np.arange(len(quota)), quota)
    number_S = np.concatenate([np.arange(seats) for seats in quota])
    time_S = (number_S // run + 0.5) / np.maximum(1, np.array(quota))[group_S]
    order_S = np.lexsort((number_S, group_S, time_S))
    return group_S[order_S], number_S[order_S]


def _fewest_meeting(group_S: NDArray[np.int64], num_meeting: int) -> int:
    """Return how many groups meet at least wherever so many evenly spread seats meet."""
    sorted_MS = np.sort(group_S.reshape(num_meeting, -1), axis=0)
    return 1 + int((np.diff(sorted_MS, axis=0) != 0).sum(axis=0).min())
