"""Files that are whole or absent, and what proves it: drafts, syncs, hashes."""

import hashlib
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import DataError

_HASHERS = 4


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: readers see the old text or the new one, also after a power cut."""
    draft = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    write_synced(draft, text)
    draft.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a small file to stable storage."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_files(paths: Iterable[Path]) -> None:
    """Bring files that were just written to stable storage."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to stable storage."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """List every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, only: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return length and sha256 of files below a folder, by their names there; of all, or of those that exist of some.

    Raises:
        DataError: one cannot be read.
    """
    paths = files_below(folder) if only is None else [path for name in only if (path := folder / name).is_file()]
    with ThreadPoolExecutor(_HASHERS) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(_sha256, paths))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the storage") from error
