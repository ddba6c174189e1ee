"""Parameter groups of the optimizer: weight decay, and layer-wise learning rates."""

import re
from typing import Any

from torch import nn

_BLOCK = re.compile(r"\bvit\.blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"\bvit\.(patch_embed|pos_embed|cls_token|reg_token|norm_pre)")
_HEAD = re.compile(r"head\.")
_PLACED = re.compile(r"\bvit\.(pos_embed|cls_token|reg_token)$")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    decay_embeddings: bool = True,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups with and without weight decay (biases and norms), and by depth.

    ``decay_embeddings`` decides whether the encoder's positions, class and register tokens decay. They do in the
    published pre-training (learned positions only), and do not in the published fine-tuning.

    A group's ``lr_scale`` is ``layer_decay`` to the power of its distance from the head: 0 for the head and the last
    norm, 1 for the last block, one more for each block below it, and one more for the embedding.

    The parameters of the detector's head have ``head_lr_scale`` times that.

    Example: 12 blocks with layer decay 0.75. Head 1.0, block 11 0.75, block 10 0.5625, block 0 0.75**12 = 0.032 and
    embedding 0.75**13 = 0.024.

    Source: the published MAE's setting (timm's ``add_weight_decay``): no decay for vectors and biases; timm's
    ``no_weight_decay`` for the embeddings; layer decay: Clark et al. 2020, arXiv 2003.10555, and He et al. 2021, arXiv
    2111.06377, table 9.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((int(found[1]) for name, _ in named if (found := _BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in named:
        spared = p.ndim <= 1 or name.endswith(".bias") or (not decay_embeddings and _PLACED.search(name))
        decay = 0.0 if spared else weight_decay
        scale = layer_decay ** _distance_from_head(name, depth) * (head_lr_scale if _HEAD.match(name) else 1.0)
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(p)
    return [groups[key] for key in sorted(groups, reverse=True)]


def _distance_from_head(name: str, depth: int) -> int:
    found = _BLOCK.search(name)
    if found:
        return depth - int(found[1])
    return depth + 1 if _EMBEDDING.search(name) else 0
