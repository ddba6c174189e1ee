"""What training minimises.

Shapes: B images, M masked patches, P values of a patch.
"""

from torch import Tensor


def normalise_patches(patches_BMP: Tensor) -> Tensor:
    """Bring each patch to zero mean and unit (unbiased) variance (He et al. 2021, arXiv 2111.06377, section 4.1)."""
    mean_BM1, scale_BM1 = patch_statistics(patches_BMP)
    return (patches_BMP - mean_BM1) / scale_BM1


def patch_statistics(patches_BMP: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch, (B, M, 1); a flat patch keeps a scale of 1e-3."""
    return patches_BMP.mean(dim=-1, keepdim=True), (patches_BMP.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def masked_pixel_error(predicted_BMP: Tensor, target_BMP: Tensor) -> Tensor:
    """Return the mean squared error over the masked patches of each image, float32 (B,)."""
    return (predicted_BMP.float() - target_BMP).square().mean(dim=(1, 2))
