"""Morphs: geometry against OpenCV's own warp, laws of blending and splicing, manifests, refusals."""

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.demo.orl_faces import find_faces
from tools.demo.orl_morphs import LANDMARKS
from tools.make_morphs import Settings, face_mask, make_morphs, spliced_morph, warp, whole_morph
from tools.make_shards import Settings as ShardSettings
from tools.make_shards import make_shards
from trainer.data.landmarks import dlib_finder, read_landmarks
from trainer.data.shards.index import open_index
from trainer.data.shards.reader import ShardReader
from trainer.errors import ConfigError, DataError

SIZE = (60, 50)
ANGLE = np.linspace(0, 2 * np.pi, 16, endpoint=False, dtype=np.float32)
RING = np.stack([25 + 14 * np.cos(ANGLE), 30 + 18 * np.sin(ANGLE)], 1).astype(np.float32)
POINTS = np.concatenate([RING, [[25, 30], [20, 26], [30, 26]]]).astype(np.float32)


def picture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(20, 235, (6, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(SIZE[::-1], Image.Resampling.BICUBIC))


def test_landmarks_that_stay_leave_the_image() -> None:
    np.testing.assert_array_equal(warp(picture(0), POINTS, POINTS), picture(0))


@settings(max_examples=20)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.9, 1.1))
def test_an_affine_motion_of_the_landmarks_is_opencvs_inside_their_hull(dx: float, dy: float, zoom: float) -> None:
    moved = ((POINTS - 25) * zoom + 25 + [dx, dy]).astype(np.float32)
    ours = warp(picture(1), POINTS, moved).astype(int)
    matrix = np.array([[zoom, 0, 25 * (1 - zoom) + dx], [0, zoom, 25 * (1 - zoom) + dy]])
    theirs = cv2.warpAffine(picture(1), matrix, SIZE[::-1], flags=cv2.INTER_CUBIC).astype(int)
    inside = face_mask(SIZE, moved) > 0.99
    assert inside.any()
    assert np.abs(ours - theirs)[inside].max() <= 12  # opencv rounds both to 1/32 pixel, at different places


def test_a_blend_near_the_ends_is_nearly_a_parent() -> None:
    other = POINTS + np.array([3, -2], dtype=np.float32)
    nearly = whole_morph(picture(2), POINTS, picture(3), other, 1e-4).astype(int)
    assert np.abs(nearly - picture(2)).max() <= 2
    nearly = whole_morph(picture(2), POINTS, picture(3), POINTS, 1 - 1e-4).astype(int)
    assert np.abs(nearly - picture(3)).max() <= 2


def test_a_splice_leaves_everything_outside_the_hull_and_changes_the_inside() -> None:
    morph = spliced_morph(picture(4), POINTS, picture(5), (POINTS + 2).astype(np.float32), 0.5)
    hull = np.zeros(SIZE, np.uint8)
    cv2.fillConvexPoly(hull, np.rint(cv2.convexHull(POINTS)).astype(np.int32), 1)
    differs = (morph != picture(4)).any(axis=2)
    assert not differs[hull == 0].any()
    assert differs[face_mask(SIZE, POINTS) > 0.99].mean() > 0.9


@pytest.fixture
def people(tmp_path: Path) -> dict[str, str]:
    names, points = [], []
    with (tmp_path / "faces.csv").open("w") as file:
        file.write("path,key,identity\n")
        for person in range(4):
            for number in range(3):
                name = f"p{person}_{number}"
                Image.fromarray(picture(10 * person + number)).save(tmp_path / f"{name}.png")
                file.write(f"{tmp_path / name}.png,{name},{person}\n")
                names.append(name)
                points.append(POINTS + person)
    np.savez(tmp_path / "points.npz", names=np.array(names), points=np.array(points, dtype=np.float32))
    return {"source": str(tmp_path / "faces.csv"), "landmarks": str(tmp_path / "points.npz")}


def made(people: dict[str, str], output: Path, **changes: object) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    options = people | {"output_dir": str(output), "pairs_per_identity": 3, "progress_bar": False, "num_processes": 1}
    manifest = make_morphs(Settings(**(options | changes)))  # type: ignore[arg-type]
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.png")}
    return list(csv.DictReader(manifest.read_text().splitlines())), files


