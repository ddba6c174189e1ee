"""From the text of a command line to typed, checked settings; and their help."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.config import foreign_names
from trainer.config.checks import field_names, type_text, union_members
from trainer.config.settings import Recipe, Runtime
from trainer.errors import ConfigError

T = TypeVar("T", bound=Runtime)

R = TypeVar("R", bound=Recipe)

C = TypeVar("C", bound=Any)


def resolve(recipe: R, runtime: T, flags: Mapping[str, str]) -> tuple[R, T]:
    """Apply flags, given as text, to the two configurations.

    Raises:
        ConfigError: a name is unknown (the nearest valid ones are listed), or a value has the wrong type or range.
    """
    refuse_unknown(flags, field_names(type(recipe)) | field_names(type(runtime)))
    return with_flags(recipe, flags), with_flags(runtime, flags)


def refuse_unknown(flags: Iterable[str], known: Collection[str], *, path: str = "") -> None:
    """Raise `ConfigError` with the nearest valid names if a flag, or a name in the file ``path``, is unknown."""
    for name in flags:
        if name not in known:
            hint = foreign_names.hint(name, {*known, "config"})
            shown = f"unknown setting {name} in {path}" if path else f"unknown setting --{name}"
            raise ConfigError(f"{shown}: {hint}")


def with_flags(config: C, flags: Mapping[str, str]) -> C:
    """Return the frozen dataclass with those of the flags that are its own, parsed by their types.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    return dataclasses.replace(config, **_own(type(config), flags))


def from_flags(config: type[C], flags: Mapping[str, str]) -> C:
    """Make the dataclass from those of the flags that are its own, and its defaults.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    made: C = config(**_own(config, flags))
    return made


def _own(config: type, flags: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {name: _parse(name, text, hints[name]) for name, text in flags.items() if name in hints}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as --help and the reference of all settings describe it."""

    name: str
    kind: str
    """Its type, as `type_text` writes it."""
    doc: str
    """Its meaning and unit: the docstring under the field."""
    section: str
    """The comment above it, or above one of the fields before it, in the class that declares it."""
    value: Any
    """Of a configuration its value, of a class the default."""


def settings_of(config: Any) -> list[Setting]:
    """Describe the fields of a configuration, or of its class, section by section.

    Sections come in the order in which they first appear; fields of one section stand together, also those of
    different classes.
    """
    is_class = isinstance(config, type)
    notes = _field_notes(config if is_class else type(config))
    found = [
        Setting(
            entry.name,
            type_text(entry.type),
            *notes[entry.name],
            entry.default if is_class else getattr(config, entry.name),
        )
        for entry in dataclasses.fields(config)
    ]
    order = list(dict.fromkeys(setting.section for setting in found))
    return sorted(found, key=lambda setting: order.index(setting.section))


def help_text(config: Any, title: str, *, required: Collection[str] = ()) -> str:
    """Describe every setting by section, with its meaning, unit and value; of a class, with its default."""
    lines, section = [f"\n{title}:"], ""
    for setting in settings_of(config):
        if setting.section != section:
            section = setting.section
            lines.append(f"\n  {section}")
        shown = "(required)" if setting.name in required and not setting.value else f"= {as_text(setting.value)}"
        lines.append(f"    --{setting.name} {setting.kind} {shown}")
        lines += textwrap.wrap(
            setting.doc, 112, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
        )
    return "\n".join(lines)


def as_text(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "[]"
    return {"True": "true", "False": "false", "None": "none", "": "''"}.get(str(value), str(value))


class Bare(str):
    """The text of a setting without a value: true for a flag, none for a null of a file."""

    __slots__ = ()


def expand_home(text: str) -> str:
    """Write out ~ and ~user where a path may begin: at the front, and in lists and after names.

    A shell does it for bare words only: not in quotes, which patterns need, nor after an equals sign.
    """

    def home(found: "re.Match[str]") -> str:
        try:
            return str(Path(found[0]).expanduser())
        except RuntimeError:  # nobody is called so
            return found[0]

    return re.sub(r"(?<![^,;=])~[^/,;@]*(?=$|[/,;@])", home, text)


def _parse(name: str, text: str, hint: Any) -> Any:
    """Read one value from text; numbers and booleans as Python and YAML people write them, ~ as a shell does."""
    if typing.get_origin(hint) is tuple:
        words = (word.strip().strip("'\"") for word in text.strip().strip("[]()").split(","))
        return tuple(_parse(name, word, typing.get_args(hint)[0]) for word in words if word)
    options = union_members(hint)
    lowered = text.strip().lower()
    if type(None) in options and lowered in ("none", "null"):
        return None
    if isinstance(text, Bare) and bool not in options:
        raise ConfigError(f"{name} has no value: write --{name} VALUE")
    if bool in options:
        if lowered in ("true", "1", "yes", "on"):
            return True
        if lowered in ("false", "0", "no", "off"):
            return False
        raise ConfigError(f"{name} is {text!r}, but must be true or false")
    for number, noun in ((int, "an integer"), (float, "a number")):
        if number in options:
            try:
                return number(text)
            except ValueError:
                sides = text.lower().split("x")
                squares = len(sides) == 2 and all(side.strip().isdecimal() for side in sides)
                hint = ": training and evaluation see squares, only tools/export.py takes HEIGHTxWIDTH"
                raise ConfigError(f"{name} is {text!r}, but must be {noun}{hint if squares else ''}") from None
    return expand_home(text)


_SECTION = re.compile(r"    # (.+)")


def _field_notes(config: type) -> dict[str, tuple[str, str]]:
    """Read what stands in the source around each field: the docstring under it, and the section comment above it."""
    notes = {}
    for owner in reversed(config.__mro__[:-1]):
        source, section = inspect.getsource(owner), ""
        lines, body = source.splitlines(), ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                if above := _SECTION.fullmatch(lines[field.lineno - 2]):
                    section = above[1]
                notes[field.target.id] = (" ".join(str(ast.literal_eval(below.value)).split()), section)
    return notes
