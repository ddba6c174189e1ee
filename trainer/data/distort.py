"""Distortions of training images: basic augmentation, RandAugment, and a passport's way from camera to chip.

Each is a function of an image and its draws, uniform numbers in [0, 1), and of nothing else: albumentations would
draw from generators of its own, so every transform of it is built with a fixed strength and drawn for here. Shapes of
images never change; borders are mirrored, because black corners would tell a detector which images were distorted.

Shapes: H, W image size, K draws; images are HWC uint8 RGB.
"""

import io
import os
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from trainer.errors import ConfigError
from trainer.seeds import Purpose, normals

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version at import

import albumentations as A
import cv2

Pixels = NDArray[np.uint8]
Draws = NDArray[np.float32]

_MOST = 10
_PASSPORT_PIXELS = 413 * 531
_JPEG_HEADER_BYTES, _JPEG2000_HEADER_BYTES = 623, 260
_RANGES = {"rotate": 30.0, "shear": 0.3, "translate": 0.45, "enhance": 0.9}


class BasicAugment:
    """Brightness and contrast within 10 %, and at times a JPEG of good quality. No blur: seams are what is learned."""

    num_draws = 4

    def __call__(self, image_HWC: Pixels, draws_K: Draws) -> Pixels:
        """Return the changed image."""
        contrast, brightness = 1 + 0.2 * (float(draws_K[0]) - 0.5), 1 + 0.2 * (float(draws_K[1]) - 0.5)
        mean = float(image_HWC.mean())
        alpha, beta = contrast * brightness, brightness * mean * (1 - contrast)
        changed_HWC: Pixels = np.clip(image_HWC * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)
        if draws_K[2] < 0.3:
            changed_HWC = _jpeg(changed_HWC, 60 + int(40 * draws_K[3]))[0]
        return changed_HWC


class RandAugment:
    """Some of 14 operations, each chosen uniformly, at one common strength.

    Source: Cubuk et al. 2019, arXiv 1909.13719, with torchvision's operations and ends: rotation to 30 degrees, shear
    to 0.3, enhancement to 1 +- 0.9, solarize from 256 down to 0, posterize from 8 bits down to 4; translation to 0.45
    of the side, as timm's. Strengths grow in proportion to the magnitude for every operation, and signs are drawn.
    torchvision counts the same way in 31 steps, so that magnitude m is its step 3 * m: 9 is its 27, and 3 its default.
    timm's m9 has the same turns, shears and enhancements; but there each operation is applied with a chance of 0.5,
    posterize leaves 3 bits where it leaves 4 here, solarize and posterize weaken with the magnitude (unless "inc"), and
    invert and a second solarize stand in the place of identity.

    Args:
        num_ops: operations an image.
        magnitude: 1 to 10.
    """

    def __init__(self, *, num_ops: int = 2, magnitude: int = 9) -> None:
        if not 1 <= magnitude <= _MOST:
            raise ConfigError(f"advanced_aug_magnitude is {magnitude}, but must be from 1 to {_MOST} (try 9)")
        if num_ops < 1:
            raise ConfigError(f"advanced_aug_num_ops is {num_ops}, but must be at least 1 (try 2)")
        self._num_ops, self.ops = num_ops, rand_augment_ops(magnitude)

    @property
    def num_draws(self) -> int:
        """Two an operation: which, and its sign."""
        return 2 * self._num_ops

    def __call__(self, image_HWC: Pixels, draws_K: Draws) -> Pixels:
        """Return the changed image."""
        names = list(self.ops)
        for which, sign in draws_K.reshape(self._num_ops, 2).tolist():
            image_HWC = self.ops[names[int(which * len(names))]][int(sign * 2)](image_HWC)
        return image_HWC


