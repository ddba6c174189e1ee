"""List the images to pack or split: of a folder tree, of a CSV or of tars; and count what is left out, by kind.

Every file below a folder and every member of a tar is an image to read, another member of a sample, or left out. What
is left out is counted, with the reason and an example. Links to folders are followed.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.data.labels import class_of
from trainer.data.shards.index import list_shards
from trainer.data.shards.members import (
    GROUP_FIELDS,
    LANDMARKS,
    MAX_JSON_BYTES,
    NO_LABEL,
    Sample,
    Tally,
    image_candidates,
    key_of,
    samples_of,
    why_left_out,
)
from trainer.data.shards.tar import Member, walk_tar
from trainer.data.storage import Span, is_url
from trainer.data.writing.class_labels import class_numbers, describe_classes
from trainer.data.writing.image_files import read_suffixes, why_not_read
from trainer.data.writing.manifest import Table, read_table
from trainer.errors import ConfigError, DataError

_OWN_COLUMNS = ("path", "key", "label")
_TEXT_KINDS = ("cls", "json")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Packed:
    """The members of a sample that lies in a tar."""

    image: Span
    others: tuple[tuple[str, Span], ...]
    """Suffix and location of the other members."""
    crc32: tuple[int, ...]
    """CRC-32 of the image and of the other members."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to pack."""

    path: Path
    """The image file, or the tar that holds it."""
    key: str
    label: int | None
    metadata: dict[str, Any] = field(hash=False)
    packed: Packed | None = None

    def json_text(self) -> bytes:
        """Return the sample's json member; a sample of a tar keeps its own."""
        label = {} if self.label is None else {"label": self.label}
        return json.dumps(label | self.metadata, sort_keys=True, ensure_ascii=False).encode()

    @property
    def name(self) -> str:
        """The image's name in messages."""
        return str(self.path) if self.packed is None else f"{self.path}: {self.key}"


@dataclass(frozen=True, slots=True)
class Source:
    """The images of a source, and what was counted while listing them."""

    location: str
    entries: list[Entry]
    tally: Tally
    """Files or members found, read and left out."""
    classes: dict[str, int] = field(default_factory=dict)
    """Name -> class number."""
    notes: tuple[str, ...] = ()
    """What else to print of it."""

    def describe(self) -> str:
        """Describe the number of images, what is left out, and which names became which classes."""
        among = f" among {self.tally.num_members} files" if self.tally.left_out else ""
        first = "; ".join([f"source {self.location}: {len(self.entries)} images{among}", *_left_out(self.tally)])
        classes = [f"classes: {describe_classes(self.classes)}"] if self.classes else []
        return "\n".join([first, *self.notes, *classes])


def _left_out(tally: Tally) -> list[str]:
    return [note.removeprefix("members ") for note in tally.notes()]  # of folders these are files


def read_source(
    source: str, *, folder_labels: bool = False, label_map: str | None = None, image_member: str | None = None
) -> Source:
    """List the images of a folder, a CSV or tars; see the functions below.

    Raises:
        ConfigError: the source does not exist or holds no image, or a setting does not fit its kind.
    """
    path = Path(source)
    for suffix in _COMPRESSED:
        if source.lower().endswith(suffix):
            raise ConfigError(f"source {source} is a compressed tar: unpack it (tar -xf), or decompress it to a .tar")
    if names_tars(source):
        for name, value in (("folder_labels", folder_labels), ("label_map", label_map)):
            if value:
                raise ConfigError(f"{name} is {value!r}, but the samples of tars have their own labels: leave it away")
        return read_tars(source, image_member)
    if image_member:
        raise ConfigError(f"image_member is {image_member!r}, but source {source} is no tar: leave it away")
    if path.is_file():
        if folder_labels:
            raise ConfigError(f"folder_labels is true, but source {source} is a file: write the labels into it")
        return read_manifest(path, label_map=label_map)
    if label_map and not folder_labels:
        raise ConfigError(f"label_map is {label_map!r}, but folder_labels is false: set it, or leave both away")
    return walk_folder(path, folder_labels=folder_labels, label_map=label_map)


