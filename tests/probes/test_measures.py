"""Probes against brute force and the detector's error rates; who is judged by whom; extremes with known answers."""

import numpy as np
import pytest

from trainer.detection.error_rates import d_eer, error_curve, macer_at_bscer
from trainer.errors import DataError
from trainer.probes.measures import (
    UNTESTED,
    feature_std,
    folds_of_people,
    folds_of_samples,
    knn,
    leave_one_out_knn,
    linear_probe,
    mean_accuracy,
    measure,
    rank_me,
    verification,
)


def clusters(num_classes: int = 6, each: int = 9, width: int = 12, noise: float = 0.6, seed: int = 0):
    draw = np.random.default_rng(seed)
    label_N = np.repeat(np.arange(num_classes), each)
    centre_CD = draw.normal(size=(num_classes, width))
    return centre_CD[label_N] + noise * draw.normal(size=(len(label_N), width)), label_N


def votes_by_hand(feature_ND, label_N, judges_N, sample: int, k: int) -> int:
    unit_ND = feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True)
    cosine = unit_ND[judges_N] @ unit_ND[sample]
    nearest = np.argsort(-cosine)[:k]
    votes = np.zeros(label_N.max() + 1)
    np.add.at(votes, label_N[judges_N[nearest]], np.exp(cosine[nearest] / 0.07))
    return int(votes.argmax())


@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_the_vote_of_the_nearest_others(k: int) -> None:
    feature_ND, label_N = clusters(noise=1.5)
    everyone = np.arange(len(label_N))
    expected = [votes_by_hand(feature_ND, label_N, np.delete(everyone, i), i, k) for i in everyone]
    assert leave_one_out_knn(feature_ND, label_N, k=k).tolist() == expected
    folds = folds_of_samples(label_N)
    found = knn(feature_ND, label_N, folds, k=k)
    for fit_F, test_F in folds:
        assert found[test_F].tolist() == [votes_by_hand(feature_ND, label_N, fit_F, i, k) for i in test_F]


def test_a_sample_never_judges_itself() -> None:
    """Labels that only a sample itself knows cannot be predicted: two of each class, far from each other."""
    feature_ND = np.concatenate([np.eye(10), -np.eye(10)])
    label_N = np.tile(np.arange(10), 2)
    assert mean_accuracy(label_N, leave_one_out_knn(feature_ND, label_N)) == 0
    assert mean_accuracy(label_N, linear_probe(feature_ND, label_N, folds_of_samples(label_N))) == 0


def test_every_sample_is_tested_once_and_some_of_its_class_are_fitted() -> None:
    label_N = np.array([0] * 13 + [1] * 2 + [2] * 4)
    folds = folds_of_samples(label_N)
    assert sorted(np.concatenate([test_F for _, test_F in folds]).tolist()) == list(range(19))
    for fit_F, test_F in folds:
        assert not set(fit_F) & set(test_F)
        assert set(label_N[fit_F]) == {0, 1, 2}


def test_folds_never_share_a_person() -> None:
    draw = np.random.default_rng(3)
    people = [tuple(f"p{i}" for i in draw.choice(30, draw.integers(0, 3), replace=False)) for _ in range(200)]
    label_N = draw.integers(0, 2, 200)
    folds = folds_of_people(people, label_N)
    assert len(folds) == 5
    for fit_F, test_F in folds:
        fitted, tested = ({p for i in part for p in people[i]} for part in (fit_F, test_F))
        assert fitted
        assert tested
        assert not fitted & tested
    tested = np.concatenate([test_F for _, test_F in folds])
    assert len(set(tested.tolist())) == len(tested)
    assert {i for i, persons in enumerate(people) if len(persons) <= 1} <= set(tested.tolist())


def test_the_example_of_the_folds() -> None:
    people = [("a",), ("b",), ("c",), ("a", "c"), ("d",)]
    (fit_F, test_F), _ = folds_of_people(people, np.array([0, 0, 1, 1, 1]), num_folds=2)
    # Dealt in turn within classes: a, c | b, d.
    assert (fit_F.tolist(), test_F.tolist()) == ([1, 4], [0, 2, 3])


def test_a_probe_of_another_label_cannot_pass_by_recognising_people() -> None:
    """Each person has a label by chance and a place of their own: only images of the same person could tell it."""
    draw = np.random.default_rng(0)
    person_N = np.tile(np.arange(60), 6)
    label_N = draw.integers(0, 2, 60)[person_N]
    feature_ND = draw.normal(size=(60, 100))[person_N] + 0.1 * draw.normal(size=(360, 100))
    apart = measure(feature_ND, label_N, [(str(person),) for person in person_N])
    together = measure(feature_ND, label_N, None)
    assert together["knn_accuracy"] > 0.95
    assert together["linear_accuracy"] > 0.95
    assert abs(apart["knn_accuracy"] - 0.5) < 0.15
    assert abs(apart["linear_accuracy"] - 0.5) < 0.15


