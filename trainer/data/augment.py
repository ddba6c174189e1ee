"""Image pipelines: the random one of pre-training, keyed by position, and the fixed one of measurements.

Each transform gets a seed of its own from (run seed, position). albumentations would give one seed to all transforms
of a pipeline, and then every coin of one sample falls on the same side.

Shapes: H, W input size, S output size; images are HWC uint8 RGB.
"""

import os

import numpy as np
from numpy.typing import NDArray

from trainer.seeds import Purpose, random_words

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version at import

import albumentations as A
import cv2

cv2.setNumThreads(0)  # one loader process, one thread: the workers are the parallelism


class PretrainAugment:
    """Random resized crop and mirror, as the published MAE (He et al. 2021, arXiv 2111.06377, appendix A.1)."""

    def __init__(self, *, image_size: int, crop_scale: tuple[float, float], flip_probability: float, seed: int) -> None:
        self._seed = seed
        self._pipeline = A.Compose(
            [
                A.RandomResizedCrop(
                    size=(image_size, image_size), scale=crop_scale, ratio=(3 / 4, 4 / 3), interpolation=cv2.INTER_CUBIC
                ),
                A.HorizontalFlip(p=flip_probability),
            ],
            seed=0,
        )

    def __call__(self, image_HWC: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """Return the SxSx3 view of the image that belongs to this position of the run."""
        words = random_words(self._seed, Purpose.AUGMENT, position, len(self._pipeline.transforms))[0]
        for transform, word in zip(self._pipeline.transforms, words, strict=True):
            transform.set_random_seed(int(word))
        image_SSC: NDArray[np.uint8] = self._pipeline(image=image_HWC)["image"]
        return image_SSC


class CenterView:
    """Resize the shorter side and cut the centre: the same view of an image every time."""

    def __init__(self, *, image_size: int) -> None:
        self._pipeline = A.Compose(
            [
                A.SmallestMaxSize(max_size=image_size, interpolation=cv2.INTER_AREA),
                A.CenterCrop(height=image_size, width=image_size),
            ],
            seed=0,
        )

    def __call__(self, image_HWC: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """Return the SxSx3 centre; the position is of no account."""
        del position
        image_SSC: NDArray[np.uint8] = self._pipeline(image=image_HWC)["image"]
        return image_SSC
