"""Which settings of a DeepSpeed JSON have an effect here. All others are refused by name, with a remedy.

DeepSpeed ignores top-level names that it does not know, and reads others for features that this trainer does not use.
A file that asks for something and silently gets nothing is worse than an error.
"""

import difflib
import importlib.util
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils.logging import logger as deepspeed_logger
from pydantic import ValidationError

from trainer.config.settings import Recipe
from trainer.distributed.cost_model import divisors
from trainer.distributed.devices import default_device
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.files import data_file

_STAGE3_NAMES = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "use_all_reduce_for_fetch_params", "allgather_sequential"),
)
_OFFLOAD = frozenset({"device", "pin_memory"})
_MONITORS = {"tensorboard": "tensorboard", "csv_monitor": "", "wandb": "wandb", "comet": "comet_ml"}
"""Block -> the package that it needs."""

HONOURED: dict[str, frozenset[str]] = {
    "": frozenset(
        {
            *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
            *("gradient_clipping", "gradient_allreduce_op", "communication_data_type", "optimizer", "bf16", "fp16"),
            *("data_types", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
            *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger"),
            *("log_level", "disable_python_gc", *_MONITORS),
        }
    ),
    "optimizer": frozenset({"type", "params"}),
    "optimizer.params": frozenset({"lr", "betas", "weight_decay", "eps", "torch_adam", "fused", "foreach"})
    | {"adam_w_mode", "amsgrad", "bias_correction", "fp32_optimizer_states"},
    "bf16": frozenset({"enabled", "check_grad_overflow", "immediate_grad_update"}),
    "fp16": frozenset({"enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"})
    | {"hysteresis", "consecutive_hysteresis", "min_loss_scale"},
    "data_types": frozenset({"grad_accum_dtype"}),
    "zero_optimization": frozenset(
        {
            *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
            *("allgather_bucket_size", "use_multi_rank_bucket_allreduce", "overlap_comm", "offload_param"),
            *("offload_optimizer", "sub_group_size", "round_robin_gradients", "ignore_unused_parameters"),
            *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
            *("compute_grad_norm", *_STAGE3_NAMES, *(f"stage3_{name}" for name in _STAGE3_NAMES)),
        }
    ),
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "flops_profiler": frozenset(
        {"enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"} | {"recompute_fwd_factor"}
    ),
    "comms_logger": frozenset({"enabled", "prof_all", "prof_ops", "verbose", "debug"}),
    "tensorboard": frozenset({"enabled", "output_path", "job_name"}),
    "csv_monitor": frozenset({"enabled", "output_path", "job_name"}),
    "wandb": frozenset({"enabled", "group", "team", "project"}),
    "comet": frozenset({"enabled", "samples_log_interval", "project", "workspace", "api_key"})
    | {"experiment_name", "experiment_key", "online", "mode"},
}
"""Block -> the names that have an effect in it; "" is the file itself."""

_REMOVED = "DeepSpeed removed it in 0.19.8"
_PRECISION = "it changes the numbers, and a checkpoint would not record it: only bf16, fp16 or neither are"
_OWN_SAVING = "checkpoints are written by trainer/fault_tolerance/checkpoint.py (save_every, keep_checkpoints)"
_OWN_LOADER = "batches come from trainer/data (num_workers, prefetch)"
_PARALLEL = "ranks divide the batch and the optimizer's state only (zero_optimization)"
_WHOLE_BLOCKS = "the trainer names the blocks that are gathered at once"
_NVME = "offload to NVMe is not used here, only to the CPU"
_EVEN_MEAN = "gradients are averaged over the ranks in communication_data_type"

REFUSED: dict[str, str] = {
    "scheduler": "the recipe owns the schedule (warmup_epochs, min_learning_rate)",
    "elasticity": f"{_REMOVED}; any world size that divides the global batch works without it",
    "nebula": f"{_REMOVED}; {_OWN_SAVING}",
    "checkpoint": f"{_OWN_SAVING}, and another number of ranks resumes without load_universal",
    "data_states": _OWN_SAVING,
    "datastates_ckpt": _OWN_SAVING,
    "data_efficiency": "the data plane is trainer/data",
    "curriculum_learning": "the data plane is trainer/data",
    "dataloader_drop_last": _OWN_LOADER,
    "torch_autocast": f'{_PRECISION}; write "bf16": {{"enabled": true}}',
    "bfloat16": f'{_PRECISION}; write "bf16" for "bfloat16"',
    "amp": f'{_REMOVED}; write "bf16": {{"enabled": true}}',
    "activation_checkpointing": "set --grad_checkpointing true",
    "autotuning": "it starts scripts of its own; tools/plan_run.py names the micro batch and the stage",
    "hybrid_engine": "it generates text",
    "compile": "set --compile_mode default",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "vocabulary_size": "there is no vocabulary",
    "aio": _NVME,
    "prescale_gradients": _EVEN_MEAN,
    "gradient_predivide_factor": _EVEN_MEAN,
    "managed_gradient_accumulation": "the trainer counts micro batches as DeepSpeed does",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "dump_state": "recipe.json records the settings",
    "timers": "metrics.jsonl holds step_s and images_per_s",
    "weight_quantization": "weights are trained in full precision",
    "optimizer.legacy_fusion": "it belongs to optimizers that are not used here",
    "bf16.bf16_master_weights_and_grads": _PRECISION,
    "bf16.bf16_optimizer_states": _PRECISION,
    "fp16.fp16_master_weights_and_grads": _PRECISION,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "data_types.keep_in_fp32_modules": _PRECISION,
    "zero_optimization.zero_quantized_weights": _PRECISION,
    "zero_optimization.zero_quantized_nontrainable_weights": _PRECISION,
    "zero_optimization.zero_quantized_gradients": _PRECISION,
    "zero_optimization.zenflow": "it moves the optimizer by gradients of older steps",
    "zero_optimization.elastic_checkpoint": "another number of ranks resumes without it",
    "zero_optimization.pipeline_loading_checkpoint": _OWN_SAVING,
    "zero_optimization.load_from_fp32_weights": _OWN_SAVING,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "tools/export.py writes whole weights at any stage",
    "zero_optimization.gather_16bit_weights_on_model_save": "tools/export.py writes whole weights at any stage",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "tools/export.py writes whole weights at any stage",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory": true into offload_optimizer',
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.parameter_alignment": "it was not tried with the conversion to other numbers of ranks",
    "zero_optimization.zero_hpz_partition_size": "it was not tried with the conversion to other numbers of ranks",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.leaf_module": _WHOLE_BLOCKS,
    "zero_optimization.module_granularity_threshold": _WHOLE_BLOCKS,
    "zero_optimization.stage3_module_granularity_threshold": _WHOLE_BLOCKS,
    "zero_optimization.offload_optimizer.super_offload": "it was not tried with this trainer's checks of gradients",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload",
    "zero_optimization.offload_optimizer.ratio": "the whole state is offloaded, or none of it",
    **{
        f"zero_optimization.{block}.{name}": _NVME
        for block in ("offload_param", "offload_optimizer")
        for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write")
    },
    "zero_optimization.offload_optimizer.fast_init": _NVME,
    **dict.fromkeys(
        (
            *("compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention"),
            *("graph_harvesting", "progressive_layer_drop", "zero_optimization.mics_shard_size"),
            *("zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param"),
        ),
        _REMOVED,
    ),
}
"""Dotted name -> why it is not used, or what to write instead."""

_NOT_FINITE = "gradients that are not finite would move the weights"
_NOT_RECORDED = "the recipe does not own it, so that a checkpoint would not record it"
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "optimizer.type": (("AdamW", "adamw", "Adam", "adam"), "the recipe's weight_decay and betas are those of AdamW"),
    "optimizer.params.adam_w_mode": ((True,), "the recipe's weight_decay is that of AdamW"),
    "optimizer.params.eps": ((1e-8,), _NOT_RECORDED),
    "optimizer.params.amsgrad": ((False,), _NOT_RECORDED),
    "optimizer.params.bias_correction": ((True,), _NOT_RECORDED),
    "optimizer.params.fp32_optimizer_states": ((True,), _NOT_RECORDED),
    "gradient_allreduce_op": (("mean",), "the loss is the mean over the global batch"),
    "bf16.check_grad_overflow": ((True,), _NOT_FINITE),
    "fp16.auto_cast": ((False,), "it would round the samples' draws, and models cast what they take themselves"),
    "zero_optimization.compute_grad_norm": ((True,), _NOT_FINITE),
    "zero_optimization.stage": ((1, 0, 2, 3), "the stages are 0 to 3"),
    "zero_optimization.offload_param.device": (("none", "cpu"), _NVME),
    "zero_optimization.offload_optimizer.device": (("none", "cpu"), _NVME),
}
"""Dotted name -> the values that it may have, and why no others."""


