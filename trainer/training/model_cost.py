"""Parameters, FLOPs and activations of a model, counted from the model itself without memory for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from trainer.config.settings import DetectorRecipe, PretrainRecipe, Recipe
from trainer.distributed.cost_model import BYTES, Weights
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import num_kept, num_predicted
from trainer.models.parameter_groups import parameter_groups

BLOCK_TENSORS = 16  # of tokens x width: what a transformer block keeps for its backward pass, or has in flight there
TRACED_IMAGES = 2

BuildModel = Callable[..., nn.Module]
"""Takes ``grad_checkpointing``, a boolean."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What was counted from the model; activations in bytes of one image."""

    weights: Weights
    flops: int
    """Of one training step of one image."""
    recomputed_flops: int
    """In addition with --grad_checkpointing."""
    saved: int
    """Activations saved for the backward pass."""
    saved_checkpointing: int
    """Likewise with --grad_checkpointing."""
    block: int
    """Bound on what the block at work has in flight."""

    def activations(self, images: int, *, checkpointing: bool) -> int:
        """Bytes at the peak: everything saved, and one block at work, which checkpointing first recomputes."""
        if checkpointing and self.recomputed_flops:
            return images * (self.saved_checkpointing + 2 * self.block)
        return images * (self.saved + self.block)


def count_model(recipe: Recipe, build: BuildModel, precision: str) -> ModelCost:
    """Count parameters, FLOPs and activations of the model that a training builds.

    Args:
        recipe: of the training.
        build: builds its model, with or without gradient checkpointing.
        precision: fp32, bf16 or fp16; what weights and activations are kept in.
    """
    plain, lean = (on_meta_device(build, grad_checkpointing=on, precision=precision) for on in (False, True))
    encoder: Any = plain.encoder
    if isinstance(recipe, PretrainRecipe):
        keep = num_kept(encoder.num_patches, recipe.mask_ratio)
        flops, forward = flops_of(plain, recipe), encoder.flops(keep)
        tokens = (keep + encoder.num_prefix) * encoder.width
        tokens = max(tokens, (encoder.num_patches + encoder.num_prefix) * recipe.decoder_width)
    else:
        flops, forward = plain.flops_per_image(), encoder.flops(encoder.num_patches)
        tokens = (encoder.num_patches + encoder.num_prefix) * encoder.width
    how: dict[str, Any] = {}
    if isinstance(recipe, DetectorRecipe):
        how = {name: getattr(recipe, name) for name in ("layer_decay", "decay_embeddings", "head_lr_scale")}
    groups = parameter_groups(plain, recipe.weight_decay, **how)
    weights = Weights(
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        frozen=tuple(p.numel() for p in plain.parameters() if not p.requires_grad),
        largest_block=max((sum(p.numel() for p in block.parameters()) for block in plain.whole_blocks()), default=0),
    )
    trains = any(p.requires_grad for p in encoder.parameters())
    saved = saved_bytes(plain, recipe)
    # An encoder without a backward pass keeps no activations, so checkpointing has nothing to recompute.
    saved_checkpointing = saved_bytes(lean, recipe) if trains else saved
    block = BLOCK_TENSORS * tokens * BYTES[precision]
    return ModelCost(weights, flops, forward * trains, saved, saved_checkpointing, block)


def on_meta_device(build: BuildModel, *, grad_checkpointing: bool, precision: str) -> Any:
    """Build a model on the meta device: shapes and types without memory."""
    with torch.device("meta"):
        model = build(grad_checkpointing=grad_checkpointing)
    return model.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]).train()


def saved_bytes(model: Any, recipe: Recipe) -> int:
    """Count what the forward pass leaves of each image for the backward pass, by running it on torch's fake tensors.

    What it leaves of all together, such as the first decoder block's view of hidden patches, does not count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = TRACED_IMAGES * (recipe.num_mixed if isinstance(recipe, DetectorRecipe) else 1)
        few, more = (kept_bytes(model, example(model, recipe, n)) for n in (images, 2 * images))
        return (more - few) // images


def example(model: Any, recipe: Recipe, images: int) -> tuple[torch.Tensor, ...]:
    """Make inputs of the right shapes."""
    images_BCHW = torch.zeros(images, 3, recipe.image_size, recipe.image_size, dtype=torch.uint8)
    if isinstance(recipe, PretrainRecipe):
        order = torch.arange(model.encoder.num_patches).repeat(images, 1)
        keep = num_kept(model.encoder.num_patches, recipe.mask_ratio)
        end = keep + num_predicted(model.encoder.num_patches - keep, recipe.predict_share)
        return images_BCHW, order[:, :keep], order[:, keep:end]
    return images_BCHW, torch.zeros(images, dtype=torch.int64), torch.zeros(images, model.num_draws)


def kept_bytes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Sum the storages that autograd keeps from a forward pass, each once and without the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


def flops_of(model: MaskedAutoencoder, recipe: PretrainRecipe) -> int:
    """Count the FLOPs of one training step of one image."""
    num_keep = num_kept(model.encoder.num_patches, recipe.mask_ratio)
    return model.flops_per_image(num_keep, num_predicted(model.encoder.num_patches - num_keep, recipe.predict_share))
