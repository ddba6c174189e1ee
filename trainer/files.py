"""Atomic files and folders: drafts, syncs and hashes."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import DataError

_NUM_HASH_THREADS = 4
_PRIVATE_MODE = 0o600
_PACKAGE = Path(__file__).resolve().parent


def data_file(name: str) -> Path:
    """Return the path of a file or folder that comes with the project.

    Args:
        name: its path in a checkout, for example ``ds_configs/cpu_fp32.json``. A checkout holds it beside the package
            ``trainer``, an installed wheel inside the package.
    """
    return (checkout() or _PACKAGE) / name


def checkout() -> Path | None:
    """Return the project's folder where this is a checkout; None where it is an installed wheel."""
    return None if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing, cut or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: readers see the old text or the new one, even after a power cut."""
    write_together({path: text})


def write_together(texts: Mapping[Path, str]) -> None:
    """Replace several small files: all of them, or none if one cannot be written.

    Raises:
        OSError: one cannot be written; the old files stay, and no draft is left.
    """
    drafts = {path: draft_of(path) for path in texts}
    try:
        for path, draft in drafts.items():
            write_synced(draft, texts[path])
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    for folder in {path.parent for path in texts}:
        sync_folder(folder)


def draft_of(path: Path) -> Path:
    """Return a hidden name beside a file or folder for its draft, unique for each call: ``.a.tar.tmp-1b2c3d4e``."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """Yield the name of a draft, which replaces the file if the block succeeds and is removed if it fails."""
    draft = draft_of(path)
    try:
        yield draft
        sync_files([draft])
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty draft folder, which becomes ``path`` if the block succeeds and is removed if it fails.

    Raises:
        OSError: the storage failed, or ``path`` is a folder with files.
    """
    draft = draft_of(path)
    try:
        draft.mkdir(parents=True)
        yield draft
        sync_files(files_below(draft))
        sync_folder(draft)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a small file to stable storage, as UTF-8 in every locale; characters without UTF-8 are escaped."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def readable(name: str) -> str:
    r"""Return a name from data as valid text: bytes that are no UTF-8 become ``\xNN``."""
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in name)


def sync_files(paths: Iterable[Path]) -> None:
    """Sync new files to stable storage, and give them the mode of the umask.

    Some libraries (tempfile, safetensors) create files that only their owner can read, whatever the umask.
    """
    for path in paths:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) == _PRIVATE_MODE:
                os.fchmod(file.fileno(), _mode_of_new_files(path.parent))
            os.fsync(file.fileno())


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode of a new file, by creating one: reading the umask would change it for all threads."""
    probe = folder / f".mode.tmp-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to stable storage."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """List every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, only: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return length [bytes] and sha256 of the files below a folder, by relative name.

    Args:
        folder: the folder.
        only: names to describe, if they exist; None means all files.

    Raises:
        DataError: a file cannot be read.
    """
    paths = files_below(folder) if only is None else [path for name in only if (path := folder / name).is_file()]
    with ThreadPoolExecutor(_NUM_HASH_THREADS) as pool:  # hashing releases the interpreter lock
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
