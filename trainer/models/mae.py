"""The masked autoencoder: a ViT sees a quarter of the patches, a light decoder predicts the rest.

With the same weights and the same mask the loss equals the published one, but less is computed:

1. Hidden patches are never embedded.
2. Tokens are not put back in order: attention does not depend on order, and positions are added by index.
3. The last decoder block and the pixel layer run for hidden patches only.
4. A hidden patch starts as mask token + position, the same in all images. So the first decoder block computes its
   query, key and value once for the whole batch.

The cross decoder is a different model: see `trainer.models.cross_block`.

Example: ViT-B/16 at 224 pixels has N = 196, K = 49, M = 147 and P = 768. Forward and backward of one image take 56.6
GFLOP with a decoder of 8 blocks of width 512.

Shapes: B images, C=3 channels, H, W image, N patches, K kept, M masked (of these, those to predict), P = p*p*C values
of a patch, D encoder width, E decoder width, T seen tokens or all, F = 3*E.
Source: He et al. 2021, arXiv 2111.06377, section 3.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.cross_block import CrossBlock
from trainer.models.encoder import (
    PatchEncoder,
    attend_from,
    block_flops,
    interpolate_positions,
    make_blocks,
    query_key_value,
    sine_cosine_positions,
)
from trainer.models.losses import masked_pixel_error, normalise_patches, patch_statistics
from trainer.models.mask_utils import gather_tokens, patchify, unpatchify
from trainer.models.pixel_statistics import statistics_on

_HIDDEN_GREY = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderOptions:
    """The decoder's settings, under the names that `trainer.config.settings.PretrainRecipe` documents."""

    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    decoder_type: Literal["self", "cross"] = "self"
    use_learned_mask_token: bool = True
    use_separate_pos_embed: bool = True
    fixed_pos_embed: bool = True


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and loss in one forward, because DeepSpeed's engine wraps a single call."""

    def __init__(self, encoder: PatchEncoder, decoder: DecoderOptions, *, norm_pix_loss: bool = True) -> None:
        """Build the decoder and draw all weights from torch's generator; see `initialise`."""
        super().__init__()
        width, depth, heads = decoder.decoder_width, decoder.decoder_depth, decoder.decoder_heads
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=decoder.use_learned_mask_token)
        self.decoder_pos_embed, self.position_embed = None, None
        if decoder.use_separate_pos_embed:
            positions_1NE = sine_cosine_positions(encoder.grid, width)
            self.decoder_pos_embed = nn.Parameter(positions_1NE, requires_grad=not decoder.fixed_pos_embed)
        else:
            self.position_embed = nn.Linear(encoder.width, width, bias=False)
        self.decoder_type = decoder.decoder_type
        if self.decoder_type == "cross":
            self.decoder_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        else:
            self.decoder_blocks = make_blocks(depth, width=width, heads=heads)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, 3 * encoder.patch**2)
        initialise(
            self, use_learned_mask_token=decoder.use_learned_mask_token, learned_positions=not decoder.fixed_pos_embed
        )

    def whole_blocks(self) -> list[nn.Module]:
        """Blocks that run as one module, with weights and an input that need gradients: ZeRO 3 gathers each at once.

        The first and the last block of the published decoder do not: see `_paint`.
        """
        decoder = self.decoder_blocks if self.decoder_type == "cross" else self.decoder_blocks[1:-1]
        return [*self.encoder.trained_blocks, *decoder]

    def forward(
        self,
        images_BCHW: Tensor,
        keep_BK: Tensor | None,
        masked_BM: Tensor | None,
        want: Literal["loss", "error", "prediction", "pictures", "features"] = "loss",
    ) -> Tensor:
        """Reconstruct the hidden patches, or encode the images.

        Args:
            images_BCHW: uint8 RGB.
            keep_BK: patches that the encoder sees; None for features.
            masked_BM: patches to predict; for pictures, ``keep`` and ``masked`` together are every patch once; None for
                features.
            want: what to return.

        Returns:
            ``loss``: float32 scalar, mean squared error over hidden patches, in units of the normalised pixel.
            ``error``: float32 (B,), the same for each image.
            ``prediction``: (B, M, P), the predicted patches.
            ``pictures``: uint8 (3, B, C, H, W), the images, what the encoder saw, and the reconstruction.
            ``features``: float32 (B, D), the mean over the patches of what the encoder makes of the whole image.
        """
        patches_BNP = patchify(self._normalise(images_BCHW), self.encoder.patch)
        if want == "features":
            tokens_BTD = self.encoder(patches_BNP.to(next(self.parameters()).dtype))
            features_BD: Tensor = tokens_BTD[:, self.encoder.num_prefix :].float().mean(dim=1)
            return features_BD
        assert keep_BK is not None
        assert masked_BM is not None
        predicted_BMP = self._predict(patches_BNP, keep_BK, masked_BM)
        if want == "prediction":
            return predicted_BMP
        if want == "pictures":
            return self._pictures(patches_BNP, predicted_BMP.float(), masked_BM)
        error_B = masked_pixel_error(predicted_BMP, self._target(patches_BNP, masked_BM))
        return error_B if want == "error" else error_B.mean()

    def target(self, images_BCHW: Tensor, masked_BM: Tensor) -> Tensor:
        """Return the target of the loss, float32 (B, M, P): hidden patches, normalised with norm_pix_loss."""
        return self._target(patchify(self._normalise(images_BCHW), self.encoder.patch), masked_BM)

    def load_decoder(self, weights: dict[str, Tensor]) -> None:
        """Load all weights but the encoder's, by their names here or in the published code.

        Positions of another grid are interpolated.

        Raises:
            ConfigError: a name is missing, unknown or of another shape.
        """
        weights = dict(weights)
        positions = weights.get("decoder_pos_embed")
        if positions is not None:
            if (
                math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
            ):  # the published form: 1 + N, class token first
                if positions[:, 0].any():
                    raise ConfigError("the class token has a position in the decoder, which it has not here")
                positions = positions[:, 1:]
            if positions.shape[1] != self.encoder.num_patches:
                positions = interpolate_positions(positions, self.encoder.grid)
            weights["decoder_pos_embed"] = positions
        parameters = {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}
        found, expected = ({name: tuple(v.shape) for name, v in part.items()} for part in (weights, parameters))
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if differing:
            name = differing[0]
            raise ConfigError(
                f"the decoder's weights are of another one: {name} is {found.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here"
            )
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])

    def flops_per_image(self, num_keep: int, num_masked: int) -> int:
        """Count the FLOPs of forward and backward (three times forward) of one image, for the MFU."""
        num_seen = num_keep + self.encoder.num_prefix
        if self.decoder_type == "cross":
            blocks: Iterable[Any] = self.decoder_blocks
            decoder: int = sum(block.flops(num_masked, num_seen) for block in blocks)
        else:
            # The first block projects seen tokens only, and the last one continues with hidden patches only.
            num_all, last = num_seen + num_masked, len(self.decoder_blocks) - 1
            decoder = sum(
                block_flops(
                    block,
                    num_all,
                    num_queries=num_masked if i == last else None,
                    num_projected=num_seen if i == 0 else None,
                )
                for i, block in enumerate(self.decoder_blocks)
            )
        linear = self.decoder_embed.weight.numel() * num_seen + self.decoder_pred.weight.numel() * num_masked
        return 3 * (self.encoder.flops(num_keep) + decoder + 2 * linear)

    def _predict(self, patches_BNP: Tensor, keep_BK: Tensor, masked_BM: Tensor) -> Tensor:
        compute_dtype = next(self.parameters()).dtype
        seen_BTE = self.decoder_embed(self.encoder(patches_BNP.to(compute_dtype), keep_BK))
        positions_1NE = self._decoder_positions()
        prefix_BTE, visible_BKE = seen_BTE.split([self.encoder.num_prefix, keep_BK.shape[1]], dim=1)
        visible_BKE = visible_BKE + _pick(positions_1NE, keep_BK)
        seen_BTE = torch.cat([prefix_BTE, visible_BKE], dim=1)
        painted_BME = self._paint(seen_BTE, self.mask_token + positions_1NE, masked_BM)
        predicted_BMP: Tensor = self.decoder_pred(self.decoder_norm(painted_BME))
        return predicted_BMP

    def _paint(self, seen_BTE: Tensor, blank_1NE: Tensor, masked_BM: Tensor) -> Tensor:
        """Run the decoder.

        Args:
            seen_BTE: prefix and kept tokens.
            blank_1NE: mask token plus position of every patch: the input token of a hidden patch.
            masked_BM: patches to predict.

        Returns:
            painted_BME: the tokens of the hidden patches after the last block.
        """
        hidden_BME = _pick(blank_1NE, masked_BM)
        if self.decoder_type == "cross":
            for block in self.decoder_blocks:
                hidden_BME = block(hidden_BME, seen_BTE)
            return hidden_BME
        first, *blocks = self.decoder_blocks
        tokens_BTE = torch.cat([seen_BTE, hidden_BME], dim=1)
        num_hidden, num_tokens = hidden_BME.shape[1], tokens_BTE.shape[1]
        # Query, key and value depend on the token alone, so those of hidden patches are computed for the N blank tokens
        # instead of B * M: 196 instead of 64 * 147 = 9,408 in a batch of 64.
        projected_BMF = _pick(query_key_value(first, blank_1NE), masked_BM)
        qkv_BTF = torch.cat([query_key_value(first, seen_BTE), projected_BMF], dim=1)
        if not blocks:
            return attend_from(first, tokens_BTE, num_hidden, qkv_BTF)
        tokens_BTE = attend_from(first, tokens_BTE, num_tokens, qkv_BTF)
        for block in blocks[:-1]:
            tokens_BTE = block(tokens_BTE)
        return attend_from(blocks[-1], tokens_BTE, num_hidden)

    def _decoder_positions(self) -> Tensor:
        if self.position_embed is None:
            assert self.decoder_pos_embed is not None
            return self.decoder_pos_embed
        projected: Tensor = self.position_embed(self.encoder.positions())
        return projected

    def _target(self, patches_BNP: Tensor, masked_BM: Tensor) -> Tensor:
        target_BMP = gather_tokens(patches_BNP, masked_BM)
        return normalise_patches(target_BMP) if self.norm_pix_loss else target_BMP

    def _normalise(self, images_BCHW: Tensor) -> Tensor:
        """Convert uint8 to float32, normalised by ImageNet's statistics, on the device of the images."""
        mean_C11, std_C11 = statistics_on(images_BCHW.device, "imagenet")
        return (images_BCHW.float() / 255 - mean_C11) / std_C11

    def _pictures(self, patches_BNP: Tensor, predicted_BMP: Tensor, masked_BM: Tensor) -> Tensor:
        if self.norm_pix_loss:  # the decoder predicts normalised patches: take mean and deviation from the image
            mean_BM1, scale_BM1 = patch_statistics(gather_tokens(patches_BNP, masked_BM))
            predicted_BMP = predicted_BMP * scale_BM1 + mean_BM1
        where_BMP = masked_BM[..., None].expand_as(predicted_BMP)
        painted_BNP = patches_BNP.scatter(1, where_BMP, predicted_BMP)
        rows = [self._to_uint8(patches_BNP), self._to_uint8(patches_BNP), self._to_uint8(painted_BNP)]
        grid, patch = self.encoder.grid, self.encoder.patch
        seen_BNP = patchify(rows[1], patch).scatter(1, where_BMP, round(255 * _HIDDEN_GREY))
        rows[1] = unpatchify(seen_BNP, patch, grid)
        return torch.stack(rows)

    def _to_uint8(self, patches_BNP: Tensor) -> Tensor:
        mean_C11, std_C11 = statistics_on(patches_BNP.device, "imagenet")
        image_BCHW = unpatchify(patches_BNP, self.encoder.patch, self.encoder.grid)
        return ((image_BCHW * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)


def _pick(table_1ND: Tensor, index_BK: Tensor) -> Tensor:
    """Return each image's rows of a table that all images share, (B, K, D)."""
    return gather_tokens(table_1ND.expand(len(index_BK), -1, -1), index_BK)


@torch.no_grad()
def initialise(model: MaskedAutoencoder, *, use_learned_mask_token: bool, learned_positions: bool) -> None:
    """Draw the weights as in the published MAE: Xavier-uniform matrices, zero biases, tokens of deviation 0.02.

    One thing differs: the patch embedding's bias is zero as well. Published code leaves it at torch's default for
    convolutions, uniform within 1 / sqrt(3 * patch**2).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # the patch embedding, drawn as a matrix (D, 3*p*p)
            nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    vit = model.encoder.vit
    for token in (vit.cls_token, vit.reg_token, model.mask_token if use_learned_mask_token else None):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if learned_positions:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)
