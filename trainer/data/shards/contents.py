"""What one shard holds, as arrays on their way to the index: read with patience, kept when a start is interrupted."""

import hashlib
import json
import logging
import os
import time
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards.members import GROUP_FIELDS, MAX_JSON_BYTES, Tally, samples_of
from trainer.data.shards.tar import walk_tar
from trainer.data.storage import LASTING, is_url, place_of, stamp
from trainer.errors import DataError, without_secrets

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
"""Files of an index with a number for each sample."""
_BYTES_WORTH_A_PART = 64 << 20
_DAMAGED_PART = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(slots=True)
class ShardContents:
    """What one shard holds."""

    columns: dict[str, NDArray[Any]]
    keys: bytes
    groups: dict[str, tuple[list[str], NDArray[np.int32]]]
    """Field -> its values in order of appearance, and the code of each sample among them."""
    sha256: str
    tally: Tally
    stamp: dict[str, Any]
    """Name, length and version of the shard before it was read."""


def patiently(
    work: Callable[[], T],
    describe: Callable[[OSError, int], str],
    *,
    forget: Callable[[OSError], None] = lambda _: None,
    num_retries: int | None = None,
    first_wait_s: float | None = None,
) -> T:
    """Do what storage may fail at; what passes is tried again, with growing pauses.

    Args:
        work: raises `OSError` where the storage fails.
        describe: turns the last failure and the number of attempts into a message.
        forget: is told each failure, to close what is open.
        num_retries: none takes `NUM_RETRIES`.
        first_wait_s: none takes `FIRST_WAIT_S`.

    Raises:
        DataError: it fails again and again, or for good.
    """
    wait_s, attempt = FIRST_WAIT_S if first_wait_s is None else first_wait_s, 1
    while True:
        try:
            return work()
        except OSError as error:
            forget(error)
            if error.errno in LASTING or attempt > (NUM_RETRIES if num_retries is None else num_retries):
                raise DataError(describe(error, attempt)) from error
            name, reason = without_secrets(str(error.filename)), without_secrets(str(error.strerror))
            logger.warning("reading %s failed (%s), trying again in %.1f s", name, reason, wait_s)
            time.sleep(wait_s)
            wait_s, attempt = 2 * wait_s, attempt + 1


def stamp_of(shard: str) -> dict[str, Any]:
    """Describe the present state of a shard as `stamp`, with patience.

    Raises:
        DataError: it cannot be looked at.
    """
    return patiently(
        lambda: stamp(shard),
        lambda error, attempts: (
            f"shard {shard} cannot be read ({error.strerror}) after {attempts} attempts: check the path and access"
        ),
    )


def read_contents(shard: str, *, image_member: str | None, version: int, parts: Path) -> ShardContents:
    """Read every byte of a shard, or take what an interrupted start has kept of it.

    Args:
        shard: its location.
        image_member: as in `samples_of`.
        version: of the index; parts of other versions are of no use.
        parts: folder in which long shards are kept until the index is whole.

    Raises:
        DataError: the shard breaks the rules, changes, or cannot be read.
    """
    before = stamp_of(shard)
    identity = json.dumps([place_of(shard), before, version, image_member])
    path = parts / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    kept = _load(path)
    if kept is not None:
        return kept

    def read() -> ShardContents:
        try:
            return _read(shard, image_member, before)
        except DataError as error:
            if isinstance(error.__cause__, OSError):  # the storage's, not the shard's
                raise error.__cause__ from None
            raise

    contents = patiently(
        read,
        lambda error, attempts: (
            f"shard {shard} cannot be read ({error.strerror}) after {attempts} attempts: check the storage and "
            "permissions, then start again; what was read of other shards is kept"
        ),
    )
    if stamp_of(shard) != before:
        raise DataError(f"shard {shard} changed while it was read: wait until it is written, then start again")
    if is_url(shard) or before["num_bytes"] >= _BYTES_WORTH_A_PART:
        _save(path, contents)
    return contents


def _read(location: str, image_member: str | None, before: dict[str, Any]) -> ShardContents:
    digest, tally = hashlib.sha256(), Tally()
    rows, keys, key_ends, num_key_bytes = [], [], [], 0
    groups: dict[str, list[str | None]] = {name: [] for name in GROUP_FIELDS}
    members = walk_tar(location, digest=digest, keep_payload_below=MAX_JSON_BYTES + 1)
    for sample in samples_of(location, members, image_member=image_member, tally=tally):
        rows.append((sample.image.offset, sample.image.size, sample.image.crc32, sample.label, *sample.marks))
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        num_key_bytes += len(keys[-1])
        key_ends.append(num_key_bytes)
        for name, values in groups.items():
            values.append(sample.groups.get(name))
    if not rows:
        notes = "".join(f" ({note})" for note in tally.notes())
        raise DataError(f"shard {location}: it holds no sample{notes}: remove the file, or write it anew")
    values_of = dict(zip(SHARD_COLUMNS, (*zip(*rows, strict=True), key_ends), strict=True))
    columns = {name: np.array(values_of[name], dtype=dtype) for name, dtype in SHARD_COLUMNS.items()}
    coded = {name: _coded(values) for name, values in groups.items()}
    return ShardContents(columns, b"".join(keys), coded, digest.hexdigest(), tally, before)


def _coded(values: Sequence[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    codes: dict[str, int] = {}
    numbers = [NO_GROUP if value is None else codes.setdefault(value, len(codes)) for value in values]
    return list(codes), np.array(numbers, dtype=np.int32)


def _save(path: Path, contents: ShardContents) -> None:
    """Keep the contents of a shard; where that fails they are only read again."""
    texts = {"sha256": contents.sha256, "tally": contents.tally.to_dict(), "stamp": contents.stamp}
    texts["groups"] = {name: values for name, (values, _) in contents.groups.items()}
    arrays = contents.columns | {f"group-{name}": codes_N for name, (_, codes_N) in contents.groups.items()}
    arrays["keys"] = np.frombuffer(contents.keys, dtype=np.uint8)
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)
    except OSError as error:
        logger.info("what was read of one shard cannot be kept (%s)", error)
        draft.unlink(missing_ok=True)


def _load(path: Path) -> ShardContents | None:
    """Read what `_save` wrote; None where it is missing or damaged. The zip format has checksums."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            columns = {name: arrays[name] for name in SHARD_COLUMNS}
            groups = {name: (texts["groups"][name], arrays[f"group-{name}"]) for name in GROUP_FIELDS}
            keys = arrays["keys"].tobytes()
        return ShardContents(columns, keys, groups, texts["sha256"], Tally.from_dict(texts["tally"]), texts["stamp"])
    except _DAMAGED_PART as error:
        logger.info("%s is damaged (%s): its shard is read again", path, error)
        return None
