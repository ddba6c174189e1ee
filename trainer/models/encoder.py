"""Any timm ViT, run on a subset of its patches. The only importer of timm's models.

Patches are gathered before the patch embedding, so nothing is computed for a hidden patch; positions are added by
index. With all patches kept, the result equals timm's ``forward_features``. Models with another result are refused.

Shapes: B images, N patches, K kept, T = prefix + K tokens, D width, P = p*p*C values of a patch, S queries, F = 3*D.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from einops import rearrange
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.errors import ConfigError
from trainer.models.mask_utils import gather_tokens

_EXAMPLE_MODEL = "vit_base_patch16_224"
_UNUSED_PREFIXES = ("attn_pool.", "norm.", "fc_norm.", "head.")
"""Weights behind the blocks that a model with another pooling does not need."""


class PatchEncoder(nn.Module):
    """A timm VisionTransformer under ``self.vit``, with timm's own parameter names."""

    def __init__(
        self,
        model_name: str,
        *,
        image_size: int,
        patch_size: int | None = None,
        depth: int | None = None,
        fixed_positions: bool = False,
        fc_norm: bool | None = None,
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        """Build the encoder with random weights.

        Args:
            model_name: timm's name.
            image_size: side [pixels].
            patch_size: side [pixels]; None is the model's own.
            depth: number of blocks; None is the model's own.
            fixed_positions: use sines and cosines instead of learned positions.
            fc_norm: timm's option: the last norm follows the mean over the patches instead of preceding it; the caller
                pools and applies ``vit.fc_norm``. None is the model's own.
            drop_path: probability of skipping the last block in training; it rises linearly from block to block.
            grad_checkpointing: recompute activations in the backward pass.

        Raises:
            ConfigError: timm has no such model, it is no ViT with absolute positions, or patches do not fit the image.
        """
        super().__init__()
        self.vit: Any = _create(
            model_name,
            image_size=image_size,
            patch_size=patch_size,
            depth=depth,
            drop_path_rate=drop_path or None,
            fc_norm=fc_norm,
            global_pool="avg" if fc_norm else None,
        )
        self._grad_checkpointing = grad_checkpointing
        if fixed_positions:
            self._fix_positions()

    @property
    def width(self) -> int:
        """Width of a token."""
        return int(self.vit.embed_dim)

    @property
    def patch(self) -> int:
        """Side of a patch [pixels]."""
        return int(self.vit.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.vit.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def trained_blocks(self) -> list[nn.Module]:
        """Blocks whose weights and input all need gradients; none with a frozen patch embedding, as with LoRA."""
        if not all(p.requires_grad for p in self.vit.patch_embed.parameters()):
            return []
        return [block for block in self.vit.blocks if all(p.requires_grad for p in block.parameters())]

    @property
    def num_prefix(self) -> int:
        """Number of class and register tokens in front of the patches."""
        return int(self.vit.num_prefix_tokens)

    def forward(
        self,
        patches_BNP: Tensor,
        keep_BK: Tensor | None = None,
        after_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Encode the kept patches.

        Args:
            patches_BNP: normalised patches in the order of `patchify`.
            keep_BK: patches to encode; None means all.
            after_block: is called with (i, tokens) after block i, counted from 0; returns the tokens to go on with.

        Returns:
            tokens_BTD: class and register tokens, then the kept patches in the order of ``keep``.
        """
        kept_BKP = patches_BNP if keep_BK is None else gather_tokens(patches_BNP, keep_BK)
        tokens_BTD = self.vit.norm_pre(self._with_prefix(self._embed(kept_BKP), keep_BK))
        for i, block in enumerate(self.vit.blocks):
            if self._grad_checkpointing and self.training:
                tokens_BTD = checkpoint(block, tokens_BTD, use_reentrant=False)
            else:
                tokens_BTD = block(tokens_BTD)
            if after_block is not None:
                tokens_BTD = after_block(i, tokens_BTD)
        normed_BTD: Tensor = self.vit.norm(tokens_BTD)
        return normed_BTD

    def attention_rollout(self, patches_BNP: Tensor) -> Tensor:
        """Compute how much each patch contributes to the result: the product of the attention of all blocks.

        The heads are averaged. Half of each block's input passes through its residual connection, so a block counts as
        0.5 * attention + 0.5 * identity. The map is the mean over the patch tokens, scaled to a maximum of 1.

        Returns:
            map_BRC: float32, a number for each row and column of patches.

        Source: Abnar and Zuidema 2020, arXiv 2005.00928, section 3.
        """
        tokens_BTD = self.vit.norm_pre(self._with_prefix(self._embed(patches_BNP), None))
        flow_BTT = torch.eye(tokens_BTD.shape[1], device=tokens_BTD.device).expand(len(tokens_BTD), -1, -1)
        for block in self.vit.blocks:
            weights_BTT = _attention_weights(block, tokens_BTD).float()
            flow_BTT = (0.5 * weights_BTT + 0.5 * torch.eye(weights_BTT.shape[-1], device=flow_BTT.device)) @ flow_BTT
            tokens_BTD = block(tokens_BTD)
        map_BN = flow_BTT[:, self.num_prefix :, self.num_prefix :].mean(dim=1)
        return rearrange(map_BN / map_BN.amax(dim=1, keepdim=True), "b (gh gw) -> b gh gw", gh=self.grid[0])

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load timm's parameters by name; positions of another grid are interpolated.

        Raises:
            ConfigError: a weight is missing, unknown or of another shape, so the weights are of another model.
        """
        weights = dict(weights)
        positions = weights.get("pos_embed")
        if positions is not None and positions.shape[1] - self.vit.num_prefix_tokens != self.num_patches:
            num_placed = self.vit.pos_embed.shape[1] - self.num_patches
            weights["pos_embed"] = interpolate_positions(positions, self.grid, num_prefix=num_placed)
        parameters = self.vit.state_dict()
        if "norm.weight" in parameters and "norm.weight" not in weights and "fc_norm.weight" in weights:
            raise ConfigError(
                "the last norm of the weights stands behind the pooling (fc_norm), as after the published MAE's "
                "fine-tuning: set --pooling avg_fc_norm to fine-tune them; pre-training cannot start from them"
            )
        if "norm.weight" in weights:  # the published fine-tuning starts from these with a new norm behind the pooling
            weights = {name: value for name, value in parameters.items() if name.startswith("fc_norm.")} | weights
        unused = [name for name in weights if name not in parameters and not name.startswith(_UNUSED_PREFIXES)]
        if unused:
            raise ConfigError(
                f"the weights have {unused[0]}, which has no place in this model, so that it would compute something "
                "else with them: set --model, --patch_size, --encoder_depth and --image_size to those that it was "
                "trained with"
            )
        missing = [name for name in parameters if name not in weights]
        misfits = [n for n, value in parameters.items() if n in weights and weights[n].shape != value.shape]
        if missing or misfits:
            name = (missing or misfits)[0]
            found = "none" if missing else f"one of shape {tuple(weights[name].shape)}"
            what = f"have, for {name} of shape {tuple(parameters[name].shape)}, {found}"
            raise ConfigError(
                f"the weights {what}: set --model, --patch_size, --encoder_depth and --image_size to those "
                "that it was trained with"
            )
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])

    @property
    def has_fc_norm(self) -> bool:
        """Whether the last norm stands behind the pooling."""
        return not isinstance(self.vit.fc_norm, nn.Identity)

    def resize(self, height: int, width: int) -> None:
        """Interpolate the positions for images of another size, square or not.

        Raises:
            ConfigError: patches do not fit such an image.
        """
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ConfigError(
                f"image_size is {height}x{width}, but both must be divisible by the patch size {self.patch}"
            )
        self.vit.set_input_size(img_size=(height, width))

    def positions(self) -> Tensor:
        """Return the position embedding of every patch, (1, N, D)."""
        positions: Tensor = self.vit.pos_embed
        return positions[:, positions.shape[1] - self.num_patches :]

    def flops(self, num_tokens: int) -> int:
        """Count multiply-adds times two of one forward pass over this many patches of one image."""
        embed = self.vit.patch_embed.proj
        pixels = embed.in_channels * self.patch**2
        embedding = int(2 * num_tokens * pixels * self.width)
        return embedding + sum(block_flops(block, num_tokens + self.num_prefix) for block in self.vit.blocks)

    def _embed(self, patches_BKP: Tensor) -> Tensor:
        """Run timm's own convolution over a strip of kept patches, so that hooks of ZeRO-3 and adapters see its module.

        Example: 49 kept patches of 16 pixels form an image of 16 x 784 pixels; the stride is 16, so 49 tokens come out.
        """
        strip_BCpW = rearrange(patches_BKP, "b k (p q c) -> b c p (k q)", p=self.patch, q=self.patch)
        embedded_BD1K = self.vit.patch_embed.proj(strip_BCpW)
        tokens_BKD: Tensor = self.vit.patch_embed.norm(embedded_BD1K.squeeze(2).transpose(1, 2))
        return tokens_BKD

    def _with_prefix(self, patches_BKD: Tensor, keep_BK: Tensor | None) -> Tensor:
        """Add positions by index and put class and register tokens in front, as timm's ``_pos_embed`` orders them."""
        B = len(patches_BKD)
        positions_1ND = self.positions()
        chosen = positions_1ND if keep_BK is None else gather_tokens(positions_1ND.expand(B, -1, -1), keep_BK)
        prefix = [token.expand(B, -1, -1) for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        if prefix and not self.vit.no_embed_class:
            # Positions of prefix tokens: mostly one, of the class token; register tokens have none.
            num_placed = self.vit.pos_embed.shape[1] - self.num_patches
            prefix_BTD = torch.cat(prefix, dim=1)
            placed = prefix_BTD[:, :num_placed] + self.vit.pos_embed[:, :num_placed]
            prefix = [placed, prefix_BTD[:, num_placed:]]
        tokens_BTD: Tensor = self.vit.pos_drop(torch.cat([*prefix, patches_BKD + chosen], dim=1))
        return tokens_BTD

    def _fix_positions(self) -> None:
        """Replace the learned positions by fixed sines and cosines; class tokens get zeros."""
        with torch.no_grad():
            num_placed = self.vit.pos_embed.shape[1] - self.num_patches
            self.vit.pos_embed[:, :num_placed] = 0
            self.vit.pos_embed[:, num_placed:] = sine_cosine_positions(self.grid, self.width)
        self.vit.pos_embed.requires_grad_(False)


def make_blocks(depth: int, *, width: int, heads: int) -> nn.ModuleList:
    """Build pre-norm transformer blocks like the encoder's (MLP ratio 4, biases, layer norm with eps 1e-6)."""
    return nn.ModuleList(Block(width, heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth))


def query_key_value(block: Any, tokens_BTD: Tensor) -> Tensor:
    """Return query, key and value of each token in a block's attention, (B, T, 3*D)."""
    projected: Tensor = block.attn.qkv(block.norm1(tokens_BTD))
    return projected


def attend_from(block: Any, tokens_BTD: Tensor, num_queries: int, qkv_BTF: Tensor | None = None) -> Tensor:
    """Run a block for its last tokens only; they still attend to all tokens.

    Equals ``block(tokens)[:, -num_queries:]`` without the other tokens' attention rows, projection and MLP.

    Args:
        block: a block of timm.
        tokens_BTD: its input.
        num_queries: S.
        qkv_BTF: `query_key_value` of the tokens, if the caller has it; None computes it.

    Returns:
        tokens_BSD: the last ``num_queries`` tokens.
    """
    attention = block.attn
    qkv_BTF = query_key_value(block, tokens_BTD) if qkv_BTF is None else qkv_BTF
    q_BhTd, k_BhTd, v_BhTd = rearrange(qkv_BTF, "b t (three h d) -> three b h t d", three=3, h=attention.num_heads)
    # Queries of the last S tokens only, keys and values of all.
    q_BhSd = attention.q_norm(q_BhTd[:, :, -num_queries:])
    mixed_BhSd = F.scaled_dot_product_attention(q_BhSd, attention.k_norm(k_BhTd), v_BhTd)
    mixed_BSD = attention.proj(attention.norm(rearrange(mixed_BhSd, "b h s d -> b s (h d)")))
    tokens_BSD = tokens_BTD[:, -num_queries:] + block.drop_path1(block.ls1(mixed_BSD))
    result_BSD: Tensor = tokens_BSD + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens_BSD))))
    return result_BSD


