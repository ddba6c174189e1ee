"""Checkpoints that are whole or absent, and a resume that goes on exactly or refuses with a reason.

Layout below OUTPUT/checkpoints::

    step-00000500/manifest.json    what the checkpoint is, and the sha256 of every file beside it
    step-00000500/state/...        DeepSpeed's files
    latest                         name of the newest one, for people; loading trusts manifests only

Commit: the state is captured on all ranks; every rank writes, syncs and hashes its own files among the drafts of this
attempt (see `attempts`); the ranks agree that all succeeded; rank 0 writes the manifest, renames the folder into its
place, then moves ``latest`` and prunes. In the background the same happens beside the training, in a thread of every
rank that has a process group of its own.

DeepSpeed's own ``latest`` is written before its barrier and can name a folder with half of the shards (DeepSpeed
0.19.8, engine.py:4956); it is never written here. Its asynchronous engines are not used either: a file that could not
be written is not reported (decoupled_checkpoint_engine.py), ``latest`` moves before all ranks are done, the last save
is lost with the process, and what they write cannot be loaded again at ZeRO stages (DeepSpeed issue 8500).
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
_MOST_FAILURES = 3
"""Saves that may fail in a row before the run stops; storage that is full for an hour must not cost a cluster a day."""
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


LEGACY_FIELDS: dict[str, dict[str, Any]] = {"progress": {}, "identity": {}}
"""Fields of `Progress` and `Identity` that the first manifests of this format did not have -> what was true of those
runs. Whoever adds a field adds a line: without it every older checkpoint counts as damaged."""

WriteState = Callable[[Path], list[Path]]
"""Writes this rank's files below a folder and returns their paths."""


class Saver:
    """Commits the checkpoints of a run, one at a time; every method is called on all ranks and ends alike on all.

    Args:
        root: folder of the checkpoints.
        identity: what the run is.
        versions: library versions, recorded for people.
        lease: the right of this attempt to change the output.
        world: the ranks.
        keep: how many of the newest checkpoints remain.
        background: write while the training goes on.
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
        self._problem: BaseException | None = None
        self._failures = 0

    def save(self, progress: Progress, capture: Callable[[bool], WriteState]) -> None:
        """Commit the present state, or begin to: in the background this returns as soon as the state is copied.

        A save that fails is told in the log, and the training goes on from there; earlier checkpoints are untouched.

        Args:
            progress: where the run stands.
            capture: takes the engine's state, as a copy if asked to.

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
        """Wait for a save in the background; raises as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()

    def finish(self) -> None:
        """Wait for the last save and insist on it.

        Raises:
            CheckpointError: it has failed.
        """
        self.wait()
        if self._failures:
            raise CheckpointError(
                f"the last checkpoint of this run could not be written to {self._root}, see above: free space or mend "
                "the storage, then start again with --resume auto"
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Finish; where the run ends with an error that a user can mend, what is being saved is still saved."""
        if error is None:
            self.finish()
        elif isinstance(error, TrainerError):
            with contextlib.suppress(TrainerError):
                self.wait()

    def _settle(self) -> None:
        """Count a failure or forget the ones before; the same on every rank."""
        problem, self._problem = self._problem, None
        if problem is None:
            self._failures = 0
        elif isinstance(problem, CheckpointError):
            self._failures += 1
            logger.error("%s", problem)
            if self._failures >= _MOST_FAILURES:
                raise CheckpointError(f"{problem} ({self._failures} saves in a row have failed)") from problem
        else:
            raise problem

    def _commit(self, record: dict[str, Any], write_state: WriteState, world: World) -> None:
        """Write and commit; what goes wrong is kept for `_settle`."""
        try:
            final = self._root / f"step-{record['step']:08d}"
            draft = Path(world.on_main(lambda: str(self._new_draft(final))))
            problem, files = _attempt(lambda: _write_and_describe(draft, write_state))
            found = world.gather_over_ranks([problem, files])
            problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text]
            every_file = {name: entry for _, files in found for name, entry in files.items()}
            world.on_main(lambda: self._publish(draft, final, record, every_file, problems))
        except BaseException as error:  # noqa: BLE001  (the training thread raises it)
            self._problem = error

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
        self, draft: Path, final: Path, record: dict[str, Any], files: dict[str, Any], problems: list[str]
    ) -> None:
        """Turn a complete draft into a checkpoint. On rank 0.

        Raises:
            CheckpointError: a rank could not write, or the storage refuses; nothing was committed.
            SupersededError: a newer attempt has taken over.
        """
        try:
            self._lease.check()
            if problems:
                raise OSError("; ".join(problems[:3]))
            _write_manifest(draft, record, self._identity, self._versions, files)
            if final.exists() and not _is_valid(final):  # met when a damaged newest one was passed over at the resume
                self._lease.discard(final)
            if not final.exists():  # otherwise the same step of the same run: what is already safe stays
                self._lease.move(draft, final)
            self._lease.write(self._root / "latest", final.name + "\n")
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {final} was not written ({error}); earlier checkpoints are untouched: "
                "free space or mend the storage"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._prune(record["step"])

    def _prune(self, step: int) -> None:
        """Remove all but the newest checkpoints up to this step; what is visibly damaged is not counted as one."""
        past = sorted((path for path in _committed(self._root) if _step_of(path) <= step), key=_step_of)
        kept = [path for path in past if _seems_whole(path)][-self._keep :]
        for path in past[: past.index(kept[0])]:
            try:
                self._lease.discard(path)
            except OSError as error:  # an old checkpoint too many is no reason to stop a run
                logger.warning("could not remove %s (%s)", path, error)


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
    """Write a manifest with its own sha256, so that damage to it is not taken for another recipe."""
    return json.dumps(manifest | {_SEAL: _digest_of(manifest)}, indent=1)


