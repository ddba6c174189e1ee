"""Shards: which files, which samples, and how one sample's bytes are read back.

A shard is a plain tar in webdataset's layout (see `members`). The first use of a set of shards reads every byte
once, strictly, and writes an *index*: flat arrays that are memory-mapped, so a billion samples cost no memory and
open at once.

The name of an index folder is a hash of the shards' locations and of the choice of the image member, so sets with
equal file names may share one ``--index_dir``. The index holds the lengths and versions of its shards.

Layout of an index folder::

    index.json      version, fingerprint, counts (samples, labels, people, left out), and the group fields that occur
    shards.json     name, length, version and sha256 of every shard; read only to check the index
    shard_end.i64 shard_tag.u64   one entry a shard: number of samples up to its end, and the start of its sha256
    offset.i64 size.i64 crc32.u32 label.i32 key_end.i64 keys.utf8         one entry a sample, in shard order
    marks_offset.i64 marks_size.i32                                       its json, if that holds landmarks
    group-FIELD.i32 group-FIELD.json                                       code of the field's value, and the values

Example: shards of 3 and 2 samples have shard_end 3, 5; keys "a", "bc", "d" have key_end 1, 3, 4 in "abcd".

The fingerprint depends on the bytes of the shards, their order and the choice of the image member, but not on their
location.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.contents import NO_GROUP as NO_GROUP
from trainer.data.shards.contents import SHARD_COLUMNS as SHARD_COLUMNS
from trainer.data.shards.contents import ShardContents, read_contents, stamp_of, with_retries
from trainer.data.shards.members import GROUP_FIELDS, IDENTITY_FIELDS, NO_LABEL, Tally, check_image_member
from trainer.data.storage import Span, check_ranges, find, is_url, place_of
from trainer.errors import ConfigError, DataError
from trainer.files import sync_files
from trainer.parallel import parallel_map

logger = logging.getLogger(__name__)

INDEX_VERSION = 4

_MIN_BYTES_A_PROCESS = 1 << 30
_MAX_LABELS_SHOWN = 20
_KEYS = "keys.utf8"


def list_shards(patterns: str, *, setting: str) -> list[str]:
    """Expand comma-separated paths, globs, folders, URLs and ``{000..099}`` ranges into locations, in sorted order.

    Args:
        patterns: what the user wrote.
        setting: the flag it came from, for messages.

    Raises:
        ConfigError: a pattern matches nothing, is a command, or a shard is named twice.
    """
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", patterns)]
    found = [location for part in parts if part for location in find(part, setting=setting, suffix=".tar")]
    if not found:
        raise ConfigError(f"{setting} is empty: name the shards, for example {setting} 'shards/*.tar'")
    location, count = Counter(map(place_of, found)).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{setting} names {location} more than once: every sample must be seen once an epoch")
    return sorted(found)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Location of one sample's image bytes: key, shard, offset and size [bytes], CRC-32 and label."""

    key: str
    shard: str
    offset: int
    size: int
    crc32: int
    label: int
    landmarks_offset: int = 0
    """Offset of the sample's json, if that holds landmarks [bytes]."""
    landmarks_size: int = 0
    """Length of that json [bytes]; 0 without landmarks."""


