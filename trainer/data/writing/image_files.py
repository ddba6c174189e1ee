"""Convert image files to the formats that the trainer reads.

JPEG, PNG and WebP stay as they are. Other formats that Pillow reads safely become PNG: the first picture, upright, with
its pixel values and its colour profile. Colours that PNG cannot hold (CMYK, L*a*b*) become sRGB. Images that are shrunk
or encoded again always become sRGB.

Shapes: H, W image size; HWC uint8 RGB.
"""

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data.transforms.decode import MAX_PIXELS, PILLOW_ERRORS, decode_image, suffix_of
from trainer.data.transforms.faces import FaceCropping
from trainer.data.transforms.icc import lab_to_srgb, to_srgb
from trainer.errors import SampleError

DAMAGE = (SampleError, OSError)
"""Errors of a damaged or unreadable image, here and in `decode_image`."""
MAX_SHRUNK_PIXELS = 200_000_000
"""Largest image that may be decoded to be shrunk [pixels]."""

_SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".pgm", ".ppm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), "JPEG2000"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    ".webp": "WEBP",
    ".gif": "GIF",
}
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_HEIF_PLUGIN = "pillow_heif"
_MODES_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_MIN_PEAK_OF_BYTE_RANGE = 16
"""A float image whose largest value lies between 1 and this may be of range 0..1 or 0..255, so it is refused."""

cv2.setNumThreads(0)  # one process a shard: the processes are the parallelism
# Pillow has one limit for all images. The limits here allow larger images if they are shrunk.
Image.MAX_IMAGE_PIXELS = None


@cache
def read_suffixes() -> dict[str, str]:
    """Return the suffixes of readable image files, each with Pillow's name of the format."""
    if importlib.util.find_spec(_HEIF_PLUGIN) is None:
        return _SUFFIXES
    importlib.import_module(_HEIF_PLUGIN).register_heif_opener()
    return _SUFFIXES | dict.fromkeys(_HEIF_SUFFIXES, "HEIF")


def why_not_read(suffix: str) -> str:
    """Return the kind of a file that is left out, with the remedy if there is one."""
    if suffix.lower() in _HEIF_SUFFIXES:
        return f"{suffix.lower()} (pip install {_HEIF_PLUGIN} to read them)"
    return suffix.lower() or "without a suffix"


@dataclass(frozen=True, kw_only=True, slots=True)
class Storing:
    """How images are stored."""

    max_side: int | None = None
    """Larger images are shrunk until their shorter side is this long [pixels]."""
    encode: Literal["keep", "jpeg", "png"] = "keep"
    jpeg_quality: int = 95
    verify: bool = True
    """Decode untouched images too, so that damage shows."""
    crop: FaceCropping | None = None
    """Crop to the face before anything else."""

    @property
    def max_pixels(self) -> int:
        """Largest image that is decoded [pixels]; an image that is shrunk afterwards may be larger."""
        return MAX_PIXELS if self.max_side is None else MAX_SHRUNK_PIXELS

    @property
    def crop_text(self) -> str:
        """How faces are cropped, for the samples' json; shrinking and JPEG are part of it."""
        rewritten = f", max_side {self.max_side}" if self.max_side else ""
        return f"{self.crop}{rewritten}" + (f", JPEG {self.jpeg_quality}" if self.encode == "jpeg" else "")

    def leaves(self, suffix: str | None, size: Callable[[], tuple[int, int]]) -> bool:
        """Whether a file of this kind and size stays as it is."""
        if suffix is None or self.encode != "keep" or self.crop is not None:
            return False
        return self.max_side is None or min(size()) <= self.max_side


def stored_image(payload: bytes, how: Storing) -> tuple[str, bytes]:
    """Return the suffix and the bytes of the image member.

    Raises:
        SampleError: the image is damaged, too large, or of a format that is not read here.
    """
    payload = as_trainable(payload, max_pixels=how.max_pixels)
    suffix = suffix_of(payload[:12]) or ""
    if how.leaves(suffix, lambda: size_of(io.BytesIO(payload))[0]):
        if how.verify:
            decode_image(payload)
        return suffix, payload
    shrink = _reduction(payload, how) if suffix == "jpg" else 1
    image_HWC = decode_image(payload, shrink=shrink, srgb=True, max_pixels=how.max_pixels * shrink**2)
    return rewritten(image_HWC, suffix, how)[:2]


def rewritten(image_HWC: NDArray[np.uint8], suffix: str, how: Storing) -> tuple[str, bytes, int]:
    """Shrink and encode an image; returns suffix, bytes and the shorter side of the result [pixels].

    Args:
        image_HWC: in sRGB.
        suffix: of the file that it comes from, which ``encode keep`` keeps; anything but jpg becomes png.
        how: the way of storing.

    Raises:
        SampleError: it is too large even after shrinking.
    """
    image_HWC = _shrunk(image_HWC, how.max_side)
    if image_HWC.shape[0] * image_HWC.shape[1] > MAX_PIXELS:
        raise SampleError("too_large", f"shrunk to {how.max_side} it has more than {MAX_PIXELS} pixels")
    wanted = {"keep": "jpg" if suffix == "jpg" else "png", "jpeg": "jpg", "png": "png"}[how.encode]
    return *_encoded(image_HWC, wanted, how.jpeg_quality), min(image_HWC.shape[:2])


