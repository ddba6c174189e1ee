"""DeepSpeed's files: read without running code, converted to another number of ranks, loaded and compared bit by bit.

Layout of a state: ``DIRECTORY/state/*_model_states.pt`` and, from ZeRO stage 1 on, one ``*_optim_states.pt`` a rank.

ZeRO flattens each parameter group into one float32 vector, pads it to a multiple of twice the number of ranks, and
gives every rank an equal part. A group of a weight of 6 elements (a to f) and a bias of 3 (p to r)::

    4 ranks   [a b c d] [e f p q] [r 0 0 0] [0 0 0 0]      16 elements; rank 3 holds padding only
    2 ranks   [a b c d e f] [p q r 0 0 0]                  12 elements; every boundary has moved

So the files of four ranks fit no other number. DeepSpeed's ``ds_to_universal`` turns them into one folder a parameter,
whole and without padding: weight/fp32.pt, weight/exp_avg.pt, weight/exp_avg_sq.pt. Each rank of the new run then takes
its slice of each (`load_converted`), and sha256 sums over whole parameters prove that nothing changed:
`_fingerprints_in_files` before against `fingerprints_in_engine` after.

DeepSpeed's own loader of those folders is not used. Its defects in DeepSpeed 0.19.8, seen on tiny detectors and read:

- stages 1 and 2: a rank whose part of a parameter group is only padding (a small head on three ranks) fails with
  ``steps[0]`` of an empty list, runtime/base_optimizer.py:370.
- stage 3: every group gets the weight decay of the first, runtime/zero/stage3.py:3686.
- all: ``torch.load(weights_only=False)``, runtime/base_optimizer.py:337, stage3.py:3660 and :3770.
- ``safe_set_full_*`` at stage 3 fails on a parameter that the ranks do not divide, stage3.py:3195; the local one works.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    zero_to_fp32,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from trainer.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE = "state"
"""The folder of DeepSpeed's files in a checkpoint."""

