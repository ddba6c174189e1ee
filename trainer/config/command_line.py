"""From a command line to a validated recipe, and from an error to one message and an exit code.

fire takes the command line apart. It would call the function first and complain about unknown flags afterwards, turn
``2024_01`` into a number and keep only the last of several ``--override``; so it is asked for raw text only, and names,
types and ranges are checked by `trainer.config.settings` before any work.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import fire
from fire.core import FireExit
from fire.decorators import SetParseFn

from trainer.config.parse import Bare, expand_home, help_text, refuse_unknown, resolve, with_flags
from trainer.config.record import keep_legacy_values
from trainer.config.settings import Recipe, Runtime
from trainer.errors import ConfigError
from trainer.progress import is_main

logger = logging.getLogger(__name__)

_HELP, _VERSION = frozenset({"--help", "-h"}), frozenset({"--version", "-V"})

S = TypeVar("S", bound=Any)
R = TypeVar("R", bound=Recipe)
T = TypeVar("T", bound=Runtime)
Recipes = Mapping[str, Callable[[], tuple[R, T]]]


@dataclass(frozen=True, slots=True)
class CommandLine(Generic[R, T]):
    """What the command line of a training says."""

    recipe: R
    runtime: T
    given: frozenset[str]
    """Settings that were given by name; the others are the recipe's or defaults."""
    dry_run: bool
    """Show what would run, and leave."""


def answered(argv: Sequence[str], help_of: Callable[[list[str]], str]) -> bool:
    """Print what ``--help`` or ``--version`` ask for, on one rank; False if neither stands there.

    Args:
        argv: the command line.
        help_of: gives the help, knowing the rest of the command line.
    """
    if _HELP & set(argv) or argv[:1] == ["help"]:
        text = help_of([word for word in argv if word not in _HELP and word != "help"])
    elif _VERSION & set(argv):
        text = version_text()
    else:
        return False
    if is_main():
        print(text)
    return True


def version_text() -> str:
    """Name this project's version and those of the libraries that decide what a run computes."""
    found = []
    for name in ("face-mae-trainer", "torch", "deepspeed", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def configure(argv: Sequence[str], recipes: Recipes[R, T], default: str) -> tuple[R, T]:
    """Read flags, overrides and the recipe's name into validated configurations.

    Raises:
        ConfigError: an unknown argument, name or value.
    """
    line = read_command(argv, recipes, default)
    return line.recipe, line.runtime


def read_command(argv: Sequence[str], recipes: Recipes[R, T], default: str) -> CommandLine[R, T]:
    """Read the command line of a training.

    Raises:
        ConfigError: an unknown argument, name or value.
    """
    flags = read_flags(argv)
    dry_run = with_flags(_Asked(), flags).dry_run
    flags.pop("dry_run", None)
    name = flags.pop("recipe", default)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.3)
        raise ConfigError(
            f"recipe is {name!r}, but must be one of {', '.join(recipes)}" + "".join(f" (try {n})" for n in near)
        )
    if {"epochs", "max_steps"} <= flags.keys():
        raise ConfigError("epochs and max_steps are both given, but each sets the length of the schedule: keep one")
    recipe, runtime = resolve(*recipes[name](), flags)
    recipe = _as_it_began(recipe, Path(runtime.output_dir, "recipe.json"), flags)
    return CommandLine(recipe, runtime, frozenset(flags), dry_run)