def rand_augment_ops(magnitude: int) -> dict[str, tuple[Callable[[Pixels], Pixels], Callable[[Pixels], Pixels]]]:
    """Build the operations at a magnitude, by name: with negative and with positive sign, alike where there is none."""
    share = magnitude / _MOST
    bits = 8 - round(4 * share)
    rotate, shear, translate, enhance = (share * most for most in _RANGES.values())
    mirror = {"border_mode": cv2.BORDER_REFLECT_101, "p": 1.0}
    still = {
        name: (0.0, 0.0) if name == "hue" else (1.0, 1.0) for name in ("brightness", "contrast", "saturation", "hue")
    }

    def enhanced(name: str, sign: int) -> A.BasicTransform:
        factor = 1 + sign * enhance
        return A.ColorJitter(**(still | {name: (factor, factor)}), p=1.0)

    def moved(kind: str, x: float, y: float) -> A.BasicTransform:
        return A.Affine(**{kind: {"x": (x, x), "y": (y, y)}}, **mirror)

    def sharpened(sign: int) -> Callable[[Pixels], Pixels]:
        return lambda image_HWC: _sharpness(image_HWC, 1 + sign * enhance)

    def both(make: Callable[[int], A.BasicTransform]) -> tuple[Callable[[Pixels], Pixels], Callable[[Pixels], Pixels]]:
        return _apply(make(-1)), _apply(make(1))

    return {
        "identity": (_unchanged, _unchanged),
        "autocontrast": both(lambda _: A.AutoContrast(method="pil", cutoff=0, p=1.0)),
        "equalize": both(lambda _: A.Equalize(mode="pil", p=1.0)),
        "rotate": both(lambda s: A.Affine(rotate=(s * rotate, s * rotate), **mirror)),
        "solarize": both(lambda _: A.Solarize(threshold_range=(1 - share, 1 - share), p=1.0)),
        "color": both(lambda s: enhanced("saturation", s)),
        "posterize": both(lambda _: A.Posterize(num_bits=bits, p=1.0)) if bits < 8 else (_unchanged, _unchanged),
        "contrast": both(lambda s: enhanced("contrast", s)),
        "brightness": both(lambda s: enhanced("brightness", s)),
        "sharpness": (sharpened(-1), sharpened(1)),
        "shear_x": both(lambda s: moved("shear", _degrees(s * shear), 0.0)),
        "shear_y": both(lambda s: moved("shear", 0.0, _degrees(s * shear))),
        "translate_x": both(
            lambda s: A.Affine(translate_percent={"x": (s * translate,) * 2, "y": (0.0, 0.0)}, **mirror)
        ),
        "translate_y": both(
            lambda s: A.Affine(translate_percent={"x": (0.0, 0.0), "y": (s * translate,) * 2}, **mirror)
        ),
    }


# ---------------------------------------------------------------------------------------------- passports


class PassportChain:
    """Print and scan, resizing, and one compression, each with a given chance, in the order in which they happen.

    Args:
        kinds: any of print_scan, resize, jpeg2000, jpeg_budget.
        probability: of each; of the two compressions at most one is applied.
    """

    def __init__(self, kinds: Sequence[str], probability: float) -> None:
        unknown = [kind for kind in kinds if kind not in _KINDS]
        if unknown:
            raise ConfigError(f"passport_aug is {list(kinds)}, but {unknown[0]!r} is none of {', '.join(_KINDS)}")
        self._kinds, self._probability = [kind for kind in _KINDS if kind in kinds], probability

    @property
    def num_draws(self) -> int:
        """One for whether, the rest for how, a kind."""
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

    An image that does not fit even at quality 5 is made smaller first and comes back to its size.

    Returns:
        image_HWC: the decoded file, at the size of the input.
        num_bytes: length of the file, at most the budget (unless an image of 8 pixels does not fit).
    """
    height, width = image_HWC.shape[:2]
    small_HWC = image_HWC
    while len(_encoded(small_HWC, 5)) > budget_bytes and min(small_HWC.shape[:2]) > 8:
        size = (max(8, round(small_HWC.shape[1] * 0.7)), max(8, round(small_HWC.shape[0] * 0.7)))
        small_HWC = np.asarray(cv2.resize(small_HWC, size, interpolation=cv2.INTER_AREA))
    low, high = 5, 100  # invariant: low fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_encoded(small_HWC, middle)) <= budget_bytes else (low, middle - 1)
    decoded_HWC, num_bytes = _jpeg(small_HWC, low)
    if decoded_HWC.shape[:2] != (height, width):
        decoded_HWC = np.asarray(cv2.resize(decoded_HWC, (width, height), interpolation=cv2.INTER_CUBIC))
    return decoded_HWC, num_bytes


def jpeg2000(image_HWC: Pixels, ratio: float) -> Pixels:
    """Compress to 1 / ratio of the raw pixels with JPEG 2000 (OpenJPEG, irreversible), as passport chips hold it."""
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
        key: of the noise, which depends on it and nothing else.

    Source: Ferrara, Franco and Maltoni 2019, arXiv 1901.08811: tones 8.3 * max(x - 35, 0) ** 0.6 + 20.
    """
    soft_HWC = cv2.GaussianBlur(image_HWC, (0, 0), max(blur, 0.05)).astype(np.float32)
    printed_HWC = (1 - tone) * soft_HWC + tone * (8.3 * np.maximum(soft_HWC - 35, 0) ** 0.6 + 20)
    grain_HWC = normals(key, Purpose.PRINT_GRAIN, image_HWC.size).reshape(image_HWC.shape)
    darkness_HWC = 1 + (255 - printed_HWC) / 255
    return np.asarray((printed_HWC + noise * darkness_HWC * grain_HWC).clip(0, 255).astype(np.uint8))


