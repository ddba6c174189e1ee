"""The field's table agrees with the means and worsts that the papers print."""

import numpy as np
import pytest

from trainer.detection.error_rates import summarise
from trainer.detection.published import PUBLISHED, field_tables

PRINTED_MEANS = {
    "frll": {
        **{"MixFaceNet-MAD": 8.96, "PW-MAD": 10.62, "Inception": 8.11, "OrthoMAD": 7.66, "IDistill": 2.90},
        **{"MADation ViT-B/16": 5.76, "MADation ViT-L/14": 7.60, "SelfMAD HRNet-W18": 2.96},
    },
    "mad22": {
        **{"MixFaceNet-MAD": 13.69, "Inception-MAD": 10.53, "MorphHRNet": 9.42, "Con-Text Net A": 13.78},
        **{"D-FW-MixFaceNet": 7.59, "MADation ViT-B/16": 14.05, "MADation ViT-L/14": 10.48},
    },
}


@pytest.mark.parametrize("test_set", list(PUBLISHED))
def test_the_means_of_the_typed_rows_are_the_printed_ones(test_set: str) -> None:
    for row in PUBLISHED[test_set]:
        five = [value for tool, value in row.d_eer.items() if tool != "mordiff"]
        assert len(five) == 5
        assert np.mean(five) == pytest.approx(PRINTED_MEANS[test_set][row.name], abs=0.011)
        assert all(low >= middle >= high for low, middle, high in row.bscer_at_macer.values())


def evaluation(name: str, tools: list[str]) -> dict[str, object]:
    """Two bona fides, and two morphs of each tool; those of the first tool score as bona fides do."""
    score_N, label_N, tool_N = [0.1, 0.2], [0, 0], ["", ""]
    for tool in tools:
        score_N, label_N, tool_N = [*score_N, *((0.15, 0.9) if tool == tools[0] else (0.8, 0.9))], [*label_N, 1, 1], [
            *tool_N, tool, tool
        ]  # fmt: skip
    summary = summarise(score_N, label_N, tool_N, num_replicates=0)
    return {"test_sets": [{"name": name}], "results": [{"model": "lora", "test_set": name, "summary": summary}]}


def test_the_table_has_each_tool_the_worst_and_the_mean_beside_published_rows() -> None:
    text = field_tables(evaluation("mad22", ["facemorpher", "opencv"]))
    head, eer, *points = (line.split() for line in text.splitlines()[:5])
    assert head == ["mad22,", "in", "%", "facemorpher", "opencv", "worst", "mean"]
    assert eer == ["lora", "D-EER", "50.00", "0.00", "50.00", "25.00"]
    assert [row[0] for row in points] == ["BSCER@MACER=0.01", "BSCER@MACER=0.10", "BSCER@MACER=0.20"]
    assert points[0][1:] == ["50.00", "0.00", "50.00", "25.00"]
    [madation] = [line for line in text.splitlines() if line.startswith("MADation ViT-B/16")]
    assert madation.split()[2:] == ["D-EER", "0.00", "3.85", "3.85", "1.93", "MADation,", "arXiv", "2501.03800"]


def test_other_sets_have_no_published_rows_and_one_tool_no_table() -> None:
    assert "MADation" not in field_tables(evaluation("ours", ["a", "b"]))
    assert field_tables(evaluation("ours", ["a"])) == ""


def test_a_tool_that_a_paper_lacks_is_a_dash_and_so_is_its_mean() -> None:
    text = field_tables(evaluation("mad22", ["mordiff", "opencv"]))
    [row] = [line for line in text.splitlines() if line.startswith("MorphHRNet")]
    assert row.split()[:6] == ["MorphHRNet", "D-EER", "-", "5.69", "-", "-"]