def chance_of_skipping(module: nn.Module) -> float:
    """Return the probability with which timm's drop path skips a sample in training; 0 for other modules."""
    return float(module.drop_prob or 0.0) if isinstance(module, DropPath) else 0.0


def hub_name_of(model_name: str) -> str:
    """Return the hub's name of timm's weights of a model; empty if the hub has none.

    Raises:
        ConfigError: timm has no such model, or it is not supported here.
    """
    _refuse_other_models(model_name)
    config = timm.get_pretrained_cfg(model_name)
    return str(getattr(config, "hf_hub_id", None) or "")


def natural_shape(model_name: str) -> tuple[int, int]:
    """Return a model's own patch side [pixels] and number of blocks.

    Raises:
        ConfigError: timm has no such model, or it is not supported here.
    """
    _refuse_other_models(model_name)
    with torch.device("meta"):
        vit: Any = timm.create_model(model_name, pretrained=False, num_classes=0)
    return int(vit.patch_embed.patch_size[0]), len(vit.blocks)


def natural_image_size(model_name: str) -> int:
    """Return the side of the images that a model is made for [pixels].

    Raises:
        ConfigError: timm has no such model, it is not supported here, or its images are not square.
    """
    _refuse_other_models(model_name)
    height, width = _on_meta(model_name).patch_embed.img_size
    if height != width:
        raise ConfigError(f"model {model_name!r} takes images of {height} x {width} pixels: pass --image_size")
    return int(height)


