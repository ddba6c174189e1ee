"""Read the weights that --init (or --source of an export) names, and check that they fit the recipe."""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config.settings import DetectorRecipe, PretrainRecipe
from trainer.distributed.zero_state import read_weights
from trainer.errors import CheckpointError, ConfigError
from trainer.fault_tolerance import checkpoint
from trainer.models.encoder import PatchEncoder, hub_name_of, natural_shape, pretrained_weights
from trainer.models.pixel_statistics import STATISTICS
from trainer.weights.detector_folder import read_detector
from trainer.weights.hf_vitmae import from_vitmae, is_vitmae
from trainer.weights.hub import fetch_folder, is_hub_name, within_seconds

logger = logging.getLogger(__name__)

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
_EXPORT, _OLD_HUB_FILE = "model.safetensors", "pytorch_model.bin"
_PUBLISHED = {768: "vit_base_patch16_224", 1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224"}
"""Width -> timm's name of the published MAE's encoders."""
_PUBLISHED_SIZE = {"base": 768, "large": 1024, "huge": 1280}
_PUBLISHED_FILE = re.compile(r"mae_(visualize|pretrain)_vit_(base|large|huge)(_full|_ganloss)?\.pth")
"""Files of facebookresearch/mae. Those to visualize were trained on plain pixels, the others on normalised ones."""
_OF_OTHERS = ("reg_token", "norm_pre.", "blocks.0.ls1.", "blocks.0.attn.q_norm.", "attn_pool.")
"""Parameters that no encoder of the published MAE has."""
_OF_A_DECODER = ("decoder_", "mask_token", "position_embed.")


@dataclass(frozen=True, slots=True)
class Init:
    """Weights by timm's names, and what is known of their training."""

    weights: dict[str, Tensor]
    description: str
    recipe: dict[str, Any]
    """The pre-training recipe, as far as it is known; with a decoder, always the two decoder options."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """The rest of a masked autoencoder, by this trainer's names or the published ones; empty for an encoder alone."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """The manifest, for the checkpoint of a run."""

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings that fit these weights: what is recorded, else what their shapes show."""
        shown: dict[str, Any] = {}
        width, _, _, patch = self.weights["patch_embed.proj.weight"].shape
        if not any(name.startswith(_OF_OTHERS) for name in self.weights) and width in _PUBLISHED:
            shown["model"] = _PUBLISHED[width]
        shown |= {"patch_size": patch, "encoder_depth": num_blocks(self.weights, "blocks.")}
        if "pos_embed" in self.weights:  # a few more rows are for class and register tokens
            shown["image_size"] = math.isqrt(self.weights["pos_embed"].shape[1]) * patch
        if "fc_norm.weight" in self.weights and "norm.weight" not in self.weights:
            shown["pooling"] = "avg_fc_norm"
        recorded = {name: value for name, value in self.recipe.items() if value is not None}
        if "model" in recorded:
            recorded["model"] = recorded["model"].partition(".")[0]  # a tag names weights, not the model
        return shown | recorded


def read_init(init: str, *, pretrained: bool, setting: str = "init") -> Init | None:
    """Read the weights that ``init`` names; None for an empty name.

    Raises:
        ConfigError: there is no such file, or it holds no encoder, or the hub cannot be reached.
        CheckpointError: a checkpoint is damaged, or holds code.
    """
    if not init:
        return None
    path, given = Path(init).expanduser(), f"{setting} is {init!r}"
    if pretrained:
        return _from_timm(init, given)
    if not path.exists() and is_hub_name(init):
        path = fetch_folder(init, given)
        return dataclasses.replace(_from_folder(path, given), description=init)
    if path.is_dir():
        return _from_folder(path, given)
    if not path.is_file():
        raise ConfigError(
            f"{given}, but there is no such file or folder: name a run of pretrain.py, a .safetensors or .pth file, or "
            "add --pretrained true if it is the name of a timm model"
        )
    return _from_file(path, given)


def place_of(init: str, folder: Path) -> dict[str, str]:
    """Return where weights are, so that they are found from any working directory, and after a move of the whole tree.

    Returns:
        places: ``path`` is absolute, ``relative`` is from ``folder``; for a name on a hub only ``path``.
    """
    path = Path(init).expanduser()
    if not init or not path.exists():
        return {"path": init}
    return {"path": os.path.abspath(path), "relative": os.path.relpath(path, folder)}  # noqa: PTH100


def find_again(origin: Mapping[str, Any], folder: Path, *, name: str) -> str:
    """Find the encoder's weights that a detector in ``folder`` needs.

    Args:
        origin: the result of `place_of`; older detectors recorded the path as it was typed.
        folder: of the detector.
        name: of the detector, for the message.

    Raises:
        ConfigError: they are not found.
    """
    typed = str(origin["path"])
    if origin["pretrained"] or not typed:
        return typed
    places = [folder / origin["relative"]] if origin.get("relative") else []
    places += [Path(typed), *(parent / typed for parent in folder.absolute().parents)]
    for place in places:
        with contextlib.suppress(OSError):
            if place.exists():
                return str(place)
    if is_hub_name(typed):
        return typed
    raise ConfigError(
        f"{name} needs the encoder weights {typed}, but there is no such file or folder: pass --init with where "
        f"they are now (sha256 {str(origin.get('sha256', ''))[:12]}...)"
    )


def holds_detector(path: Path) -> bool:
    """Whether a folder is a detector's, or that of a run of finetune.py."""
    return any((path / name / "detector.json").is_file() for name in ("", "detector"))


def fitting_recipe(init: Init | None, recipe: DetectorRecipe, given: Collection[str]) -> DetectorRecipe:
    """Take model, sizes, normalisation and pooling from the weights, except where the user has set them.

    With native views the image's size stays the recipe's: it is the side of a crop of the photographs, and one that is
    larger than they are would have all of them enlarged. Positions of the weights are interpolated to it.

    Raises:
        ConfigError: timm has no such model.
    """
    if init is None:
        return recipe
    of_weights, taken = init.settings, dict[str, Any]()
    size = () if recipe.view_resize == "native" else ("image_size",)
    for name in ("model", *size, "normalisation", "pooling"):
        value = of_weights.get(name)
        if name not in given and value not in (None, getattr(recipe, name)) and isinstance(value, str | int):
            taken[name] = value
    if taken.get("model") == recipe.model.partition(".")[0]:
        del taken["model"]
    default_shape = natural_shape(taken.get("model", recipe.model))
    for name, default in zip(("patch_size", "encoder_depth"), default_shape, strict=True):
        if name not in given and of_weights[name] != (getattr(recipe, name) or default):
            taken[name] = of_weights[name]
    return dataclasses.replace(recipe, **taken)


def check_heads(init: Init | None, encoder: PatchEncoder) -> None:
    """Refuse weights of another number of attention heads: the shapes are the same, so nothing else would notice.

    Raises:
        ConfigError: the numbers differ; the message has both.
    """
    found, expected = init.recipe.get("encoder_heads") if init else None, encoder.vit.blocks[0].attn.num_heads
    if found not in (None, expected):
        raise ConfigError(f"the weights have {found} attention heads and the model {expected}: pass their own --model")


def check_init(init: Init | None, recipe: DetectorRecipe | PretrainRecipe, *, with_decoder: bool = True) -> None:
    """Refuse weights that were trained with other settings than the recipe's.

    Raises:
        ConfigError: settings differ; the message lists each with both values.
    """
    decoder_options = ("use_learned_mask_token", "use_separate_pos_embed")
    required = {name: getattr(recipe, name) for name in decoder_options if with_decoder}
    wrong = []
    for name, value in required.items():
        trained = init.recipe.get(name) if init else None
        if value is not None and trained != value:
            found = "without --init there is no pre-training" if init is None else f"init was trained with {trained}"
            wrong.append(f"{name} is {value}, but {found}: change --init, or leave {name} out")
    if init is not None:
        wrong += _differing_settings(init, recipe, with_decoder=with_decoder)
    if wrong:
        raise ConfigError("\n  ".join(wrong) if len(wrong) == 1 else "\n  ".join(["--init does not fit:", *wrong]))
    if init is not None and isinstance(recipe, PretrainRecipe) and with_decoder:
        unknown = [name for name in ("decoder_heads", "norm_pix_loss") if name not in init.recipe]
        if unknown:
            used = " and ".join(f"{name} {getattr(recipe, name)}" for name in unknown)
            logger.warning(
                "--init does not record %s of its decoder; the recipe's values are used, %s: if the decoder was "
                "trained with others, it computes something else", " and ".join(unknown), used
            )  # fmt: skip


def _differing_settings(init: Init, recipe: DetectorRecipe | PretrainRecipe, *, with_decoder: bool) -> list[str]:
    of_weights, wrong = init.settings, []
    with torch.device("meta"):
        encoder = PatchEncoder(
            recipe.model, image_size=recipe.image_size, patch_size=recipe.patch_size, depth=recipe.encoder_depth
        )
    expected: dict[str, Any] = {"patch_size": encoder.patch, "encoder_depth": len(encoder.vit.blocks)}
    if "model" in init.recipe:  # otherwise a guess
        expected["model"] = recipe.model.partition(".")[0]
    if isinstance(recipe, DetectorRecipe):
        expected["normalisation"] = recipe.normalisation
    else:
        expected["normalisation"] = "imagenet"  # pre-training has no other
        if with_decoder:
            expected |= {"decoder_heads": recipe.decoder_heads, "norm_pix_loss": recipe.norm_pix_loss}
    for name, value in expected.items():
        found = of_weights.get(name, value)
        if found == value:
            continue
        remedy = f"pass --{name} {str(found).lower() if isinstance(found, bool) else found}"
        if name == "normalisation" and (isinstance(recipe, PretrainRecipe) or not isinstance(found, str)):
            remedy = f"choose weights that expect pixels normalised by {' or '.join(STATISTICS)}"
            remedy = "choose weights trained on ImageNet's" if isinstance(recipe, PretrainRecipe) else remedy
        wrong.append(f"{name} is {value!r}, but --init was trained with {found!r}: {remedy}")
    return wrong


def num_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Count the blocks of an encoder or a decoder."""
    return len({name.split(".")[1] for name in weights if name.startswith(prefix)})


def _from_timm(name: str, given: str) -> Init:
    """Read timm's own weights of a model."""
    hub_name = hub_name_of(name)
    remedy = (
        f"download model.safetensors of {hub_name} where there is a network, and name that file instead, without "
        "--pretrained, with the --model and --normalisation of the weights"
    )
    with within_seconds(hub_name, f"{given} with pretrained true", remedy):
        weights, mean, std = pretrained_weights(name)
    return Init(weights, f"timm {name}", {"model": name, "normalisation": _normalisation(mean, std)})


def _normalisation(mean: Any, std: Any) -> Any:
    """Return the recipe's name of a mean and deviation, or the two values if it has no name for them."""
    for name, statistics in STATISTICS.items():
        if torch.allclose(torch.tensor(statistics), torch.tensor([tuple(mean), tuple(std)])):
            return name
    return tuple(mean), tuple(std)


def _from_folder(path: Path, given: str) -> Init:
    if holds_detector(path):
        return _from_detector(path, given)
    for name in (_EXPORT, _OLD_HUB_FILE):
        if (path / name).is_file():
            return _from_file(path / name, given)
    return _from_run(path, given)


def _from_run(path: Path, given: str) -> Init:
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (root / "manifest.json").exists():
        folder, manifest = root, checkpoint.verify(root)
    else:
        found = checkpoint.find(root)
        if found is None:
            raise ConfigError(
                f"{given}, but that folder holds no checkpoint and no {_EXPORT}: name a run of pretrain.py"
            )
        folder, manifest = found
    recipe = dict(manifest["identity"]["recipe"]) | {"normalisation": "imagenet"}
    if "mask_ratio" not in recipe:
        raise ConfigError(f"{given}, which is no run of pretrain.py: name one")
    weights = read_weights(folder)
    decoder = {name: value for name, value in weights.items() if name.startswith(_OF_A_DECODER)}
    return Init(_encoder_part(weights, given), str(folder), recipe, decoder, manifest)


def _from_detector(path: Path, given: str) -> Init:
    """Read the encoder of a full fine-tuning; with a frozen encoder, the folder holds only adapters or a head."""
    folder, description, weights = read_detector(path)
    recipe = description["recipe"]
    if "encoder.vit.patch_embed.proj.weight" not in weights or recipe["use_lora"]:
        raise ConfigError(
            f"{given}, a detector that holds only adapters or a head: export it first, python tools/export.py --source "
            f"{path} --format timm --output FOLDER, and name that folder"
        )
    names = ("model", "patch_size", "encoder_depth", "normalisation", "image_size", "pooling")
    known = {name: recipe[name] for name in names if name in recipe}
    return Init(_encoder_part(weights, given), str(folder), known)


def _from_file(path: Path, given: str) -> Init:
    """Read a file with the names of timm, of the published MAE, or of transformers' ViTMAE."""
    weights, known = _safetensors(path, given) if path.suffix == ".safetensors" else _unpickled(path, given)
    if is_vitmae(weights):
        weights = from_vitmae(weights)
    decoder = {name: value for name, value in weights.items() if name.startswith(_OF_A_DECODER)}
    if decoder:
        known["use_learned_mask_token"] = bool("mask_token" in weights and weights["mask_token"].any())
        known["use_separate_pos_embed"] = "decoder_pos_embed" in weights
    known = _known_from_name(path, decoder) | known | _known_from_config(path, given)
    return Init(_encoder_part(weights, given), str(path), known, decoder)


def _known_from_name(path: Path, decoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the name of an official file shows; the file itself records nothing."""
    named = _PUBLISHED_FILE.fullmatch(path.name)
    if named is None:
        return {}
    known: dict[str, Any] = {"model": _PUBLISHED[_PUBLISHED_SIZE[named[2]]], "normalisation": "imagenet"}
    return known | ({"decoder_heads": 16, "norm_pix_loss": named[1] == "pretrain"} if decoder else {})


def _known_from_config(path: Path, given: str) -> dict[str, Any]:
    """Read config.json (transformers' or timm's) and preprocessor_config.json beside a file of the hub."""
    if path.name not in (_EXPORT, _OLD_HUB_FILE):
        return {}
    found: dict[str, Any] = {}
    try:
        files = [path.with_name(name) for name in ("config.json", "preprocessor_config.json")]
        config, view = (json.loads(file.read_text()) if file.is_file() else {} for file in files)
        names = {"encoder_heads": "num_attention_heads", "decoder_heads": "decoder_num_attention_heads"}
        names |= {name: name for name in ("mask_ratio", "norm_pix_loss")} | {"model": "architecture"}
        found = {name: config[key] for name, key in names.items() if key in config}
        timm_config = config.get("pretrained_cfg", {})
        for mean, std in (
            (timm_config.get("mean"), timm_config.get("std")),
            (view.get("image_mean"), view.get("image_std")),
        ):
            if mean and std and view.get("do_normalize", True):
                found["normalisation"] = _normalisation(mean, std)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{given}: a config.json beside it is damaged ({error}): download it again") from error
    return found


def _safetensors(path: Path, given: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .safetensors file; its metadata may name the grid of patches."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            rows, _, columns = (file.metadata() or {}).get("grid", "").partition("x")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{given}, which is damaged ({error}): download or export it again") from error
    if rows != columns:
        raise ConfigError(
            f"{given}, which was exported for {rows} x {columns} patches, but training uses square images: name the "
            "source of that export"
        )
    return weights, {}


def _unpickled(path: Path, given: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .pth file without running code from it; official MAE files can hold the arguments of their training."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{given}, which cannot be loaded safely ({error}): convert it to .safetensors"
        ) from error
    args = state.get("args") if isinstance(state, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    for name in ("model", "state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict):
        raise ConfigError(f"{given}, which holds no weights by name: name a state dict")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, _known_from_args(args)


def _known_from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the arguments of the published MAE's training, and of forks with more of them."""
    names = ("mask_ratio", "norm_pix_loss", "decoder_heads")
    known = {name: args[name] for name in names if name in args}
    if "decoder_num_heads" in args:
        known["decoder_heads"] = args["decoder_num_heads"]
    published = re.fullmatch(r"mae_vit_(base|large|huge)_patch\d+(_dec512d8b)?", str(args.get("model")))
    if published:
        known = {"model": _PUBLISHED[_PUBLISHED_SIZE[published[1]]], "decoder_heads": 16} | known
    return known


def _encoder_part(weights: dict[str, Tensor], given: str) -> dict[str, Tensor]:
    for prefix in (*_ENCODER_PREFIXES, ""):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        part = {name: value for name, value in part.items() if name.startswith(_OF_THE_ENCODER)}
        if "patch_embed.proj.weight" in part:
            return part
    raise ConfigError(
        f"{given}, which holds no encoder (no patch_embed.proj.weight): name weights of a timm ViT or MAE"
    )


def describe(init: Init | None) -> str:
    """Name the origin of the weights, for people."""
    return init.description if init else "random weights"