def _unsealed(text: str) -> dict[str, Any]:
    """Read what `_sealed` wrote; release 0.1 wrote no seal. Raises some error if the text was altered."""
    manifest: dict[str, Any] = json.loads(text)
    seal = manifest.pop(_SEAL, None)
    if seal is not None and seal != _digest_of(manifest):
        raise ValueError("it was altered")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise some error if a part is unknown, missing, of a wrong type, or of another step."""
    if unknown := manifest.keys() - _PARTS:  # such as a seal with a damaged name, which would look like no seal
        raise ValueError(f"{min(unknown)} is no part of it")
    all((int(entry["bytes"]), str(entry["sha256"])) for entry in manifest["files"].values())
    progress, _ = _typed(Progress, manifest["progress"]), _typed(Identity, manifest["identity"])
    if progress.step < 0 or progress.data_step < progress.step:
        raise ValueError(f"step {progress.step} with data step {progress.data_step}")
    if _NAME.fullmatch(path.name) and _step_of(path) != progress.step:
        raise ValueError(f"it is of step {progress.step}")


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """Make a dataclass of values from a file, which must be complete and of the right types."""
    made = kind(**values)
    if missing := typing.get_type_hints(kind).keys() - values.keys():
        raise KeyError(min(missing))
    for name, hint in typing.get_type_hints(kind).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value := getattr(made, name)) not in [typing.get_origin(option) or option for option in options]:
            raise TypeError(f"{name} is {value!r}")
    return made


def check_identity(
    manifest: dict[str, Any], identity: Identity, path: Path, *, allow_data_change: bool = False
) -> Progress:
    """Return where the run stands, or refuse to resume a checkpoint of another run.

    The world size may differ: `Engine.load` converts. Data may differ where the user allows it; the change becomes part
    of the progress.

    Raises:
        CheckpointError: data, plan or recipe differ, naming both values.
    """
    theirs, ours = manifest["identity"], dataclasses.asdict(identity)
    differing = differing_fields(ours["recipe"], complete_record(theirs["recipe"], ours["recipe"]))
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


def rewind(root: Path, progress: Progress, *, lease: Lease, max_attempts: int) -> Path | None:
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
            lease.discard(path)
    saved.skips.append({"at_step": saved.step, "num_steps": progress.data_step - saved.data_step})
    manifest["progress"] = dataclasses.asdict(saved)
    lease.write(chosen / _MANIFEST, _sealed(manifest))
    lease.write(root / "latest", chosen.name + "\n")
    return chosen


def sweep(root: Path) -> None:
    """Remove what conversions that were killed have left. Call before loading, on one rank."""
    for leftover in root.glob(".step-*.tmp-*"):
        logger.warning("removing %s, which was interrupted while being written", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)


def newest_manifest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the manifest of the newest checkpoint that has a readable one, without looking at the other files."""
    for path in sorted(_committed(root), key=_step_of, reverse=True):
        try:
            return path, _read_manifest(path)
        except CheckpointError:
            continue
    return None


def _attempt(work: Callable[[], dict[str, Any]]) -> tuple[str | None, dict[str, Any]]:
    """Turn a failure into a text that can be agreed upon: a rank that raised alone would leave the others waiting."""
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
        raise OSError(f"rank 0 sees {len(found)} files in {draft.name}, but not the {len(files)} that were written")
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
    """Refuse to begin what cannot be finished, going by the newest checkpoint's size."""
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


def _seems_whole(path: Path) -> bool:
    """Whether a checkpoint is all there, without reading it through."""
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