def of_class(source: Source, only: str) -> Source:
    """Keep the images of one class, and count the others as left out.

    Args:
        source: with labels.
        only: ``both`` keeps all, ``bonafide`` class 0, ``morph`` class 1.

    Raises:
        ConfigError: no image is of that class.
    """
    if only == "both":
        return source
    kept, tally = [entry for entry in source.entries if entry.label == class_of(only)], source.tally
    for entry in source.entries:
        if entry.label != class_of(only):
            # A sample of a tar is its image and its other members.
            num_members = 1 + (len(entry.packed.others) if entry.packed else 0)
            tally.num_used -= num_members
            for _ in range(num_members):
                tally.leave_out(f"files of other classes than {only}", plain_text(entry.name))
    if not kept:
        raise ConfigError(f"only is {only!r}, but source {source.location} holds no image of that class: check labels")
    return replace(source, entries=kept)


def names_tars(source: str) -> bool:
    """Whether a source means tars, not a folder or a CSV."""
    path = Path(source)
    named = path.suffix.lower() == ".tar" if path.is_file() else ".tar" in source and not path.is_dir()
    return is_url(source) or named


# ---------------------------------------------------------------------------------------------- folders


def walk_folder(root: Path, *, folder_labels: bool, label_map: str | None = None) -> Source:
    """List the images below a folder, sorted by their relative paths.

    Raises:
        ConfigError: the folder does not exist or holds no image, or a folder name means no class.
        DataError: a folder cannot be read.
    """
    if not root.is_dir():
        some = "*" in str(root) or "?" in str(root)
        remedy = "name the folder itself, patterns are for tars" if some else "check the path"
        raise ConfigError(f"source is {str(root)!r}, but no such folder or CSV file exists: {remedy}")
    tally, relative = Tally(), []
    for path, problem in _files_below(root, frozenset()):
        tally.num_members += 1
        name = path.relative_to(root)
        reason = "hidden files" if any(part.startswith(".") for part in name.parts) else problem
        if not reason and path.suffix.lower() not in read_suffixes():
            reason = why_not_read(path.suffix)
        if reason:
            tally.leave_out(reason, plain_text(name.as_posix()))
        else:
            relative.append(name)
    tally.num_used = len(relative)
    if not relative:
        found = "; ".join(_left_out(tally)) or "it is empty"
        tars = f": its tars are packed with --source '{root}/*.tar'" if tally.left_out[".tar"] else ": check the path"
        raise ConfigError(f"source {root} holds no image ({', '.join(sorted(read_suffixes()))}; {found}){tars}")
    relative.sort(key=Path.as_posix)
    classes = _folder_classes(root, relative, label_map) if folder_labels else {}
    entries = [
        Entry(
            root / path,
            key_text(path.with_suffix("").as_posix()),
            classes[path.parts[0]] if folder_labels else None,
            {"path": plain_text(path.as_posix())} | ({"class": plain_text(path.parts[0])} if folder_labels else {}),
        )
        for path in relative
    ]
    return Source(str(root), entries, tally, classes)


def _folder_classes(root: Path, relative: list[Path], label_map: str | None) -> dict[str, int]:
    loose = next((path for path in relative if len(path.parts) == 1), None)
    if loose is not None:
        raise ConfigError(
            f"folder_labels is true, but images such as {loose} lie directly in {root}: put each class into a folder"
        )
    names = {path.parts[0] for path in relative}
    return class_numbers(names, label_map, where=f"source {root}", may_sort=True)


