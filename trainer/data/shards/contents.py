"""What one shard holds, as arrays for the index: read with retries, and cached so that an interrupted start resumes."""

import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.members import GROUP_FIELDS, MAX_JSON_BYTES, Tally, samples_of
from trainer.data.shards.tar import walk_tar
from trainer.data.storage import PERMANENT_ERRNOS, is_url, place_of, stamp
from trainer.errors import DataError, without_secrets
from trainer.files import atomic_draft

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_RETRIES = 4
FIRST_WAIT_S = 0.5
NO_GROUP = -1
SHARD_COLUMNS: dict[str, type[np.generic]] = {
    "offset.i64": np.int64,
    "size.i64": np.int64,
    "crc32.u32": np.uint32,
    "label.i32": np.int32,
    "marks_offset.i64": np.int64,
    "marks_size.i32": np.int32,
    "key_end.i64": np.int64,
}
"""Files of an index that hold one number for each sample; `marks` are the landmarks."""
_MIN_CACHED_BYTES = 64 << 20
"""Smaller local shards are read again instead of cached."""
_DAMAGED_CACHE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(slots=True)
class ShardContents:
    """What one shard holds."""

    columns: dict[str, NDArray[Any]]
    keys: bytes
    groups: dict[str, tuple[list[str], NDArray[np.int32]]]
    """Field -> its values in order of appearance, and for each sample the number of its value, or `NO_GROUP`."""
    sha256: str
    tally: Tally
    stamp: dict[str, Any]
    """Name, length and version of the shard, taken before it was read."""


def with_retries(
    work: Callable[[], T],
    describe: Callable[[OSError, int], str],
    *,
    on_failure: Callable[[OSError], None] = lambda _: None,
    num_retries: int | None = None,
    first_wait_s: float | None = None,
) -> T:
    """Call ``work``, and call it again after a passing failure of the storage, with pauses that double.

    Args:
        work: raises `OSError` if the storage fails.
        describe: makes the message from the last failure and the number of attempts.
        on_failure: is called with each failure, to close open files.
        num_retries: None means `NUM_RETRIES`.
        first_wait_s: None means `FIRST_WAIT_S`.

    Raises:
        DataError: every attempt failed, or the failure is permanent.

    Example: 4 retries from 0.5 s wait 0.5, 1, 2 and 4 s.
    """
    wait_s, attempt = FIRST_WAIT_S if first_wait_s is None else first_wait_s, 1
    while True:
        try:
            return work()
        except OSError as error:
            on_failure(error)
            if error.errno in PERMANENT_ERRNOS or attempt > (NUM_RETRIES if num_retries is None else num_retries):
                raise DataError(describe(error, attempt)) from error
            name, reason = without_secrets(str(error.filename)), without_secrets(str(error.strerror))
            logger.warning("reading %s failed (%s), trying again in %.1f s", name, reason, wait_s)
            time.sleep(wait_s)
            wait_s, attempt = 2 * wait_s, attempt + 1


def stamp_of(shard: str) -> dict[str, Any]:
    """Return the `stamp` of a shard, with retries.

    Raises:
        DataError: the shard cannot be reached.
    """
    return with_retries(
        lambda: stamp(shard),
        lambda error, attempts: (
            f"shard {shard} cannot be read ({error.strerror}) after {attempts} attempts: check the path and access"
        ),
    )


def read_contents(shard: str, *, image_member: str | None, version: int, parts: Path) -> ShardContents:
    """Read every byte of a shard, or load what an interrupted start cached of it.

    Args:
        shard: its location.
        image_member: as in `samples_of`.
        version: of the index; a cache of another version is not used.
        parts: folder that caches the contents of long shards until the index is complete.

    Raises:
        DataError: the shard breaks the rules, changes, or cannot be read.
    """
    before = stamp_of(shard)
    # The cache is named by place, length, version and settings, so a changed shard has no cache.
    identity = json.dumps([place_of(shard), before, version, image_member])
    path = parts / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    cached = _load(path)
    if cached is not None:
        return cached

    def read() -> ShardContents:
        try:
            return _read(shard, image_member, before)
        except DataError as error:
            if isinstance(error.__cause__, OSError):  # the storage failed, not the shard: try again
                raise error.__cause__ from None
            raise

    contents = with_retries(
        read,
        lambda error, attempts: (
            f"shard {shard} cannot be read ({error.strerror}) after {attempts} attempts: check the storage and "
            "permissions, then start again; what was read of other shards is kept"
        ),
    )
    if stamp_of(shard) != before:
        raise DataError(f"shard {shard} changed while it was read: wait until it is written, then start again")
    if is_url(shard) or before["num_bytes"] >= _MIN_CACHED_BYTES:
        _save(path, contents)
    return contents


def _read(location: str, image_member: str | None, before: dict[str, Any]) -> ShardContents:
    digest, tally = hashlib.sha256(), Tally()
    rows, keys, key_ends, num_key_bytes = [], [], [], 0
    groups: dict[str, list[str | None]] = {name: [] for name in GROUP_FIELDS}
    members = walk_tar(location, digest=digest, keep_payload_below=MAX_JSON_BYTES + 1)
    for sample in samples_of(location, members, image_member=image_member, tally=tally):
        rows.append((sample.image.offset, sample.image.size, sample.image.crc32, sample.label, *sample.landmarks_span))
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        num_key_bytes += len(keys[-1])
        key_ends.append(num_key_bytes)
        for name, values in groups.items():
            values.append(sample.groups.get(name))
    if not rows:
        notes = "".join(f" ({note})" for note in tally.notes())
        raise DataError(f"shard {location}: it holds no sample{notes}: remove the file, or write it again")
    values_of = dict(zip(SHARD_COLUMNS, (*zip(*rows, strict=True), key_ends), strict=True))
    columns = {name: np.array(values_of[name], dtype=dtype) for name, dtype in SHARD_COLUMNS.items()}
    coded = {name: _coded(values) for name, values in groups.items()}
    return ShardContents(columns, b"".join(keys), coded, digest.hexdigest(), tally, before)


def _coded(values: Sequence[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    """Number the values in order of appearance: b, None, a, b gives [b, a] and codes 0, -1, 1, 0."""
    codes: dict[str, int] = {}
    numbers = [NO_GROUP if value is None else codes.setdefault(value, len(codes)) for value in values]
    return list(codes), np.array(numbers, dtype=np.int32)


def _save(path: Path, contents: ShardContents) -> None:
    """Cache the contents of a shard; if that fails, the next start reads the shard again."""
    texts = {"sha256": contents.sha256, "tally": contents.tally.to_dict(), "stamp": contents.stamp}
    texts["groups"] = {name: values for name, (values, _) in contents.groups.items()}
    arrays = contents.columns | {f"group-{name}": codes_N for name, (_, codes_N) in contents.groups.items()}
    arrays["keys"] = np.frombuffer(contents.keys, dtype=np.uint8)
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_draft(path) as draft, draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        logger.info("what was read of one shard cannot be kept (%s)", error)


def _load(path: Path) -> ShardContents | None:
    """Load what `_save` wrote; None if it is missing or damaged, which the checksums of the zip format show."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            columns = {name: arrays[name] for name in SHARD_COLUMNS}
            groups = {name: (texts["groups"][name], arrays[f"group-{name}"]) for name in GROUP_FIELDS}
            keys = arrays["keys"].tobytes()
        return ShardContents(columns, keys, groups, texts["sha256"], Tally.from_dict(texts["tally"]), texts["stamp"])
    except _DAMAGED_CACHE as error:
        logger.info("%s is damaged (%s): its shard is read again", path, error)
        return None
