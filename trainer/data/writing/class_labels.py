"""From names of classes, in folders or in a column, to class numbers.

The names of the two classes of detection have fixed numbers: [bonafide, morph] = [0, 1]. The user maps other names with
``label_map``. If all names are unknown folders, and more than two, they are numbered in sorted order. The mapping is
always printed.
"""

import re
from collections.abc import Iterable

from trainer.data.labels import class_of
from trainer.errors import ConfigError

_CODE = re.compile(r"[0-9.]+|true|false", re.IGNORECASE)
"""Labels that data sets use for either class, so that the user may swap them."""
SORTED = "sorted"
"""Value of ``label_map`` that numbers the names in sorted order."""


def parse_label_map(text: str | None) -> dict[str, int] | None:
    """Read ``name=number,name=number``; None if there is no map, or names are to be sorted.

    Raises:
        ConfigError: the text has another form.
    """
    if text in (None, SORTED):
        return None
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name or not re.fullmatch("[0-9]{1,9}", number) or name in found:
            raise ConfigError(
                f"label_map is {text!r}, but must be names with numbers such as 'real=0,fake=1', or {SORTED}"
            )
        found[name] = int(number)
    if not found:
        raise ConfigError(f"label_map is {text!r}, but names no class: write 'real=0,fake=1'")
    return found


def class_numbers(names: Iterable[str], label_map: str | None, *, where: str, may_sort: bool) -> dict[str, int]:
    """Return the class number of each name.

    Args:
        names: names of folders, or values of the column label.
        label_map: the user's own numbers, as `parse_label_map` reads them.
        where: the source of the names, for messages.
        may_sort: number more than two unknown names in sorted order.

    Raises:
        ConfigError: a name means no class, or the map does not fit the names.
    """
    distinct, own = sorted(set(names)), parse_label_map(label_map)
    if label_map == SORTED:
        own = {name: number for number, name in enumerate(distinct)}
    if own is not None:
        strangers = [name for name in distinct if name not in own and class_of(name) is None]
        unused = [name for name in own if name not in distinct]
        if strangers or unused:
            fault = f"does not name {strangers[0]!r}" if strangers else f"names {unused[0]!r}, which is not there"
            raise ConfigError(f"label_map is {label_map!r}, but {fault}: {where} holds {_shown(distinct)}")
    for name, number in (own or {}).items():
        if not _CODE.fullmatch(name) and class_of(name) not in (None, number):
            raise ConfigError(
                f"label_map is {label_map!r}, but {name!r} would be {number} and means {class_of(name)}: bonafide is 0 "
                "and morph is 1 everywhere here; leave it as it is, or give it another name"
            )
    known = {name: (own or {}).get(name, class_of(name)) for name in distinct}
    unknown = [name for name, number in known.items() if number is None]
    if may_sort and len(unknown) == len(distinct) > 2:
        return {name: number for number, name in enumerate(distinct)}
    if unknown:
        example = ",".join(f"{name}=N" for name in distinct[:3])
        raise ConfigError(
            f"{where} holds {_shown(distinct)}, and {unknown[0]!r} is no known class: map the names with --label_map "
            f"'{example}', where N is 0 for bona fides and 1 for morphs, or with --label_map {SORTED} in this order"
        )
    return {name: number for name, number in known.items() if number is not None}


def describe_classes(numbers: dict[str, int]) -> str:
    """Describe which name became which class."""
    return ", ".join(f"{name} -> {number}" for name, number in sorted(numbers.items(), key=lambda pair: pair[::-1]))


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more
