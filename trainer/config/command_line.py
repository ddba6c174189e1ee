"""How a command declares its command line, and what its `main` gets of it.

A command file holds a frozen dataclass of settings, a docstring that is its help, and three names::

    CLI = CommandLine(Settings, __doc__, required=("source",))      # TrainingCommandLine where recipes are read

    def main(settings: Settings) -> int: ...

    def command() -> None:
        run(main, CLI)                                              # trainer.fault_tolerance.exit_codes

Help, version and mistakes are answered before `main` runs. So a command imports what takes seconds (torch, DeepSpeed)
inside `main`, within `trainer.startup.loading`.

fire takes the command line apart. It would call the function first and complain about unknown flags afterwards, turn
``2024_01`` into a number and keep only the last of several ``--override``; so it is asked for raw text only, and names,
types and ranges are checked by `trainer.config.checks` before any work.
"""

import contextlib
import difflib
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import trainer
from trainer.config.checks import field_names
from trainer.config.parse import Bare, from_flags, help_text, refuse_unknown, resolve
from trainer.config.recipes import Recipes
from trainer.config.record import keep_legacy_values
from trainer.config.settings import Launch, Recipe, Runtime
from trainer.config.settings_file import SettingsFile, read_settings_file
from trainer.errors import ConfigError, TrainerError
from trainer.progress import is_main

logger = logging.getLogger(__name__)

_HELP, _VERSION = frozenset({"--help", "-h"}), frozenset({"--version", "-V"})
_REMEDIES = {"data": "name the shards, for example --data 'shards/*.tar'"}
"""Required setting -> what to do where it is empty."""
_FOR_ALL = """
Also: --config FILE takes settings from a YAML or JSON file (flags win over it), --override name=value (repeatable) is
the same as --name value, --version, --help.
"""

L = TypeVar("L")
L_co = TypeVar("L_co", covariant=True)
S = TypeVar("S", bound=Any)
R = TypeVar("R", bound=Recipe)
T = TypeVar("T", bound=Runtime)


class Reader(Protocol[L_co]):
    """Reads a command line: `CommandLine` or `TrainingCommandLine`."""

    def read(self, argv: Sequence[str]) -> L_co | None:
        """Return what `main` gets, or print help or version and return None."""


def call(main: Callable[[L], int], cli: Reader[L], argv: Sequence[str]) -> int:
    """Read a command line and run the command; returns the exit code.

    Raises:
        ConfigError: an unknown argument, name or value, or what the command itself raises.
    """
    line = cli.read(argv)
    return 0 if line is None else main(line)


@dataclass(frozen=True, slots=True)
class CommandLine(Generic[S]):
    """The command line of a tool: one dataclass of settings."""

    settings: type[S]
    doc: str | None
    """The help, which ends with usage and examples; the settings follow it."""
    required: tuple[str, ...] = ()
    """Settings that may not stay empty."""
    positional: str = ""
    """A setting that may also be given as the first word, without its name."""

    def read(self, argv: Sequence[str]) -> S | None:
        """Read the settings, or print help or version and return None.

        Raises:
            ConfigError: an unknown argument, name or value, or a required setting is empty.
        """
        if _answered(argv, self.help):
            return None
        if self.positional and argv and not argv[0].startswith("-"):
            argv = [f"--{self.positional}={argv[0]}", *argv[1:]]
        given = _Given.of(argv)
        given.refuse_unknown(field_names(self.settings))
        with given.naming_the_file():
            settings = from_flags(self.settings, given.named)
        _refuse_empty(self.required, settings)
        check_places(settings)
        return settings

    def help(self, argv: Sequence[str] = ()) -> str:
        """Describe the command and its settings, whatever else stands on the command line."""
        del argv
        return f"{self.doc}{_FOR_ALL}{help_text(self.settings, 'Settings', required=self.required)}"


@dataclass(frozen=True, slots=True)
class Training(Generic[S, R, T]):
    """What the command line of a training, or of a tool that reads one, gives."""

    settings: S
    """The command's own settings; `Launch` for a training."""
    recipe: R
    runtime: T
    given: frozenset[str]
    """Settings of the training that were given by name; the others are the recipe's or defaults."""
    argv: tuple[str, ...]
    """The training's part of the command line."""
    file_argv: tuple[str, ...]
    """What a file of settings gave of the training, written as words of a command line."""


