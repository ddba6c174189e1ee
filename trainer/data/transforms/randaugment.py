"""Distortions of training images: basic augmentation and RandAugment.

Each is a pure function of an image and its draws, uniform numbers in [0, 1). albumentations would draw from its own
generators, so every transform is built with a fixed strength and chosen here. The size of images never changes. Borders
are mirrored: black corners would show a detector which images were distorted.

Shapes: H, W image size, K draws; images are HWC uint8 RGB.
"""

import os
from collections.abc import Callable

import numpy as np

from trainer.errors import ConfigError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version at import

import albumentations as A
import cv2

from trainer.data.transforms.jpeg import Draws, Pixels, recompress

_MAX_MAGNITUDE = 10
_RANGES = {"rotate": 30.0, "shear": 0.3, "translate": 0.45, "enhance": 0.9}


class BasicAugment:
    """Brightness and contrast within 10 %, and sometimes a JPEG of good quality. No blur: it would remove seams."""

    num_draws = 4

    def __call__(self, image_HWC: Pixels, draws_K: Draws) -> Pixels:
        """Return the changed image."""
        contrast, brightness = 1 + 0.2 * (float(draws_K[0]) - 0.5), 1 + 0.2 * (float(draws_K[1]) - 0.5)
        mean = float(image_HWC.mean())
        # Contrast c about the mean m, then brightness b: b * (c * (x - m) + m) = (b * c) * x + b * m * (1 - c).
        alpha, beta = contrast * brightness, brightness * mean * (1 - contrast)
        changed_HWC: Pixels = np.clip(image_HWC * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)
        if draws_K[2] < 0.3:
            changed_HWC = recompress(changed_HWC, 60 + int(40 * draws_K[3]))[0]
        return changed_HWC


class RandAugment:
    """Some of 14 operations, each chosen uniformly, at one common strength.

    Source: Cubuk et al. 2019, arXiv 1909.13719, with torchvision's operations and limits: rotation to 30 degrees, shear
    to 0.3, enhancement to 1 +- 0.9, solarize from 256 down to 0, posterize from 8 bits down to 4; translation to 0.45
    of the side, as in timm. Strengths grow in proportion to the magnitude for every operation, and signs are drawn.
    torchvision has 31 steps, so magnitude m is its step 3 * m: 9 is its 27, and 3 is its default.
    timm's m9 has the same rotations, shears and enhancements. It differs in four ways: each operation is applied with a
    probability of 0.5; posterize leaves 3 bits instead of 4; solarize and posterize weaken with the magnitude (unless
    "inc"); invert and a second solarize replace identity.

    Args:
        num_ops: operations for each image.
        magnitude: 1 to 10.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, *, num_ops: int = 2, magnitude: int = 9) -> None:
        if not 1 <= magnitude <= _MAX_MAGNITUDE:
            raise ConfigError(f"advanced_aug_magnitude is {magnitude}, but must be from 1 to {_MAX_MAGNITUDE} (try 9)")
        if num_ops < 1:
            raise ConfigError(f"advanced_aug_num_ops is {num_ops}, but must be at least 1 (try 2)")
        self._num_ops, self.ops = num_ops, rand_augment_ops(magnitude)

    @property
    def num_draws(self) -> int:
        """Two for each operation: which one, and its sign."""
        return 2 * self._num_ops

    def __call__(self, image_HWC: Pixels, draws_K: Draws) -> Pixels:
        """Return the changed image."""
        names = list(self.ops)
        for which, sign in draws_K.reshape(self._num_ops, 2).tolist():
            image_HWC = self.ops[names[int(which * len(names))]][int(sign * 2)](image_HWC)
        return image_HWC


def rand_augment_ops(magnitude: int) -> dict[str, tuple[Callable[[Pixels], Pixels], Callable[[Pixels], Pixels]]]:
    """Build the operations at a magnitude: name -> (negative, positive), equal for an operation without sign."""
    share = magnitude / _MAX_MAGNITUDE
    bits = 8 - round(4 * share)
    rotate, shear, translate, enhance = (share * limit for limit in _RANGES.values())
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
