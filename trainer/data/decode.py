"""Image bytes -> uint8 RGB, safely: only JPEG and PNG, bounded before any pixel is decoded, upright.

Every refusal is a `SampleError` with one of these reasons: ``empty``, ``not_an_image``, ``too_large``, ``too_small``,
``corrupt``.

Shapes: H, W image size; HWC uint8 RGB.
"""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.errors import SampleError

MAX_PIXELS = 50_000_000
MIN_SIDE = 8
_ORIENTATION = 0x0112


def decode_image(payload: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> NDArray[np.uint8]:
    """Decode one image.

    Plain JPEGs without EXIF take the fast path (libjpeg-turbo); everything else goes through Pillow, which turns the
    image as its EXIF orientation says and converts grey, palette, CMYK, alpha (on black) and 16-bit images to RGB.

    Args:
        payload: the bytes of a JPEG or PNG file.
        max_pixels: larger images are refused before decoding [pixels].
        min_side: images with a shorter side are refused [pixels].

    Returns:
        image_HWC: C-contiguous.

    Raises:
        SampleError: the bytes are not such an image.
    """
    if not payload:
        raise SampleError("empty", "the image has no bytes")
    if payload.startswith(b"\xff\xd8") and b"Exif\0" not in payload[:4096]:
        fast = _decode_plain_jpeg(payload, max_pixels, min_side)
        if fast is not None:
            return fast
    return _decode_any(payload, max_pixels, min_side)


def _decode_plain_jpeg(payload: bytes, max_pixels: int, min_side: int) -> NDArray[np.uint8] | None:
    """Decode a JPEG in YCbCr or grey; None leaves it to Pillow."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
        _check_size(width, height, max_pixels, min_side)
        if colour_space not in ("YCbCr", "Gray"):
            return None
        image_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(payload, colorspace="RGB", strict=True)
    except ValueError:
        return None  # damaged or unusual: Pillow decides which
    return image_HWC


def _decode_any(payload: bytes, max_pixels: int, min_side: int) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of metadata, and Pillow's own bomb warning: we have a limit
            with Image.open(io.BytesIO(payload), formats=("JPEG", "PNG")) as image:
                _check_size(image.width, image.height, max_pixels, min_side)
                return np.ascontiguousarray(_to_rgb(image))
    except UnidentifiedImageError as error:
        raise SampleError("not_an_image", "neither JPEG nor PNG") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("corrupt", f"the image is damaged ({error})") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # convert() would clip 16 bits instead of scaling them
        grey_HW = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "P") and (image.mode != "P" or "transparency" in image.info):
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _check_size(width: int, height: int, max_pixels: int, min_side: int) -> None:
    if width * height > max_pixels:
        raise SampleError("too_large", f"{width}x{height} has more than {max_pixels} pixels")
    if min(width, height) < min_side:
        raise SampleError("too_small", f"{width}x{height} has a side below {min_side} pixels")
