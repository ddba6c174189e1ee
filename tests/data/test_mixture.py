"""Mixtures: exact quotas in every batch, exact shares in the long run, each group through its own plan."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.shards import members_of, write_tar
from trainer.data.order.mixture import Group, Mixture, Quotas, groups_by_value, groups_of_sources, read_sources
from trainer.data.order.plan import positions_of
from trainer.data.shards.index import open_index
from trainer.errors import ConfigError, DataError

shares = st.lists(st.integers(1, 40).map(lambda n: Fraction(n, 20)), min_size=1, max_size=6)


def group(first: int, size: int) -> Group:
    return Group(f"from {first}", np.array([first]), np.array([size]))


@given(shares, st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=60)
def test_every_batch_is_full_and_no_share_is_lost(parts: list[Fraction], batch: int, first: int) -> None:
    steps = np.arange(first, first + 50)
    quotas = Quotas(parts, batch)
    before = quotas.before(steps)
    quota_NG = quotas.before(steps + 1) - before
    assert (quota_NG.sum(axis=1) == batch).all()
    assert (quota_NG >= 0).all()
    exact = [[part / sum(parts) * batch * int(step) for part in parts] for step in steps]
    assert all(
        abs(e - int(b)) < 2 for row, have in zip(exact, before, strict=True) for e, b in zip(row, have, strict=True)
    )
    if all((part / sum(parts) * batch).denominator == 1 for part in parts):
        assert (quota_NG == [int(part / sum(parts) * batch) for part in parts]).all()


def test_remainders_are_carried_over() -> None:
    quotas = Quotas([Fraction(1), Fraction(1), Fraction(1)], 10)
    quota_NG = np.diff(quotas.before(np.arange(7)), axis=0)
    assert quota_NG.tolist() == [[4, 3, 3], [3, 4, 3], [3, 3, 4]] * 2


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 20)), min_size=1, max_size=5),
    st.integers(5, 100),
    st.integers(0, 2**62),
    st.integers(0, 500),
)
@settings(max_examples=30)
def test_a_mixture_keeps_quotas_and_each_groups_own_epochs(
    sizes: list[tuple[int, int]], batch: int, seed: int, first_step: int
) -> None:
    assume(batch >= len(sizes))
    starts = np.cumsum([0] + [size for size, _ in sizes])
    groups = [group(int(start), size) for start, (size, _) in zip(starts, sizes, strict=False)]
    parts = [Fraction(weight) for _, weight in sizes]
    mixture = Mixture(groups, parts, batch=batch, seed=seed, num_lanes=4, block_samples=8)
    positions = np.arange(batch * 30)
    samples, chosen = mixture.locate(positions).sample_N, mixture.group_at(positions)
    quota_NG = np.diff(Quotas(parts, batch).before(np.arange(31)), axis=0)
    for number, (start, (size, _)) in enumerate(zip(starts, sizes, strict=False)):
        assert ((samples[chosen == number] >= start) & (samples[chosen == number] < start + size)).all()
        assert (np.bincount(positions[chosen == number] // batch, minlength=30) == quota_NG[:, number]).all()
        visits = np.bincount(samples[chosen == number] - start, minlength=size)
        assert visits.max() - visits.min() <= 1  # every sample of the group once before any twice
    alone = [mixture.locate([p + first_step * batch]).sample_N[0] for p in range(batch)]
    assert alone == mixture.locate(np.arange(batch) + first_step * batch).sample_N.tolist()
    for position in range(0, batch, 3):
        number = int(mixture.group_at(position)[0])
        stand_in = mixture.substitutes(position, 5)
        assert ((stand_in >= starts[number]) & (stand_in < starts[number] + sizes[number][0])).all()


def test_each_rank_sees_all_groups_and_keeps_to_its_lanes() -> None:
    mixture = Mixture(
        [group(0, 100_000), group(100_000, 100_000)], [Fraction(1), Fraction(1)], batch=256, seed=1, num_lanes=16,
        block_samples=128, window_blocks=8,
    )  # fmt: skip
    assert mixture.reads_blocks(8)
    positions = np.concatenate([positions_of(s, rank=3, num_ranks=8, global_batch=256) for s in range(200)])
    located = mixture.locate(positions)
    assert len(positions) / len(np.unique(located.first_N)) > 30  # few blocks, each read for many samples
    per_step = mixture.group_at(positions).reshape(200, 32).sum(axis=1)
    assert (per_step == 16).all()


def test_groups_by_value_hold_the_samples_of_the_value() -> None:
    codes = np.random.default_rng(0).integers(0, 3, 500)
    codes[100:200] = 1
    for number, found in enumerate(groups_by_value(codes, ["a", "b", "c"])):
        assert found.samples(np.arange(len(found))).tolist() == np.flatnonzero(codes == number).tolist()
    with pytest.raises(DataError, match="sample 7 has no value"):
        groups_by_value(np.array([0] * 7 + [-1]), ["a"])


def test_sources_are_read_from_flags_and_yaml(tmp_path: Path) -> None:
    for name, numbers in (("a", range(10)), ("b", range(10, 16))):
        write_tar(tmp_path / name / "s.tar", members_of(numbers))
    text = f"{tmp_path}/a/*.tar@0.7,{tmp_path}/b@0.3"
    (tmp_path / "mix.yaml").write_text(
        f"- {{shards: '{tmp_path}/a/*.tar', share: 0.7}}\n- {{shards: '{tmp_path}/b', share: 0.3}}\n"
    )
    sources = read_sources(text, setting="--data")
    assert sources == read_sources(str(tmp_path / "mix.yaml"), setting="--data")
    assert [source.share for source in sources] == [Fraction(7, 10), Fraction(3, 10)]
    index = open_index([shard for source in sources for shard in source.shards], index_dir=tmp_path)
    groups = groups_of_sources(index, sources)
    keys = [ref.key for ref in index.samples(groups[1].samples(np.arange(6)))]
    assert keys == [f"face{i:04d}" for i in range(10, 16)]
    assert len(read_sources(f"{tmp_path}/a/*.tar,{tmp_path}/b", setting="--data")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{0}/a@0.5,{0}/b", "no share"),
        ("{0}/a@half,{0}/b@0.5", "must be a number above 0"),
        ("{0}/a@0,{0}/b@1", "must be a number above 0"),
        ("{0}/a@1,{0}/a/*.tar@1", "belongs to"),
        ("{0}/none.yaml", "cannot be read"),
        ("{0}/bad.yaml", "entry 1"),
        ("{0}/code.yaml", "cannot be read"),
    ],
)
def test_sources_that_make_no_mixture_are_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "s.tar", members_of(range(3)))
    (tmp_path / "bad.yaml").write_text("- {shard: x}\n")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['touch sprung']\n")
    with pytest.raises(ConfigError, match=message):
        read_sources(text.format(tmp_path), setting="--data")


def test_shares_that_never_repeat_are_refused() -> None:
    with pytest.raises(ConfigError, match="too many digits"):
        Quotas([Fraction("0.123456789"), Fraction("0.3")], 7)
    with pytest.raises(ConfigError, match="global_batch is 1"):
        Mixture([group(0, 5), group(5, 5)], [Fraction(1), Fraction(1)], batch=1, seed=0)


@pytest.mark.parametrize("batch", [8, 16, 24, 32, 256, 384, 512, 768, 1536, 3072, 4096])
@pytest.mark.parametrize("meeting", [4, 8])
def test_evenly_spaced_slots_that_are_mixed_hold_both_classes(batch: int, meeting: int) -> None:
    mixture = Mixture(
        [group(0, 5000), group(5000, 900)], [Fraction(1)] * 2, batch=batch, seed=1, num_meeting=meeting, num_lanes=4
    )
    for step in (0, 3):
        seats = mixture.group_at(np.arange(step * batch, (step + 1) * batch)).reshape(meeting, -1)
        assert (seats.min(axis=0) == 0).all()
        assert (seats.max(axis=0) == 1).all()
