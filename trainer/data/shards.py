"""Tar shards: which files, what is inside, and how one sample's bytes are read back.

A shard is a plain ustar, pax or GNU tar in webdataset's layout: neighbouring members that share a name up to the first
dot are one sample. The first use of a set of shards walks every byte once, strictly, and keeps what it found in an
*index*: flat arrays that are memory-mapped, so a billion samples cost no memory and open at once.

Layout of an index folder::

    index.json     version, fingerprint, and name, size, time, sha256 and sample count of every shard
    offset.i64 size.i64 crc32.u32 label.i32 key_end.i64 keys.utf8      one entry a sample, in shard order

The fingerprint depends on the bytes of the shards and their order, not on where they lie.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand
import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError, DataError, SampleError

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
MAX_MEMBER_BYTES = 256 << 20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
NO_LABEL = -1

_BLOCK = 512
_MAX_EXTENDED_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_BYTES_WORTH_A_PROCESS = 1 << 30
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"BZh": "bzip2-compressed",
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"PK\x03\x04": "a zip file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
_COLUMNS: dict[str, type[np.generic]] = {
    "offset.i64": np.int64,
    "size.i64": np.int64,
    "crc32.u32": np.uint32,
    "label.i32": np.int32,
    "key_end.i64": np.int64,
}
_KEYS = "keys.utf8"
# The rule of webdataset.tariterators.base_plus_ext: the key ends at the first dot of the file name.
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)


# ---------------------------------------------------------------------------------------------- which files


def list_shards(patterns: str, *, setting: str) -> list[Path]:
    """Expand comma-separated paths, globs, folders and ``{000..099}`` ranges into existing files, in sorted order.

    Args:
        patterns: what the user wrote.
        setting: the flag it came from, for messages.

    Raises:
        ConfigError: a pattern matches nothing, is a URL or a command, or a shard is named twice.
    """
    found: list[Path] = []
    for pattern in _split_outside_braces(patterns):
        if re.match(r"[A-Za-z][\w+.-]*:", pattern) or pattern == "-" or "::" in pattern or "${" in pattern:
            raise ConfigError(f"{setting} is {pattern!r}, but only files are read: mount or copy the shards")
        for path in _expand(pattern):
            matches = sorted(path.glob("*.tar")) if path.is_dir() else _glob(path)
            if not matches:
                raise ConfigError(f"{setting}: no shard matches {str(path)!r}: check the path (from {Path.cwd()})")
            found += matches
    if not found:
        raise ConfigError(f"{setting} is empty: name the shards, for example {setting} 'shards/*.tar'")
    twice = {path for path in found if found.count(path) > 1} if len(set(found)) < len(found) else set()
    if twice:
        raise ConfigError(f"{setting} names {min(twice)} more than once: every sample must be seen once an epoch")
    return sorted(found)


def _split_outside_braces(patterns: str) -> list[str]:
    parts = re.split(r",(?![^{]*\})", patterns)
    return [part.strip() for part in parts if part.strip()]


def _glob(pattern: Path) -> list[Path]:
    if pattern.exists():  # also a name that holds a star or a bracket itself
        return [pattern]
    anchor = Path(pattern.anchor)
    return sorted(anchor.glob(str(pattern.relative_to(anchor)))) if pattern.name else []


def _expand(pattern: str) -> Iterator[Path]:
    try:
        yield from (Path(text).expanduser() for text in braceexpand.braceexpand(pattern))
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise ConfigError(f"{pattern!r} has unbalanced braces: write ranges like shard-{{000..099}}.tar") from error


# ---------------------------------------------------------------------------------------------- what is inside


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar."""

    name: str
    offset: int
    """Where its bytes begin in the tar [bytes]."""
    size: int
    crc32: int
    payload: bytes | None
    """The bytes themselves, kept for small members only."""


def walk_tar(path: Path, *, digest: "hashlib._Hash | None" = None, keep_payload_below: int = 0) -> Iterator[Member]:
    """Read every regular file of a plain tar in order, and every byte of the tar once.

    Python's own ``tarfile`` takes a damaged header in the middle for the end of the archive and returns fewer members
    without a word; here everything that is not a whole, plain tar is an error.

    Args:
        path: the tar.
        digest: is updated with every byte of the file.
        keep_payload_below: members smaller than this carry their bytes [bytes].

    Raises:
        DataError: not a tar, compressed, cut, damaged, or with links or sparse files.
    """
    try:
        with path.open("rb") as file:
            yield from _TarWalk(path, file, digest, keep_payload_below)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the storage and permissions") from error


