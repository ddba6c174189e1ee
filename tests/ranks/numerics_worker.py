"""One rank of test_nonfinite.py: steps with faults on the last rank; did the state move, and how did it go on?"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from engine_worker import GLOBAL_BATCH, inputs

from tests.helpers.ds_configs import filled_ds_config
from trainer.distributed.engine import Engine, StepResult, connect, disconnect
from trainer.distributed.world import World, world_from_environment
from trainer.errors import TrainerError
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder

SAVED, STEPS, LR, MICRO_BATCH = 6, 8, 2e-3, 2
FAULTS = {2: "loss", 3: "constant", 4: "gradient"}
"""By step: a loss that is NaN; an infinite loss with finite gradients; a finite loss with infinite gradients."""


class Faulty(MaskedAutoencoder):
    """A model that breaks on command."""

    fault = ""

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        result: torch.Tensor = super().forward(*args, **options)
        if self.fault == "loss":
            result = result * torch.nan
        elif self.fault == "constant":
            result = result + torch.inf
        elif self.fault == "gradient":
            result.register_hook(lambda gradient: gradient * torch.inf)
        return result


def build(config: dict[str, Any], world: World) -> Engine:
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    model = Faulty(encoder, DecoderOptions(decoder_width=32, decoder_depth=2, decoder_heads=4))
    return Engine(model, ds_config=config, weight_decay=0.05, world=world)


def step(engine: Engine, number: int, fault: str = "", stop: bool = False) -> StepResult:
    world = engine.world
    mine = list(range(number * GLOBAL_BATCH + world.rank, (number + 1) * GLOBAL_BATCH, world.size))
    parts = [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]
    fault = fault if world.rank == world.size - 1 else ""

    def micro_batches() -> Iterator[tuple[torch.Tensor, ...]]:
        for place, part in enumerate(parts):
            engine.module.fault = fault if place == 1 else ""
            yield inputs(part)

    return engine.step(micro_batches(), learning_rate=LR, seed=number, stop=stop)


def digest(engine: Engine) -> str:
    """Everything that a step may move on this rank: weights, masters, moments, step counts."""
    optimizer = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
    tensors = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
    tensors += [p.detach() for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += [torch.as_tensor(state[name]) for name in sorted(state)]
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.float().cpu().numpy().tobytes())
    return sha256.hexdigest()


def main(ds_config: str, output: str, stage: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    config = filled_ds_config(ds_config, stage=stage, num_ranks=world.size, learning_rate=LR)

    if "fp16" in config:
        get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, not impossible
    engine, seen = build(config, world), {"applied": [], "untouched": [], "losses": [], "micro_losses": [], "stop": []}
    for number in range(STEPS):
        if number == SAVED:
            engine.check_finite()
            engine.capture(copy=False)(Path(output, "saved"))
        before = digest(engine)
        result = step(engine, number, FAULTS.get(number, ""), stop=number == SAVED and world.rank == world.size - 1)
        seen["applied"].append(result.applied)
        seen["untouched"].append(before == digest(engine))
        seen["stop"].append(result.stop)
        seen["micro_losses"].append([str(loss) for loss in result.micro_losses])
        seen["losses"].append(result.loss)
    engine.load(Path(output, "saved"), written_by=engine.world.size)  # back in the same engine, as a rollback does
    seen["again"] = [step(engine, number).loss for number in range(SAVED, STEPS)]

    never, seen["oracle"] = build(config, world), []  # an engine that never met the bad steps
    for number in range(STEPS):
        seen["oracle"].append(None if number in FAULTS else step(never, number).loss)

    if world.rank == 0:
        weight = engine.module.decoder_pred.weight
        getattr(weight, "ds_tensor", weight).data.view(-1)[0] = torch.nan
    try:
        engine.check_finite()
    except TrainerError as error:
        seen["refusal"] = str(error)
    Path(output, f"rank-{world.rank}.json").write_text(json.dumps(seen))
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