def test_the_linear_probe_finds_a_direction_that_neighbours_miss_at_any_scale() -> None:
    draw = np.random.default_rng(0)
    feature_ND = draw.normal(size=(400, 50)) * 10
    label_N = (feature_ND[:, 0] > 0).astype(int)
    feature_ND[:, 0] *= 1e-4
    folds = folds_of_samples(label_N)
    found = linear_probe(feature_ND, label_N, folds)
    assert mean_accuracy(label_N, found) > 0.8
    assert mean_accuracy(label_N, leave_one_out_knn(feature_ND, label_N)) < 0.65
    assert np.array_equal(linear_probe(feature_ND * draw.uniform(1e-3, 1e3, 50) + 7, label_N, folds), found)


def test_classes_weigh_the_same_and_untested_samples_do_not_count() -> None:
    assert mean_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])) == 0.5
    assert mean_accuracy(np.array([0, 0, 1, 1]), np.array([0, UNTESTED, 1, UNTESTED])) == 1
    assert np.isnan(mean_accuracy(np.array([0, 1]), np.array([UNTESTED, UNTESTED])))


def test_the_effective_rank_of_known_spectra() -> None:
    assert rank_me(np.ones((50, 8))) == pytest.approx(1, abs=1e-6)
    assert rank_me(np.zeros((5, 8))) == 1
    assert rank_me(np.eye(8)) == pytest.approx(8)
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    share = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(share * np.log(share)).sum())
    assert rank_me(orthogonal[:, :3] * share * 7 @ orthogonal[:3]) == pytest.approx(expected, rel=1e-6)


def test_the_spread_is_0_of_collapsed_and_1_of_isotropic_features() -> None:
    draw = np.random.default_rng(0)
    assert feature_std(np.outer(draw.uniform(1, 9, 500), np.arange(1.0, 65))) == pytest.approx(0, abs=1e-6)
    assert feature_std(draw.normal(size=(4000, 64))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("decimals", [1, 12])
@pytest.mark.parametrize("seed", range(4))
def test_verification_equals_the_detectors_error_rates_over_all_pairs(seed: int, decimals: int) -> None:
    """Also with many equal scores, which come from features on a coarse grid."""
    feature_ND, label_N = clusters(8, 10, 6, noise=1.0, seed=seed)
    feature_ND = feature_ND.round(decimals) if decimals > 1 else np.sign(feature_ND)
    unit_ND = feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True)
    first, second = np.triu_indices(len(label_N), 1)
    cosine, same = (unit_ND @ unit_ND.T)[first, second], label_N[first] == label_N[second]
    curve = error_curve(cosine, same.astype(int))
    found = verification(feature_ND, label_N)
    assert found["eer"] == pytest.approx(d_eer(curve).value, abs=1e-12)
    for limit in (0.01, 0.001):
        assert found[f"tar_at_far_{limit:g}"] == pytest.approx(1 - macer_at_bscer(curve, limit).macer, abs=1e-12)


def test_a_rate_that_the_pairs_cannot_show_is_no_number() -> None:
    feature_ND, label_N = clusters(2, 10)
    found = verification(feature_ND, label_N)  # 100 pairs of two people
    assert found["tar_at_far_0.01"] >= 0
    assert np.isnan(found["tar_at_far_0.001"])


def test_figures_do_not_depend_on_the_scale_or_type_of_the_features() -> None:
    feature_ND, label_N = clusters()
    found = measure(feature_ND, label_N, None, verify=True)
    assert measure(8 * feature_ND, label_N, None, verify=True) == pytest.approx(found, rel=1e-9)
    assert measure(feature_ND.astype(np.float32), label_N, None, verify=True) == pytest.approx(found, rel=1e-5)
    assert found["knn_accuracy"] > 0.8 > found["chance"]


def test_bad_input_is_refused() -> None:
    feature_ND, label_N = clusters()
    with pytest.raises(DataError, match="all 54 labels are the same"):
        measure(feature_ND, np.zeros(54), None)
    with pytest.raises(DataError, match="pass one row for each label"):
        measure(feature_ND, label_N[:-1], None)
    feature_ND[7, 3] = np.inf
    with pytest.raises(DataError, match="features of sample 7 are not finite"):
        measure(feature_ND, label_N, None)
