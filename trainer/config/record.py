"""Recipes as JSON in a run's folder, and runs that an older version began."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from trainer.config.checks import field_names
from trainer.config.settings import Recipe
from trainer.errors import ConfigError

R = TypeVar("R", bound=Recipe)

C = TypeVar("C", bound=Any)

LEGACY_VALUES: dict[str, Any] = {
    # Recipe fields that release 0.1 did not have from its beginning, oldest first.
    "decoder_type": "self",
    "predict_share": 1.0,
    "aug_repeats": 1,
    "max_steps": None,
    "image_member": None,
    "mix_group": 0,
    "view_resize": "former",
    "colours": "stored",
    "decay_embeddings": True,
    "head_lr_scale": 1.0,
    "use_residual_branch": False,
    "use_basic_aug": True,
}
"""Recipe field -> the value, as JSON gives it, under which a run begun before the field existed behaved, or a run begun
before its default changed. Whoever adds a field, or changes a default that changes numbers, adds a line: without it no
such run can go on."""


def differing_fields(current: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Return the fields in which two recipes differ, each with both values."""
    missing = object()
    names = sorted(current.keys() | recorded.keys())
    return [
        f"{name} (here {current.get(name, 'absent')!r}, there {recorded.get(name, 'absent')!r})"
        for name in names
        if current.get(name, missing) != recorded.get(name, missing)
    ]


def complete_record(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Add the named fields that a recorded recipe lacks, with the values that its run used."""
    return {name: value for name, value in LEGACY_VALUES.items() if name in names} | dict(record)


def keep_legacy_values(recipe: R, recorded: Mapping[str, Any], explicit: Collection[str]) -> tuple[R, dict[str, Any]]:
    """Keep what an update brought away from a run begun before it, so that its command line still resumes it.

    Args:
        recipe: what the command line asks for today.
        recorded: the recipe that the run has recorded.
        explicit: the settings that the command line names; they are never changed.

    Returns:
        recipe: with the legacy value of every other field that the run lacks, or records with that value.
        kept: those that differed, with their values.

    Raises:
        ConfigError: a setting contradicts a legacy value.
    """
    asked = to_dict(recipe)
    kept = {
        name: value
        for name, value in LEGACY_VALUES.items()
        if name in asked.keys() - set(explicit) and recorded.get(name, value) == value != asked[name]
    }
    return dataclasses.replace(recipe, **{name: _tuple_of(value) for name, value in kept.items()}), kept


def to_dict(config: Any) -> dict[str, Any]:
    """Write a configuration down as JSON would give it back."""
    record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return record


def from_dict(config: type[C], record: Mapping[str, Any]) -> C:
    """Read what `to_dict` wrote; what an older version did not know has its value of `LEGACY_VALUES`, or its default.

    Raises:
        ConfigError: a newer version knew a name that this one does not.
    """
    unknown = sorted(record.keys() - field_names(config))
    if unknown:
        raise ConfigError(
            f"the recorded recipe has {unknown[0]}, which this version does not know: use the version that wrote it, "
            "see the versions beside it"
        )
    whole = complete_record(record, field_names(config))
    made: C = config(**{name: _tuple_of(value) for name, value in whole.items()})
    return made


def _tuple_of(value: Any) -> Any:
    """JSON knows lists only, and a frozen configuration has tuples."""
    return tuple(value) if isinstance(value, list) else value
