"""From the members of a tar to samples: which image, which label, which group values, and what is left out.

Neighbouring members that share a name up to the first dot are one sample, as in webdataset. Its image is its only image
member, or the one with a plain suffix, or the one that ``image_member`` names. Label and group values come from the
``.cls`` and ``.json`` with the image's own middle part (``0.left.json`` beside ``0.left.jpg``), or from the plain ones.

Every member is either used or counted as left out, with the reason, so that the sums agree.

Examples of names: ``a/001.left.jpg`` is suffix ``left.jpg`` of sample ``a/001``; ``v1.2/001.JPG`` is suffix ``jpg`` of
``v1.2/001``, because dots of folders do not count; ``README``, ``.hidden`` and ``__meta__/x.jpg`` belong to no sample.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.data.labels import class_of
from trainer.data.shards.tar import Member
from trainer.errors import ConfigError, DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
"""Suffixes of image members; `trainer.data.transforms.decode` reads the format from the bytes."""
NO_LABEL = -1
IDENTITY_FIELDS = ("identity", "identity_2")
"""Fields of a sample's json that name the person in the image; a morph has both parents."""
FACE_CROP = "face_crop"
"""Field of a sample's json: how the image was cropped to its face, see `trainer.data.transforms.faces`."""
GROUP_FIELDS = ("source", "attack", *IDENTITY_FIELDS, FACE_CROP)
"""Fields of a sample's json that the index keeps, if they are short texts or integers."""
CLASS_FIELD = "class"
"""Field of a sample's json: the name of its class, if folders made the labels."""
LANDMARKS = "landmarks"
"""Field of a sample's json: [[x, y], ...] in pixels of its image."""
MAX_JSON_BYTES = 16 << 20
"""The index reads every json, so a longer one is refused."""

_MAX_GROUP_CHARS = 200
_MAX_REASONS = 50
# The rule of webdataset.tariterators.base_plus_ext: folders, then the file name, split at its first dot.
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
# webdataset.tariterators skips its own names, such as __key__ and __url__.
_CONTAINERS_OWN = re.compile(r"__[^/]*__(?:$|/)", re.DOTALL)
_FORMER_MAX_JSON_BYTES = 64 << 10
"""Before index version 4 a longer json was ignored."""


