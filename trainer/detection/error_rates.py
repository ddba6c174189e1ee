"""Error rates of morph detectors, computed exactly.

A score is P(morph), higher means attack. Classes are [bonafide, morph] = [0, 1]. An image is classified as a morph if
its score is at least the threshold t. Other papers' names are in brackets.

MACER(t)       (APCER) share of morphs with score < t: attacks accepted
BSCER(t)       (BPCER) share of bona fides with score >= t: honest people stopped
D-EER          (EER) the rate where the two are equal
BSCER@MACER=a  lowest BSCER over the thresholds with MACER(t) <= a; "BPCER20" is this at a = 5 % in some papers and the
               opposite in others, so the name is always written in full
MACER@BSCER=b  lowest MACER over the thresholds with BSCER(t) <= b

Thresholds are the distinct scores and infinity. Equal scores are never separated, nothing is interpolated between two
thresholds, and a limit is never exceeded. The common ``argmin |MACER - a|`` exceeds it in half of all cases and makes
BSCER@MACER=1 % look 1.7 points better on 204 bona fides. Example with tied scores::

    morphs 0.4 0.7 0.7 0.9      bona fides 0.1 0.2 0.4 0.7

    t        0.1    0.2    0.4    0.7    0.9    inf
    MACER    0      0      0      0.25   0.75   1
    BSCER    1      0.75   0.5    0.25   0      0

    D-EER 0.25 at t = 0.7, where the curves meet        BSCER@MACER=0.10 = 0.5 at t = 0.4

Without the two morphs at 0.7 the curves cross between two thresholds and never meet::

    t        0.1    0.2    0.4    0.7    0.9    inf
    MACER    0      0      0      0.5    0.5    1
    BSCER    1      0.75   0.5    0.25   0      0

    MACER <= BSCER last at 0.4: 0 and 0.5, sum 0.5      MACER >= BSCER first at 0.7: 0.5 and 0.25, sum 0.75
    the smaller sum gives the interval [0, 0.5], and its middle 0.25 is the D-EER

On new images a threshold exceeds a limit that it just met on the old ones: see `threshold_for_macer`.

Sources: ISO/IEC 30107-3 and 20059 (the rates, and that the worst attack tool counts); Maio et al. 2002, FVC2000, IEEE
TPAMI 24(3) (the equal error rate and its interval).

Shapes: N samples, T thresholds, R replicates, I identities.
"""

import math
from collections.abc import Callable, Sequence
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
"""With fewer, the percentile intervals of a bootstrap cover less than they claim."""
_ROUNDING = 1e-12
"""Tolerance of a limit: shares are sums of weights divided by their sum, so they carry rounding errors."""

_MAX_WEIGHTS_AT_ONCE = 10_000_000
"""Weights of replicates that are summed in one block; larger blocks need more memory and are not faster."""

Floats = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------- the curve


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Both error rates at every distinct threshold."""

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
    """Return a threshold as a JSON value: infinity (nothing is a morph) is None, minus infinity is "-inf"."""
    return threshold if np.isfinite(threshold) else None if threshold > 0 else "-inf"


@dataclass(frozen=True, slots=True)
class EqualErrorRate:
    """The D-EER, and the two rates of FVC2000's interval around it."""

    value: float
    low: float
    high: float
    threshold: float


