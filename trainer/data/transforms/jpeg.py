"""JPEG compression in memory, for the distortions."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Draws = NDArray[np.float32]


def encode_jpeg(image_HWC: Pixels, quality: int) -> bytes:
    """Compress a uint8 RGB image (H, W, 3) with halved colour resolution, as cameras do."""
    payload: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image_HWC), quality=quality, colorsubsampling="420")
    return payload


def recompress(image_HWC: Pixels, quality: int) -> tuple[Pixels, int]:
    """Compress and decode again; returns the image (H, W, 3) and the size of the file [bytes]."""
    payload = encode_jpeg(image_HWC, quality)
    return simplejpeg.decode_jpeg(payload), len(payload)
