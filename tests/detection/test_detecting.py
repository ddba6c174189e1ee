"""Scores of photographs: equal to an evaluation's, on any number of ranks and after a kill; refusals."""

import csv
import dataclasses
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.helpers.detectors import THRESHOLD, drawn_detector
from tests.helpers.runs import ROOT, argv_of, forks, launch
from tests.helpers.shards import faces
from tools.demo.orl_faces import find_faces
from tools.export import CLI as EXPORT
from tools.export import main as export_main
from trainer.config.command_line import call
from trainer.config.scoring_settings import DetectionSettings, EvaluationSettings
from trainer.data.transforms.faces import FaceCropping, crop_face
from trainer.detection import Detector
from trainer.detection.detecting import detect
from trainer.detection.evaluation import open_detector, open_test_set, score_set
from trainer.detection.scoring import share_of
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError, SampleError, TrainerError


def plain_onnx() -> bytes:
    """A file of another program: its output is its input."""
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, [1])
    node = onnx.helper.make_node("Identity", ["images"], ["same"])
    same = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.UINT8, [1])
    graph = onnx.helper.make_graph([node], "plain", [value], [same])
    opset = onnx.helper.make_opsetid("", 18)
    payload: bytes = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    return payload


PLAIN_ONNX = plain_onnx()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_detector(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faces(tmp_path_factory.mktemp("shards") / "a.tar", range(30))


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, with those that cannot be scored behind them in the order of names."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shards) as archive:
        archive.extractall(folder, filter="data")
    (folder / "z1.jpg").write_bytes(b"")
    (folder / "z2.png").write_text("no image")
    (folder / "z3.png").write_bytes((folder / "f0000.png").read_bytes()[:200])
    Image.new("RGB", (4, 90)).save(folder / "z4.png")
    Image.open(folder / "f0001.png").save(folder / "z5.jp2", irreversible=False)
    return folder


def settings_of(model: Path, images: Path | str, output: Path, **changes: Any) -> DetectionSettings:
    options = {"num_workers": 0, "progress_bar": False, "micro_batch": 8} | changes
    return DetectionSettings(model=str(model), images=str(images), output=str(output), **options)


def rows_of(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(output.read_text().splitlines()))


def expected_scores(model: Path, shards: Path) -> list[float]:
    """What launch/evaluate.py computes of the shards."""
    settings = EvaluationSettings(models=f"m={model}", test_sets="t=", num_workers=0, micro_batch=8, progress_bar=False)
    detector = Detector.load(model)
    scores = score_set(detector, open_test_set("t", str(shards), settings), settings, World())
    found: list[float] = detector.saved.decision.probability(scores.logit_N).tolist()
    return found


def test_scores_of_files_and_of_shards_are_those_of_an_evaluation_to_the_bit(
    model: Path, shards: Path, folder: Path, tmp_path: Path
) -> None:
    expected = expected_scores(model, shards)
    assert len(set(expected)) == 30, "the detector tells images apart"
    detect(settings_of(model, folder, tmp_path / "files.csv"))
    detect(settings_of(model, shards, tmp_path / "shards.jsonl"))
    rows = rows_of(tmp_path / "files.csv")
    assert [float(row["score"]) for row in rows[:30]] == expected
    assert [row["path"] for row in rows[:30]] == [str(folder / f"f{i:04d}.png") for i in range(30)]
    assert [row["isMorph"] for row in rows[:30]] == [str(score >= THRESHOLD).lower() for score in expected]
    lines = [json.loads(line) for line in (tmp_path / "shards.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == expected
    assert [line["path"] for line in lines] == [f"{shards}/f{i:04d}" for i in range(30)]


def test_a_bad_photograph_is_a_row_with_a_return_code_and_jpeg_2000_is_read(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    detect(settings_of(model, folder, tmp_path / "out.csv", label="scanned"))
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "out.csv")}
    codes = {name: (row["returnCode"], row["reason"], row["score"]) for name, row in rows.items() if name < "z5"}
    assert {name: code for name, code in codes.items() if name.startswith("z")} == {
        "z1.jpg": ("ParseError", "empty", ""),
        "z2.png": ("ParseError", "not_an_image", ""),
        "z3.png": ("ParseError", "corrupt", ""),
        "z4.png": ("RefuseInput", "too_small", ""),
    }
    assert float(rows["z5.jp2"]["score"]) == pytest.approx(float(rows["f0001.png"]["score"]), rel=1e-6)
    assert {row["imageLabel"] for row in rows.values()} == {"scanned"}


def test_a_list_keeps_its_order_and_its_repeats_and_a_missing_file_is_a_row(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    names = ["f0007.png", "gone.png", "f0003.png", "f0007.png"]
    (folder / "list.csv").write_text("path,label\n" + "".join(f"{name},any\n" for name in names))
    detect(settings_of(model, folder / "list.csv", tmp_path / "out.csv"))
    rows = rows_of(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == names
    assert [row["returnCode"] for row in rows] == ["Success", "InputLocationError", "Success", "Success"]
    assert rows[0]["score"] == rows[3]["score"] != rows[2]["score"]


@pytest.fixture
def portraits(tmp_path: Path) -> Path:
    """Faces at known places of a wall: upright, turned by EXIF, on its side, two, none and tiny."""
    folder, wall = tmp_path / "portraits", (110, 100, 90)
    folder.mkdir()
    one, two = (Image.open(find_faces() / f"s{person}" / "1.pgm").convert("RGB") for person in (1, 2))
    alone = Image.new("RGB", (180, 200), wall)
    alone.paste(one, (60, 50))
    alone.save(folder / "a_upright.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    alone.rotate(90, expand=True).save(folder / "b_exif.png", exif=turned)  # stored on its side, and upright by EXIF
    alone.rotate(90, expand=True).save(folder / "c_side.png")
    couple = Image.new("RGB", (200, 112), wall)
    couple.paste(one, (0, 0))
    couple.paste(two, (100, 0))
    couple.save(folder / "d_couple.png")
    Image.new("RGB", (180, 200), wall).save(folder / "e_nobody.png")
    tiny = Image.new("RGB", (180, 200), wall)
    tiny.paste(one.resize((46, 56)), (60, 50))
    tiny.save(folder / "f_tiny.png")
    alone.save(folder / "g_upright.jp2", irreversible=False)
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_detector_of_crops_tells_where_the_face_is_and_why_there_is_none(portraits: Path, tmp_path: Path) -> None:
    model = drawn_detector(tmp_path / "run", face_crop=str(FaceCropping(1.3)))
    detect(settings_of(model, portraits, tmp_path / "out.csv", num_workers=2, micro_batch=2))
    detect(settings_of(model, portraits, tmp_path / "out.jsonl"))
    rows = {Path(row["path"]).stem: row for row in rows_of(tmp_path / "out.csv")}
    assert {name: (row["returnCode"], row["reason"]) for name, row in rows.items()} == {
        "a_upright": ("Success", ""),
        "b_exif": ("Success", ""),
        "c_side": ("RefuseInput", "turned_face"),
        "d_couple": ("RefuseInput", "several_faces"),
        "e_nobody": ("FaceDetectionError", "no_face"),
        "f_tiny": ("RefuseInput", "small_face"),
        "g_upright": ("Success", ""),
    }
    left, top, right, bottom = box = [float(edge) for edge in rows["a_upright"]["faceBox"].split()]
    assert 60 < left < 90 < 120 < right < 152, "the face lies inside the 92 x 112 pixels pasted at (60, 50)"
    assert 50 < top < 95 < 130 < bottom < 163
    assert box == [
        round(edge, 1) for edge in crop_face(np.array(Image.open(portraits / "a_upright.png")), 1.3).face_box
    ]
    assert rows["b_exif"]["faceBox"] == rows["g_upright"]["faceBox"] == rows["a_upright"]["faceBox"]
    assert rows["b_exif"]["score"] == rows["a_upright"]["score"]
    assert {rows[name]["faceBox"] for name in rows if rows[name]["reason"]} == {""}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["faceBox"] for line in lines] == [box, box, None, None, None, None, box]


def test_a_path_an_image_of_pillow_and_an_array_have_one_score(model: Path, shards: Path, folder: Path) -> None:
    detector, expected = Detector.load(model / "detector"), expected_scores(model, shards)
    for number in (0, 5, 29):
        path = folder / f"f{number:04d}.png"
        image = Image.open(path)
        found = [
            detector.score(path),
            detector.score(str(path)),
            detector.score(image),
            detector.score(np.array(image)),
        ]
        assert len(set(found)) == 1
        assert found[0] == pytest.approx(expected[number], rel=1e-5), "a batch of one differs in rounding only"
    with pytest.raises(SampleError, match="not_an_image"):
        detector.score(folder / "z2.png")
    with pytest.raises(DataError, match="give uint8 RGB pixels"):
        detector.score(np.zeros((40, 40)))


def test_batches_of_ranks_are_those_of_one_process_and_each_is_scored_once() -> None:
    for num_samples in (1, 7, 8, 29):
        for size in (1, 2, 3, 5):
            parts = [share_of(num_samples, 4, World(rank, size)) for rank in range(size)]
            assert sorted(i for part in parts for i in part) == list(range(num_samples))
            for part in parts:
                batches = [part[i : i + 4] for i in range(0, len(part), 4)]
                assert all(batch == list(range(batch[0], min(batch[0] + 4, num_samples))) for batch in batches)
                assert all(batch[0] % 4 == 0 for batch in batches)
    assert share_of(10, 4, World(), done=[0, 2]) == [4, 5, 6, 7]


def test_a_finished_output_is_left_and_one_of_another_job_is_refused(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(model, folder, tmp_path / "out.csv")
    stamp = detect(settings).stat().st_mtime_ns
    detect(settings)
    assert (tmp_path / "out.csv").stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"out\.csv, but it exists and is of threshold 'd_eer' instead of 'macer_0\.01'"
    ):
        detect(dataclasses.replace(settings, threshold="macer_0.01"))
    with pytest.raises(ConfigError, match="it exists and is of other images, or changed ones"):
        detect(dataclasses.replace(settings, images=str(folder / "f0000.png")))
    (tmp_path / "out.csv.json").unlink()
    with pytest.raises(ConfigError, match="it exists and is not of this command"):
        detect(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "nowhere"}, "images is 'nowhere', but no such file or folder exists"),
        ({"images": "EMPTY"}, "holds no image"),
        ({"images": "HEADER"}, "has no rows"),
        ({"images": "none/*.tar"}, "--images"),
        ({"model": "EMPTY"}, "holds no detector"),
        ({"threshold": "bscer_0.10"}, "threshold is 'bscer_0.10', but .* has d_eer, macer_0.01"),
        ({"output": "scores.txt"}, "must end in .csv or .jsonl"),
        ({"output": "/dev/null/scores.csv"}, "cannot be written"),
        ({"label": "printed"}, "label is 'printed', but must be one of non-scanned, scanned, unknown"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_wrong_input_is_refused_by_name(
    changes: dict[str, Any], message: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "header.csv").write_text("path\n")
    places = {"EMPTY": str(tmp_path / "empty"), "HEADER": str(tmp_path / "header.csv")}
    changes = {name: places.get(str(value), value) for name, value in changes.items()}
    with pytest.raises(TrainerError, match=message):
        detect(dataclasses.replace(settings_of(model, folder, tmp_path / "out.csv"), **changes))
    assert not (tmp_path / "out.csv").exists()


def test_two_commands_do_not_write_one_output(model: Path, folder: Path, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "out.csv.partial-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another command writes it now"):
            detect(settings_of(model, folder, tmp_path / "out.csv"))


@pytest.mark.filterwarnings("ignore")  # of torch.onnx
def test_an_onnx_export_gives_the_scores_of_its_run(
    portraits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = drawn_detector(tmp_path / "run", face_crop=str(FaceCropping(1.3)))
    flags = {"source": str(model), "format": "onnx", "output": str(tmp_path / "onnx")}
    assert call(export_main, EXPORT, argv_of(flags)) == 0
    detect(settings_of(model, portraits, tmp_path / "run.jsonl"))
    detect(settings_of(tmp_path / "onnx", portraits, tmp_path / "onnx.jsonl"))
    detect(settings_of(tmp_path / "onnx" / "model.onnx", portraits, tmp_path / "onnx.jsonl"))
    assert "nothing to do" in capsys.readouterr().out, "the folder and its file are one detector"
    run, onnx = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("run", "onnx")
    )
    scores = [row.pop("score") for row in run]
    assert [row.pop("score") for row in onnx] == [score and pytest.approx(score, abs=1e-5) for score in scores]
    assert onnx == run
    upright = portraits / "a_upright.png"
    detector = Detector.load(tmp_path / "onnx")
    assert detector.score(upright) == pytest.approx(Detector.load(model).score(upright), abs=1e-5)
    assert detector.thresholds == {"d_eer": THRESHOLD, "macer_0.01": -np.inf}
    with pytest.raises(ConfigError, match=r"threshold is 'bscer_0\.10'"):
        detect(settings_of(tmp_path / "onnx", portraits, tmp_path / "no.csv", threshold="bscer_0.10"))
    flags = {"models": f"m={tmp_path / 'onnx'}", "test_sets": "t=none/*.tar"}
    with pytest.raises(ConfigError, match="an export, which does not hold the fingerprints"):
        open_detector("m", str(tmp_path / "onnx"), EvaluationSettings(**flags))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", b"{}", "is an export for peft, which holds neither calibration nor thresholds"),
        ("config.json", b"{}", "is an export for timm or transformers, which holds neither"),
        ("model.onnx", b"damaged", "cannot be opened by onnxruntime"),
        ("model.onnx", PLAIN_ONNX, "an ONNX file without the record of a detector"),
    ],
)
def test_other_exports_are_refused(file: str, content: bytes, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TrainerError, match=message):
        detect(settings_of(tmp_path, folder, tmp_path / "out.csv"))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_command_goes_on_on_any_number_of_ranks_and_writes_the_same_file(
    model: Path, folder: Path, tmp_path: Path, ranks: int
) -> None:
    names = [f"f{i % 30:04d}.png" for i in range(3000)] + ["z3.png"]
    (folder / "long.csv").write_text("path\n" + "\n".join(names) + "\n")
    flags = {"model": str(model), "images": str(folder / "long.csv"), "micro_batch": "4", "num_workers": "0"}
    flags |= {"progress_bar": "false", "num_threads": "1"}
    whole = launch(flags | {"output": str(tmp_path / "whole.csv")}, script="detect.py")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "parts.csv"
    words = argv_of(flags | {"output": str(output)})
    run = forks().start(ROOT / "launch" / "detect.py", words, tmp_path / "log", ranks=ranks if ranks > 1 else 0)
    partial = tmp_path / f"parts.csv.partial-{ranks - 1}"
    run.until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 20)
    for pid in run.pids:
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"batch": 0, "logi')  # a line that the kill has cut
    again = launch(flags | {"output": str(output)}, ranks=2, script="detect.py")
    assert again.returncode == 0, again.stderr
    assert "images are scored already" in again.stdout
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("parts*")) == ["parts.csv", "parts.csv.json"]