@dataclass(frozen=True, slots=True)
class TrainingCommandLine(Generic[S, R, T]):
    """The command line of a training, or of a tool that takes one: recipe and runtime, and settings of its own."""

    settings: type[S]
    """Has a setting ``recipe``, and ``script`` where there is a choice of trainings."""
    doc: str | None
    trainings: tuple[Recipes[R, T], ...]
    required: tuple[str, ...] = ()
    """Settings, of the command or of the training, that may not stay empty."""
    trains: bool = False
    """The command is that training: its help lists the training's settings, and it writes into output_dir."""

    def read(self, argv: Sequence[str]) -> Training[S, R, T] | None:
        """Read settings, recipe and runtime, or print help or version and return None.

        Raises:
            ConfigError: an unknown argument, name or value, or a required setting is empty.
        """
        if _answered(argv, self.help):
            return None
        training = self.parse(argv)
        _refuse_empty(self.required, training.settings, training.recipe, training.runtime)
        check_places(training.settings)
        if self.trains:
            check_places(training.runtime)
        return training

    def parse(self, argv: Sequence[str]) -> Training[S, R, T]:
        """Read settings, recipe and runtime, without looking at the place where the run would be.

        Raises:
            ConfigError: an unknown argument, name or value.
        """
        given, own = _Given.of(argv), field_names(self.settings)
        defaults = [recipes.functions[recipes.default]() for recipes in self.trainings]
        given.refuse_unknown(own.union(*(field_names(type(config)) for pair in defaults for config in pair)))
        with given.naming_the_file():
            settings = from_flags(self.settings, given.named)
            recipe, runtime = self._chosen(settings)
            names = field_names(type(recipe)) | field_names(type(runtime))
            given.refuse_unknown(own | names)
            flags = given.of_training(type(recipe), names)
            recipe, runtime = resolve(recipe, runtime, flags)
        recipe = _as_it_began(recipe, Path(runtime.output_dir, "recipe.json"), flags)
        rest, file_argv = without_settings(argv, own - {"recipe"}), given.words_of_file(names - own)
        return Training(settings, recipe, runtime, frozenset(flags), tuple(rest), tuple(file_argv))

    def _chosen(self, settings: S) -> tuple[R, T]:
        script = getattr(settings, "script", "")
        choice = [recipes for recipes in self.trainings if recipes.script == script] or self.trainings
        functions = {name: function for recipes in choice for name, function in recipes.functions.items()}
        name = settings.recipe or choice[0].default
        if name not in functions:
            near = difflib.get_close_matches(name, functions, n=1, cutoff=0.3)
            remedy = "".join(f" (try {n})" for n in near)
            raise ConfigError(f"recipe is {name!r}, but must be one of {', '.join(functions)}{remedy}")
        return functions[name]()

    def help(self, argv: Sequence[str] = ()) -> str:
        """Describe the command, its recipes and every setting, with the values that the command line would run with.

        Raises:
            ConfigError: the command line is wrong.
        """
        if not self.trains:
            names = " or ".join(f"launch/{recipes.script}.py" for recipes in self.trainings)
            note = f"\nEvery setting of {names} may follow: their --help lists them."
            return f"{self.doc}{_FOR_ALL}{help_text(self.settings, 'Settings', required=self.required)}\n{note}"
        training, recipes = self.parse(argv), self.trainings[0]
        lines = [
            f"{self.doc}{_FOR_ALL}",
            f"Recipes (default {recipes.default}); settings change single values of them:",
        ]
        for name, function in recipes.functions.items():
            text = "\n        ".join(filter(None, map(str.strip, (function.__doc__ or "").splitlines())))
            lines.append(f"  --recipe {name}\n        {text}")
        chosen = training.settings.recipe or recipes.default
        lines += [
            f"\nThe values below are those of --recipe {chosen} and of this command line.",
            help_text(training.settings, "Command"),
            help_text(training.recipe, "Recipe (changes the numbers)"),
            help_text(training.runtime, "Runtime (does not)", required=self.required),
        ]
        return "\n".join(lines)


def configure(argv: Sequence[str], recipes: Recipes[R, T]) -> tuple[R, T]:
    """Read flags, overrides and the recipe's name into validated configurations.

    Raises:
        ConfigError: an unknown argument, name or value.
    """
    line = TrainingCommandLine(Launch, "", (recipes,)).parse(argv)
    return line.recipe, line.runtime


