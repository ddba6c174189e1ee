"""One rank of test_finetuning.py: steps of a tiny LoRA detector; writes what it saw as JSON, saves and reloads."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from engine_worker import images_at

from tests.helpers.ds_configs import filled_ds_config
from trainer.config.settings import DetectorRecipe
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import world_from_environment
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.lora import add_lora
from trainer.models.residual import ResidualBranch

GLOBAL_BATCH, STEPS, LR = 8, 6, 1e-2


def inputs(positions: list[int]) -> tuple[torch.Tensor, ...]:
    labels = torch.tensor([position % 2 for position in positions])
    return images_at(positions), labels, torch.zeros(len(positions), 1)


def positions_of(step: int, global_batch: int, world) -> list[int]:
    """A rank's positions of a step."""
    return list(range(step * global_batch + world.rank, (step + 1) * global_batch, world.size))


def build() -> MorphDetector:
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2)
    add_lora(encoder.vit, dropout=0.0, targets=("query", "value"))
    model = MorphDetector(encoder, normalisation="imagenet", head=HeadOptions.of(DetectorRecipe()), residual=True)
    model.residual = ResidualBranch(encoder.width, (32, 32), token_width=16, depth=1)  # smaller than the frozen encoder
    return model


def start(model: MorphDetector, config: dict, world) -> Engine:
    return Engine(model, ds_config=config, weight_decay=0.05, world=world, save_frozen=False)


def steps(engine: Engine, first: int, end: int, world, micro_batch: int) -> list[float]:
    losses = []
    for step in range(first, end):
        mine = positions_of(step, GLOBAL_BATCH, world)
        parts = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
        result = engine.step((inputs(part) for part in parts), learning_rate=LR, seed=step)
        losses.append(result.loss)
    return losses


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(state.items()))).hexdigest()


def main(ds_config: str, output: str, stage: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    config = filled_ds_config(ds_config, stage=stage, num_ranks=world.size, learning_rate=LR, clip_grad_norm=0.0)
    engine = start(build(), config, world)
    losses = steps(engine, 0, STEPS // 2, world, 2)
    engine.capture(copy=False)(Path(output, "saved"))
    losses += steps(engine, STEPS // 2, STEPS, world, 2)
    state = engine.trainable_state()

    again = start(build(), config, world)
    again.load(Path(output, "saved"), written_by=world.size)
    resumed = steps(again, STEPS // 2, STEPS, world, 2)
    third = build().encoder.width
    seen = {
        "losses": losses,
        "resumed": resumed,
        "digest": digest(state),
        "digest_resumed": digest(again.trainable_state()),
        "names": sorted(state),
        "key_rows_are_zero": all(not v[third : 2 * third].any() for n, v in state.items() if "lora_B" in n),
        "logits": engine.evaluate(images_at([1, 2, 3]), want="logits").tolist(),
        "bytes": sum(path.stat().st_size for path in Path(output, "saved").rglob("*") if path.is_file()),
        "whole_bytes": 4 * sum(p.numel() for p in build().parameters()),
    }
    Path(output, f"rank-{world.rank}.json").write_text(json.dumps(seen))
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