class ShardIndex:
    """What a set of shards holds, memory-mapped. Cheap to pickle: workers open the arrays themselves.

    Opening does not touch the shards: `open_index` has compared them with the index, once, on one rank.
    """

    def __init__(self, folder: Path, shards: list[str], fingerprint: str | None = None) -> None:
        """Open the index of these shards; the open arrays stay the same even if another job rebuilds the folder.

        Args:
            folder: of the index.
            shards: their locations, in the order of the index.
            fingerprint: the index's fingerprint as another process opened it; None accepts any.

        Raises:
            DataError: the folder is not a complete index of these shards, or has another fingerprint.
        """
        self.folder, self.shards = folder, shards
        header = _read_json(folder / "index.json")
        if header.get("version") != INDEX_VERSION or not header.get("fingerprint"):
            raise DataError(f"index {folder} has another version: it will be rebuilt")
        self.fingerprint = str(header["fingerprint"])
        """Hash of the bytes of all shards in order: equal if and only if the samples are equal."""
        if fingerprint not in (None, self.fingerprint):
            raise DataError(f"index {folder} was rebuilt for changed shards while this run opened it: start again")
        self.group_fields: tuple[str, ...] = tuple(header["group_fields"])
        """Those of `GROUP_FIELDS` that occur."""
        self._num_samples = int(header["num_samples"])
        if header["num_shards"] != len(shards) or self._num_samples == 0:
            raise DataError(f"index {folder} describes {header['num_shards']} shards instead of {len(shards)}")
        self.tally = Tally.from_dict(header["tally"])
        """Counts from reading the shards."""
        self.num_people = int(header["num_people"])
        """Distinct values of `IDENTITY_FIELDS`."""
        self._shard_end = self._map("shard_end.i64", np.int64, len(shards))
        self._shard_tag = self._map("shard_tag.u64", np.uint64, len(shards))
        self._columns = {name: self._map(name, dtype, len(self)) for name, dtype in SHARD_COLUMNS.items()}
        self._keys = np.memmap(folder / _KEYS, dtype=np.uint8, mode="r")
        self._groups = {name: self._open_group(name) for name in self.group_fields}

    def __len__(self) -> int:
        return self._num_samples

    def __reduce__(self) -> tuple[type["ShardIndex"], tuple[Path, list[str], str]]:
        return ShardIndex, (self.folder, self.shards, self.fingerprint)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of every sample, `NO_LABEL` for none; int32 (samples,)."""
        return self._columns["label.i32"]

    @property
    def image_crc32(self) -> NDArray[np.uint32]:
        """CRC-32 of every sample's image."""
        return self._columns["crc32.u32"]

    @property
    def image_bytes(self) -> NDArray[np.int64]:
        """Length of every sample's image [bytes]."""
        return self._columns["size.i64"]

    def groups(self, name: str) -> tuple[list[str], NDArray[np.int32]]:
        """Return the values of a group field, and for each sample the number of its value, `NO_GROUP` for none.

        Raises:
            DataError: no sample has that field.
        """
        if name not in self.group_fields:
            raise DataError(
                f"no sample of {self.shards[0]} and others has a field {name!r} in its json: write the shards from "
                "a manifest with that column (tools/make_shards.py)"
            )
        text_N, codes_N = self._groups[name]
        values: list[str] = json.loads(text_N.tobytes())
        return values, codes_N

    def samples_of_shards(self, first: int, end: int) -> tuple[int, int]:
        """Return the range of samples [first, end) that a range of shards holds."""
        return int(self._shard_end[first - 1]) if first else 0, int(self._shard_end[end - 1])

    def sample(self, i: int) -> SampleRef:
        """Return sample i, 0 <= i < len(self)."""
        return self.samples(np.array([i]))[0]

    def samples(self, sample_N: NDArray[np.int64]) -> list[SampleRef]:
        """Return several samples; see `sample`."""
        shard_N = np.searchsorted(self._shard_end, sample_N, side="right").tolist()
        # The key of sample i is keys[key_end[i - 1]:key_end[i]].
        ends = self._columns["key_end.i64"]
        start_N, end_N = np.where(sample_N > 0, ends[sample_N - 1], 0).tolist(), ends[sample_N].tolist()
        keys = [
            self._keys[a:b].tobytes().decode("utf-8", "surrogateescape") for a, b in zip(start_N, end_N, strict=True)
        ]
        numbers = (self._columns[name][sample_N].tolist() for name in SHARD_COLUMNS if name != "key_end.i64")
        return [
            SampleRef(key, self.shards[shard], *row) for key, shard, *row in zip(keys, shard_N, *numbers, strict=True)
        ]

    def blocks(self, sample_N: NDArray[np.int64], first_N: NDArray[np.int64], last_N: NDArray[np.int64]) -> list[Span]:
        """Return the bytes from image ``first`` to image ``last``, cut to the shard that holds ``sample``.

        Example: shards end at samples 3 and 5. The block 2..4 of sample 3 is cut to samples 3..4, which are in shard 1.
        """
        shard_N = np.searchsorted(self._shard_end, sample_N, side="right")
        begin_N = np.where(shard_N > 0, self._shard_end[shard_N - 1], 0)
        first_N, last_N = np.maximum(first_N, begin_N), np.minimum(last_N, self._shard_end[shard_N] - 1)
        offsets, sizes = self._columns["offset.i64"], self._columns["size.i64"]
        start_N, stop_N = offsets[first_N], offsets[last_N] + sizes[last_N]
        tag_N = self._shard_tag[shard_N]
        return [
            Span(self.shards[shard], start, stop - start, tag)
            for shard, start, stop, tag in zip(*(x.tolist() for x in (shard_N, start_N, stop_N, tag_N)), strict=True)
        ]

    def _open_group(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return the text of a field's values and the codes, both memory-mapped: a rebuild cannot change them."""
        try:
            text_N = np.memmap(self.folder / f"group-{name}.json", dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"index {self.folder}: group-{name}.json is missing or cut: remove the folder") from error
        return text_N, self._map(f"group-{name}.i32", np.int32, len(self))

    def _map(self, name: str, dtype: type[np.generic], length: int) -> NDArray[Any]:
        path = self.folder / name
        if not path.exists() or path.stat().st_size != length * np.dtype(dtype).itemsize:
            raise DataError(f"index {self.folder}: {name} is missing or cut: remove the folder, it will be rebuilt")
        return np.memmap(path, dtype=dtype, mode="r")


def open_index(
    locations: Sequence[str | os.PathLike[str]],
    *,
    index_dir: Path | None = None,
    image_member: str | None = None,
    num_processes: int = 1,
    on_shard: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Open the index of these shards; build it if it is missing or a shard has changed.

    Args:
        locations: in the order of `list_shards`.
        index_dir: folder of indices; None means beside the first shard. Any number of sets may share it.
        image_member: which image of a sample is read, as in `samples_of`.
        num_processes: how many shards are read at a time.
        on_shard: is called with (shards done, shards in all).

    Raises:
        DataError: a shard breaks the rules; all shards are read before the first broken one is reported.
        ConfigError: the index cannot be written.
    """
    check_image_member(image_member)
    shards = [os.fspath(location) for location in locations]
    folder = _index_folder(shards, index_dir, image_member)
    _check_ranges(shards)
    index = _existing(folder, shards)
    if index is None:
        _build(_Job(folder, shards, image_member), num_processes, on_shard)
        index = ShardIndex(folder, shards)
    return index


def describe_index(index: ShardIndex) -> str:
    """Describe a set in one line: samples, labels by class, people, and what is left out and why."""
    num_bytes, tally = int(index.image_bytes.sum()), index.tally
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    parts = [f"{len(index)} samples in {len(index.shards)} shard{'s' * (len(index.shards) > 1)} ({size} of images)"]
    parts.append(f"labels: {_describe_labels(tally.labels)}")
    if index.num_people:
        parts.append(f"{index.num_people} people are named")
    parts += [
        f"{name}: {len(index.groups(name)[0])} values" for name in index.group_fields if name not in IDENTITY_FIELDS
    ]
    return "; ".join(parts + tally.notes())


def missing_labels(index: ShardIndex) -> str:
    """Describe how many samples have no label, and what stands in its place; empty if all have one."""
    count, unusable = index.tally.labels[NO_LABEL], index.tally.unusable["label"]
    if not count:
        return ""
    found = ""
    if unusable:
        example = index.tally.examples["unusable label"]
        found = (
            f"; {unusable} of them have one that is no class ({example}): write 0 or 1, bonafide or morph, and the "
            "same in .cls and .json"
        )
    return f"{count} of {len(index)} samples have no label{found}"


def _describe_labels(labels: Counter[int]) -> str:
    classes = Counter({label: count for label, count in labels.items() if label != NO_LABEL})
    missing = f"{labels[NO_LABEL]} without" if labels[NO_LABEL] else ""
    if len(classes) > _MAX_LABELS_SHOWN:
        counts = sorted(classes.values())
        named = f"{len(classes)} classes of {counts[0]} to {counts[-1]} samples"
    else:
        named = ", ".join(f"{label}: {count}" for label, count in sorted(classes.items()))
    return ", ".join(filter(None, (named, missing))) if named else "none"


@dataclass(frozen=True, slots=True)
class _Job:
    """An index to build."""

    folder: Path
    shards: list[str]
    image_member: str | None


def _check_ranges(shards: list[str]) -> None:
    """Refuse web servers that send whole files only, before anything is read from them."""
    with_retries(
        lambda: check_ranges(shards),
        lambda error, _: (
            f"shard {error.filename} cannot be read in parts ({error.strerror}): serve the shards from a server with "
            "Range requests (nginx, Apache, object stores), or copy them"
        ),
    )


def _existing(folder: Path, shards: list[str]) -> ShardIndex | None:
    """Open the index if it is complete and its shards are unchanged; None otherwise.

    Raises:
        DataError: a shard cannot be reached, so that rebuilding the index would not help.
    """
    if not folder.exists():
        return None
    stamps = [stamp_of(shard) for shard in shards]
    try:
        _compare(folder, stamps)
        return ShardIndex(folder, shards)
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        logger.info("rebuilding the index: %s", error)
        return None


def _index_folder(shards: list[str], index_dir: Path | None, image_member: str | None) -> Path:
    home = shards[0].rpartition("/")[0]
    if index_dir is None and is_url(shards[0]):
        raise ConfigError(f"{shards[0]} is remote: name a folder for its index with --index_dir, which all hosts see")
    names = "\0".join([str(INDEX_VERSION), image_member or "", *map(place_of, shards)])
    return (index_dir or Path(home)) / f".index-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def _compare(folder: Path, stamps: list[dict[str, Any]]) -> None:
    """Raise `DataError` if a shard has another name, length or version than when it was indexed."""
    entries = _read_json(folder / "shards.json")["shards"]
    for entry, now in zip(entries, stamps, strict=True):
        if {name: entry[name] for name in now} != now:
            raise DataError(f"shard {now['name']} has changed")


def _build(job: _Job, num_processes: int, on_shard: Callable[[int, int], None] | None) -> None:
    folder, shards = job.folder, job.shards
    draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"the index of {shards[0]} and others cannot be written to {folder.parent} ({error.strerror}): "
            "name a writable folder with --index_dir"
        ) from error
    try:
        _Writer(draft).write(job, num_processes, on_shard)
        _publish(draft, folder, shards)
        shutil.rmtree(_parts_of(folder), ignore_errors=True)
    except OSError as error:
        raise DataError(f"index {folder} cannot be written ({error}): free space or set --index_dir") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path, shards: list[str]) -> None:
    """Make the draft the index, unless another job has published the same index meanwhile."""
    sync_files(draft.iterdir())
    if _existing(folder, shards) is not None:
        return  # another job was faster, and readers may open its files by name
    if folder.exists():
        folder.rename(draft.with_name(f"{draft.name}-old"))
        shutil.rmtree(draft.with_name(f"{draft.name}-old"), ignore_errors=True)
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # those two mean that another job has just put the same index there


class _Writer:
    """Joins the contents of the shards, one after the other, into the files of an index."""

    def __init__(self, draft: Path) -> None:
        self._draft = draft
        self._entries: list[dict[str, Any]] = []
        self._problems: list[str] = []
        self._num_samples = self._num_key_bytes = 0
        self._codes: dict[str, dict[str, int]] = {name: {} for name in GROUP_FIELDS}
        self._tally = Tally()

    def write(self, job: _Job, num_processes: int, on_shard: Callable[[int, int], None] | None) -> None:
        shards = job.shards
        names = [
            "shard_end.i64",
            "shard_tag.u64",
            *SHARD_COLUMNS,
            _KEYS,
            *(f"group-{name}.i32" for name in GROUP_FIELDS),
        ]
        files = {name: (self._draft / name).open("wb") for name in names}
        try:
            for contents in _read_shards(job, num_processes):
                if isinstance(contents, DataError):
                    self._problems.append(str(contents))
                else:
                    for name, data in self._joined(contents).items():
                        files[name].write(data)
                    self._entries.append(contents.stamp | {"sha256": contents.sha256})
                if on_shard is not None:
                    on_shard(len(self._entries) + len(self._problems), len(shards))
        finally:
            for file in files.values():
                file.close()
        if self._problems:
            more = len(self._problems) - 1
            others = f"\n({more} more shards are broken, the next: {self._problems[1]})" if more else ""
            raise DataError(self._problems[0] + others)
        self._finish(job.image_member)

    def _joined(self, contents: ShardContents) -> dict[str, bytes]:
        columns = contents.columns | {"key_end.i64": contents.columns["key_end.i64"] + self._num_key_bytes}
        self._num_key_bytes += len(contents.keys)
        self._num_samples += len(columns["offset.i64"])
        self._tally.add(contents.tally)
        joined = {name: column.tobytes() for name, column in columns.items()}
        joined["shard_tag.u64"] = np.uint64(int(contents.sha256[:16], 16)).tobytes()
        for name, (values, codes_N) in contents.groups.items():
            known = self._codes[name]
            # From the shard's codes to those of the index: a, b with codes 0, 1 here may have codes 7, 2 there.
            # NO_GROUP is -1, so it picks the last entry, which is NO_GROUP itself.
            index_code = np.array([known.setdefault(v, len(known)) for v in values] + [NO_GROUP], dtype=np.int32)
            joined[f"group-{name}.i32"] = index_code[codes_N].tobytes()
        return joined | {"shard_end.i64": np.int64(self._num_samples).tobytes(), _KEYS: contents.keys}

    def _finish(self, image_member: str | None) -> None:
        for name, codes in self._codes.items():
            if codes:
                (self._draft / f"group-{name}.json").write_text(json.dumps(list(codes)))
            else:
                (self._draft / f"group-{name}.i32").unlink()
        content = "".join(entry["sha256"] for entry in self._entries)
        if image_member is not None or self._tally.by_new_rules:  # the same bytes can be read as other samples
            content += f"\0{INDEX_VERSION}\0{image_member}"
        header = {
            "version": INDEX_VERSION,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "num_samples": self._num_samples,
            "num_shards": len(self._entries),
            "group_fields": [name for name, codes in self._codes.items() if codes],
            "num_people": len(set[str]().union(*(self._codes[name] for name in IDENTITY_FIELDS))),
            "tally": self._tally.to_dict(),
        }
        (self._draft / "shards.json").write_text(json.dumps({"shards": self._entries}, indent=1))
        (self._draft / "index.json").write_text(json.dumps(header, indent=1))


def _read_shards(job: _Job, num_processes: int) -> Iterator[ShardContents | DataError]:
    shards = job.shards
    read = partial(_read_or_error, image_member=job.image_member, parts=_parts_of(job.folder))
    num_processes = min(num_processes, sum(stamp_of(shard)["num_bytes"] for shard in shards) // _MIN_BYTES_A_PROCESS)
    yield from parallel_map(read, shards, num_processes=num_processes)


def _parts_of(folder: Path) -> Path:
    """Return the folder that caches the contents of shards until the index is complete."""
    return folder.with_name(f"{folder.name}.parts")


def _read_or_error(shard: str, *, image_member: str | None, parts: Path) -> ShardContents | DataError:
    try:
        return read_contents(shard, image_member=image_member, version=INDEX_VERSION, parts=parts)
    except DataError as error:
        return DataError(str(error))  # rebuilt, because only plain exceptions travel between processes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"index {path.parent} is unreadable ({error!r}): it must stand where every host sees it; if it is "
            "damaged, remove it and it will be rebuilt"
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"index {path.parent}: {path.name} is damaged: remove the folder, it will be rebuilt")
    return values
