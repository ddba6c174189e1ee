"""How good features are without fine-tuning: kNN, linear probe, effective rank, spread, verification of people.

All figures are computed on the CPU in float64 from one array of features, and nothing is drawn at random, so equal
features give equal figures on any number of ranks. scikit-learn does the fitting.

A sample is never judged by itself. If the label is the person, each sample is judged by all others (kNN: leave one
out; linear probe: folds that hold out some images of each person). If the label is something else and the people are
known, no person is both among the judged samples and among those that judge them: otherwise a probe of "source" or
"label" would pass by recognising faces.

Shapes: N samples, D features, P people of all samples, Q pairs of samples, T thresholds.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import recall_score, roc_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from trainer.errors import DataError

NEIGHBOURS = 20
FAR_LIMITS = (1e-2, 1e-3)
"""False accept rates at which verification is reported."""
UNTESTED = -1
"""In the place of a prediction for a sample that no fold tests."""

_TEMPERATURE = 0.07
_NUM_FOLDS = 5
_ALPHAS = (1e0, 1e1, 1e2, 1e3, 1e4)
_LOGISTIC_C = 0.1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Folds = list[tuple[Ints, Ints]]
"""For each fold the samples that fit a probe, and the samples that it is tested on."""
People = Sequence[tuple[str, ...]]
"""The people in each image: a morph shows two; an empty tuple means unknown, and then nobody shares the image."""


def measure(features: ArrayLike, labels: ArrayLike, people: People | None, *, verify: bool = False) -> dict[str, float]:
    """Compute all figures of a set of features.

    Args:
        features: (N, D), any float type.
        labels: (N,), a class number of each sample; every class has at least two samples.
        people: of each sample, which are kept apart; None if the label is the person, or if nobody knows.
        verify: whether the labels are people, so that pairs of images can be verified.

    Returns:
        figures: ``knn_accuracy`` and ``linear_accuracy``, means over the classes, to compare with ``chance``;
        ``rank_me``, ``feature_std``; with ``verify`` those of `verification`.

    Raises:
        DataError: a feature is not finite, or the labels are of one class or other samples.
    """
    feature_ND, label_N = _checked(features, labels)
    folds = folds_of_samples(label_N) if people is None else folds_of_people(people, label_N)
    neighbours_N = leave_one_out_knn(feature_ND, label_N) if people is None else knn(feature_ND, label_N, folds)
    figures = {
        "knn_accuracy": mean_accuracy(label_N, neighbours_N),
        "linear_accuracy": mean_accuracy(label_N, linear_probe(feature_ND, label_N, folds)),
        "chance": 1 / len(np.unique(label_N)),
        "rank_me": rank_me(feature_ND),
        "feature_std": feature_std(feature_ND),
    }
    return figures | (verification(feature_ND, label_N) if verify else {})


def leave_one_out_knn(features: ArrayLike, labels: ArrayLike, *, k: int = NEIGHBOURS) -> Ints:
    """Predict the class of each sample from the k samples nearest to it by cosine, itself left out; see `knn`."""
    feature_ND, label_N = _checked(features, labels)
    nearest = _neighbours(min(k, len(label_N) - 1)).fit(feature_ND, label_N)
    return np.asarray(nearest.predict(None))  # None: the fitted samples, none of which is its own neighbour


def knn(features: ArrayLike, labels: ArrayLike, folds: Folds, *, k: int = NEIGHBOURS) -> Ints:
    """Predict the class of each tested sample by the vote of the k nearest fitted ones.

    A neighbour of cosine c votes with weight exp(c / 0.07), so that near ones count more.

    Returns:
        predicted_N: a class; `UNTESTED` where no fold tests the sample.

    Source: Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    feature_ND, label_N = _checked(features, labels)
    predicted_N = np.full(len(label_N), UNTESTED, dtype=np.int64)
    for fit_F, test_F in folds:
        nearest = _neighbours(min(k, len(fit_F))).fit(feature_ND[fit_F], label_N[fit_F])
        predicted_N[test_F] = nearest.predict(feature_ND[test_F])
    return predicted_N


