"""--init: where an encoder's first weights come from, and whether they fit the recipe."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer import checkpoint
from trainer.config import DetectorRecipe
from trainer.errors import CheckpointError, ConfigError
from trainer.models.detector import STATISTICS
from trainer.models.encoder import pretrained_weights
from trainer.zero_files import read_weights

_ENCODER_PREFIXES = ("encoder.vit.", "encoder.", "module.encoder.vit.", "module.")
_OF_THE_ENCODER = ("pos_embed", "cls_token", "reg_token", "patch_embed.", "blocks.", "norm.", "norm_pre.")


@dataclass(frozen=True, slots=True)
class Init:
    """Weights by timm's names, and what is known of their past."""

    weights: dict[str, Tensor]
    description: str
    recipe: dict[str, Any]
    """The pre-training recipe, as far as it can be told: always the two decoder options, where there was a decoder."""


def read_init(init: str, *, pretrained: bool) -> Init | None:
    """Read the weights that ``init`` names; None for an empty name.

    Raises:
        ConfigError: there is no such file, or it holds no encoder.
        CheckpointError: a checkpoint is damaged, or holds code.
    """
    if not init:
        return None
    if pretrained:
        weights, mean, std = pretrained_weights(init)
        fitting = [
            name
            for name, (m, s) in STATISTICS.items()
            if torch.allclose(torch.tensor([m, s]), torch.tensor([mean, std]))
        ]
        return Init(weights, f"timm {init}", {"model": init, "normalisation": fitting[0] if fitting else (mean, std)})
    path = Path(init)
    if path.is_dir():
        return _from_run(path)
    if not path.is_file():
        raise ConfigError(
            f"init is {init!r}, but there is no such file or folder: name a run of pretrain.py, a .safetensors or .pth "
            "file, or add --pretrained true if it is the name of a timm model"
        )
    weights = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    known = {}
    if any(name.startswith(("decoder_", "mask_token")) for name in weights):
        known["use_learned_mask_token"] = bool("mask_token" in weights and weights["mask_token"].any())
        known["use_separate_pos_embed"] = "decoder_pos_embed" in weights
    return Init(_encoder_part(weights, init), init, known)


def check_init(init: Init | None, recipe: DetectorRecipe) -> None:
    """Refuse weights that were trained otherwise than the recipe says.

    Raises:
        ConfigError: naming the setting and both values.
    """
    required = {name: getattr(recipe, name) for name in ("use_learned_mask_token", "use_separate_pos_embed")}
    for name, value in required.items():
        theirs = init.recipe.get(name) if init else None
        if value is not None and theirs != value:
            found = "without --init there is no pre-training" if init is None else f"init was trained with {theirs}"
            raise ConfigError(f"{name} is {value}, but {found}: change --init, or leave {name} out")
    if init is None:
        return
    for name in ("model", "patch_size", "encoder_depth", "normalisation"):  # positions fit another image_size
        theirs, ours = init.recipe.get(name), getattr(recipe, name)
        if name in init.recipe and theirs != ours:
            raise ConfigError(f"{name} is {ours!r}, but --init was trained with {theirs!r}: pass --{name} {theirs}")


def _from_run(path: Path) -> Init:
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (root / "manifest.json").exists():
        folder, manifest = root, checkpoint.verify(root)
    else:
        found = checkpoint.find(root)
        if found is None:
            raise ConfigError(f"init is {str(path)!r}, but that folder holds no checkpoint: name a run of pretrain.py")
        folder, manifest = found
    recipe = dict(manifest["identity"]["recipe"]) | {"normalisation": "imagenet"}
    if "mask_ratio" not in recipe:
        raise ConfigError(f"init is {str(path)!r}, which is no run of pretrain.py: name one")
    return Init(_encoder_part(read_weights(folder), str(path)), str(folder), recipe)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read a .pth file without running code from it; official MAE files may hold the arguments of their training."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"init {path} cannot be loaded safely ({error}): convert it to .safetensors") from error
    for name in ("model", "state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise ConfigError(f"init {path} holds no weights by name: name a state dict")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _encoder_part(weights: dict[str, Tensor], init: str) -> dict[str, Tensor]:
    for prefix in (*_ENCODER_PREFIXES, ""):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        part = {name: value for name, value in part.items() if name.startswith(_OF_THE_ENCODER)}
        if "patch_embed.proj.weight" in part:
            return part
    raise ConfigError(f"init {init} holds no encoder (no patch_embed.proj.weight): name weights of a timm ViT or MAE")


def describe(init: Init | None) -> str:
    """Name the origin of the weights, for people."""
    return init.description if init else "random weights"
