"""Validation loss, the baseline to beat, and reconstruction pictures.

The validation images, their views and their masks never change, so the figures of two steps, and of two runs with the
same image size and mask ratio, compare. The baseline predicts for every patch the mean over the training set of what
the loss asks for there ("the mean face"): a model that is not clearly below it has learned nothing about the image.

Shapes: B images, N patches, K kept, M masked, P pixels of a patch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.loader import to_device
from trainer.data.stream import Batch
from trainer.distributed.engine import Engine
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import MaskIndices

DrawMask = Callable[[Tensor], MaskIndices]


@dataclass(frozen=True, slots=True)
class ValidationImages:
    """Batches of this rank's share of the validation images; equally many batches on every rank."""

    batches: Callable[[], Iterable[Batch]]
    num_images: int


def share_of(num_images: int, *, rank: int, num_ranks: int) -> list[int]:
    """Return every ``num_ranks``-th image, equally many on every rank, because ZeRO-3 forwards are collective.

    A rank with one image fewer gets image 0 once more, which `masked_error` gives weight zero. Of 5 images on 2 ranks,
    rank 0 has [0, 2, 4] and rank 1 has [1, 3, 0].
    """
    mine = list(range(rank, num_images, num_ranks))
    missing = math.ceil(num_images / num_ranks) - len(mine)
    return mine + [0] * missing


def masked_error(engine: Engine, images: ValidationImages, draw_mask: DrawMask) -> float:
    """Return the mean masked squared error over the validation images, in the units of the training loss."""
    rank, num_ranks = engine.world.rank, engine.world.size
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    seen = 0
    for batch in images.batches():
        ready = to_device(batch, engine.device)
        error_B = engine.evaluate(ready.images_BCHW, *draw_mask(ready.noise_BN), want="error")
        # The i-th image of this rank is number i * num_ranks + rank of the set, unless that lies beyond its end.
        is_real_B = torch.arange(seen, seen + len(error_B), device=engine.device) * num_ranks + rank < images.num_images
        total += torch.stack([error_B.double()[is_real_B].sum(), is_real_B.sum().double()])
        seen += len(error_B)
    error_sum, count = engine.mean_over_ranks(total).tolist()
    return float(error_sum / count)


class MeanPatch:
    """The best constant prediction: the mean target of every patch over training images."""

    def __init__(self, model: MaskedAutoencoder, train_batches: Iterable[Batch]) -> None:
        """Average the targets of all patches on the CPU."""
        self._model = model
        total, count = None, 0
        for batch in train_batches:
            target_BNP = model.target(batch.images_BCHW, _all_patches(batch.images_BCHW, model)).double()
            total = target_BNP.sum(0) if total is None else total + target_BNP.sum(0)
            count += len(target_BNP)
        assert total is not None
        self._mean_NP = total / count

    def error(self, batches: Iterable[Batch], draw_mask: DrawMask) -> float:
        """Return the masked squared error of this prediction on the same images and masks as `masked_error`."""
        errors = []
        for batch in batches:
            masked_BM = draw_mask(batch.noise_BN).masked_BM
            target_BMP = self._model.target(batch.images_BCHW, masked_BM).double()
            errors.append((self._mean_NP[masked_BM] - target_BMP).square().mean(dim=(1, 2)))
        return float(torch.cat(errors).mean())


def triplets(engine: Engine, batch: Batch, draw_mask: DrawMask) -> Tensor:
    """Draw original, masked and reconstructed images in three rows, uint8 (3, 3*H, B*W); all ranks call."""
    images_BCHW = batch.images_BCHW.to(engine.device)
    keep_BK, masked_BM = draw_mask(batch.noise_BN.to(engine.device))
    rows_3BCHW = engine.evaluate(images_BCHW, keep_BK, masked_BM, want="pictures").cpu()
    return torch.cat([torch.cat(list(row_BCHW), dim=2) for row_BCHW in rows_3BCHW], dim=1)


def _all_patches(images_BCHW: Tensor, model: MaskedAutoencoder) -> Tensor:
    return torch.arange(model.encoder.num_patches).expand(len(images_BCHW), -1)
