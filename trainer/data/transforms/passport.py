"""Distortions of passport photographs: printing, scanning, resizing, compression."""

import io
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from trainer.data.transforms.jpeg import Draws, Pixels, encode_jpeg, recompress
from trainer.errors import ConfigError
from trainer.seeds import Purpose, normals

_PASSPORT_PIXELS = 413 * 531
_JPEG_HEADER_BYTES, _JPEG2000_HEADER_BYTES = 623, 260
_DRAWS_A_KIND = 5


class PassportChain:
    """Print and scan, resizing, and one compression, each with a given probability, in the order of a real passport.

    Args:
        kinds: any of print_scan, resize, jpeg2000, jpeg_budget.
        probability: of each; at most one of the two compressions is applied.

    Raises:
        ConfigError: a kind is unknown.
    """

    def __init__(self, kinds: Sequence[str], probability: float) -> None:
        unknown = [kind for kind in kinds if kind not in _KINDS]
        if unknown:
            raise ConfigError(f"passport_aug is {list(kinds)}, but {unknown[0]!r} is none of {', '.join(_KINDS)}")
        self._kinds, self._probability = [kind for kind in _KINDS if kind in kinds], probability

    @property
    def num_draws(self) -> int:
        """For each kind one number decides whether it is applied, and five decide how."""
        return len(self._kinds) * (1 + _DRAWS_A_KIND)

    def __call__(self, image_HWC: Pixels, draws_K: Draws) -> Pixels:
        """Return the changed image."""
        compressed = False
        for kind, mine in zip(self._kinds, draws_K.reshape(-1, 1 + _DRAWS_A_KIND), strict=True):
            compresses = kind.startswith("jpeg")
            if mine[0] < self._probability and not (compresses and compressed):
                image_HWC = _KINDS[kind](image_HWC, mine[1:])
                compressed |= compresses
        return image_HWC


def jpeg_to_budget(image_HWC: Pixels, budget_bytes: int) -> tuple[Pixels, int]:
    """Compress with the highest JPEG quality that fits into a budget (passport chips, ICAO 9303: 15 to 20 kB).

    An image that does not fit even at quality 5 is shrunk first and enlarged again after decoding.

    Returns:
        image_HWC: the decoded file, at the size of the input.
        num_bytes: length of the file, at most the budget (unless even an image of 8 pixels does not fit).
    """
    height, width = image_HWC.shape[:2]
    small_HWC = image_HWC
    while len(encode_jpeg(small_HWC, 5)) > budget_bytes and min(small_HWC.shape[:2]) > 8:
        size = (max(8, round(small_HWC.shape[1] * 0.7)), max(8, round(small_HWC.shape[0] * 0.7)))
        small_HWC = np.asarray(cv2.resize(small_HWC, size, interpolation=cv2.INTER_AREA))
    low, high = 5, 100  # bisection over the quality; low always fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode_jpeg(small_HWC, middle)) <= budget_bytes else (low, middle - 1)
    decoded_HWC, num_bytes = recompress(small_HWC, low)
    if decoded_HWC.shape[:2] != (height, width):
        decoded_HWC = np.asarray(cv2.resize(decoded_HWC, (width, height), interpolation=cv2.INTER_CUBIC))
    return decoded_HWC, num_bytes


def jpeg2000(image_HWC: Pixels, ratio: float) -> Pixels:
    """Compress to 1 / ratio of the raw bytes with JPEG 2000 (OpenJPEG, irreversible), as on passport chips."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)
    return np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))


def print_scan(image_HWC: Pixels, *, blur: float, noise: float, tone: float, key: int) -> Pixels:
    """Simulate printing and scanning: blur, the printer's tone curve, noise that grows in dark areas.

    Args:
        image_HWC: the photograph.
        blur: deviation of the point spread [pixels].
        noise: deviation of the noise [grey levels].
        tone: 0 keeps the tones, 1 applies the whole curve.
        key: seed of the noise.

    Source: Ferrara, Franco and Maltoni 2019, arXiv 1901.08811: tones 8.3 * max(x - 35, 0) ** 0.6 + 20.
    """
    soft_HWC = cv2.GaussianBlur(image_HWC, (0, 0), max(blur, 0.05)).astype(np.float32)
    printed_HWC = (1 - tone) * soft_HWC + tone * (8.3 * np.maximum(soft_HWC - 35, 0) ** 0.6 + 20)
    grain_HWC = normals(key, Purpose.PRINT_GRAIN, image_HWC.size).reshape(image_HWC.shape)
    # The noise doubles from white to black.
    darkness_HWC = 1 + (255 - printed_HWC) / 255
    return np.asarray((printed_HWC + noise * darkness_HWC * grain_HWC).clip(0, 255).astype(np.uint8))


def resize_chain(image_HWC: Pixels, draws_K: Draws) -> Pixels:
    """Shrink the image to 40-90 % and enlarge it again, with drawn interpolations, as mail and archives do."""
    methods = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
    height, width = image_HWC.shape[:2]
    share = 0.4 + 0.5 * float(draws_K[0])
    size = (max(4, round(width * share)), max(4, round(height * share)))
    down, up = (methods[int(draw * len(methods))] for draw in draws_K[1:3].tolist())
    return np.asarray(cv2.resize(cv2.resize(image_HWC, size, interpolation=down), (width, height), interpolation=up))


def _drawn_bytes(image_HWC: Pixels, draw: float) -> float:
    """Draw the bytes of a compressed image without its header, uniform in the logarithm.

    A passport photograph of 413 x 531 pixels gets 0.4 to 2.4 bits a pixel, which is 11 to 66 kB; chips hold 15 to 20.
    A smaller image gets more bits a pixel, because each of its pixels shows more of the face: 92 x 112 pixels get 1.1
    to 6.6 kB instead of 0.5 to 3.1 kB, which would leave a handful of blocks.
    """
    pixels = image_HWC.shape[0] * image_HWC.shape[1]
    return float(0.4 * 6.0**draw / 8 * pixels * max(1.0, _PASSPORT_PIXELS / pixels) ** 0.25)


def _drawn_jpeg(image_HWC: Pixels, draws_K: Draws) -> Pixels:
    return jpeg_to_budget(image_HWC, round(_JPEG_HEADER_BYTES + _drawn_bytes(image_HWC, float(draws_K[0]))))[0]


def _drawn_jpeg2000(image_HWC: Pixels, draws_K: Draws) -> Pixels:
    num_bytes = _JPEG2000_HEADER_BYTES + _drawn_bytes(image_HWC, float(draws_K[0]))
    return jpeg2000(image_HWC, max(1.0, image_HWC.size / num_bytes))


def _drawn_print(image_HWC: Pixels, draws_K: Draws) -> Pixels:
    blur, noise, tone, high, low = draws_K.tolist()[:5]
    # Two draws of 24 bits are a key of 48 bits; blur grows with images above 256 pixels.
    key = int(high * 2**24) << 24 | int(low * 2**24)
    scale = max(1.0, min(image_HWC.shape[:2]) / 256)
    return print_scan(image_HWC, blur=(0.3 + 0.7 * blur) * scale, noise=1 + 4 * noise, tone=0.3 + 0.7 * tone, key=key)


_KINDS: dict[str, Callable[[Pixels, Draws], Pixels]] = {
    "print_scan": _drawn_print,
    "resize": resize_chain,
    "jpeg2000": _drawn_jpeg2000,
    "jpeg_budget": _drawn_jpeg,
}
