"""A small convolutional branch on what high-pass filters leave of an image, beside a detector's ViT.

Blending and warping change the finest texture. A ViT averages that away in its patches, and a scaled image has lost it,
so the branch belongs to views at the image's own resolution (view_resize native). The filters are fixed: a Laplacian,
and kernels of the spatial rich model of steganalysis (Fridrich and Kodovsky 2012, IEEE TIFS 7(3)). R-FLoRA
(Ramachandra 2026, arXiv 2604.17321) joins Laplacian residuals to a frozen CLIP by a gate; this branch adds its features
to the pooled tokens instead.

Nothing in it normalises over a batch or an image: a batch's statistics would depend on the micro batch and the ranks,
and an image's own would divide out the residual's energy, which is evidence. Weights are standardised instead, which
keeps the variance of activations near 1 at the start (Brock et al. 2021, arXiv 2101.08692).

Shapes: B images, C channels, H, W image, F = 5 filters, D width of the ViT.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.pixel_statistics import constant

CHANNELS = (16, 32, 64, 128)
_KERNELS = (
    ((0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, -4, 1, 0), (0, 0, 1, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, -1, 2, -1, 0), (0, 2, -4, 2, 0), (0, -1, 2, -1, 0), (0, 0, 0, 0, 0)),
    ((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1)),
    ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, -2, 1, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, -2, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 0, 0)),
)
_LARGEST = (4.0, 4.0, 12.0, 2.0, 2.0)
"""The size of each kernel's centre, which its residual is divided by."""
_CLIP = 12.0
"""Residuals beyond this are edges, not texture [grey levels]."""
_GREY = (0.299, 0.587, 0.114)
_RELU_GAIN = 1.7139588594436646
"""Gives a rectified standard normal variable a variance of 1 again."""
_BRANCH_SCALE = 0.4


class _Convolution(nn.Module):
    """A convolution whose kernels have mean 0 and, before the gain, length 1."""

    def __init__(self, channels: int, out_channels: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, side, side))
        self.gain, self.bias = nn.Parameter(torch.ones(out_channels)), nn.Parameter(torch.zeros(out_channels))
        self._stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        scale = self.gain[:, None, None, None] * torch.rsqrt(variance * self.weight[0].numel() + 1e-4)
        kernels = (self.weight - mean) * scale
        return F.conv2d(x_BCHW, kernels, self.bias, stride=self._stride, padding=self.weight.shape[-1] // 2)


class _Block(nn.Module):
    """Two convolutions beside a shortcut of one; a stride of 2 halves the sides, rounded up."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = _Convolution(channels, out_channels, 3, stride)
        self.second = _Convolution(out_channels, out_channels, 3)
        self.shortcut = _Convolution(channels, out_channels, 1)
        self._stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = _rectify(x_BCHW)
        small_BCHW = F.avg_pool2d(active_BCHW, self._stride, ceil_mode=True) if self._stride > 1 else active_BCHW
        changed_BCHW = self.second(_rectify(self.first(active_BCHW)))
        sum_BCHW: Tensor = self.shortcut(small_BCHW) + _BRANCH_SCALE * changed_BCHW
        return sum_BCHW


class ResidualBranch(nn.Module):
    """From an image to features that are added to a ViT's pooled tokens.

    Args:
        width: D.
        channels: of the first convolution and of each block.
    """

    kernels_F1HW: Tensor

    def __init__(self, width: int, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        # Whole numbers, so that bf16 holds them exactly; not saved, because they never change.
        self.register_buffer("kernels_F1HW", torch.tensor(_KERNELS, dtype=torch.float32)[:, None], persistent=False)
        self.stem = _Convolution(len(_KERNELS), channels[0], 3, 2)
        pairs = enumerate(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(_Block(before, after, 1 if i == 0 else 2) for i, (before, after) in pairs)
        self.project = nn.Linear(channels[-1], width)
        nn.init.normal_(self.project.weight, std=channels[-1] ** -0.5)
        nn.init.zeros_(self.project.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features (B, D) of images with values from 0 to 255, float32."""
        x_BCHW = self.stem(self.residuals(images_BCHW).to(self.stem.weight.dtype))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        features_BD: Tensor = self.project(_rectify(x_BCHW).mean(dim=(2, 3)))
        return features_BD

    def residuals(self, images_BCHW: Tensor) -> Tensor:
        """Filter the grey image; returns (B, F, H, W), clipped."""
        weights_C11 = constant(_GREY, images_BCHW.device)[:, None, None]
        grey_B1HW = (images_BCHW.float() * weights_C11).sum(dim=1, keepdim=True)
        found_BFHW = F.conv2d(F.pad(grey_B1HW, (2, 2, 2, 2), mode="reflect"), self.kernels_F1HW.float())
        sizes_F11 = constant(_LARGEST, images_BCHW.device)[:, None, None]
        return (found_BFHW / sizes_F11).clamp(-_CLIP, _CLIP) / 2

    def flops(self, height: int, width: int) -> int:
        """Count multiply-adds times two of the convolutions of one image in a forward pass."""
        rows, columns = (height + 1) // 2, (width + 1) // 2
        total = 2 * height * width * len(_KERNELS) * 25 + 2 * self.stem.weight.numel() * rows * columns
        for i, block in enumerate(self.blocks):
            if i:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            total += 2 * sum(p.numel() for p in block.parameters() if p.ndim == 4) * rows * columns
        return total


def _rectify(x: Tensor) -> Tensor:
    return F.relu(x) * _RELU_GAIN
