"""Which places of an image a score depends on: each place is blurred in turn, and the score is computed again.

The method needs nothing but scores, so it holds for every detector, exports included. A blurred place brings neither an
edge nor a colour that the image does not have. What is lost there is detail: an edge of blending, a ghost, texture.

Shapes: H, W view; G places a side; C channels.
Source: Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2 (occlusion); Fong and Vedaldi 2017, arXiv 1704.03296.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRID = 12
"""Places a side: 144 in all, each one forward pass of one image."""
_SPOT = 1 / 16
"""Standard deviation of a place, as a share of the side: 14 of 224 pixels."""
_BLUR = 1 / 16
"""Standard deviation of the blur, as a share of the side."""


def occlusion_map(
    forward: Callable[[Tensor], Tensor], view_CHW: Tensor, *, batch: int, device: torch.device
) -> NDArray[np.float64]:
    """Measure how much of the logit each place is worth.

    Args:
        forward: uint8 views -> logits (B, 2).
        view_CHW: uint8 RGB.
        batch: images in one forward pass.
        device: where ``forward`` computes.

    Returns:
        worth_GG: logit of the view less the logit with this place blurred; positive where the place speaks for a morph.
    """
    size = view_CHW.shape[-1]
    view_HWC = view_CHW.permute(1, 2, 0).cpu().numpy()
    blurred_HWC = cv2.GaussianBlur(view_HWC, (0, 0), max(1.0, _BLUR * size), borderType=cv2.BORDER_REFLECT)
    whole_CHW, soft_CHW = (torch.from_numpy(np.asarray(x)).permute(2, 0, 1).float() for x in (view_HWC, blurred_HWC))
    spot_PHW = spots(size)
    values = []
    for start in range(0, len(spot_PHW), batch):
        spot_B1HW = spot_PHW[start : start + batch, None]
        changed_BCHW = (whole_CHW + spot_B1HW * (soft_CHW - whole_CHW)).round().to(torch.uint8)
        values.append(_logit_of_morph(forward(changed_BCHW.to(device))))
    before = _logit_of_morph(forward(view_CHW[None].to(device)))
    worth_GG: NDArray[np.float64] = (before - torch.cat(values)).numpy().reshape(GRID, GRID)
    return worth_GG


def spots(size: int) -> Tensor:
    """Return the places as weights from 0 to 1, float32 (G * G, H, W), row by row; their centres are evenly spaced."""
    pixel_W = torch.arange(size) + 0.5
    centre_G1 = (torch.arange(GRID)[:, None] + 0.5) * size / GRID
    bell_GW = torch.exp(-0.5 * ((pixel_W - centre_G1) / (_SPOT * size)) ** 2)
    return torch.einsum("gh,kw->gkhw", bell_GW, bell_GW).reshape(GRID * GRID, size, size)


def _logit_of_morph(logits_BC: Tensor) -> Tensor:
    logits_BC = logits_BC.double().cpu()
    return logits_BC[:, 1] - logits_BC[:, 0]
