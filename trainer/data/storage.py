"""Where bytes lie: local files, and objects behind a few URL schemes through fsspec.

A *location* is a path or a URL. Nothing here retries or judges: every failure of a library becomes an `OSError` whose
``filename`` is the location, and `trainer.data.shards.contents` and `trainer.data.shards.index` decide what it means.

Commands (``pipe:``), standard input, chained file systems (``::``) and environment variables in URLs are refused: a
list of shards is data, and data must not run programs or give secrets away.
"""

import asyncio
import errno
import hashlib
import logging
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand
import fsspec
import fsspec.asyn

from trainer.errors import ConfigError, TrainerError, without_secrets

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_URL = re.compile(r"([A-Za-z][\w+.-]*):")
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_WEB = ("http://", "https://")
# Names of parameters that say who may read and how long, not what (S3, Google, Azure, CloudFront, OSS).
_SIGNATURE = re.compile(
    r"(x-(amz|goog|ms|oss|cos)-|x-signature|(x-)?expires|signature|sig|se|sp|sv|sr|st|spr|sip|sk[a-z]+|token|policy"
    r"|key-pair-id|awsaccesskeyid|googleaccessid|ossaccesskeyid|security-token)[^=]*=",
    re.IGNORECASE,
)
_WHOLE_FILE, _RANGE_OF_NOTHING = 200, 416
_NO_RANGES = "the server ignores Range requests and sends whole files"
_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
"""Answers of web servers that asking again does not change; also 403 for a signature that has expired."""
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EOPNOTSUPP)
"""Failures that asking again does not change."""
_VERSIONS = ("ETag", "etag", "LastModified", "updated", "Last-Modified", "Content-MD5", "Digest")
"""What file systems call that which changes with the content."""
_READ_AHEAD_BYTES = 8 << 20
_REMEMBERED_BLOCKS = 4096
_CACHE_REST_S = 60.0
"""How long a cache that failed is left alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes."""

    location: str
    offset: int
    size: int
    tag: int = 0
    """Tells contents at the same location apart: the start of the file's sha256, 0 where it is not known."""


def is_url(location: str) -> bool:
    """Whether the location is not a local path."""
    return _URL.match(location) is not None


def place_of(location: str) -> str:
    """Name where a file lies: the same for every way to write its path, and for every signature of its address.

    What else stands behind the ``?`` of an address may choose the file, so its hash is part of the name.
    """
    if not is_url(location):
        return os.path.realpath(location)
    if not location.startswith(_WEB):
        return location
    address, _, query = location.partition("?")
    kept = sorted(part for part in query.split("&") if part and not _SIGNATURE.match(part))
    digest = hashlib.sha256("&".join(kept).encode()).hexdigest()[:16]
    return without_secrets(address) + (f"?{digest}" if kept else "")


def find(pattern: str, *, setting: str, suffix: str) -> list[str]:
    """List what a path, folder, glob or URL with optional ``{000..099}`` ranges stands for, sorted, not empty.

    Args:
        pattern: what the user wrote.
        setting: the flag it came from, for messages.
        suffix: how the names in a folder end that count.

    Raises:
        ConfigError: it matches nothing, is a command, or has a scheme that is not read.
    """
    _refuse_what_runs(pattern, setting)
    found: list[str] = []
    for name in _braces(pattern):
        matches = _find_url(name, setting) if is_url(name) else _find_path(name, setting, suffix)
        passed_over = "" if is_url(name) else _passed_over(Path(name).expanduser(), suffix)
        if not matches:
            raise ConfigError(f"{setting}: no shard matches {name!r}: {passed_over or _remedy(name)}")
        if suffix == ".tar" and Path(matches[0]).suffix.lower() in _IMAGE_SUFFIXES:
            raise ConfigError(
                f"{setting}: {matches[0]} is an image, not a shard: {_PACK.format(Path(matches[0]).parent)}"
            )
        if passed_over:
            logger.warning("%s: of %s, not all is read: %s", setting, name, passed_over)
        found += matches
    return found


def _refuse_what_runs(pattern: str, setting: str) -> None:
    scheme = _URL.match(pattern)
    if pattern == "-" or "::" in pattern or "${" in pattern or (scheme and scheme[1] not in _PACKAGES):
        raise ConfigError(
            f"{setting} is {pattern!r}, but only paths and {', '.join(s + '://' for s in _PACKAGES)} are read: "
            "mount or copy the shards"
        )


