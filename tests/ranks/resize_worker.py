"""One rank of test_resize.py: for every case load what the hop before left, train a step, save for the next hop.

The first hop also goes on to the end without a break, for comparison; the last one meets conversions that fail.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import detector_worker
import engine_worker
import torch
from deepspeed.utils import safe_get_full_optimizer_state

from tests.helpers.ds_configs import filled_ds_config
from trainer.distributed import zero_state as zero_files
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import World, world_from_environment
from trainer.errors import CheckpointError
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder

GLOBAL_BATCH, MICRO_BATCH, LR = 12, 2, 2e-3
CONFIGS = Path(__file__).resolve().parent.parent.parent / "ds_configs"


def start(case: str, world: World) -> Engine:
    """A case is KIND-CONFIG-STAGE."""
    kind, name, stage = case.split("-")
    config = filled_ds_config(
        CONFIGS / f"{name}.json",
        stage=stage,
        micro_batch=MICRO_BATCH,
        num_ranks=world.size,
        learning_rate=LR,
        global_batch=GLOBAL_BATCH,
    )
    zero = config["zero_optimization"]
    if kind == "lora":
        if stage == "3":
            zero["stage3_param_persistence_threshold"] = 0  # all weights are divided, and not only large ones
        options = {"weight_decay": 0.05, "layer_decay": 0.75, "save_frozen": False}
        return Engine(detector_worker.build(), ds_config=config, world=world, **options)
    if stage == "3":
        zero["sub_group_size"] = 5000  # several flat parts a parameter group
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    model = MaskedAutoencoder(encoder, DecoderOptions(decoder_width=32, decoder_depth=2, decoder_heads=4))
    return Engine(model, ds_config=config, weight_decay=0.05, world=world)


def train(engine: Engine, case: str, first: int, end: int, world: World) -> list[float]:
    inputs = (detector_worker if case.startswith("lora") else engine_worker).inputs
    losses = []
    for step in range(first, end):
        mine = detector_worker.positions_of(step, GLOBAL_BATCH, world)
        parts = [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]
        loss = engine.step((inputs(part) for part in parts), learning_rate=LR, seed=step)
        losses.append(loss.loss)
    return losses


def prints(engine: Engine) -> dict[str, str]:
    """Hashes of weights and moments, and the step, by other means than the trainer's."""
    inside = engine._engine
    if hasattr(inside.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19.8 links the moments of all groups once, after the first group's step, when others have none.
        inside.optimizer._hp_optimizer_states_linked = False
        inside.optimizer._lazy_init_hp_params_optimizer_state()
    found = {"weights": engine.trainable_state()}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {
            name: safe_get_full_optimizer_state(p, kind) if engine.zero_stage else inside.optimizer.state[p][kind]
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        }
    digests = {}
    for kind, tensors in found.items():
        whole = b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(tensors.items()))
        digests[kind] = hashlib.sha256(whole).hexdigest()
    states = (inside.optimizer.optimizer if engine.zero_stage else inside.optimizer).state.values()
    return digests | {"steps": str({float(state["step"]) for state in states}), "counted": str(inside.global_steps)}


def alter_a_moment(*arguments: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    folder, saved = CONVERT(*arguments, **options)
    path = next(Path(folder).rglob("exp_avg.pt"))
    moment = torch.load(path)
    first = moment["param"].view(-1)[:1]
    first.copy_(torch.nextafter(first, torch.ones(1)))
    torch.save(moment, path)
    return folder, saved


def lose_a_file(*arguments: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    folder, saved = CONVERT(*arguments, **options)
    next(Path(folder).rglob("exp_avg.pt")).unlink()
    return folder, saved


CONVERT = zero_files.convert
FAULTS = {
    "altered": mock.patch.object(zero_files, "convert", alter_a_moment),
    "lost": mock.patch.object(zero_files, "convert", lose_a_file),
    "full disk": mock.patch.object(zero_files.ds_to_universal, "main", side_effect=OSError(28, "No space left")),
}


def failure(engine: Engine, folder: Path, ranks_before: int, fault: str) -> str:
    try:
        with FAULTS[fault]:
            engine.world.together(lambda: engine.load(folder, written_by=ranks_before))
    except CheckpointError as error:
        return f"{fault}: {error}"
    return f"{fault}: went on"


def main(root: str, hop: str, ranks_before: str, num_hops: str, *cases: str) -> None:
    torch.set_num_threads(1)
    world, number = connect(world_from_environment(), timeout_s=300), int(hop)
    seen = {}
    for case in cases:
        seen[case] = row = {}
        engine = start(case, world)
        if number:
            engine.load(Path(root, case, f"step-{number}"), written_by=int(ranks_before))
            row["loaded"] = prints(engine)
            row["left"] = [path.name for path in Path(root, case).iterdir() if path.name.startswith(".")]
        row["losses"] = train(engine, case, number, number + 1, world)
        row["saved"] = prints(engine)
        engine.capture(copy=False)(Path(root, case, f"step-{number + 1}"))
        if not number:
            row["whole"] = row["losses"] + train(engine, case, 1, int(num_hops), world)
    if number == int(num_hops) - 1:
        folder = Path(root, cases[0], f"step-{number}")
        seen["failed"] = [failure(start(cases[0], world), folder, int(ranks_before), fault) for fault in FAULTS]
        seen["left"] = [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    Path(root, f"hop-{hop}", f"rank-{world.rank}.json").write_text(json.dumps(seen))
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
