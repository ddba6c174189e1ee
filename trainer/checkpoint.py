"""Checkpoints that are whole or absent, and a resume that goes on exactly or refuses with a reason.

Layout below OUTPUT/checkpoints::

    step-00000500/manifest.json    what the checkpoint is, and the sha256 of every file beside it
    step-00000500/state/...        DeepSpeed's files
    latest                         name of the newest one, for people; loading trusts manifests only
    .step-00000500.tmp-...         a save under way, or one that was killed; swept by the next start

Commit: every rank writes and fsyncs into the temp folder, the ranks agree that all succeeded, rank 0 hashes the files,
writes the manifest, renames the folder, then moves ``latest`` and prunes. DeepSpeed's own ``latest`` is written before
its barrier and can name a folder with half of the shards (reliability of DeepSpeed 0.19.8, engine.py:4956); it is
never written here.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import differing_fields
from trainer.errors import CheckpointError, DataError
from trainer.world import World

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_HASHERS = 4
_DATA = ("data_fingerprint", "data_shares")
_CHANGE = "pass --allow_data_change true, which the checkpoint will record, or choose another output_dir"


@dataclass(slots=True)
class Progress:
    """What must survive a restart beside the engine's state. Samples passed are data_step x global batch."""

    step: int = 0
    """Optimizer steps taken."""
    skipped_steps: int = 0
    """How many of them moved nothing, because a loss or a gradient was not finite."""
    skips: list[dict[str, int]] = field(default_factory=list)
    """Each rollback: from the optimizer step ``at_step`` on, the data of ``num_steps`` more steps are left out."""
    recent_losses: list[float] = field(default_factory=list)
    """What the next loss is compared with, oldest first."""
    spiking_since: int | None = None
    """The first step of the loss spike that is going on."""
    num_spikes: int = 0
    """How many steps in a row it has."""

    @property
    def data_step(self) -> int:
        """Which step's data comes next: rollbacks left some out, all of them behind this step."""
        return self.step + sum(skip["num_steps"] for skip in self.skips)

    data_changes: list[dict[str, Any]] = field(default_factory=list)
    """Each time that the user let the run go on with other data: the step, and the data before and after."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run is. A checkpoint of another identity is not resumed."""

    recipe: dict[str, Any]
    data_fingerprint: str
    data_shares: str
    plan_version: int
    zero_stage: int
    precision: str
    num_ranks: int
    init: str = ""
    """sha256 of the weights that training started from, where these were given; frozen ones are not saved."""


def save(
    root: Path,
    progress: Progress,
    identity: Identity,
    versions: dict[str, str],
    *,
    write_state: Callable[[Path], None],
    world: World,
    keep: int,
) -> Path:
    """Commit one checkpoint; all ranks call and all get the same verdict.

    Args:
        root: folder of the checkpoints.
        progress: where the run stands.
        identity: what the run is.
        versions: library versions, recorded for people.
        write_state: writes this rank's files below the folder it is given.
        world: the ranks.
        keep: how many of the newest checkpoints remain.

    Returns:
        path: the committed folder.

    Raises:
        CheckpointError: a rank could not write; nothing was committed and older checkpoints are untouched.
    """
    final = root / f"step-{progress.step:08d}"
    draft = world.on_main(lambda: str(_new_draft(final)))
    problem = _attempt(lambda: _write_and_sync(Path(draft), write_state))
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(world.gather_over_ranks(problem)) if text]
    if problems:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} was not written ({'; '.join(problems[:3])}); earlier checkpoints are untouched: "
            "free space or mend the storage, then start again with --resume auto"
        )

    def commit() -> str:
        try:
            _write_manifest(Path(draft), progress, identity, versions)
            _publish(Path(draft), final)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} was not committed ({error}): mend the storage") from error
        _prune(root, keep)
        return str(final)

    return Path(world.on_main(commit))


