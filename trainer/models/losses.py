"""Losses of pre-training and detection.

Shapes: B images, M masked patches, P values of a patch, C = 2 classes [bonafide, morph].
"""

from torch import Tensor
from torch.nn import functional as F

from trainer.models.pixel_statistics import constant


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


def weighted_cross_entropy(
    logits_BC: Tensor, target: Tensor, *, class_weights: tuple[float, ...] = (1.0, 1.0), label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean over the images of the class-weighted cross-entropy, float32.

    The mean divides by B and not, as torch's own does, by the sum of the weights in the batch: that sum differs
    between micro batches, so the loss would depend on how a batch is cut over ranks and accumulation steps.

    Args:
        logits_BC: unnormalised scores.
        target: classes (B,), or their probabilities (B, C).
        class_weights: of [bonafide, morph].
        label_smoothing: share of the target spread over both classes (Szegedy et al. 2015, arXiv 1512.00567).
    """
    weight_C = constant(class_weights, logits_BC.device)
    loss_B = F.cross_entropy(
        logits_BC.float(), target, weight=weight_C, label_smoothing=label_smoothing, reduction="none"
    )
    return loss_B.mean()


def margin_loss(
    cosine_BC: Tensor,
    labels_B: Tensor,
    *,
    margin: float = 0.3,
    scale: float = 30.0,
    class_weights: tuple[float, ...] = (1.0, 1.0),
) -> Tensor:
    """Return the additive cosine margin loss: the true class must win by ``margin``, float32.

    Args:
        cosine_BC: cosines between embedding and class prototypes.
        labels_B: classes.
        margin: subtracted from the true class's cosine.
        scale: of the cosines before the softmax.
        class_weights: of [bonafide, morph].

    Source: Wang et al. 2018 (CosFace), arXiv 1801.09414, equation 4.
    """
    true_BC = F.one_hot(labels_B, cosine_BC.shape[1])
    return weighted_cross_entropy(scale * (cosine_BC.float() - margin * true_BC), labels_B, class_weights=class_weights)
