"""Runs are compared by training time: a known curve gives known seconds; refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tools import compare_runs
from trainer.config.command_line import call
from trainer.errors import ConfigError


def compared(words: list[str]) -> int:
    return call(compare_runs.main, compare_runs.CLI, words)


def a_run(
    folder: Path,
    *,
    step_s: float,
    errors: list[float | None],
    baseline: float = 1.0,
    probes: list[float] | None = None,
    chance: float = 0.1,
) -> Path:
    """Ten steps between two measurements; half as long while the first ten. The first probe comes before them."""
    folder.mkdir()
    rows = []
    for i, accuracy in enumerate(probes or []):
        row = {"step": 10 * i, "probe_knn_accuracy": accuracy, "probe_linear_accuracy": accuracy / 2}
        rows.append(row | {"probe_chance": chance, "probe_rank_me": 7.5})
    for i, error in enumerate(errors, start=1):
        rows.append({"step": 10 * i, "loss": 1.0, "step_s": step_s if i > 1 else step_s / 2})
        rows.append({"step": 10 * i, "val_loss": error, "val_mean_face_loss": baseline})
    rows.sort(key=lambda row: row["step"])  # stable, so the probes of a step precede its other rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_seconds_are_those_of_the_steps_and_errors_between_points_lie_on_a_line(tmp_path: Path) -> None:
    curve = compare_runs.read_curve(a_run(tmp_path / "a", step_s=2.0, errors=[0.8, None, 0.6, 0.4]))
    assert curve.seconds.tolist() == [10, 50, 70]
    assert [curve.reaches(error) for error in (0.9, 0.8, 0.7, 0.5, 0.4)] == pytest.approx([10, 10, 30, 60, 70])
    assert curve.reaches(0.39) is None


def test_a_run_of_release_0_2_is_read_under_its_former_names(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a", step_s=2.0, errors=[0.8, 0.6])
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace("val_", "heldout_"))
    curve = compare_runs.read_curve(folder)
    assert (curve.errors.tolist(), curve.baseline) == ([0.8, 0.6], 1.0)


def test_the_table_says_how_much_sooner_the_reference_is_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = a_run(tmp_path / "exact", step_s=2.0, errors=[0.8, 0.6, 0.5])
    fast = a_run(tmp_path / "fast", step_s=1.0, errors=[0.7, 0.5, 0.45])
    poor = a_run(tmp_path / "poor", step_s=1.0, errors=[0.9, 0.8, 0.8])
    plot = tmp_path / "curves.png"
    words = ["--runs", f"exact={exact},fast={fast},poor={poor}", "--plot", str(plot)]
    assert compared(words) == 0
    told = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert told["exact"] == ["50.0", "0.5000", "50.0", "1.00x"]
    assert told["fast"] == ["25.0", "0.4500", "15.0", "3.33x"]
    assert told["poor"] == ["25.0", "0.8000", "never"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_probes_stand_beside_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path / "one", step_s=2.0, errors=[0.8, 0.6], probes=[0.1, 0.3, 0.42])
    plain = a_run(tmp_path / "plain", step_s=2.0, errors=[0.8, 0.6])
    curve = compare_runs.read_curve(one)
    assert curve.probes["probe_knn_accuracy"].tolist() == [[0, 0.1], [0, 0.3], [10, 0.42]]
    plots = [tmp_path / "errors.png", tmp_path / "both.png"]
    assert compared(["--runs", f"plain={plain}", "--plot", str(plots[0])]) == 0
    assert "last probe" not in capsys.readouterr().out
    assert compared(["--runs", f"one={one},plain={plain}", "--plot", str(plots[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("last probe"))
    assert lines[head].split()[2:] == ["kNN", "linear", "rank", "chance"]
    assert lines[head + 1].split() == ["one", "42.0", "%", "21.0", "%", "7.5", "10.0", "%"]
    assert lines[head + 2].split() == ["plain", "-", "-", "-", "-"]
    widths = []
    for plot in plots:
        with Image.open(plot) as picture:
            widths.append(picture.width)
    assert widths[1] > 1.5 * widths[0], "a second panel"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    good = a_run(tmp_path / "good", step_s=1.0, errors=[0.8])
    other = a_run(tmp_path / "other", step_s=1.0, errors=[0.8], baseline=0.9)
    two, ten = (a_run(tmp_path / f"{c}", step_s=1.0, errors=[0.8], probes=[0.5], chance=c) for c in (0.5, 0.1))
    blind = a_run(tmp_path / "blind", step_s=1.0, errors=[None])
    for runs, message in (
        ("", "runs is empty"),
        (f"{good}", "must be name=folder"),
        (f"a={tmp_path}", "holds no metrics.jsonl"),
        (f"a={blind}", "measured no validation images"),
        (f"a={two},b={ten}", "not probed on the same classes"),
        (f"a={good},b={other}", "not measured on the same validation images"),
    ):
        with pytest.raises(ConfigError, match=message):
            compared(["--runs", runs])
    with pytest.raises(ConfigError, match=r"must be a \.png file"):
        call(
            compare_runs.main, compare_runs.CLI, ["--runs", f"a={good}", "--plot", str(tmp_path / "nowhere" / "x.png")]
        )
