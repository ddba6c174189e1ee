"""A small transformer on how much fine texture each part of an image has, beside a detector's ViT.

Blending and warping average neighbouring pixels, so a morph's texture is weaker than a photograph's, everywhere or
where it was blended. A ViT loses that among all it learns of the few people in a training set, and a scaled image has
lost it. So this branch sees no pixels, only energies: the mean absolute value of high-pass and band-pass residuals in
cells of 7 pixels, as logarithms. A face cannot be known from them, and the branch belongs to views at the image's own
resolution (view_resize native).

The filters are fixed: a Laplacian, kernels of the spatial rich model of steganalysis (Fridrich and Kodovsky 2012, IEEE
TIFS 7(3)), and differences of Gaussians. R-FLoRA (Ramachandra 2026, arXiv 2604.17321) joins Laplacian residuals to a
frozen CLIP by a gate; here the gate is on the ViT, and starts nearly closed.

Shapes: B images, C channels, H, W image, F = 8 filters, R, S rows and columns of cells, N = R * S tokens, E width of
the branch, D width of the ViT.
"""

import itertools
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import ConfigError
from trainer.models.cross_block import CrossBlock
from trainer.models.pixel_statistics import constant

_KERNELS = (
    ((0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, -4, 1, 0), (0, 0, 1, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, -1, 2, -1, 0), (0, 2, -4, 2, 0), (0, -1, 2, -1, 0), (0, 0, 0, 0, 0)),
    ((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1)),
    ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, -2, 1, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, -2, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 0, 0)),
)
_LARGEST = (4.0, 4.0, 12.0, 2.0, 2.0)
"""The size of each kernel's centre, which its residual is divided by."""
_BLURS = (1, 2, 4)
"""Deviations of the Gaussians [pixels]."""
_NUM_FILTERS = len(_KERNELS) + len(_BLURS)
_GREY = (0.299, 0.587, 0.114)
_CELL = 7
"""Side of a cell, over which energies are averaged; each is a token [pixels]. Of 4 pixels, nine to a token, they found
spliced morphs worse: see tools/bench/README.md."""
_LEAST_ENERGY, _USUAL_LOG = 0.3, 1.0
"""Added to energies, so that a flat area has a logarithm, and about their mean logarithm on photographs."""
_FIRST_GATE = 0.1
_LEAST_SIDE = 24
"""The widest Gaussian reaches 12 pixels beyond an edge, into the image's reflection [pixels]."""


class ResidualBranch(nn.Module):
    """Adds features of an image's texture to a ViT's pooled tokens.

    Args:
        width: D.
        size: rows and columns of the images [pixels]; what does not fill a cell at the right and lower edge is not
            seen. Example: 256 pixels are 36 cells, and 4 pixels are left over.
        token_width: E.
        depth: number of blocks.

    Raises:
        ConfigError: the images are too small.
    """

    kernels_K1HW: Tensor

    def __init__(self, width: int, size: tuple[int, int], *, token_width: int = 64, depth: int = 4) -> None:
        super().__init__()
        if min(size) < _LEAST_SIDE:
            raise ConfigError(f"image_size is {min(size)}, but use_residual_branch needs at least {_LEAST_SIDE}")
        num_tokens = (size[0] // _CELL) * (size[1] // _CELL)
        # Whole numbers, so that bf16 holds them exactly; not saved, because they never change.
        self.register_buffer("kernels_K1HW", torch.tensor(_KERNELS, dtype=torch.float32)[:, None], persistent=False)
        self.embed = nn.Linear(_NUM_FILTERS, token_width)
        self.positions_1NE = nn.Parameter(torch.zeros(1, num_tokens, token_width))
        self.blocks = nn.ModuleList(CrossBlock(token_width, token_width // 16) for _ in range(depth))
        self.norm = nn.LayerNorm(token_width, eps=1e-6)
        self.project = nn.Linear(token_width, width)
        self.gate = nn.Parameter(torch.full((1,), _FIRST_GATE))
        nn.init.trunc_normal_(self.positions_1NE, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: Tensor, pooled_BD: Tensor) -> Tensor:
        """Return the ViT's pooled tokens times the gate, plus the features of images with values from 0 to 255."""
        energy_BNF = rearrange(self.energies(images_BCHW), "b f r s -> b (r s) f")
        token_BNE = self.embed(energy_BNF.to(self.embed.weight.dtype)) + self.positions_1NE
        for block in self.blocks:
            token_BNE = block(token_BNE, token_BNE)  # attention to itself
        features_BD: Tensor = self.project(self.norm(token_BNE).mean(dim=1))
        return pooled_BD * self.gate + features_BD

    def energies(self, images_BCHW: Tensor) -> Tensor:
        """Return the logarithms of the residuals' mean absolute values in each cell, float32 (B, F, R, S)."""
        weights_C11 = constant(_GREY, images_BCHW.device)[:, None, None]
        grey_B1HW = (images_BCHW.float() * weights_C11).sum(dim=1, keepdim=True)
        found_BKHW = F.conv2d(F.pad(grey_B1HW, (2, 2, 2, 2), mode="reflect"), self.kernels_K1HW.float())
        scales = [grey_B1HW, *(_blurred(grey_B1HW, deviation) for deviation in _BLURS)]
        bands = [finer - coarser for finer, coarser in itertools.pairwise(scales)]
        residual_BFHW = torch.cat([found_BKHW / constant(_LARGEST, images_BCHW.device)[:, None, None], *bands], dim=1)
        return torch.log(F.avg_pool2d(residual_BFHW.abs(), _CELL) + _LEAST_ENERGY) - _USUAL_LOG

    def flops(self, height: int, width: int) -> int:
        """Count multiply-adds times two of a training step of one image.

        The filters are fixed and see the image, so they have a forward pass alone; the layers have three passes' work.
        """
        taps = len(_KERNELS) * 25 + sum(2 * (6 * deviation + 1) for deviation in _BLURS)
        num_tokens = self.positions_1NE.shape[1]
        blocks = sum(block.flops(num_tokens, num_tokens) for block in self.blocks if isinstance(block, CrossBlock))
        # The first layer's input needs no gradient: two passes.
        embed = 2 * num_tokens * self.embed.weight.numel()
        return 2 * taps * height * width + 2 * embed + 3 * (blocks + 2 * self.project.weight.numel())


def _blurred(grey_B1HW: Tensor, deviation: int) -> Tensor:
    """Blur with a Gaussian that is cut off at three deviations."""
    reach = 3 * deviation
    taps = [math.exp(-((x / deviation) ** 2) / 2) for x in range(-reach, reach + 1)]
    taps_T = constant(tuple(tap / sum(taps) for tap in taps), grey_B1HW.device)
    across_B1HW = F.conv2d(F.pad(grey_B1HW, (reach, reach, 0, 0), mode="reflect"), taps_T[None, None, None])
    return F.conv2d(F.pad(across_B1HW, (0, 0, reach, reach), mode="reflect"), taps_T[None, None, :, None])
