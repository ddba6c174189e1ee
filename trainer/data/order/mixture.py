"""Mixtures: several shard sets or groups of samples, of which every global batch holds its exact share.

Each group runs through its own shuffled plan. So each group visits every sample once before any twice and reads
sequentially, whatever its size. The slots of a batch are split by largest remainder, and what rounding took from a
group is carried over to the next batch: after any number of batches a group has its share of all samples to within one.

Inside a batch the groups alternate in short runs. The positions of one rank then fall on the same lanes of each
group in every step, and each rank sees all groups.

Shapes: N positions, G groups, R runs of neighbours, S slots of a batch, M slots that are mixed with each other,
B distinct batches, P batches of a period.
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

_MAX_PERIOD_BATCHES = 100_000
_MAX_RUN_SLOTS = 48
"""Slots of one group in a row; 48 has many divisors, so that most numbers of ranks stay on their lanes."""
_MAX_SPAN_FACTOR = 4
"""A block that spans more than this many times its samples is not read whole."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of the shard sets that the user named."""

    shards: list[str]
    share: Fraction | None
    """Part of every batch, relative to the other sources; None if the user gave no shares."""


def read_sources(text: str, *, setting: str) -> list[Source]:
    """Read ``a/*.tar``, ``a/*.tar@0.5,b/*.tar@0.5`` or the name of a YAML file into shard sets.

    The YAML is a list of ``{shards: PATTERNS, share: NUMBER}``. Without shares there is one source.

    Raises:
        ConfigError: a share is missing or not a number above 0, or a shard belongs to two sources.
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
    """Samples that belong together, as runs of neighbours in the index.

    Example: samples 0, 1 and 5 of the index are two runs, start_R = [0, 5] and end_R = [2, 3]. The group's samples
    number 0, 1, 2 are then samples 0, 1, 5 of the index.
    """

    name: str
    start_R: NDArray[np.int64]
    """First sample of each run."""
    end_R: NDArray[np.int64]
    """How many of the group's samples lie in this run and the runs before it."""

    def __len__(self) -> int:
        return int(self.end_R[-1])

    def samples(self, number_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group's n-th samples, counted from 0, as numbers in the index."""
        run_N = np.searchsorted(self.end_R, number_N, side="right")
        before_N: NDArray[np.int64] = np.where(run_N > 0, self.end_R[run_N - 1], 0)
        return self.start_R[run_N] + number_N - before_N


def groups_of_sources(index: ShardIndex, sources: Sequence[Source]) -> list[Group]:
    """Return one group for each source; the index lists the shards of the sources in their order."""
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
    """How many slots of each batch every group gets: largest remainder, rounding carried over.

    Example: shares 1/2, 1/3, 1/6 of batches of 4 slots want 2, 1.33 and 0.67. The first batch gives 2, 1, 1, the second
    makes up for the rounding with 2, 2, 0, the third is 2, 1, 1 again. Together that is 6, 4, 2: exact, so the three
    batches are a period and everything repeats.
    """

    def __init__(self, shares: Sequence[Fraction], batch: int) -> None:
        """Compute one period: the batches until nothing is carried over.

        Raises:
            ConfigError: the period is longer than 100,000 batches.
        """
        total = sum(shares, Fraction(0))
        parts = [share / total for share in shares]
        unit = lcm(*(part.denominator for part in parts))
        weights = [int(part * unit) for part in parts]  # integers: shares are counted in units of 1/unit of a slot
        given, rows = [0] * len(parts), [[0] * len(parts)]
        for step in range(1, _MAX_PERIOD_BATCHES + 1):
            # What each group should have after this batch, less what it has, in 1/unit of a slot.
            quota = _largest_remainder(
                [w * batch * step - g * unit for w, g in zip(weights, given, strict=True)], unit, batch
            )
            given = [g + q for g, q in zip(given, quota, strict=True)]
            rows.append(given)
            if all(g * unit == w * batch * step for w, g in zip(weights, given, strict=True)):
                break
        else:
            raise ConfigError(f"the shares {', '.join(map(str, shares))} have too many digits: round them, as 0.35")
        self._given_PG = np.array(rows, dtype=np.int64)

    def before(self, batch_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots (N, G) that each group has had before each batch, counted over the whole run."""
        period_N, rest_N = np.divmod(batch_N, len(self._given_PG) - 1)
        given_NG: NDArray[np.int64] = period_N[:, None] * self._given_PG[-1] + self._given_PG[rest_N]
        return given_NG


def _largest_remainder(wanted: Sequence[int], unit: int, num_slots: int) -> list[int]:
    """Give slots to groups that want ``wanted / unit`` of them, together ``num_slots``; no group gets less than 0.

    Example: wanted 12, 8, 4 in sixths of a slot (2, 1.33, 0.67), 4 slots. Rounding down gives 2, 1, 0; the slot that is
    left goes to the largest remainder, the third group's 0.67.
    """
    quota = [max(0, want // unit) for want in wanted]
    remainder = [want - unit * have for want, have in zip(wanted, quota, strict=True)]
    while (missing := num_slots - sum(quota)) != 0:
        by_need = sorted(range(len(quota)), key=lambda g: (-remainder[g], g))
        # A group that is ahead may want less than 0. It gets 0, so too many slots are given: take one from the least
        # needy group that has any.
        chosen = by_need[0] if missing > 0 else next(g for g in reversed(by_need) if quota[g] > 0)
        step = 1 if missing > 0 else -1
        quota[chosen] += step
        remainder[chosen] -= step * unit
    return quota


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
            shares: one for each group, relative to each other.
            batch: global batch [samples], in which every group gets its quota.
            seed: run seed.
            num_meeting: M evenly spaced slots of a batch are mixed with each other (`stream.Slice.group`). The length
                of runs is then chosen so that several groups meet there.
            plan: further settings of each group's `Plan`.

        Raises:
            ConfigError: a batch has fewer slots than there are groups, or shares have too long a period.
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
        self._run = min(_MAX_RUN_SLOTS, max(1, smallest // 4))  # the smallest group appears in about four runs
        if num_meeting > 1:
            # Two groups with 4 slots each: 0 1 0 1 0 1 0 1. Of M = 2 slots that are mixed, i and i + 4, both belong to
            # one group; runs of 4, 0 0 0 0 1 1 1 1, let both groups meet. So every length is tried, and the one with
            # most groups wins; among equals the usual length, then the one that shares most divisors with 48.
            quota = np.diff(self._quotas.before(np.arange(2)), axis=0)[0].tolist()
            longest, most = self._run, max(self._run, min(_MAX_RUN_SLOTS, batch // num_meeting))
            fewest = {run: _fewest_meeting(_layout_of(quota, run)[0], num_meeting) for run in range(1, most + 1)}
            self._run = max(fewest, key=lambda run: (fewest[run], run == longest, gcd(run, _MAX_RUN_SLOTS), run))
        self._layouts: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(self, position: ArrayLike) -> Located:
        """Return the sample at each position >= 0 and its block."""
        group_N, number_N = self._slots(np.atleast_1d(np.asarray(position, dtype=np.int64)))
        found = np.empty((3, len(group_N)), dtype=np.int64)
        for number, (group, plan) in enumerate(zip(self._groups, self._plans, strict=True)):
            mine_N = group_N == number
            if mine_N.any():
                located = plan.locate(number_N[mine_N])
                found[:, mine_N] = [group.samples(x_N) for x_N in located]
                # A block of the group may reach over samples of others in the index: then only the sample is read.
                too_wide_N = found[2] - found[1] > _MAX_SPAN_FACTOR * plan.block_size
                found[1:, mine_N & too_wide_N] = found[0, mine_N & too_wide_N]
        return Located(*found)

    def group_at(self, position: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the group that each position belongs to."""
        return self._slots(np.atleast_1d(np.asarray(position, dtype=np.int64)))[0]

    def substitutes(self, position: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` samples to try in place of a bad one: of the same group, so that quotas hold."""
        number = int(self.group_at(position)[0])
        return self._groups[number].samples(self._plans[number].substitutes(position, count))

    def reads_blocks(self, num_ranks: int) -> bool:
        """Whether each of ``num_ranks`` ranks stays on its own lanes."""
        return self._run % num_ranks == 0 and self._plans[0].reads_blocks(num_ranks)

    def _slots(self, position_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the group of each position, and the position inside that group's plan, from 0.

        Example: quotas 2, 1, 1 and then 2, 2, 0. Slot 0 of batch 1 belongs to group 0, which had 2 slots before, so it
        is position 2 of that group's plan.
        """
        batch_N, slot_N = np.divmod(position_N, self._batch)
        batches, inverse = np.unique(batch_N, return_inverse=True)
        before_BG, after_BG = self._quotas.before(batches), self._quotas.before(batches + 1)
        group_N, number_N = np.empty_like(position_N), np.empty_like(position_N)
        quotas, kind = np.unique(after_BG - before_BG, axis=0, return_inverse=True)
        for which, quota in enumerate(quotas.tolist()):
            mine_N = kind.reshape(-1)[inverse] == which
            group_S, number_S = self._layout(tuple(quota))
            group_N[mine_N], number_N[mine_N] = group_S[slot_N[mine_N]], number_S[slot_N[mine_N]]
        return group_N, before_BG[inverse, group_N] + number_N

    def _layout(self, quota: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if quota not in self._layouts:
            self._layouts[quota] = _layout_of(quota, self._run)
        return self._layouts[quota]


def _layout_of(quota: Sequence[int], run: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay out a batch: runs of every group, spread evenly. Returns the group of each slot and its number in the group.

    Example: quota 4, 2 in runs of 2. Group 0 has runs at times 1/8 and 3/8 of the batch, group 1 has one at 1/4, so the
    slots belong to groups 0 0 1 1 0 0, with numbers 0 1 0 1 2 3.
    """
    group_S = np.repeat(np.arange(len(quota)), quota)
    number_S = np.concatenate([np.arange(count) for count in quota])
    # The k-th run of a group comes at time (k + 1/2) / quota. All slots of a run share a time, so they stay together.
    time_S = (number_S // run + 0.5) / np.maximum(1, np.array(quota))[group_S]
    order_S = np.lexsort((number_S, group_S, time_S))
    return group_S[order_S], number_S[order_S]


def _fewest_meeting(group_S: NDArray[np.int64], num_meeting: int) -> int:
    """Return the smallest number of distinct groups among M evenly spaced slots (i, i + S/M, i + 2S/M, ...)."""
    sorted_MS = np.sort(group_S.reshape(num_meeting, -1), axis=0)
    return 1 + int((np.diff(sorted_MS, axis=0) != 0).sum(axis=0).min())