class _TarWalk:
    def __init__(self, path: Path, file: BinaryIO, digest: "hashlib._Hash | None", keep_payload_below: int) -> None:
        self._path, self._file, self._digest, self._keep_below = path, file, digest, keep_payload_below
        self._position, self._total = 0, os.fstat(file.fileno()).st_size

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        while not self._at_end(header := self._take(_BLOCK, "a header")):
            info = self._parse(header)
            size = self._number(extended["size"]) if "size" in extended else info.size
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= self._pax_records(self._padded(size, _MAX_EXTENDED_HEADER_BYTES))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(self._padded(size, _MAX_EXTENDED_HEADER_BYTES).rstrip(b"\0"))
            elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._padded(size, _MAX_EXTENDED_HEADER_BYTES)  # global comments, and the targets of links
            else:
                name = extended.get("path", info.name)
                self._check_kind(info, name, extended)
                extended = {}
                if info.type != tarfile.DIRTYPE:
                    yield self._read_member(name, size)

    def _read_member(self, name: str, size: int) -> Member:
        if size > MAX_MEMBER_BYTES:
            raise self._broken(f"member {name!r} has {size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
        offset = self._position
        crc, kept, left = 0, [], size
        while left:
            chunk = self._take(min(left, _CHUNK_BYTES), f"member {name!r}")
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if size < self._keep_below:
                kept.append(chunk)
        self._take(-size % _BLOCK, f"the padding of {name!r}")
        return Member(name, offset, size, crc, b"".join(kept) if size < self._keep_below else None)

    def _parse(self, header: bytes) -> tarfile.TarInfo:
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if self._position > _BLOCK:
                raise self._broken(f"the header at byte {self._position - _BLOCK} is damaged ({error})") from error
            kind = next((kind for magic, kind in _MAGIC.items() if header.startswith(magic)), "not a tar file")
            if header.lstrip()[:1] in (b"<", b"{"):
                kind = "a web page or a message, perhaps of a failed download, not a tar file"
            raise self._broken(f"it is {kind}", "write plain, uncompressed tars with tools/make_shards.py") from error

    def _check_kind(self, info: tarfile.TarInfo, name: str, extended: dict[str, str]) -> None:
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or any(
            field.startswith("GNU.sparse") for field in extended
        ):
            raise self._broken(f"member {name!r} is a link, a sparse file or a device", "store regular files only")

    def _pax_records(self, block: bytes) -> dict[str, str]:
        """Parse ``LENGTH NAME=VALUE NEWLINE`` records (POSIX.1-2001, pax extended header)."""
        records, rest = {}, block
        while rest.rstrip(b"\0"):
            match = re.match(rb"(\d{1,9}) ([^=\n]+)=", rest)
            end = int(match[1]) if match else 0
            if not match or not match.end() < end <= len(rest) or rest[end - 1 : end] != b"\n":
                raise self._broken(f"the extended header before byte {self._position} is damaged")
            records[_text(match[2])] = _text(rest[match.end() : end - 1])
            rest = rest[end:]
        return records

    def _number(self, text: str) -> int:
        if not (text.isascii() and text.isdecimal()):
            raise self._broken(f"the extended header before byte {self._position} gives the size {text!r}")
        return int(text)

    def _at_end(self, header: bytes) -> bool:
        """Whether the archive ends here; then everything behind must be zero."""
        if header.strip(b"\0"):
            return False
        while self._position < self._total:
            if self._take(min(_CHUNK_BYTES, self._total - self._position), "the end").strip(b"\0"):
                raise self._broken("data stands behind its end mark", "join tars with tar -A, not with cat")
        return True

    def _padded(self, size: int, limit: int) -> bytes:
        if size > limit:
            raise self._broken(f"the extended header at byte {self._position} claims {size} bytes")
        return self._take(size + -size % _BLOCK, "an extended header")[:size]

    def _take(self, size: int, what: str) -> bytes:
        chunk = self._file.read(size)
        self._position += len(chunk)
        if self._digest is not None:
            self._digest.update(chunk)
        if len(chunk) < size:
            if self._total == 0:
                raise self._broken("it is empty (0 bytes)")
            start = chunk.lstrip()[:1]
            if self._position == len(chunk) and start in (b"<", b"{"):
                raise self._broken("it is a web page or a message, perhaps of a failed download, not a tar file")
            if self._position == len(chunk):
                self._parse(chunk.ljust(_BLOCK, b"\0") if chunk.strip(b"\0") else b"?" * _BLOCK)
            raise self._broken(f"it ends at byte {self._position}, inside {what} or before its end mark: it was cut")
        return chunk

    def _broken(self, problem: str, remedy: str = "copy or write this shard anew") -> DataError:
        return DataError(f"shard {self._path}: {problem}: {remedy}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@dataclass(slots=True)
class _Sample:
    key: str
    suffixes: set[str]
    image: Member | None = None
    label: int = NO_LABEL


@dataclass(frozen=True, slots=True)
class _ShardContents:
    """What one shard holds, on its way from a worker process to the index."""

    columns: dict[str, bytes]
    keys: bytes
    num_samples: int
    sha256: str


def _samples_of(path: Path, members: Iterator[Member]) -> Iterator[_Sample]:
    """Group neighbouring members as webdataset does; every sample must have exactly one image."""
    current: _Sample | None = None
    seen: set[str] = set()
    for member in members:
        match = _KEY_AND_SUFFIX.fullmatch(member.name)
        if match is None or member.name.startswith("__"):  # names without a suffix, hidden files, meta data
            continue
        key, suffix = match[1], match[2].lower()
        if current is None or key != current.key:
            if current is not None:
                yield _checked(path, current)
            if key in seen:
                raise DataError(f"shard {path}: the members of sample {key!r} are not neighbours: write it sorted")
            seen.add(key)
            current = _Sample(key, set())
        if suffix in current.suffixes:
            raise DataError(f"shard {path}: sample {key!r} has two members .{suffix}: write the shard anew")
        current.suffixes.add(suffix)
        _take_member(path, current, suffix, member)
    if current is not None:
        yield _checked(path, current)


def _checked(path: Path, sample: _Sample) -> _Sample:
    if sample.image is None:
        raise DataError(
            f"shard {path}: sample {sample.key!r} has no image member (.{', .'.join(IMAGE_SUFFIXES)}), "
            f"only .{', .'.join(sorted(sample.suffixes))}: write the shard anew with tools/make_shards.py"
        )
    return sample


def _take_member(path: Path, sample: _Sample, suffix: str, member: Member) -> None:
    if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
        if sample.image is not None:
            raise DataError(f"shard {path}: sample {sample.key!r} has two images: keep one image a sample")
        sample.image = member
    elif suffix == "cls":
        text = (member.payload or b"").decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,9}", text):
            raise DataError(f"shard {path}: member {member.name!r} holds {text[:20]!r}, but must be a class number")
        sample.label = int(text)
    elif suffix == "json" and sample.label == NO_LABEL and member.payload is not None:
        sample.label = _label_in(member.payload)


def _label_in(text: bytes) -> int:
    try:
        label = json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        return NO_LABEL  # other tools keep other things in their json
    return label if type(label) is int and 0 <= label < 2**31 else NO_LABEL


def _read_shard(path: Path) -> _ShardContents:
    digest = hashlib.sha256()
    rows, keys, key_ends, num_key_bytes = [], [], [], 0
    members = walk_tar(path, digest=digest, keep_payload_below=64 << 10)
    for sample in _samples_of(path, members):
        assert sample.image is not None
        rows.append((sample.image.offset, sample.image.size, sample.image.crc32, sample.label))
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        num_key_bytes += len(keys[-1])
        key_ends.append(num_key_bytes)
    if not rows:
        raise DataError(f"shard {path}: it holds no sample: remove the file, or write it anew")
    values = dict(zip(_COLUMNS, (*zip(*rows, strict=True), key_ends), strict=True))
    columns = {name: np.array(values[name], dtype=_COLUMNS[name]).tobytes() for name in _COLUMNS}
    return _ShardContents(columns, b"".join(keys), len(rows), digest.hexdigest())


# ---------------------------------------------------------------------------------------------- the index


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where the image bytes of one sample lie."""

    key: str
    shard: Path
    offset: int
    size: int
    crc32: int
    label: int


class ShardIndex:
    """What a set of shards holds, memory-mapped. Cheap to pickle: workers open the arrays themselves."""

    def __init__(self, folder: Path, shards: list[Path]) -> None:
        """Open the index of these shards.

        Raises:
            DataError: the folder is not a whole index of exactly these files as they are now.
        """
        self.folder, self.shards = folder, shards
        self._header = _read_header(folder)
        if self._header["shards"] != [entry | _stamp(p) for entry, p in zip(self._entries(), shards, strict=False)]:
            raise DataError(f"index {folder} is out of date: it will be built anew")
        counts = [int(entry["num_samples"]) for entry in self._entries()]
        if len(counts) != len(shards) or sum(counts) == 0:
            raise DataError(f"index {folder} describes {len(counts)} shards instead of {len(shards)}: remove it")
        self._shard_end = np.cumsum(counts)
        self._columns = {name: self._map(name, dtype) for name, dtype in _COLUMNS.items()}
        self._keys = np.memmap(folder / _KEYS, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return int(self._shard_end[-1])

    def __reduce__(self) -> tuple[type["ShardIndex"], tuple[Path, list[Path]]]:
        return ShardIndex, (self.folder, self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the bytes of all shards in order: equal where and only where the samples are."""
        return str(self._header["fingerprint"])

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of every sample, `NO_LABEL` where there is none."""
        return self._columns["label.i32"]

    def sample(self, i: int) -> SampleRef:
        """Return sample i, 0 <= i < len(self)."""
        shard = int(np.searchsorted(self._shard_end, i, side="right"))
        first = int(self._shard_end[shard - 1]) if shard else 0
        ends = self._columns["key_end.i64"]  # counted from the beginning of the shard
        start, end = (int(ends[i - 1]) if i > first else 0), int(ends[i])
        base = int(self._entries()[shard]["keys_start"])
        key = self._keys[base + start : base + end].tobytes().decode("utf-8", "surrogateescape")
        numbers = (int(self._columns[name][i]) for name in ("offset.i64", "size.i64", "crc32.u32", "label.i32"))
        return SampleRef(key, self.shards[shard], *numbers)

    def _entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._header["shards"]
        return entries

    def _map(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        column = np.memmap(self.folder / name, dtype=dtype, mode="r")
        if len(column) != len(self):
            raise DataError(f"index {self.folder}: {name} was cut: remove the folder, it will be built anew")
        return column


def open_index(
    shards: list[Path],
    *,
    index_dir: Path | None = None,
    num_processes: int = 1,
    on_shard: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Open the index of these shards, building it where it is missing or out of date.

    Args:
        shards: in the order that `list_shards` gave.
        index_dir: where indices are kept; None means beside the first shard.
        num_processes: how many shards are read at a time.
        on_shard: is told (shards done, shards in all).

    Raises:
        DataError: a shard breaks the rules; every broken shard is read before the first is reported.
        ConfigError: the index cannot be written.
    """
    root = shards[0].parent if index_dir is None else index_dir
    names = "\0".join(os.path.relpath(shard, shards[0].parent) for shard in shards)
    folder = root / f".index-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    if folder.exists():
        try:
            return ShardIndex(folder, shards)
        except (DataError, OSError, ValueError) as error:
            logger.info("building the index anew: %s", error)
    _build(folder, shards, num_processes, on_shard)
    return ShardIndex(folder, shards)


def _build(folder: Path, shards: list[Path], num_processes: int, on_shard: Callable[[int, int], None] | None) -> None:
    draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"the index of {shards[0]} and others cannot be written to {folder.parent} ({error.strerror}): "
            "name a writable folder with --index_dir"
        ) from error
    try:
        entries = _write_columns(draft, shards, num_processes, on_shard)
        content = "".join(entry["sha256"] for entry in entries)
        header = {
            "version": INDEX_VERSION,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "shards": entries,
        }
        (draft / "index.json").write_text(json.dumps(header, indent=1))
        _publish(draft, folder)
    except OSError as error:
        raise DataError(f"index {folder} cannot be written ({error}): free space or set --index_dir") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path) -> None:
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():  # out of date, or another job was faster: both are replaced
        folder.rename(draft.with_name(f"{draft.name}-old"))
        shutil.rmtree(draft.with_name(f"{draft.name}-old"), ignore_errors=True)
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # otherwise another job put the same index there just now