def check_names(config: Mapping[str, Any], source: str) -> None:
    """Refuse what has no effect here, and what changes numbers without being recorded in a checkpoint.

    Args:
        config: a DeepSpeed configuration.
        source: how messages name the file.

    Raises:
        ConfigError: it names the setting and a remedy; for an unknown name the most similar known ones.
    """
    _check_block("", config, source)
    for name, (values, reason) in _ONLY.items():
        value = _value_at(config, name)
        if value not in (None, "auto") and not any(type(value) is type(fit) and value == fit for fit in values):
            raise ConfigError(
                f"{source} sets {name} to {json.dumps(value)}, but {reason}: remove the line, or write "
                f"{json.dumps(values[0])}"
            )
    for block, package in _MONITORS.items():
        if package and _value_at(config, f"{block}.enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{source} enables {block}, but {package} is not installed: pip install {package}")


def compiled_optimizer(config: Mapping[str, Any]) -> str:
    """Name the optimizer that DeepSpeed compiles at the start of a training; empty where it takes torch's."""
    optimizer = config.get("optimizer", {})
    return "" if optimizer.get("params", {}).get("torch_adam") else str(optimizer.get("type", ""))


def _check_block(block: str, config: Mapping[str, Any], source: str) -> None:
    for name, value in config.items():
        path = f"{block}.{name}" if block else name
        if path in REFUSED:
            raise ConfigError(f"{source} sets {path!r}, which is not used here: {REFUSED[path]}; remove it")
        if name not in HONOURED[block]:
            raise ConfigError(
                f"{source} sets {path!r}, which DeepSpeed does not know: {_nearest(name, HONOURED[block])}"
            )
        if path in HONOURED:
            if not isinstance(value, Mapping):
                example = '; write {"stage": 1}' if path == "zero_optimization" else ""
                raise ConfigError(f"{source} sets {path} to {json.dumps(value)}, but it must be a JSON object{example}")
            _check_block(path, value, source)


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "remove it; ds_configs/ holds examples"


