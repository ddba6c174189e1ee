"""Files of shards: local paths, and objects behind a few URL schemes through fsspec.

A *location* is a path or a URL. Nothing here retries: every failure of a library becomes an `OSError` whose
``filename`` is the location, and `trainer.data.shards.contents` and `trainer.data.shards.index` decide what it means.

Commands (``pipe:``), standard input, chained file systems (``::``) and environment variables in URLs are refused: a
list of shards is data, and data must not run programs or reveal secrets.
"""

import asyncio
import errno
import hashlib
import logging
import os
import re
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
# Parameters of signed URLs: who may read and how long, not which file (S3, Google, Azure, CloudFront, OSS).
_SIGNATURE = re.compile(
    r"(x-(amz|goog|ms|oss|cos)-|x-signature|(x-)?expires|signature|sig|se|sp|sv|sr|st|spr|sip|sk[a-z]+|token|policy"
    r"|key-pair-id|awsaccesskeyid|googleaccessid|ossaccesskeyid|security-token)[^=]*=",
    re.IGNORECASE,
)
_HTTP_WHOLE_FILE, _HTTP_EMPTY_RANGE = 200, 416
NO_RANGES = "the server ignores Range requests and sends whole files"
_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
"""Answers of web servers that a retry does not change; 403 is also an expired signature."""
PERMANENT_ERRNOS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EOPNOTSUPP)
"""Failures that a retry does not change."""
_VERSIONS = ("ETag", "etag", "LastModified", "updated", "Last-Modified", "Content-MD5", "Digest")
"""Names that file systems give to the version of an object."""
_READ_AHEAD_BYTES = 8 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes."""

    location: str
    offset: int
    size: int
    tag: int = 0
    """Version of the file: the start of its sha256, 0 if unknown."""


def is_url(location: str) -> bool:
    """Whether the location is not a local path."""
    return _URL.match(location) is not None


def place_of(location: str) -> str:
    """Return one name for a file, whatever way its path is written and its URL is signed.

    Other parameters behind the ``?`` of a URL may choose the file, so their hash is part of the name.

    Example: ``http://h/a.tar?X-Amz-Signature=1`` and ``http://h/a.tar?X-Amz-Signature=2`` are ``http://h/a.tar``;
    ``http://h/get?file=a.tar`` is ``http://h/get?`` and a hash.
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
    """List the files of a path, folder, glob or URL with optional ``{000..099}`` ranges, sorted, at least one.

    Args:
        pattern: the user's text.
        setting: the flag it came from, for messages.
        suffix: suffix of the files to list in a folder.

    Raises:
        ConfigError: it matches nothing, is a command, or has an unsupported scheme.
    """
    _refuse_commands(pattern, setting)
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


def _refuse_commands(pattern: str, setting: str) -> None:
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
    """Return the remedy for a path without shards: images in a folder must be packed first."""
    folder = Path(name)
    if folder.is_dir():
        for number, path in enumerate(folder.rglob("*")):
            if path.suffix.lower() in _IMAGE_SUFFIXES:
                return f"it holds images such as {path.name}; {_PACK.format(name)}"
            if number > _MAX_FILES_INSPECTED:
                break
    return f"check the path (from {Path.cwd()})"


_MAX_FILES_INSPECTED = 10_000
"""Files of a folder that are searched for images."""


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
    """Describe files of a folder that look like shards but are not read; empty for none, or if it is no folder."""
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
        return sorted(f"{scheme}://{name}" for name in file_system(pattern).glob(pattern))
    except Exception as error:  # each scheme has exceptions of its own
        raise ConfigError(f"{setting}: {pattern!r} cannot be listed ({error!r}): check address and access") from error


def check_ranges(locations: Sequence[str]) -> None:
    """Check that each web server among the locations supports Range requests.

    Raises:
        OSError: a server sends whole files, or cannot be reached.
    """
    # One location of each server is enough; in reverse order, the first one of a server is kept.
    hosts = {location.split("/")[2]: location for location in reversed(locations) if location.startswith(_WEB)}
    for location in hosts.values():
        with AsOSError(location):
            fs = file_system(location)
            sends_parts = fsspec.asyn.sync(fs.loop, _sends_parts, fs, location)
        if not sends_parts:
            raise OSError(errno.EOPNOTSUPP, NO_RANGES, location)


async def _sends_parts(fs: Any, location: str) -> bool:
    """Request the first block, but do not read the content: it may be the whole file."""
    session = await fs.set_session()
    headers = {"Range": "bytes=0-511", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(location), **(fs.kwargs | {"headers": headers})) as answer:
        if answer.status != _HTTP_EMPTY_RANGE:
            answer.raise_for_status()
        return bool(answer.status != _HTTP_WHOLE_FILE)


def stamp(location: str) -> dict[str, Any]:
    """Return name, length [bytes] and version of a file; the version changes with the content.

    Raises:
        OSError: the file cannot be reached.
    """
    if not is_url(location):
        status = Path(location).stat()
        # A copy may keep the old mtime (cp -p, rsync -t), but it always gets a new ctime.
        version = f"{status.st_mtime_ns}-{status.st_ctime_ns}"
        return {"name": Path(location).name, "num_bytes": status.st_size, "version": version}
    with AsOSError(location):
        info = file_system(location).info(location)
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        name = place_of(location).partition("?")[0].rpartition("/")[2]
        return {"name": name, "num_bytes": int(info["size"]), "version": version}


@contextmanager
def reading(location: str) -> Iterator["ReadOnly"]:
    """Open a file for one pass from beginning to end.

    Raises:
        OSError: it cannot be opened, or read inside the block. Other errors of the block pass unchanged.
    """
    with AsOSError(location):
        file = _open(location)
    with file:
        yield ReadOnly(file, location)


def _open(location: str) -> BinaryIO:
    if not is_url(location):
        return Path(location).open("rb")
    file: BinaryIO = file_system(location).open(location, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
    return file


class ReadOnly:
    """A file whose read failures are all `OSError` with its location as ``filename``."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        with AsOSError(self._location):
            return self._file.read(size)


def file_system(location: str) -> Any:
    """Return fsspec's file system for a URL.

    Raises:
        ConfigError: the package for its scheme is not installed.
    """
    scheme = location.partition(":")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(
            f"{location} needs the package {_PACKAGES[scheme]}: pip install 'face-mae-trainer[remote]'"
        ) from error


class AsOSError:
    """Turns the errors of fsspec's back ends into an `OSError` with the location as ``filename``."""

    def __init__(self, location: str) -> None:
        self._location = location

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TrainerError) or not isinstance(error, Exception | asyncio.CancelledError):
            return
        if isinstance(error, OSError) and error.errno and error.filename == self._location:
            return
        cause = error.__cause__ if hasattr(error.__cause__, "status") else error  # fsspec makes every failure a 404
        raise OSError(_number_of(cause), without_secrets(f"{type(cause).__name__}: {cause}"), self._location) from error


def _number_of(error: BaseException | None) -> int:
    """Return the errno that is closest to an error."""
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    if isinstance(error, PermissionError):
        return errno.EACCES
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return _STATUS.get(status, errno.EIO)
    return error.errno if isinstance(error, OSError) and error.errno else errno.EIO
