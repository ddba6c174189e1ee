"""The morph detector: encoder, pooling, head and loss in one forward, because DeepSpeed's engine wraps one call.

Shapes: B images, C channels or 2 classes [bonafide, morph] = [0, 1], H, W image, N patches, P values of a patch,
T tokens, D width, K draws a sample.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.settings import DetectorRecipe
from trainer.errors import ConfigError
from trainer.models.classifier import MorphClassifier
from trainer.models.dropout import NUM_DRAWS as DRAWS_A_KEY
from trainer.models.dropout import key_dropouts
from trainer.models.encoder import PatchEncoder
from trainer.models.heads import CosineLayer, ProjectionHead
from trainer.models.losses import margin_loss, weighted_cross_entropy
from trainer.models.mask_utils import patchify
from trainer.models.mixstyle import NUM_DRAWS as DRAWS_A_MIX
from trainer.models.mixstyle import BetaDraws, MixStyle, partners
from trainer.models.pixel_statistics import statistics_on
from trainer.models.residual import ResidualBranch


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """The settings of a `DetectorRecipe` between pooled tokens and loss; their meaning and defaults are there."""

    pooling: str
    use_projection_head: bool
    proj_dim: int
    proj_hidden_dim: int | None
    use_improved_classifier: bool
    cls_hidden_dim: int | None
    use_margin_loss: bool
    margin: float
    margin_scale: float
    class_weights: tuple[float, ...]
    label_smoothing: float
    mixup_alpha: float
    mix_group: int

    @classmethod
    def of(cls, recipe: DetectorRecipe) -> "HeadOptions":
        """Take them from a recipe."""
        return cls(**{entry.name: getattr(recipe, entry.name) for entry in dataclasses.fields(cls)})


class MorphDetector(nn.Module):
    """Separates bona fide faces from morphs; the score is P(morph).

    Args:
        encoder: gets all patches.
        normalisation: see `trainer.models.pixel_statistics`.
        head: pooling, head and loss.
        mixstyle: layers after the first blocks of the encoder.
        residual: whether a branch on the image's texture adds its features to the pooled tokens.

    Raises:
        ConfigError: the pooling needs a class token, and the encoder has none.
    """

    def __init__(
        self,
        encoder: PatchEncoder,
        *,
        normalisation: str,
        head: HeadOptions,
        mixstyle: list[MixStyle] | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if head.pooling == "cls" and encoder.vit.cls_token is None:
            raise ConfigError("pooling is 'cls', but this model has no class token: set --pooling avg")
        self.encoder, self.options = encoder, head
        self.head = build_head(encoder.width, head)
        self.mixstyle = nn.ModuleList(mixstyle or [])
        rows, columns = (side * encoder.patch for side in encoder.grid)
        self.residual = ResidualBranch(encoder.width, (rows, columns)) if residual else None
        self._normalisation = normalisation
        self._mixup = BetaDraws(head.mixup_alpha) if head.mixup_alpha else None
        self._keys = key_dropouts(self)

    @property
    def num_draws(self) -> int:
        """Number of uniform random numbers that training needs for each sample, at least 1.

        The order is: three for each MixStyle layer, three for mixup, then those of the dropout key. With two MixStyle
        layers and dropout, draws 0 to 2 and 3 to 5 mix, and the last ones key the dropout.
        """
        num_mixes = len(self.mixstyle) + (self._mixup is not None)
        return max(1, DRAWS_A_MIX * num_mixes + (DRAWS_A_KEY if self._keys else 0))

    def whole_blocks(self) -> list[nn.Module]:
        """Blocks that run as one module, with weights and an input that need gradients: ZeRO 3 gathers each at once."""
        return self.encoder.trained_blocks

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor | None = None,
        draws_BK: Tensor | None = None,
        want: Literal["loss", "logits", "attention"] = "loss",
    ) -> Tensor:
        """Compute the loss, the logits or an attention map of images.

        Args:
            images_BCHW: uint8 RGB.
            labels_B: int64 classes; for the loss.
            draws_BK: uniform random numbers of each sample; for the loss in training.
            want: what to return.

        Returns:
            ``loss``: float32 scalar.
            ``logits``: float32 (B, 2); P(morph) is their softmax's second column.
            ``attention``: float32 (B, rows, columns), see `PatchEncoder.attention_rollout`.
        """
        pixels_BCHW = self._normalise(images_BCHW)
        if want == "attention":
            return self.encoder.attention_rollout(self._patches(pixels_BCHW))
        if want == "logits":
            return self._decide(pixels_BCHW).float() * self.scale
        assert labels_B is not None
        assert draws_BK is not None
        options, target = self.options, labels_B
        if self._keys is not None and self.training:
            self._keys.assign(draws_BK[:, -DRAWS_A_KEY:])
        if self._mixup is not None and self.training:
            first = DRAWS_A_MIX * len(self.mixstyle)
            pixels_BCHW, target = self._mix_up(pixels_BCHW, labels_B, draws_BK[:, first : first + DRAWS_A_MIX])
        output_BC = self._decide(pixels_BCHW, labels_B, draws_BK)
        if options.use_margin_loss:
            return margin_loss(
                output_BC,
                target,
                class_weights=options.class_weights,
                margin=options.margin,
                scale=options.margin_scale,
            )
        return weighted_cross_entropy(
            output_BC, target, class_weights=options.class_weights, label_smoothing=options.label_smoothing
        )

    def flops_per_image(self) -> int:
        """Count the FLOPs of one training step of one image, for the MFU.

        The forward pass counts once, the gradients of activations once if anything in the encoder trains, and the
        gradients of weights for the trained share of them. So a full fine-tuning costs 3 forward passes, a linear probe
        1, and LoRA on 1 % of the weights 2.01. A residual branch trains in full (`ResidualBranch.flops`).
        """
        forward = self.encoder.flops(self.encoder.num_patches)
        weights = [(p.numel(), p.requires_grad) for p in self.encoder.parameters() if p.ndim > 1]
        trained = sum(n for n, trains in weights if trains) / max(1, sum(n for n, _ in weights))
        rows, columns = (side * self.encoder.patch for side in self.encoder.grid)
        beside = self.residual.flops(rows, columns) if self.residual is not None else 0
        return round(forward * (1 + (trained > 0) + trained)) + beside

    @property
    def scale(self) -> float:
        """Factor from the head's output to logits."""
        return self.options.margin_scale if self.options.use_margin_loss else 1.0

    def _decide(self, pixels_BCHW: Tensor, labels_B: Tensor | None = None, draws_BK: Tensor | None = None) -> Tensor:
        def mix(i: int, tokens_BTD: Tensor) -> Tensor:
            if draws_BK is None or i >= len(self.mixstyle):
                return tokens_BTD
            mixed_BTD: Tensor = self.mixstyle[i](
                tokens_BTD, draws_BK[:, DRAWS_A_MIX * i : DRAWS_A_MIX * (i + 1)], labels_B
            )
            return mixed_BTD

        tokens_BTD = self.encoder(self._patches(pixels_BCHW), after_block=mix if self.mixstyle else None)
        pooled_BD = pool(tokens_BTD, self.options.pooling, self.encoder.vit)
        if self.residual is not None:
            mean_C11, std_C11 = statistics_on(pixels_BCHW.device, self._normalisation)
            pooled_BD = self.residual((pixels_BCHW * std_C11 + mean_C11) * 255, pooled_BD)
        output_BC: Tensor = self.head(pooled_BD)
        return output_BC

    def _patches(self, pixels_BCHW: Tensor) -> Tensor:
        return patchify(pixels_BCHW, self.encoder.patch).to(self.encoder.vit.patch_embed.proj.weight.dtype)

    def _normalise(self, images_BCHW: Tensor) -> Tensor:
        mean_C11, std_C11 = statistics_on(images_BCHW.device, self._normalisation)
        return (images_BCHW.float() / 255 - mean_C11) / std_C11

    def _mix_up(self, pixels_BCHW: Tensor, labels_B: Tensor, draws_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Blend each image and its label with another's (Zhang et al. 2018, arXiv 1710.09412)."""
        assert self._mixup is not None
        weight_B, partner_B = self._mixup(draws_BK[:, 2]), partners(draws_BK[:, 1], self.options.mix_group)
        truth_BC = F.one_hot(labels_B, 2).float()
        blended_BC = weight_B[:, None] * truth_BC + (1 - weight_B[:, None]) * truth_BC[partner_B]
        weight_B111 = weight_B[:, None, None, None]
        return weight_B111 * pixels_BCHW + (1 - weight_B111) * pixels_BCHW[partner_B], blended_BC


def pool(tokens_BTD: Tensor, pooling: str, vit: Any) -> Tensor:
    """Return the head's input (B, D), pooled as in timm.

    Args:
        tokens_BTD: of the last block, after the encoder's last norm if it has one there.
        pooling: ``avg`` the mean of the patches, ``avg_fc_norm`` the norm of that mean, ``cls`` the class token.
        vit: timm's model.
    """
    if pooling == "cls":
        return tokens_BTD[:, 0]
    mean_BD = tokens_BTD[:, vit.num_prefix_tokens :].mean(dim=1)
    normed_BD: Tensor = vit.fc_norm(mean_BD) if pooling == "avg_fc_norm" else mean_BD
    return normed_BD


def build_head(width: int, options: HeadOptions) -> nn.Module:
    """Build the head from pooled tokens to logits, or to cosines with the margin loss."""
    layers: list[Any] = []
    if options.use_projection_head:
        layers.append(ProjectionHead(width, proj_dim=options.proj_dim, hidden_dim=options.proj_hidden_dim))
        width = options.proj_dim
    if options.use_improved_classifier:
        layers.append(MorphClassifier(width, hidden_dim=options.cls_hidden_dim, cosine=options.use_margin_loss))
    elif options.use_margin_loss:
        layers.append(CosineLayer(width))
    else:
        layers.append(nn.Linear(width, 2))
        nn.init.trunc_normal_(layers[-1].weight, std=0.01)
        nn.init.zeros_(layers[-1].bias)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
