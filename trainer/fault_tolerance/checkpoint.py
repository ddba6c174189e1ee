"""Atomic checkpoints, and a resume that continues exactly or refuses with a reason.

Layout below OUTPUT/checkpoints::

    step-00000500/manifest.json    what the checkpoint is, and the sha256 of every file beside it
    step-00000500/state/...        DeepSpeed's files
    latest                         name of the newest one, for people; loading trusts manifests only

The commit protocol. A kill at any line leaves the checkpoints that were there before, or one more::

    1. all ranks   capture the state (a background save copies it to host memory)
    2. rank 0      creates attempts/000007/drafts/step-00000500-1a2b3c4d (see `attempts`)
    3. all ranks   write, fsync and hash their own files in it
    4. all ranks   exchange results: {file: bytes, sha256} or an error. An error on one rank stops here on all ranks
    5. rank 0      checks that it sees exactly these files, writes the manifest, fsyncs
    6. rank 0      renames the draft to checkpoints/step-00000500: from here on the checkpoint exists
    7. rank 0      replaces ``latest`` and removes old checkpoints

A background save does 2 to 7 in a thread of every rank, which has its own process group, while the training goes on.

DeepSpeed's own ``latest`` is written before its barrier and can name a folder with half of the shards (DeepSpeed
0.19.8, engine.py:4956); it is never written here. Its asynchronous engines are not used either: they do not report a
file that could not be written (decoupled_checkpoint_engine.py), move ``latest`` before all ranks are done, lose the
last save with the process, and write files that cannot be loaded again at ZeRO stages (DeepSpeed issue 8500).
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import threading
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.record import complete_record, differing_fields
from trainer.distributed.world import World
from trainer.errors import CheckpointError, DataError, TrainerError
from trainer.fault_tolerance.attempts import Lease
from trainer.files import describe_files, files_below, sync_files, sync_folder, write_synced

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT_VERSION = 3
_MANIFEST = "manifest.json"
_SEAL = "sha256"
_PARTS = {"format_version", "progress", "samples", "identity", "versions", "files"}
_NAME = re.compile(r"step-(\d{8,})")
_MAX_FAILED_SAVES = 3
"""Saves that may fail in a row before the run stops. One failure does not stop it: a disk may be full for an hour."""
_DATA = ("data_fingerprint", "data_shares")
_CHANGE = "pass --allow_data_change true, which the checkpoint will record, or choose another output_dir"


@dataclass(slots=True)
class Progress:
    """What must survive a restart beside the engine's state. Samples consumed are data_step x global batch."""

    step: int = 0
    """Optimizer steps taken."""
    skipped_steps: int = 0
    """How many of them changed no weight, because a loss or a gradient was not finite."""
    skips: list[dict[str, int]] = field(default_factory=list)
    """Each rollback: at the optimizer step ``at_step`` the run left out the data of ``num_steps`` steps."""
    recent_losses: list[float] = field(default_factory=list)
    """The losses that the next one is compared with, oldest first."""
    spiking_since: int | None = None
    """First step of the present loss spike."""
    num_spikes: int = 0
    """Number of steps in a row of the present loss spike."""

    @property
    def data_step(self) -> int:
        """The step whose data come next. At step 500, after rollbacks that left out 20 and 5 steps, it is 525."""
        return self.step + sum(skip["num_steps"] for skip in self.skips)

    data_changes: list[dict[str, Any]] = field(default_factory=list)
    """Each change of the data that the user allowed: the step, and the data before and after."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a run this run. A checkpoint with another identity is not resumed."""

    recipe: dict[str, Any]
    data_fingerprint: str
    data_shares: str
    plan_version: int
    zero_stage: int
    precision: str
    num_ranks: int
    init: str = ""
    """sha256 of the initial weights, where some were given. Frozen ones are not saved, so they must be the same."""


LEGACY_FIELDS: dict[str, dict[str, Any]] = {"progress": {}, "identity": {}}
"""Fields of `Progress` and `Identity` that early manifests of this format lack -> their value in those runs. A new
field needs a line here: without it every older checkpoint counts as damaged."""

WriteState = Callable[[Path], list[Path]]
"""Writes this rank's files below a folder and returns their paths."""


