"""From the text of a command line to typed, checked settings; and their help."""

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trainer.config import foreign_names
from trainer.config.settings import Recipe, Runtime, field_names, type_text, union_members
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


def refuse_unknown(flags: Mapping[str, str], known: Collection[str]) -> None:
    """Raise `ConfigError` with the nearest valid names if a flag is unknown."""
    for name in flags:
        if name not in known:
            raise ConfigError(f"unknown setting --{name}: {foreign_names.hint(name, known)}")


def with_flags(config: C, flags: Mapping[str, str]) -> C:
    """Return the frozen dataclass with those of the flags that are its own, parsed by their types.

    Raises:
        ConfigError: a value has the wrong type or range.
    """
    hints = typing.get_type_hints(type(config))
    mine = {name: _parse(name, text, hints[name]) for name, text in flags.items() if name in hints}
    return dataclasses.replace(config, **mine)


def help_text(config: Any, title: str) -> str:
    """Describe every setting with its meaning, unit and default; of a configuration instead of a class, its value."""
    is_class = isinstance(config, type)
    lines, docs = [f"\n{title}:"], field_docs(config if is_class else type(config))
    for entry in dataclasses.fields(config):
        shown = f"Default: {as_text(entry.default)}" if is_class else f"Value: {as_text(getattr(config, entry.name))}"
        lines.append(f"  --{entry.name} {_type_name(entry)}\n        {docs[entry.name]} {shown}")
    return "\n".join(lines)


def as_text(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "[]"
    return {"True": "true", "False": "false", "None": "none", "": "''"}.get(str(value), str(value))


class Bare(str):
    """The text of a setting after which no value stands: right for a boolean only."""

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
    if isinstance(text, Bare) and bool not in options:
        raise ConfigError(f"{name} has no value: write --{name} VALUE")
    if type(None) in options and lowered in ("none", "null"):
        return None
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


def _type_name(entry: "dataclasses.Field[Any]") -> str:
    return type_text(entry.type)


def field_docs(config: type) -> dict[str, str]:
    """Read the docstring that stands under each field, which Python itself does not keep."""
    docs = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs
