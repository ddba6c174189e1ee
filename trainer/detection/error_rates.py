"""Error rates of morph detectors, exact: what a detector is judged by.

A score is P(morph), higher means attack; classes are [bonafide, morph] = [0, 1]; an image is called a morph where its
score is at least the threshold t. Names in other papers stand in brackets.

MACER(t)       (APCER) share of morphs with score < t: attacks accepted
BSCER(t)       (BPCER) share of bona fides with score >= t: honest people stopped
D-EER          (EER) where the two meet
BSCER@MACER=a  lowest BSCER over the thresholds with MACER(t) <= a; "BPCER20" is this at a = 5 % in some papers and the
               opposite in others, so the name is always written in full
MACER@BSCER=b  lowest MACER over the thresholds with BSCER(t) <= b

Thresholds run over the distinct scores and infinity. Equal scores cannot be parted, no point between two thresholds is
interpolated, and a limit is never exceeded; the usual ``argmin |MACER - a|`` exceeds it in half of all cases and
flatters BSCER@MACER=1 % by 1.7 points on 204 bona fides. On new images a threshold exceeds a limit that it just met on
the old ones: see `threshold_for_macer`. Sources: ISO/IEC 30107-3 and 20059 (the rates, and that the worst attack tool
counts); Maio et al. 2002, FVC2000, IEEE TPAMI 24(3) (the equal error rate and its interval).

Shapes: N samples, T thresholds, R replicates, I identities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta

from trainer.data.labels import CLASSES
from trainer.errors import DataError
from trainer.seeds import Purpose, counts_of_draws

MACER_LIMITS = (0.01, 0.05, 0.10, 0.20)
BSCER_LIMITS = (0.01, 0.10)
FEW_IDENTITIES = 20
"""With fewer, percentile intervals of a bootstrap cover less than they claim."""
_ROUNDING = 1e-12
"""Shares are sums of weights divided by their sum; a limit is met up to this."""

_AT_ONCE = 10_000_000
"""Weights of replicates that are cumulated together; more would need memory and bring no speed."""

Floats = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------- the curve


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Both error rates at every threshold that makes a difference."""

    threshold_T: Floats
    """Ascending: each distinct score, then infinity."""
    macer_T: Floats
    bscer_T: Floats


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold and the error rates there."""

    threshold: float
    macer: float
    bscer: float


def json_threshold(threshold: float) -> float | str | None:
    """Return a threshold as JSON can hold it: infinity, which calls nothing a morph, is None; minus infinity "-inf"."""
    return threshold if np.isfinite(threshold) else None if threshold > 0 else "-inf"


@dataclass(frozen=True, slots=True)
class EqualErrorRate:
    """The D-EER, between the rates of FVC2000's interval."""

    value: float
    low: float
    high: float
    threshold: float


