import io

import numpy as np
import pytest
from conftest import jpeg
from PIL import Image

from trainer.data.decode import decode_image
from trainer.errors import SampleError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_plain_jpeg_decodes_as_pillow_does() -> None:
    payload = jpeg(3)
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).astype(int)
    assert np.abs(decode_image(payload).astype(int) - expected).max() <= 2


def test_exif_orientation_turns_the_image_upright() -> None:
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).shape == (40, 20, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    decoded = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.shape == (16, 16, 3)
    assert decoded.dtype == np.uint8
    assert decoded.min() > 250


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16))
    assert (decode_image(encoded(grey, "PNG")) == 0x80).all()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not_an_image"),
        (encoded(Image.new("RGB", (16, 16)), "GIF"), "not_an_image"),
        (encoded(Image.new("RGB", (4, 40)), "PNG"), "too_small"),
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "too_large"),
        (jpeg(1, 200, 200)[:1500], "corrupt"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:800], "corrupt"),
    ],
)
def test_what_cannot_be_used_has_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(payload)
    assert caught.value.reason == reason
