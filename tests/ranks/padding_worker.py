"""One rank of a step in which memory that nobody wrote holds NaN: shares of odd sizes are filled up with it."""

import sys
from pathlib import Path

import torch

from trainer.config.settings import DetectorRecipe
from trainer.distributed.ds_config import fill_ds_config, owned_by_recipe, read_ds_config
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import world_from_environment
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder

LR = 1e-2


def main(ds_config: str, output: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    owned = owned_by_recipe(
        global_batch=2 * world.size,
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
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=1)
    model = MorphDetector(encoder, normalisation="imagenet", head=HeadOptions.of(DetectorRecipe()))
    engine = Engine(model, ds_config=config, weight_decay=0.05, world=world)
    images_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    engine.step([(images_BCHW, torch.tensor([0, 1]), torch.zeros(2, 1))], learning_rate=LR, seed=0)
    engine.check_finite()
    Path(output, f"rank-{world.rank}.json").write_text("{}")
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