@pytest.mark.slow
@pytest.mark.law
@pytest.mark.ranks
def test_an_evaluation_on_two_ranks_writes_the_figures_and_scores_of_one_process(model: Path, tmp_path: Path) -> None:
    from tests.helpers.shards import picture, write_tar

    members: list[tuple[str, bytes]] = []
    for i in range(37):
        payload = b"damaged" if i == 5 else picture(i, i % 2)
        named = {"label": i % 2, "identity": f"p{i // 3}", "attack": "lines"}
        members += [(f"f{i:04d}.png", payload), (f"f{i:04d}.json", json.dumps(named).encode())]
    write_tar(tmp_path / "odd.tar", members)
    flags = {"models": f"m={model}", "test_sets": f"odd={tmp_path / 'odd.tar'}", "micro_batch": "4"}
    flags |= {"num_workers": "0", "num_replicates": "50", "num_hardest": "2", "num_threads": "1"}
    found = []
    for ranks in (0, 2):
        done = launch(flags | {"output_dir": str(tmp_path / str(ranks))}, ranks=ranks, script="evaluate.py")
        assert done.returncode == 0, done.stderr[-3000:]
        figures = json.loads(next((tmp_path / str(ranks)).glob("*_eval.json")).read_text())
        scores = next((tmp_path / str(ranks)).glob("*_scores.csv")).read_text()
        found.append((figures["results"], figures["test_sets"], scores))
    assert found[0] == found[1]
    assert found[1][1][0]["return_codes"] == ["Success", "not_an_image"]
    assert found[1][2].count("\n") == 38, "no image twice, none missing"
