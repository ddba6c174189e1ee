"""What a recipe fills into a ds_config."""

from pathlib import Path
from typing import Any

from trainer.distributed.ds_config import fill_ds_config, owned_by_recipe, read_ds_config

OWNED = owned_by_recipe(
    global_batch=8,
    micro_batch=2,
    num_ranks=2,
    learning_rate=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    clip_grad_norm=0.0,
)


def filled_ds_config(path: str | Path, *, stage: int | str | None = None, **changes: Any) -> dict[str, Any]:
    """Read a ds_config and fill it as a recipe of a tiny model does, with these changes; None keeps its own stage."""
    recipe: dict[str, Any] = {
        "global_batch": 8,
        "micro_batch": 2,
        "num_ranks": 1,
        "learning_rate": 2e-3,
        "betas": (0.9, 0.95),
        "weight_decay": 0.05,
        "clip_grad_norm": 1.0,
    }
    config = fill_ds_config(read_ds_config(Path(path)), owned_by_recipe(**(recipe | changes)))
    if stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = int(stage)
    return config