@dataclass(frozen=True, slots=True)
class _Given:
    """What the command line and its file of settings name."""

    flags: Mapping[str, str]
    file: SettingsFile

    @classmethod
    def of(cls, argv: Sequence[str]) -> "_Given":
        flags = read_flags(argv)
        path = flags.pop("config", None)
        if isinstance(path, Bare):
            raise ConfigError("config has no value: write --config FILE")
        return cls(flags, SettingsFile() if path is None else read_settings_file(path))

    def refuse_unknown(self, known: set[str]) -> None:
        """Raise `ConfigError` for a name that is no setting."""
        refuse_unknown(self.flags, known)
        refuse_unknown(self.file.values, known, path=self.file.path)

    @property
    def named(self) -> dict[str, str]:
        """All that is named; the command line wins over the file."""
        return {**self.file.values, **self.flags}

    @contextlib.contextmanager
    def naming_the_file(self) -> Iterator[None]:
        """Say of a wrong value that it stands in the file."""
        try:
            yield
        except ConfigError as error:
            found = re.match(r"\w+", str(error))
            if found and found[0] in self.file.values and found[0] not in self.flags:
                raise ConfigError(f"{error} ({found[0]} stands in {self.file.path})") from error
            raise

    def of_training(self, recipe: type[Recipe], names: set[str]) -> dict[str, str]:
        """Return what is given of the training; the command line wins over the file.

        Raises:
            ConfigError: two settings contradict each other, or one is not in the record of a run.
        """
        flags = {name: text for name, text in self.flags.items() if name in names}
        filed = {name: text for name, text in self.file.complete(field_names(recipe)).items() if name in names}
        if "epochs" in flags:
            filed.pop("max_steps", None)
        for places in (flags, {} if self.file.is_record else filed):
            if "epochs" in places and places.get("max_steps", "none").lower() not in ("none", "null"):
                raise ConfigError(
                    "epochs and max_steps are both given, but each sets the length of the schedule: keep one"
                )
        for name, text in filed.items():
            if self.file.is_record and "?..." in text and name not in flags:
                raise ConfigError(f"{name} in {self.file.path} lacks its key, which no run records: pass --{name}")
        return filed | flags

    def words_of_file(self, names: set[str]) -> list[str]:
        """Write what the file says of these settings, and the command line does not, as words of a command line."""
        named = {name: text for name, text in self.file.values.items() if name in names | {"recipe"}}
        return [f"--{name}={text}" for name, text in named.items() if name not in self.flags]


def _refuse_empty(names: Sequence[str], *configs: Any) -> None:
    for name in names:
        values = [getattr(config, name) for config in configs if hasattr(config, name)]
        if not any(values):
            raise ConfigError(f"{name} is empty: {_REMEDIES.get(name, f'pass --{name}')}")


def _answered(argv: Sequence[str], help_of: Callable[[list[str]], str]) -> bool:
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
        print(text.strip("\n"))
    return True


def version_text() -> str:
    """Name this project's version and those of the libraries that decide what a run computes."""
    found = [f"face-mae-trainer {trainer.__version__}"]
    for name in ("torch", "deepspeed", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _as_it_began(recipe: R, record: Path, flags: Mapping[str, str]) -> R:
    """Keep what an update brought away from a run that began before it, unless the command line asks for it."""
    try:
        recorded = dict(json.loads(record.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return recipe  # no run, or one that `resume.check_run` refuses
    recipe, kept = keep_legacy_values(recipe, recorded, flags)
    if kept and is_main():
        values = ", ".join(f"{name} {value!r}" for name, value in kept.items())
        logger.warning("this run began before an update of the defaults and goes on as it began, with %s", values)
    return recipe


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


def read_flags(argv: Sequence[str]) -> dict[str, str]:
    """Collect ``--name value``, ``--name=value`` and ``--override name=value`` as text.

    What the deepspeed launcher adds (``--local_rank=N``, ``--deepspeed``) is dropped; ``--deepspeed_config FILE`` and
    ``--deepspeed FILE`` are ``--ds_config FILE``.

    Raises:
        ConfigError: an argument belongs to no setting, or a setting is given twice with different values.
    """
    import fire  # here: a script explains a missing package once it runs
    from fire.core import FireExit
    from fire.decorators import SetParseFn

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


def without_settings(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Return a command line without these settings, their values, and ``--config``; other words keep their order."""
    kept: list[str] = []
    words = zip(argv, [*argv[1:], "--"], strict=False)
    for word, after in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        if name == "override":
            name = (word.partition("=")[2] if equals else after).partition("=")[0].lstrip("-")
        dropped = word.startswith("--") and name.replace("-", "_") in {*names, "config"}
        if not dropped:
            kept.append(word)
        if word == "--override" or (dropped and not equals and not after.startswith("--")):
            value, _ = next(words, ("", ""))
            kept += [] if dropped else [value]
    return kept


def given_settings(argv: Sequence[str]) -> dict[str, str]:
    """Return the settings that a command line and its ``--config`` name, as text; the command line wins.

    Raises:
        ConfigError: either cannot be read.
    """
    return _Given.of(argv).named


def given_places(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return the settings of a command line and of its ``--config`` as text, to find the one that leads to a file."""
    pairs = flag_pairs(argv)
    with contextlib.suppress(TrainerError):
        for path in [value for name, value in pairs if name == "config"]:
            pairs += read_settings_file(path).values.items()
    return pairs
