"""Class numbers of labels: numbers as data sets write them, and the names of the two classes of detection.

Classes of detection are [bonafide, morph] = [0, 1]. Ambiguous labels are no class: 23.5, -1 or ``fake``.
"""

import math
import re

CLASSES = ("bona fide", "morph")
"""What messages and pictures call the classes of detection, by their number."""

CLASS_NAMES: dict[str, int] = {
    "bonafide": 0,
    "genuine": 0,
    "morph": 1,
    "morphs": 1,
    "morphed": 1,
    "attack": 1,
    "attacks": 1,
}
"""Name -> class. Names are compared in lower case, without spaces, hyphens and underscores."""

_FLAGS = {"false": 0, "true": 1}
_MAX_CLASS = 2**31 - 1


def class_of(value: object) -> int | None:
    """Return the class number of a label; None if it is no class or ambiguous.

    Args:
        value: a number, a boolean (true is the attack), or a text such as ``1``, ``1.0``, ``"1"``, ``Bona fide``.
    """
    if isinstance(value, str):
        return _class_of_text(value.strip().strip("\"'").strip())
    if isinstance(value, bool | int | float):
        return int(value) if math.isfinite(value) and int(value) == value and 0 <= value <= _MAX_CLASS else None
    return None


def _class_of_text(text: str) -> int | None:
    if re.fullmatch(r"[0-9]{1,10}(\.0*)?", text):
        return class_of(float(text))
    name = re.sub(r"[\s_-]", "", text.casefold())
    return CLASS_NAMES.get(name, _FLAGS.get(name))
