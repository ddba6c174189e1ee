"""A self-contained HTML page of an evaluation: tables with intervals, DET curves, histograms, hardest images.

Nothing is loaded from elsewhere: curves are inline SVG, pictures are data URIs, so the page can be archived with an
audit. Equal input gives equal bytes.

Shapes: N samples, T thresholds; R, C rows and columns of patches; images are HWC uint8 RGB.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import norm

from trainer.checkpoint import write_atomically
from trainer.metrics import ErrorCurve, error_curve

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_SMALLEST, _LARGEST = 0.0005, 0.95
_SHARED: Any = {"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
_BINS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSet:
    """One model on one test set."""

    model: str
    test_set: str
    key_N: list[str]
    label_N: NDArray[np.int64]
    tool_N: list[str]
    score_N: NDArray[np.float64]
    """P(morph); NaN where the image could not be read."""
    code_N: list[str]
    threshold: float
    threshold_name: str
    summary: dict[str, Any]
    """What `trainer.metrics.summarise` returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardSample:
    """An image on which a model was wrong, or nearly."""

    model: str
    test_set: str
    key: str
    label: int
    tool: str
    score: float
    image_HWC: NDArray[np.uint8]
    attention_RC: NDArray[np.float32]


def write_report(
    path: Path, evaluation: dict[str, Any], scored: Sequence[ScoredSet], hardest: Sequence[HardSample]
) -> None:
    """Write the page, whole or not at all."""
    by_set = {name: [s for s in scored if s.test_set == name] for name in dict.fromkeys(s.test_set for s in scored)}
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"percent": _percent, "interval": _interval}
    template = pages.from_string(Path(__file__).with_name("report.html.jinja").read_text())
    curves = {name: _svg(det_figure(_pooled_and_tools(sets))) for name, sets in by_set.items()}
    spread = {f"{s.model} on {s.test_set}": _svg(score_figure(s)) for s in scored}
    text = template.render(
        evaluation=evaluation,
        rows=evaluation["results"] + [row | {"model": row["name"]} for row in evaluation["baselines"]],
        matrix=_matrix(evaluation),
        curves=curves,
        spread=spread,
        hardest=[_thumbnail(sample) for sample in hardest],
    )
    write_atomically(path, text)


def det_figure(curves: Iterable[tuple[str, ErrorCurve]]) -> Figure:
    """Draw detection error trade-offs, both axes on the scale of the normal quantile (Martin et al. 1997).

    Args:
        curves: name and error rates; rates beyond the axes are drawn at their ends.
    """
    with mpl.rc_context(_SHARED):
        figure = Figure(figsize=(5.6, 5.0), layout="constrained")
        axes = figure.subplots()
        low, high = norm.ppf([_SMALLEST, _LARGEST])
        axes.plot([low, high], [low, high], color="#bbbbbb", linewidth=0.8)
        for i, (name, curve) in enumerate(curves):
            style: Any = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3]}
            axes.step(probit(curve.macer_T), probit(curve.bscer_T), where="post", label=name, linewidth=1.4, **style)
        places = norm.ppf(_TICKS)
        labels = [f"{100 * tick:g}" for tick in _TICKS]
        axes.set_xticks(places, labels)
        axes.set_yticks(places, labels)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel="MACER [%] (attacks accepted)")
        axes.set_ylabel("BSCER [%] (bona fides stopped)")
        axes.grid(color="#eeeeee", linewidth=0.6)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right")
        return figure


