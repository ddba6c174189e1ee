"""What the optimizer is told: parameter groups and the learning rate as a function of the step."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group with decay and one without (biases and norms).

    Source: the published MAE's setting (timm's ``add_weight_decay``): no decay for vectors and biases.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": bare, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_at(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from zero, then half a cosine.

    Source: He et al. 2021, arXiv 2111.06377, appendix A.1 (per-iteration schedule).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
