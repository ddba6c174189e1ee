"""What happens at which optimizer step: learning rate, seeds, logging, saving, the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The part of a run's course that is the same for every task."""

    last_step: int
    log_every: int
    save_every: int
    learning_rate_at: Callable[[int], float]
    """Of a step, counted from 0."""
    seed_at: Callable[[int], int]
    """Likewise, of this rank."""

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one; the last step has everything."""
        return step % every == 0 or step == self.last_step


def learning_rate_at(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from zero, then half a cosine.

    With ``peak`` 1, ``floor`` 0, 10 warm-up steps and 110 in all: step 5 has 0.5, step 10 has 1, step 60 (half of the
    decay) has 0.5, and step 110, which is never taken, would have 0.

    Source: He et al. 2021, arXiv 2111.06377, appendix A.1 (per-iteration schedule).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
