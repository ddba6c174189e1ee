"""Whose output folder this is, and where its run goes on: checked, claimed and loaded at every start.

In the order of a start: `check_run` with the recipe alone, `begin` when data and engine are known, `resume` to load the
newest checkpoint, `record_start` just before the first step. A rollback after a loss spike calls the last two again.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.provenance import describe_start, versions
from trainer.config.record import complete_record, differing_fields, to_dict
from trainer.config.settings import Recipe, Runtime
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError, SupersededError, TrainerError, without_secrets
from trainer.fault_tolerance import attempts as leases
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.checkpoint import Identity, Progress
from trainer.fault_tolerance.ledger import cut_other_ledgers
from trainer.log import note

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run whose output this attempt may change."""

    recipe: Recipe
    runtime: Runtime
    engine: Engine
    identity: Identity
    lease: Lease

    @property
    def output(self) -> Path:
        """Everything of the run lies here."""
        return Path(self.runtime.output_dir)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.output / "checkpoints"

    @property
    def world(self) -> World:
        """The ranks."""
        return self.engine.world


def check_run(
    recipe: Recipe,
    runtime: Runtime,
    identity: Identity | None = None,
    found: tuple[Path, dict[str, Any]] | None = None,
) -> Progress | None:
    """Refuse an output folder, or a checkpoint, that belongs to another run. On one rank.

    This is the only check of what a run is. Each start calls it three times, because it learns about itself step by
    step and must refuse as early as it can:

    1. before any work, with the recipe alone: compared with OUTPUT/recipe.json;
    2. before it takes the lease from an attempt that may still run, with its identity (data, weights, precision):
       compared with the newest manifest, whose files are not read yet;
    3. before it loads the checkpoint that it ``found`` to be undamaged, which may be an older one.

    Returns:
        progress: where that checkpoint stands; None if there is none, or none was looked at.

    Raises:
        ConfigError: the folder holds another recipe's run, or other files, or --resume forbids what is there.
        CheckpointError: the checkpoints are those of another run.
    """
    output = Path(runtime.output_dir)
    if identity is None:
        _check_recorded_recipe(output, recipe, runtime.resume)
        return None
    found = found or checkpoint.newest_manifest(output / "checkpoints")
    if found is None:
        return None
    path, manifest = found
    return checkpoint.check_identity(manifest, identity, path, allow_data_change=runtime.allow_data_change)


def _check_recorded_recipe(output: Path, recipe: Recipe, resume: str) -> None:
    record = output / "recipe.json"
    if not output.exists() or not any(output.iterdir()):
        if resume == "must":
            raise ConfigError(f"resume is must, but output_dir {output} is empty: check the path, or use --resume auto")
        return
    if not record.exists():
        leftovers = {path.name for path in output.iterdir()} - {"logs", "attempts", "checkpoints"}
        if leftovers:
            raise ConfigError(f"output_dir {output} holds {min(leftovers)!r} and others, but no run: name a new folder")
        return
    if resume == "never":
        raise ConfigError(f"resume is never, but output_dir {output} holds a run: name a new folder")
    try:
        recorded = json.loads(record.read_text())["recipe"]
        asked = to_dict(recipe)
        differing = differing_fields(asked, complete_record(recorded, asked))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{record} is unreadable ({error!r}): restore it, or name a new output_dir") from error
    if differing:
        raise ConfigError(
            f"output_dir {output} holds the run of another recipe, differing in {'; '.join(differing)}: "
            f"undo the change, or name a new output_dir; --init {output} there starts from this run's weights"
        )


def begin(engine: Engine, recipe: Recipe, runtime: Runtime, identity: Identity) -> Run:
    """Take the right to change the output, if what it holds is this run; all ranks call.

    Raises:
        CheckpointError: the checkpoints are those of another run.
        ConfigError: a folder lies on another file system.
    """
    output = Path(runtime.output_dir)

    def claim_folder() -> str:
        check_run(recipe, runtime, identity)
        lease = leases.acquire(output, num_ranks=engine.world.size)
        for setting, folder in (("output_dir", output / "checkpoints"), ("sample_ledger", runtime.sample_ledger)):
            if folder is not None:
                _require_same_file_system(lease, Path(folder), setting)
        return str(lease.folder)

    lease = Lease(Path(engine.world.on_main(claim_folder)))
    return Run(recipe=recipe, runtime=runtime, engine=engine, identity=identity, lease=lease)


def resume(run: Run) -> Progress:
    """Load the newest undamaged checkpoint of the run, or start from the beginning without one; all ranks call.

    Raises:
        CheckpointError: there is none although --resume must asks for one, or it is that of another run.
    """

    def choose() -> list[Any]:
        found = checkpoint.find(run.checkpoints)
        if found is None:
            if run.runtime.resume == "must":
                raise CheckpointError(
                    f"resume is must, but {run.checkpoints} holds no checkpoint: use --resume auto to start from step 0"
                )
            return []
        progress = check_run(run.recipe, run.runtime, run.identity, found)
        assert progress is not None
        checkpoint.sweep(run.checkpoints)  # leftovers of a killed conversion may fill the disk that the next one needs
        path, manifest = found
        return [str(path), dataclasses.asdict(progress), manifest["identity"]["num_ranks"]]

    chosen = run.world.on_main(choose)
    if not chosen:
        return Progress()
    path, progress, written_by = chosen
    run.world.together(lambda: run.engine.load(Path(path), written_by=written_by))
    logger.info("resumed from %s, written by %d ranks", path, written_by)
    return Progress(**progress)


def record_start(run: Run, step: int, total_steps: int) -> None:
    """Record what starts at this step, and cut the ledgers of ranks that the run no longer has; all ranks call.

    Raises:
        ConfigError: the run has crashed at this step again and again.
    """

    def record() -> None:
        leases.check_crash_loop(run.lease, step, limit=run.runtime.max_restarts)
        run.lease.began(step, total_steps)
        content = json.dumps(what_starts(run), indent=1)
        run.lease.write(run.output / "recipe.json", without_secrets(content) + "\n")
        ledger = Path(run.runtime.sample_ledger) if run.runtime.sample_ledger else None
        cut_other_ledgers(ledger, step, lease=run.lease, num_ranks=run.world.size)

    run.world.on_main(record)


def what_starts(run: Run) -> dict[str, dict[str, Any]]:
    """Describe a start: all settings, the versions of the libraries, the command."""
    return {
        "recipe": to_dict(run.recipe),
        "runtime": to_dict(run.runtime),
        "versions": versions(),
        "start": describe_start(sys.argv, num_ranks=run.world.size, local_size=run.world.local_size),
    }


@contextlib.contextmanager
def recording_refusals(run: Run) -> Iterator[None]:
    """Record that an attempt ended with an error; one without a record has crashed or was killed."""
    try:
        yield
    except TrainerError as error:
        note(f"error: {error}")
        if run.world.is_main and not isinstance(error, SupersededError):
            with contextlib.suppress(OSError, TrainerError):
                run.lease.ended(f"refused: {error}")
        raise


def _require_same_file_system(lease: Lease, folder: Path, setting: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        same = folder.stat().st_dev == lease.folder.stat().st_dev
    except OSError as error:
        raise ConfigError(f"{setting}: {folder} cannot be used ({error.strerror}): name another folder") from error
    if not same:
        raise ConfigError(
            f"{setting}: {folder} lies on another file system than {lease.folder}, so that files cannot be renamed "
            "into it: put both on one"
        )