def _braces(pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand.braceexpand(pattern)
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise ConfigError(f"{pattern!r} has unbalanced braces: write ranges like shard-{{000..099}}.tar") from error


_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".heic", ".pgm", ".ppm"})
_PACK = "pack images into shards first: python tools/make_shards.py --source {} --output_dir shards"


def _remedy(name: str) -> str:
    """Say what to do about a path without shards; images in a folder want to be packed."""
    folder = Path(name)
    if folder.is_dir():
        for number, path in enumerate(folder.rglob("*")):
            if path.suffix.lower() in _IMAGE_SUFFIXES:
                return f"it holds images such as {path.name}; {_PACK.format(name)}"
            if number > _LOOKED_AT:
                break
    return f"check the path (from {Path.cwd()})"


_LOOKED_AT = 10_000
"""Files of a folder: enough to find out what it holds."""


def _find_path(name: str, setting: str, suffix: str) -> list[str]:
    try:
        pattern = Path(name).expanduser()
        if pattern.is_dir():
            return sorted(map(str, pattern.glob(f"*{suffix}")))
        if pattern.exists():  # also a name that holds a star or a bracket itself
            return [str(pattern)]
        anchor = Path(pattern.anchor)
        return sorted(map(str, anchor.glob(str(pattern.relative_to(anchor))))) if pattern.name else []
    except (OSError, ValueError, RuntimeError) as error:  # such as a ** beside other letters, or an unknown ~user
        raise ConfigError(f"{setting}: {name!r} is no pattern of paths ({error}): write shards/*.tar") from error


def _passed_over(folder: Path, suffix: str) -> str:
    """Say what in a folder looks like shards and is not read; empty for nothing, and for what is no folder."""
    if not folder.is_dir():
        return ""
    packed = sorted(path.name for path in folder.iterdir() if _COMPRESSED.search(path.name))
    below = sorted(path.parent.name for path in folder.glob(f"*/*{suffix}"))
    found = []
    if packed:
        found.append(f"it holds {len(packed)} compressed archives such as {packed[0]}: decompress them (gunzip)")
    if below:
        found.append(f"its sub-folders hold shards, such as {below[0]}: write '{folder}/**/*{suffix}' to read them")
    return "; ".join(found)


def _find_url(pattern: str, setting: str) -> list[str]:
    is_web = pattern.startswith(_WEB)
    if not set("*[" if is_web else "*?[") & set(pattern.partition("?")[0] if is_web else pattern):
        return [pattern]
    scheme = pattern.partition(":")[0]
    if is_web:
        raise ConfigError(f"{setting} is {pattern!r}, but web servers list no files: write shard-{{000..099}}.tar")
    try:
        return sorted(f"{scheme}://{name}" for name in _file_system(pattern).glob(pattern))
    except Exception as error:  # each scheme has exceptions of its own
        raise ConfigError(f"{setting}: {pattern!r} cannot be listed ({error!r}): check address and access") from error


def check_ranges(locations: Sequence[str]) -> None:
    """Look whether each web server among the locations answers a request for a part of a file with that part.

    Raises:
        OSError: one sends whole files, or cannot be reached.
    """
    hosts = {location.split("/")[2]: location for location in reversed(locations) if location.startswith(_WEB)}
    for location in hosts.values():
        with _AsOSError(location):
            fs = _file_system(location)
            sends_parts = fsspec.asyn.sync(fs.loop, _sends_parts, fs, location)
        if not sends_parts:
            raise OSError(errno.EOPNOTSUPP, _NO_RANGES, location)


async def _sends_parts(fs: Any, location: str) -> bool:
    """Ask for the first block; the answer's content is not read, because it may be the whole file."""
    session = await fs.set_session()
    headers = {"Range": "bytes=0-511", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(location), **(fs.kwargs | {"headers": headers})) as answer:
        if answer.status != _RANGE_OF_NOTHING:
            answer.raise_for_status()
        return bool(answer.status != _WHOLE_FILE)