def _files_below(folder: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[tuple[Path, str]]:
    """Yield every file, also behind links, with the reason why it cannot be read, or an empty text."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"source: folder {folder} cannot be read ({error.strerror}): check its permissions") from error
    # Device and inode of all folders above: a link to one of them would lead in a circle.
    inside = ancestors | {(status.st_dev, status.st_ino)}
    for entry in entries:
        path = folder / entry.name
        try:
            mode = path.stat().st_mode if entry.is_symlink() else entry.stat().st_mode
        except OSError:
            yield path, "broken links"
            continue
        if not stat.S_ISDIR(mode):
            yield path, "" if stat.S_ISREG(mode) else "no regular files"
        elif entry.is_symlink() and _identity(path) in inside:
            yield path, "links that lead in a circle"
        else:
            yield from _files_below(path, inside)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


# ---------------------------------------------------------------------------------------------- CSV


def read_manifest(manifest: Path, *, label_map: str | None = None) -> Source:
    """Read a CSV with a column ``path`` (relative to the CSV), and optional ``key``, ``label`` and others.

    The order of the rows is kept. Labels are numbers from 0, names of the two classes, or names that ``label_map``
    holds. Other columns go into each sample's json as text.

    Raises:
        ConfigError: as `read_table`, or a label means no class.
    """
    table = read_table(manifest, setting="source")
    if LANDMARKS in table.columns:
        raise ConfigError(f"source {manifest} has a column {LANDMARKS!r}: put the points into an .npz, for --landmarks")
    paths = [manifest.parent / row["path"] for row in table.rows]
    plain = [Path(os.path.normpath(path.absolute())) for path in paths]  # without "..", for the keys
    root = Path(os.path.commonpath([path.parent for path in plain]))
    classes = _column_classes(manifest, table, label_map)
    entries = []
    for (line, row), path, full in zip(table.numbered, paths, plain, strict=True):
        relative = full.relative_to(root)
        key = key_text(row.get("key") or relative.with_suffix("").as_posix())
        if not key:
            raise ConfigError(f"source {manifest}, line {line}: key is {row['key']!r}: write a name")
        metadata = {name: value for name, value in row.items() if name not in _OWN_COLUMNS}
        label = classes.get(row.get("label", ""))
        entries.append(Entry(path, key, label, {"path": relative.as_posix(), **metadata}))
    named = {name: number for name, number in classes.items() if name != str(number)}
    return Source(str(manifest), entries, Tally(num_members=len(entries), num_used=len(entries)), named)


def _column_classes(manifest: Path, table: Table, label_map: str | None) -> dict[str, int]:
    texts = {row.get("label", "") for row in table.rows} - {""}
    if label_map and not texts:
        raise ConfigError(f"label_map is {label_map!r}, but source {manifest} has no labels: add a column label")
    try:
        return class_numbers(texts, label_map, where=f"source {manifest}", may_sort=False)
    except ConfigError as error:
        strange = next((text for text in sorted(texts) if f"{text!r} is no known class" in str(error)), None)
        line = next((line for line, row in table.numbered if row.get("label") == strange), None)
        raise ConfigError(str(error) + (f" (first in line {line})" if line else "")) from error


# ---------------------------------------------------------------------------------------------- tars


def read_tars(patterns: str, image_member: str | None = None) -> Source:
    """List the samples of tars. Members of one sample need not stand together.

    If a sample has several images, the one with a plain suffix is used, or the one that ``image_member`` names.

    Raises:
        ConfigError: no tar is found.
        DataError: a tar is damaged, or a sample has several images to choose from.
    """
    tally, entries = Tally(), []
    for location in list_shards(patterns, setting="source"):
        for key, found in _samples_by_key(location, tally).items():
            entries.append(_packed_entry(location, key, found, image_member, tally))
    if not entries:
        raise ConfigError(f"source {patterns} holds no sample ({'; '.join(tally.notes()) or 'the tars are empty'})")
    return Source(patterns, entries, tally)


def _samples_by_key(location: str, tally: Tally) -> dict[str, dict[str, Member]]:
    """Group the members by key; only text members keep their bytes."""
    samples: dict[str, dict[str, Member]] = {}
    for member in walk_tar(location, keep_payload_below=MAX_JSON_BYTES + 1):
        tally.num_members += 1
        split = key_of(member.name)
        if split is None:
            tally.leave_out(why_left_out(member.name), plain_text(member.name))
            continue
        key, suffix = split
        found = samples.setdefault(key, {})
        if suffix in found:
            raise DataError(f"shard {location}: sample {key!r} has two members .{suffix}: remove one of them")
        text = suffix.rpartition(".")[2] in _TEXT_KINDS
        found[suffix] = member if text else replace(member, payload=None)
    return samples


def _packed_entry(location: str, key: str, found: dict[str, Member], image_member: str | None, tally: Tally) -> Entry:
    chosen = _choose_image(location, key, found, image_member)
    # Beside 0.left.jpg, 0.left.json is renamed to json, and it comes before a plain 0.json, which is then left out.
    middle = chosen.rpartition(".")[0]
    kept = {}
    for suffix, member in sorted(found.items(), key=lambda pair: not pair[0].startswith(f"{middle}.")):
        new = suffix.removeprefix(f"{middle}.") if middle else suffix
        if suffix != chosen and _is_image(suffix):
            tally.leave_out("other images of a sample", plain_text(member.name))
        elif suffix != chosen and (new in kept or new.startswith("_")):
            tally.leave_out(f".{suffix} beside .{chosen}", plain_text(member.name))
        elif suffix != chosen:
            kept[new] = member
    tally.num_used += 1 + len(kept)
    new_key = key_text(key, dots=True)
    sample = _as_trainer_reads(location, new_key, found[chosen], kept, tally)
    members = [found[chosen], *kept.values()]
    return Entry(
        Path(location),
        new_key,
        None if sample.label == NO_LABEL else sample.label,
        dict(sample.groups),
        Packed(
            Span(location, found[chosen].offset, found[chosen].size),
            tuple((suffix, Span(location, member.offset, member.size)) for suffix, member in kept.items()),
            tuple(member.crc32 for member in members),
        ),
    )


def _as_trainer_reads(location: str, key: str, image: Member, kept: dict[str, Member], tally: Tally) -> Sample:
    """Return the sample with the label and groups that the trainer will read."""
    named = [replace(image, name=f"{key}.png"), *(replace(m, name=f"{key}.{s}") for s, m in kept.items())]
    mine = Tally()
    (sample,) = samples_of(location, iter(named), tally=mine)
    for what in mine.unusable:
        tally.cannot_use(what, mine.examples[f"unusable {what}"])
    return sample


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in read_suffixes()


def _choose_image(location: str, key: str, found: dict[str, Member], image_member: str | None) -> str:
    images = sorted(filter(_is_image, found))
    candidates = image_candidates(images, image_member)
    if len(candidates) != 1:
        shown = ", ".join(f".{suffix}" for suffix in sorted(found))
        remedy = f"name one with --image_member {images[0]}" if images else "remove the sample"
        raise DataError(
            f"shard {location}: sample {key!r} has {len(candidates)} images to choose from ({shown}): {remedy}"
        )
    return candidates[0]


# ---------------------------------------------------------------------------------------------- names


def key_text(name: str, *, dots: bool = False) -> str:
    """Make a key from a name.

    A key ends at the first dot, so dots become underscores: ``p.01/a.b`` gives ``p_01/a_b``; ``dots`` keeps them. A
    leading ``__x__``, which webdataset skips, loses its leading underscores. Bytes that are no UTF-8 are escaped.
    """
    key = plain_text(name).lstrip("/")
    key = key if dots else key.replace(".", "_")
    first = key.partition("/")[0]
    return key.lstrip("_") if first.startswith("__") and first.endswith("__") else key


def plain_text(name: str) -> str:
    """Escape the bytes of a file name that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def with_distinct_keys(entries: list[Entry]) -> list[Entry]:
    """Add the suffix where two images would share a key: a.jpg and a.png become a_jpg and a_png.

    Raises:
        ConfigError: two images still share a key.
    """
    counts = Counter(entry.key for entry in entries)
    named = [
        replace(entry, key=entry.key + plain_text(entry.path.suffix).replace(".", "_"))
        if counts[entry.key] > 1 and entry.packed is None
        else entry
        for entry in entries
    ]
    key, count = Counter(entry.key for entry in named).most_common(1)[0]
    if count > 1:
        first, second = [entry.name for entry in named if entry.key == key][:2]
        remedy = "add a column key to the manifest" if named[0].packed is None else "pack these tars into two folders"
        raise ConfigError(f"{first} and {second} would both be stored as {key!r}: {remedy}")
    return named


def group_values(entry: Entry) -> dict[str, str]:
    """Return the group fields that the trainer must find in a sample."""
    return {name: str(entry.metadata[name]) for name in GROUP_FIELDS if entry.metadata.get(name)}
