"""The report of an evaluation: one self-contained HTML page, for people who decide about a detector.

Tables come from the evaluation's JSON, figures from the scores. The page has no script and forbids loading anything;
figures are SVG, faces are JPEG inside the page. Equal input gives equal bytes. Names and keys come from data, so all of
them are escaped.

Shapes: N samples, T thresholds, B bins; HWC, HW images.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainer.detection.error_rates import FEW_IDENTITIES, clopper_pearson
from trainer.detection.figures import Row, ScoredSet, percent, report_figures

_TILE_PIXELS = 128
_MAX_TABLE_COLUMNS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class HardSample:
    """A sample that a model classified wrongly, or almost."""

    model: str
    test_set: str
    key: str
    label: int
    tool: str
    score: float
    image_HWC: NDArray[np.uint8]
    attention_HW: NDArray[np.float32] | None
    """Attention of any size and scale; it covers the whole image."""


def report_html(evaluation: dict[str, Any], sets: Sequence[ScoredSet], hardest: Sequence[HardSample]) -> str:
    """Return the page, in ASCII, which is the same in every encoding.

    Args:
        evaluation: JSON of the run. Tables show its results and baselines, models and test sets in its order.
        sets: scores, for the figures and the counts of failures.
        hardest: of each model, test set and class; the worst are shown first.
    """
    filters: dict[str, Callable[..., Any]] = {
        f.__name__: f for f in (percent, interval, format_interval, count, decimal, plain, heat, row_facts)
    }
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    page = environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        matrices=_matrices(evaluation["test_sets"]),
        detectors=_detectors(evaluation),
        threshold_names={(scored.model, scored.test_set): scored.threshold_name for scored in sets},
        figures=report_figures(sets, evaluation.get("baselines") or []),
        failures=[_failures(scored) for scored in sets],
        hard=_hard_groups(hardest, sets),
        resampled=_resampled(evaluation),
        few=FEW_IDENTITIES,
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


# ---------------------------------------------------------------------------------------------- numbers as text


def interval(limits: Sequence[float] | None) -> str:
    """Write "[2.38, 8.83 %]", or "no interval" if there is none."""
    if limits is None or any(x is None or not math.isfinite(x) for x in limits):
        return "no interval"
    low, high = (percent(x) for x in limits)
    return f"[{low.removesuffix(' %')}, {high}]"


def format_interval(limits: Sequence[float] | None, total: int | None = None) -> str:
    """Write the interval of a bootstrap; if all replicates are equal, the exact interval of ``total`` trials, if given.

    A rate of zero is zero in every replicate, so the bootstrap gives [0, 0 %], which claims a certainty that does not
    exist. No error in 204 trials becomes "0 of 204 [0, 1.79 %]".
    """
    if limits is None or tuple(limits) not in ((0, 0), (1, 1)):
        return interval(limits)
    if total is None:
        return "no interval"
    num_errors = round(limits[0] * total)
    return f"{num_errors} of {total} {interval(clopper_pearson(num_errors, total))}"


def count(rate: float | None, total: int) -> str:
    """Write a rate as a count, "10 of 204"."""
    return "-" if rate is None else f"{round(rate * total)} of {total}"


def decimal(value: float | str | None) -> str:
    """Write a threshold, AUC or ECE with four digits; None is infinity, for which JSON has no number."""
    number = math.inf if value is None else float(value)
    if not math.isfinite(number):
        return "infinite" if number > 0 else "minus infinite"
    return f"{number:.4f}"


def plain(value: Any) -> str:
    """Write settings for people: "size: 224, crop: centre"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(x)}" for key, x in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(plain(x) for x in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value in (None, "") else str(value)


def heat(rate: float | None) -> str:
    """Return a light colour for an error rate: white at 0, red from 50 %, with more contrast at low rates."""
    share = 0.0 if rate is None or not math.isfinite(rate) else math.sqrt(min(max(rate, 0.0), 0.5) / 0.5)
    return "#" + "".join(f"{round(255 + share * (full - 255)):02x}" for full in (238, 130, 98))


def row_facts(row: Row) -> list[tuple[str, str, str]]:
    """List all figures of a row of a summary as (name, text, small print)."""
    eer, auc, totals = row["d_eer"], row["auc"], {"macer": row["num_morphs"], "bscer": row["num_bona_fide"]}
    both = f"rates {percent(eer['low'])} and {percent(eer['high'])}, threshold {decimal(eer['threshold'])}"
    facts = [
        ("Samples", f"{row['num_bona_fide']} bona fides, {row['num_morphs']} morphs", ""),
        ("D-EER", f"{percent(eer['value'])}, {format_interval(eer['ci'])}", both),
    ]
    for fixed, other in (("macer", "bscer"), ("bscer", "macer")):
        for limit, point in row[f"{other}_at_{fixed}"].items():
            text = f"{percent(point[other])}, {format_interval(point['ci'], totals[other])}"
            reached = f"{fixed.upper()} {percent(point[fixed])}, threshold {decimal(point['threshold'])}"
            facts.append((f"{other.upper()}@{fixed.upper()}={limit}", text, reached))
    limits = "[{}, {}]".format(*(decimal(x) for x in auc["ci"])) if auc["ci"] else "no interval"
    facts.append(("AUC", f"{decimal(auc['value'])}, {limits}", ""))
    facts.append(("ECE", "-" if row["ece"] is None else decimal(row["ece"]), ""))
    at = row["at_threshold"]
    for name, total in totals.items() if at else ():
        text = f"{percent(at[name])}, {count(at[name], total)}; if images were independent {interval(at[f'{name}_ci'])}"
        clustered = f"over {resampled(row)} {format_interval(at[f'{name}_cluster_ci'])}"
        facts.append((f"{name.upper()}({decimal(at['threshold'])})", text, clustered))
    used = f"{row['num_replicates']} used, {row['num_skipped_replicates']} skipped"
    return [*facts, ("Bootstrap replicates", used, f"drawing {resampled(row)}")]


