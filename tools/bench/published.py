"""The published form of the MAE with this project's weights, to time what the other form saves.

All tokens go back into order, every decoder block and the pixel layer run for all of them, and the loss takes the
hidden ones: the forward of the published code (He et al. 2021, arXiv 2111.06377), on the modules of `mae`.

Shapes: B images, N patches, K kept, E decoder width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.models.losses import normalise_patches
from trainer.models.mask_utils import patchify

if TYPE_CHECKING:
    from trainer.models.mae import MaskedAutoencoder


class PublishedForm(nn.Module):
    """Computes the loss of the published code."""

    def __init__(self, mae: "MaskedAutoencoder", num_keep: int) -> None:
        super().__init__()
        assert mae.decoder_type == "self"
        assert mae.norm_pix_loss
        self._mae, self._num_keep = mae, num_keep

    def forward(self, pixels_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """Return the loss.

        Args:
            pixels_BCHW: float32, normalised.
            noise_BN: the patches with the smallest numbers are kept.
        """
        mae, encoder = self._mae, self._mae.encoder
        order_BN = noise_BN.argsort(dim=1)
        back_BN = order_BN.argsort(dim=1)
        target_BNP = normalise_patches(patchify(pixels_BCHW, encoder.patch))
        tokens_BND = encoder.vit.patch_embed(pixels_BCHW.to(next(mae.parameters()).dtype)) + encoder.positions()
        kept_BKD = tokens_BND.gather(1, order_BN[:, : self._num_keep, None].expand(-1, -1, tokens_BND.shape[2]))
        x = torch.cat([encoder.vit.cls_token.expand(len(kept_BKD), -1, -1), kept_BKD], dim=1)
        for block in encoder.vit.blocks:
            x = block(x)
        x = mae.decoder_embed(encoder.vit.norm(x))
        blank_BME = mae.mask_token.expand(len(x), encoder.num_patches - self._num_keep, -1)
        placed_BNE = torch.cat([x[:, 1:], blank_BME], dim=1).gather(1, back_BN[..., None].expand(-1, -1, x.shape[2]))
        y = torch.cat([x[:, :1], placed_BNE + mae._decoder_positions()], dim=1)
        for block in mae.decoder_blocks:
            y = block(y)
        predicted_BNP: Tensor = mae.decoder_pred(mae.decoder_norm(y))[:, 1:]
        error_BN = (predicted_BNP.float() - target_BNP).square().mean(dim=2)
        hidden_BN = (back_BN >= self._num_keep).float()
        return (error_BN * hidden_BN).sum() / hidden_BN.sum()
