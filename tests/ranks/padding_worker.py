"""One rank of a step in which memory that nobody wrote holds NaN: shares of odd sizes are filled up with it."""

import sys
from pathlib import Path

import torch

from tests.ranks.detector_worker import GLOBAL_BATCH, LR, build, inputs, start
from trainer.distributed.ds_config import fill_ds_config, owned_by_recipe, read_ds_config
from trainer.distributed.engine import connect, disconnect
from trainer.distributed.world import world_from_environment


def main(ds_config: str, output: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    owned = owned_by_recipe(
        global_batch=GLOBAL_BATCH // 4 * world.size,
        micro_batch=2,
        num_ranks=world.size,
        learning_rate=LR,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        clip_grad_norm=0.0,
    )
    config = fill_ds_config(read_ds_config(Path(ds_config)), owned)
    config.setdefault("zero_optimization", {})["stage"] = 3
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote
    engine = start(build(), config, world)
    engine.step([inputs([2 * world.rank, 2 * world.rank + 1])], learning_rate=LR, seed=0)
    engine.check_finite()
    Path(output, f"rank-{world.rank}.json").write_text("{}")
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
