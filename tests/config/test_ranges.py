"""Numbers that mean nothing are refused by every command: negative ones always, 0 unless it means something."""

import dataclasses
import importlib
import typing
from typing import Any

import pytest

from tests.helpers.runs import ROOT
from trainer.config.checks import union_members
from trainer.config.settings import DetectorRecipe, DetectorRuntime, PretrainRecipe, PretrainRuntime
from trainer.errors import ConfigError

NEEDED: dict[str, dict[str, Any]] = {
    "tools.plan_run": {"images": 1000},
    "tools.submit": {"nodes": 1, "gpus": 1},
}
"""What some commands cannot do without."""
MEAN_ZERO = {
    # None, never, or without limit
    *(
        "num_workers",
        "num_replicates",
        "num_hardest",
        "val_samples",
        "max_restarts",
        "nearest",
        "budget_s",
        "mix_group",
    ),
    *("timeout_s", "data_timeout_s", "save_timeout_s", "clip_grad_norm", "spike_threshold", "memory_reserve"),
    # A number like any other
    *("seed", "warmup_epochs", "min_learning_rate", "weight_decay", "beta1", "beta2", "max_bad_sample_share", "stage"),
    *("flip_probability", "lora_dropout", "drop_path", "margin", "label_smoothing", "mixup_alpha"),
    *("mixstyle_p", "passport_p", "self_morph_share"),
}


def settings() -> dict[str, Any]:
    """Return the settings of every command, recipe and runtime, with their defaults."""
    found: dict[str, Any] = {kind.__name__: kind() for kind in (PretrainRecipe, PretrainRuntime)}
    found |= {kind.__name__: kind() for kind in (DetectorRecipe, DetectorRuntime)}
    commands = [path for folder in ("launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    for command in sorted(path for path in commands if "__main__" in path.read_text()):
        name = ".".join(command.relative_to(ROOT).with_suffix("").parts)
        found[name] = importlib.import_module(name).CLI.settings(**NEEDED.get(name, {}))
    return found


SETTINGS = settings()


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_that_mean_nothing_are_refused_by_name(name: str) -> None:
    base = SETTINGS[name]
    for field, hint in typing.get_type_hints(type(base)).items():
        kinds = [kind for kind in (float, int) if kind in union_members(hint)]
        for kind in kinds[:1]:
            for value in (-1,) if field in MEAN_ZERO else (-1, 0):
                with pytest.raises(ConfigError, match=rf"\b{field} (is |\(){value}\b.* must "):
                    dataclasses.replace(base, **{field: kind(value)})
