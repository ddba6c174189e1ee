"""Probes of saved features side by side, with intervals: tools/probe.py.

Every set of features is judged on the same images with the same folds (`trainer.probes.measures`), and every replicate
of the bootstrap draws the same people for all sets, so that differences between sets have paired intervals. Probes are
fitted once: the intervals say what other test people would give, not what other training people would.

Shapes: N samples, D features, R replicates, C classes, Q pairs of samples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.members import IDENTITY_FIELDS
from trainer.detection.error_rates import bootstrap_weights, d_eer_replicates, macer_at_bscer_replicates
from trainer.errors import ConfigError, DataError
from trainer.features.store import Features
from trainer.probes.measures import (
    FAR_LIMITS,
    UNTESTED,
    Floats,
    Folds,
    Ints,
    feature_std,
    folds_of_people,
    folds_of_samples,
    knn,
    leave_one_out_knn,
    linear_probe,
    logistic_probe,
    mean_accuracy,
    rank_me,
    tar_name,
    verification,
)

IDENTITY = "identity"
ACCURACIES = ("knn", "ridge", "logistic")
_VERIFICATIONS = ("eer", *map(tar_name, FAR_LIMITS))
_MAX_VERIFIED = 6000
_MAX_WEIGHTS_AT_ONCE = 10_000_000
_TAILS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Task:
    """What the probes of all sets are asked: the classes of the same images, and who judges whom."""

    sample_N: Ints
    """Numbers of the images that are used, among all of the features."""
    label_N: Ints
    classes: list[str]
    people: list[tuple[str, ...]]
    """The people in each image, for the bootstrap; an empty tuple counts as a person of its own."""
    folds: Folds
    by_identity: bool
    """The classes are people: each image is judged by all others, and pairs are verified."""
    notes: list[str]
    """What was left out, and why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one set of features, and those of its replicates."""

    figures: dict[str, float]
    replicates: dict[str, Floats]


def make_task(features: Features, field: str) -> Task:
    """Decide which images are probed and how they are dealt to folds.

    Args:
        features: any of the sets; only its rows count.
        field: label, identity or another field of the samples' json.

    Raises:
        ConfigError: no image has that field.
        DataError: fewer than two classes are left.
    """
    values, by_identity = features.field(field), field == IDENTITY
    people = _people_of(features)
    lost = Counter[str]()
    kept: list[int] = []
    for i, value in enumerate(values):
        reason = _why_left_out(features, i, value, people[i], by_identity=by_identity)
        if reason:
            lost[reason.format(field=field)] += 1
        else:
            kept.append(i)
    if not any(value is not None for value in values):
        raise ConfigError(
            f"field is {field!r}, but no image of these features has one: embed shards that were packed from a "
            "manifest with that column (tools/make_shards.py), or a CSV with it"
        )
    counts = Counter(str(values[i]) for i in kept)
    alone = {name for name, count in counts.items() if count < 2}
    if alone:
        lost[f"are the only image of their {field}"] += len(alone)
        kept = [i for i in kept if str(values[i]) not in alone]
    classes = sorted(counts.keys() - alone)
    if len(classes) < 2:
        raise DataError(f"field is {field!r}, but the features hold {len(classes)} class of two images or more")
    label_N = np.array([classes.index(str(values[i])) for i in kept], dtype=np.int64)
    named = [people[i] for i in kept]
    folds = folds_of_samples(label_N) if by_identity else folds_of_people(named, label_N)
    notes = [f"{count} images left out: they {reason}" for reason, count in lost.items()]
    return Task(np.array(kept, dtype=np.int64), label_N, classes, named, folds, by_identity, notes)


def make_test_task(train: Features, test: Features, field: str) -> Task:
    """Fit on one set of images and test on another; the samples of the second follow those of the first.

    Raises:
        ConfigError: people are in both, and the classes are not people; or as `make_task`.
        DataError: a class of the test images has no image to fit.
    """
    first, second = make_task(train, field), make_task(test, field)
    shared = {p for named in first.people for p in named} & {p for named in second.people for p in named}
    if shared and not first.by_identity:
        raise ConfigError(
            f"features and test_features share {len(shared)} people (such as {min(shared)}), so that a probe of "
            f"{field} could pass by knowing them: split with tools/splits.py"
        )
    if missing := sorted(set(second.classes) - set(first.classes)):
        raise DataError(f"test_features has the {field} {missing[0]}, which features has not: nothing could know it")
    place = np.array([first.classes.index(name) for name in second.classes])
    label_N = np.concatenate([first.label_N, place[second.label_N]])
    fit_F, test_F = np.arange(len(first.label_N)), np.arange(len(first.label_N), len(label_N))
    sample_N = np.concatenate([first.sample_N, len(train.rows) + second.sample_N])
    notes = [f"features: {note}" for note in first.notes] + [f"test_features: {note}" for note in second.notes]
    people = first.people + second.people
    return Task(sample_N, label_N, first.classes, people, [(fit_F, test_F)], first.by_identity, notes)


def check_same_images(sets: Mapping[str, Features], *, setting: str) -> None:
    """Refuse sets of features that are of other images.

    Raises:
        ConfigError: they are.
    """
    (first, expected), *others = sets.items()
    for name, found in others:
        if found.keys != expected.keys:
            both = f"{first} ({len(expected.keys)} images) and {name} ({len(found.keys)} images)"
            raise ConfigError(f"{setting} names {both}, which are of other images: compute both from the same --images")


def measure_set(values_ND: NDArray[Any], task: Task, weights_RN: Floats, *, k: int) -> Measured:
    """Compute the figures of one set of features, and of its replicates.

    Args:
        values_ND: features of all images; those of the task must be finite.
        task: which of them, and their classes.
        weights_RN: of the task's samples in each replicate.
        k: neighbours of the kNN.

    Raises:
        DataError: a feature is not finite.
    """
    feature_ND, label_N = np.asarray(values_ND[task.sample_N], dtype=np.float64), task.label_N
    tests_all = task.by_identity and len(task.folds) > 1
    neighbours_N = (
        leave_one_out_knn(feature_ND, label_N, k=k) if tests_all else knn(feature_ND, label_N, task.folds, k=k)
    )
    predicted = {
        "knn": neighbours_N,
        "ridge": linear_probe(feature_ND, label_N, task.folds),
        "logistic": logistic_probe(feature_ND, label_N, task.folds),
    }
    figures = {name: mean_accuracy(label_N, predicted_N) for name, predicted_N in predicted.items()}
    replicates = {name: _accuracy_replicates(task, predicted_N, weights_RN) for name, predicted_N in predicted.items()}
    tested_N = np.unique(np.concatenate([test_F for _, test_F in task.folds]))
    if task.by_identity and len(tested_N) <= _MAX_VERIFIED:
        figures |= verification(feature_ND[tested_N], label_N[tested_N])
        replicates |= _verification_replicates(feature_ND[tested_N], label_N[tested_N], weights_RN[:, tested_N])
    figures |= {"rank_me": rank_me(feature_ND[tested_N]), "feature_std": feature_std(feature_ND[tested_N])}
    return Measured(figures, replicates)


def weights_of(task: Task, *, num_replicates: int, seed: int) -> Floats:
    """Return the weights (R, N) of a bootstrap over the people of the images; see `bootstrap_weights`."""
    return bootstrap_weights(task.people, num_replicates=num_replicates, seed=seed)


def describe(measured: Mapping[str, Measured], task: Task) -> dict[str, Any]:
    """Return figures with intervals, and differences from the first set with paired intervals; JSON-able."""
    reference = next(iter(measured.values()))
    sets = {}
    for name, found in measured.items():
        rows: dict[str, Any] = {}
        for figure, value in found.figures.items():
            row: dict[str, Any] = {"value": _number(value), "ci": _interval(found.replicates.get(figure))}
            if found is not reference and figure in found.replicates:
                row["minus_first"] = _number(value - reference.figures[figure])
                row["minus_first_ci"] = _interval(found.replicates[figure] - reference.replicates[figure])
            rows[figure] = row
        sets[name] = rows
    tested = sum(len(test_F) for _, test_F in task.folds)
    named = {person for persons in task.people for person in persons}
    return {
        "num_images": len(task.label_N),
        "num_tested": tested,
        "classes": {name: int((task.label_N == i).sum()) for i, name in enumerate(task.classes)},
        "num_people": len(named),
        "resampled": "people" if named else "images",
        "chance": 1 / len(task.classes),
        "notes": task.notes,
        "sets": sets,
    }


def _people_of(features: Features) -> list[tuple[str, ...]]:
    pairs = zip(*(features.field(name) for name in IDENTITY_FIELDS), strict=True)
    return [tuple(dict.fromkeys(str(person) for person in pair if person is not None)) for pair in pairs]


def _why_left_out(features: Features, i: int, value: Any, people: tuple[str, ...], *, by_identity: bool) -> str:
    if not features.is_readable[i]:
        return "could not be read"
    if value is None:
        return "have no {field}"
    return "show two people" if by_identity and len(people) > 1 else ""


def _accuracy_replicates(task: Task, predicted_N: Ints, weights_RN: Floats) -> Floats:
    """Return the mean accuracy over the classes in each replicate; NaN where it drew no tested image.

    A class that a replicate did not draw does not count. Where the classes are people, a person drawn twice counts
    twice.
    """
    tested_N = predicted_N != UNTESTED
    right_N = (predicted_N == task.label_N)[tested_N]
    one_hot_NC = np.eye(len(task.classes))[task.label_N[tested_N]]
    weight_RN = weights_RN[:, tested_N]
    total_RC = weight_RN @ one_hot_NC
    right_RC = (weight_RN * right_N) @ one_hot_NC
    share_RC = np.divide(right_RC, total_RC, out=np.zeros_like(total_RC), where=total_RC > 0)
    counted_RC = total_RC / np.maximum(one_hot_NC.sum(axis=0), 1) if task.by_identity else total_RC > 0
    drawn_R = counted_RC.sum(axis=1)
    mean_R: Floats = np.full(len(drawn_R), np.nan)
    np.divide((share_RC * counted_RC).sum(axis=1), drawn_R, out=mean_R, where=drawn_R > 0)
    return mean_R


def _verification_replicates(feature_ND: Floats, label_N: Ints, weights_RN: Floats) -> dict[str, Floats]:
    """Return the verification figures of each replicate; a pair of two people weighs the product of their weights.

    True accepts are the complement of the rate at which pairs of one person are refused, which is what MACER is of
    attacks; false accepts are BSCER. See `bootstrap_weights` for the weights.
    """
    unit_ND = feature_ND / np.maximum(np.linalg.norm(feature_ND, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    first_Q, second_Q = np.triu_indices(len(label_N), k=1)
    same_Q = label_N[first_Q] == label_N[second_Q]
    cosine_Q = (unit_ND @ unit_ND.T)[first_Q, second_Q]
    found: dict[str, list[Floats]] = {name: [] for name in _VERIFICATIONS}
    if same_Q.all() or not same_Q.any() or not len(weights_RN):
        return {}
    for some_RN in np.array_split(weights_RN, 1 + weights_RN.shape[0] * len(same_Q) // _MAX_WEIGHTS_AT_ONCE):
        weight_RQ = np.where(same_Q, some_RN[:, first_Q], some_RN[:, first_Q] * some_RN[:, second_Q])
        found["eer"].append(d_eer_replicates(cosine_Q, same_Q, weight_RQ))
        for limit in FAR_LIMITS:
            found[tar_name(limit)].append(1 - macer_at_bscer_replicates(cosine_Q, same_Q, weight_RQ, limit))
    num_different = int((~same_Q).sum())
    usable = ["eer", *(tar_name(limit) for limit in FAR_LIMITS if num_different * limit >= 1)]
    return {name: np.concatenate(found[name]) for name in usable}


def _interval(replicate_R: Floats | None) -> list[float] | None:
    if replicate_R is None or not np.isfinite(replicate_R).any():
        return None
    return [float(value) for value in np.nanpercentile(replicate_R, _TAILS)]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def table(found: Mapping[str, Any], *, markdown: bool = False) -> list[str]:
    """Tabulate what `describe` returns: a line for each set of features, then the differences from the first."""
    figures = list(next(iter(found["sets"].values())))
    heads = ["features", *(_TITLES.get(name, name) for name in figures)]
    lines = [[name, *(_cell(row.get(figure), figure) for figure in figures)] for name, row in found["sets"].items()]
    first, *others = found["sets"]
    for name in others:
        row = found["sets"][name]
        differences = [_difference(row[figure], figure) for figure in figures]
        lines.append([f"{name} minus {first}", *differences])
    return _markdown(heads, lines) if markdown else _aligned(heads, lines)


_TITLES = {
    "knn": "kNN %", "ridge": "ridge %", "logistic": "logistic %", "eer": "EER %", "rank_me": "RankMe",
    "feature_std": "std",
} | {tar_name(limit): f"TAR@FAR={100 * limit:g}%" for limit in FAR_LIMITS}  # fmt: skip


def _cell(row: Mapping[str, Any] | None, figure: str) -> str:
    if row is None or row["value"] is None:
        return "-"
    if figure in ("rank_me", "feature_std"):
        return f"{row['value']:.3g}"
    return f"{100 * row['value']:.1f}" + _in_brackets(row["ci"])


def _difference(row: Mapping[str, Any], figure: str) -> str:
    if row.get("minus_first") is None:
        return ""
    return f"{100 * row['minus_first']:+.1f}" + _in_brackets(row["minus_first_ci"])


def _in_brackets(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _aligned(heads: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    rows = [[line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
            for line in [heads, *lines]]  # fmt: skip
    return ["  ".join(row).rstrip() for row in rows]


def _markdown(heads: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines]]