def stamp(location: str) -> dict[str, Any]:
    """Describe the present state of a file: its name, length, and what changes when its content does.

    Raises:
        OSError: it cannot be looked at.
    """
    if not is_url(location):
        status = Path(location).stat()
        # A copy may bring the old time of change along (cp -p, rsync -t); the system's own time betrays it.
        version = f"{status.st_mtime_ns}-{status.st_ctime_ns}"
        return {"name": Path(location).name, "num_bytes": status.st_size, "version": version}
    with _AsOSError(location):
        info = _file_system(location).info(location)
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        name = place_of(location).partition("?")[0].rpartition("/")[2]
        return {"name": name, "num_bytes": int(info["size"]), "version": version}


@contextmanager
def reading(location: str) -> Iterator["ReadOnly"]:
    """Open a file for one pass from beginning to end.

    Raises:
        OSError: it cannot be opened or, inside the block, be read. Whatever else the block raises stays what it is.
    """
    with _AsOSError(location):
        file = _open(location)
    with file:
        yield ReadOnly(file, location)


def _open(location: str) -> BinaryIO:
    if not is_url(location):
        return Path(location).open("rb")
    file: BinaryIO = _file_system(location).open(location, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
    return file


class ReadOnly:
    """A file of which every failure to read is an `OSError` about its location."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer at the end."""
        with _AsOSError(self._location):
            return self._file.read(size)


class ByteRangeReader:
    """Reads spans of many files. Safe to fork and to pickle: open files stay behind.

    Each span may come with its *block*, the longer stretch around it that the same rank will read soon. Of a local
    file the kernel is told to fetch the block; of a remote one the block is brought over in one request and kept in
    ``cache_dir``, which all workers of a host share. Without a cache each remote span is a request of its own.
    """

    def __init__(self, *, cache_dir: Path | None = None, cache_bytes: int = 0, max_open_files: int = 64) -> None:
        self._cache = (cache_dir, cache_bytes)
        self._cache_rests_until_s = 0.0
        self._files = _OpenFiles(max_open_files)
        self._asked_for: OrderedDict[Span, None] = OrderedDict()

    def read(self, spans: Sequence[Span], blocks: Sequence[Span] | None = None) -> list[bytes]:
        """Return the bytes of each span; fewer where the file is shorter.

        Raises:
            OSError: a file cannot be read; its ``filename`` is the location.
        """
        payloads = [b""] * len(spans)
        remote = [i for i, span in enumerate(spans) if is_url(span.location)]
        for i in sorted(set(range(len(spans))) - set(remote)):
            if blocks is not None:
                self._announce(blocks[i])
            payloads[i] = self._files.pread(spans[i])
        if remote:
            theirs = None if blocks is None else [blocks[i] for i in remote]
            for i, payload in zip(remote, self._read_remote([spans[i] for i in remote], theirs), strict=True):
                payloads[i] = payload
        return payloads

    def _announce(self, block: Span) -> None:
        if block in self._asked_for:
            return
        self._asked_for[block] = None
        if len(self._asked_for) > _REMEMBERED_BLOCKS:
            self._asked_for.popitem(last=False)
        self._files.will_need(block)

    def _read_remote(self, spans: list[Span], blocks: list[Span] | None) -> list[bytes]:
        folder, max_bytes = self._cache
        if folder is None or blocks is None or time.monotonic() < self._cache_rests_until_s:
            return _fetch(spans)
        cache = _BlockCache(folder, max_bytes)
        try:
            cache.fill(dict.fromkeys(blocks))
            payloads = [cache.read(span, block) for span, block in zip(spans, blocks, strict=True)]
        except _CacheError as error:
            logger.warning(
                "cache_dir %s cannot be used (%s): shards are read past it; free space, lower cache_bytes, or name "
                "another folder",
                *(folder, error),
            )
            self._cache_rests_until_s = time.monotonic() + _CACHE_REST_S
            return _fetch(spans)
        lost = [i for i, payload in enumerate(payloads) if payload is None]  # evicted in between by another process
        for i, payload in zip(lost, _fetch([spans[i] for i in lost]), strict=True):
            payloads[i] = payload
        return [payload for payload in payloads if payload is not None]

    def forget(self, location: str) -> None:
        """Close a file, so that the next read opens it anew."""
        self._files.forget(location)

    def __reduce__(self) -> tuple[Any, ...]:
        return _byte_range_reader, (*self._cache, self._files.max_open)


def _byte_range_reader(cache_dir: Path | None, cache_bytes: int, max_open_files: int) -> ByteRangeReader:
    return ByteRangeReader(cache_dir=cache_dir, cache_bytes=cache_bytes, max_open_files=max_open_files)


class _OpenFiles:
    """The most recently used descriptors."""

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def pread(self, span: Span) -> bytes:
        try:
            return os.pread(self._descriptor(span.location), span.size, span.offset)
        except OSError as error:
            error.filename = span.location
            raise

    def will_need(self, block: Span) -> None:
        os.posix_fadvise(self._descriptor(block.location), block.offset, block.size, os.POSIX_FADV_WILLNEED)

    def forget(self, location: str) -> None:
        descriptor = self._descriptors.pop(location, None)
        if descriptor is not None:
            os.close(descriptor)

    def _descriptor(self, location: str) -> int:
        if location in self._descriptors:
            self._descriptors.move_to_end(location)
        else:
            self._descriptors[location] = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > self.max_open:
                self.forget(next(iter(self._descriptors)))
        return self._descriptors[location]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class _CacheError(Exception):
    """The folder of the block cache cannot be used; nothing is wrong with the remote storage."""


class _AsCacheError:
    """Turns failures of the cache's own folder into `_CacheError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _CacheError(error.strerror or repr(error)) from error


class _BlockCache:
    """Blocks of remote files in a local folder that processes share; the longest unused ones make room.

    A block is whole or absent (written aside and renamed), and nothing has to be cleaned up after a kill but the
    drafts, which the next eviction removes like any old file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def fill(self, blocks: "dict[Span, None]") -> None:
        """Bring the blocks that are not here.

        Raises:
            _CacheError: the folder cannot be used.
            OSError: the remote storage fails.
        """
        with _AsCacheError():
            missing = [block for block in blocks if not self._touch(self._path(block))]
            if not missing:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(sum(block.size for block in missing))
        for block, payload in zip(missing, _fetch(missing), strict=True):
            draft = self._folder / f".{uuid.uuid4().hex}.tmp"
            with _AsCacheError():
                try:
                    draft.write_bytes(payload)
                    draft.replace(self._path(block))
                finally:
                    draft.unlink(missing_ok=True)

    def read(self, span: Span, block: Span) -> bytes | None:
        with _AsCacheError():
            try:
                with self._path(block).open("rb") as file:
                    return os.pread(file.fileno(), span.size, span.offset - block.offset)
            except FileNotFoundError:
                return None

    def _path(self, block: Span) -> Path:
        name = f"{place_of(block.location)}\0{block.tag}\0{block.offset}\0{block.size}"
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.block"

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, num_bytes: int) -> None:
        files = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith((".block", ".tmp")):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in files) + num_bytes - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size


