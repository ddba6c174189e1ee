"""Read byte ranges of many files: local ones by ``pread``, remote ones through a block cache that a host shares."""

import errno
import hashlib
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.storage import NO_RANGES, AsOSError, Span, file_system, is_url, place_of

logger = logging.getLogger(__name__)

_MAX_REMEMBERED_BLOCKS = 4096
_CACHE_PAUSE_S = 60.0
"""A cache folder that failed is not used for this long."""


class ByteRangeReader:
    """Reads spans of many files. Safe to fork and to pickle: open files are not copied.

    Each span may come with its *block*, the longer range around it that the same rank will read soon. For a local file
    the kernel is asked to read the block ahead. A remote block is fetched in one request and kept in ``cache_dir``,
    which all workers of a host share. Without a cache, each remote span is a request of its own.

    Args:
        cache_dir: folder of the block cache; None means no cache.
        cache_bytes: limit of the cache [bytes].
        max_open_files: file descriptors that stay open.
    """

    def __init__(self, *, cache_dir: Path | None = None, cache_bytes: int = 0, max_open_files: int = 64) -> None:
        self._cache = (cache_dir, cache_bytes)
        self._cache_paused_until_s = 0.0
        self._files = _OpenFiles(max_open_files)
        self._announced: OrderedDict[Span, None] = OrderedDict()

    def read(self, spans: Sequence[Span], blocks: Sequence[Span] | None = None) -> list[bytes]:
        """Return the bytes of each span, fewer if the file is shorter.

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
            remote_blocks = None if blocks is None else [blocks[i] for i in remote]
            for i, payload in zip(remote, self._read_remote([spans[i] for i in remote], remote_blocks), strict=True):
                payloads[i] = payload
        return payloads

    def _announce(self, block: Span) -> None:
        if block in self._announced:
            return
        self._announced[block] = None
        if len(self._announced) > _MAX_REMEMBERED_BLOCKS:
            self._announced.popitem(last=False)
        self._files.will_need(block)

    def _read_remote(self, spans: list[Span], blocks: list[Span] | None) -> list[bytes]:
        folder, max_bytes = self._cache
        if folder is None or blocks is None or time.monotonic() < self._cache_paused_until_s:
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
            self._cache_paused_until_s = time.monotonic() + _CACHE_PAUSE_S
            return _fetch(spans)
        lost = [i for i, payload in enumerate(payloads) if payload is None]  # another process has just evicted them
        for i, payload in zip(lost, _fetch([spans[i] for i in lost]), strict=True):
            payloads[i] = payload
        return [payload for payload in payloads if payload is not None]

    def forget(self, location: str) -> None:
        """Close a file, so that the next read opens it again."""
        self._files.forget(location)

    def __reduce__(self) -> tuple[Any, ...]:
        return _byte_range_reader, (*self._cache, self._files.max_open)


def _byte_range_reader(cache_dir: Path | None, cache_bytes: int, max_open_files: int) -> ByteRangeReader:
    return ByteRangeReader(cache_dir=cache_dir, cache_bytes=cache_bytes, max_open_files=max_open_files)


class _OpenFiles:
    """The most recently used file descriptors."""

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
    """The folder of the block cache cannot be used; the remote storage is not at fault."""


class _AsCacheError:
    """Turns failures of the cache folder into `_CacheError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _CacheError(error.strerror or repr(error)) from error


class _BlockCache:
    """Blocks of remote files in a local folder that processes share; the least recently used ones are evicted.

    A block appears atomically (written to a draft, then renamed). After a kill only a draft may remain, which the next
    eviction removes like any old file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def fill(self, blocks: "dict[Span, None]") -> None:
        """Fetch the missing blocks.

        Raises:
            _CacheError: the folder cannot be used.
            OSError: the remote storage failed.
        """
        with _AsCacheError():
            missing = [block for block in blocks if not self._touch(self._path(block))]
            if not missing:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(sum(block.size for block in missing))
        for block, payload in zip(missing, _fetch(missing), strict=True):
            draft = self._folder / f".{uuid.uuid4().hex}.tmp"  # not synced: a lost block is only fetched again
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
    """Fetch remote spans, all at the same time."""
    payloads: list[bytes] = []
    if not spans:
        return payloads
    locations = [span.location for span in spans]
    with AsOSError(locations[0]):
        found = file_system(locations[0]).cat_ranges(
            locations,
            [span.offset for span in spans],
            [span.offset + span.size for span in spans],
            on_error="return",
        )
    for span, payload in zip(spans, found, strict=True):
        with AsOSError(span.location):
            if isinstance(payload, BaseException):
                raise payload
        if len(payload) > span.size:
            raise OSError(errno.EOPNOTSUPP, NO_RANGES, span.location)
        payloads.append(bytes(payload))
    return payloads
