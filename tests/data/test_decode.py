import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.helpers.shards import display_p3, grey_profile, jpeg
from trainer.data.transforms.decode import colour_profile, decode_image, suffix_of
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


SMOOTH = Image.open(io.BytesIO(jpeg(3, 60, 100))).convert("RGB")


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": True, "exif": turned(1)}], ids=["VP8L", "VP8X"])
def test_a_lossless_webp_gives_its_pixels(options: dict[str, object]) -> None:
    payload = encoded(SMOOTH, "WEBP", **options)
    assert suffix_of(payload[:12]) == "webp"
    np.testing.assert_array_equal(decode_image(payload), np.asarray(SMOOTH))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_format_is_turned_upright_and_alpha_lies_on_black(kind: str) -> None:
    image = SMOOTH if kind == "JPEG" else SMOOTH.convert("RGBA")
    if kind != "JPEG":
        image.putalpha(0)
    decoded = decode_image(encoded(image, kind, exif=turned()))
    assert decoded.shape == (100, 60, 3)
    assert kind == "JPEG" or decoded.max() == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_pictures_in_a_file_the_first_counts(kind: str) -> None:
    options = {} if kind == "MPO" else {"lossless": True}
    payload = encoded(SMOOTH, kind, save_all=True, append_images=[Image.new("RGB", SMOOTH.size)], **options)
    expected = decode_image(encoded(SMOOTH, "JPEG" if kind == "MPO" else "PNG"))
    np.testing.assert_array_equal(decode_image(payload), expected)


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": turned()}], ids=["VP8L", "VP8", "VP8X"])
def test_a_webp_is_measured_before_anything_is_decoded(options: dict[str, object]) -> None:
    payload = encoded(SMOOTH, "WEBP", **options)
    with pytest.raises(SampleError, match="100x60 has more than 5999 pixels"):
        decode_image(payload, max_pixels=5999)
    for length in (12, 20, 29, 40, len(payload) // 2):
        with pytest.raises(SampleError, match="corrupt") as caught:
            decode_image(payload[:length])
        assert "object at 0x" not in str(caught.value)


def srgb_of_p3(image_HWC: np.ndarray) -> np.ndarray:
    """Display P3 with a gamma of 2.2 -> sRGB, by the matrices of the colourants (IEC 61966-2-1; D50)."""
    p3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear_HWC = ((image_HWC / 255) ** 2.2) @ (np.linalg.inv(srgb) @ p3).T
    linear_HWC = linear_HWC.clip(0, 1)
    return 255 * np.where(linear_HWC <= 0.0031308, 12.92 * linear_HWC, 1.055 * linear_HWC ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_phones_colours_become_srgb_when_asked_and_keep_their_numbers_otherwise(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 120, 90))
    image.paste((90, 140, 70), (8, 0, 16, 16))
    plain, tagged = (encoded(image, kind, icc_profile=profile) for profile in (None, display_p3()))
    assert (colour_profile(plain), colour_profile(tagged)) == (None, "Display P3")
    stored = decode_image(plain)
    np.testing.assert_array_equal(decode_image(tagged), stored)
    np.testing.assert_array_equal(decode_image(plain, srgb=True), stored)
    converted = decode_image(tagged, srgb=True)
    assert np.abs(converted.astype(float) - srgb_of_p3(stored)).max() < 3
    assert np.abs(converted.astype(int) - stored).max() > 8, "the test's colours differ between the two spaces"


def test_a_profile_that_is_srgb_or_damaged_or_of_another_mode_moves_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"no profile", display_p3()[:200]):
        payload = encoded(SMOOTH, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(decode_image(payload, srgb=True), np.asarray(SMOOTH))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_grey_image_follows_its_grey_profile(kind: str) -> None:
    payload = encoded(Image.new("L", (16, 16), 128), kind, icc_profile=grey_profile(1.0))
    assert (decode_image(payload) == 128).all()
    linear = 128 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(decode_image(payload, srgb=True) - expected).max() < 2


def test_a_webp_that_claims_a_large_canvas_is_refused_by_its_header() -> None:
    payload = bytearray(encoded(SMOOTH, "WEBP", exif=turned()))
    payload[24:30] = (15999).to_bytes(3, "little") * 2
    with pytest.raises(SampleError, match="too_large: 16000x16000"):
        decode_image(bytes(payload))
