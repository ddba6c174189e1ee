"""What a recipe fills into a ds_config."""

from trainer.distributed.ds_config import owned_by_recipe

OWNED = owned_by_recipe(
    global_batch=8,
    micro_batch=2,
    num_ranks=2,
    learning_rate=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    clip_grad_norm=0.0,
)