SAFE_GLOBALS = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""The only classes that DeepSpeed 0.19.8 pickles into its files beside tensors and plain containers."""

WEIGHTS, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
_FOREIGN = ("ds_autoep_layers", "autoep_layers", "universal_checkpoint_info")
"""Entries that change what ds_to_universal does, even the names of its folders; this trainer never writes them."""

_torch_load = torch.load


def load_safely(path: str, map_location: Any = None, *, mmap: bool = False) -> Any:
    """Replace DeepSpeed's loader, which unpickles anything (``weights_only=False``)."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return _torch_load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded safely ({error}): remove this checkpoint") from error


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read the parameters of the model, each in full and in float32, from a saved state; on one process.

    Raises:
        CheckpointError: a file holds something other than tensors and plain values, or is no such state.
    """
    state = directory / STATE
    model_file = state / "mp_rank_00_model_states.pt"  # all parameters in the run's precision; absent at ZeRO stage 3
    weights = load_safely(str(model_file), map_location="cpu")["module"] if model_file.exists() else {}
    if any(state.glob("*_optim_states.pt")):  # float32 master copies of trained parameters, in parts
        weights |= _merged(directory, WEIGHTS)
    if not weights:
        raise CheckpointError(f"{directory} holds no state of a model: choose another checkpoint")
    return {name: value.float() for name, value in weights.items()}


def convert(directory: Path, model: nn.Module, *, with_frozen: bool) -> tuple[str, dict[str, Any]]:
    """Convert a state to one folder a parameter, beside the checkpoint, for any number of ranks; on one process.

    Returns:
        folder: a new private folder. The caller removes it; after a kill the next start does (`checkpoint.sweep`).
        saved: what `fingerprints_in_engine` must return once the folder is loaded.

    Raises:
        CheckpointError: a file holds code, or a name that is not the model's; or the storage fails.
    """
    known = model.state_dict().keys()
    for path in sorted((directory / STATE).glob("*.pt")):
        _check_names(path, known)
    draft = None
    try:
        saved = _fingerprints_in_files(directory, model, with_frozen=with_frozen)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-universal-", dir=directory.parent))
        arguments = argparse.Namespace(
            input_folder=f"{directory.name}/{STATE}",
            output_folder=f"{draft.name}/{STATE}",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        # It uses the paths as glob patterns. A relative path holds no character that a pattern would interpret.
        with contextlib.chdir(directory.parent), _quiet_and_safe():
            ds_to_universal.main(arguments)
    except Exception as error:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"checkpoint {directory} cannot be converted to another number of ranks ({error!r}): free space of three "
            "times its size on that storage, or resume it with the number of ranks that wrote it"
        ) from error
    return str(draft), saved


def load_converted(engine: Any, folder: Path, step: float) -> None:
    """Load this rank's slices of a converted state into a fresh DeepSpeed engine; no collective.

    The working copies of the weights stay as they were until `refresh`.

    Args:
        engine: DeepSpeed's.
        folder: what `convert` wrote.
        step: how many steps the optimizer has taken.

    Raises:
        CheckpointError: something does not fit.
    """
    try:
        _load_converted(engine, folder, step)
    except Exception as error:  # of any kind: the ranks must agree on the failure
        raise CheckpointError(f"{folder} cannot be loaded ({error!r}): resume with the ranks that wrote it") from error


def refresh(engine: Any) -> None:
    """Copy the float32 master weights of all ranks into the working copies; all ranks call."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def fingerprints_in_engine(engine: Any, *, with_frozen: bool) -> dict[str, Any]:
    """Fingerprint the state of a DeepSpeed engine: weights, moments and steps; all ranks call, because ZeRO gathers."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    others = {name: value for name, value in engine.module.state_dict(keep_vars=True).items() if name not in trained}
    saved = {name: v for name, v in others.items() if with_frozen or not isinstance(v, nn.Parameter)}
    states = [engine.optimizer.optimizer.state[flat] for flat in _flat_parts(engine.optimizer)]
    return {
        WEIGHTS: fingerprint(_Gathered(trained | saved, WEIGHTS)),
        **{kind: fingerprint(_Gathered(trained, kind)) for kind in MOMENTS},
        "steps": sorted({float(state["step"]) for state in states}),
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over name, shape and float32 bytes of each tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape)]).encode())
        digest.update(value.view(-1).numpy().data)
    return digest.hexdigest()


def gather_full_param(parameter: Tensor) -> Tensor:
    """Gather a trained parameter of an engine in full and in float32; all ranks call."""
    full: Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter.detach() if full is None else full


class _Gathered(Mapping[str, Tensor]):
    """Tensors of an engine, each gathered when it is read; all ranks read them in the same order."""

    def __init__(self, parts: Mapping[str, Tensor], kind: str) -> None:
        self._parts, self._kind = parts, kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        if not part.requires_grad:
            with deepspeed.zero.GatheredParameters([part] if isinstance(part, nn.Parameter) else []):
                return part.detach().clone()
        if self._kind == WEIGHTS:
            return gather_full_param(part)
        full: Tensor = safe_get_full_optimizer_state(part, self._kind)
        return full


def _load_converted(engine: Any, folder: Path, step: float) -> None:
    optimizer, zero = engine.optimizer, folder / STATE / "zero"
    fused = optimizer.optimizer.defaults.get("fused") or optimizer.optimizer.defaults.get("capturable")
    for flat in _flat_parts(optimizer):
        where = flat.device if fused else "cpu"  # where torch's AdamW creates it in its first step
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(step, dtype=torch.float32, device=where),
            **{kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS},
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for kind in (WEIGHTS, *MOMENTS):
                _load_slice(
                    parameter, load_safely(str(zero / name / f"{kind}.pt"), map_location="cpu", mmap=True), kind
                )
    common = load_safely(str(zero / "optimizer_state.pt"), map_location="cpu", mmap=True)
    (getattr(optimizer, "_load_global_state_stage3", None) or optimizer._load_global_state)(common)
    model_state = load_safely(str(next((folder / STATE).glob("*_model_states.pt"))), map_location="cpu", mmap=True)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, model_state[name])


def _fingerprints_in_files(directory: Path, model: nn.Module, *, with_frozen: bool) -> dict[str, Any]:
    """Fingerprint the state of a checkpoint: weights, moments and steps; on one process.

    Raises:
        CheckpointError: it lacks a parameter, or was not written with torch's AdamW.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    expected = model.state_dict().keys() - (set() if with_frozen else frozen)
    weights = read_weights(directory)
    if weights.keys() != expected:
        name = min(weights.keys() ^ expected)
        raise CheckpointError(f"checkpoint {directory} and the model differ in {name}: remove this checkpoint")
    found = {WEIGHTS: fingerprint(weights)}
    del weights
    for kind in MOMENTS:
        moment = _merged(directory, kind)
        found[kind] = fingerprint({name: moment[name] for name in trained})
    steps = sorted(_steps(directory))
    if len(steps) != 1:
        raise CheckpointError(f"checkpoint {directory} mixes the steps {steps}: remove this checkpoint")
    return found | {"steps": steps}


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """Return this rank's flat float32 parts, which the inner optimizer updates."""
    flats: list[Tensor] = getattr(optimizer, "fp32_partitioned_groups_flat", None) or [
        flat for group in optimizer.optimizer.param_groups for flat in group["params"]
    ]
    return flats