def linear_probe(features: ArrayLike, labels: ArrayLike, folds: Folds) -> Ints:
    """Predict the class of each tested sample by ridge regression on standardised features, in closed form.

    The strength of the ridge is chosen among powers of ten by leaving out one fitted sample at a time. Classes weigh
    the same.

    Returns:
        predicted_N: a class; `UNTESTED` where no fold tests the sample.
    """
    return _predicted(features, labels, folds, lambda: RidgeClassifierCV(_ALPHAS, class_weight="balanced"))


def logistic_probe(features: ArrayLike, labels: ArrayLike, folds: Folds) -> Ints:
    """Predict the class of each tested sample by logistic regression on standardised features.

    The penalty is fixed: C = 0.1 of scikit-learn. Classes weigh the same.

    Returns:
        predicted_N: a class; `UNTESTED` where no fold tests the sample.
    """
    options = {"C": _LOGISTIC_C, "class_weight": "balanced", "max_iter": 2000}
    return _predicted(features, labels, folds, lambda: LogisticRegression(**options))


def _predicted(features: ArrayLike, labels: ArrayLike, folds: Folds, classifier: Callable[[], Any]) -> Ints:
    feature_ND, label_N = _checked(features, labels)
    predicted_N = np.full(len(label_N), UNTESTED, dtype=np.int64)
    for fit_F, test_F in folds:
        if len(classes := np.unique(label_N[fit_F])) == 1:
            predicted_N[test_F] = classes[0]
            continue
        probe = make_pipeline(StandardScaler(), classifier())
        predicted_N[test_F] = probe.fit(feature_ND[fit_F], label_N[fit_F]).predict(feature_ND[test_F])
    return predicted_N


def mean_accuracy(label_N: Ints, predicted_N: Ints) -> float:
    """Return the mean over the tested classes of the share of their tested samples that are right; NaN if none is."""
    tested_N = predicted_N != UNTESTED
    if not tested_N.any():
        return float("nan")
    label_N, predicted_N = label_N[tested_N], predicted_N[tested_N]
    return float(recall_score(label_N, predicted_N, labels=np.unique(label_N), average="macro", zero_division=0))


def folds_of_samples(label_N: Ints, *, num_folds: int = _NUM_FOLDS) -> Folds:
    """Give each fold a run of neighbouring samples of each class; a class with two samples or more is fitted in each.

    Neighbouring samples are often pictures of one scene, which are not told apart here.
    """
    folds = StratifiedKFold(min(num_folds, int(np.unique(label_N, return_counts=True)[1].max())))
    with warnings.catch_warnings():
        # A class with fewer samples than folds is tested in fewer folds, which is right here.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return [(fit_F, test_F) for fit_F, test_F in folds.split(label_N, label_N)]


def folds_of_people(people: People, label_N: Ints, *, num_folds: int = _NUM_FOLDS) -> Folds:
    """Deal people to folds, so that nobody is among both the fitted and the tested samples of a fold.

    A fold tests the samples all of whose people are its own, and fits those that show none of its people. A morph of
    people from two folds is never tested. People are dealt in turn within the class of their first sample.

    Example: with two folds, a b | c d e, and images a, b, c, a+c, d, the first fold tests a and b and fits c and d.
    """
    named = [persons or (f"\0{i}",) for i, persons in enumerate(people)]
    first_class: dict[str, int] = {}
    for persons, label in zip(named, label_N.tolist(), strict=True):
        for person in persons:
            first_class.setdefault(person, label)
    dealt = sorted(first_class, key=lambda person: first_class[person])  # stable: then by first appearance
    num_folds = min(num_folds, len(dealt))
    fold_of = {person: i % num_folds for i, person in enumerate(dealt)}
    folds_N = [{fold_of[person] for person in persons} for persons in named]
    folds = []
    for fold in range(num_folds):
        fit_F = np.array([i for i, found in enumerate(folds_N) if fold not in found], dtype=np.int64)
        test_F = np.array([i for i, found in enumerate(folds_N) if found == {fold}], dtype=np.int64)
        if len(fit_F) and len(test_F):
            folds.append((fit_F, test_F))
    return folds


