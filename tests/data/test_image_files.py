import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.helpers.shards import display_p3, jpeg
from trainer.data.transforms.decode import decode_image
from trainer.data.writing.image_files import Storing, as_trainable, describe_damage, size_of, stored_image
from trainer.errors import SampleError

SMOOTH = Image.open(io.BytesIO(jpeg(3, 60, 100))).convert("RGB")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(payload: bytes) -> np.ndarray:
    return decode_image(as_trainable(payload)).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_what_the_trainer_reads_stays_byte_for_byte(kind: str) -> None:
    payload = encoded(SMOOTH, kind)
    assert as_trainable(payload) is payload


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "AVIF", "GIF", "JPEG2000"])
def test_other_formats_become_png_with_the_same_pixels(kind: str) -> None:
    payload = encoded(SMOOTH, kind)
    assert as_trainable(payload).startswith(b"\x89PNG")
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).astype(int)
    np.testing.assert_array_equal(pixels(payload), expected)


@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_other_formats_are_turned_once_and_only_once(kind: str) -> None:
    as_png = as_trainable(encoded(SMOOTH, kind, exif=turned()))
    assert decode_image(as_png).shape == (100, 60, 3)
    assert np.abs(decode_image(as_png).astype(int) - np.rot90(np.asarray(SMOOTH), -1)).mean() < 8


def test_the_first_picture_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    payload = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(payload) == (250, 0, 0)).all()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("CMYK", (16, 16), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("F", (16, 16), 0.5), (128, 128, 128)),
        (Image.new("F", (16, 16), 200.0), (200, 200, 200)),
        (Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16)), (128, 128, 128)),
        (Image.new("I", (16, 16), 0x8000), (128, 128, 128)),
        (Image.new("RGBA", (16, 16), (200, 100, 50, 0)), (0, 0, 0)),
        (Image.new("1", (16, 16), 1), (255, 255, 255)),
    ],
    ids=["CMYK", "F-1", "F-255", "I;16", "I", "RGBA", "1"],
)
def test_every_mode_of_a_tiff_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert np.abs(pixels(encoded(image, "TIFF")) - expected).max() <= 1


def test_lab_and_cmyk_with_a_profile_become_srgb() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    colour = Image.new("RGB", (16, 16), (200, 120, 90))
    lab = ImageCms.applyTransform(colour, to_lab)
    assert np.abs(pixels(encoded(lab, "TIFF")) - (200, 120, 90)).max() <= 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (16, 16), 2.5), "floats lie from 2.5 to 2.5"),
        (Image.new("F", (16, 16), -1.0), "floats lie from -1 to -1"),
        (Image.new("F", (16, 16), float("nan")), "floats lie from nan to nan"),
        (Image.new("I", (16, 16), 70000), "integers lie from 70000 to 70000"),
        (Image.new("I", (16, 16), 200), "integers lie from 200 to 200"),
    ],
)
def test_numbers_of_no_clear_range_are_refused_and_not_guessed(image: Image.Image, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        as_trainable(encoded(image, "TIFF"))


@pytest.mark.parametrize(
    "payload",
    [b"", b"no image", b"II*\0broken", b"GIF89a", encoded(SMOOTH, "TIFF")[:2000], encoded(SMOOTH, "BMP")[:60]],
)
def test_messages_about_damage_hold_no_address_in_memory(payload: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(payload)
    for act in (lambda: stored_image(payload, Storing()), lambda: decode_image(payload)):
        with pytest.raises(SampleError) as caught:
            act()
        assert "object at 0x" not in describe_damage(caught.value)
    if len(payload) < 20:
        with pytest.raises(SampleError):
            size_of(tmp_path / "x.tif")


def test_a_tiff_keeps_its_numbers_and_its_profile() -> None:
    payload = encoded(SMOOTH, "TIFF", icc_profile=display_p3())
    as_png = as_trainable(payload)
    with Image.open(io.BytesIO(as_png)) as image:
        assert image.info["icc_profile"] == display_p3()
    np.testing.assert_array_equal(decode_image(as_png), np.asarray(SMOOTH))


@pytest.mark.parametrize("max_side", [100, 512, 3000])
def test_reduced_decoding_gives_the_size_that_full_decoding_gives(max_side: int) -> None:
    payload = encoded(Image.new("RGB", (8200, 6200), (90, 120, 200)), "JPEG", quality=40)
    suffix, small = stored_image(payload, Storing(max_side=max_side))
    assert suffix == "jpg"
    assert decode_image(small).shape == (max_side, round(8200 * max_side / 6200), 3)
