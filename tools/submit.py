r"""Write a SLURM job for a training and submit it.

Settings that are not the job's are those of the training. They are checked here, with the number of ranks that the job
will have, so that no job waits in a queue only to be refused. Then SLURM checks the job (``sbatch --test-only``).

Examples:
    python tools/submit.py --nodes 8 --gpus 8 --time 48:00:00 --recipe mae_vit_large --micro_batch 64 \
        --data shards/train --output_dir runs/large --dry_run
    python tools/submit.py --nodes 1 --gpus 8 --sweep 'mask_ratio 0.6 0.75 0.9' --recipe mae_vit_base \
        --data shards/train --output_dir runs/sweep --dry_run
    python tools/submit.py --script finetune --nodes 1 --gpus 1 --recipe lora --init runs/base --data detect/train \
        --val_data detect/dev --output_dir runs/lora --dry_run

The job is written to OUTPUT/logs/[time]_submit.sbatch. It calls launch/slurm/ and holds all settings, so the same file
can be submitted again: the run resumes.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_types
from trainer.config.command_line import Training, TrainingCommandLine, configure, read_flags
from trainer.config.recipes import TRAININGS
from trainer.config.settings import Recipe, Runtime
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import checkout, data_file
from trainer.startup import loading

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What SLURM is asked for."""

    script: Literal["pretrain", "finetune"] = "pretrain"
    """The training."""
    recipe: str = ""
    """Its recipe."""
    nodes: int = 0
    """Hosts."""
    gpus: int = 0
    """GPUs of a host, one rank each."""
    cpus: int = 8
    """Cores of a rank, its loader workers included."""
    time: str = "24:00:00"
    """Limit of one attempt, HH:MM:SS or D-HH:MM:SS."""
    save_s: int = 600
    """The run saves so long before the limit [seconds]."""
    sweep: str = ""
    """A setting and its values, as 'mask_ratio 0.6 0.75': one element of a job array each."""
    partition: str = ""
    """As sbatch's --partition."""
    account: str = ""
    """As sbatch's --account."""
    qos: str = ""
    """As sbatch's --qos."""
    constraint: str = ""
    """As sbatch's --constraint."""
    job_name: str = ""
    """As sbatch's --job-name; empty: the training and its output folder."""
    log: str = ""
    """The log; empty: OUTPUT/logs/slurm-[job].log."""
    no_gres: bool = False
    """Ask for tasks only: a cluster without GPUs."""
    dry_run: bool = False
    """Print the job and submit nothing."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("nodes", "gpus", "cpus", "save_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1: pass --{name}")
        if not _TIME.fullmatch(self.time):
            raise ConfigError(f"time is {self.time!r}, but must look like 24:00:00 or 2-12:00:00")
        if len(self.swept) == 1:
            raise ConfigError(f"sweep is {self.sweep!r}, but must be a setting and its values: 'mask_ratio 0.6 0.75'")

    @property
    def swept(self) -> list[str]:
        """The setting of the sweep and its values; empty without one."""
        return self.sweep.replace("=", " ").replace(",", " ").split()


Job = Training[Settings, Recipe, Runtime]
CLI = TrainingCommandLine(Settings, __doc__, TRAININGS)


def main(job: Job) -> int:
    """Return the exit code: 0 submitted (or shown), 2 refused by this tool or by SLURM."""
    argv = training_argv(job)
    check(job, argv)
    text = as_sbatch(job, argv)
    if job.settings.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here: call this on a login node of the cluster, or add --dry_run")
    output = job.runtime.output_dir
    folder = Path(output, "logs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_submit.sbatch"
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"output_dir {output} cannot be written ({error.strerror})") from error
    _sbatch("--test-only", str(path))
    print(f"{_sbatch('--parsable', str(path))}  submitted {path}")
    return 0


def training_argv(job: Job) -> list[str]:
    """Return the training's command line, with the settings of a --config file, but without the setting of a sweep.

    Raises:
        ConfigError: a path is not named, or the setting of the sweep is given as well.
    """
    setting = job.settings.swept[0] if job.settings.sweep else ""
    if setting in read_flags(job.argv):
        raise ConfigError(f"{setting} is given twice, in --sweep and as --{setting}: keep one")
    for name in ("data", "output_dir"):
        if name not in job.given:
            raise ConfigError(f"{name} is not given: pass --{name}, a path that all nodes see")
    return [*(flag for flag in job.file_argv if not flag.startswith(f"--{setting}=")), *job.argv]


def check(job: Job, argv: list[str]) -> None:
    """Check the command line as the training will, with the ranks that it will have, for every value of a sweep.

    Raises:
        ConfigError: as the training would.
    """
    settings, found = job.settings, list(configurations(job, argv))
    with loading():
        from trainer.distributed.ds_config import engine_settings
        from trainer.distributed.world import World
    for recipe, runtime in found:
        world = World(0, settings.nodes * settings.gpus, 0, settings.gpus)
        engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)


def configurations(job: Job, argv: list[str]) -> Iterator[tuple[Recipe, Runtime]]:
    """Read the command line of the training for every value of a sweep.

    Raises:
        ConfigError: as the training would.
    """
    recipes = next(recipes for recipes in TRAININGS if recipes.script == job.settings.script)
    setting, *values = job.settings.swept or ["", ""]
    for value in values:
        yield configure([*argv, *((f"--{setting}", value) if setting else ())], recipes)


def as_sbatch(job: Job, argv: list[str]) -> str:
    """Write the job."""
    settings, output = job.settings, Path(job.runtime.output_dir).absolute()
    asked = {
        "job_name": settings.job_name or f"{settings.script}-{output.name}",
        "nodes": str(settings.nodes),
        "ntasks_per_node": str(settings.gpus),
        "cpus_per_task": str(settings.cpus),
        "time": settings.time,
        "signal": f"B:USR1@{settings.save_s}",
        "open_mode": "append",
        "output": settings.log or str(output / "logs" / "slurm-%j.log"),
    }
    asked |= {name: text for name in ("partition", "account", "qos", "constraint") if (text := getattr(settings, name))}
    if not settings.no_gres:
        asked["gpus_per_node"] = str(settings.gpus)
    if settings.sweep:
        asked["array"] = f"0-{len(settings.swept) - 2}"
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in asked.items())]
    lines += ["#SBATCH --requeue", "set -euo pipefail", *_project()]
    if settings.sweep:
        lines.append(f"export TRAINER_SWEEP={shlex.quote(' '.join(settings.swept))}")
    lines += [f"source {shlex.quote(str(data_file('launch/slurm/common.sh')))}", "prepare"]
    lines.append(f"train {settings.script} {shlex.join(argv)}")
    return "\n".join(lines) + "\n"


def _project() -> list[str]:
    """Export the folder that the job runs in: the checkout, or this folder and this Python for an installed wheel."""
    if folder := checkout():
        return [f"export TRAINER_HOME={shlex.quote(str(folder))}"]
    python = f"export TRAINER_PYTHON=${{TRAINER_PYTHON:-{shlex.quote(sys.executable)}}}"
    return [f"export TRAINER_HOME={shlex.quote(str(Path.cwd()))}", python]


def _sbatch(*argv: str) -> str:
    done = subprocess.run(["sbatch", *argv], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ") or "no reason given"
        raise ConfigError(f"SLURM refuses the job ({reason}): fit --nodes, --gpus, --cpus, --time or --partition")
    return done.stdout.strip()


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
