"""All ranks of tests/tools/test_plan_run.py: imports once, then forks those of each case, which train a small model.

Each rank writes the bytes of all tensors that are alive before and after the optimizer step, as JSON.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.config.parse import resolve
from trainer.config.recipes import DETECTOR_RECIPES, RECIPES
from trainer.detection.build import build_detector
from trainer.distributed.ds_config import engine_settings
from trainer.distributed.engine import Engine, connect
from trainer.distributed.world import world_from_environment
from trainer.training.pretraining import build_model, mask_of

LATE = ("runtime.zero.muon.muon_optimizer", "runtime.superoffload.superoffload_stage3", "module_inject.auto_ep_layer")
for late in (*LATE, "ops.op_builder.all_ops"):
    importlib.import_module(f"deepspeed.{late}")  # what DeepSpeed imports at its start, five seconds for every rank


def live_bytes() -> int:
    """Sum the storages of all tensors that Python can reach, each once."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in found if t.device.type == "cpu"}.values())


def measure(name: str, flags: dict[str, str], folder: Path) -> dict[str, int]:
    world = connect(world_from_environment(), timeout_s=120)
    recipe: Any
    if name in RECIPES:
        recipe, runtime = resolve(*RECIPES[name](), flags)
        model: Any = build_model(recipe)
        draw = mask_of(recipe, model.encoder, mask_ratio=recipe.mask_ratio, predict_share=recipe.predict_share)
    else:
        recipe, runtime = resolve(*DETECTOR_RECIPES[name](), flags)
        model, _ = build_detector(recipe, None)

    def inputs() -> tuple[torch.Tensor, ...]:
        images = torch.zeros(runtime.micro_batch, 3, recipe.image_size, recipe.image_size, dtype=torch.uint8)
        if name in RECIPES:
            return images, *draw(torch.rand(len(images), model.encoder.num_patches))
        return images, torch.arange(len(images)) % 2, torch.zeros(len(images), model.num_draws)

    config = engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)
    frozen = getattr(recipe, "backbone_is_frozen", False)
    engine = Engine(model, ds_config=config, weight_decay=0.05, world=world, save_frozen=not frozen)
    deepspeed, seen = engine._engine, {}
    take_step = deepspeed.step

    def watched_step() -> None:
        if deepspeed.is_gradient_accumulation_boundary():
            seen["before_step"] = live_bytes()
        take_step()

    deepspeed.step = watched_step
    parameters = list(model.parameters())
    model.register_forward_hook(lambda *_: seen.update(gathered=sum(p.nbytes for p in parameters)))
    for step in range(2):
        engine.step((inputs() for _ in range(engine.accumulation)), learning_rate=1e-3, seed=step)
    seen["after_step"] = live_bytes()
    engine.capture(copy=False)(folder)
    world.wait_for_all()
    return seen


def main(cases: str, output: str) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is neither counted nor searched
    for number, (name, flags, num_ranks, port) in enumerate(json.loads(cases)):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + number), "WORLD_SIZE": str(num_ranks)}
        ranks = []
        for rank in range(num_ranks):
            if not (pid := os.fork()):
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                Path(output, f"{number}-{rank}.json").write_text(
                    json.dumps(measure(name, flags, Path(output, str(number))))
                )
                os._exit(0)
            ranks.append(pid)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in ranks), f"{name} {flags} failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
