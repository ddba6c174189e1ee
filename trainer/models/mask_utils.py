"""Choose the hidden patches, and cut images into patches.

The randomness of a mask is one uniform number for each patch, which the data loader draws from the sample's position.
Everything here is a pure function of it, so masks do not depend on rank, device or number of workers.

Shapes: B images, N patches, K kept, M = N - K masked, D width, C channels, H, W image, P = p*p*C values of a patch.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from trainer.errors import ConfigError

Strategy = Literal["random", "block", "grid"]
_BLOCK_ASPECT = 0.5
"""The region of the block strategy is stretched by 0.5 to 1 / 0.5 in each direction."""


class MaskIndices(NamedTuple):
    """Indices into the N patches, int64, ascending. Together they are every patch once, if predict_share is 1."""

    keep_BK: Tensor
    masked_BM: Tensor


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches: ``num_patches * (1 - mask_ratio)``, rounded to the nearest.

    Example: 196 patches at 0.75 keep 49. Published code rounds down: at 0.9 it keeps 19, and this function 20.

    Raises:
        ConfigError: no patch would be kept, or none masked.
    """
    kept = round(num_patches * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not 0 < kept < num_patches:
        raise ConfigError(
            f"mask_ratio is {mask_ratio}, which keeps {kept} of {num_patches} patches, but at least one must be kept "
            "and one masked: try 0.75, or smaller patches"
        )
    return kept


def num_predicted(num_masked: int, predict_share: float) -> int:
    """Return how many hidden patches the decoder predicts: their share, rounded, at least one."""
    return max(1, round(num_masked * predict_share))


def draw_mask(
    noise_BN: Tensor,
    *,
    mask_ratio: float,
    strategy: Strategy = "random",
    grid: tuple[int, int],
    mask_block: int = 2,
    predict_share: float = 1.0,
) -> MaskIndices:
    """Choose the patches to keep, exactly ``num_kept`` of them in every image, whatever the strategy.

    Args:
        noise_BN: uniform in [0, 1).
        mask_ratio: share of patches hidden.
        strategy: ``random`` hides scattered patches (He et al. 2021, arXiv 2111.06377, section 3), ``block`` one
            contiguous ellipse-like region, ``grid`` whole cells of mask_block x mask_block patches (the last cell
            partly, if the count requires it).
        grid: rows and columns of patches, rows * columns = N.
        mask_block: side of a cell of the grid strategy [patches].
        predict_share: share of the hidden patches that ``masked`` holds, scattered among them.

    Example: random, 2 of 4 kept. Noise 0.7 0.1 0.9 0.3 keeps the patches with the lowest numbers, 1 and 3, and hides 0
    and 2.
    """
    num_keep = num_kept(noise_BN.shape[1], mask_ratio)
    scores_BN = {"random": _scattered, "block": _region, "grid": _cells}[strategy](noise_BN, grid, mask_block)
    order_BN = scores_BN.argsort(dim=1, stable=True)
    masked_BM = order_BN[:, num_keep:]
    if predict_share < 1:
        # The noise has 24 random bits. The order of all patches depends on the high ones, so the lower 12 bits choose
        # among the hidden patches: 0.7 * 4096 = 2867.2 gives 0.2.
        low_bits_BM = noise_BN.gather(1, masked_BM) * 4096 % 1
        count = num_predicted(masked_BM.shape[1], predict_share)
        masked_BM = masked_BM.gather(1, low_bits_BM.argsort(dim=1, stable=True)[:, :count])
    return MaskIndices(order_BN[:, :num_keep].sort(dim=1).values, masked_BM.sort(dim=1).values)


def _scattered(noise_BN: Tensor, grid: tuple[int, int], mask_block: int) -> Tensor:
    del grid, mask_block
    return noise_BN


def _region(noise_BN: Tensor, grid: tuple[int, int], mask_block: int) -> Tensor:
    """Score patches by closeness to a random centre: the closest are hidden, in an ellipse of random aspect.

    The first three numbers are centre row, centre column and aspect: 0.5 ** (2 * u - 1) lies between 2 and 0.5.
    """
    del mask_block
    rows, columns = grid
    y_N, x_N = torch.meshgrid(
        torch.arange(rows, device=noise_BN.device), torch.arange(columns, device=noise_BN.device), indexing="ij"
    )
    centre_y_B, centre_x_B = noise_BN[:, 0] * (rows - 1), noise_BN[:, 1] * (columns - 1)
    aspect_B = _BLOCK_ASPECT ** (2 * noise_BN[:, 2] - 1)
    distance_y_BN = (y_N.flatten() - centre_y_B[:, None]) * aspect_B[:, None]
    distance_x_BN = (x_N.flatten() - centre_x_B[:, None]) / aspect_B[:, None]
    return -(distance_y_BN.square() + distance_x_BN.square())


def _cells(noise_BN: Tensor, grid: tuple[int, int], mask_block: int) -> Tensor:
    """Give every patch the noise of the first patch of its cell, so that a cell is hidden as a whole.

    Example: cells of 2 x 2 on a grid of 14 x 14. The patch in row 3, column 5 takes the noise of row 2, column 4, which
    is number 2 * 14 + 4 = 32.
    """
    rows, columns = grid
    first_row = torch.arange(rows, device=noise_BN.device) // mask_block * mask_block
    first_column = torch.arange(columns, device=noise_BN.device) // mask_block * mask_block
    return noise_BN[:, (first_row[:, None] * columns + first_column).flatten()]


def random_masking(
    x_BND: Tensor, mask_ratio: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide a random share of the tokens.

    Args:
        x_BND: tokens.
        mask_ratio: share hidden.
        generator: source of randomness, on the device of ``x``; None is torch's own.

    Returns:
        x_masked_BKD: the kept tokens, in ascending order of their places.
        mask_BN: float, 0 is kept and 1 is hidden.
        ids_restore_BN: int64; ``cat([kept, hidden]).gather(1, ids_restore)`` is the original order.
    """
    num_images, num_patches, _ = x_BND.shape
    noise_BN = torch.rand(num_images, num_patches, generator=generator, device=x_BND.device)
    keep_BK, masked_BM = draw_mask(noise_BN, mask_ratio=mask_ratio, grid=(1, num_patches))
    mask_BN = torch.zeros_like(noise_BN).scatter_(1, masked_BM, 1.0)
    return gather_tokens(x_BND, keep_BK), mask_BN, torch.cat([keep_BK, masked_BM], dim=1).argsort(dim=1)


def apply_mask(x_BND: Tensor, mask_BN: Tensor, mask_token_D: Tensor | None = None) -> Tensor:
    """Replace the tokens where the mask is 1 by ``mask_token``, or by zeros."""
    token_D = torch.zeros_like(x_BND[0, 0]) if mask_token_D is None else mask_token_D.to(x_BND.dtype)
    return torch.where(mask_BN[..., None].bool(), token_D, x_BND)


def gather_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Gather tokens by index: (B, N, D) and (B, K) give (B, K, D)."""
    return x_BND.gather(1, index_BK[..., None].expand(-1, -1, x_BND.shape[2]))


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images into patches (BNP), row by row; the values of a patch are ordered row, column, channel.

    Example: an image of 224 x 224 pixels and patches of 16 give N = 14 * 14 = 196 and P = 16 * 16 * 3 = 768.
    """
    return rearrange(image_BCHW, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=patch, q=patch)


def unpatchify(patches_BNP: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify` (BCHW)."""
    return rearrange(patches_BNP, "b (gh gw) (p q c) -> b c (gh p) (gw q)", gh=grid[0], gw=grid[1], p=patch, q=patch)
