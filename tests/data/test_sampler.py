"""Weighted draws: the right frequencies, one sequence for every world size, a resume that costs nothing."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.data.order.sampler import DistributedWeightedSampler, WeightedOrder, class_weights, make_balanced_sampler
from trainer.errors import ConfigError, DataError


def global_sequence(weights: list[float], num_samples: int, ranks: int, **options: object) -> list[int]:
    parts = [
        list(DistributedWeightedSampler(weights, num_samples, num_replicas=ranks, rank=r, **options))
        for r in range(ranks)
    ]
    return [int(x) for x in np.stack(parts, axis=1).ravel()]


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [0, 5, 0, 1e-3, 2.5, 0], [1.0] * 50])
def test_draws_have_the_expected_frequencies(weights: list[float]) -> None:
    counts = np.bincount(WeightedOrder(weights, seed=11).draw(np.arange(200_000)), minlength=len(weights))
    expected = 200_000 * np.array(weights) / sum(weights)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    st.integers(0, 2**63 - 1),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.booleans(),
)
@settings(max_examples=60)
def test_every_world_size_draws_one_sequence(weights: list[float], seed: int, ranks: int, replacement: bool) -> None:
    num_samples = 24 if replacement else len(weights) - len(weights) % 12
    if num_samples:
        options = {"seed": seed, "replacement": replacement}
        whole = global_sequence(weights, num_samples, 1, **options)
        assert global_sequence(weights, num_samples, ranks, **options) == whole
        assert len(whole) == num_samples
        if not replacement:
            assert len(set(whole)) == num_samples


def test_a_resume_on_other_ranks_goes_on_at_once_and_exactly() -> None:
    weights, total = np.arange(1.0, 1001), 12_000_000
    whole = DistributedWeightedSampler(weights, total, num_replicas=1, rank=0, seed=5)
    whole.set_epoch(3)
    state = DistributedWeightedSampler(weights, total, num_replicas=4, rank=2, seed=5)
    state.set_epoch(3)
    saved = state.state_dict(num_consumed=11_999_988)
    whole.load_state_dict(saved)
    rest = list(whole)
    start = time.perf_counter()
    parts = []
    for rank in range(3):
        sampler = DistributedWeightedSampler(weights, total, num_replicas=3, rank=rank, seed=5)
        sampler.load_state_dict(saved)
        parts.append(list(sampler))
    assert time.perf_counter() - start < 1
    assert np.stack(parts, axis=1).ravel().tolist() == rest
    assert len(rest) == 12


def test_epochs_differ_and_can_be_repeated() -> None:
    sampler = DistributedWeightedSampler(np.ones(100), num_replicas=1, rank=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(sampler) == 100


def test_more_categories_than_torch_can_draw_from() -> None:
    weights = np.zeros(2**24 + 10)
    weights[[3, -1]] = 1.0  # torch.multinomial refuses more than 2**24 categories
    counts = np.bincount(WeightedOrder(weights, seed=0).draw(np.arange(1000)) == 3)
    assert counts.min() > 400


def test_heavy_samples_come_early_without_replacement() -> None:
    weights = np.where(np.arange(1000) < 100, 50.0, 1.0)
    order = list(DistributedWeightedSampler(weights, num_replicas=1, rank=0, replacement=False))
    assert sorted(order) == list(range(1000))
    assert np.mean([sample < 100 for sample in order[:100]]) > 0.6


def test_balanced_draws_give_every_class_its_part() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 10
    drawn = np.array(labels)[list(make_balanced_sampler(labels, num_samples=30_000, num_replicas=1, rank=0))]
    assert stats.chisquare(np.bincount(drawn)).pvalue > 1e-3


def test_states_of_other_runs_are_refused() -> None:
    state = DistributedWeightedSampler([1, 2, 3, 4], num_replicas=2, rank=0).state_dict(num_consumed=2)
    for other in (
        DistributedWeightedSampler([1, 2, 3, 5], num_replicas=2, rank=0),
        DistributedWeightedSampler([1, 2, 3, 4], num_replicas=2, rank=0, seed=1),
        DistributedWeightedSampler([1, 2, 3, 4], 8, num_replicas=2, rank=0),
    ):
        with pytest.raises(ConfigError):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("weights", "options", "kind"),
    [
        ([], {}, DataError),
        ([0, 0], {}, DataError),
        ([1, -1], {}, DataError),
        ([1, float("nan")], {}, DataError),
        ([1, 1, 1], {"num_samples": 3, "num_replicas": 2, "rank": 0}, ConfigError),
        ([1, 1], {"num_replicas": 2, "rank": 2}, ConfigError),
        ([1, 0, 1], {"num_samples": 3, "replacement": False}, ConfigError),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(weights: list[float], options: dict, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        DistributedWeightedSampler(weights, **options)


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([0, -1, 1], None, "sample 1 has no label"),
        ([0, 0, 2], None, "label 1"),
        ([0, 5], 2, "label 5"),
        ([], None, "no"),
    ],
)
def test_classes_that_cannot_be_balanced_are_named(labels: list[int], num_classes: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_weights(labels, num_classes=num_classes)


def test_the_edges_of_the_weights_belong_to_the_right_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = np.array([0.0, 0.5, 1 - 2.0**-53])
    monkeypatch.setattr("trainer.data.order.sampler.uniform_doubles", lambda *_: edges)
    assert WeightedOrder([0, 1, 1, 0], seed=0).draw(edges).tolist() == [1, 2, 2]
