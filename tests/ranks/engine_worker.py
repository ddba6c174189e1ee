"""One rank of tests/distributed/test_engine.py: 20 steps of a tiny MAE on fixed images; writes what it saw as JSON."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers.ds_configs import filled_ds_config
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import world_from_environment
from trainer.distributed.zero_state import load_safely
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask
from trainer.seeds import Purpose, random_words, uniforms

GLOBAL_BATCH, STEPS, LR = 8, 20, 2e-3


def images_at(positions: list[int]) -> torch.Tensor:
    """Smooth random pictures, one for each position."""
    words = random_words(5, Purpose.AUGMENT, positions, 3 * 16) & 0xFF
    small = torch.from_numpy(words.astype("uint8")).view(-1, 3, 4, 4).float()
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear")
    return large.to(torch.uint8)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal in values and in types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return vars(one) == vars(other) if hasattr(one, "__dict__") else bool(one == other)


def main(ds_config: str, micro_batch: str, output: str, stage: str, compile_mode: str = "off") -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    config = filled_ds_config(
        ds_config, stage=stage, micro_batch=int(micro_batch), num_ranks=world.size, learning_rate=LR
    )
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    model = MaskedAutoencoder(encoder, DecoderOptions(decoder_width=32, decoder_depth=2, decoder_heads=4))
    engine = Engine(model, ds_config=config, weight_decay=0.05, world=world)
    if compile_mode != "off":
        engine.compile(compile_mode)

    losses, norms = [], []
    for step in range(STEPS):
        mine = list(range(step * GLOBAL_BATCH + world.rank, (step + 1) * GLOBAL_BATCH, world.size))
        parts = [mine[i : i + int(micro_batch)] for i in range(0, len(mine), int(micro_batch))]
        result = engine.step(
            (inputs(part, engine.device) for part in parts), learning_rate=LR * min(1, (step + 1) / 5), seed=step
        )
        losses.append(result.loss)
        norms.append(engine.grad_norm())
    errors = engine.evaluate(*inputs(list(range(4)), engine.device), want="error")
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    engine.capture(copy=False)(Path(output, "saved"))
    Path(output, "copied").mkdir(exist_ok=True)
    engine.capture(copy=True)(Path(output, "copied"))
    world.wait_for_all()
    states = [
        {path.name: load_safely(str(path)) for path in Path(output, folder, "state").glob(f"*rank_{world.rank}*")}
        for folder in ("saved", "copied")
    ]
    seen = {
        "losses": losses,
        "norms": norms,
        "errors": errors.tolist(),
        "parameters": digest.hexdigest(),
    }
    seen["copy_is_equal"] = bool(states[0]) and same(*states)
    Path(output, f"rank-{world.rank}.json").write_text(json.dumps(seen))
    world.wait_for_all()
    disconnect()


def inputs(positions: list[int], device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    noise = torch.from_numpy(uniforms(5, Purpose.MASK, positions, 16)).to(device)
    return images_at(positions).to(device), *draw_mask(noise, mask_ratio=0.75, grid=(4, 4))


if __name__ == "__main__":
    main(*sys.argv[1:])
