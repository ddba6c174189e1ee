"""The report's drawings: DET curves, score histograms, reliability."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from trainer.detection.error_rates import clopper_pearson, d_eer, error_curve

Floats = NDArray[np.float64]

Row = Mapping[str, Any]

DET_ENDS = (0.0005, 0.99)
"""Ends of the axes of all DET curves. A rate of 0 or 1 is infinite on a probit axis; it is drawn at the end."""
_TICKS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)
_GRID = 0.004
"""Points of a DET curve that are closer than this are drawn as one: half a pixel [probits]."""
_BINS = 25
_RELIABILITY_BINS = 15
_MAX_RUG_SAMPLES = 50
"""Up to this number of samples, each is drawn as a tick."""
_LABEL_LENGTH = 44
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito 2008: distinct for colour-blind people. Dashes and markers keep curves distinct in grey print."""
_DASHES: Any = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
_BASELINE_COLOUR = "#6e6e6e"
_STYLE: Any = [
    "default",
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so a page does not depend on the machine
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
    },
]
"""Replaces the user's matplotlibrc."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSet:
    """One model on one test set."""

    model: str
    test_set: str
    score_N: Floats
    """P(morph), from 0 to 1; NaN where the sample failed to process."""
    label_N: NDArray[np.int64]
    tool_N: list[str]
    """Attack tool of each morph, "" for bona fides."""
    key_N: list[str]
    threshold: float | None
    """The stated threshold, fixed on other data."""
    threshold_name: str
    summary: dict[str, Any]
    """The result of `trainer.detection.error_rates.summarise`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetCurve:
    """One curve of a DET figure."""

    name: str
    macer_T: Floats
    bscer_T: Floats
    d_eer: float
    limits: tuple[tuple[float, float], ...] = ()
    """(MACER, BSCER) of each BSCER@MACER."""
    stated: tuple[float, float] | None = None
    """(MACER, BSCER) at the stated threshold."""
    is_baseline: bool = False


def percent(rate: float | None) -> str:
    """Write a rate with three digits or to 0.01 %; "-" if there is none."""
    if rate is None or not math.isfinite(rate):
        return "-"
    if rate in (0, 1):
        return f"{100 * rate:.0f} %"
    if 0 < rate < 0.00005:
        return "<0.01 %"
    return f"{100 * rate:.{1 if rate >= 0.09995 else 2}f} %"


def det_figure(title: str, curves: Sequence[DetCurve]) -> Figure:
    """Draw DET curves: MACER on x, BSCER on y, both as probits, with the same axes in every figure.

    A curve is a staircase through the thresholds, never better than they are: between two thresholds it stays at the
    higher BSCER. Points within half a pixel are left out. Each curve has its own dashes and marker.
    """
    with style.context(_STYLE):
        height = 5.5 + 0.18 * (1 + len(curves))  # all lengths are in inches, so the axes of all figures are equal
        figure = Figure(figsize=(5.3, height))
        axis = figure.add_axes((0.6 / 5.3, 1 - 4.9 / height, 4.6 / 5.3, 4.6 / height))
        diagonal = det_axes(axis)
        handles = []
        for number, curve in enumerate(curves):
            colour, dash, marker = _look(number)
            colour = _BASELINE_COLOUR if curve.is_baseline else colour
            x_T, y_T = _staircase(probit(curve.macer_T), probit(curve.bscer_T))
            width, steps = 1.0 if curve.is_baseline else 1.4, "steps-post"
            axis.plot(x_T, y_T, color=colour, linestyle=dash, linewidth=width, drawstyle=steps, label=f"curve-{number}")
            _draw_markers(axis, curve.limits, marker, colour, "white")
            _draw_markers(axis, [curve.stated] if curve.stated else [], marker, colour, colour)
            shown = {"color": colour, "linestyle": dash, "linewidth": width, "marker": marker, "markersize": 4.5}
            handles.append(Line2D([], [], markerfacecolor="white", **shown))
        axis.set(xlabel="MACER: morphs taken for bona fide [%]", ylabel="BSCER: bona fides taken for morphs [%]")
        axis.set_title(_label(title), loc="left")
        axis.grid(visible=True)
        names = [f"{_label(curve.name)}: D-EER {percent(curve.d_eer)}" for curve in curves]
        names = [f"{name} (baseline)" if c.is_baseline else name for name, c in zip(names, curves, strict=True)]
        handles, names = [*handles, diagonal], [*names, "both rates equal: D-EER"]
        figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.5 / 5.3, 0), handlelength=4)
    return figure


