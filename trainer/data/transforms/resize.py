"""Antialiased bicubic scaling: the kernel is widened when the image shrinks.

The result equals Pillow's and torchvision's bicubic, which published MAE code uses, to within a grey level. It is
torch's kernel for bytes and costs about twice OpenCV's cubic. OpenCV's cubic is not antialiased: shrinking adds texture
that is not in the image. OpenCV's area interpolation shrinks well, but is slower, and enlarging with it gives blocks.

Shapes: H, W the new size; images are HWC uint8 RGB.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Resize = Literal["antialias", "former", "native"]
"""The recipe's choice: this module, the scaling of release 0.1 for runs that began with it, or none."""


def resize_into(image_HWC: NDArray[np.uint8], out_HWC: NDArray[np.uint8]) -> None:
    """Scale an image, or a crop of one, to the size of ``out`` and write it there."""
    height, width = out_HWC.shape[:2]
    # torch warns of arrays that it must not write to, so a read-only one is copied.
    pixels = torch.from_numpy(image_HWC if image_HWC.flags.writeable else image_HWC.copy())
    source_1CHW = pixels.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    scaled_1CHW = F.interpolate(source_1CHW, size=(height, width), mode="bicubic", antialias=True)
    torch.from_numpy(out_HWC).copy_(scaled_1CHW[0].permute(1, 2, 0))


def at_least(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the image itself, or enlarged if its shorter side is below ``side`` [pixels]."""
    shorter = min(image_HWC.shape[:2])
    if shorter >= side:
        return image_HWC
    height, width = (round(length * side / shorter) for length in image_HWC.shape[:2])
    return resized(image_HWC, height, width)


def resized(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Scale an image to (height, width) [pixels]."""
    out_HWC = np.empty((height, width, 3), dtype=np.uint8)
    resize_into(image_HWC, out_HWC)
    return out_HWC