class Saver:
    """Commits the checkpoints of a run, one at a time; all ranks call every method, and it ends the same way on all.

    Args:
        root: folder of the checkpoints.
        identity: of the run.
        versions: library versions, recorded for people.
        lease: the right of this attempt to change the output.
        world: the ranks.
        keep: how many of the newest checkpoints remain.
        background: write while the training continues.
    """

    def __init__(
        self,
        root: Path,
        identity: Identity,
        versions: dict[str, str],
        *,
        lease: Lease,
        world: World,
        keep: int,
        background: bool = False,
    ) -> None:
        self._root, self._identity, self._versions = root, identity, versions
        self._lease, self._world, self._keep, self._background = lease, world, keep, background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed_saves = 0

    def save(self, progress: Progress, capture: Callable[[bool], WriteState]) -> None:
        """Commit the present state; a background save returns as soon as the state is copied.

        A failed save is logged, and the training continues; earlier checkpoints are untouched.

        Args:
            progress: of the run.
            capture: returns a writer of the engine's state; with True, of a copy of the state.

        Raises:
            CheckpointError: several saves in a row have failed.
            SupersededError: a newer attempt has taken over.
        """
        self.wait()
        record = dataclasses.asdict(progress)
        world = self._world.in_background() if self._background else self._world
        write_state = capture(self._background)
        if not self._background:
            self._commit(record, write_state, world)
            self._settle()
            return
        work = (record, write_state, world)
        self._thread = threading.Thread(target=self._commit, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a background save; raises as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()

    def finish(self) -> None:
        """Wait for the last save, which must succeed.

        Raises:
            CheckpointError: it has failed.
        """
        self.wait()
        if self._failed_saves:
            raise CheckpointError(
                f"the last checkpoint of this run could not be written to {self._root}, see above: free space or "
                "repair the storage, then start again with --resume auto"
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Finish. If the run ends with an error that the user can fix, a save in progress still completes."""
        if error is None:
            self.finish()
        elif isinstance(error, TrainerError):
            with contextlib.suppress(TrainerError):
                self.wait()

    def _settle(self) -> None:
        """Count a failed save, or reset the count after a good one; the same on every rank."""
        error, self._error = self._error, None
        if error is None:
            self._failed_saves = 0
        elif isinstance(error, CheckpointError):
            self._failed_saves += 1
            logger.error("%s", error)
            if self._failed_saves >= _MAX_FAILED_SAVES:
                raise CheckpointError(f"{error} ({self._failed_saves} saves in a row have failed)") from error
        else:
            raise error

    def _commit(self, record: dict[str, Any], write_state: WriteState, world: World) -> None:
        """Write and commit; an error is stored for `_settle`."""
        try:
            final = self._root / f"step-{record['step']:08d}"
            draft = Path(world.on_main(lambda: str(self._new_draft(final))))
            failure, files = _catch(lambda: _write_and_describe(draft, write_state))
            results = world.gather_over_ranks([failure, files])
            failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(results) if text]
            all_files = {name: entry for _, files in results for name, entry in files.items()}
            world.on_main(lambda: self._publish(draft, final, record, all_files, failures))
        except BaseException as error:  # noqa: BLE001  (the training thread raises it)
            self._error = error

    def _new_draft(self, final: Path) -> Path:
        draft = self._lease.draft(final.name)
        try:
            self._lease.check()
            self._root.mkdir(parents=True, exist_ok=True)
            _require_space(self._root)
            draft.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot create {draft} ({error.strerror}): check --output_dir") from error
        return draft

    def _publish(
        self, draft: Path, final: Path, record: dict[str, Any], files: dict[str, Any], failures: list[str]
    ) -> None:
        """Turn a complete draft into a checkpoint. On rank 0.

        Raises:
            CheckpointError: a rank could not write, or the storage fails; nothing was committed.
            SupersededError: a newer attempt has taken over.
        """
        try:
            self._lease.check()
            if failures:
                raise OSError("; ".join(failures[:3]))
            _write_manifest(draft, record, self._identity, self._versions, files)
            if final.exists() and not _is_valid(final):  # the resume skipped it as damaged, and the run is back here
                self._lease.discard(final)
            if not final.exists():  # a valid one is the same step of the same run: keep it
                self._lease.move(draft, final)
            self._lease.write(self._root / "latest", final.name + "\n")
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {final} was not written ({error}); earlier checkpoints are untouched: "
                "free space or repair the storage"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._prune(record["step"])

    def _prune(self, step: int) -> None:
        """Remove all but the newest checkpoints up to this step.

        With keep 2 and steps 100, 200, 300 (files missing) and 400, the kept ones are 200 and 400, so 100 is removed.
        The damaged 300 is newer than the oldest kept one and stays for the user to look at.
        """
        past = sorted((path for path in _committed(self._root) if _step_of(path) <= step), key=_step_of)
        kept = [path for path in past if _seems_complete(path)][-self._keep :]
        for path in past[: past.index(kept[0])]:
            try:
                self._lease.discard(path)
            except OSError as error:  # one checkpoint too many is no reason to stop a run
                logger.warning("could not remove %s (%s)", path, error)


def find(root: Path, *, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest valid checkpoint; return it with its manifest, or None where none was ever committed.

    Damaged checkpoints are logged and skipped.

    Args:
        root: folder of the checkpoints.
        before: look only at checkpoints of earlier steps than this one.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; the run never starts from scratch by itself.
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
            "or start a new run in another output_dir"
        )
    return None


def verify(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and hash its files.

    Raises:
        CheckpointError: the manifest or a file is missing, cut or altered; the message names it.
    """
    manifest = _read_manifest(path)
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    found = describe_files(path, only=entries)
    for name, (size, digest) in entries.items():
        if found.get(name) != {"bytes": size, "sha256": digest}:
            state = "missing" if name not in found else "altered or cut"
            raise CheckpointError(f"checkpoint {path}: {name} is {state}: remove this folder")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = _unsealed((path / _MANIFEST).read_text())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            for part, legacy in LEGACY_FIELDS.items():
                manifest[part] = legacy | manifest[part]
            _check_manifest(path, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {_MANIFEST} is unreadable ({error!r}): remove this folder"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {path} has format {version}, but this is {FORMAT_VERSION}: use the old code")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
        raise CheckpointError(f"checkpoint {path}: {_MANIFEST} names files outside its folder: remove this folder")
    return manifest


def _sealed(manifest: dict[str, Any]) -> str:
    """Write a manifest with its own sha256: without it, damage to a value looks like another recipe."""
    return json.dumps(manifest | {_SEAL: _digest_of(manifest)}, indent=1)


def _unsealed(text: str) -> dict[str, Any]:
    """Read what `_sealed` wrote; release 0.1 wrote no seal. Raises some error if the text was altered."""
    manifest: dict[str, Any] = json.loads(text)
    seal = manifest.pop(_SEAL, None)
    if seal is not None and seal != _digest_of(manifest):
        raise ValueError("its content does not match its sha256")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise an error of any kind if a part is unknown, missing, of a wrong type, or of another step."""
    if unknown := manifest.keys() - _PARTS:  # for example a damaged "sha256" key, which would look like no seal at all
        raise ValueError(f"unknown entry {min(unknown)}")
    all((int(entry["bytes"]), str(entry["sha256"])) for entry in manifest["files"].values())
    progress, _ = _typed(Progress, manifest["progress"]), _typed(Identity, manifest["identity"])
    if progress.step < 0 or progress.data_step < progress.step:
        raise ValueError(f"step {progress.step} with data step {progress.data_step}")
    if _NAME.fullmatch(path.name) and _step_of(path) != progress.step:
        raise ValueError(f"it is of step {progress.step}")


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """Build a dataclass from the values of a file, which must be complete and of the right types."""
    built = kind(**values)
    if missing := typing.get_type_hints(kind).keys() - values.keys():
        raise KeyError(min(missing))
    for name, hint in typing.get_type_hints(kind).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value := getattr(built, name)) not in [typing.get_origin(option) or option for option in options]:
            raise TypeError(f"{name} is {value!r}")
    return built


def check_identity(
    manifest: dict[str, Any], identity: Identity, path: Path, *, allow_data_change: bool = False
) -> Progress:
    """Return the progress of a checkpoint, or refuse to resume a checkpoint of another run.

    The world size may differ: `Engine.load` converts. The data may differ where the user allows it; the change becomes
    part of the progress.

    Raises:
        CheckpointError: data, plan or recipe differ; the message has both values.
    """
    saved, current = manifest["identity"], dataclasses.asdict(identity)
    differing = differing_fields(current["recipe"], complete_record(saved["recipe"], current["recipe"]))
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
    }
    free = set(_DATA) if allow_data_change else set()
    for name, remedy in remedies.items():
        if saved[name] != current[name] and name not in free:
            raise CheckpointError(
                f"checkpoint {path} was written with {name} {saved[name]}, but this run has {current[name]}: {remedy}"
            )
    progress = Progress(**manifest["progress"])
    before, after = ({name: values[name] for name in _DATA} for values in (saved, current))
    if before != after:
        logger.warning("the data changed at step %d from %s to %s", progress.step, before, after)
        progress.data_changes.append({"step": progress.step, "before": before, "after": after})
    return progress


def rewind(root: Path, progress: Progress, *, lease: Lease, max_attempts: int) -> Path | None:
    """Go back to the newest checkpoint before the present loss spike, and leave out the data since then.

    Call on one rank, then resume. Newer checkpoints are removed first: after a kill in between, the run reaches the
    spike again and comes back here.

    Example: a spike since step 520 is noticed at step 530, and the newest earlier checkpoint is of step 500. It becomes
    the newest of all with the skip {"at_step": 500, "num_steps": 30}, so step 501 gets the data of step 531.

    Returns:
        path: of that checkpoint; None where there is none, and nothing was done.

    Raises:
        DataError: the run has gone back to that checkpoint ``max_attempts`` times already.
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
            "and left out the data after it: the data are not the cause, so lower learning_rate, set clip_grad_norm "
            "1.0, or set on_spike log"
        )
    for path in sorted(_committed(root), key=_step_of, reverse=True):
        if _step_of(path) > saved.step:
            lease.discard(path)
    saved.skips.append({"at_step": saved.step, "num_steps": progress.data_step - saved.data_step})
    manifest["progress"] = dataclasses.asdict(saved)
    lease.write(chosen / _MANIFEST, _sealed(manifest))
    lease.write(root / "latest", chosen.name + "\n")
    return chosen


def sweep(root: Path) -> None:
    """Remove the leftovers of conversions that were killed. Call before loading, on one rank."""
    for leftover in root.glob(".step-*.tmp-*"):
        logger.warning("removing %s, which was interrupted while being written", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)


def newest_manifest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the manifest of the newest checkpoint that has a readable one; its other files are not checked."""
    for path in sorted(_committed(root), key=_step_of, reverse=True):
        try:
            return path, _read_manifest(path)
        except CheckpointError:
            continue
    return None


def _catch(work: Callable[[], dict[str, Any]]) -> tuple[str | None, dict[str, Any]]:
    """Return a failure as text for the other ranks; if one rank raised alone, the others would wait for it."""
    try:
        return None, work()
    except Exception as error:
        logger.exception("writing the checkpoint failed on this rank")
        return f"{type(error).__name__}: {error}", {}


def _write_and_describe(draft: Path, write_state: WriteState) -> dict[str, Any]:
    paths = write_state(draft)
    sync_files(paths)
    return describe_files(draft, only=[path.relative_to(draft).as_posix() for path in paths])


def _write_manifest(
    draft: Path, record: dict[str, Any], identity: Identity, versions: dict[str, str], files: dict[str, Any]
) -> None:
    found = {path.relative_to(draft).as_posix(): path.stat().st_size for path in files_below(draft)}
    if found != {name: entry["bytes"] for name, entry in files.items()}:
        raise OSError(f"rank 0 sees {len(found)} files in {draft.name}, not the {len(files)} that were written")
    manifest = {
        "format_version": FORMAT_VERSION,
        "progress": record,
        "samples": Progress(**record).data_step * int(identity.recipe["global_batch"]),
        "identity": dataclasses.asdict(identity),
        "versions": versions,
        "files": files,
    }
    write_synced(draft / _MANIFEST, _sealed(manifest))
    for folder in {draft, *(path.parent for path in files_below(draft))}:
        sync_folder(folder)


def _require_space(root: Path) -> None:
    """Refuse to start a save that will not fit, judging by the size of the newest checkpoint."""
    found = newest_manifest(root)
    needed = sum(entry["bytes"] for entry in found[1]["files"].values()) if found else 0
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(f"a checkpoint needs {needed} bytes in {root}, but {free} are free: free some space")


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _seems_complete(path: Path) -> bool:
    """Whether all files of a checkpoint are there with the right sizes; nothing is hashed."""
    try:
        files = _read_manifest(path)["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def _committed(root: Path) -> Iterator[Path]:
    return (path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name))


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
