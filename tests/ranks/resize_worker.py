"""One rank of tests/test_resize.py: for every case load what the hop before left, train two steps, save for the next.

The first hop also goes on to the end without a break, for comparison.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import detector_worker
import engine_worker
import torch
from deepspeed.utils import safe_get_full_optimizer_state

from trainer.engine import Engine, connect, disconnect, fill_ds_config, owned_by_recipe, read_ds_config
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import MaskedAutoencoder
from trainer.world import World, world_from_environment

GLOBAL_BATCH, MICRO_BATCH, STEPS, LR = 12, 2, 2, 2e-3
CONFIGS = Path(__file__).resolve().parent.parent.parent / "ds_configs"


def start(case: str, world: World) -> Engine:
    """A case is KIND-CONFIG-STAGE."""
    kind, name, stage = case.split("-")
    owned = owned_by_recipe(
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        num_ranks=world.size,
        learning_rate=LR,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip_grad_norm=1.0,
    )
    config = fill_ds_config(read_ds_config(CONFIGS / f"{name}.json"), owned)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = int(stage)
    if kind == "lora":
        if stage == "3":
            zero["stage3_param_persistence_threshold"] = 0  # all weights are divided, and not only large ones
        options = {"weight_decay": 0.05, "layer_decay": 0.75, "save_frozen": False}
        return Engine(detector_worker.build(), ds_config=config, world=world, **options)
    if stage == "3":
        zero["sub_group_size"] = 5000  # several flat parts a parameter group
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    model = MaskedAutoencoder(encoder, decoder_width=32, decoder_depth=2, decoder_heads=4)
    return Engine(model, ds_config=config, weight_decay=0.05, world=world)


def train(engine: Engine, case: str, first: int, end: int, world: World) -> list[float]:
    inputs = (detector_worker if case.startswith("lora") else engine_worker).inputs
    losses = []
    for step in range(first, end):
        mine = list(range(step * GLOBAL_BATCH + world.rank, (step + 1) * GLOBAL_BATCH, world.size))
        parts = [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)]
        loss = engine.step((inputs(part) for part in parts), learning_rate=LR, seed=step)
        losses.append(float(engine.mean_over_ranks(loss)))
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


def main(root: str, hop: str, ranks_before: str, num_hops: str, *cases: str) -> None:
    torch.set_num_threads(1)
    world, number = connect(world_from_environment(), timeout_s=300), int(hop)
    seen = {}
    for case in cases:
        seen[case] = row = {}
        engine = start(case, world)
        if number:
            before = time.perf_counter()
            engine.load(Path(root, case, f"step-{number}"), written_by=int(ranks_before))
            row |= {"load_s": time.perf_counter() - before, "loaded": prints(engine)}
            row["left"] = [path.name for path in Path(root, case).iterdir() if path.name.startswith(".")]
        row["losses"] = train(engine, case, number * STEPS, (number + 1) * STEPS, world)
        row["saved"] = prints(engine)
        engine.save(Path(root, case, f"step-{number + 1}"))
        if not number:
            row["whole"] = row["losses"] + train(engine, case, STEPS, int(num_hops) * STEPS, world)
    Path(root, f"hop-{hop}-rank-{world.rank}.json").write_text(json.dumps(seen))
    world.wait_for_all()
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