def resampled(row: Row) -> str:
    """Return the units that the bootstrap drew; files of older versions do not record them and drew identities."""
    return str(row.get("resampled", "identities"))


# ---------------------------------------------------------------------------------------------- tables


def _resampled(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """List the units that bootstraps drew, each with its test sets."""
    found: dict[str, dict[str, None]] = {}
    for result in evaluation["results"]:
        found.setdefault(resampled(result["summary"]["pooled"]), {})[result["test_set"]] = None
    return [(unit, list(names)) for unit, names in found.items()]


def _detectors(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """List models, then baselines, each with its summary on every test set."""
    found = [(m["name"], m["train_data"], evaluation["results"], "model") for m in evaluation["models"]]
    baselines = evaluation.get("baselines") or []
    found += [(name, "", baselines, "name") for name in dict.fromkeys(b["name"] for b in baselines)]
    return [
        {
            "name": name,
            "train_data": data,
            "is_baseline": key == "name",
            "summaries": {r["test_set"]: r["summary"] for r in results if r[key] == name},
        }
        for name, data, results, key in found
    ]


def _matrices(test_sets: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split the test sets into tables that fit on a page; a column is a tool, or None for all tools of several."""
    tables: list[list[dict[str, Any]]] = []
    width = 0
    for test_set in test_sets:
        tools = list(test_set["tools"])
        columns = tools if len(tools) == 1 else [None, *tools]
        if not tables or width + len(columns) > _MAX_TABLE_COLUMNS:
            tables.append([])
            width = 0
        tables[-1].append({"name": test_set["name"], "columns": columns})
        width += len(columns)
    return tables


def _failures(scored: ScoredSet) -> dict[str, Any]:
    """Count failures to process, and both error rates without them and with them as errors, as (errors, samples)."""
    failed_N, t = np.isnan(scored.score_N), scored.threshold
    found: dict[str, Any] = {"model": scored.model, "test_set": scored.test_set, "threshold": t}
    for name, label in (("macer", 1), ("bscer", 0)):
        score_N = scored.score_N[scored.label_N == label]
        num_failed, total = int(np.isnan(score_N).sum()), len(score_N)
        found[f"{name}_failed"] = (num_failed, total)
        if t is not None:
            wrong = int(np.sum(score_N < t if label else score_N >= t))  # a NaN counts in neither
            found[f"{name}_without"] = (wrong, total - num_failed)
            found[f"{name}_with"] = (wrong + num_failed, total)
    tools = [scored.tool_N[i] for i in np.flatnonzero(failed_N & (scored.label_N == 1))]
    found["tools"] = {tool: tools.count(tool) for tool in dict.fromkeys(tools)}
    return found


def _hard_groups(hardest: Sequence[HardSample], sets: Sequence[ScoredSet]) -> list[dict[str, Any]]:
    thresholds = {(scored.model, scored.test_set): scored.threshold for scored in sets}
    return [
        {
            "model": model,
            "test_set": test_set,
            "missed": _tiles(hardest, (model, test_set, 1), thresholds.get((model, test_set))),
            "alarms": _tiles(hardest, (model, test_set, 0), thresholds.get((model, test_set))),
        }
        for model, test_set in dict.fromkeys((sample.model, sample.test_set) for sample in hardest)
    ]


def _tiles(hardest: Sequence[HardSample], which: tuple[str, str, int], threshold: float | None) -> list[dict[str, Any]]:
    shown = [sample for sample in hardest if (sample.model, sample.test_set, sample.label) == which]
    shown.sort(key=lambda sample: (sample.score if sample.label else -sample.score, sample.key))
    return [_tile(sample, threshold) for sample in shown]


def _tile(sample: HardSample, threshold: float | None) -> dict[str, Any]:
    image = ImageOps.contain(Image.fromarray(sample.image_HWC).convert("RGB"), (_TILE_PIXELS, _TILE_PIXELS))
    return {
        "key": sample.key,
        "tool": sample.tool,
        "score": sample.score,
        "is_wrong": threshold is not None and (sample.score >= threshold) != bool(sample.label),
        "image": _data_uri(image),
        "overlay": None if sample.attention_HW is None else _data_uri(_overlay(image, sample.attention_HW)),
    }


def _overlay(image: Image.Image, attention_HW: NDArray[np.float32]) -> Image.Image:
    """Colour a picture by its attention, scaled from its lowest to its highest value."""
    low_HW = np.nan_to_num(attention_HW).astype(np.float32)
    span = float(np.ptp(low_HW))
    unit_HW = (low_HW - low_HW.min()) / span if span > 0 else np.zeros_like(low_HW)
    large_HW = np.asarray(Image.fromarray(unit_HW).resize(image.size, Image.Resampling.BILINEAR))
    colour_HWC = (255 * colormaps["inferno"](large_HW)[..., :3]).round().astype(np.uint8)
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), Image.fromarray(colour_HWC), 0.5)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