def _load_slice(parameter: Tensor, saved: Any, kind: str) -> None:
    """Copy this rank's slice of a whole parameter, or of one of its moments, into the engine."""
    value = saved["param"] if isinstance(saved, dict) else saved  # stages 1 and 2 wrap it in a dict
    if not hasattr(parameter, "ds_tensor"):
        if kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
        return
    # Stage 3 cuts each parameter by itself. 5 elements (a to e) on 4 ranks are parts of 2: [a b] [c d] [e 0] [0 0].
    size = parameter.ds_tensor.numel()
    local = torch.zeros(size)
    part = value.view(-1)[dist.get_rank() * size :][:size]
    local[: len(part)] = part
    if kind == WEIGHTS:
        safe_set_local_fp32_param(parameter, local)
    else:
        safe_set_local_optimizer_state(parameter, local, kind)


def _check_names(path: Path, known: Collection[str]) -> None:
    """Refuse a file that holds code, or a name that is not the model's: names become folders."""
    state = load_safely(str(path), map_location="cpu", mmap=True)
    try:
        inner = state.get("optimizer_state_dict") or {}
        groups = [*(state.get("param_shapes") or ()), *(inner.get("param_slice_mappings") or ())]
        names = {name for group in (state.get("module") or {}, *groups) for name in group}
        foreign = [name for name in _FOREIGN if state.get(name) or inner.get(name)]
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no file of this trainer ({error}): remove this checkpoint") from error
    unknown = [*foreign, *(name for name in names if name not in known)]
    if unknown:
        raise CheckpointError(f"{path} names {unknown[0]!r}, which the model does not have: remove this checkpoint")


def _merged(directory: Path, kind: str) -> dict[str, Tensor]:
    """Merge the ranks' parts of each trained parameter: its weights, or one of its moments."""
    with _quiet_and_safe(kind):
        try:
            return dict(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=STATE))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory} cannot be read ({error}): choose another checkpoint") from error


def _steps(directory: Path) -> set[float]:
    steps = set()
    for path in (directory / STATE).glob("*_optim_states.pt"):
        states = _adam_states(load_safely(str(path), map_location="cpu", mmap=True)["optimizer_state_dict"])
        if any(state.keys() != {"step", *MOMENTS} for state in states.values()):
            raise CheckpointError(
                f"checkpoint {directory} was not written with torch's AdamW, so another number of ranks cannot resume "
                'it: set "torch_adam": true in the ds_config of new runs, or resume with the ranks that wrote it'
            )
        steps |= {float(state["step"]) for state in states.values()}
    return steps


def _adam_states(inner: dict[str, Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["state"]
    return found


@contextlib.contextmanager
def _quiet_and_safe(kind: str = WEIGHTS) -> Iterator[None]:
    """Make a converter of DeepSpeed 0.19.8 safe (it calls ``torch.load(weights_only=False)``) and quiet.

    Args:
        kind: what the converter sees in the place of the weights. With a moment, its reader of weights reads that.
    """

    def load(path: str, map_location: Any = None, *, mmap: bool = False, **_: Any) -> Any:
        state = load_safely(path, map_location=map_location, mmap=mmap)
        if isinstance(state, dict) and isinstance(state.get("optimizer_state_dict"), dict):
            _complete_for_readers(state["optimizer_state_dict"], kind)
        return state

    quiet = io.StringIO()
    with _torch_load_replaced_by(load), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        yield


@contextlib.contextmanager
def _torch_load_replaced_by(load: Callable[..., Any]) -> Iterator[None]:
    """Replace `torch.load` itself, so that every module of DeepSpeed gets the safe one."""
    original = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = original


def _complete_for_readers(inner: dict[str, Any], kind: str) -> None:
    """Add what DeepSpeed's readers need to an optimizer's file, and remove what breaks them."""
    # zero_to_fp32.py:213 refuses what the optimizer of zero1_bf16.json writes: bf16_optimizer.py:629 leaves this out.
    inner.setdefault("zero_stage", 1)
    # bf16_optimizer.py:217 records all padding of a group as the last rank's. In the example of this module that is 7
    # elements of a part of 4, and zero_checkpoint.py:107 fails. The addresses of the slices exclude padding anyway.
    inner.pop("group_paddings", None)
    if kind != WEIGHTS:
        parts = "fp32_flat_groups" if "fp32_flat_groups" in inner else "single_partition_of_fp32_groups"
        moments = [_adam_states(inner)[i][kind] for i in range(len(inner[parts]))]
        inner[parts] = [moment[: len(part)] for moment, part in zip(moments, inner[parts], strict=True)]
