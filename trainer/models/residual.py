"""A small convolutional branch on what high-pass filters leave of an image, beside a detector's ViT.

Blending and warping change the finest texture. A ViT averages that away in its patches, and a scaled image has lost it,
so the branch belongs to views at the image's own resolution (view_resize native). The filters are fixed: a Laplacian,
and kernels of the spatial rich model of steganalysis (Fridrich and Kodovsky 2012, IEEE TIFS 7(3)). R-FLoRA
(Ramachandra 2026, arXiv 2604.17321) joins Laplacian residuals to a frozen CLIP by a gate; this branch adds its features
to the pooled tokens instead.

The energy of residuals, which blending lowers, is by far the strongest direction in these features. Without batch
statistics training stops at it: whole morphs are found and spliced ones are not. Group, layer and weight normalisation
and batch statistics at the start alone did not help. So the branch normalises over a batch, but over small groups of it
(`GhostNorm`), which neither the micro batch nor the ranks change.

Shapes: B images, C channels, H, W image, F = 5 filters, G samples of a group, D width of the ViT.
"""

import copy
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
_SCALE = 4.0
_GREY = (0.299, 0.587, 0.114)
_EPSILON = 1e-5
_LEAST_ENERGY = 0.03


class GhostNorm(nn.Module):
    """Batch normalisation over groups of G consecutive samples in training ("ghost batches").

    PyTorch's running averages depend on how a batch is cut into micro batches and ranks. Here the groups are those that
    the loader never cuts (`trainer.data.stream.Slice`), and evaluation uses statistics that `ResidualBranch.measure`
    took from fixed images.

    Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1, without its running averages.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.measures, self._group = False, group
        # Mean and variance. An engine in bf16 casts buffers of floats, which would round them, but no integers.
        self._bits: Tensor
        self.register_buffer(
            "_bits", torch.stack([self.bias, self.weight]).detach().view(torch.int32), persistent=False
        )

    @property
    def statistics(self) -> Tensor:
        """Mean and variance of each channel that evaluation uses, float32 (2, C)."""
        return self._bits.view(torch.float32)

    @statistics.setter
    def statistics(self, values_2C: Tensor) -> None:
        self._bits.copy_(values_2C.float().view(torch.int32))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise each channel; the dtype stays, statistics are float32."""
        if self.training:
            groups = torch.split(x_BCHW, self._group)
            parts = [F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=_EPSILON) for x in groups]
            return torch.cat(parts)
        if self.measures:
            variance_C, mean_C = torch.var_mean(x_BCHW.float(), dim=(0, 2, 3), correction=0)
            self.statistics = torch.stack([mean_C, variance_C])
        mean_C, variance_C = self.statistics
        scale_C = self.weight.float() * torch.rsqrt(variance_C + _EPSILON)
        shift_C = self.bias.float() - mean_C * scale_C
        normed_BCHW: Tensor = x_BCHW.float() * scale_C[:, None, None] + shift_C[:, None, None]
        return normed_BCHW.to(x_BCHW.dtype)

    def as_batch_norm(self) -> nn.BatchNorm2d:
        """Return PyTorch's module that evaluates to the same, for exports."""
        norm = nn.BatchNorm2d(len(self.weight), eps=_EPSILON).eval()
        norm.load_state_dict(self.state_dict(), strict=False)
        norm.running_mean, norm.running_var = self.statistics.clone()
        return norm