def _as_it_began(recipe: R, record: Path, flags: Mapping[str, str]) -> R:
    """Keep what an update brought away from a run that began before it, unless the command line asks for it."""
    try:
        recorded = dict(json.loads(record.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return recipe  # no run, or one that `resume.check_output` refuses
    recipe, kept = keep_legacy_values(recipe, recorded, flags)
    if kept and is_main():
        told = ", ".join(f"{name} {value!r}" for name, value in kept.items())
        logger.warning("this run began before an update of the defaults and goes on as it began, with %s", told)
    return recipe


def read_training(argv: Sequence[str], recipes: Recipes[R, T], default: str) -> CommandLine[R, T] | None:
    """Read the command line of a training, or print its help or version and return None.

    Raises:
        ConfigError: an unknown argument, name or value.
    """
    if answered(argv, functools.partial(recipes_help, recipes, default)):
        return None
    line = read_command(argv, recipes, default)
    if not line.runtime.data:
        raise ConfigError("--data is empty: name the shards, for example --data 'shards/*.tar'")
    check_places(line.runtime)
    return line


@dataclass(frozen=True, slots=True)
class _Asked:
    dry_run: bool = False


def configure_tool(argv: Sequence[str], settings: S, doc: str, *, required: tuple[str, ...] = ()) -> S | None:
    """Read the flags of a tool into its settings, or print its help or version and return None.

    Raises:
        ConfigError: an unknown argument, name or value, or a required setting is empty.
    """
    if answered(argv, lambda _: f"{doc} {help_text(type(settings), 'Settings')}"):
        return None
    flags = read_flags(argv)
    refuse_unknown(flags, [entry.name for entry in dataclasses.fields(settings)])
    configured = with_flags(settings, flags)
    for name in required:
        if not getattr(configured, name):
            raise ConfigError(f"{name} is empty: pass --{name}")
    check_places(configured)
    return configured


_FOLDERS, _PLACES = ("output_dir", "cache_dir", "sample_ledger", "repair", "folder"), ("output", "plot")


def check_places(settings: Any) -> None:
    """Refuse a place to write that is a file, or where nobody may write, before any work; nothing is created.

    Raises:
        ConfigError: names the setting.
    """
    for name in (*_FOLDERS, *_PLACES):
        if value := getattr(settings, name, None):
            _check_place(name, value)


def _check_place(name: str, value: str) -> None:
    path, noun = Path(value).absolute(), "folder" if name in _FOLDERS else "place"
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise ConfigError(f"{name} is {value!r}, which cannot be used: {error.strerror}") from error
    if not there.is_dir() and (there != path or name in _FOLDERS):
        raise ConfigError(f"{name} is {value!r}, but {there} is a file: name another {noun}")
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise ConfigError(f"{name} is {value!r}, but you may not write in {there}: name another {noun}")


def read_folder(argv: Sequence[str], doc: str) -> Path | None:
    """Read the command line of a tool that takes one folder, or print its help or version and return None.

    Raises:
        ConfigError: anything else stands there.
    """
    if answered(argv, lambda _: doc):
        return None
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigError(f"{' '.join(argv) or 'nothing'!r} is given, but one folder is needed: --help shows how")
    return Path(expand_home(argv[0]))


def read_flags(argv: Sequence[str]) -> dict[str, str]:
    """Collect ``--name value``, ``--name=value`` and ``--override name=value`` as text.

    What the deepspeed launcher adds (``--local_rank=N``, ``--deepspeed``) is dropped; ``--deepspeed_config FILE`` and
    ``--deepspeed FILE`` are ``--ds_config FILE``.

    Raises:
        ConfigError: an argument belongs to no setting, or a setting is given twice with different values.
    """
    overrides, rest = _split_overrides(argv)
    if "--" in rest:
        raise ConfigError("a lone -- stands on the command line: write every setting as --name value")
    flags: dict[str, str] = {}

    @SetParseFn(str)  # type: ignore[untyped-decorator]
    def collect(*loose: str, **named: str) -> None:
        if loose:
            remedy = "write --name value"
            if loose[0].endswith(".tar"):  # DeepSpeed 0.19.8 hands words to the shells of a --hostfile without quotes
                remedy = "a shell has expanded a pattern: quote it; with --hostfile, name the folder of the shards"
            raise ConfigError(f"{loose[0]!r} belongs to no setting: {remedy}")
        flags.update(named)

    pairs = flag_pairs(rest)
    with contextlib.redirect_stdout(sys.stderr):  # whatever fire has to say is not our output
        try:
            fire.Fire(collect, command=_with_values(rest), name="launch")
        except FireExit as error:
            raise ConfigError(
                f"the command line {' '.join(rest)!r} cannot be read: write every setting as --name value"
            ) from error
    flags |= {name: value for name, value in pairs if isinstance(value, Bare)}
    pairs += overrides
    flags |= dict(overrides)
    flags.pop("local_rank", None)
    for name in ("deepspeed", "deepspeed_config"):
        file = flags.pop(name, None)
        if file is not None and not (name == "deepspeed" and isinstance(file, Bare)):
            flags["ds_config"] = file
            pairs.append(("ds_config", file))
    for name, value in pairs:
        if flags.get(name, value) != value:
            raise ConfigError(f"{name} is given twice, as {value!r} and {flags[name]!r}: keep one")
    return flags


def _with_values(argv: Sequence[str]) -> list[str]:
    """Give every setting a value: fire takes a bare ``--norm_pix_loss`` for the opposite of ``--rm_pix_loss``."""
    following = [*argv[1:], "--"]
    return [
        f"{word}=true" if word.startswith("--") and "=" not in word and after.startswith("--") else word
        for word, after in zip(argv, following, strict=False)
    ]


def flag_pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Split ``--name value``, ``--name=value`` and ``--name``; of several settings of one name fire keeps the last."""
    found = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=False):
        if not word.startswith("--"):
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = Bare("true") if after.startswith("--") else after
        found.append((name.replace("-", "_"), value))
    return found


def _split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    overrides, rest = [], []
    queue = iter(argv)
    for word in queue:
        if word == "--override" or word.startswith("--override="):
            pair = word.partition("=")[2] if "=" in word else next(queue, "")
            name, equals, value = pair.partition("=")
            if not name or not equals:
                raise ConfigError(f"--override is followed by {pair!r}, but must be followed by name=value")
            overrides.append((name.lstrip("-").replace("-", "_"), value))
        else:
            rest.append(word)
    return overrides, rest


_EXAMPLES = r"""
Examples:
    deepspeed launch/pretrain.py --recipe mae_vit_base --data 'shards/train/*.tar' \
        --val_data 'shards/val/*.tar' --output_dir runs/base
    deepspeed launch/finetune.py --recipe lora --init runs/base --data 'detect/train/*.tar' \
        --val_data 'detect/dev/*.tar'
"""


def recipes_help(recipes: Recipes[R, T], default: str, argv: Sequence[str] = ()) -> str:
    """Describe the recipes and every setting, with the values that the command line would run with.

    Raises:
        ConfigError: the command line is wrong.
    """
    line = read_command(argv, recipes, default)
    chosen, script = read_flags(argv).get("recipe", default), Path(sys.argv[0]).name
    lines = [
        f"usage: deepspeed launch/{script} --recipe NAME --data 'shards/*.tar' [--name value] [--override name=value]",
        f"\nRecipes (default {default}); flags change single settings of them:",
    ]
    for name, function in recipes.items():
        text = "\n        ".join(line.strip() for line in (function.__doc__ or "").strip().splitlines() if line.strip())
        lines.append(f"  --recipe {name}\n        {text}")
    lines += [
        "\nAlso: --dry_run (show settings, steps, memory and cost, and leave), --version, --override name=value",
        "(repeatable), --deepspeed_config FILE or --deepspeed FILE (same as --ds_config)",
        _EXAMPLES,
        f"The values below are those of --recipe {chosen} and of this command line.",
        help_text(line.recipe, "Recipe (changes the numbers)"),
        help_text(line.runtime, "Runtime (does not)"),
    ]
    return "\n".join(lines)
