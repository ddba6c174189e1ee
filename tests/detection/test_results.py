"""The files of an evaluation: what was computed is never lost, and the end shows all files or none."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import environment
from tests.helpers.shards import jpeg, write_tar
from trainer.config.scoring_settings import EvaluationSettings
from trainer.data.shards.index import open_index
from trainer.detection.error_rates import summarise
from trainer.detection.evaluation import TestSet as LabelledSet
from trainer.detection.evaluation import read_baselines
from trainer.detection.figures import ScoredSet
from trainer.detection.results import Results, markdown_table, terminal_table
from trainer.detection.scoring import Truth
from trainer.errors import ConfigError, DataError
from trainer.files import readable, write_together


def scored(model: str = "lora", test_set: str = "test", keys: tuple[str, ...] = ("a", "b", "c", "d")) -> ScoredSet:
    score_N, label_N = np.array([0.2, 0.9, 0.6, np.nan]), np.array([0, 1, 0, 1])
    return ScoredSet(
        model=model,
        test_set=test_set,
        score_N=score_N,
        label_N=label_N,
        tool_N=["", "splice", "", "splice"],
        key_N=list(keys),
        threshold=0.6,
        threshold_name="d_eer",
        summary=summarise(score_N[:3], label_N[:3], ["", "splice", ""], num_replicates=0),
    )


CODES = ["Success", "Success", "Success", "corrupt"]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def evaluate_one(output: Path, then: Exception | None = None, others: dict[Path, str] | None = None) -> Results:
    with Results(output) as results:
        results.add(scored(), CODES)
        if then is not None:
            raise then
        results.commit("{}", "<html>", others or {})
    return results


def test_the_scores_so_far_survive_a_failure_of_what_comes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="the second set"):
        evaluate_one(tmp_path, then=DataError("the second set is broken"))
    (partial,) = tmp_path.iterdir()
    assert [(r["key"], r["score"], r["isMorph"], r["returnCode"]) for r in rows_of(partial)] == [
        ("a", "0.200000", "false", "Success"),
        ("b", "0.900000", "true", "Success"),
        ("c", "0.600000", "true", "Success"),
        ("d", "", "", "corrupt"),
    ]
    assert str(partial) in capsys.readouterr().err


def test_scores_are_on_disk_at_once(tmp_path: Path) -> None:
    with Results(tmp_path) as results:
        results.add(scored(), CODES)
        assert len(rows_of(next(tmp_path.iterdir()))) == 4, "a kill would leave them"
        results.commit("{}", "", {})


def test_an_evaluation_that_fails_before_any_score_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError), Results(tmp_path):
        raise DataError("nothing to read")
    assert not list(tmp_path.iterdir())


def test_all_files_appear_together_and_the_partial_one_goes(tmp_path: Path) -> None:
    results = evaluate_one(tmp_path / "new", others={tmp_path / "table.md": "|"})
    assert {results.path(name).read_text()[:6] for name in ("eval.json", "report.html")} == {"{}", "<html>"}
    assert len(results.path("scores.csv").read_text().splitlines()) == 5
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_files_that_cannot_all_be_written_are_not_written_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        evaluate_one(tmp_path, others={tmp_path / "no" / "such" / "folder.md": "|"})
    (left,) = tmp_path.iterdir()
    assert left.name.endswith("_scores.partial.csv")


def test_an_older_file_stays_where_its_successors_companion_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No such file"):
        write_together({tmp_path / "a": "new", tmp_path / "no" / "b": "new"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_two_evaluations_in_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    with Results(tmp_path) as one, Results(tmp_path) as other:
        assert one.path("eval.json") != other.path("eval.json")
        one.commit("1", "", {})
        with Results(tmp_path) as third:
            third.commit("3", "", {})
        other.commit("2", "", {})
    assert sorted(path.read_text() for path in tmp_path.glob("*_eval.json")) == ["1", "2", "3"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir is .*file, which cannot be written .*: name another folder"):
        Results(tmp_path / "file")


def test_a_markdown_file_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "table.md"):
        with pytest.raises(ConfigError, match=r"markdown is .*, but must be a file in a folder that exists"):
            EvaluationSettings(markdown=str(path))
    assert EvaluationSettings(markdown="table.md").markdown == "table.md"
    inside = str(tmp_path / "new" / "table.md")  # the folder of the results is made with them
    assert EvaluationSettings(output_dir=str(tmp_path / "new"), markdown=inside).markdown == inside


def test_a_key_that_is_no_utf8_is_written_escaped(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("caf\udce9_\u00fc.jpg", jpeg(1))])
    key = readable(open_index([tar]).sample(0).key)
    assert key == "caf\\xe9_\u00fc"
    with Results(tmp_path / "out") as results:
        results.add(scored(keys=(key, "raw\udce9", "c", "d")), CODES)
        results.commit("{}", "", {})
    keys = [row["key"] for row in rows_of(results.path("scores.csv"))]
    assert keys == ["caf\\xe9_\u00fc", "raw\\udce9", "c", "d"]


def test_a_name_that_the_terminal_cannot_show_ends_no_command() -> None:
    code = (
        "from trainer.fault_tolerance.exit_codes import exit_with; exit_with(lambda: print('caf\\udce9 \\u5b57') or 0)"
    )
    for encoding in ("utf-8", "ascii"):
        env = environment() | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout[:9]) == (0, "caf\\udce9"), done.stderr


# ---------------------------------------------------------------------------------------------- tables


def evaluation() -> dict[str, object]:
    results = [{"model": m, "test_set": s, "summary": scored(m, s).summary} for m in ("a|b", "c") for s in ("s", "t")]
    baselines = [{"name": "blur", "test_set": "s", "summary": scored().summary}]
    return {"results": results, "baselines": baselines, "test_sets": [{"name": "s"}, {"name": "t"}]}


def test_the_markdown_table_has_a_row_for_each_detector_and_a_column_for_each_test_set() -> None:
    made = evaluation()
    made["results"][1]["summary"]["pooled"]["d_eer"] |= {"value": 0.1234, "ci": [0.05, 0.2]}  # type: ignore[index]
    assert markdown_table(made).splitlines() == [
        "| D-EER in %, 95 % interval | s | t |",
        "| --- | --- | --- |",
        "| a\\|b | **0.0** | 12.3 [5.0, 20.0] |",
        "| c | **0.0** | **0.0** |",
        "| blur | **0.0** | - |",
    ]
    lines = terminal_table(made).splitlines()
    assert len(lines) == 6
    assert lines[2].split()[:6] == ["a|b", "t", "12.3", "%", "[5.0,", "20.0]"]


# ---------------------------------------------------------------------------------------------- baselines


def test_baselines_that_are_none_or_of_other_images_are_refused_before_any_work(tmp_path: Path) -> None:
    index = open_index([write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1))])])
    sets = [LabelledSet("test", index, Truth(np.array([0]), [""], [()]))]
    path = tmp_path / "baselines.json"
    summary = scored().summary
    row = {"name": "blur", "test_set": "test", "fingerprint": index.fingerprint, "summary": summary}
    for text, message in (
        (None, "cannot be read .*FileNotFoundError"),
        ("[1]", "write it with tools/shortcut_baselines.py"),
        ("{", "cannot be read"),
        (json.dumps([row | {"test_set": "other"}]), "measured other, but not test"),
        (json.dumps([row | {"fingerprint": "0"}]), "measured other images as test"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_baselines(path, sets)
    for good in (row, {name: value for name, value in row.items() if name != "fingerprint"}):
        path.write_text(json.dumps([good]))
        assert read_baselines(path, sets) == [good]