def pretrained_weights(model_name: str) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    """Download timm's weights of a model; returns them with the pixel mean and deviation that they expect.

    Raises:
        ConfigError: timm has no such weights, or they cannot be downloaded.
    """
    try:
        model = timm.create_model(model_name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub raises many types, all about the name or the network
        raise ConfigError(
            f"{model_name!r} with pretrained true: its weights cannot be had ({error}): check name and network, "
            "or download them elsewhere and name the .safetensors file"
        ) from error
    config: Any = model.pretrained_cfg
    return model.state_dict(), tuple(config["mean"]), tuple(config["std"])


def _attention_weights(block: Any, tokens_BTD: Tensor) -> Tensor:
    """Return a block's attention, averaged over the heads, (B, T, T); rows sum to 1."""
    attention = block.attn
    q_BhTd, k_BhTd, _ = rearrange(
        query_key_value(block, tokens_BTD), "b t (three h d) -> three b h t d", three=3, h=attention.num_heads
    )
    logits_BhTT = attention.q_norm(q_BhTd) @ attention.k_norm(k_BhTd).transpose(-1, -2) * attention.scale
    weights_BTT: Tensor = logits_BhTT.softmax(dim=-1).mean(dim=1)
    return weights_BTT


def block_flops(block: Any, num_tokens: int, num_queries: int | None = None, num_projected: int | None = None) -> int:
    """Count the forward FLOPs of a block over T tokens: 2 for each weight and token, and 4*T*T*D for attention.

    Args:
        block: a block of timm.
        num_tokens: T.
        num_queries: S, tokens that `attend_from` continues with; None means all.
        num_projected: tokens for which `query_key_value` runs; None means all.
    """
    queries = num_tokens if num_queries is None else num_queries
    projected = num_tokens if num_projected is None else num_projected
    linear = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
    qkv: int = block.attn.qkv.weight.numel()
    attention: int = 4 * num_tokens * queries * block.attn.num_heads * block.attn.head_dim
    return 2 * qkv * projected + 2 * (linear - qkv) * queries + attention


def interpolate_positions(positions_1ND: Tensor, grid: tuple[int, int], *, num_prefix: int = 0) -> Tensor:
    """Interpolate position embeddings of a square grid to another grid; the first ``num_prefix`` are kept."""
    resampled: Tensor = resample_abs_pos_embed(positions_1ND.float(), list(grid), num_prefix_tokens=num_prefix)
    return resampled


def sine_cosine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Encode each patch's column in the first half of the width and its row in the second, (1, N, width), float32.

    Example: width 8, column 1 and row 0: sin 1, sin 0.01, cos 1, cos 0.01, then 0, 0, 1, 1.

    Source: He et al. 2021, arXiv 2111.06377, appendix A.1, after Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    quarter = width // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None].float()


def _create(model_name: str, *, image_size: int, **options: float | str | None) -> Any:
    _refuse_other_models(model_name)
    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    patch = int(options.get("patch_size") or _on_meta(model_name).patch_embed.patch_size[0])
    if image_size < patch or image_size % patch:
        fitting = max(patch, round(image_size / patch) * patch)
        raise ConfigError(
            f"image_size is {image_size}, but must be divisible by the patch size {patch}: try --image_size {fitting}"
        )
    try:
        vit: Any = timm.create_model(model_name, pretrained=False, img_size=image_size, num_classes=0, **chosen)
    except (TypeError, AssertionError, ValueError, AttributeError, RuntimeError) as error:
        options_text = ", ".join(f"{name} {value}" for name, value in chosen.items())
        raise ConfigError(
            f"timm cannot build model {model_name!r} with {options_text} ({error}): leave that out"
        ) from error
    return vit


def build_peer(model_name: str) -> nn.Module:
    """Build any classifier of timm for two classes, with random weights, to compare detectors with.

    Raises:
        ConfigError: timm has no such model, or cannot build it.
    """
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3, cutoff=0.4) or ["resnet10t"]
        raise ConfigError(f"peer is {model_name!r}, which timm {timm.__version__} does not know: try {', '.join(near)}")
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=False, num_classes=2)
    except (TypeError, AssertionError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ConfigError(f"timm cannot build peer {model_name!r} ({error}): try resnet10t") from error
    return model


def _refuse_other_models(model_name: str) -> None:
    """Raise `ConfigError` for a name that timm does not know, or a model that would compute something else here."""
    if not timm.is_model(model_name):
        names = timm.list_models("*vit*")
        near = difflib.get_close_matches(model_name, names, n=3, cutoff=0.4) or [_EXAMPLE_MODEL]
        raise ConfigError(
            f"model is {model_name!r}, which timm {timm.__version__} does not know: try {', '.join(near)}"
        )
    base, _, tag = model_name.partition(".")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")] if tag else []
    if tag and tag not in tags:
        raise ConfigError(
            f"model is {model_name!r}, but timm knows no weights {tag!r} of {base} (it knows "
            f"{', '.join(tags) or 'none'}): try --model {base}"
        )
    try:
        other = _difference(_on_meta(model_name))
    except (TypeError, AssertionError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        other = f"timm does not build it of one block ({error})"
    if other:
        raise ConfigError(f"model {model_name!r} is no plain ViT, {other}: choose one such as {_EXAMPLE_MODEL}")


@functools.cache
def _on_meta(model_name: str) -> Any:
    """Build a model with its first block only, without memory or random numbers."""
    with torch.device("meta"):
        return timm.create_model(model_name, pretrained=False, num_classes=0, depth=1)


def _difference(vit: Any) -> str:
    """Name the first difference between `PatchEncoder` and timm's model; empty if there is none."""
    if hasattr(vit, "dist_token"):
        return "it has a distillation token, which we would leave out"
    if type(vit) is not VisionTransformer:
        return f"timm's class for it is {type(vit).__name__} and not VisionTransformer"
    if vit.pos_embed is None:
        return "it has no absolute positions, which tell patches apart"
    embed = vit.patch_embed
    if type(embed) is not PatchEmbed:
        return f"{type(embed).__name__} embeds its patches, not one convolution, so that none can be left out before"
    if not embed.patch_size[0] == embed.patch_size[1] == embed.proj.kernel_size[0] == embed.proj.stride[0]:
        return f"its patches of {embed.patch_size} pixels are not square or overlap"
    if not isinstance(vit.patch_drop, nn.Identity):
        return "it drops patches of its own choice"
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            kinds = type(block).__name__, type(getattr(block, "attn", None)).__name__
            return f"its blocks are {kinds[0]} with {kinds[1]}, not Block with Attention"
    return ""