def test_every_morph_names_two_people_and_both_parents(people: dict[str, str], tmp_path: Path) -> None:
    rows, files = made(people, tmp_path / "out", blend="0.3,0.7")
    assert len(rows) == len(files)
    assert {row["attack"] for row in rows} == {"landmark-whole", "landmark-splice"}
    for row in rows:
        assert row["label"] == "1"
        assert row["identity"] != row["identity_2"]
        assert (row["parent_a"][1], row["parent_b"][1]) == (row["identity"], row["identity_2"])
        assert 0.3 <= float(row["blend"]) <= 0.7
        assert Path(row["path"]).exists()
    pairs = [frozenset((row["parent_a"], row["parent_b"])) for row in rows if row["attack"] == "landmark-whole"]
    assert len(pairs) == len(set(pairs))


def test_controls_show_one_person_and_are_bona_fide(people: dict[str, str], tmp_path: Path) -> None:
    rows, _ = made(people, tmp_path / "out", same_person=True, mode="splice")
    for row in rows:
        assert (row["label"], row["attack"], row["identity_2"], row["control"]) == ("0", "", "", "same-person-splice")
        assert row["parent_a"][1] == row["parent_b"][1]
        assert row["parent_a"] != row["parent_b"]


@pytest.mark.slow
def test_bytes_depend_on_the_seed_and_not_on_processes_and_a_killed_run_goes_on(
    people: dict[str, str], tmp_path: Path
) -> None:
    _, one = made(people, tmp_path / "one")
    _, two = made(people, tmp_path / "two", num_processes=2)
    assert one == two
    for path in list((tmp_path / "one").rglob("*.png"))[:3]:
        path.unlink()
    assert made(people, tmp_path / "one")[1] == two
    assert made(people, tmp_path / "other", seed=1)[1].keys() != two.keys()
    with pytest.raises(ConfigError, match="other faces or settings"):
        made(people, tmp_path / "one", seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": "0,0.5"}, "blend is '0,0.5'"),
        ({"blend": "half"}, "two shares"),
        ({"pairs_per_identity": 0}, "at least 1"),
        ({"landmarks": "/nowhere.npz"}, "cannot be read"),
        ({"landmarks": ""}, "landmarks is empty"),
        ({"source": "/nowhere.csv"}, "no such CSV file or shards"),
        ({"source": "/nowhere/*.tar"}, "no shard matches"),
    ],
)
def test_wrong_settings_are_refused(people: dict[str, str], tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(people, tmp_path / "out", **changes)


def test_missing_landmarks_and_lonely_people_are_refused(people: dict[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", names=np.array(["p0_0"]), points=POINTS[None])
    with pytest.raises(DataError, match="11 of 12 photographs have no landmarks"):
        made(people, tmp_path / "out", landmarks=str(tmp_path / "few.npz"))
    lines = Path(people["source"]).read_text().splitlines()
    Path(people["source"]).write_text("\n".join(lines[:4]) + "\n")
    with pytest.raises(ConfigError, match="morphs need two people"):
        made(people, tmp_path / "lonely")


def test_landmarks_travel_through_a_shard_to_the_self_morph(people: dict[str, str], tmp_path: Path) -> None:
    options = people | {"output_dir": str(tmp_path / "shards"), "progress_bar": False, "num_processes": 1}
    paths = make_shards(ShardSettings(**options))  # type: ignore[arg-type]
    index = open_index(paths)
    refs = index.samples(np.arange(len(index)))
    found = ShardReader().read_landmarks(refs)
    for ref, points in zip(refs, found, strict=True):
        np.testing.assert_allclose(points, POINTS + int(ref.key[1]), atol=0.01)
    with pytest.raises(ConfigError, match="landmarks and max_side"):
        ShardSettings(**options, max_side=16)  # type: ignore[arg-type]


def in_shards(people: dict[str, str], folder: Path) -> dict[str, str]:
    make_shards(ShardSettings(**people, output_dir=str(folder), progress_bar=False, max_shard_samples=5))  # type: ignore[arg-type]
    return {"source": str(folder / "*.tar")}


def test_morphs_made_from_shards_are_those_made_from_the_manifest(people: dict[str, str], tmp_path: Path) -> None:
    arrays = np.load(people["landmarks"])
    np.savez(people["landmarks"], names=arrays["names"], points=np.round(arrays["points"], 2))  # what shards keep
    lines = Path(people["source"]).read_text().splitlines()
    for number, format in enumerate(("jpeg", "bmp"), start=1):
        name = lines[number].split(",")[0]
        Image.open(name).convert("L" if format == "bmp" else "RGB").save(Path(name).with_suffix(f".{format}"))
        lines[number] = lines[number].replace(".png", f".{format}", 1)
    Path(people["source"]).write_text("\n".join(lines) + "\n")
    one, two = made(people, tmp_path / "one"), made(in_shards(people, tmp_path / "shards"), tmp_path / "two")
    assert len(one[1]) > 10
    assert one[1] == two[1]
    columns = [[{name: row[name] for name in row if name != "path"} for row in rows] for rows, _ in (one, two)]
    assert columns[0] == columns[1]
    assert (tmp_path / "one/make_morphs.json").read_text() == (tmp_path / "two/make_morphs.json").read_text()


def test_other_landmarks_are_another_run(people: dict[str, str], tmp_path: Path) -> None:
    made(people, tmp_path / "out")
    arrays = np.load(people["landmarks"])
    np.savez(people["landmarks"], names=arrays["names"], points=arrays["points"] + 1)
    with pytest.raises(ConfigError, match="other faces or settings"):
        made(people, tmp_path / "out")


def rewritten(shard: Path, change: dict[str, object]) -> None:
    """Write a shard anew with other values in the json of its last sample; None removes a value."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    last = max(i for i, (member, _) in enumerate(members) if member.name.endswith(".json"))
    values = json.loads(members[last][1]) | change
    text = json.dumps({name: value for name, value in values.items() if value is not None}).encode()
    members[last][0].size = len(text)
    members[last] = (members[last][0], text)
    with tarfile.open(shard, "w") as tar:
        for member, payload in members:
            tar.addfile(member, io.BytesIO(payload))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"landmarks": None},
            DataError,
            "1 of 12 photographs have no landmarks .*, the first .*shard-000002.tar: p3_2",
        ),
        ({"landmarks": [[1, 2], [3, 4], [5, 7]]}, DataError, "photographs have 3 and 19 landmarks"),
        ({"identity": None}, ConfigError, "shard-000002.tar: p3_2 has no identity"),
        ({"label": 1}, DataError, "p3_2 is a morph"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(people: dict[str, str], tmp_path: Path, change, error, message) -> None:
    source = in_shards(people, tmp_path / "shards")
    rewritten(tmp_path / "shards" / "shard-000002.tar", change)
    with pytest.raises(error, match=message):
        made(source, tmp_path / "out")


def test_shards_whose_samples_name_nobody_are_refused(people: dict[str, str], tmp_path: Path) -> None:
    text = Path(people["source"]).read_text()
    Path(people["source"]).write_text(text.replace("identity", "person", 1))
    with pytest.raises(DataError, match="field 'identity'"):
        made(in_shards(people, tmp_path / "shards"), tmp_path / "out")
    with pytest.raises(ConfigError, match="has no identity"):
        made(people, tmp_path / "out")


HAS_DLIB = bool(importlib.util.find_spec("dlib") and importlib.util.find_spec("face_recognition_models"))


@pytest.mark.skipif(HAS_DLIB, reason="dlib is installed")
def test_dlib_that_is_not_installed_is_named_with_its_command(people: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install dlib-bin face_recognition_models"):
        made(people, tmp_path / "out", landmarks="dlib")


# Where MediaPipe's mesh has the points of the 68: brows, nose, eyes and lips; the jaw lines are not comparable.
MESH_OF_68 = (
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144),
    *(362, 385, 387, 263, 373, 380, 61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317),
    *(14, 87),
)


@pytest.mark.skipif(not HAS_DLIB, reason="pip install dlib-bin face_recognition_models")
def test_dlib_finds_the_points_of_the_mesh(people: dict[str, str], tmp_path: Path) -> None:
    known, find, distances = read_landmarks(LANDMARKS), dlib_finder(), []
    for person in range(1, 11):
        with Image.open(find_faces() / f"s{person}" / "1.pgm") as image:
            points = find(np.asarray(image.convert("RGB")))
        assert points is not None
        assert points.shape == (68, 2)
        distances.append(np.linalg.norm(points[17:] - known[f"s{person}_1"][list(MESH_OF_68)], axis=1).mean())
    assert np.mean(distances) < 3, "pixels of 92 x 112"
    assert find(picture(0)) is None
    with pytest.raises(DataError, match="12 of 12 photographs have no landmarks"):
        made(people, tmp_path / "out", landmarks="dlib")


@pytest.mark.parametrize(
    ("names", "points", "message"),
    [
        (["a", "a"], np.ones((2, 3, 2)), "2 entries 'a'"),
        (["a", "b"], np.array([[[1, 2]] * 3, [[1, np.nan]] * 3]), "points of 'b' are not all numbers"),
    ],
)
def test_landmarks_that_contradict_or_mean_nothing_are_refused(
    tmp_path: Path, names: list[str], points: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "points.npz", names=np.array(names), points=points)
    with pytest.raises(ConfigError, match=message):
        read_landmarks(tmp_path / "points.npz")
