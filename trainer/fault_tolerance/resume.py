"""What every training command does before its first step: devices, DeepSpeed settings, output folder, resume."""

import contextlib
import dataclasses
import functools
import json
import logging
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.config.command_line import read_flags
from trainer.config.record import complete_record, differing_fields, to_dict
from trainer.config.settings import Recipe, Runtime
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError, SupersededError, TrainerError, without_secrets
from trainer.fault_tolerance import attempts as leases
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import Lease
from trainer.fault_tolerance.ledger import cut_other_ledgers
from trainer.log import note

logger = logging.getLogger(__name__)


def check_output(output: Path, recipe: Recipe, resume: str) -> None:
    """Refuse an output folder that belongs to something else, before any work.

    Raises:
        ConfigError: it holds another recipe's run, or other files, or --resume forbids what is there.
    """
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
        theirs = json.loads(record.read_text())["recipe"]
        ours = to_dict(recipe)
        differing = differing_fields(ours, complete_record(theirs, ours))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{record} is unreadable ({error!r}): restore it, or name a new output_dir") from error
    if differing:
        raise ConfigError(
            f"output_dir {output} holds the run of another recipe, differing in {'; '.join(differing)}: "
            f"undo the change, or name a new output_dir; --init {output} there starts from this run's weights"
        )


def begin(output: Path, identity: checkpoint.Identity, runtime: Runtime, world: World) -> Lease:
    """Take the right to change the output, if what stands there is this run; all ranks call.

    Raises:
        CheckpointError: the checkpoints are another run's, or there is none and --resume must.
        ConfigError: a folder lies on another file system.
    """

    def claim_folder() -> str:
        root = output / "checkpoints"
        found = checkpoint.newest_manifest(root)
        if found is not None:
            checkpoint.check_identity(found[1], identity, found[0], allow_data_change=runtime.allow_data_change)
        lease = leases.acquire(output, num_ranks=world.size)
        for setting, folder in (("output_dir", root), ("sample_ledger", runtime.sample_ledger)):
            if folder is not None:
                _require_same_file_system(lease, Path(folder), setting)
        return str(lease.folder)

    return Lease(Path(world.on_main(claim_folder)))


def claim(
    lease: Lease, output: Path, recipe: Recipe, runtime: Runtime, world: World, *, step: int, total_steps: int
) -> None:
    """Record what starts here, and cut the records of ranks that are no more; all ranks call.

    Raises:
        ConfigError: the run dies again and again at this step.
    """

    def record() -> None:
        leases.check_crash_loop(lease, step, limit=runtime.max_restarts)
        lease.began(step, total_steps)
        told = {"recipe": to_dict(recipe), "runtime": to_dict(runtime), "versions": versions()}
        told["start"] = describe_start(sys.argv, world)
        lease.write(output / "recipe.json", without_secrets(json.dumps(told, indent=1)) + "\n")
        ledger = Path(runtime.sample_ledger) if runtime.sample_ledger else None
        cut_other_ledgers(ledger, step, lease=lease, num_ranks=world.size)

    world.on_main(record)


def describe_start(argv: Sequence[str], world: World) -> dict[str, Any]:
    """Record how a run was started: the recipe's name, the command, the folder, the commit, the host and the time."""
    with contextlib.suppress(TrainerError):
        return {
            "recipe_name": read_flags(argv[1:]).get("recipe", ""),
            "command": command_line(argv, world),
            "folder": str(Path.cwd()),
            "git_commit": git_commit(Path(__file__).parent),
            "host": socket.gethostname(),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "num_ranks": world.size,
        }
    return {}


def command_line(argv: Sequence[str], world: World) -> str:
    """Write down a command that starts the same again, on one host."""
    words = [word for word in argv if not word.startswith("--local_rank")]
    start = ["deepspeed", "--num_gpus", str(world.local_size)] if world.size > 1 else ["python"]
    return without_secrets(shlex.join([*start, *words]))


@functools.cache
def git_commit(folder: Path) -> str:
    """Return the commit of the code that runs, with + where files have changed since; empty outside of git."""
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode:
            return ""
        said.append(done.stdout.strip())
    return said[0] + "+" * bool(said[1])


@contextlib.contextmanager
def noting_the_end(lease: Lease, world: World) -> Iterator[None]:
    """Record that an attempt was refused; one that says nothing has crashed or was killed."""
    try:
        yield
    except TrainerError as error:
        note(f"error: {error}")
        if world.is_main and not isinstance(error, SupersededError):
            with contextlib.suppress(OSError, TrainerError):
                lease.ended(f"refused: {error}")
        raise


def resume(engine: Engine, root: Path, identity: checkpoint.Identity, runtime: Runtime) -> checkpoint.Progress:
    """Load the newest valid checkpoint of this run, or start from the beginning where there is none."""

    def choose() -> list[Any]:
        found = checkpoint.find(root)
        if found is None:
            if runtime.resume == "must":
                raise CheckpointError(
                    f"resume is must, but {root} holds no checkpoint: use --resume auto to start anew"
                )
            return []
        path, manifest = found
        progress = checkpoint.check_identity(manifest, identity, path, allow_data_change=runtime.allow_data_change)
        checkpoint.sweep(root)  # what is left of a killed conversion may fill the disk that the next one needs
        return [str(path), dataclasses.asdict(progress), manifest["identity"]["num_ranks"]]

    chosen = engine.world.on_main(choose)
    if not chosen:
        return checkpoint.Progress()
    path, progress, written_by = chosen
    engine.world.together(lambda: engine.load(Path(path), written_by=written_by))
    logger.info("resumed from %s, written by %d ranks", path, written_by)
    return checkpoint.Progress(**progress)


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


def versions() -> dict[str, str]:
    """Record what computed the numbers."""
    names = ("torch", "deepspeed", "timm", "webdataset", "albumentations", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}