def error_curve(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> ErrorCurve:
    """Count both errors at every threshold.

    Args:
        scores: P(morph), or any other number that grows with it.
        labels: 0 is bona fide, 1 is morph.
        weights: how often each sample counts; None means once.

    Raises:
        DataError: a score is no finite number, a label is neither 0 nor 1, or a class is missing.
    """
    score_N, label_N = _checked(scores, labels)
    weight_N = np.ones(len(score_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    threshold_T, place_N = np.unique(score_N, return_inverse=True)
    rates = _Rates(place_N, label_N, len(threshold_T))(weight_N[None])
    return ErrorCurve(np.append(threshold_T, np.inf), rates[0][0], rates[1][0])


def rates_at(scores: ArrayLike, labels: ArrayLike, threshold: float) -> OperatingPoint:
    """Measure both errors at a threshold that was chosen elsewhere; raises as `error_curve`."""
    score_N, label_N = _checked(scores, labels)
    macer, bscer = (score_N[label_N == 1] < threshold).mean(), (score_N[label_N == 0] >= threshold).mean()
    return OperatingPoint(threshold, float(macer), float(bscer))


def d_eer(curve: ErrorCurve) -> EqualErrorRate:
    """Return the detection equal error rate and its interval, by FVC2000's rule.

    Of the last threshold with MACER <= BSCER and the first with MACER >= BSCER, the one whose rates have the smaller
    sum gives the interval; its middle is the D-EER. Where the curves meet exactly the interval is a point.
    """
    at, low, high = (x[0] for x in _equal_error(curve.macer_T[None], curve.bscer_T[None]))
    return EqualErrorRate(float((low + high) / 2), float(low), float(high), float(curve.threshold_T[at]))


def bscer_at_macer(curve: ErrorCurve, limit: float) -> OperatingPoint:
    """Return the point of lowest BSCER among those with MACER at most the limit; there always is one."""
    return _point(curve, _last_within(curve.macer_T[None], limit)[0])


def macer_at_bscer(curve: ErrorCurve, limit: float) -> OperatingPoint:
    """Return the point of lowest MACER among those with BSCER at most the limit; infinity always is one."""
    return _point(curve, _first_within(curve.bscer_T[None], limit)[0])


def threshold_for_macer(morph_scores: ArrayLike, limit: float) -> float:
    """Return the highest threshold whose MACER on new images is expected to be at most the limit.

    With n morphs it is their k-th lowest score, k = floor(limit * (n + 1)): a new morph scores below it with a chance
    of at most k / (n + 1), whatever the distribution, if it comes from where these came from. The threshold that just
    meets the limit on the n themselves has about (k + 1) / (n + 1): 1.97 % for 1 % and n = 100. Minus infinity, which
    calls everything a morph, where k is 0: see `samples_needed`.

    Source: Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World" (conformal prediction).
    """
    score_N = np.sort(np.asarray(morph_scores, dtype=np.float64))
    k = _allowed(len(score_N), limit)
    return float(score_N[k - 1]) if k else -np.inf


def threshold_for_bscer(bona_fide_scores: ArrayLike, limit: float) -> float:
    """Return the lowest threshold whose BSCER on new images is expected to be at most the limit.

    It lies just above the k-th highest of n bona fides, k = floor(limit * (n + 1)), as `threshold_for_macer` explains.
    Infinity, which calls nothing a morph, where k is 0.
    """
    score_N = np.sort(np.asarray(bona_fide_scores, dtype=np.float64))
    k = _allowed(len(score_N), limit)
    return float(np.nextafter(score_N[-k], np.inf)) if k else np.inf


def samples_needed(limit: float) -> int:
    """Return how many samples of a class a threshold for new images needs at least, to hold a limit of its errors."""
    return math.ceil(1 / limit - 1 - _ROUNDING)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the chance that a morph scores above a bona fide; equal scores count half (Mann-Whitney)."""
    curve = error_curve(scores, labels)
    return float(_area(curve.macer_T[None], curve.bscer_T[None])[0])


def expected_calibration_error(scores: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> float:
    """Return the mean distance between P(morph) and the share of morphs, over bins of equal width.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3, for the probability of one class.
    """
    score_N, label_N = _checked(scores, labels)
    bin_N = np.clip((score_N * num_bins).astype(np.int64), 0, num_bins - 1)
    gap_B = np.bincount(bin_N, score_N - label_N, minlength=num_bins)
    return float(np.abs(gap_B).sum() / len(score_N))


# ---------------------------------------------------------------------------------------------- intervals


def clopper_pearson(num_errors: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact binomial interval of an error rate, of independent trials (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if num_errors == 0 else float(beta.ppf(tail, num_errors, num_trials - num_errors + 1))
    high = 1.0 if num_errors == num_trials else float(beta.ppf(1 - tail, num_errors + 1, num_trials - num_errors))
    return low, high


def bootstrap_weights(people: Sequence[Sequence[str]], *, num_replicates: int, seed: int) -> Floats:
    """Draw people, not images, with replacement, and weigh every image by how often its people were drawn.

    A bona fide of person i counts c_i times, a morph of persons i and j counts c_i * c_j times (the vertex bootstrap:
    Snijders and Borgatti 1999, Connections 22(2)). An image that names nobody is a person of its own. Images of one
    person are alike, so drawing images would give intervals that are too narrow.

    Args:
        people: the identities in each sample, at most two.
        num_replicates: R.
        seed: of the draws.

    Returns:
        weights_RN: float64.
    """
    numbers: dict[str, int] = {}
    first, second = [], []
    for i, names in enumerate(people):
        codes = [numbers.setdefault(name, len(numbers)) for name in (names or (f"\0sample {i}",))]
        first.append(codes[0])
        second.append(codes[-1] if len(set(codes)) > 1 else -1)
    drawn_RI = counts_of_draws(seed, Purpose.BOOTSTRAP, num_replicates, len(numbers)).astype(np.float64)
    padded_RI = np.concatenate([drawn_RI, np.ones((num_replicates, 1))], axis=1)  # -1 picks the ones
    weights_RN: Floats = padded_RI[:, first] * padded_RI[:, second]
    return weights_RN


def d_eer_replicates(scores: ArrayLike, labels: ArrayLike, weights_RN: Floats) -> Floats:
    """Return the D-EER of each replicate that drew both classes: the same ones whatever the scores."""
    score_N, label_N = _checked(scores, labels)
    whole_R = (weights_RN[:, label_N == 0].sum(1) > 0) & (weights_RN[:, label_N == 1].sum(1) > 0)
    threshold_T, place_N = np.unique(score_N, return_inverse=True)
    rates, found = _Rates(place_N, label_N, len(threshold_T)), []
    for some_RN in np.array_split(weights_RN[whole_R], 1 + weights_RN.size // _AT_ONCE):
        _, low_R, high_R = _equal_error(*rates(some_RN))
        found.append((low_R + high_R) / 2)
    return np.concatenate(found)


def resampling_of(people: Sequence[Sequence[str]], labels: ArrayLike) -> dict[str, Any]:
    """Say what `bootstrap_weights` draws.

    Returns:
        resampling: ``unit``, "identities", "images" where none names a person, or "identities and unnamed images";
            ``num_identities``; ``num_unnamed`` images; ``num_units`` drawn from in the class that has fewer.
    """
    named = {name for names in people for name in names}
    num_unnamed = sum(not names for names in people)
    units = []
    for label in (0, 1):
        mine = [names for names, its in zip(people, np.asarray(labels).tolist(), strict=True) if its == label]
        units.append(len({name for names in mine for name in names}) + sum(not names for names in mine))
    unit = "images" if not named else "identities and unnamed images" if num_unnamed else "identities"
    return {"unit": unit, "num_identities": len(named), "num_unnamed": num_unnamed, "num_units": min(units)}


def summarise(
    scores: ArrayLike,
    labels: ArrayLike,
    tools: Sequence[str],
    people: Sequence[Sequence[str]] | None = None,
    *,
    threshold: float | None = None,
    num_replicates: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure a detector on a test set: all attacks pooled, each tool against all bona fides, and the worst tool.

    Args:
        scores: P(morph).
        labels: 0 is bona fide, 1 is morph.
        tools: attack tool of each morph; of no account for bona fides.
        people: identities in each sample, for the intervals; None takes every image as a person of its own.
        threshold: one that was fixed on other data; None leaves the rates there out.
        num_replicates: of the bootstrap over people; 0 leaves its intervals out.
        seed: of the bootstrap.
        confidence: of the intervals.

    Returns:
        summary: JSON-able, {"pooled": row, "tools": {tool: row}, "worst": {...}, "resampling": see `resampling_of`};
        see `_row`. An infinite threshold is None, minus infinity "-inf".

    Raises:
        DataError: as `error_curve`.
    """
    score_N, label_N = _checked(scores, labels)
    tool_N, everyone = np.array(tools, dtype=object), people or [()] * len(score_N)
    weights_RN = bootstrap_weights(everyone, num_replicates=num_replicates, seed=seed) if num_replicates else None
    resampling = resampling_of(everyone, label_N)

    def row_of(chosen_N: NDArray[np.bool_]) -> dict[str, Any]:
        weights = None if weights_RN is None else weights_RN[:, chosen_N]
        row = _row(score_N[chosen_N], label_N[chosen_N], weights, threshold, confidence)
        return row | {"resampled": resampling["unit"]}

    names = sorted({str(tool) for tool in tool_N[label_N == 1]})
    rows = {name: row_of((label_N == 0) | (tool_N == name)) for name in names}
    pooled = row_of(np.ones(len(score_N), dtype=bool))
    return {"pooled": pooled, "tools": rows, "worst": _worst(rows), "resampling": resampling}


def _row(
    score_N: Floats, label_N: NDArray[np.int64], weights_RN: Floats | None, threshold: float | None, confidence: float
) -> dict[str, Any]:
    """Put together every figure of one comparison of morphs with bona fides."""
    curve, limits = error_curve(score_N, label_N), _Replicates(score_N, label_N, weights_RN, threshold, confidence)
    eer = d_eer(curve)
    counts = {"num_bona_fide": int((label_N == 0).sum()), "num_morphs": int((label_N == 1).sum())}
    row: dict[str, Any] = counts | {
        "d_eer": {"value": eer.value, "low": eer.low, "high": eer.high, "threshold": json_threshold(eer.threshold)}
        | limits.of("d_eer"),
        "bscer_at_macer": {},
        "macer_at_bscer": {},
        "auc": {"value": auc(score_N, label_N)} | limits.of("auc"),
        "ece": expected_calibration_error(score_N, label_N) if score_N.min() >= 0 and score_N.max() <= 1 else None,
        "at_threshold": None,
        "num_replicates": limits.num_used,
        "num_skipped_replicates": limits.num_skipped,
    }
    for limit in MACER_LIMITS:
        point = bscer_at_macer(curve, limit)
        row["bscer_at_macer"][f"{limit:.2f}"] = _plain(point) | limits.of(f"bscer_at_macer_{limit}")
    for limit in BSCER_LIMITS:
        point = macer_at_bscer(curve, limit)
        row["macer_at_bscer"][f"{limit:.2f}"] = _plain(point) | limits.of(f"macer_at_bscer_{limit}")
    if threshold is not None:
        point = rates_at(score_N, label_N, threshold)
        row["at_threshold"] = _plain(point) | {
            f"{name}_ci": list(clopper_pearson(round(rate * counts[count]), counts[count], confidence))
            for name, rate, count in (("macer", point.macer, "num_morphs"), ("bscer", point.bscer, "num_bona_fide"))
        }
        row["at_threshold"] |= {"ci_assumes": "independent images"}  # Clopper-Pearson's; *_cluster_ci does not
        row["at_threshold"] |= {f"{name}_cluster_ci": limits.of(name).get("ci") for name in ("macer", "bscer")}
    return row


def _worst(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Name the attack tool against which each figure is highest (ISO/IEC 30107-3: the worst species counts)."""

    def highest(figure: Any) -> str:
        return max(rows, key=lambda name: (figure(rows[name]), name))

    by_eer = highest(lambda row: row["d_eer"]["value"])
    decided = all(row["at_threshold"] for row in rows.values())
    by_macer = highest(lambda row: row["at_threshold"]["macer"]) if decided else None
    points = {}
    for limit in (f"{limit:.2f}" for limit in MACER_LIMITS):
        name = highest(lambda row, limit=limit: row["bscer_at_macer"][limit]["bscer"])
        points[limit] = rows[name]["bscer_at_macer"][limit] | {"tool": name}
    return {
        "d_eer_tool": by_eer,
        "d_eer": rows[by_eer]["d_eer"]["value"],
        "macer_tool": by_macer,
        "macer": rows[by_macer]["at_threshold"]["macer"] if by_macer else None,
        "bscer_at_macer": points,
    }


class _Replicates:
    """The same figures over all replicates of a bootstrap; percentiles of them are the intervals."""

    def __init__(
        self,
        score_N: Floats,
        label_N: NDArray[np.int64],
        weights_RN: Floats | None,
        threshold: float | None,
        confidence: float,
    ) -> None:
        self._figures: dict[str, Floats] = {}
        self._tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        self.num_used = self.num_skipped = 0
        if weights_RN is None:
            return
        whole_R = (weights_RN[:, label_N == 0].sum(1) > 0) & (weights_RN[:, label_N == 1].sum(1) > 0)
        self.num_used, self.num_skipped = int(whole_R.sum()), int((~whole_R).sum())
        threshold_T, place_N = np.unique(score_N, return_inverse=True)
        macer_RT, bscer_RT = _Rates(place_N, label_N, len(threshold_T))(weights_RN[whole_R])
        each_R = np.arange(self.num_used)
        _, low_R, high_R = _equal_error(macer_RT, bscer_RT)
        self._figures = {"d_eer": (low_R + high_R) / 2, "auc": _area(macer_RT, bscer_RT)}
        for limit in MACER_LIMITS:
            self._figures[f"bscer_at_macer_{limit}"] = bscer_RT[each_R, _last_within(macer_RT, limit)]
        for limit in BSCER_LIMITS:
            self._figures[f"macer_at_bscer_{limit}"] = macer_RT[each_R, _first_within(bscer_RT, limit)]
        if threshold is not None:
            at = int(np.searchsorted(threshold_T, threshold, side="left"))  # the first score that is called a morph
            self._figures |= {"macer": macer_RT[:, at], "bscer": bscer_RT[:, at]}

    def of(self, name: str) -> dict[str, Any]:
        """Return {"ci": [low, high]} of a figure, or None in its place."""
        values = self._figures.get(name)
        return {"ci": None if values is None or not len(values) else np.percentile(values, self._tails).tolist()}


class _Rates:
    """Weights (R, N) -> MACER and BSCER (R, T + 1) at each distinct score and at infinity."""

    def __init__(self, place_N: NDArray[np.int64], label_N: NDArray[np.int64], num_scores: int) -> None:
        self._classes = []
        for label in (1, 0):
            mine_N = np.flatnonzero(label_N == label)
            order_N = mine_N[np.argsort(place_N[mine_N], kind="stable")]
            self._classes.append((order_N, np.searchsorted(place_N[order_N], np.arange(num_scores + 1))))

    def __call__(self, weights_RN: Floats) -> tuple[Floats, Floats]:
        (morphs, below_T), (bona_fides, before_T) = self._classes
        accepted_RT, attacks_R = _cumulated(weights_RN[:, morphs], below_T)
        passed_RT, honest_R = _cumulated(weights_RN[:, bona_fides], before_T)
        return accepted_RT / attacks_R, (honest_R - passed_RT) / honest_R


def _cumulated(weights_RN: Floats, up_to_T: NDArray[np.int64]) -> tuple[Floats, Floats]:
    sums_RN = np.concatenate([np.zeros((len(weights_RN), 1)), np.cumsum(weights_RN, axis=1)], axis=1)
    return sums_RN[:, up_to_T], sums_RN[:, -1:]


def _equal_error(macer_RT: Floats, bscer_RT: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return the place and the two rates, ascending, that `d_eer` describes."""
    each_R = np.arange(len(macer_RT))
    after_R = np.argmax(macer_RT >= bscer_RT - _ROUNDING, axis=1)  # MACER rises from 0 to 1, BSCER falls from 1 to 0
    meets_R = np.abs(macer_RT[each_R, after_R] - bscer_RT[each_R, after_R]) <= _ROUNDING
    before_R = np.where(meets_R, after_R, after_R - 1)
    sums = [macer_RT[each_R, at_R] + bscer_RT[each_R, at_R] for at_R in (before_R, after_R)]
    at_R = np.where(sums[0] <= sums[1] + _ROUNDING, before_R, after_R)
    rates = np.stack([macer_RT[each_R, at_R], bscer_RT[each_R, at_R]])
    return at_R, rates.min(axis=0), rates.max(axis=0)


def _last_within(macer_RT: Floats, limit: float) -> NDArray[np.int64]:
    return np.asarray(
        np.sum(macer_RT <= limit + _ROUNDING, axis=1) - 1
    )  # MACER is 0 at the lowest score, so there is one


def _first_within(bscer_RT: Floats, limit: float) -> NDArray[np.int64]:
    return np.asarray(np.argmax(bscer_RT <= limit + _ROUNDING, axis=1))  # it is 0 at infinity


def _area(macer_RT: Floats, bscer_RT: Floats) -> Floats:
    area_R: Floats = -0.5 * np.sum(np.diff(bscer_RT, axis=1) * (2 - macer_RT[:, 1:] - macer_RT[:, :-1]), axis=1)
    return area_R


def _point(curve: ErrorCurve, at: int) -> OperatingPoint:
    return OperatingPoint(float(curve.threshold_T[at]), float(curve.macer_T[at]), float(curve.bscer_T[at]))


def _allowed(num_samples: int, limit: float) -> int:
    return math.floor(limit * (num_samples + 1) + 1e-9)  # 0.29 * 100 is a little less than 29


def _plain(point: OperatingPoint) -> dict[str, Any]:
    return {"threshold": json_threshold(point.threshold), "macer": point.macer, "bscer": point.bscer}


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    score_N, label_N = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if score_N.ndim != 1 or score_N.shape != label_N.shape:
        raise DataError(f"there are {score_N.shape} scores for {label_N.shape} labels: pass one of each a sample")
    if not len(score_N):
        raise DataError("there are no scores: the test set is empty")
    if not np.isfinite(score_N).all():
        bad = int(np.flatnonzero(~np.isfinite(score_N))[0])
        raise DataError(f"score {bad} is {score_N[bad]}: leave out, and count, what could not be scored")
    if not np.isin(label_N, (0, 1)).all():
        bad = int(np.flatnonzero(~np.isin(label_N, (0, 1)))[0])
        raise DataError(f"label {bad} is {label_N[bad]}, but must be 0 (bona fide) or 1 (morph): mend the labels")
    for label, name in enumerate(CLASSES):
        if not (label_N == label).any():
            raise DataError(f"none of {len(score_N)} samples is a {name} (label {label}): error rates need both")
    return score_N, label_N.astype(np.int64)


# ---------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class Calibration:
    """P(morph) = sigmoid(slope * logit + offset)."""

    slope: float
    offset: float

    def apply(self, logit_N: Floats) -> Floats:
        """Return P(morph); NaN stays NaN."""
        probability_N: Floats = expit(self.slope * np.asarray(logit_N, dtype=np.float64) + self.offset)
        return probability_N


def fit_platt(logits: ArrayLike, labels: ArrayLike) -> Calibration:
    """Fit a calibration by maximum likelihood to smoothed targets, so that separable data do not diverge.

    The slope never falls below a small positive number: a calibration must not turn the order of the scores around.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2; Lin, Lin and Weng 2007, Machine
    Learning 68(3).
    """
    logit_N, label_N = _checked(logits, labels)
    num_morphs, num_bona_fide = int(label_N.sum()), int((1 - label_N).sum())
    target_N = np.where(label_N == 1, (num_morphs + 1) / (num_morphs + 2), 1 / (num_bona_fide + 2))
    centre, scale = logit_N.mean(), max(float(logit_N.std()), 1e-9)
    unit_N = (logit_N - centre) / scale

    def loss_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        z_N = parameters[0] * unit_N + parameters[1]
        error_N = expit(z_N) - target_N
        return float(np.sum(np.logaddexp(0, z_N) - target_N * z_N)), np.array([error_N @ unit_N, error_N.sum()])

    found = minimize(loss_and_gradient, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(1e-3, None), (None, None)])
    slope = float(found.x[0]) / scale
    return Calibration(slope, float(found.x[1]) - slope * float(centre))


# ---------------------------------------------------------------------------------------------- over ranks