def _fetch(spans: Sequence[Span]) -> list[bytes]:
    """Bring remote spans over, all at the same time."""
    payloads: list[bytes] = []
    if not spans:
        return payloads
    locations = [span.location for span in spans]
    with _AsOSError(locations[0]):
        found = _file_system(locations[0]).cat_ranges(
            locations,
            [span.offset for span in spans],
            [span.offset + span.size for span in spans],
            on_error="return",
        )
    for span, payload in zip(spans, found, strict=True):
        with _AsOSError(span.location):
            if isinstance(payload, BaseException):
                raise payload
        if len(payload) > span.size:
            raise OSError(errno.EOPNOTSUPP, _NO_RANGES, span.location)
        payloads.append(bytes(payload))
    return payloads


def _file_system(location: str) -> Any:
    scheme = location.partition(":")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(
            f"{location} needs the package {_PACKAGES[scheme]}: pip install 'face-mae-trainer[remote]'"
        ) from error


class _AsOSError:
    """Turns what fsspec's many back ends raise into an `OSError` about the location."""

    def __init__(self, location: str) -> None:
        self._location = location

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TrainerError) or not isinstance(error, Exception | asyncio.CancelledError):
            return
        if isinstance(error, OSError) and error.errno and error.filename == self._location:
            return
        cause = error.__cause__ if hasattr(error.__cause__, "status") else error  # fsspec calls every failure a 404
        raise OSError(_number_of(cause), without_secrets(f"{type(cause).__name__}: {cause}"), self._location) from error


def _number_of(error: BaseException | None) -> int:
    """Return the number of the system's error that is nearest."""
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    if isinstance(error, PermissionError):
        return errno.EACCES
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return _STATUS.get(status, errno.EIO)
    return error.errno if isinstance(error, OSError) and error.errno else errno.EIO
