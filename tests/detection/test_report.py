import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from trainer.detection.error_rates import clopper_pearson, error_curve, summarise
from trainer.detection.figures import (
    DetCurve,
    ScoredSet,
    det_figure,
    det_picture,
    det_points,
    percent,
    reliability_figure,
    score_figure,
)
from trainer.detection.report import HardSample, decimal, format_interval, heat, interval, plain, report_html

VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}
HOSTILE = "</svg></style><script>alert(1)</script>\"'><img src=x onerror=y>_$x_{$&amp;\x01\u00fc\u5b57\ud800"
EDGE, TOP = 0.0005, 0.99


class Page(HTMLParser):
    """What a page holds: its elements, whether they nest, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ["document"]
        self.feed(html)
        self.close()
        assert self._open == ["document"], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] != "style":
            self.text = f"{self.text} {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def scored(
    model: str = "lora",
    test_set: str = "frll",
    tools: dict[str, int] | None = None,
    *,
    num_bona_fide: int = 40,
    shift: float = 2.0,
    threshold: float | None = 0.5,
    threshold_name: str = "macer_0.10",
    num_failed: int = 0,
    constant: float | None = None,
    num_replicates: int = 20,
) -> ScoredSet:
    """A model that separates the classes by ``shift`` sigmas; every eleventh score fails, up to ``num_failed``."""
    tools = tools or {"opencv": 30, "stylegan": 20}
    rng = np.random.default_rng([len(model), len(test_set), num_bona_fide])
    label_N = np.repeat([0, 1], [num_bona_fide, sum(tools.values())])
    tool_N = [""] * num_bona_fide + [tool for tool, number in tools.items() for _ in range(number)]
    score_N = 1 / (1 + np.exp(-rng.normal(size=len(label_N)) - shift * (label_N - 0.5)))
    if constant is not None:
        score_N[:] = constant
    score_N[::11][:num_failed] = np.nan
    read_N = ~np.isnan(score_N)
    names = [tool for tool, is_read in zip(tool_N, read_N, strict=True) if is_read]
    people = [(f"p{i % 17}",) for i in range(read_N.sum())]
    summary = summarise(
        score_N[read_N], label_N[read_N], names, people, threshold=threshold, num_replicates=num_replicates
    )
    return ScoredSet(
        model=model,
        test_set=test_set,
        score_N=score_N,
        label_N=label_N,
        tool_N=tool_N,
        key_N=[f"{test_set}/{i:04d}" for i in range(len(label_N))],
        threshold=threshold,
        threshold_name=threshold_name,
        summary=summary,
    )


def evaluation_of(sets: Sequence[ScoredSet], **changes: Any) -> dict[str, Any]:
    models = [
        {
            "name": name,
            "path": "runs/lora/detector",
            "step": 1200,
            "mode": "LoRA r=4",
            "init": "runs/mae/step-00080000",
            "train_data": "SMDD",
            "selection": {"data": "SMDD-val", "d_eer": 0.0321},
            "calibration": {"slope": 0.91, "offset": -0.125},
            "thresholds": {"d_eer": 0.5, "bscer_0.01": "inf"},
            "preprocessing": {"image_size": 224, "mean": [0.5, 0.4]},
        }
        for name in dict.fromkeys(s.model for s in sets)
    ]
    test_sets = [
        {
            "name": s.test_set,
            "shards": "/data/frll/*.tar",
            "fingerprint": "9b1d2e77",
            "num_bona_fide": int((s.label_N == 0).sum()),
            "num_morphs": int((s.label_N == 1).sum()),
            "tools": {tool: s.tool_N.count(tool) for tool in dict.fromkeys(s.tool_N) if tool},
            "num_failed": int(np.isnan(s.score_N).sum()),
        }
        for s in {s.test_set: s for s in sets}.values()
    ]
    results = [{"model": s.model, "test_set": s.test_set, "summary": s.summary} for s in sets]
    return {
        "version": 1,
        "created": "2025-11-04T14:12:09",
        "versions": {"torch": "2.14.0"},
        "command": "launch/evaluate.py --data x.tar",
        "models": models,
        "test_sets": test_sets,
        "warnings": [],
        "results": results,
    } | changes


def hard(number: int = 0, *, label: int = 1, score: float = 0.1, **changes: Any) -> HardSample:
    image_HWC = np.full((60, 40, 3), 10 * number % 250, dtype=np.uint8)
    tool = "opencv" if label else ""
    sample = HardSample(
        model="lora",
        test_set="frll",
        key=f"key{number:03d}",
        label=label,
        tool=tool,
        score=score,
        image_HWC=image_HWC,
        attention_HW=None,
    )
    return replace(sample, **changes)


def page_of(sets: Sequence[ScoredSet], hardest: Sequence[HardSample] = (), **changes: Any) -> Page:
    return Page(report_html(evaluation_of(sets, **changes), sets, hardest))


@pytest.fixture(scope="module")
def four() -> list[ScoredSet]:
    """Two models on two test sets with tools of their own."""
    return [
        scored(model, test_set, tools, shift=shift, num_failed=3)
        for model, shift in (("lora", 2.5), ("linear", 1.0))
        for test_set, tools in (("frll", {"amsl": 30, "webmorph": 25}), ("mad22", {"mipgan": 20, "mordiff": 41}))
    ]


@pytest.fixture(scope="module")
def html(four: list[ScoredSet]) -> str:
    """Their page, with a baseline, a warning, two faces and one attention map."""
    hardest = [hard(), hard(1, label=0, attention_HW=np.eye(14, dtype=np.float32))]
    baselines = [{"name": "file size", "test_set": "frll", "summary": scored(shift=0.2).summary}]
    return report_html(evaluation_of(four, warnings=["3 people are in both"], baselines=baselines), four, hardest)


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_nests_and_names_every_id_once(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {a.get(name) for _, a in page.elements for name in ("href", "xlink:href")} - {None}
    assert references, "there are links"
    assert all(reference and reference[1:] in ids for reference in references)


def test_the_page_loads_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert html.isascii()
    assert "http" not in re.sub(r'(src="data:[^"]*"|http-equiv=)', "", html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "image"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                assert value is not None
                assert value.startswith(("#", "data:image/jpeg;base64,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert "@import" not in html
    assert sum(tag == "img" for tag, _ in page.elements) == 3, "two faces and one attention map"
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_and_keys_from_data_stay_text() -> None:
    one = scored(HOSTILE + "m", HOSTILE + "s", {HOSTILE + "t": 9, "x": 8}, threshold_name=HOSTILE)
    evaluation = evaluation_of([one], warnings=[HOSTILE + "w"], command=HOSTILE, versions={HOSTILE: HOSTILE})
    evaluation["models"][0] |= {
        "path": HOSTILE,
        "train_data": [HOSTILE],
        "thresholds": {HOSTILE: 0.5},
        "preprocessing": {HOSTILE: HOSTILE},
        "selection": {"data": HOSTILE, "d_eer": None},
    }
    evaluation["baselines"] = [{"name": HOSTILE, "test_set": one.test_set, "summary": one.summary}]
    hardest = [replace(hard(), model=one.model, test_set=one.test_set, key=HOSTILE, tool=HOSTILE)]
    html = report_html(evaluation, [one], hardest)
    page = Page(html)
    assert "<script" not in html
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags
    assert sum(tag == "img" for tag, _ in page.elements) == 1, "only the face"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 15
    assert page.text.count("$x_{$&amp;") >= 15, "neither mathematics nor an entity"


def test_models_test_sets_tools_and_warnings_are_named(html: str) -> None:
    page = Page(html)
    for name in ("lora", "linear", "frll", "mad22", "amsl", "webmorph", "mipgan", "mordiff", "file size"):
        assert name in page.words
    for fact in ("SMDD-val", "runs/mae/step-00080000", "9b1d2e77", "image_size: 224", "mean: 0.5 0.4", "torch 2.14.0"):
        assert fact in page.words
    for fact in ("0.91 logit -0.125", "bscer_0.01: infinite", "launch/evaluate.py --data x.tar", "LoRA r=4", "3.21 %"):
        assert fact in page.words
    assert page.words.index("3 people are in both") < page.words.index("Results All attack tools"), "on top"
    assert "Read this first" not in page_of([scored()]).words


def test_every_figure_of_a_summary_is_shown(four: list[ScoredSet], html: str) -> None:
    words = Page(html).words
    for s in four:
        for row in (s.summary["pooled"], *s.summary["tools"].values()):
            assert f"D-EER {percent(row['d_eer']['value'])}" in words, "in the legend of a DET figure"
            assert f"{percent(row['d_eer']['value'])}, {format_interval(row['d_eer']['ci'])}" in words
            assert f"rates {percent(row['d_eer']['low'])} and {percent(row['d_eer']['high'])}" in words
            for fixed, other, total in (("macer", "bscer", "num_bona_fide"), ("bscer", "macer", "num_morphs")):
                for limit, point in row[f"{other}_at_{fixed}"].items():
                    assert f"{other.upper()}@{fixed.upper()}={limit}" in words
                    assert f"{percent(point[other])}, {format_interval(point['ci'], row[total])}" in words
                    reached = f"{fixed.upper()} {percent(point[fixed])}, threshold {decimal(point['threshold'])}"
                    assert reached in words
            assert f"{row['auc']['value']:.4f}, [" in words
            assert f"{row['ece']:.4f}" in words
            for name, total in (("macer", "num_morphs"), ("bscer", "num_bona_fide")):
                at, n = row["at_threshold"], row[total]
                exact = f"if images were independent {interval(clopper_pearson(round(at[name] * n), n))}"
                counted = f"{percent(at[name])}, {round(at[name] * n)} of {n}; {exact}"
                assert f"{counted} over identities {format_interval(at[f'{name}_cluster_ci'])}" in words
            used = f"{row['num_replicates']} used, {row['num_skipped_replicates']} skipped drawing identities"
            assert used in words
        assert f"{s.summary['worst']['d_eer_tool']} {percent(s.summary['worst']['d_eer'])}" in words


def test_the_matrix_frames_the_worst_tool_of_each_detector_on_each_set(four: list[ScoredSet], html: str) -> None:
    framed = re.findall(r'<td class="worst" style="background: (#\w+)">([^<]*)<', html)
    expected = [(heat(s.summary["worst"]["d_eer"]), percent(s.summary["worst"]["d_eer"])) for s in four]
    assert framed == expected


def test_a_set_with_one_tool_shows_nothing_twice() -> None:
    """All tools pooled are that tool: one column, no frame, and one DET figure for all detectors."""
    sets = [scored(model, tools={"splice": 30}) for model in ("lora", "linear")]
    html = report_html(evaluation_of(sets), sets, [])
    matrix = html.partition('<table class="heat">')[2].partition("</table>")[0]
    assert re.findall(r'<th scope="col">([^<]*)</th>', matrix) == ["splice"]
    assert 'class="worst"' not in html
    assert html.count("BSCER: bona fides taken for morphs [%]") == 1
    several = [scored(model) for model in ("lora", "linear")]
    assert report_html(evaluation_of(several), several, []).count("BSCER: bona fides taken for morphs [%]") == 3


def test_many_test_sets_make_several_matrices_and_a_pair_that_was_not_run_is_a_dash() -> None:
    sets = [scored("lora", f"set{n}", {f"tool{n}{i}": 4 for i in range(5)}, num_bona_fide=9) for n in range(3)]
    evaluation = evaluation_of([*sets, replace(sets[0], model="other")])
    page = Page(report_html(evaluation, [], []))
    assert sum(attributes.get("class") == "heat" for _, attributes in page.elements) == 2
    assert page.words.count("other SMDD") == 2
    assert "SMDD - - - - -" in page.words


# ---------------------------------------------------------------------------------------------- failures, hard cases


def test_failures_are_counted_out_and_in() -> None:
    score_N = np.array([0.1, 0.9, np.nan, 0.2, 0.8, np.nan, np.nan, 0.3])
    one = scored(tools={"a": 3, "b": 2}, num_bona_fide=3)
    one = replace(one, score_N=score_N, key_N=[str(i) for i in range(8)], threshold=0.5)
    words = page_of([one], hardest=[]).words
    morphs, bona_fides = "40.0 % 2 of 5 a: 1 b: 1", "33.3 % 1 of 3"
    left_out, as_errors = "66.7 % 2 of 3 50.0 % 1 of 2", "80.0 % 4 of 5 66.7 % 2 of 3"
    assert f"lora frll {morphs} {bona_fides} {left_out} {as_errors}" in words
    assert "frll 3 bona fides, 5 morphs; 3 failed to process" in words


def test_the_hardest_of_each_class_are_shown_worst_first_and_wrong_decisions_are_marked() -> None:
    missed = [hard(n, score=0.9 - n / 20) for n in range(12)]  # 12 morphs, the last ones lowest
    alarms = [hard(50 + n, label=0, score=n / 10) for n in range(10)]
    page = page_of([scored()], [*missed, *alarms], num_hardest=12)
    shown = re.findall(r"key(\d+)", page.words)
    assert shown == [f"{n:03d}" for n in (*range(11, -1, -1), *range(59, 49, -1))]
    assert page.words.count(" missed key") == 3, "of 0.35 ... 0.90, those below 0.5"
    assert page.words.count(" false alarm key") == 5, "of 0.9 ... 0.0, those from 0.5"
    assert page.words.index("Morphs that look bona fide") < page.words.index("Bona fides that look like morphs")
    told = "The 12 morphs with the lowest and the 12 bona fides with the highest scores"
    assert told in page.words
    assert "None were asked for" in page_of([scored()], num_hardest=0).words


def test_a_page_without_identities_claims_no_bootstrap_over_them() -> None:
    one = scored()
    people = summarise(one.score_N, one.label_N, one.tool_N, num_replicates=20, threshold=0.5)
    words = page_of([replace(one, summary=people)]).words
    assert "95 % intervals from a bootstrap over images." in words
    assert "over images [" in words
    assert "over identities [" not in words
    assert "95 % intervals from a bootstrap over identities." in page_of([one]).words


def test_thresholds_say_what_their_limits_hold_for() -> None:
    evaluation = evaluation_of([scored(threshold=-np.inf)])
    note = "macer_0.01 is minus infinity: 98 attacks cannot guarantee 1 %: need at least 99"
    evaluation["models"][0] |= {"thresholds": {"d_eer": 0.5, "macer_0.01": "-inf"}}
    assert "limits: met on the validation data themselves" in Page(report_html(evaluation, [], [])).words
    evaluation["models"][0] |= {"threshold_rule": "expected error on new images", "threshold_notes": [note]}
    words = Page(report_html(evaluation, [scored(threshold=-np.inf)], [])).words
    assert "macer_0.01: minus infinite limits: expected error on new images" in words
    assert note in words


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(scored(constant=0.5), id="equal scores"),
        pytest.param(scored(constant=0.0), id="zeros"),
        pytest.param(scored(tools={"opencv": 1, "stylegan": 30}), id="a tool with one sample"),
        pytest.param(scored(tools={"opencv": 1}, num_bona_fide=1), id="two samples"),
        pytest.param(scored(threshold=None, threshold_name=""), id="no threshold"),
        pytest.param(scored(threshold=float("inf")), id="infinite threshold"),
        pytest.param(scored(threshold=-float("inf")), id="minus infinite threshold"),
        pytest.param(scored(shift=40), id="no errors"),
        pytest.param(scored(shift=-3), id="worse than chance"),
        pytest.param(scored(num_replicates=0), id="no bootstrap"),
        pytest.param(scored(num_bona_fide=23, tools={"all failed": 1, "opencv": 9}, num_failed=3), id="failed tool"),
        pytest.param(scored(tools={f"tool{n:02d}": 2 for n in range(31)}), id="many tools"),
    ],
)
def test_odd_sets_have_a_page_too(one: ScoredSet) -> None:
    evaluation = evaluation_of([one])
    evaluation["models"][0] |= {"calibration": None, "selection": None, "thresholds": {}, "preprocessing": {}}
    page = Page(report_html(evaluation, [one], [hard(attention_HW=np.ones((3, 3), dtype=np.float32))]))
    assert percent(one.summary["pooled"]["d_eer"]["value"]) in page.words
    assert "no validation data" in page.words
    assert all(tool in page.words for tool in evaluation["test_sets"][0]["tools"])
    assert ("no stated threshold" in page.words) == (one.threshold is None)


def test_a_model_without_scores_or_faces_has_its_tables() -> None:
    page = Page(report_html(evaluation_of([scored()]), [], []))
    assert "lora" in page.words
    assert not [tag for tag, _ in page.elements if tag == "svg"]


# ---------------------------------------------------------------------------------------------- bytes


def test_equal_input_gives_equal_bytes_whatever_matplotlib_is_set_to() -> None:
    sets, hardest = [scored()], [hard(attention_HW=np.eye(5, dtype=np.float32))]
    first = report_html(evaluation_of(sets), sets, hardest)
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "svg.hashsalt": None, "lines.linewidth": 9}):
        assert report_html(evaluation_of(sets), sets, hardest) == first
        assert mpl.rcParams["font.size"] == 20, "and puts settings back"


def test_thousands_of_samples_stay_below_three_megabytes() -> None:
    tools = {"amsl": 9000, "opencv": 9000, "stylegan": 9000}
    noise_HWC = np.random.default_rng(0).integers(0, 256, (400, 300, 3)).astype(np.uint8)
    sets, hardest = [], []
    for model in ("a", "bb", "ccc"):
        for name in ("one", "three"):
            sets.append(scored(model, name, tools, num_bona_fide=9000, shift=1.5, num_replicates=0))
            hardest += [hard(n, label=n % 2, model=model, test_set=name, image_HWC=noise_HWC) for n in range(16)]
    assert len(report_html(evaluation_of(sets), sets, hardest)) < 3e6


# ---------------------------------------------------------------------------------------------- figures


def line_of(figure: Any, label: str) -> Any:
    return next(line for line in figure.axes[0].get_lines() if line.get_label() == label)


def stairs(x_T: np.ndarray, y_T: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """Height of a descending staircase that goes right, then down."""
    assert (np.diff(x_T) >= 0).all()
    assert (np.diff(y_T) <= 0).all()
    return y_T[np.searchsorted(x_T, at_N, side="right") - 1]


def probit(rate: np.ndarray) -> np.ndarray:
    return norm.ppf(np.clip(rate, EDGE, TOP))


def test_a_det_curve_is_the_probit_of_both_rates() -> None:
    macer_T, bscer_T = np.array([0, 0.02, 0.1, 0.4, 1]), np.array([1, 0.3, 0.05, 0.01, 0])
    curve = DetCurve(name="m", macer_T=macer_T, bscer_T=bscer_T, d_eer=0.075, limits=((0.1, 0.05),), stated=(0.02, 0.3))
    figure = det_figure("title", [curve])
    line = line_of(figure, "curve-0")
    np.testing.assert_allclose(line.get_xdata(), probit(macer_T))
    np.testing.assert_allclose(line.get_ydata(), probit(bscer_T))
    assert line.get_drawstyle() == "steps-post", "never below what a threshold reaches"
    axis = figure.axes[0]
    for ticks, texts in ((axis.get_xticks(), axis.get_xticklabels()), (axis.get_yticks(), axis.get_yticklabels())):
        shown = [float(text.get_text()) / 100 for text in texts]
        assert shown == pytest.approx([0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99])
        np.testing.assert_allclose(ticks, norm.ppf(shown))
    marks = [line for line in axis.get_lines() if line.get_marker() == "o"]
    places = [mark.get_xydata()[0] for mark in marks]
    np.testing.assert_allclose(places, [probit(np.array([0.1, 0.05])), probit(np.array([0.02, 0.3]))])
    assert [mark.get_markerfacecolor() for mark in marks] == ["white", line.get_color()], "open limits, filled stated"
    diagonal = line_of(figure, "equal")
    np.testing.assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "m: D-EER 7.50 %",
        "both rates equal: D-EER",
    ]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.integers(1, 400))
def test_thinning_a_det_curve_moves_it_by_less_than_a_pixel(seed: int, honest: int, morphs: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    label_N = np.repeat([0, 1], [honest, morphs * copies])
    score_N = rng.normal(size=len(label_N)).round(int(rng.integers(0, 4))) + label_N
    curve = error_curve(score_N, label_N)
    x_T, y_T = probit(curve.macer_T), probit(curve.bscer_T)
    line = line_of(
        det_figure("", [DetCurve(name="", macer_T=curve.macer_T, bscer_T=curve.bscer_T, d_eer=0.1)]), "curve-0"
    )
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert {*zip(x, y, strict=True)} <= {*zip(x_T, y_T, strict=True)}, "points are those of the curve"
    assert (stairs(x, y, x_T) >= stairs(x_T, y_T, x_T) - 1e-12).all(), "never better than the curve"
    assert (stairs(x, y, x_T + 0.004) <= stairs(x_T, y_T, x_T) + 0.004).all(), "and worse by half a pixel at most"


def test_a_large_curve_has_few_points() -> None:
    one = scored(tools={"a": 60_000}, num_bona_fide=60_000, num_replicates=0)
    curve = error_curve(one.score_N, one.label_N)
    figure = det_figure("", [DetCurve(name="", macer_T=curve.macer_T, bscer_T=curve.bscer_T, d_eer=0.1)])
    assert len(line_of(figure, "curve-0").get_xdata()) < 3000 < len(curve.macer_T)


def test_all_det_figures_have_the_same_axes_up_to_99_percent() -> None:
    for rate in (0.01, 0.6):
        curve = DetCurve(name="", macer_T=np.array([0, rate, 1]), bscer_T=np.array([1, rate, 0]), d_eer=rate)
        axis = det_figure("", [curve]).axes[0]
        assert axis.get_xlim() == axis.get_ylim() == pytest.approx(tuple(norm.ppf([0.0005, 0.99])))


def test_curves_differ_in_grey_print_too() -> None:
    curve = DetCurve(name="c", macer_T=np.array([0, 0.1, 1]), bscer_T=np.array([1, 0.1, 0]), d_eer=0.1)
    lines = det_figure("", [curve] * 30).legends[0].get_lines()
    looks = {(str(line._dash_pattern), str(line.get_marker())) for line in lines[:-1]}
    assert len(looks) == 30


def test_baselines_are_drawn_in_grey_with_the_pooled_curves(four: list[ScoredSet]) -> None:
    one = four[0]
    read_N = ~np.isnan(one.score_N)
    row = {"name": "file size", "test_set": "frll", "summary": one.summary}
    for more in ({}, {"det": det_points(one.score_N[read_N], one.label_N[read_N])}):
        html = report_html(evaluation_of(four, baselines=[row | more]), four, [])
        assert html.count("(baseline)") == 1, "in one of the figures"
    whole, points = error_curve(one.score_N[read_N], one.label_N[read_N]), more["det"]
    pairs = set(zip(whole.macer_T.tolist(), whole.bscer_T.tolist(), strict=True))
    assert set(zip(points["macer"], points["bscer"], strict=True)) <= pairs


def test_histograms_show_shares_and_mark_the_samples_on_the_wrong_side() -> None:
    one = scored(tools={"opencv": 100, "stylegan": 3}, num_bona_fide=60, threshold=0.5)
    figure = score_figure(one)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    honest_N, opencv_N = one.score_N[:60], one.score_N[60:160]
    wrong = [int((honest_N >= 0.5).sum()), int((opencv_N < 0.5).sum()), int((one.score_N[160:] < 0.5).sum())]
    assert titles == [
        f"bona fide, 60: {wrong[0]} false alarms",
        f"opencv, 100: {wrong[1]} missed",
        f"stylegan, 3: {wrong[2]} missed",
    ]
    for axis in figure.axes:
        heights = axis.patches[0].get_data().values
        assert heights.sum() == pytest.approx(1)
        assert [line.get_xdata()[0] for line in axis.get_lines() if line.get_label() != "rug"] == [0.5]
    rugs = [np.asarray(line_of(type("F", (), {"axes": [a]}), "rug").get_xdata()) for a in figure.axes]
    expected = [honest_N[honest_N >= 0.5], opencv_N[opencv_N < 0.5], one.score_N[160:]]  # few samples: all of them
    for rug, scores in zip(rugs, expected, strict=True):
        np.testing.assert_allclose(np.unique(rug[~np.isnan(rug)]), np.unique(scores.round(3)))


def test_the_reliability_figure_agrees_with_the_ece() -> None:
    one = scored(tools={"opencv": 300}, num_bona_fide=200, num_failed=5)
    figure = reliability_figure(one)
    bins = next(c for c in figure.axes[0].collections if c.get_label() == "bins")
    points_B2, area_B = np.asarray(bins.get_offsets()), np.asarray(bins.get_sizes())
    count_B = (area_B - 6) / (area_B - 6).max()
    ece = (np.abs(points_B2[:, 0] - points_B2[:, 1]) * count_B).sum() / count_B.sum()
    assert ece == pytest.approx(one.summary["pooled"]["ece"])
    assert figure.axes[0].get_title(loc="left") == f"ECE {ece:.4f}"


# ---------------------------------------------------------------------------------------------- numbers as text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        *((None, "-"), (float("nan"), "-"), (0.0, "0 %"), (1.0, "100 %"), (10 / 204, "4.90 %"), (0.1234, "12.3 %")),
        *((0.00001, "<0.01 %"), (0.00005, "0.01 %"), (0.0999, "9.99 %"), (0.09999, "10.0 %"), (0.9999, "100.0 %")),
    ],
)
def test_a_rate_has_as_many_digits_as_it_deserves(rate: float | None, text: str) -> None:
    assert percent(rate) == text


def test_intervals_and_counts_are_written_as_people_write_them() -> None:
    assert interval(clopper_pearson(10, 204)) == "[2.38, 8.83 %]"
    assert interval(None) == interval([None, None]) == "no interval"  # type: ignore[list-item]
    assert format_interval([0.01, 0.02], 204) == "[1.00, 2.00 %]"


def test_a_bootstrap_without_errors_is_no_certainty() -> None:
    assert format_interval([0.0, 0.0], 204) == "0 of 204 [0, 1.79 %]"
    assert format_interval([1.0, 1.0], 204) == "204 of 204 [98.2, 100 %]"
    assert format_interval([0.0, 0.0]) == "no interval"
    words = page_of([scored(shift=40)]).words
    assert "0 of 40 [0, 8.81 %]" in words
    assert "[0, 0 %]" not in words.replace("in place of [0, 0 %]", "")


def test_settings_are_written_without_brackets() -> None:
    assert plain({"size": 224, "mean": [0.5, 0.25], "crop": {"kind": "centre"}}) == (
        "size: 224, mean: 0.5 0.25, crop: kind: centre"
    )
    assert [plain(x) for x in (None, "", [], {}, False, 0)] == ["none", "none", "none", "none", "False", "0"]


def test_heat_grows_with_the_rate_and_never_hides_the_number() -> None:
    greens = [int(heat(rate / 100)[3:5], 16) for rate in range(51)]
    assert greens == sorted(greens, reverse=True)
    assert heat(0) == heat(None) == "#ffffff"
    assert heat(0.5) == heat(0.9) == "#ee8262"


def test_the_det_picture_of_a_validation_shows_its_curve() -> None:
    draw = np.random.default_rng(0)
    label_N = np.repeat([0, 1], 200)
    good, poor = (det_picture("Validation, step 5", draw.normal(size=400) + d * label_N, label_N) for d in (4, 0))
    assert good.dtype == np.uint8
    assert good.shape == poor.shape
    assert good.shape[0] == 3
    drawn = [((p[2].astype(int) - p[0]) > 100).nonzero() for p in (good, poor)]
    corner = [(columns - rows).mean() for rows, columns in drawn]
    assert corner[0] < corner[1] - 20, "a better curve is nearer to the lower left corner"
