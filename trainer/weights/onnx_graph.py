"""The graph of an ONNX export: from photographs of any size to scores, with timm's own modules inside.

The graph scales and cuts a photograph as `trainer.data.transforms.views.CenterView` does, to the same pixels. It
repeats the integer arithmetic of torch's antialiased bicubic kernel for bytes, in float64, where these integers are
exact.

Shapes: B photographs, H, W their size, R scaled rows or columns, S those of the view, N pixels, K exponents,
C channels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.data.transforms.resize import resized
from trainer.models.detector import pool
from trainer.weights.subject import Subject, calibrated

_CUBIC = -0.5
"""The parameter of Keys' cubic that Pillow and torch's antialiased bicubic use."""
_SUPPORT = 2
"""Pixels on each side that the cubic reaches, before it is widened."""
_MAX_EXPONENT, _WEIGHT_LIMIT = 22, 1 << 15
"""torch scales the weights of a pass by the largest 2^k, k <= 22, for which the largest still fits into 16 bits."""


class Graph(nn.Module):
    """From uint8 photographs to the outputs of the ONNX file.

    Args:
        subject: the model.
        vit: timm's model with the subject's weights, adapters merged in.
        scales: accept photographs of any size; otherwise only the view, of the model's image size.
        native: keep photographs at their own resolution, and scale up only those that do not cover the view.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, subject: Subject, vit: Any, *, scales: bool, native: bool = False) -> None:
        super().__init__()
        self.vit, detector = vit, subject.detector
        self.head = detector.head if detector else None
        self.residual = detector.residual if detector else None
        self._size, self._scales, self._native = subject.image_size, scales, native
        self._pooling, self._scale = (detector.options.pooling, detector.scale) if detector else ("", 1.0)
        self._calibration = subject.calibration
        # Not "mean" and "std": torch 2.6 also names a result after its operation, and a name may be there once.
        for name, values in (("pixel_mean", subject.mean), ("pixel_std", subject.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, images_BHWC: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return tokens, or for a detector P(morph) (B) and the logits (B, 2)."""
        if self._scales:
            view_BCHW = scaled_and_cut(images_BHWC, *self._size, native=self._native)
        else:
            view_BCHW = images_BHWC.permute(0, 3, 1, 2)
        tokens_BTD: Tensor = self.vit.forward_features((view_BCHW.float() / 255 - self.pixel_mean) / self.pixel_std)
        if self.head is None:
            return tokens_BTD
        pooled_BD = pool(tokens_BTD, self._pooling, self.vit)
        if self.residual is not None:
            pooled_BD = self.residual(view_BCHW.float(), pooled_BD)
        logits_BC = self.head(pooled_BD) * self._scale
        return calibrated(logits_BC, *self._calibration), logits_BC


def scaled_and_cut(images_BHWC: Tensor, height: int, width: int, *, native: bool = False) -> Tensor:
    """Scale photographs of one size until they just cover the view, and cut the centre; equals `reference_view`.

    With ``native`` larger ones are not scaled down: the weights of their scaling are then those of the identity.

    Args:
        images_BHWC: uint8 RGB.
        height: of the view [pixels].
        width: of the view [pixels].
        native: scale up only.

    Returns:
        view_BCHW: the same grey levels in float32.
    """
    rows, columns = images_BHWC.shape[1], images_BHWC.shape[2]
    rows_, columns_ = _number(rows), _number(columns)
    is_tall = rows_ * width >= columns_ * height  # then the width decides how far to scale
    wanted = torch.where(is_tall, _number(width), _number(height))
    given = torch.where(is_tall, columns_, rows_)
    if native:
        wanted = torch.maximum(wanted, given)
    # Python's round and ONNX' Round both round halves to even. One row more than R is enough for every rounding.
    more_rows, more_columns = (rows, columns) if native else (0, 0)
    down_SH, unit_down = _weights(
        rows,
        torch.round(rows_ * wanted / given),
        max_length=rows * width // columns + height + 1 + more_rows,
        cut=height,
    )
    along_SW, unit_along = _weights(
        columns,
        torch.round(columns_ * wanted / given),
        max_length=columns * height // rows + width + 1 + more_columns,
        cut=width,
    )
    image_BCHW = images_BHWC.permute(0, 3, 1, 2).double()
    image_BCHW = _to_bytes(_weighted_rows(image_BCHW, along_SW), unit_along)
    return _to_bytes(_weighted_rows(image_BCHW.mT, down_SH).mT, unit_down).float()


def _weighted_rows(image_BCHW: Tensor, weights_SW: Tensor) -> Tensor:
    """Return image_BCHW @ weights_SW.T as a product of matrices: torch 2.6 cannot export another of free sizes."""
    batch, channels, height, width = image_BCHW.shape
    rows = torch.mm(image_BCHW.reshape(batch * channels * height, width), weights_SW.T)
    return rows.reshape(batch, channels, height, weights_SW.shape[0])


def _number(value: int) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float64)


def _weights(num_pixels: int, length: Tensor, *, max_length: int, cut: int) -> tuple[Tensor, Tensor]:
    """Return the integer weights of one pass of the scaling, as a matrix, and the number that stands for 1.

    Example: from 4 pixels to 2 the cubic is widened by 2 and reaches 4 pixels to each side. Row 0 is centred at
    1.0. Its weights before rounding are 0.459, 0.459, 0.120 and -0.037.

    Args:
        num_pixels: rows or columns of the photograph.
        length: those after scaling, R.
        max_length: at least R; a symbol when the graph is traced, which ``length`` cannot be.
        cut: how many rows of the result are kept, the central ones.

    Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_index_ranges_int16_weights, of torch 2.
    """
    num_pixels_ = _number(num_pixels)
    scale = num_pixels_ / length
    wider = scale.clamp(min=1.0)
    row_R1 = torch.arange(max_length, dtype=torch.float64)[:, None]
    pixel_1N = torch.arange(num_pixels, dtype=torch.float64)[None]
    centre_R1 = scale * (row_R1 + 0.5)
    first_R1 = torch.floor(centre_R1 - _SUPPORT * wider + 0.5).clamp(min=0)
    end_R1 = torch.minimum(torch.floor(centre_R1 + _SUPPORT * wider + 0.5), num_pixels_)
    x_RN = ((pixel_1N - centre_R1 + 0.5) * (1 / wider)).abs()
    near_RN = ((_CUBIC + 2) * x_RN - (_CUBIC + 3)) * x_RN * x_RN + 1
    far_RN = (((x_RN - 5) * x_RN + 8) * x_RN - 4) * _CUBIC
    zero_RN = torch.zeros_like(x_RN)
    weight_RN = torch.where(x_RN < 1, near_RN, torch.where(x_RN < _SUPPORT, far_RN, zero_RN))
    is_used_RN = (pixel_1N >= first_R1) & (pixel_1N < end_R1)
    weight_RN = torch.where(is_used_RN, weight_RN, zero_RN)
    weight_RN = weight_RN / weight_RN.sum(dim=1, keepdim=True).clamp(min=1e-9)
    weight_RN = torch.where(row_R1 < length, weight_RN, zero_RN)  # the rows from R on belong to no result
    unit_K = 2.0 ** torch.arange(_MAX_EXPONENT + 1, dtype=torch.float64)
    fits_K = torch.floor(0.5 + weight_RN.max() * unit_K) < _WEIGHT_LIMIT
    unit = torch.where(fits_K, unit_K, torch.ones_like(unit_K)).max()
    kept_S = torch.floor((length - cut) / 2).long() + torch.arange(cut)
    scaled_SN = weight_RN[kept_S] * unit
    return scaled_SN.sign() * torch.floor(scaled_SN.abs() + 0.5), unit


def _to_bytes(sum_BCHW: Tensor, unit: Tensor) -> Tensor:
    """Round sums of weighted grey levels to grey levels; halves are rounded up, as by adding unit / 2 and shifting."""
    return torch.floor((sum_BCHW + unit / 2) / unit).clamp(0, 255)


def reference_view(image_HWC: NDArray[np.uint8], height: int, width: int, *, native: bool = False) -> NDArray[np.uint8]:
    """Return the view that `scaled_and_cut` must give, scaled by torch itself."""
    rows, columns = image_HWC.shape[:2]
    wanted, given = (width, columns) if rows * width >= columns * height else (height, rows)
    wanted = max(wanted, given) if native else wanted
    scaled_HWC = resized(image_HWC, round(rows * wanted / given), round(columns * wanted / given))
    top, left = (scaled_HWC.shape[0] - height) // 2, (scaled_HWC.shape[1] - width) // 2
    return scaled_HWC[top : top + height, left : left + width]
