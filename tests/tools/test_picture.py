import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo.picture import CLI, curves, main
from trainer.config.command_line import call
from trainer.detection.error_rates import summarise
from trainer.detection.figures import det_points
from trainer.errors import DataError

SIDE = 12


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """What a demo leaves: pictures of two steps, scores of two detectors on two sets, three shortcuts, a CNN."""
    rng = np.random.default_rng(0)
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for step, value in ((100, 0), (250, 200)):
        rows_HWC = np.full((3 * SIDE, 8 * SIDE, 3), value, dtype=np.uint8)
        Image.fromarray(rows_HWC).save(tmp_path / "run" / "pictures" / f"step-{step:08d}.png")
    label_N = np.repeat([0, 1], 20)
    results, rows = [], []
    for model, test_set in (("full", "whole"), ("lora", "whole"), ("lora", "splice")):
        score_N = np.round(np.clip(rng.normal(0.4 + 0.2 * label_N, 0.15), 0, 1), 6)
        tool_N = ["made" if label else "" for label in label_N]
        people_N = [(f"p{number}",) for number in range(40)]
        summary = summarise(score_N, label_N, tool_N, people_N, threshold=0.5, num_replicates=0)
        results.append({"model": model, "test_set": test_set, "summary": summary})
        rows += [(model, test_set, label, score) for label, score in zip(label_N, score_N, strict=True)]
    baselines = [
        {
            "name": name,
            "test_set": "whole",
            "summary": {"pooled": {"d_eer": {"value": eer}}},
            "det": {"macer": [0.0, eer, 1.0], "bscer": [1.0, eer, 0.0]},
        }
        for name, eer in (("radial-spectrum", 0.3), ("high-pass", 0.1), ("small-pixels", 0.5), ("CNN", 0.05))
    ]
    baselines[-1]["cpu_seconds"] = 60.0
    (tmp_path / "results" / "2026_eval.json").write_text(json.dumps({"results": results, "baselines": baselines}))
    with (tmp_path / "results" / "2026_scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("model", "test_set", "label", "score"), *rows, ("lora", "whole", 1, "")])
    return tmp_path


def test_the_picture_is_drawn_from_the_newest_step_and_evaluation(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, CLI, [str(demo)]) == 0
    path = demo / "results" / "overview.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        pixels_HWC = np.asarray(picture.convert("RGB"))
    assert (pixels_HWC == 200).all(axis=2).sum() > 10_000  # faces of the newest step
    assert path.stat().st_size < 300_000


def test_the_curves_are_the_lora_detectors_the_cnns_and_the_best_shortcuts(demo: Path) -> None:
    [(detector, found), (cnn, its), (shortcut, rates)] = curves(demo / "results")
    with (demo / "results" / "2026_scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["test_set"]) == ("lora", "whole")]
    rows = [row for row in rows if row["score"]]
    assert found == det_points([float(row["score"]) for row in rows], [int(row["label"]) for row in rows])
    assert detector.startswith("detector, LoRA: D-EER ")
    assert cnn == "plain CNN: D-EER 5.00 %"
    assert its["macer"] == [0.0, 0.05, 1.0]
    assert shortcut == "best shortcut, high-pass: D-EER 10.0 %"
    assert rates["macer"] == [0.0, 0.1, 1.0]


def test_a_demo_that_was_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no step-\*\.png: run 'make demo' first"):
        call(main, CLI, [str(tmp_path)])
