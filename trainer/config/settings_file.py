"""Settings from a file: a YAML or JSON mapping of names to values, or the recipe.json that a run recorded.

Values stay the text that stands in the file and are parsed as those of the command line: 2024_01 is a folder here, not
a number.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.foreign_names import RENAMED
from trainer.config.parse import Bare
from trainer.config.record import complete_record
from trainer.errors import ConfigError

_RECORDED = ("recipe", "runtime")


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """What ``--config FILE`` gives; empty without it."""

    path: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    """Setting -> text, as the command line would have it."""
    is_record: bool = False
    """Whether a run wrote it: then it names every setting that the version of that time knew."""

    def complete(self, recipe_names: Iterable[str]) -> dict[str, str]:
        """Return the values; those that an old record lacks are the ones under which its run behaved."""
        if not self.is_record:
            return dict(self.values)
        whole = complete_record(self.values, set(recipe_names))
        return {name: _text(self.path, name, value) for name, value in whole.items()}


def read_settings_file(path: str) -> SettingsFile:
    """Read the file of ``--config``.

    Raises:
        ConfigError: it cannot be read, is malformed, names a setting twice, or holds something else than settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"config is {path!r}, which cannot be read: {reason}") from error
    found = _from_json(path, text) if path.endswith(".json") else _from_yaml(path, text)
    if not isinstance(found, dict):
        raise ConfigError(f"config is {path!r}, which holds no settings: write lines such as 'seed: 3'")
    is_record = isinstance(found.get("recipe"), dict)
    if is_record:
        parts = [found.get(part, {}) for part in _RECORDED]
        if not all(isinstance(part, dict) for part in parts):
            raise ConfigError(f"config is {path!r}, whose runtime is no mapping: name the recipe.json of a run")
        found = {RENAMED.get(name, name): value for part in parts for name, value in part.items()}
    values = {name.replace("-", "_"): _text(path, name, value) for name, value in found.items()}
    return SettingsFile(path, values, is_record)


def _from_json(path: str, text: str) -> Any:
    """Read JSON; numbers stay text."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(_once(path, pairs))

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str, parse_constant=str)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"config is {path!r}, which is not valid JSON: {error}") from error


def _from_yaml(path: str, text: str) -> Any:
    """Read YAML; everything but null stays text."""
    import yaml  # --help needs none

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012  (as the class of PyYAML)
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            pairs = [tuple(self.construct_object(part, True) for part in pair) for pair in node.value]
            return dict(_once(path, pairs))

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config is {path!r}, which is not valid YAML: {reason}") from error


def _once(path: str, pairs: Iterable[tuple[Any, Any]]) -> Iterable[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if not isinstance(name, str):
            raise ConfigError(f"config is {path!r}, which names a setting {name!r}: names are words")
        if name in seen:
            raise ConfigError(f"config is {path!r}, which names {name} twice: keep one")
        seen.add(name)
        yield name, value


def _text(path: str, name: str, value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return Bare("none")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(_text(path, name, entry) for entry in value)
    if isinstance(value, dict):
        raise ConfigError(
            f"config is {path!r}, in which {name} holds settings of its own: write all on one level; "
            "DeepSpeed's JSON is given as --ds_config FILE"
        )
    return str(value)