def det_axes(axis: Axes, ends: tuple[float, float] = DET_ENDS) -> Line2D:
    """Make both axes probit scales of rates between ``ends``, and draw the line where the rates are equal."""
    limits, ticks = ndtri(ends), [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    (diagonal,) = axis.plot(limits, limits, color="#767676", linewidth=0.8, linestyle=(0, (6, 3)), label="equal")
    places, texts = ndtri(ticks), [f"{100 * tick:g}" for tick in ticks]
    axis.set(xticks=places, xticklabels=texts, yticks=places, yticklabels=texts, xlim=limits, ylim=limits)
    return diagonal


def score_figure(scored: ScoredSet) -> Figure:
    """Draw a histogram of the scores of bona fides and of each attack tool, each as shares of its own samples."""
    groups = _groups(scored)
    with style.context(_STYLE):
        figure = Figure(figsize=(5.6, max(3.2, 0.5 + 0.82 * len(groups))), layout="constrained")
        axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
        for number, (axis, (name, label, score_N)) in enumerate(zip(axes, groups, strict=True)):
            _histogram(axis, score_N, "#555555" if label == 0 else _look(number - 1)[0])
            wrong_N = np.zeros(len(score_N), dtype=bool)
            text = f"{_label(name)}, {len(score_N)}"
            if scored.threshold is not None:
                wrong_N = (score_N >= scored.threshold) != bool(label)
                axis.axvline(scored.threshold, color="black", linewidth=0.9, linestyle="--")
                text += f": {wrong_N.sum()} {'missed' if label else 'false alarms'}"
            _rug(axis, score_N if len(score_N) <= _MAX_RUG_SAMPLES else score_N[wrong_N])
            axis.set_title(text, loc="left", fontsize=8, pad=2)
        axes[-1].set(xlabel="P(morph)", xlim=(-0.01, 1.01))
    return figure


def reliability_figure(scored: ScoredSet) -> Figure:
    """Draw the share of morphs against P(morph) in bins of equal width, with exact binomial intervals."""
    read_N = ~np.isnan(scored.score_N)
    score_N, label_N = scored.score_N[read_N], scored.label_N[read_N]
    bin_N = np.minimum((score_N * _RELIABILITY_BINS).astype(np.int64), _RELIABILITY_BINS - 1)
    count_B = np.bincount(bin_N, minlength=_RELIABILITY_BINS)
    used = np.flatnonzero(count_B)
    score_B = np.bincount(bin_N, score_N, _RELIABILITY_BINS)[used] / count_B[used]
    share_B = np.bincount(bin_N, label_N, _RELIABILITY_BINS)[used] / count_B[used]
    morphs_B = np.bincount(bin_N, label_N, _RELIABILITY_BINS)[used].astype(np.int64)
    limits_B2 = np.array([clopper_pearson(int(k), int(n)) for k, n in zip(morphs_B, count_B[used], strict=True)])
    ece = scored.summary["pooled"]["ece"]
    with style.context(_STYLE):
        figure = Figure(figsize=(3.6, 3.7), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (6, 3)))
        axis.vlines(score_B, limits_B2[:, 0], limits_B2[:, 1], color="#0072b2", linewidth=0.9)
        axis.scatter(score_B, share_B, s=6 + 60 * count_B[used] / count_B.max(), color="#0072b2", label="bins")
        axis.set(xlabel="mean P(morph) of the bin", ylabel="share of morphs", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        axis.set_title("ECE: none" if ece is None else f"ECE {ece:.4f}", loc="left")
        axis.set_aspect("equal")
        axis.grid(visible=True)
    return figure


def report_figures(sets: Sequence[ScoredSet], baselines: Sequence[Row]) -> list[dict[str, Any]]:
    """Draw the figures of each test set: DET of all detectors; of each detector DET by tool, scores, reliability.

    A set with one tool has no DETs by tool: they are the pooled ones.
    """
    found: list[dict[str, Any]] = []
    for test_set in dict.fromkeys(scored.test_set for scored in sets):
        of_set = [scored for scored in sets if scored.test_set == test_set]
        pooled = [curve for s in of_set for curve in _curve(s.model, s, s.summary["pooled"], None)]
        pooled += [_baseline_curve(row) for row in baselines if row["test_set"] == test_set]
        dets = [det_figure(f"{test_set}: all attack tools pooled", pooled)]
        for s in of_set if any(len(s.summary["tools"]) > 1 for s in of_set) else []:
            curves = [curve for tool, row in s.summary["tools"].items() for curve in _curve(tool, s, row, tool)]
            dets.append(det_figure(f"{s.model}, by attack tool", curves))
        prefix = f"set{len(found)}"
        found.append(
            {
                "test_set": test_set,
                "dets": [_svg(figure, f"{prefix}-det{n}") for n, figure in enumerate(dets)],
                "models": [
                    {
                        "name": s.model,
                        "threshold": s.threshold,
                        "threshold_name": s.threshold_name,
                        "scores": _svg(score_figure(s), f"{prefix}-scores{n}"),
                        "reliability": _svg(reliability_figure(s), f"{prefix}-reliability{n}"),
                    }
                    for n, s in enumerate(of_set)
                ],
            }
        )
    return found


def _curve(name: str, scored: ScoredSet, row: Row, tool: str | None) -> Iterable[DetCurve]:
    """Yield the curve of one attack tool, or of all; none if a class has no score."""
    is_in = [tool is None or label == 0 or t == tool for t, label in zip(scored.tool_N, scored.label_N, strict=True)]
    chosen_N = np.array(is_in, dtype=bool) & ~np.isnan(scored.score_N)
    label_N = scored.label_N[chosen_N]
    if label_N.min(initial=1) == label_N.max(initial=0):
        return
    curve, at = error_curve(scored.score_N[chosen_N], label_N), row["at_threshold"]
    yield DetCurve(
        name=name,
        macer_T=curve.macer_T,
        bscer_T=curve.bscer_T,
        d_eer=row["d_eer"]["value"],
        limits=tuple((point["macer"], point["bscer"]) for point in row["bscer_at_macer"].values()),
        stated=(at["macer"], at["bscer"]) if at else None,
    )


def _baseline_curve(row: Row) -> DetCurve:
    """Read a baseline's curve from its file; files of older versions have only the points at the limits."""
    pooled, rates = row["summary"]["pooled"], row.get("det") or {"macer": [], "bscer": []}
    return DetCurve(
        name=row["name"],
        macer_T=np.array(rates["macer"], dtype=np.float64),
        bscer_T=np.array(rates["bscer"], dtype=np.float64),
        d_eer=pooled["d_eer"]["value"],
        limits=tuple((point["macer"], point["bscer"]) for point in pooled["bscer_at_macer"].values()),
        is_baseline=True,
    )


def det_picture(title: str, scores: ArrayLike, labels: ArrayLike) -> NDArray[np.uint8]:
    """Draw the DET curve of all attacks as an RGB picture (3, H, W)."""
    curve = error_curve(scores, labels)
    points = DetCurve(name="all attacks", macer_T=curve.macer_T, bscer_T=curve.bscer_T, d_eer=d_eer(curve).value)
    canvas = FigureCanvasAgg(det_figure(title, [points]))
    canvas.draw()  # type: ignore[no-untyped-call]
    rgb_HWC = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(rgb_HWC.transpose(2, 0, 1))


def det_points(scores: ArrayLike, labels: ArrayLike) -> dict[str, list[float]]:
    """Return the visible points of a DET curve, for a file: {"macer": [...], "bscer": [...]}."""
    curve = error_curve(scores, labels)
    seen_T = _visible(probit(curve.macer_T), probit(curve.bscer_T))
    return {"macer": curve.macer_T[seen_T].tolist(), "bscer": curve.bscer_T[seen_T].tolist()}


def probit(rate_T: ArrayLike, ends: tuple[float, float] = DET_ENDS) -> Floats:
    """Place rates (T) on a probit axis; those beyond its ends are drawn at the end."""
    probit_T: Floats = ndtri(np.clip(rate_T, *ends))
    return probit_T


def _staircase(x_T: Floats, y_T: Floats) -> tuple[Floats, Floats]:
    """Keep the points that a staircase needs: one in each cell of the grid, then the ends of straight runs."""
    seen_T = _visible(x_T, y_T)
    x_T, y_T = x_T[seen_T], y_T[seen_T]
    keep_T = np.ones(len(x_T), dtype=bool)
    for z_T in (x_T, y_T):
        keep_T[1:-1] &= (z_T[1:-1] != z_T[:-2]) | (z_T[1:-1] != z_T[2:])
    return x_T[keep_T], y_T[keep_T]


def _visible(x_T: Floats, y_T: Floats) -> NDArray[np.bool_]:
    cell_2T = np.round(np.stack([x_T, y_T]) / _GRID)
    seen_T = np.ones(len(x_T), dtype=bool)
    seen_T[1:-1] = (cell_2T[:, 1:-1] != cell_2T[:, :-2]).any(axis=0)
    return seen_T


def _draw_markers(axis: Axes, points: Sequence[tuple[float, float]], marker: str, edge: str, face: str) -> None:
    rates_N2 = np.array(points, dtype=np.float64).reshape(-1, 2)
    x_N, y_N = probit(rates_N2[:, 0]), probit(rates_N2[:, 1])
    axis.plot(x_N, y_N, marker, markersize=4.5, markeredgecolor=edge, markerfacecolor=face, zorder=3)


def _histogram(axis: Axes, score_N: Floats, colour: str) -> None:
    share_B = np.histogram(score_N, _BINS, (0, 1))[0] / max(1, len(score_N))
    top = float(share_B.max()) or 1.0
    axis.stairs(share_B, np.linspace(0, 1, _BINS + 1), fill=True, color=colour, alpha=0.75)
    axis.set(ylim=(-0.22 * top, 1.05 * top), yticks=[0, top], yticklabels=["0", f"{100 * top:.0f} %"])


def _rug(axis: Axes, score_N: Floats) -> None:
    """Draw a tick below the axis at each score, one for all scores that agree to three decimals."""
    at_N = np.unique(score_N.round(3))
    low = axis.get_ylim()[0]
    x_3N = np.stack([at_N, at_N, np.full_like(at_N, np.nan)])
    y_3N = np.broadcast_to(np.array([[0.25 * low], [0.95 * low], [np.nan]]), x_3N.shape)
    axis.plot(x_3N.T.ravel(), y_3N.T.ravel(), color="black", linewidth=0.6, label="rug")


def _groups(scored: ScoredSet) -> list[tuple[str, int, Floats]]:
    """Bona fides, then each tool in the order of the summary and of the DET figure: (name, label, scores)."""
    tool_N, read_N = np.array(scored.tool_N, dtype=object), ~np.isnan(scored.score_N)
    groups = [("bona fide", 0, scored.score_N[read_N & (scored.label_N == 0)])]
    morph_N = read_N & (scored.label_N == 1)
    return groups + [(tool, 1, scored.score_N[morph_N & (tool_N == tool)]) for tool in scored.summary["tools"]]


def _look(number: int) -> tuple[str, Any, str]:
    """Return colour, dashes and marker; they repeat after 7, 6 and 11, so the first 462 combinations are distinct."""
    return tuple(kind[number % len(kind)] for kind in (_COLOURS, _DASHES, _MARKERS))  # type: ignore[return-value]


def _label(text: str) -> str:
    """Shorten a name to fit a figure, and escape letters that its font may lack."""
    shown = "".join(c if c.isprintable() and c < "\u0180" else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= _LABEL_LENGTH else shown[: _LABEL_LENGTH - 3] + "..."


def _svg(figure: Figure, name: str) -> Markup:
    """Turn a figure into an element of the page; its ids get a prefix, because a page must not repeat one."""
    file = io.StringIO()
    with style.context(_STYLE):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :], count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text)