def find(root: Path, *, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest checkpoint whose manifest verifies, with its manifest; None where none was ever committed.

    Only checkpoints of steps below ``before`` count where it is given.

    Damaged checkpoints are named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged. A fresh start must be asked for.
    """
    damaged = []
    for path in sorted(_committed(root), key=_step_of, reverse=True):
        if before is not None and _step_of(path) >= before:
            continue
        try:
            return path, verify(path)
        except CheckpointError as error:
            logger.error("%s", error)
            damaged.append(path.name)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged ({', '.join(damaged)}): restore one from a backup, "
            "or start anew in another output_dir"
        )
    return None


def verify(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and hash its files.

    Raises:
        CheckpointError: the manifest or a file is missing, cut or altered; the message names it.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        files, version = manifest["files"], manifest["format_version"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        Progress(**manifest["progress"])
        Identity(**manifest["identity"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {_MANIFEST} is unreadable ({error!r}): remove this folder"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {path} has format {version}, but this is {FORMAT_VERSION}: use the old code")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entries):
        raise CheckpointError(f"checkpoint {path}: {_MANIFEST} names files outside its folder: remove this folder")
    found = describe_files(path, only=set(entries))
    for name, (size, digest) in entries.items():
        if found.get(name) != {"bytes": size, "sha256": digest}:
            state = "missing" if name not in found else "altered or cut"
            raise CheckpointError(f"checkpoint {path}: {name} is {state}: remove this folder")
    return manifest


def check_identity(
    manifest: dict[str, Any], identity: Identity, path: Path, *, allow_data_change: bool = False
) -> Progress:
    """Return where the run stands, or refuse to resume a checkpoint of another run.

    The world size may differ at ZeRO stage 0, where every rank holds the whole state. Data may differ where the user
    allows it; the change becomes part of the progress.

    Raises:
        CheckpointError: data, plan or recipe differ, naming both values.
    """
    theirs, ours = manifest["identity"], dataclasses.asdict(identity)
    differing = differing_fields(ours["recipe"], theirs["recipe"])
    if differing:
        raise CheckpointError(
            f"checkpoint {path} belongs to another recipe, differing in {'; '.join(differing)}: "
            "undo the change, or choose another output_dir"
        )
    remedies = {
        "data_fingerprint": f"point --data at the shards of that run, or {_CHANGE}",
        "data_shares": f"give --data the shares of that run, or {_CHANGE}",
        "plan_version": "resume with the version of this package that wrote it, or choose another output_dir",
        "init": "point --init at the weights that this run started from, or choose another output_dir",
        "zero_stage": "use the ds_config of that run",
        "precision": "use the ds_config of that run",
        "num_ranks": f"start {theirs['num_ranks']} ranks (any number goes on from ZeRO stage 0)",
    }
    free = set(_DATA) if allow_data_change else set()
    if identity.zero_stage == theirs["zero_stage"] == 0:
        free.add("num_ranks")
    for name, remedy in remedies.items():
        if theirs[name] != ours[name] and name not in free:
            raise CheckpointError(
                f"checkpoint {path} was written with {name} {theirs[name]}, but this run has {ours[name]}: {remedy}"
            )
    progress = Progress(**manifest["progress"])
    before, after = ({name: values[name] for name in _DATA} for values in (theirs, ours))
    if before != after:
        logger.warning("the data changed at step %d from %s to %s", progress.step, before, after)
        progress.data_changes.append({"step": progress.step, "before": before, "after": after})
    return progress


def rewind(root: Path, progress: Progress, *, max_attempts: int) -> Path | None:
    """Make the newest checkpoint before the present loss spike the newest of all, with the data since then left out.

    Call on one rank, then resume. Newer checkpoints are removed first: a kill in the middle leaves a run that meets the
    spike once more and comes back here.

    Returns:
        path: of that checkpoint; None where there is no such checkpoint, and nothing was done.

    Raises:
        DataError: that checkpoint has been returned to so many times already.
    """
    found = find(root, before=progress.spiking_since)
    if found is None:
        return None
    chosen, manifest = found
    saved = Progress(**manifest["progress"])
    attempts = sum(skip["at_step"] == saved.step for skip in saved.skips)
    if attempts >= max_attempts:
        raise DataError(
            f"the loss spikes at step {progress.spiking_since} although the run went back to {chosen} {attempts} times "
            "and left out the data behind it: the data are not the cause, so lower learning_rate, set clip_grad_norm "
            "1.0, or set on_spike log"
        )
    for path in sorted(_committed(root), key=_step_of, reverse=True):
        if _step_of(path) > saved.step:
            _remove(path)
    saved.skips.append({"at_step": saved.step, "num_steps": progress.data_step - saved.data_step})
    manifest["progress"] = dataclasses.asdict(saved)
    write_atomically(chosen / _MANIFEST, json.dumps(manifest, indent=1))
    write_atomically(root / "latest", chosen.name + "\n")
    return chosen


def sweep(root: Path) -> None:
    """Remove the temp folders of saves that were killed. Call before training, on one rank."""
    for leftover in root.glob(".step-*.tmp-*"):
        logger.warning("removing %s, a checkpoint that was interrupted while being written", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: readers see the old text or the new one, also after a power cut."""
    draft = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync_folder(path.parent)


def _new_draft(final: Path) -> Path:
    draft = final.with_name(f".{final.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {draft} ({error.strerror}): check --output_dir") from error
    return draft


def _attempt(work: Callable[[], None]) -> str | None:
    """Turn a failure into a text that can be agreed upon: a rank that raised alone would leave the others waiting."""
    try:
        work()
    except Exception as error:
        logger.exception("writing the checkpoint failed on this rank")
        return f"{type(error).__name__}: {error}"
    return None


def _write_and_sync(draft: Path, write_state: Callable[[Path], None]) -> None:
    write_state(draft)
    # After the collective write each rank syncs everything it can see: on one host that is cheap the second time,
    # on several hosts only the writer's own cache holds its file.
    for path in _files(draft):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_manifest(draft: Path, progress: Progress, identity: Identity, versions: dict[str, str]) -> None:
    manifest = {
        "format_version": FORMAT_VERSION,
        "progress": dataclasses.asdict(progress),
        "samples": progress.data_step * int(identity.recipe["global_batch"]),
        "identity": dataclasses.asdict(identity),
        "versions": versions,
        "files": describe_files(draft),
    }
    write_atomically(draft / _MANIFEST, json.dumps(manifest, indent=1))
    for folder in {path.parent for path in _files(draft)}:
        _sync_folder(folder)


def _publish(draft: Path, final: Path) -> None:
    if final.exists() and not _is_valid(final):  # met when a damaged newest one was passed over at the resume
        final.rename(final.with_name(f".{final.name}.tmp-damaged-{uuid.uuid4().hex[:8]}"))
    if final.exists():
        shutil.rmtree(draft)  # the same step of the same run: what is already safe stays
    else:
        draft.rename(final)
    _sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _prune(root: Path, keep: int) -> None:
    """Remove the oldest checkpoints. They are renamed first, so that a kill leaves no half of one behind."""
    for path in sorted(_committed(root), key=_step_of)[:-keep]:
        try:
            _remove(path)
        except OSError as error:  # an old checkpoint too many is no reason to stop a run
            logger.warning("could not remove %s (%s)", path, error)


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.tmp-pruned-{uuid.uuid4().hex[:8]}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _committed(root: Path) -> Iterator[Path]:
    return (path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name))


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, only: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return length and sha256 of each file below a folder, by its name there."""
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    chosen = {name: path for name, path in names.items() if only is None or name in only}
    with ThreadPoolExecutor(_HASHERS) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(_sha256, chosen.values()))
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(chosen.items(), digests, strict=True)
    }


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the storage") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