def resize_chain(image_HWC: Pixels, draws_K: Draws) -> Pixels:
    """Make the image smaller and bring it back, with interpolations drawn: what sending and archiving does."""
    methods = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
    height, width = image_HWC.shape[:2]
    share = 0.4 + 0.5 * float(draws_K[0])
    size = (max(4, round(width * share)), max(4, round(height * share)))
    down, up = (methods[int(draw * len(methods))] for draw in draws_K[1:3].tolist())
    return np.asarray(cv2.resize(cv2.resize(image_HWC, size, interpolation=down), (width, height), interpolation=up))


def _drawn_bytes(image_HWC: Pixels, draw: float) -> float:
    """Draw what a compressed image may hold besides its header: as much a face as of a passport's 413 x 531 pixels.

    There it is 0.4 to 2.4 bits a pixel, 11 to 66 kB, uniform in the logarithm; chips have 15 to 20. Each pixel of a
    smaller image holds more of the face, and with as few bits a face of 92 x 112 is a handful of blocks.
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
    key = int(high * 2**24) << 24 | int(low * 2**24)
    scale = max(1.0, min(image_HWC.shape[:2]) / 256)
    return print_scan(image_HWC, blur=(0.3 + 0.7 * blur) * scale, noise=1 + 4 * noise, tone=0.3 + 0.7 * tone, key=key)


_DRAWS_A_KIND = 5
_KINDS: dict[str, Callable[[Pixels, Draws], Pixels]] = {
    "print_scan": _drawn_print,
    "resize": resize_chain,
    "jpeg2000": _drawn_jpeg2000,
    "jpeg_budget": _drawn_jpeg,
}


# ---------------------------------------------------------------------------------------------- small parts


def _apply(transform: A.BasicTransform) -> Callable[[Pixels], Pixels]:
    def apply(image_HWC: Pixels) -> Pixels:
        changed_HWC: Pixels = transform(image=image_HWC)["image"]
        return changed_HWC

    return apply


def _unchanged(image_HWC: Pixels) -> Pixels:
    return image_HWC


def _sharpness(image_HWC: Pixels, factor: float) -> Pixels:
    """Blend with Pillow's smoothed image, as ``ImageEnhance.Sharpness``; its border of one pixel stays."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    smooth_HWC = cv2.filter2D(image_HWC, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    changed_HWC: Pixels = np.array(cv2.addWeighted(image_HWC, factor, smooth_HWC, 1 - factor, 0), dtype=np.uint8)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        changed_HWC[edge] = image_HWC[edge]
    return changed_HWC


def _degrees(slope: float) -> float:
    return float(np.degrees(np.arctan(slope)))


def _encoded(image_HWC: Pixels, quality: int) -> bytes:
    payload: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image_HWC), quality=quality, colorsubsampling="420")
    return payload


def _jpeg(image_HWC: Pixels, quality: int) -> tuple[Pixels, int]:
    payload = _encoded(image_HWC, quality)
    return simplejpeg.decode_jpeg(payload), len(payload)