def error_curve(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> ErrorCurve:
    """Compute both error rates at every threshold.

    Args:
        scores: P(morph), or any other number that increases with it.
        labels: 0 is bona fide, 1 is morph.
        weights: how often each sample counts; None means once.

    Raises:
        DataError: a score is not finite, a label is neither 0 nor 1, or a class is missing.
    """
    score_N, label_N = _checked(scores, labels)
    weight_N = np.ones(len(score_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    threshold_T, place_N = np.unique(score_N, return_inverse=True)
    rates = _Rates(place_N, label_N, len(threshold_T))(weight_N[None])
    return ErrorCurve(np.append(threshold_T, np.inf), rates[0][0], rates[1][0])


def rates_at(scores: ArrayLike, labels: ArrayLike, threshold: float) -> OperatingPoint:
    """Compute both error rates at a given threshold; raises as `error_curve`."""
    score_N, label_N = _checked(scores, labels)
    macer, bscer = (score_N[label_N == 1] < threshold).mean(), (score_N[label_N == 0] >= threshold).mean()
    return OperatingPoint(threshold, float(macer), float(bscer))


def d_eer(curve: ErrorCurve) -> EqualErrorRate:
    """Return the detection equal error rate and its interval, by FVC2000's rule.

    Take the last threshold with MACER <= BSCER and the first with MACER >= BSCER. The one whose rates have the smaller
    sum gives the interval, and its middle is the D-EER. If the curves meet, the interval is a point. See the example of
    this module.
    """
    at, low, high = (x[0] for x in _equal_error(curve.macer_T[None], curve.bscer_T[None]))
    return EqualErrorRate(float((low + high) / 2), float(low), float(high), float(curve.threshold_T[at]))


def bscer_at_macer(curve: ErrorCurve, limit: float) -> OperatingPoint:
    """Return the point with the lowest BSCER among those with MACER at most the limit; there always is one."""
    return _point(curve, _last_within(curve.macer_T[None], limit)[0])


def macer_at_bscer(curve: ErrorCurve, limit: float) -> OperatingPoint:
    """Return the point with the lowest MACER among those with BSCER at most the limit; infinity always is one."""
    return _point(curve, _first_within(curve.bscer_T[None], limit)[0])


def threshold_for_macer(morph_scores: ArrayLike, limit: float) -> float:
    """Return the highest threshold whose MACER on new images is expected to be at most the limit.

    With n morphs it is their k-th lowest score, k = floor(limit * (n + 1)). A new morph from the same distribution
    scores below it with a probability of at most k / (n + 1), whatever the distribution is.

    Example: limit 1 % and n = 100 give k = 1, the lowest score: 0 of the 100 lie below it, and 1 / 101 = 0.99 % is
    expected on new images. The highest threshold that meets 1 % on the 100 themselves is the second lowest score: 1 of
    100 lies below it, but 2 / 101 = 1.98 % is expected on new images.

    With too few morphs (k = 0) it is minus infinity, which makes everything a morph: see `samples_needed`.

    Source: Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World" (conformal prediction).
    """
    score_N = np.sort(np.asarray(morph_scores, dtype=np.float64))
    k = _allowed(len(score_N), limit)
    return float(score_N[k - 1]) if k else -np.inf


def threshold_for_bscer(bona_fide_scores: ArrayLike, limit: float) -> float:
    """Return the lowest threshold whose BSCER on new images is expected to be at most the limit.

    It is just above the k-th highest of n bona fides, k = floor(limit * (n + 1)), as in `threshold_for_macer`. With too
    few bona fides (k = 0) it is infinity, which makes nothing a morph.
    """
    score_N = np.sort(np.asarray(bona_fide_scores, dtype=np.float64))
    k = _allowed(len(score_N), limit)
    return float(np.nextafter(score_N[-k], np.inf)) if k else np.inf


def samples_needed(limit: float) -> int:
    """Return how many samples of a class a threshold for new images needs at least: 99 for a limit of 1 %."""
    return math.ceil(1 / limit - 1 - _ROUNDING)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a morph scores above a bona fide; equal scores count half (Mann-Whitney)."""
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
    """Return the exact binomial interval of an error rate, for independent trials (Clopper and Pearson 1934).

    The lower limit is the rate at which ``num_errors`` or more errors have a probability of 2.5 %, the upper one the
    rate at which as many or fewer have it. No error in 204 trials gives [0, 1 - 0.025 ** (1 / 204)] = [0, 1.79 %].
    """
    tail = (1 - confidence) / 2
    low = 0.0 if num_errors == 0 else float(beta.ppf(tail, num_errors, num_trials - num_errors + 1))
    high = 1.0 if num_errors == num_trials else float(beta.ppf(1 - tail, num_errors + 1, num_trials - num_errors))
    return low, high


def bootstrap_weights(identities: Sequence[Sequence[str]], *, num_replicates: int, seed: int) -> Floats:
    """Return the weights of a bootstrap over identities: identities are drawn with replacement, not images.

    A bona fide of identity i counts c_i times, a morph of i and j c_i * c_j times (the vertex bootstrap: Snijders and
    Borgatti 1999, Connections 22(2)). An image without a named identity has one of its own. Images of one person
    are alike, so a bootstrap over images would give intervals that are too narrow.

    Example: of anna, ben and cleo a replicate draws ben twice and cleo once. Images of anna weigh 0, of ben 2, of cleo
    1; a morph of ben and cleo weighs 2, and every morph of anna 0.

    Args:
        identities: of each sample, at most two.
        num_replicates: R.
        seed: of the draws.

    Returns:
        weights_RN: float64.
    """
    numbers: dict[str, int] = {}
    first, second = [], []
    for i, names in enumerate(identities):
        codes = [numbers.setdefault(name, len(numbers)) for name in (names or (f"\0sample {i}",))]
        first.append(codes[0])
        second.append(codes[-1] if len(set(codes)) > 1 else -1)
    drawn_RI = counts_of_draws(seed, Purpose.BOOTSTRAP, num_replicates, len(numbers)).astype(np.float64)
    padded_RI = np.concatenate(
        [drawn_RI, np.ones((num_replicates, 1))], axis=1
    )  # index -1: the last column, a factor of 1
    weights_RN: Floats = padded_RI[:, first] * padded_RI[:, second]
    return weights_RN


def d_eer_replicates(scores: ArrayLike, labels: ArrayLike, weights_RN: Floats) -> Floats:
    """Return the D-EER of each replicate that drew both classes; which ones do does not depend on the scores."""

    def middle(macer_RT: Floats, bscer_RT: Floats) -> Floats:
        _, low_R, high_R = _equal_error(macer_RT, bscer_RT)
        return (low_R + high_R) / 2

    return _over_replicates(scores, labels, weights_RN, middle)


def macer_at_bscer_replicates(scores: ArrayLike, labels: ArrayLike, weights_RN: Floats, limit: float) -> Floats:
    """Return MACER@BSCER=limit of each replicate that drew both classes, as `d_eer_replicates`."""

    def lowest(macer_RT: Floats, bscer_RT: Floats) -> Floats:
        return macer_RT[np.arange(len(macer_RT)), _first_within(bscer_RT, limit)]

    return _over_replicates(scores, labels, weights_RN, lowest)


def _over_replicates(
    scores: ArrayLike, labels: ArrayLike, weights_RN: Floats, figure: Callable[[Floats, Floats], Floats]
) -> Floats:
    score_N, label_N = _checked(scores, labels)
    has_both_R = (weights_RN[:, label_N == 0].sum(1) > 0) & (weights_RN[:, label_N == 1].sum(1) > 0)
    threshold_T, place_N = np.unique(score_N, return_inverse=True)
    rates = _Rates(place_N, label_N, len(threshold_T))
    parts = np.array_split(weights_RN[has_both_R], 1 + weights_RN.size // _MAX_WEIGHTS_AT_ONCE)
    return np.concatenate([figure(*rates(some_RN)) for some_RN in parts])


def resampling_of(identities: Sequence[Sequence[str]], labels: ArrayLike) -> dict[str, Any]:
    """Describe the units that `bootstrap_weights` draws.

    Returns:
        resampling: ``unit``, "identities", "images" if no image names an identity, or "identities and unnamed images";
            ``num_identities``; ``num_unnamed`` images; ``num_units`` of the class that has fewer.
    """
    named = {name for names in identities for name in names}
    num_unnamed = sum(not names for names in identities)
    units = []
    for label in (0, 1):
        of_class = [names for names, its in zip(identities, np.asarray(labels).tolist(), strict=True) if its == label]
        units.append(len({name for names in of_class for name in names}) + sum(not names for names in of_class))
    unit = "images" if not named else "identities and unnamed images" if num_unnamed else "identities"
    return {"unit": unit, "num_identities": len(named), "num_unnamed": num_unnamed, "num_units": min(units)}


def summarise(
    scores: ArrayLike,
    labels: ArrayLike,
    tools: Sequence[str],
    identities: Sequence[Sequence[str]] | None = None,
    *,
    threshold: float | None = None,
    num_replicates: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure a detector on a test set: all attacks pooled, each attack tool against all bona fides, the worst tool.

    Args:
        scores: P(morph).
        labels: 0 is bona fide, 1 is morph.
        tools: attack tool of each morph; ignored for bona fides.
        identities: of each sample, for the intervals; with None every image has its own.
        threshold: fixed on other data; with None the rates at a threshold are left out.
        num_replicates: of the bootstrap over identities; with 0 its intervals are left out.
        seed: of the bootstrap.
        confidence: of the intervals.

    Returns:
        summary: JSON-able, {"pooled": row, "tools": {tool: row}, "worst": {...}, "resampling": see `resampling_of`};
        see `_row`. An infinite threshold is None, minus infinity is "-inf".

    Raises:
        DataError: as `error_curve`.
    """
    score_N, label_N = _checked(scores, labels)
    tool_N, names_N = np.array(tools, dtype=object), identities or [()] * len(score_N)
    weights_RN = bootstrap_weights(names_N, num_replicates=num_replicates, seed=seed) if num_replicates else None
    resampling = resampling_of(names_N, label_N)

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
    """Compute all figures of one set of morphs against bona fides."""
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
        row["at_threshold"] |= {
            "ci_assumes": "independent images"
        }  # for Clopper-Pearson; *_cluster_ci does not assume it
        row["at_threshold"] |= {f"{name}_cluster_ci": limits.of(name).get("ci") for name in ("macer", "bscer")}
    return row


def _worst(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the attack tool with the highest value of each figure (ISO/IEC 30107-3: the worst species counts)."""

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
    """The figures of all replicates of a bootstrap; their percentiles are the intervals."""

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
        has_both_R = (weights_RN[:, label_N == 0].sum(1) > 0) & (weights_RN[:, label_N == 1].sum(1) > 0)
        self.num_used, self.num_skipped = int(has_both_R.sum()), int((~has_both_R).sum())
        threshold_T, place_N = np.unique(score_N, return_inverse=True)
        macer_RT, bscer_RT = _Rates(place_N, label_N, len(threshold_T))(weights_RN[has_both_R])
        each_R = np.arange(self.num_used)
        _, low_R, high_R = _equal_error(macer_RT, bscer_RT)
        self._figures = {"d_eer": (low_R + high_R) / 2, "auc": _area(macer_RT, bscer_RT)}
        for limit in MACER_LIMITS:
            self._figures[f"bscer_at_macer_{limit}"] = bscer_RT[each_R, _last_within(macer_RT, limit)]
        for limit in BSCER_LIMITS:
            self._figures[f"macer_at_bscer_{limit}"] = macer_RT[each_R, _first_within(bscer_RT, limit)]
        if threshold is not None:
            at = int(np.searchsorted(threshold_T, threshold, side="left"))  # the lowest score that is a morph at it
            self._figures |= {"macer": macer_RT[:, at], "bscer": bscer_RT[:, at]}

    def of(self, name: str) -> dict[str, Any]:
        """Return {"ci": [low, high]} of a figure; None instead of the list if there are no replicates."""
        values = self._figures.get(name)
        return {"ci": None if values is None or not len(values) else np.percentile(values, self._tails).tolist()}


class _Rates:
    """Computes MACER and BSCER (R, T + 1) at each distinct score and at infinity from weights (R, N).

    Each class is sorted by score once; a cumulative sum of its weights then gives the weight below any threshold.
    Morphs at the places 0, 1, 1 of three distinct scores with weights 1, 2, 1 have the cumulative sums 0, 1, 3, 4.
    Below places 0, 1, 2 and infinity lie 0, 1, 4 and 4 of 4, so MACER is 0, 0.25, 1, 1: tied scores move together.
    """

    def __init__(self, place_N: NDArray[np.int64], label_N: NDArray[np.int64], num_scores: int) -> None:
        self._classes = []
        for label in (1, 0):
            of_class_N = np.flatnonzero(label_N == label)
            order_N = of_class_N[np.argsort(place_N[of_class_N], kind="stable")]
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
    """Return the index and the two rates, ascending, that `d_eer` describes."""
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
    return math.floor(limit * (num_samples + 1) + 1e-9)  # 0.29 * 100 is slightly less than 29


def _plain(point: OperatingPoint) -> dict[str, Any]:
    return {"threshold": json_threshold(point.threshold), "macer": point.macer, "bscer": point.bscer}


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    score_N, label_N = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if score_N.ndim != 1 or score_N.shape != label_N.shape:
        raise DataError(f"there are {score_N.shape} scores for {label_N.shape} labels: pass one of each per sample")
    if not len(score_N):
        raise DataError("there are no scores: the test set is empty")
    if not np.isfinite(score_N).all():
        bad = int(np.flatnonzero(~np.isfinite(score_N))[0])
        raise DataError(f"score {bad} is {score_N[bad]}: leave samples without a score out, and count them")
    if not np.isin(label_N, (0, 1)).all():
        bad = int(np.flatnonzero(~np.isin(label_N, (0, 1)))[0])
        raise DataError(f"label {bad} is {label_N[bad]}, but must be 0 (bona fide) or 1 (morph): correct the labels")
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
    """Fit a calibration by maximum likelihood to smoothed targets, which have a finite optimum on separable data too.

    With 8 morphs and 3 bona fides the targets are 9/10 and 1/5 instead of 1 and 0. The slope is at least a small
    positive number: a calibration must not reverse the order of the scores.

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