def rank_me(features: ArrayLike) -> float:
    """Return the effective rank: exp of the entropy of the singular values, between 1 and min(N, D).

    Features that use few directions have a low rank, whatever they tell apart; 1 is complete collapse.

    Source: Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2.
    """
    singular_D = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    share_D = singular_D / max(singular_D.sum(), np.finfo(np.float64).tiny)
    share_D = share_D[share_D > 0]
    return float(np.exp(-np.sum(share_D * np.log(share_D))))


def feature_std(features: ArrayLike) -> float:
    """Return the mean deviation of a feature over the samples, of rows of length sqrt(D): 0 collapsed, 1 isotropic.

    Source: Chen and He 2021, arXiv 2011.10566, section 4.1, times sqrt(D).
    """
    unit_ND = normalize(np.asarray(features, dtype=np.float64))
    return float(unit_ND.std(axis=0).mean() * np.sqrt(unit_ND.shape[1]))


def verification(features: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compare all pairs of images by cosine: are they of one person? No interpolation; equal scores move together.

    Returns:
        figures: ``eer``, the mean of false accepts and false rejects where they are closest; ``tar_at_far_0.01`` and
        ``tar_at_far_0.001``, true accepts at the lowest threshold with at most that share of false accepts. NaN if
        there are no pairs of one person, or too few pairs of two people for such a share.
    """
    feature_ND, label_N = _checked(features, labels)
    unit_ND = normalize(feature_ND)
    first_Q, second_Q = np.triu_indices(len(label_N), k=1)
    is_same_Q = label_N[first_Q] == label_N[second_Q]
    num_different = int((~is_same_Q).sum())
    if not is_same_Q.any() or not num_different:
        return dict.fromkeys(("eer", *map(tar_name, FAR_LIMITS)), float("nan"))
    cosine_Q = (unit_ND @ unit_ND.T)[first_Q, second_Q]
    far_T, tar_T, _ = roc_curve(is_same_Q, cosine_Q, drop_intermediate=False)
    figures = {"eer": _equal_error(far_T, 1 - tar_T)}
    for limit in FAR_LIMITS:
        at = int(np.searchsorted(far_T, limit + 1e-12, side="right")) - 1
        figures[tar_name(limit)] = float(tar_T[at]) if num_different * limit >= 1 else float("nan")
    return figures


def _equal_error(far_T: Floats, frr_T: Floats) -> float:
    """Return the mean of two rates where they meet, or of the better of the two thresholds between which they cross."""
    after = int(np.argmax(far_T >= frr_T - 1e-12))  # false accepts rise from 0 to 1, false rejects fall from 1 to 0
    if abs(far_T[after] - frr_T[after]) <= 1e-12:
        return float(far_T[after])
    return float(min(far_T[at] + frr_T[at] for at in (max(after - 1, 0), after)) / 2)


def tar_name(limit: float) -> str:
    """Name the share of true accepts at a limit of false accepts, among the figures."""
    return f"tar_at_far_{limit:g}"


def _neighbours(k: int) -> KNeighborsClassifier:
    return KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / _TEMPERATURE)
    )


def _checked(features: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    feature_ND, label_N = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if feature_ND.ndim != 2 or label_N.shape != feature_ND.shape[:1]:
        raise DataError(f"features are {feature_ND.shape} for {label_N.shape} labels: pass one row for each label")
    if len(np.unique(label_N)) < 2:
        raise DataError(f"all {len(label_N)} labels are the same: a probe needs samples of two classes")
    if not np.isfinite(feature_ND).all():
        bad = int(np.flatnonzero(~np.isfinite(feature_ND).all(axis=1))[0])
        raise DataError(f"the features of sample {bad} are not finite: the encoder has diverged")
    return feature_ND, label_N
