"""The learning rate of each step."""

import math


def learning_rate_at(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from zero, then half a cosine.

    Source: He et al. 2021, arXiv 2111.06377, appendix A.1 (per-iteration schedule).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
