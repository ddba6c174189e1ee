"""From a detector's recipe to its model and its view of images: shared by fine-tuning and evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config.record import from_dict
from trainer.config.settings import DetectorRecipe
from trainer.data.sources import pixels_of
from trainer.data.transforms.passport import PassportChain
from trainer.data.transforms.randaugment import BasicAugment, RandAugment
from trainer.data.transforms.views import AS_STORED, CenterView, DetectorView, Pixels
from trainer.detection.saved_detector import SavedDetector
from trainer.errors import CheckpointError
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.lora import add_lora, backbone_sha256
from trainer.models.mixstyle import MixStyle
from trainer.models.pixel_statistics import STATISTICS
from trainer.weights.load import Init, check_heads, check_init, find_again, read_init


def build_detector(
    recipe: DetectorRecipe, init: Init | None, *, grad_checkpointing: bool = False
) -> tuple[MorphDetector, str]:
    """Build a detector, its own weights drawn from the recipe's seed; returns it with the sha256 of its encoder.

    Raises:
        ConfigError: the weights of ``init`` or the LoRA targets do not fit the model.
    """
    check_init(init, recipe)
    model = assemble_detector(recipe, init, grad_checkpointing=grad_checkpointing)
    check_heads(init, model.encoder)
    return model, backbone_sha256(model.encoder.vit)


def assemble_detector(recipe: DetectorRecipe, init: Init | None, *, grad_checkpointing: bool = False) -> MorphDetector:
    """Build the same without reading its weights, so that they may be on torch's meta device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = PatchEncoder(
            recipe.model,
            image_size=recipe.image_size,
            patch_size=recipe.patch_size,
            depth=recipe.encoder_depth,
            fc_norm=recipe.pooling == "avg_fc_norm",
            drop_path=recipe.drop_path,
            grad_checkpointing=grad_checkpointing,
        )
        if init is not None:
            encoder.load_weights(init.weights)
        if recipe.use_lora:
            add_lora(
                encoder.vit,
                r=recipe.lora_r,
                alpha=recipe.lora_alpha,
                dropout=recipe.lora_dropout,
                targets=recipe.lora_target_modules,
                use_rslora=recipe.use_rslora,
                use_dora=recipe.use_dora,
                freeze=recipe.backbone_is_frozen,
            )
        elif recipe.backbone_is_frozen:
            encoder.requires_grad_(False)
        head = HeadOptions.of(recipe)
        styles = [
            MixStyle(
                num_prefix=encoder.num_prefix,
                group=recipe.mix_group,
                p=recipe.mixstyle_p,
                alpha=recipe.mixstyle_alpha,
                same_label=recipe.mixstyle_same_label,
            )
            for _ in range(recipe.mixstyle_blocks if recipe.use_mixstyle else 0)
        ]
        return MorphDetector(
            encoder, normalisation=recipe.normalisation, head=head, mixstyle=styles, residual=recipe.use_residual_branch
        )


def training_view(recipe: DetectorRecipe) -> DetectorView:
    """Choose the augmentation.

    Raises:
        ConfigError: ``passport_aug`` names an unknown kind, or RandAugment's settings are out of range.
    """
    after: list[Any] = [BasicAugment()] if recipe.use_basic_aug else []
    if recipe.use_advanced_aug:
        how = {"num_ops": recipe.advanced_aug_num_ops, "magnitude": recipe.advanced_aug_magnitude}
        after.append(RandAugment(**how))
    return DetectorView(
        size=recipe.image_size,
        crop_scale=(recipe.crop_scale_min, recipe.crop_scale_max),
        flip_probability=recipe.flip_probability,
        seed=recipe.seed,
        before=[PassportChain(recipe.passport_aug, recipe.passport_p)] if recipe.passport_aug else [],
        after=after,
        self_morph_share=recipe.self_morph_share,
        pixels=pixels_of(recipe),
    )


def preprocessing_of(recipe: DetectorRecipe) -> dict[str, Any]:
    """Describe what happens to a test image before the model sees it; a detector is only ever used with the same."""
    return preprocessing(recipe.image_size, *STATISTICS[recipe.normalisation], pixels=pixels_of(recipe))


def preprocessing(
    image_size: int, mean: Sequence[float], std: Sequence[float], *, pixels: Pixels = AS_STORED
) -> dict[str, Any]:
    """Describe the view of a test image and its normalisation."""
    colours = {"colours": "converted to sRGB by the image's ICC profile"} if pixels.srgb else {}
    return colours | {
        "image_size": image_size,
        "view": CenterView.descriptions[pixels.resize],
        "mean": list(mean),
        "std": list(std),
        "colour_order": "RGB",
    }


def recipe_of(saved: SavedDetector) -> DetectorRecipe:
    """Read a detector's recipe from its description."""
    return from_dict(DetectorRecipe, saved.description["recipe"])


def rebuild(saved: SavedDetector, recipe: DetectorRecipe, *, name: str, init: str | None) -> MorphDetector:
    """Build a saved detector with its weights and its encoder.

    Args:
        saved: what its folder holds.
        recipe: its own.
        name: for messages.
        init: where the frozen encoder's weights are now, if not where training found them.

    Raises:
        CheckpointError: its weights do not fit, or its encoder's weights are different.
        ConfigError: its encoder's weights are missing.
    """
    origin, frozen = saved.description["init"], recipe.backbone_is_frozen
    place = init or (find_again(origin, saved.path, name=name) if frozen else "")
    weights = read_init(place, pretrained=origin["pretrained"]) if frozen else None
    asked = dataclasses.replace(recipe, use_learned_mask_token=None, use_separate_pos_embed=None)
    model, sha256 = build_detector(asked, weights)  # training has compared these two settings with its init
    if frozen and sha256 != origin["sha256"]:
        raise CheckpointError(
            f"{name} stands on an encoder of sha256 {origin['sha256'][:12]}..., but that of "
            f"{place} is {sha256[:12]}...: name its weights with --init"
        )
    load_trained(model, saved.weights)
    return model.eval()


def load_trained(model: MorphDetector, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights that training changed into a model that was built from the same recipe.

    Raises:
        CheckpointError: they do not fit.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = parameters.keys()
    wrong = sorted(wanted ^ weights.keys()) or [n for n in sorted(wanted) if parameters[n].shape != weights[n].shape]
    if wrong:
        raise CheckpointError(f"the detector's weights do not fit its recipe, for example {wrong[0]}: train it again")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
