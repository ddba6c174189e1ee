"""What every value of a setting is checked for: its type, a finite number, a count that is not too small.

Classes of settings call `check_types` and `check_counts` in ``__post_init__``.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from trainer.errors import ConfigError

_AT_LEAST_ONE = {
    *("image_size", "patch_size", "encoder_depth", "mask_block", "decoder_width", "decoder_depth", "decoder_heads"),
    "aug_repeats",
    *("lora_r", "proj_dim", "proj_hidden_dim", "cls_hidden_dim", "mixstyle_blocks", "advanced_aug_num_ops"),
    *(
        "global_batch",
        "micro_batch",
        "part_batches",
        "num_lanes",
        "block_samples",
        "window_blocks",
        "cache_bytes",
        "prefetch",
    ),
    *("log_every", "save_every", "val_every", "picture_every", "probe_every", "keep_checkpoints", "stop_at_step"),
    "max_steps",
    *("num_threads", "max_bad_steps", "spike_patience", "start_timeout_s"),
    *("num_processes", "num_images", "steps", "repeats", "steps_in_a_row", "k", "pairs_per_identity", "largest", "one"),
    *("max_shard_bytes", "max_shard_samples"),
}
_NOT_NEGATIVE = {"seed", "num_workers", "num_replicates", "num_hardest", "nearest", "budget_s"}


def field_names(config: type) -> set[str]:
    """Return the names of a configuration's fields."""
    return {entry.name for entry in dataclasses.fields(config)}


def check_counts(config: Any) -> None:
    """Raise `ConfigError` for the first field that counts something and is too small; called by ``__post_init__``."""
    names = field_names(type(config))
    for name in sorted(_AT_LEAST_ONE & names):
        require(config, name, (value := getattr(config, name)) is None or value >= 1, "must be at least 1")
    for name in sorted(_NOT_NEGATIVE & names):
        require(config, name, getattr(config, name) >= 0, "must not be negative")


def require(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise `ConfigError` with the name and the value of a field and this rule, unless the rule holds."""
    if not holds:
        raise ConfigError(f"{name} is {getattr(config, name)!r}, but {rule}")


def union_members(hint: Any) -> tuple[Any, ...]:
    """Split ``X | None`` into its types."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def check_types(config: Any) -> None:
    """Raise `ConfigError` for the first field whose value is not of its declared type; called by ``__post_init__``."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, options = getattr(config, name), union_members(hint)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            require(config, name, value in choices, f"must be one of {', '.join(choices)}")
            continue
        if typing.get_origin(hint) is tuple:
            kind = typing.get_args(hint)[0]
            right = isinstance(value, tuple) and all(type(entry) is kind for entry in value)
            require(config, name, right, f"must be {type_text(hint)}")
            right = all(not isinstance(entry, float) or math.isfinite(entry) for entry in value)
            require(config, name, right, "must be finite numbers")
            continue
        if float in options and type(value) is int:
            object.__setattr__(config, name, value := float(value))
        require(config, name, type(value) in options, f"must be of type {type_text(hint)}")
        require(config, name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")


def type_text(hint: Any) -> str:
    """Write a type as --help shows it: ``int|none``, ``a|b`` for choices, ``[str,...]`` for lists."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"[{typing.get_args(hint)[0].__name__},...]"
    return "|".join("none" if option is type(None) else option.__name__ for option in union_members(hint))
