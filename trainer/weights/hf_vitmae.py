"""Names of transformers' ViTMAE against those of the published MAE, whose encoder has timm's.

Published names are ``blocks.N.attn.qkv.weight`` for the encoder and ``decoder_blocks.N...``, ``mask_token``,
``decoder_pos_embed`` (with a row of zeros for the class token) for the decoder. Transformers keeps query, key and value
apart. Its files have had three layouts: that of its hub, which is written here because every version reads it; that of
its modules since version 5; and what version 5.23 saves, where the decoder's blocks are a ``decoder_encoder``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import ConfigError

_PARTS = {
    "query": ("attention.attention.query", "attention.q_proj"),
    "key": ("attention.attention.key", "attention.k_proj"),
    "value": ("attention.attention.value", "attention.v_proj"),
}
_LAYERS = {  # published: the hub's, that of version 5
    "norm1": ("layernorm_before", "layernorm_before"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    **{name: f"decoder.{name}" for name in ("mask_token", "decoder_pos_embed")},
    **{name: f"decoder.{name}" for name in ("decoder_embed", "decoder_norm", "decoder_pred")},
}
_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}

_OURS_INSIDE = {theirs: ours for ours, both in _LAYERS.items() for theirs in both}
_PART_OF = {theirs: part for part, both in _PARTS.items() for theirs in both}
_OURS_OUTSIDE = {theirs.removeprefix("vit."): ours for ours, theirs in _OUTSIDE.items()}
_STACK_OF = {
    **dict.fromkeys(("encoder.layer", "layers"), "blocks"),
    **dict.fromkeys(("decoder.decoder_layers", "decoder.decoder_encoder.layer"), "decoder_blocks"),
}
_INSIDE = re.compile(rf"({'|'.join(map(re.escape, _STACK_OF))})\.(\d+)\.(.+)\.(weight|bias)")


def is_vitmae(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are transformers', of ViTMAEForPreTraining or of ViTMAEModel."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in weights)


def from_vitmae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give transformers' weights the published names; names of other parts are left as they are."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        bare = name.removeprefix("vit.")
        inside = _INSIDE.fullmatch(bare)
        if inside is None:
            stem, dot, kind = bare.rpartition(".")
            whole = _OURS_OUTSIDE.get(bare)
            found[whole or f"{_OURS_OUTSIDE.get(stem, stem)}{dot}{kind}"] = value
            continue
        stack, number, layer, kind = inside.groups()
        block = f"{_STACK_OF[stack]}.{number}"
        if layer in _PART_OF:
            parts.setdefault(f"{block}.attn.qkv.{kind}", {})[_PART_OF[layer]] = value
        else:
            found[f"{block}.{_OURS_INSIDE.get(layer, layer)}.{kind}"] = value
    whole_parts = {name: three for name, three in parts.items() if three.keys() == _PARTS.keys()}
    return found | {name: torch.cat([three[part] for part in _PARTS]) for name, three in whole_parts.items()}


def to_vitmae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published weights the names of transformers' hub.

    Raises:
        ConfigError: the format has no place for one, such as a register token.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        stack, number, layer = (*stem.split(".", 2), "", "")[:3]
        place = f"{_STACKS.get(stack)}.{number}"
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = value
        elif stem in _OUTSIDE:
            found[f"{_OUTSIDE[stem]}.{kind}"] = value
        elif stack in _STACKS and layer == "attn.qkv":
            for (theirs, _), part in zip(_PARTS.values(), value.chunk(3), strict=True):
                found[f"{place}.{theirs}.{kind}"] = part.contiguous()
        elif stack in _STACKS and layer in _LAYERS:
            found[f"{place}.{_LAYERS[layer][0]}.{kind}"] = value
        else:
            raise ConfigError(
                f"format is vitmae, but transformers' ViTMAE has no place for {name} of this model: export it as timm"
            )
    return found
