"""The report: nothing from elsewhere, nothing of the data runs, every edge of an evaluation has a page."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from trainer.metrics import error_curve, summarise
from trainer.report import DetCurve, HardSample, ScoredSet, det_figure, report_html

EVIL = '<img src=x onerror="alert(1)">'


def scored(
    score_N: np.ndarray, label_N: np.ndarray, *, threshold: float | None = 0.5, tool: str = "splice"
) -> ScoredSet:
    tools = [tool if label else "" for label in label_N]
    read_N = ~np.isnan(score_N)
    chosen = np.flatnonzero(read_N)
    summary = summarise(
        score_N[read_N], label_N[read_N], [tools[i] for i in chosen], threshold=threshold, num_replicates=20
    )
    return ScoredSet(
        model="lora",
        test_set="frll",
        score_N=score_N,
        label_N=label_N,
        tool_N=tools,
        key_N=[f"k{i}{EVIL}" for i in range(len(score_N))],
        threshold=threshold,
        threshold_name="d_eer",
        summary=summary,
    )


def evaluation(found: ScoredSet, **changes: Any) -> dict[str, Any]:
    label_N = found.label_N
    model = {
        "name": "lora",
        "path": "runs/lora",
        "step": 10,
        "mode": "LoRA",
        "init": "runs/base",
        "train_data": "train/*.tar",
        "selection": {"data": "val/*.tar", "d_eer": 0.1},
        "calibration": {"slope": 1.0, "offset": 0.0},
        "thresholds": {"d_eer": found.threshold},
        "preprocessing": {"image_size": 32, "view": "centre"},
    }
    test_set = {
        "name": "frll",
        "shards": ["frll/a.tar"],
        "fingerprint": "abc",
        "num_bona_fide": int((label_N == 0).sum()),
        "num_morphs": int((label_N == 1).sum()),
        "tools": {name: found.tool_N.count(name) for name in sorted(set(found.tool_N) - {""})},
        "num_failed": int(np.isnan(found.score_N).sum()),
    }
    record = {
        "version": 1,
        "created": "2026-11-24",
        "versions": {"torch": "2"},
        "command": "evaluate",
        "warnings": [],
        "models": [model],
        "test_sets": [test_set],
        "results": [{"model": "lora", "test_set": "frll", "summary": found.summary}],
        "baselines": [],
    }
    return record | changes


def hard(found: ScoredSet, attention: np.ndarray | None) -> HardSample:
    image = np.full((32, 32, 3), 90, np.uint8)
    return HardSample(
        model="lora",
        test_set="frll",
        key=found.key_N[0],
        label=0,
        tool="",
        score=0.9,
        image_HWC=image,
        attention_HW=attention,
    )


GENERATOR = np.random.default_rng(0)
LABELS = np.arange(60) % 2
SCORES = np.clip(0.3 * LABELS + GENERATOR.random(60) * 0.7, 0, 1)


@pytest.mark.parametrize(
    "found",
    [
        scored(SCORES, LABELS),
        scored(SCORES, LABELS, threshold=None),
        scored(np.full(60, 0.5), LABELS),
        scored(np.array([0.2, 0.4, 0.9]), np.array([0, 0, 1])),
        scored(np.where(np.arange(60) == 7, np.nan, SCORES), LABELS),
        scored(SCORES, LABELS, tool=EVIL),
    ],
)
def test_every_evaluation_has_a_page_that_loads_nothing_and_runs_nothing(found: ScoredSet) -> None:
    page = report_html(
        evaluation(found, warnings=[EVIL]), [found], [hard(found, None), hard(found, np.eye(4, dtype=np.float32))]
    )
    assert EVIL not in page
    assert "<script" not in page
    for attribute in ('src="http', 'href="http', "src='http", "url(http", "@import"):
        assert attribute not in page
    assert page == report_html(
        evaluation(found, warnings=[EVIL]), [found], [hard(found, None), hard(found, np.eye(4, dtype=np.float32))]
    )


def test_det_axes_are_normal_quantiles_of_the_rates() -> None:
    curve = error_curve(SCORES, LABELS)
    figure = det_figure("t", [DetCurve(name="lora", macer_T=curve.macer_T, bscer_T=curve.bscer_T, d_eer=0.2)])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 10]
    x, y = np.asarray(lines[0].get_xdata()), np.asarray(lines[0].get_ydata())
    corners = np.stack([np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]], axis=1)  # what "steps-post" draws
    inside = (curve.macer_T > 0.01) & (curve.macer_T < 0.99) & (curve.bscer_T > 0.01) & (curve.bscer_T < 0.99)
    assert inside.sum() > 20
    for point in norm.ppf(np.stack([curve.macer_T, curve.bscer_T], axis=1)[inside]):
        low, high = np.minimum(corners[:-1], corners[1:]), np.maximum(corners[:-1], corners[1:])
        assert np.linalg.norm(point - point.clip(low, high), axis=1).min() < 0.02