def _write_columns(
    draft: Path, shards: list[Path], num_processes: int, on_shard: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    problems: list[str] = []
    keys_start = 0
    files = {name: (draft / name).open("wb") for name in (*_COLUMNS, _KEYS)}
    try:
        for path, contents in zip(shards, _read_shards(shards, num_processes), strict=True):
            if isinstance(contents, DataError):
                problems.append(str(contents))
            else:
                for name, column in contents.columns.items():
                    files[name].write(column)
                files[_KEYS].write(contents.keys)
                entries.append(
                    _stamp(path)
                    | {"sha256": contents.sha256, "num_samples": contents.num_samples, "keys_start": keys_start}
                )
                keys_start += len(contents.keys)
            if on_shard is not None:
                on_shard(len(entries) + len(problems), len(shards))
    finally:
        for file in files.values():
            file.close()
    if problems:
        others = f"\n({len(problems) - 1} more shards are broken, the next: {problems[1]})" if problems[1:] else ""
        raise DataError(problems[0] + others)
    return entries


def _read_shards(shards: list[Path], num_processes: int) -> Iterator[_ShardContents | DataError]:
    num_processes = min(num_processes, sum(path.stat().st_size for path in shards) // _BYTES_WORTH_A_PROCESS)
    if num_processes <= 1:
        yield from map(_read_shard_or_error, shards)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_read_shard_or_error, shards)


def _read_shard_or_error(path: Path) -> _ShardContents | DataError:
    try:
        return _read_shard(path)
    except DataError as error:
        return DataError(str(error))  # rebuilt, because only plain exceptions travel between processes


def _stamp(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror}): check the path") from error
    return {"name": path.name, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads((folder / "index.json").read_text())
        known = header["version"] == INDEX_VERSION and isinstance(header["shards"], list) and header["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"index {folder} is unreadable ({error!r}): remove it, it will be built anew") from error
    if not known:
        raise DataError(f"index {folder} has another version: it will be built anew")
    return header


# ---------------------------------------------------------------------------------------------- reading back


class ShardReader:
    """Reads image bytes and checks them. Keeps a few files open; safe to fork and to pickle."""

    def __init__(self, *, max_open_files: int = 64, num_retries: int = 4, first_wait_s: float = 0.5) -> None:
        self._max_open, self._num_retries, self._first_wait_s = max_open_files, num_retries, first_wait_s
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, ref: SampleRef) -> bytes:
        """Return the image bytes of one sample.

        Raises:
            SampleError: the bytes differ from those that were indexed (reason ``checksum``).
            DataError: the shard is gone, shorter than indexed, or the storage fails again and again.
        """
        payload = self._retrying(ref)
        if len(payload) < ref.size:
            raise DataError(f"shard {ref.shard} is shorter than when it was indexed: restore the file")
        if zlib.crc32(payload) != ref.crc32:
            raise SampleError("checksum", f"{ref.key} in {ref.shard} differs from what was indexed")
        return payload

    def _retrying(self, ref: SampleRef) -> bytes:
        wait_s = self._first_wait_s
        for attempt in range(self._num_retries + 1):
            try:
                return os.pread(self._descriptor(ref.shard), ref.size, ref.offset)
            except OSError as error:
                self._forget(ref.shard)
                lasting = error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)
                if lasting or attempt == self._num_retries:
                    raise DataError(
                        f"shard {ref.shard}: {ref.key} cannot be read ({error.strerror}) after {attempt + 1} attempts: "
                        "check the storage, then resume"
                    ) from error
                logger.warning("reading %s failed (%s), trying again in %.1f s", ref.shard, error.strerror, wait_s)
                time.sleep(wait_s)
                wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _descriptor(self, shard: Path) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            self._descriptors[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > self._max_open:
                self._forget(next(iter(self._descriptors)))
        return self._descriptors[shard]

    def _forget(self, shard: Path) -> None:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> tuple[int, int, float]:
        return self._max_open, self._num_retries, self._first_wait_s

    def __setstate__(self, state: tuple[int, int, float]) -> None:
        self._max_open, self._num_retries, self._first_wait_s = state
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