def probit(rate_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the normal quantile of error rates, cut at the ends of the axes."""
    return np.asarray(norm.ppf(np.clip(rate_T, _SMALLEST, _LARGEST)))


def score_figure(found: ScoredSet) -> Figure:
    """Draw the shares of bona fides and of each tool's morphs by score, and the threshold."""
    with mpl.rc_context(_SHARED):
        figure = Figure(figsize=(5.6, 2.4), layout="constrained")
        axes = figure.subplots()
        tools, edges = np.array(found.tool_N, dtype=object), np.linspace(0, 1, _BINS + 1)
        groups = [("bona fide", found.label_N == 0)]
        groups += [(name, tools == name) for name in sorted(set(found.tool_N) - {""})]
        for i, (name, chosen_N) in enumerate(groups):
            score_M = found.score_N[chosen_N & ~np.isnan(found.score_N)]
            share_B = np.histogram(score_M, edges)[0] / max(1, len(score_M))
            colour = _COLOURS[i % len(_COLOURS)]
            axes.stairs(share_B, edges, label=f"{name} ({len(score_M)})", color=colour, linewidth=1.4)
        if np.isfinite(found.threshold):
            axes.axvline(found.threshold, color="#999999", linewidth=1, linestyle="--")
        axes.set(xlim=(0, 1), xlabel="P(morph)", ylabel="share of images")
        axes.legend(fontsize=7.5, frameon=False)
        return figure


def _pooled_and_tools(sets: Sequence[ScoredSet]) -> Iterable[tuple[str, ErrorCurve]]:
    """Yield each model's curve over all attacks; for a single model also one for each tool."""
    for found in sets:
        read_N = ~np.isnan(found.score_N)
        score_N, label_N = found.score_N[read_N], found.label_N[read_N]
        value = found.summary["pooled"]["d_eer"]["value"]
        yield f"{found.model} (D-EER {_percent(value)})", error_curve(score_N, label_N)
        tools = np.array(found.tool_N, dtype=object)[read_N]
        names = sorted(set(tools[label_N == 1]))
        for name in names if len(sets) == 1 and len(names) > 1 else ():
            chosen_N = (label_N == 0) | (tools == name)
            value = found.summary["tools"][name]["d_eer"]["value"]
            yield f"{name} (D-EER {_percent(value)})", error_curve(score_N[chosen_N], label_N[chosen_N])


def _matrix(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Arrange the D-EER of every model and baseline against every tool of every test set."""
    columns = [(s["name"], tool) for s in evaluation["test_sets"] for tool in s["tools"]]
    names = [m["name"] for m in evaluation["models"]]
    names += [row["name"] for row in evaluation["baselines"] if row["name"] not in names]
    found = {
        (result.get("model", result.get("name")), result["test_set"], tool): row["d_eer"]["value"]
        for result in [*evaluation["results"], *evaluation["baselines"]]
        for tool, row in result["summary"]["tools"].items()
    }
    trained_on = {m["name"]: m["data"] for m in evaluation["models"]}
    rows = [
        (name, trained_on.get(name, "hand-made features"), [found.get((name, *column)) for column in columns])
        for name in dict.fromkeys(names)
    ]
    return {"columns": columns, "rows": rows}


def _thumbnail(sample: HardSample) -> dict[str, Any]:
    """Draw an image beside itself with the attention laid over."""
    height, width = sample.image_HWC.shape[:2]
    grown = Image.fromarray((255 * sample.attention_RC).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    flow_HW1 = np.asarray(grown, dtype=np.float32)[..., None] / 255
    heat_HWC = mpl.colormaps["inferno"](flow_HW1[..., 0])[..., :3].astype(np.float32) * 255
    overlay_HWC = (0.45 * sample.image_HWC + 0.55 * heat_HWC).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    both = Image.fromarray(np.concatenate([sample.image_HWC, overlay_HWC], axis=1))
    both.thumbnail((2 * 160, 160))
    both.save(file, "JPEG", quality=88)
    picture = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    kind = "false alarm" if sample.label == 0 else "missed morph"
    return {"sample": sample, "picture": picture, "kind": kind}


def _svg(figure: Figure) -> Markup:
    file = io.StringIO()
    with mpl.rc_context(_SHARED):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])  # matplotlib escapes the texts in it


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def _interval(pair: Sequence[float] | None) -> str:
    return "" if not pair else f"[{100 * pair[0]:.2f}, {100 * pair[1]:.2f}]"
