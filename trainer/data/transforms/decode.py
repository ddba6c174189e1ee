"""Image bytes -> uint8 RGB, safely: only JPEG, PNG and WebP, bounded before any pixel is decoded, upright.

Every refusal is a `SampleError` with one of these reasons: ``empty``, ``not_an_image``, ``too_large``, ``too_small``,
``corrupt``. Of an animation, or a JPEG with several pictures (MPO), the first picture is decoded.

Shapes: H, W image size; HWC uint8 RGB.
"""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer.data.transforms.icc import profile_name, to_srgb
from trainer.errors import SampleError

MAX_PIXELS = 50_000_000
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that `decode_image` reads, by Pillow's names."""
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_APP1, _START_OF_SCAN, _END = 0xE1, 0xDA, 0xD9
_ORIENTATION = 0x0112
_FAST_COLOUR_SPACES = ("YCbCr", "Gray")
# libjpeg's warnings of missing pixels, which it fills with grey. Its other warnings leave the picture intact.
_DAMAGED = re.compile("premature end|bad huffman|bad arithmetic|instead of rst", re.IGNORECASE)
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""Errors of Pillow's plug-ins for damaged files."""


class Scratch:
    """Memory that decoding reuses: new pages for every image would cost a tenth of its decoding time."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def of(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return at least ``num_bytes`` bytes; the former content is lost."""
        if len(self._memory) < num_bytes:
            self._memory = np.empty(num_bytes, dtype=np.uint8)
        return self._memory


def suffix_of(head: bytes) -> str | None:
    """Return jpg, png or webp from the first 12 bytes of a file; None for a format that `decode_image` refuses."""
    if head.startswith(_JPEG):
        return "jpg"
    if head.startswith(_PNG):
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def colour_profile(payload: bytes) -> str | None:
    """Return the name of an image's ICC profile; None if it has none, or is no image."""
    return profile_name(_icc_profile(payload))


def upright_jpeg_size(payload: bytes) -> tuple[int, int] | None:
    """Return height and width [pixels] of a JPEG on the fast path without EXIF rotation; None for every other file."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
    except ValueError:
        return None
    if colour_space not in _FAST_COLOUR_SPACES or _orientation(_exif_segment(payload)) != 1:
        return None
    return height, width


def decode_image(
    payload: bytes,
    *,
    shrink: int = 1,
    fast: bool = False,
    scratch: Scratch | None = None,
    srgb: bool = False,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
) -> NDArray[np.uint8]:
    """Decode one image and apply its EXIF orientation.

    Colour and grey JPEGs take the fast path (libjpeg-turbo); everything else goes through Pillow, with palette, CMYK,
    alpha (on black) and 16-bit images converted to RGB.

    Args:
        payload: the bytes of a JPEG, PNG or WebP file.
        shrink: 1, 2, 4 or 8: a JPEG is decoded at 1 / shrink of its size, rounded up; other formats ignore it.
        fast: use libjpeg-turbo's faster, less exact transforms. Never for detection: artefacts are the signal.
        scratch: memory for the result, which is then valid until the next image only.
        srgb: convert an image with another ICC profile to sRGB; otherwise its pixel values stay as stored.
        max_pixels: larger images are refused before decoding [pixels].
        min_side: images with a shorter side are refused [pixels].

    Returns:
        image_HWC: C-contiguous.

    Raises:
        SampleError: the bytes are no such image, or damaged, too large or too small.
    """
    if not payload:
        raise SampleError("empty", "the image has no bytes")
    suffix = suffix_of(payload[:12])
    if suffix is None:
        raise SampleError("not_an_image", "neither JPEG nor PNG nor WebP")
    image_HWC = _decode_jpeg(payload, shrink, fast, scratch, max_pixels, min_side) if suffix == "jpg" else None
    if image_HWC is None:
        return _decode_any(payload, shrink, srgb, max_pixels, min_side)
    if srgb and (profile := _icc_profile(payload)):
        return np.asarray(to_srgb(Image.fromarray(image_HWC), profile))
    return image_HWC


def _decode_jpeg(
    payload: bytes, shrink: int, fast: bool, scratch: Scratch | None, max_pixels: int, min_side: int
) -> NDArray[np.uint8] | None:
    """Decode a JPEG in YCbCr or grey; None leaves it to Pillow."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
        _check_size(width, height, max_pixels, min_side)
        if colour_space not in _FAST_COLOUR_SPACES:
            return None
        image_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            payload,
            colorspace="RGB",
            fastdct=fast,
            fastupsample=fast,
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
            buffer=scratch.of(3 * height * width) if scratch else None,
            strict=True,
        )
    except ValueError as error:
        if _DAMAGED.search(str(error)):
            raise SampleError("corrupt", f"the image is damaged ({error})") from error
        return None  # an unusual JPEG: Pillow tries
    return _upright(image_HWC, _orientation(_exif_segment(payload)))


