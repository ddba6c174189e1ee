"""What this trainer changes in DeepSpeed 0.19.8's engine, and why. Read it again with each DeepSpeed.

The wrapped model is DeepSpeed's from then on; `trainer.distributed.engine` calls it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

_FLAT_NORM_DEVICES = ("cuda",)
"""Where the order of a sum over millions of numbers does not show; a CPU's norm of such a vector errs by up to 5e-4."""


@runtime_checkable
class HasBlocks(Protocol):
    """A model that names blocks for ZeRO 3."""

    def whole_blocks(self) -> Sequence[nn.Module]:
        """Blocks that run as one module, with weights and an input that need gradients."""


def gather_whole_blocks(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Have ZeRO 3 gather a block's weights at once, with one hook instead of one for each of its layers.

    The host, which ViT-L's step waits for, then needs 0.55 times as long (216 instead of 391 ms with 24 and 8 narrow
    blocks on a CPU). To be called before DeepSpeed wraps the model. A block's hook comes after its input's gradient and
    sends the gradients of its weights, so the input must need a gradient: with LoRA it would come before them.
    """
    if ds_config.get("zero_optimization", {}).get("stage") == 3 and isinstance(model, HasBlocks):
        for block in model.whole_blocks():
            set_z3_leaf_module(block, True)


def change_engine(engine: Any, rank: int) -> None:
    """Change DeepSpeed's new engine on this rank, before its first step."""
    # DeepSpeed copies a script beside the state, on rank 0 while others already sync; a checkpoint holds no code.
    engine._copy_recovery_script = lambda save_path: None
    # Steps are skipped at stage 0 by dropping the gradients, and DeepSpeed's clipping fails where there are none.
    clip, module = engine.clip_fp32_gradients, engine.module
    engine.clip_fp32_gradients = lambda: clip() if gradients(module) else None
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if hasattr(optimizer, "check_overflow") and stage in (1, 2) and not engine.fp16_enabled():
        # DeepSpeed scans every gradient for inf and NaN, 13 kernels each and a wait, and then checks the norm of
        # all gradients, which is not finite if one of them is. ViT-L at stage 2: 5,995 kernels a step without this
        # line and 843 with it. In fp16 the scan comes before the norm, so that the loss scale falls.
        optimizer.check_overflow = lambda **options: None
    if stage == 3:
        _clear_padding(module, optimizer, rank)
    if torch.device(engine.device).type in _FLAT_NORM_DEVICES and hasattr(
        optimizer, "fp32_groups_actual_gradients_flat"
    ):
        _take_norms_of_flat_gradients(optimizer)


def gradients(module: nn.Module) -> list[Tensor]:
    """Return the gradients that exist."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def _take_norms_of_flat_gradients(optimizer: Any) -> None:
    """Have DeepSpeed's BF16_Optimizer take one norm of each parameter group, whose gradients lie in one tensor already.

    DeepSpeed 0.19.8 takes a norm of each parameter and scales each by itself, where gradients are clipped. ViT-L trains
    396: a step's 424 kernels are 30 then (counted on a CPU). Gradients that are missing are zeros in the tensor.
    """
    flat = optimizer.fp32_groups_actual_gradients_flat
    optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})


@torch.no_grad()
def _clear_padding(module: nn.Module, optimizer: Any, rank: int) -> None:
    """Fill up the last rank's shares of weights with zeros at stage 3.

    All shares of a parameter have one size, and DeepSpeed leaves what lies beyond the parameter as it finds the memory.
    NaN there would look like weights that are not finite. Example: 10 weights on 3 ranks are shares of 4; the last
    rank has 2 weights and 2 that belong to nobody.
    """
    weights: Iterable[Any] = module.parameters()
    for parameter in weights:
        parameter.ds_tensor.data.view(-1)[_num_own(parameter, rank) :].zero_()
    groups = zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_partitioned_groups_flat", []), strict=True
    )
    for parameters, masters in groups:
        first = 0
        for parameter in parameters:
            end = first + parameter.partition_numel()
            masters.data[first + _num_own(parameter, rank) : end].zero_()  # no effect on masters that lie on a disk
            first = end


def _num_own(parameter: Any, rank: int) -> int:
    size, total = int(parameter.partition_numel()), int(parameter.ds_numel)
    return max(0, min(size, total - rank * size))