def _value_at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def find_ds_config(name: str) -> Path:
    """Find a DeepSpeed JSON: an existing path, or else a file of the project's ds_configs/ by its name."""
    path = Path(name)
    known = data_file(f"ds_configs/{path.name}")
    by_name = path.parent in (Path(), Path("ds_configs"))
    return known if by_name and not path.exists() and known.exists() else path


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing, is not a JSON object, or sets something that does nothing here.
    """
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_names)
    except OSError as error:
        raise ConfigError(f"ds_config {path} cannot be read ({error.strerror}): name a file of ds_configs/") from error
    except ValueError as error:
        raise ConfigError(f"ds_config {path} is not valid JSON ({error}): compare it with ds_configs/") from error
    if not isinstance(config, dict):
        raise ConfigError(f"ds_config {path} holds a {type(config).__name__}, but must be one JSON object")
    check_names(config, f"ds_config {path}")
    return config


def fill_ds_config(config: Mapping[str, Any], owned: Mapping[str, Any]) -> dict[str, Any]:
    """Put the recipe's values where the JSON says "auto" or nothing.

    Args:
        config: a DeepSpeed configuration.
        owned: what the recipe decides, by dotted name, for example ``optimizer.params.lr``.

    Returns:
        filled: a new configuration without any "auto".

    Raises:
        ConfigError: the JSON sets another value explicitly, leaves an "auto" that the recipe does not own, or holds a
            value that DeepSpeed refuses.
    """
    filled: dict[str, Any] = json.loads(json.dumps(config))
    filled.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True, "fused": True}})
    for name, value in owned.items():
        *blocks, last = name.split(".")
        block = filled
        for step in blocks:
            block = block.setdefault(step, {})
            if not isinstance(block, dict):
                raise ConfigError(f"ds_config sets {step} to {block!r}, but it must be a JSON object")
        if block.get(last, "auto") not in ("auto", value):
            raise ConfigError(
                f"ds_config sets {name} to {block[last]!r}, but the recipe says {value!r}: "
                f'write "auto" in the JSON, or change the recipe'
            )
        block[last] = value
    left = [name for name, value in _leaves(filled) if value == "auto"]
    if left:
        raise ConfigError(
            f'ds_config leaves {", ".join(left)} "auto", but the recipe does not own it: remove the line, or write a '
            "value"
        )
    # Its timer waits for the whole device twice in each micro batch; metrics.jsonl holds the rates.
    filled["timers"] = {"throughput": {"enabled": False}}
    _check_values(filled)
    return filled


def _check_values(config: dict[str, Any]) -> None:
    """Let DeepSpeed read the configuration before any work; it counts the ranks that are connected so far."""
    connected = dist.get_world_size() if dist.is_initialized() else 1
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * connected
    deepspeed_logger.setLevel(logging.WARNING)
    try:
        deepspeed.DeepSpeedConfig(config | {"train_batch_size": batch})
    except Exception as error:  # it fails in any way on values of a wrong type
        raise ConfigError(
            f"DeepSpeed refuses the ds_config: {one_line_reason(error)}; compare it with ds_configs/"
        ) from error


def one_line_reason(error: BaseException) -> str:
    """Say on one line what is wrong: pydantic's texts have several lines for each setting, and a link."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = [(".".join(map(str, entry["loc"])), entry["msg"], entry["input"]) for entry in error.errors()]
    return "; ".join(f"{where} is {given!r}: {message}" if where else message for where, message, given in found)