def stored_bytes_bound(head: bytes, num_bytes: int, image_file: Callable[[], Path | io.BytesIO], how: Storing) -> int:
    """Bound the bytes of the image member: exact for untouched files, an uncompressed PNG for rewritten ones.

    Args:
        head: the first 12 bytes of the file.
        num_bytes: its length.
        image_file: opens it.
        how: the way of storing.
    """
    try:
        if how.leaves(suffix_of(head), lambda: size_of(image_file())[0]):
            return num_bytes
        size, num_channels, profile_bytes = size_of(image_file())
    except SampleError:
        return num_bytes  # never stored: the writer lists it with the other damaged images
    if how.crop is not None:
        size = min(size), min(size)  # a crop is square
    return _png_bound(_shrunk_size(size, how.max_side), num_channels=max(3, num_channels)) + profile_bytes


def _reduction(jpeg: bytes, how: Storing) -> int:
    """Return the factor (1, 2, 4, 8) by which a JPEG above `MAX_PIXELS` is decoded smaller; 1 for other images.

    Example: 12000 x 8000 pixels with max_side 900: 8000 // 8 = 1000 >= 900, so the JPEG is decoded at an eighth.
    """
    (width, height), _, _ = size_of(io.BytesIO(jpeg))
    if how.max_side is None or width * height <= MAX_PIXELS:
        return 1
    return next((shrink for shrink in (8, 4, 2) if min(width, height) // shrink >= how.max_side), 1)


def _shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Scale a size so that its shorter side becomes ``max_side``; smaller images keep their size [pixels]."""
    if max_side is None or min(size) <= max_side:
        return size
    scale = max_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _png_bound(size: tuple[int, int], *, num_channels: int) -> int:
    """Bound a PNG of 8-bit channels: the pixels, a filter byte for each row, 1 % and 4 kB for the format [bytes]."""
    width, height = size
    return int((width * height * num_channels + max(size)) * 1.01) + 4096


def _shrunk(image_HWC: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    height, width, _ = image_HWC.shape
    size = _shrunk_size((width, height), max_side)
    if size == (width, height):
        return image_HWC
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _encoded(image_HWC: NDArray[np.uint8], suffix: str, jpeg_quality: int) -> tuple[str, bytes]:
    """Encode as asked; a JPEG above `_png_bound` becomes a PNG, so that no image is larger than planned."""
    image, file = Image.fromarray(image_HWC), io.BytesIO()
    if suffix == "jpg":
        image.save(file, "JPEG", quality=jpeg_quality, subsampling="4:4:4")
        if file.tell() <= _png_bound(image.size, num_channels=3):
            return "jpg", file.getvalue()
        file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()


def as_trainable(payload: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a JPEG, PNG or WebP file unchanged, and any other image as an upright PNG.

    Raises:
        SampleError: it is no image, damaged or too large, or the range of its pixel values is unknown.
    """
    if suffix_of(payload[:12]):
        return payload
    file = io.BytesIO()
    with _opened(io.BytesIO(payload)) as image:
        if image.width * image.height > max_pixels:
            raise SampleError("too_large", f"{image.width}x{image.height} has more than {max_pixels} pixels")
        kind, profile = image.format, image.info.get("icc_profile")
        upright = ImageOps.exif_transpose(image)  # the EXIF orientation is not copied
        stored = _in_modes_of_png(upright, kind, profile)
        stored.save(file, "PNG", icc_profile=profile if stored is upright else None, exif=b"")
    return file.getvalue()


def size_of(image_file: Path | io.BytesIO) -> tuple[tuple[int, int], int, int]:
    """Return (width, height), the number of channels and the bytes of the colour profile, without decoding.

    Raises:
        SampleError: it is no image, or its header is damaged.
    """
    with _opened(image_file) as image:
        return image.size, len(image.getbands()), len(image.info.get("icc_profile") or b"")


def describe_damage(error: Exception) -> str:
    """Describe the damage of an image, without memory addresses."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@contextlib.contextmanager
def _opened(image_file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image of a readable format; turn errors of its plug-in, also inside the block, into `SampleError`."""
    try:
        formats = tuple(set(read_suffixes().values()))
        with warnings.catch_warnings(action="ignore"), Image.open(image_file, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:  # Pillow's message holds a memory address
        raise SampleError(
            "not_an_image", "no image of a format that is read here, or its beginning is damaged"
        ) from error
    except PILLOW_ERRORS as error:
        raise SampleError("corrupt", f"the image is damaged ({error})") from error


def _in_modes_of_png(image: Image.Image, kind: str | None, profile: bytes | None) -> Image.Image:
    """Return the image itself if PNG can hold its mode, otherwise a converted one."""
    if image.mode in _MODES_OF_PNG:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode == "I":
        return Image.fromarray(_sixteen_bits(np.asarray(image), kind))
    if image.mode == "F":
        return Image.fromarray(_bytes_of_floats(np.asarray(image)))
    if image.mode == "LAB":
        return lab_to_srgb(image)
    if image.mode == "CMYK":
        return to_srgb(image, profile).convert("RGB")
    return image.convert({"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(image.mode, "RGB"))


def _sixteen_bits(value_HW: NDArray[np.int32], kind: str | None) -> NDArray[np.uint16]:
    low, high = int(value_HW.min()), int(value_HW.max())
    if low < 0 or high > 0xFFFF or (kind == "TIFF" and high <= 0xFF):
        raise SampleError("unknown_range", f"its integers lie from {low} to {high}: save it with 8 or 16 bits")
    return value_HW.astype(np.uint16)


def _bytes_of_floats(value_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert floats of range 0..1 or 0..255 to bytes."""
    low, high = float(value_HW.min()), float(value_HW.max())
    if low >= 0 and high <= 1:
        return np.asarray(np.rint(value_HW * 255), dtype=np.uint8)
    if low >= 0 and _MIN_PEAK_OF_BYTE_RANGE <= high <= 255:
        return np.asarray(np.rint(value_HW), dtype=np.uint8)
    raise SampleError("unknown_range", f"its floats lie from {low:g} to {high:g}: scale them to 0..1 or 0..255")
