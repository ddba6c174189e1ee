"""--init, and --source of an export: where an encoder's weights come from, and whether they fit the recipe."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import checkpoint
from trainer.config import DetectorRecipe, PretrainRecipe
from trainer.errors import CheckpointError, ConfigError
from trainer.models.detector import STATISTICS
from trainer.models.encoder import PatchEncoder, pretrained_weights
from trainer.models.vitmae import from_vitmae, is_vitmae
from trainer.saved_detector import load_detector
from trainer.zero_files import read_weights

_ENCODER_PREFIXES = ("encoder.vit.", "encoder.", "module.encoder.vit.", "module.")
_OF_THE_ENCODER = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "patch_embed.",
    "blocks.",
    "norm.",
    "norm_pre.",
    "fc_norm.",
    "attn_pool.",
)
_EXPORT = "model.safetensors"
_OF_A_DECODER = ("decoder_", "mask_token", "position_embed.")


@dataclass(frozen=True, slots=True)
class Init:
    """Weights by timm's names, and what is known of their past."""

    weights: dict[str, Tensor]
    description: str
    recipe: dict[str, Any]
    """The pre-training recipe, as far as it can be told: always the two decoder options, where there was a decoder."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """The rest of a masked autoencoder, by our names or the published ones; empty where only an encoder is left."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """That of a run's checkpoint."""


def read_init(init: str, *, pretrained: bool, setting: str = "init") -> Init | None:
    """Read the weights that ``init``, the value of that setting, names; None for an empty name.

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
    path, said = Path(init), f"{setting} is {init!r}"
    if path.is_dir():
        if holds_detector(path):
            return _from_detector(path, said)
        return _from_file(path / _EXPORT, said) if (path / _EXPORT).is_file() else _from_run(path, said)
    if not path.is_file():
        raise ConfigError(
            f"{said}, but there is no such file or folder: name a run of pretrain.py, a .safetensors or .pth file, or "
            "add --pretrained true if it is the name of a timm model"
        )
    return _from_file(path, said)


def holds_detector(path: Path) -> bool:
    """Whether a folder is a detector's, or that of a run of finetune.py."""
    return any((path / name / "detector.json").is_file() for name in ("", "detector"))


def check_heads(init: Init | None, encoder: PatchEncoder) -> None:
    """Refuse weights of another number of attention heads, whose shapes do not show it.

    Raises:
        ConfigError: naming both numbers.
    """
    theirs, ours = init.recipe.get("encoder_heads") if init else None, encoder.vit.blocks[0].attn.num_heads
    if theirs not in (None, ours):
        raise ConfigError(f"the weights have {theirs} attention heads and the model {ours}: pass their own --model")


def check_init(init: Init | None, recipe: DetectorRecipe | PretrainRecipe) -> None:
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
    # Positions fit another image_size.
    names = ("model", "patch_size", "encoder_depth", "normalisation", "decoder_heads")
    for name in (name for name in names if name in init.recipe and hasattr(recipe, name)):
        theirs, ours = init.recipe[name], getattr(recipe, name)
        if theirs != ours:
            raise ConfigError(f"{name} is {ours!r}, but --init was trained with {theirs!r}: pass --{name} {theirs}")


def _from_run(path: Path, said: str) -> Init:
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (root / "manifest.json").exists():
        folder, manifest = root, checkpoint.verify(root)
    else:
        found = checkpoint.find(root)
        if found is None:
            raise ConfigError(
                f"{said}, but that folder holds no checkpoint and no {_EXPORT}: name a run of pretrain.py"
            )
        folder, manifest = found
    recipe = dict(manifest["identity"]["recipe"]) | {"normalisation": "imagenet"}
    if "mask_ratio" not in recipe:
        raise ConfigError(f"{said}, which is no run of pretrain.py: name one")
    weights = read_weights(folder)
    decoder = {name: value for name, value in weights.items() if name.startswith(_OF_A_DECODER)}
    return Init(_encoder_part(weights, said), str(folder), recipe, decoder, manifest)


def _from_detector(path: Path, said: str) -> Init:
    """Take the encoder that a full fine-tuning has trained; with a frozen one there is only half of it here."""
    saved = load_detector(path)
    recipe = saved.description["recipe"]
    if "encoder.vit.patch_embed.proj.weight" not in saved.weights or recipe["use_lora"]:
        raise ConfigError(
            f"{said}, a detector that holds only adapters or a head: export it first, python tools/export.py --source "
            f"{path} --format timm --output FOLDER, and name that folder"
        )
    known = {name: recipe[name] for name in ("model", "patch_size", "encoder_depth", "normalisation", "image_size")}
    return Init(_encoder_part(saved.weights, said), str(saved.path), known)


def _from_file(path: Path, said: str) -> Init:
    """Read a file of timm's, of the published MAE's or of transformers' ViTMAE's names."""
    weights, known = _safetensors(path, said) if path.suffix == ".safetensors" else _unpickled(path, said)
    if is_vitmae(weights):
        weights = from_vitmae(weights)
    decoder = {name: value for name, value in weights.items() if name.startswith(_OF_A_DECODER)}
    if decoder:
        known["use_learned_mask_token"] = bool("mask_token" in weights and weights["mask_token"].any())
        known["use_separate_pos_embed"] = "decoder_pos_embed" in weights
    return Init(_encoder_part(weights, said), str(path), known, decoder)


def _safetensors(path: Path, said: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file, and what a config.json of transformers beside it tells that shapes do not."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            rows, _, columns = (file.metadata() or {}).get("grid", "").partition("x")
        beside = path.with_name("config.json")
        config = json.loads(beside.read_text()) if is_vitmae(weights) and beside.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{said}, which is damaged ({error}): download or export it again") from error
    if rows != columns:
        raise ConfigError(
            f"{said}, which was exported for {rows} x {columns} patches, but training is on squares: name what it was "
            "exported from"
        )
    names = {"encoder_heads": "num_attention_heads", "decoder_heads": "decoder_num_attention_heads"}
    names |= {name: name for name in ("mask_ratio", "norm_pix_loss")}
    return weights, {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _unpickled(path: Path, said: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .pth file without running code from it; official MAE files may hold the arguments of their training."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{said}, which cannot be loaded safely ({error}): convert it to .safetensors") from error
    told = vars(state["args"]) if isinstance(state, dict) and isinstance(state.get("args"), argparse.Namespace) else {}
    for name in ("model", "state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise ConfigError(f"{said}, which holds no weights by name: name a state dict")
    known = {name: told[name] for name in ("mask_ratio", "norm_pix_loss") if name in told}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, known


def _encoder_part(weights: dict[str, Tensor], said: str) -> dict[str, Tensor]:
    for prefix in (*_ENCODER_PREFIXES, ""):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        part = {name: value for name, value in part.items() if name.startswith(_OF_THE_ENCODER)}
        if "patch_embed.proj.weight" in part:
            if "norm.weight" not in part:  # MAE's fine-tuning has it behind the pooling
                part |= {name[3:]: value for name, value in part.items() if name.startswith("fc_norm.")}
            return part
    raise ConfigError(f"{said}, which holds no encoder (no patch_embed.proj.weight): name weights of a timm ViT or MAE")


def describe(init: Init | None) -> str:
    """Name the origin of the weights, for people."""
    return init.description if init else "random weights"