def owned_by_recipe(
    *,
    global_batch: int,
    micro_batch: int,
    num_ranks: int,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip_grad_norm: float,
) -> dict[str, Any]:
    """Name the DeepSpeed settings that follow from the recipe and the world.

    Raises:
        ConfigError: the global batch is not made of whole micro batches.
    """
    accumulation, rest = divmod(global_batch, num_ranks * micro_batch)  # 4096 = 16 ranks x 64 images x 4 accumulated
    if rest or not accumulation:
        raise ConfigError(
            f"global_batch is {global_batch}, but must be divisible by ranks x micro_batch = {num_ranks} x "
            f"{micro_batch}: {_batch_remedy(global_batch, micro_batch, num_ranks)}"
        )
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad_norm,
        "optimizer.params.lr": learning_rate,
        "optimizer.params.betas": list(betas),
        "optimizer.params.weight_decay": weight_decay,
    }


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in block.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"the name {twice.pop()!r} stands twice")
    return dict(pairs)


def _batch_remedy(global_batch: int, micro_batch: int, num_ranks: int) -> str:
    """Name the world sizes and micro batches that would fit; the global batch of a run must not change.

    With 60 images, a micro batch of 8 and 4 ranks: no number of ranks fits that micro batch, but 60 / 4 = 15 images a
    rank are whole micro batches of 1, 3, 5 or 15.
    """
    sizes = divisors(global_batch // micro_batch) if global_batch % micro_batch == 0 else []
    remedies = [f"start {_either(sizes, num_ranks)} ranks"] if sizes else []
    if global_batch % num_ranks == 0:
        remedies.append(f"set micro_batch to {_either(divisors(global_batch // num_ranks), micro_batch)}")
    if not remedies:
        remedies = [f"start {_either(divisors(global_batch), num_ranks)} ranks with a micro_batch that divides theirs"]
    return ", or ".join(remedies)


def _either(numbers: list[int], wanted: int) -> str:
    """Name up to eight of the numbers, those next to the one that was wanted."""
    near = sorted(sorted(numbers, key=lambda n: abs(n - wanted))[:8])
    return " or ".join(filter(None, (", ".join(map(str, near[:-1])), str(near[-1]))))


def engine_settings(recipe: Recipe, world: World, micro_batch: int, ds_config: str | None = None) -> dict[str, Any]:
    """Read the DeepSpeed JSON (without one the device's default), and fill in what the recipe owns."""
    fallback = "cpu_fp32.json" if default_device().type == "cpu" else "zero1_bf16.json"
    path = find_ds_config(ds_config) if ds_config else data_file(f"ds_configs/{fallback}")
    return fill_ds_config(
        read_ds_config(path),
        owned_by_recipe(
            global_batch=recipe.global_batch,
            micro_batch=micro_batch,
            num_ranks=world.size,
            learning_rate=recipe.peak_learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            clip_grad_norm=recipe.clip_grad_norm,
        ),
    )
