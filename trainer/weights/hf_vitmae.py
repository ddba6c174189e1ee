"""Translate parameter names between transformers' ViTMAE and the published MAE, whose encoder has timm's names.

Published names are ``blocks.N.attn.qkv.weight`` for the encoder and ``decoder_blocks.N...``, ``mask_token``,
``decoder_pos_embed`` (with a row of zeros for the class token) for the decoder. Transformers has three layers for
query, key and value::

    published          blocks.3.attn.qkv.weight, the rows of query, key and value below each other
    transformers       vit.encoder.layer.3.attention.attention.query.weight, ...key.weight, ...value.weight

Transformers' files have had three layouts: that of its hub, which is written here because every version reads it; that
of its modules since version 5; and that of version 5.23, where the decoder's blocks are a ``decoder_encoder``.
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
_LAYERS = {  # published: name on the hub, name in version 5
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

_PUBLISHED_INSIDE = {hf_name: name for name, both in _LAYERS.items() for hf_name in both}
_PART_OF = {hf_name: part for part, both in _PARTS.items() for hf_name in both}
_PUBLISHED_OUTSIDE = {hf_name.removeprefix("vit."): name for name, hf_name in _OUTSIDE.items()}
_STACK_OF = {
    **dict.fromkeys(("encoder.layer", "layers"), "blocks"),
    **dict.fromkeys(("decoder.decoder_layers", "decoder.decoder_encoder.layer"), "decoder_blocks"),
}
_INSIDE = re.compile(rf"({'|'.join(map(re.escape, _STACK_OF))})\.(\d+)\.(.+)\.(weight|bias)")


def is_vitmae(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers' ViTMAEForPreTraining or ViTMAEModel."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in weights)


def from_vitmae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' weights to the published names; unknown names stay as they are."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        bare = name.removeprefix("vit.")
        inside = _INSIDE.fullmatch(bare)
        if inside is None:
            stem, dot, kind = bare.rpartition(".")
            full_name = _PUBLISHED_OUTSIDE.get(bare)  # a parameter by itself, such as cls_token
            found[full_name or f"{_PUBLISHED_OUTSIDE.get(stem, stem)}{dot}{kind}"] = value
            continue
        stack, number, layer, kind = inside.groups()
        block = f"{_STACK_OF[stack]}.{number}"
        if layer in _PART_OF:
            parts.setdefault(f"{block}.attn.qkv.{kind}", {})[_PART_OF[layer]] = value
        else:
            found[f"{block}.{_PUBLISHED_INSIDE.get(layer, layer)}.{kind}"] = value
    complete = {name: three for name, three in parts.items() if three.keys() == _PARTS.keys()}
    return found | {name: torch.cat([three[part] for part in _PARTS]) for name, three in complete.items()}


def to_vitmae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to the names of transformers' hub.

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
            for (hf_name, _), part in zip(_PARTS.values(), value.chunk(3), strict=True):
                found[f"{place}.{hf_name}.{kind}"] = part.contiguous()
        elif stack in _STACKS and layer in _LAYERS:
            found[f"{place}.{_LAYERS[layer][0]}.{kind}"] = value
        else:
            raise ConfigError(
                f"format is vitmae, but transformers' ViTMAE has no place for {name} of this model: export it as timm"
            )
    return found
