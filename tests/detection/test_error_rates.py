"""Error rates against pyeer, scipy, scikit-learn and a brute force; laws; intervals; ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyeer.eer_stats import calculate_roc, get_eer_values
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from tests.helpers.workers import run_worker
from trainer.detection.error_rates import (
    Calibration,
    auc,
    bootstrap_weights,
    bscer_at_macer,
    clopper_pearson,
    d_eer,
    error_curve,
    expected_calibration_error,
    fit_platt,
    macer_at_bscer,
    rates_at,
    summarise,
)
from trainer.detection.torch_metrics import APCER, BPCER, BSCER, DEER, MACER, BSCERAtMACER, MACERAtBSCER
from trainer.errors import DataError

sets = st.tuples(
    st.lists(st.integers(0, 12), min_size=1, max_size=30), st.lists(st.integers(0, 12), min_size=1, max_size=30)
)
"""Scores of bona fides and of morphs, with many ties."""


def joined(both: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
    bona_fides, morphs = both
    return np.array(bona_fides + morphs, dtype=float) / 12, np.array([0] * len(bona_fides) + [1] * len(morphs))


def brute(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float]]:
    return [
        (
            t,
            sum(s < t for s in scores[labels == 1]) / (labels == 1).sum(),
            sum(s >= t for s in scores[labels == 0]) / (labels == 0).sum(),
        )
        for t in [*sorted(set(scores)), np.inf]
    ]


@settings(max_examples=200)
@given(sets)
def test_the_curve_and_its_points_are_the_brute_forces(both) -> None:
    scores, labels = joined(both)
    curve, expected = error_curve(scores, labels), brute(scores, labels)
    np.testing.assert_allclose(np.stack([curve.threshold_T, curve.macer_T, curve.bscer_T], 1), expected)
    for limit in (0.0, 0.01, 0.1, 0.2, 0.5, 1.0):
        point = bscer_at_macer(curve, limit)
        assert point.bscer == pytest.approx(min(b for _, m, b in expected if m <= limit + 1e-12))
        assert point.macer <= limit + 1e-12
        at = rates_at(scores, labels, point.threshold)
        assert (at.macer, at.bscer) == pytest.approx((point.macer, point.bscer))
        point = macer_at_bscer(curve, limit)
        assert point.macer == pytest.approx(min(m for _, m, b in expected if b <= limit + 1e-12))
        assert point.bscer <= limit + 1e-12


@settings(max_examples=200)
@given(sets)
def test_the_equal_error_rate_and_its_interval_are_pyeers(both) -> None:
    scores, labels = joined(both)
    _, fmr, fnmr = calculate_roc(scores[labels == 1], scores[labels == 0])  # a morph above t is its genuine match
    fmr, fnmr = np.append(fmr, 0.0), np.append(fnmr, 1.0)  # it leaves infinity out
    _, low, high, value = get_eer_values(fmr, fnmr)
    found = d_eer(error_curve(scores, labels))
    assert found.value == pytest.approx(value)
    # Two thresholds beside the crossing may have the same sum of errors; then rounding decides which pyeer takes.
    as_good = [sorted(pair) for pair in zip(fmr, fnmr, strict=True) if sum(pair) == pytest.approx(low + high)]
    assert [found.low, found.high] in [pytest.approx(pair) for pair in as_good]
    assert len(as_good) > 1 or [found.low, found.high] == pytest.approx(sorted((low, high)))
    assert found.low <= found.value <= found.high


@settings(max_examples=100)
@given(sets)
def test_the_area_is_scikit_learns(both) -> None:
    scores, labels = joined(both)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


@settings(max_examples=100)
@given(sets, st.data())
def test_a_weight_is_a_number_of_copies(both, data) -> None:
    scores, labels = joined(both)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores))))
    assume(weights[labels == 0].sum() > 0)
    assume(weights[labels == 1].sum() > 0)
    weighted = error_curve(scores, labels, weights)
    copied = error_curve(np.repeat(scores, weights), np.repeat(labels, weights))
    assert d_eer(weighted).value == pytest.approx(d_eer(copied).value)
    for limit in (0.05, 0.2):
        assert bscer_at_macer(weighted, limit).bscer == pytest.approx(bscer_at_macer(copied, limit).bscer)


@settings(max_examples=100)
@given(sets)
def test_only_the_order_of_scores_counts(both) -> None:
    scores, labels = joined(both)
    first, second = error_curve(scores, labels), error_curve(np.exp(3 * scores) - 7, labels)
    np.testing.assert_array_equal(first.macer_T, second.macer_T)
    np.testing.assert_array_equal(first.bscer_T, second.bscer_T)


def test_equal_scores_are_a_result_and_perfect_ones_too() -> None:
    equal = error_curve([0.5] * 4, [0, 1, 0, 1])
    assert (d_eer(equal).value, bscer_at_macer(equal, 0.2).bscer, macer_at_bscer(equal, 0.1).macer) == (0.5, 1.0, 1.0)
    perfect = error_curve([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    assert (d_eer(perfect).value, d_eer(perfect).threshold, bscer_at_macer(perfect, 0.01).bscer) == (0.0, 0.8, 0.0)
    summary = summarise([0.5] * 4, [0, 1, 0, 1], ["", "a", "", "a"], num_replicates=10)
    assert json.loads(json.dumps(summary, allow_nan=False))["pooled"]["d_eer"]["value"] == 0.5


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "empty"),
        ([0.1, np.nan], [0, 1], "score 1 is nan"),
        ([0.1, np.inf], [0, 1], "score 1 is inf"),
        ([0.1, 0.2], [0, 2], "label 1 is 2"),
        ([0.1, 0.2], [0, 0], "is a morph"),
        ([0.1, 0.2], [1, 1], "is a bona fide"),
        ([0.1], [0, 1], "labels"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        error_curve(scores, labels)


def test_the_calibration_error_is_that_of_a_loop_over_bins() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.random(500), generator.integers(0, 2, 500)
    expected = 0.0
    for low in np.arange(15) / 15:
        mine = (scores >= low) & (scores < low + 1 / 15)
        expected += abs(scores[mine].mean() - labels[mine].mean()) * mine.mean() if mine.any() else 0
    assert expected_calibration_error(scores, labels) == pytest.approx(expected)
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("errors", "trials"), [(0, 204), (10, 204), (204, 204), (1, 3)])
def test_clopper_pearson_is_scipys(errors: int, trials: int) -> None:
    expected = binomtest(errors, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(errors, trials) == pytest.approx((expected.low, expected.high))


def test_a_bootstrap_weight_is_the_product_of_how_often_its_people_were_drawn() -> None:
    people = [("a",), ("b",), ("a", "b"), ("c",), (), ("a", "a")]
    weights_RN = bootstrap_weights(people, num_replicates=2000, seed=1)
    np.testing.assert_array_equal(weights_RN[:, 2], weights_RN[:, 0] * weights_RN[:, 1])
    np.testing.assert_array_equal(weights_RN[:, 5], weights_RN[:, 0])
    drawn_R = weights_RN[:, [0, 1, 3, 4]].sum(1)
    assert (drawn_R == 4).all(), "as many people are drawn as there are"
    np.testing.assert_allclose(weights_RN[:, [0, 1, 3, 4]].mean(0), 1, atol=0.1)
    np.testing.assert_array_equal(weights_RN, bootstrap_weights(people, num_replicates=2000, seed=1))


def test_intervals_of_alike_images_are_wider_than_images_alone_would_say() -> None:
    generator = np.random.default_rng(0)
    skill_P = generator.normal(0, 1, 40)
    scores = np.concatenate([np.repeat(skill_P, 10), np.repeat(generator.normal(1.0, 1, 40), 10)])
    scores += generator.normal(0, 0.1, 800)
    labels, people = np.repeat([0, 1], 400), [(f"p{i // 10}",) for i in range(800)]
    tools = ["" if label == 0 else "x" for label in labels]

    def width(who) -> float:
        low, high = summarise(scores, labels, tools, who, num_replicates=300)["pooled"]["d_eer"]["ci"]
        return high - low

    assert width(people) > 2 * width(None)


def test_a_summary_names_tools_and_the_worst_of_them() -> None:
    scores = [0.1, 0.2, 0.6, 0.4, 0.9, 0.95, 0.3, 0.15]
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    tools = ["", "", "", "", "easy", "easy", "hard", "hard"]
    summary = summarise(scores, labels, tools, threshold=0.5, num_replicates=50)
    assert summary["tools"].keys() == {"easy", "hard"}
    assert summary["worst"]["d_eer_tool"] == summary["worst"]["macer_tool"] == "hard"
    assert summary["worst"]["macer"] == 1.0
    assert summary["tools"]["easy"]["at_threshold"]["macer"] == 0.0
    assert summary["pooled"]["at_threshold"]["macer"] == 0.5
    assert summary["pooled"]["at_threshold"]["bscer"] == 0.25
    assert summary["pooled"]["at_threshold"]["bscer_ci"] == pytest.approx(clopper_pearson(1, 4))
    assert summary["pooled"]["num_morphs"] == 4
    assert summary["tools"]["hard"]["num_morphs"] == 2
    assert (
        summary["pooled"]["d_eer"]["ci"][0]
        <= summary["pooled"]["d_eer"]["value"]
        <= summary["pooled"]["d_eer"]["ci"][1]
    )


def test_the_bootstrap_equals_literal_copies() -> None:
    generator = np.random.default_rng(3)
    scores, labels = generator.random(30).round(1), np.repeat([0, 1], 15)
    people = [(f"p{i % 5}",) if label == 0 else (f"p{i % 5}", f"p{(i + 1) % 5}") for i, label in enumerate(labels)]
    weights_RN = bootstrap_weights(people, num_replicates=60, seed=4)
    values = [
        d_eer(error_curve(np.repeat(scores, weights), np.repeat(labels, weights))).value
        for weights in weights_RN.astype(int)
        if weights[:15].sum() and weights[15:].sum()
    ]
    row = summarise(scores, labels, ["x"] * 30, people, num_replicates=60, seed=4)["pooled"]
    assert row["num_replicates"] == len(values)
    assert row["d_eer"]["ci"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())


# ---------------------------------------------------------------------------------------------- calibration


def test_platt_finds_the_curve_that_the_data_came_from() -> None:
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 2, 20_000)
    labels = (generator.random(20_000) < Calibration(0.7, -0.4).apply(logits)).astype(int)
    found = fit_platt(logits, labels)
    assert (found.slope, found.offset) == pytest.approx((0.7, -0.4), abs=0.05)
    assert expected_calibration_error(found.apply(logits), labels) < 0.02


@pytest.mark.parametrize("logits", [[-3.0, -2.0, 2.0, 3.0], [3.0, 2.0, -2.0, -3.0], [1.0, 1.0, 1.0, 1.0]])
def test_platt_stays_finite_and_never_turns_the_order_around(logits) -> None:
    found = fit_platt(logits, [0, 0, 1, 1])
    assert np.isfinite([found.slope, found.offset]).all()
    assert found.slope > 0
    scores = found.apply(np.array([-1.0, 0.0, 1.0]))
    assert (np.diff(scores) >= 0).all()


# ---------------------------------------------------------------------------------------------- over ranks


def test_a_metric_counts_a_sample_once_and_equals_the_plain_functions() -> None:
    generator = np.random.default_rng(6)
    scores, labels = generator.random(40), np.arange(40) % 2
    padded = np.append(np.arange(40), [0, 1, 2])
    expected = error_curve(scores, labels)
    for metric, value in (
        (DEER(), d_eer(expected).value),
        (BSCERAtMACER(0.1), bscer_at_macer(expected, 0.1).bscer),
        (MACERAtBSCER(0.1), macer_at_bscer(expected, 0.1).macer),
        (MACER(0.4), rates_at(scores, labels, 0.4).macer),
        (BSCER(0.4), rates_at(scores, labels, 0.4).bscer),
    ):
        for part in np.array_split(padded, 4):
            metric.update(torch.tensor(scores[part]), torch.tensor(labels[part]), torch.tensor(part))
        assert metric.compute().item() == pytest.approx(value)
    assert (APCER, BPCER) == (MACER, BSCER)


def test_a_sample_with_two_labels_is_refused() -> None:
    metric = DEER()
    metric.update(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    with pytest.raises(DataError, match="sample 0 came with two labels"):
        metric.compute()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_with_uneven_shares_measure_what_one_does(tmp_path: Path) -> None:
    ranks = run_worker("metrics_worker.py", [str(tmp_path)], tmp_path, ranks=2)
    generator = np.random.default_rng(7)
    scores, labels = generator.random(25), np.arange(25) % 2
    expected = d_eer(error_curve(scores, labels)).value
    assert ranks[0][:2] == ranks[1][:2] == pytest.approx([expected, expected])
    logits = np.where(np.arange(25) == 6, np.nan, scores)  # sample 3 came twice: the first rank's score counts
    codes = ["corrupt" if i == 6 else "Success" for i in range(25)]
    assert ranks[0][2] == ranks[1][2] == [list(range(25)), [x.hex() for x in logits.tolist()], codes]


def test_nothing_here_waits_for_long() -> None:
    generator = np.random.default_rng(8)
    scores, labels = generator.random(2000), np.arange(2000) % 2
    people = [(f"p{i % 100}",) for i in range(2000)]
    tools = [name for _, name in zip(range(2000), itertools.cycle("abc"), strict=False)]
    assert summarise(scores, labels, tools, people, num_replicates=200)["pooled"]["num_replicates"] == 200
