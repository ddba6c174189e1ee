"""A detector of cropped faces: what it records, and which images it is tested on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import TINY_DETECTOR, launch
from tests.helpers.shards import jpeg, write_tar
from tools.demo.orl_faces import find_faces
from tools.make_shards import Settings, make_shards
from trainer.config.scoring_settings import EvaluationSettings
from trainer.data.shards.index import ShardIndex, open_index
from trainer.data.transforms import faces
from trainer.data.transforms.faces import FaceCropping
from trainer.detection.cropping import check_same_crop, cropping_for, described_crop, face_crop_of, recorded_cropping
from trainer.detection.detector import Detector
from trainer.detection.evaluation import evaluate
from trainer.detection.saved_detector import load_detector
from trainer.detection.score_file import return_code
from trainer.errors import ConfigError, DataError, SampleError

CROP = str(FaceCropping(1.3))


def index_of(path: Path, *crops: str) -> ShardIndex:
    members = []
    for number, crop in enumerate(crops):
        values = {"label": number % 2} | ({"face_crop": crop} if crop else {})
        members += [(f"{number}.jpg", jpeg(number)), (f"{number}.json", json.dumps(values).encode())]
    return open_index([write_tar(path, members)])


def test_whole_photographs_are_cropped_for_a_detector_of_crops_and_other_crops_are_refused(tmp_path: Path) -> None:
    whole, cropped, wider = (
        index_of(tmp_path / f"{number}.tar", crop, crop)
        for number, crop in enumerate(("", CROP, str(FaceCropping(1.5))))
    )
    of_crops, of_whole = described_crop(cropped, setting="--data"), described_crop(whole, setting="--data")
    assert (of_crops, of_whole) == ({"face_crop": CROP}, {})
    names = {"name": "lora", "setting": "--test_sets frll"}
    assert cropping_for(of_whole, whole, **names) is None
    assert cropping_for(of_crops, cropped, **names) is None
    assert cropping_for(of_crops, whole, **names) == recorded_cropping(of_crops) == FaceCropping(1.3)
    with pytest.raises(
        ConfigError, match=r"lora was trained on faces .* but --test_sets frll holds faces .*margin 1\.5"
    ):
        cropping_for(of_crops, wider, **names)
    with pytest.raises(ConfigError, match="lora was trained on whole photographs"):
        cropping_for(of_whole, cropped, **names)


def test_mixtures_and_another_validation_set_are_refused(tmp_path: Path) -> None:
    mixed = index_of(tmp_path / "mixed.tar", CROP, "")
    with pytest.raises(DataError, match="--data mixes whole photographs and faces cropped"):
        face_crop_of(mixed, setting="--data")
    with pytest.raises(DataError, match="--val_data whole photographs"):
        check_same_crop(index_of(tmp_path / "a.tar", CROP), index_of(tmp_path / "b.tar", ""))


def test_a_machine_without_the_networks_scores_cropped_shards_but_no_whole_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces._network.cache_clear()
    monkeypatch.setattr(faces, "_PACKAGE", "no_such_package")
    names = {"name": "lora", "setting": "--test_sets frll"}
    assert cropping_for({"face_crop": CROP}, index_of(tmp_path / "a.tar", CROP), **names) is None
    with pytest.raises(ConfigError, match="pip install"):
        cropping_for({"face_crop": CROP}, index_of(tmp_path / "b.tar", ""), **names)


# ---------------------------------------------------------------------------------------------- a whole run


def portraits(folder: Path, people: range) -> Path:
    """Two photographs of each person on a larger wall, and a blend of each with the next person."""
    folder.mkdir()
    rows = [["path", "label", "identity", "identity_2"]]
    for person in people:
        partner = person + 1 if person + 1 in people else people[0]
        one, two = (Image.open(find_faces() / f"s{who}" / "1.pgm").convert("RGB") for who in (person, partner))
        other = Image.open(find_faces() / f"s{person}" / "2.pgm").convert("RGB")
        for name, image, label in (("a", one, 0), ("b", other, 0), ("m", Image.blend(one, two, 0.5), 1)):
            wall = Image.new("RGB", (180, 200), (110, 100, 90))
            wall.paste(image, (30 + person, 40))
            wall.save(folder / f"{person}{name}.png")
            rows.append([f"{person}{name}.png", str(label), f"p{person}", f"p{partner}" if label else ""])
    with (folder / "set.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "set.csv"


def packed(source: Path, output: Path, face_crop: float | None) -> str:
    make_shards(
        Settings(source=str(source), output_dir=str(output), face_crop=face_crop, num_processes=1, progress_bar=False)
    )
    return str(output / "*.tar")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_detector_of_crops_gives_whole_photographs_the_scores_of_their_crops(tmp_path: Path) -> None:
    """The crop of a shard and the crop at scoring are the same pixels, so the scores are the same numbers."""
    sets = {"train": range(1, 13), "val": range(13, 21), "test": range(21, 27)}
    sources = {name: portraits(tmp_path / name, people) for name, people in sets.items()}
    crops = {name: packed(source, tmp_path / f"{name}-crops", 1.3) for name, source in sources.items()}
    whole = packed(sources["test"], tmp_path / "test-whole", None)
    wider = packed(sources["test"], tmp_path / "test-wider", 1.6)
    flags = {"data": crops["train"], "val_data": crops["val"], "output_dir": str(tmp_path / "run")}
    done = launch(TINY_DETECTOR | flags | {"epochs": "2", "self_morph_share": "0.5"}, script="finetune.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_detector(tmp_path / "run").description["preprocessing"]["face_crop"] == CROP
    common = {"models": f"d={tmp_path / 'run'}", "num_replicates": 10, "progress_bar": False, "num_workers": 0}
    scores = {}
    for name, shards in (("crops", crops["test"]), ("whole", whole)):
        report = evaluate(
            EvaluationSettings(**common, test_sets=f"t={shards}", output_dir=str(tmp_path / f"results-{name}"))
        )
        table = report.with_name(report.name.replace("_report.html", "_scores.csv"))
        with table.open() as file:
            scores[name] = {row["key"]: row["score"] for row in csv.DictReader(file)}
    assert scores["crops"] == scores["whole"]
    assert len(set(scores["whole"].values())) == 18
    detector = Detector.load(tmp_path / "run")
    for name in ("21a", "25m"):
        assert detector.score(tmp_path / "test" / f"{name}.png") == pytest.approx(
            float(scores["crops"][name]), abs=1e-6
        )
    with pytest.raises(SampleError, match="no_face"):
        detector.score(Image.new("RGB", (100, 100), (90, 80, 70)))
    assert return_code("no_face") == "FaceDetectionError"
    command = {"model": str(tmp_path / "run"), "progress_bar": "false"}
    for name, images in (("files", str(tmp_path / "test")), ("whole", whole), ("crops", crops["test"])):
        output = {"images": images, "output": str(tmp_path / f"{name}.csv")}
        done = launch(command | output, script="detect.py", ranks=2 if name == "whole" else 0)
        assert done.returncode == 0, done.stderr[-3000:]
    files, shards, cropped = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("files", "whole", "crops")
    )
    files = sorted(files, key=lambda row: Path(row["path"]).stem)
    assert [row["score"] for row in sorted(shards, key=lambda row: row["path"])] == [row["score"] for row in files]
    assert [row["faceBox"] for row in sorted(shards, key=lambda row: row["path"])] == [row["faceBox"] for row in files]
    assert all(30 < float(row["faceBox"].split()[0]) < float(row["faceBox"].split()[2]) < 150 for row in files)
    assert {row["faceBox"] for row in cropped} == {""}
    with pytest.raises(ConfigError, match=r"margin 1\.6"):
        evaluate(EvaluationSettings(**common, test_sets=f"t={wider}", output_dir=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()
    mixed = launch(
        flags | TINY_DETECTOR | {"val_data": whole, "output_dir": str(tmp_path / "no")}, script="finetune.py"
    )
    assert mixed.returncode == 2
    assert "write both with the same face_crop" in mixed.stderr
    assert np.isfinite([float(score) for score in scores["whole"].values()]).all()