@dataclass(slots=True)
class Tally:
    """Counts of a walk over shards: members used and left out, labels, and values that mean nothing."""

    num_members: int = 0
    num_used: int = 0
    """Members that the trainer reads: num_members = num_used + left_out."""
    num_samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    """Class -> samples, `NO_LABEL` for those without one."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why a member is not used -> members."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Which value means nothing (label, json, identity, ...) -> samples."""
    examples: dict[str, str] = field(default_factory=dict)
    """One member or value for each of these reasons."""
    by_new_rules: bool = False
    """Whether index versions before 4 read a sample differently: then equal bytes are different samples."""

    def leave_out(self, reason: str, name: str) -> None:
        """Count a member that is not used."""
        known = reason in self.left_out or len(self.left_out) < _MAX_REASONS
        self.left_out[reason if known else "others"] += 1
        self.examples.setdefault(reason if known else "others", name)

    def cannot_use(self, what: str, example: str) -> None:
        """Count a value that means nothing."""
        self.unusable[what] += 1
        self.examples.setdefault(f"unusable {what}", example)

    def add(self, other: "Tally") -> None:
        """Count what another shard holds."""
        for name in ("num_members", "num_used", "num_samples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("labels", "left_out", "unusable"):
            getattr(self, name).update(getattr(other, name))
        self.examples = other.examples | self.examples
        self.by_new_rules |= other.by_new_rules

    def notes(self) -> list[str]:
        """Describe what is left out and what cannot be used, each with an example; empty for nothing."""
        out = [f"{count} {reason} (such as {self.examples[reason]})" for reason, count in self.left_out.most_common()]
        bad = [
            f"{count} samples have an unusable {what} (such as {self.examples[f'unusable {what}']})"
            for what, count in self.unusable.most_common()
        ]
        return ([f"members left out: {', '.join(out)}"] if out else []) + bad

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        numbers: dict[str, Any] = {
            name: getattr(self, name) for name in ("num_members", "num_used", "num_samples", "by_new_rules")
        }
        texts = {name: dict(getattr(self, name)) for name in ("left_out", "unusable", "examples")}
        return numbers | texts | {"labels": sorted(self.labels.items())}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> "Tally":
        """Read the result of `to_dict`."""
        counters = {name: Counter(record[name]) for name in ("left_out", "unusable")}
        labels = Counter({int(label): int(count) for label, count in record["labels"]})
        return Tally(**(record | counters | {"labels": labels}))


@dataclass(slots=True)
class Sample:
    """What the trainer uses of one sample."""

    key: str
    suffixes: set[str]
    image: Member
    label: int = NO_LABEL
    landmarks_span: tuple[int, int] = (0, 0)
    """Offset and size of its json, if that holds landmarks, otherwise zeros [bytes]."""
    groups: dict[str, str] = field(default_factory=dict)
    """Values of the `GROUP_FIELDS` that its json holds."""


def check_image_member(image_member: str | None) -> None:
    """Check the setting.

    Raises:
        ConfigError: it is no suffix, because it holds a slash or nothing.
    """
    if image_member is not None and ("/" in image_member or not image_member.strip("*. ")):
        raise ConfigError(f"image_member is {image_member!r}, but must be a suffix such as jpg or left.jpg")


def samples_of(
    location: str, members: Iterator[Member], *, image_member: str | None = None, tally: Tally | None = None
) -> Iterator[Sample]:
    """Group neighbouring members as webdataset does.

    Args:
        location: the shard, for messages.
        members: from `walk_tar`, small members with their bytes.
        image_member: suffix of the image to read, such as ``left.jpg`` or ``left``, if samples hold several.
        tally: counts members, samples and labels; None counts nothing.

    Raises:
        DataError: a sample has no image or several to choose from, a key comes back later, or a json is too long.
    """
    tally = Tally() if tally is None else tally
    for key, found in _neighbours(location, members, tally):
        yield _sample_of(location, key, found, image_member, tally)


def key_of(name: str) -> tuple[str, str] | None:
    """Split the name of a member into key and suffix (lower case); None if it is no part of a sample.

    Example: the key ends at the first dot of the file name: ``v1.2/anna.left.JPG`` is ``v1.2/anna`` and ``left.jpg``.
    """
    match = _KEY_AND_SUFFIX.fullmatch(name)
    return None if match is None or _CONTAINERS_OWN.match(name) else (match[1], match[2].lower())


def why_left_out(name: str) -> str:
    """Return the reason why a member without a key is no part of a sample."""
    if _CONTAINERS_OWN.match(name):
        return "names of the container (__x__)"
    return "hidden files" if name.rpartition("/")[2].startswith(".") else "names without a suffix"


def _neighbours(location: str, members: Iterator[Member], tally: Tally) -> Iterator[tuple[str, dict[str, Member]]]:
    current, found = "", dict[str, Member]()
    seen: set[str] = set()
    for member in members:
        tally.num_members += 1
        split = key_of(member.name)
        if split is None:
            tally.leave_out(why_left_out(member.name), member.name)
            continue
        key, suffix = split
        if key != current:
            if found:
                yield current, found
            if key in seen:
                raise DataError(
                    f"shard {location}: the members of sample {key!r} are not neighbours: write the tar with "
                    "--sort=name, or join them into new shards with tools/check_shards.py --repair FOLDER"
                )
            seen.add(key)
            current, found = key, {}
        if suffix in found:
            raise DataError(
                f"shard {location}: sample {key!r} has two members .{suffix}: write the shard again, or save what is "
                "clear with tools/check_shards.py --repair FOLDER"
            )
        found[suffix] = member
    if found:
        yield current, found


def _sample_of(location: str, key: str, found: dict[str, Member], image_member: str | None, tally: Tally) -> Sample:
    chosen = _image_suffix(location, key, found, image_member)
    middle = chosen.rpartition(".")[0]
    text_suffixes = {kind: _beside(found, middle, kind) for kind in ("cls", "json")}
    used = {chosen} | {suffix for suffix in text_suffixes.values() if suffix}
    sample = Sample(key, set(found), found[chosen])
    values = _json_values(location, sample, found.get(text_suffixes["json"]), tally)
    _set_label(sample, found.get(text_suffixes["cls"]), values.get("label"), tally)
    _compare_class(sample, values, tally)
    _set_groups(sample, values, tally)
    for suffix in found.keys() - used:
        kind = suffix.rpartition(".")[2]
        tally.leave_out("other images" if kind in IMAGE_SUFFIXES else f".{kind}", found[suffix].name)
    num_images = sum(_is_image(suffix) for suffix in found)
    # Before index version 4 such samples were read differently.
    tally.by_new_rules |= key.startswith("__") or num_images > 1 or any("." in s for s in text_suffixes.values())
    tally.num_used += len(used)
    tally.num_samples += 1
    tally.labels[sample.label] += 1
    return sample


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def image_candidates(images: list[str], image_member: str | None) -> list[str]:
    """Return the image suffixes to choose from: the named one, else plain ones such as ``jpg``, else all."""
    if image_member is not None:
        wanted = _wanted(image_member)
        return [suffix for suffix in images if wanted in (suffix, suffix.rpartition(".")[0])]
    return [suffix for suffix in images if "." not in suffix] or images


def _wanted(image_member: str) -> str:
    return image_member.removeprefix("*").lstrip(".").lower()


def _image_suffix(location: str, key: str, found: dict[str, Member], image_member: str | None) -> str:
    """Choose the image of a sample."""
    images = sorted(filter(_is_image, found))
    candidates = image_candidates(images, image_member)
    if len(candidates) == 1:
        return candidates[0]
    where = f"shard {location}: sample {key!r}"
    shown = ", ".join(f".{suffix}" for suffix in sorted(found))
    if not images:
        raise DataError(
            f"{where} has no image member (.{', .'.join(IMAGE_SUFFIXES)}), only {shown}: leave it out with "
            "tools/check_shards.py --repair FOLDER, or pack other image formats with tools/make_shards.py"
        )
    if image_member is not None and not candidates:
        raise DataError(
            f"{where} has no image .{_wanted(image_member)}, only {shown}: set --image_member to one that every sample "
            "has"
        )
    dots = (
        ""
        if all("." not in suffix for suffix in candidates)
        else f"; a key ends at the first dot of the file name, so if these are several pictures named {key}.x.jpg, "
        "pack them again with tools/make_shards.py"
    )
    raise DataError(
        f"{where} has {len(candidates)} images (.{', .'.join(candidates)}): choose one with --image_member "
        f"{candidates[0]}{dots}"
    )


def _beside(found: dict[str, Member], middle: str, kind: str) -> str:
    """Return the suffix of the text that belongs to the image; empty if there is none."""
    own = f"{middle}.{kind}"
    return own if middle and own in found else kind if kind in found else ""


def _json_values(location: str, sample: Sample, member: Member | None, tally: Tally) -> dict[str, Any]:
    """Read a sample's json; fields of other tools are ignored."""
    if member is None:
        return {}
    if member.size > MAX_JSON_BYTES:
        raise DataError(
            f"shard {location}: the json of sample {sample.key!r} has {member.size} bytes, more than the limit of "
            f"{MAX_JSON_BYTES}: keep large arrays in a member of their own, such as .npy"
        )
    if member.payload is None:
        return {}
    try:
        values = json.loads(member.payload)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        tally.cannot_use("json", f"{member.name}: {member.payload[:20].decode('utf-8', 'replace')!r}")
        return {}
    if values.get(LANDMARKS):
        sample.landmarks_span = member.offset, member.size
    tally.by_new_rules |= member.size >= _FORMER_MAX_JSON_BYTES
    return values


def _set_label(sample: Sample, cls: Member | None, json_label: object, tally: Tally) -> None:
    """Set the class that cls and json agree on; an empty value counts as missing, a contradiction as unusable."""
    stated: dict[str, object] = {}
    if cls is not None and cls.payload is not None:
        stated["cls"] = cls.payload[:100].decode("ascii", "replace").strip()
    if not _is_missing(json_label):
        stated["json"] = json_label
    classes = {number for value in stated.values() if (number := class_of(value)) is not None}
    if len(classes) == 1:
        sample.label = classes.pop()
        plain = re.fullmatch("[0-9]{1,9}", str(stated.get("cls", ""))) or type(stated.get("json")) is int
        tally.by_new_rules |= not plain
    elif stated:
        tally.by_new_rules |= len(classes) > 1
        shown = " and ".join(f"{where} {str(value)[:40]!r}" for where, value in stated.items())
        tally.cannot_use("label", f"{sample.key}: {shown}")


def _compare_class(sample: Sample, values: dict[str, Any], tally: Tally) -> None:
    """Count a label that contradicts the name of the class beside it.

    make_shards of release 0.1 numbered folders in sorted order, so that ``attack`` became 0 and ``bonafide`` 1.
    """
    name = values.get(CLASS_FIELD)
    if isinstance(name, str) and not name.strip().isdigit() and sample.label in (0, 1):
        number = class_of(name)
        if number not in (None, sample.label):
            tally.cannot_use(CLASS_FIELD, f"{sample.key}: {name[:40]!r} has label {sample.label}")


def _set_groups(sample: Sample, values: dict[str, Any], tally: Tally) -> None:
    for name in GROUP_FIELDS:
        value = values.get(name)
        if _is_missing(value):
            continue
        if isinstance(value, float) and value.is_integer():  # pandas makes 7.0 of 7 in a column with gaps
            tally.by_new_rules, value = True, int(value)
        if type(value) in (str, int) and len(str(value)) <= _MAX_GROUP_CHARS:
            sample.groups[name] = str(value)
        else:
            tally.cannot_use(name, f"{sample.key}: {str(value)[:40]!r}")


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
