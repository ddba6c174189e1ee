"""One rank of a step in which memory that nobody wrote holds NaN: shares of odd sizes are filled up with it."""

import sys
from pathlib import Path

import torch

from tests.helpers.ds_configs import filled_ds_config
from trainer.config.settings import DetectorRecipe
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import world_from_environment
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder

LR = 1e-2


def main(ds_config: str, output: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    config = filled_ds_config(
        ds_config, stage=3, global_batch=2 * world.size, num_ranks=world.size, learning_rate=LR, clip_grad_norm=0.0
    )
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