def _exif_segment(jpeg: bytes) -> bytes:
    """Return the EXIF segment of a JPEG, or no bytes. Long segments of other programs may stand in front of it."""
    # A segment is FF, its type, and a big-endian length that counts itself and the content, but not these two bytes.
    start = len(_JPEG)
    while start + 4 <= len(jpeg) and jpeg[start] == 0xFF and jpeg[start + 1] not in (_START_OF_SCAN, _END):
        if jpeg[start + 1] == 0xFF:  # a fill byte
            start += 1
            continue
        end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        if jpeg[start + 1] == _APP1 and jpeg.startswith(b"Exif\0\0", start + 4):
            return jpeg[start + 4 : end]
        start = end
    return b""


def _orientation(source: bytes | Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or the EXIF is damaged."""
    if source == b"":
        return 1
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, bytes):
                tags.load(source)
            else:
                tags = source.getexif()
            orientation = tags.get(_ORIENTATION)
    except PILLOW_ERRORS:
        return 1  # the picture is usable without its metadata
    return orientation if isinstance(orientation, int) else 1


def _upright(image_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation, 1 to 8: transpose for 5-8, then flip rows and columns (CIPA DC-008, orientation tag).

    Example: 6 is a photograph taken with the camera turned: transposing and flipping the columns turns it clockwise.
    """
    if orientation not in range(2, 9):
        return np.ascontiguousarray(image_HWC)
    pixel_HW = np.ascontiguousarray(image_HWC).view("V3")[..., 0]  # whole pixels move twice as fast as bytes
    if orientation in (5, 6, 7, 8):
        pixel_HW = pixel_HW.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixel_HW = pixel_HW[::-1]
    if orientation in (2, 3, 6, 7):
        pixel_HW = pixel_HW[:, ::-1]
    return np.ascontiguousarray(pixel_HW)[..., None].view(np.uint8)


def _decode_any(payload: bytes, shrink: int, srgb: bool, max_pixels: int, min_side: int) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and Pillow's bomb warning: `max_pixels` is the limit
            if suffix_of(payload[:12]) == "webp":  # Pillow allocates the canvas already on opening
                _check_size(*_webp_size(payload), max_pixels, min_side)
            with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
                _check_size(image.width, image.height, max_pixels, min_side)
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))  # of JPEGs only
                return _upright(np.asarray(to_rgb(image, srgb=srgb)), _orientation(image))
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # Pillow's message holds a memory address
        raise SampleError("corrupt", "the image is damaged (its header cannot be read)") from error
    except PILLOW_ERRORS as error:
        raise SampleError("corrupt", f"the image is damaged ({error})") from error


def _icc_profile(payload: bytes) -> bytes | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if suffix_of(payload[:12]) == "webp":
                _check_size(*_webp_size(payload), MAX_PIXELS, 1)
            with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
                profile = image.info.get("icc_profile")
    except (*PILLOW_ERRORS, SampleError, Image.DecompressionBombError):
        return None  # the picture is usable without its metadata
    return profile if isinstance(profile, bytes) and profile else None


def _webp_size(payload: bytes) -> tuple[int, int]:
    """Return width and height from the first chunk of a WebP file [pixels].

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    # VP8X stores both sides less one in 24 bits, VP8L both sides less one in 14 bits, VP8 both sides in 14 bits.
    kind, body = payload[12:16], payload[20:30]
    if len(body) == 10:
        if kind == b"VP8X":
            return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
        if kind == b"VP8L" and body[0] == 0x2F:
            bits = int.from_bytes(body[1:5], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise SampleError("corrupt", "the image is damaged (its WebP header cannot be read)")


def to_rgb(image: Image.Image, *, srgb: bool) -> Image.Image:
    """Convert an image of any mode of JPEG, PNG or WebP to RGB: alpha on black, 16 bits scaled to 8."""
    image.load()
    profile = image.info.get("icc_profile") if srgb else None
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # convert() would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P") and (image.mode != "P" or "transparency" in image.info):
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    if profile and image.mode == "CMYK":
        return to_srgb(image, profile).convert("RGB")
    return to_srgb(image.convert("RGB"), profile)


def _check_size(width: int, height: int, max_pixels: int, min_side: int) -> None:
    if width * height > max_pixels:
        raise SampleError("too_large", f"{width}x{height} has more than {max_pixels} pixels")
    if min(width, height) < min_side:
        raise SampleError("too_small", f"{width}x{height} has a side below {min_side} pixels")