class _Convolution(nn.Conv2d):
    """A convolution without a bias; with odd sides it keeps height and width, or divides them by the stride."""

    def __init__(self, channels: int, out_channels: int, side: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, side, stride=stride, padding=side // 2, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Channels last: 1.2 times as fast on a CPU, and what tensor cores want. DeepSpeed broadcasts parameters as
        # bytes, which takes plain ones only, so the copy is made here.
        kernels = self.weight.contiguous(memory_format=torch.channels_last)
        found_BCHW: Tensor = self._conv_forward(x_BCHW, kernels, None)
        return found_BCHW


class _Block(nn.Module):
    """Two convolutions beside a shortcut of one; a stride of 2 halves the sides, rounded up."""

    def __init__(self, channels: int, out_channels: int, stride: int, group: int) -> None:
        super().__init__()
        self.first, self.first_norm = _Convolution(channels, out_channels, 3, stride), GhostNorm(out_channels, group)
        self.second, self.second_norm = _Convolution(out_channels, out_channels, 3), GhostNorm(out_channels, group)
        self.shortcut, self.shortcut_norm = _Convolution(channels, out_channels, 1), GhostNorm(out_channels, group)
        self._stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        small_BCHW = F.avg_pool2d(x_BCHW, self._stride, ceil_mode=True) if self._stride > 1 else x_BCHW
        changed_BCHW = self.second_norm(self.second(F.relu(self.first_norm(self.first(x_BCHW)))))
        return F.relu(self.shortcut_norm(self.shortcut(small_BCHW)) + changed_BCHW)


class ResidualBranch(nn.Module):
    """From an image to features that are added to a ViT's pooled tokens.

    Args:
        width: D.
        group: G.
        channels: of the first convolution and of each block.
    """

    kernels_F1HW: Tensor

    def __init__(self, width: int, *, group: int, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        # Whole numbers, so that bf16 holds them exactly; not saved, because they never change.
        self.register_buffer("kernels_F1HW", torch.tensor(_KERNELS, dtype=torch.float32)[:, None], persistent=False)
        self.stem, self.stem_norm = _Convolution(len(_KERNELS), channels[0], 3, 2), GhostNorm(channels[0], group)
        pairs = enumerate(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(_Block(before, after, 1 if i == 0 else 2, group) for i, (before, after) in pairs)
        self.project = nn.Linear(channels[-1] + len(_KERNELS), width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features (B, D) of images with values from 0 to 255, float32."""
        residuals_BFHW = self.residuals(images_BCHW)
        energy_BF = torch.log(residuals_BFHW.abs().mean(dim=(2, 3)) + _LEAST_ENERGY)
        x_BCHW = F.relu(self.stem_norm(self.stem(residuals_BFHW.to(self.stem.weight.dtype))))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        pooled_BE = torch.cat([x_BCHW.mean(dim=(2, 3)), energy_BF.to(x_BCHW.dtype)], dim=1)
        features_BD: Tensor = self.project(pooled_BE)
        return features_BD

    def measure(self, images_BCHW: Tensor) -> Tensor:
        """Take the statistics that evaluation uses from images; returns the images' features (B, D)."""
        norms = [module for module in self.modules() if isinstance(module, GhostNorm)]
        for norm in norms:
            norm.measures = True
        try:
            features_BD: Tensor = self(images_BCHW)
        finally:
            for norm in norms:
                norm.measures = False
        return features_BD

    def with_batch_norms(self) -> "ResidualBranch":
        """Return a copy for evaluation alone, with PyTorch's batch normalisation."""
        branch = copy.deepcopy(self).eval()
        for parent in list(branch.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, GhostNorm):
                    setattr(parent, name, module.as_batch_norm())
        return branch

    def residuals(self, images_BCHW: Tensor) -> Tensor:
        """Filter the grey image; returns (B, F, H, W), clipped."""
        weights_C11 = constant(_GREY, images_BCHW.device)[:, None, None]
        grey_B1HW = (images_BCHW.float() * weights_C11).sum(dim=1, keepdim=True)
        found_BFHW = F.conv2d(F.pad(grey_B1HW, (2, 2, 2, 2), mode="reflect"), self.kernels_F1HW.float())
        sizes_F11 = constant(_LARGEST, images_BCHW.device)[:, None, None]
        return (found_BFHW / sizes_F11).clamp(-_CLIP, _CLIP) / _SCALE

    def flops(self, height: int, width: int) -> int:
        """Count multiply-adds times two of the convolutions of one image in a forward pass."""
        rows, columns = (height + 1) // 2, (width + 1) // 2
        total = 2 * height * width * len(_KERNELS) * 25 + 2 * self.stem.weight.numel() * rows * columns
        for i, block in enumerate(self.blocks):
            if i:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            total += 2 * sum(p.numel() for p in block.parameters() if p.ndim == 4) * rows * columns
        return total
