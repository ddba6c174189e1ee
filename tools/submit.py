r"""Write a SLURM job for a training and submit it.

The words after the settings of the job are those of the training and are checked here, with the sizes that the job will
have, so that nothing waits a night in a queue to be refused. Then SLURM itself is asked (``sbatch --test-only``).

Examples:
    python tools/submit.py --nodes 8 --gpus 8 --time 48:00:00 --recipe mae_vit_large --micro_batch 64 \
        --data shards/train --output_dir runs/large --dry_run
    python tools/submit.py --nodes 1 --gpus 8 --sweep 'mask_ratio 0.6 0.75 0.9' --recipe mae_vit_base \
        --data shards/train --output_dir runs/sweep --dry_run
    python tools/submit.py --script finetune --nodes 1 --gpus 1 --recipe lora --init runs/base --data detect/train \
        --val_data detect/dev --output_dir runs/lora --dry_run

The job is kept as OUTPUT/logs/[time]_submit.sbatch; it calls launch/slurm/ and holds every word, so it can be submitted
again as it is: a run goes on where it stands.
"""

if __name__ == "__main__":
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")
    from launch.early import read_early

    read_early(__file__)

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trainer.config.command_line import answered, read_flags
from trainer.config.recipes import configure_script
from trainer.config.settings import Recipe, Runtime
from trainer.distributed.ds_config import engine_settings
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import checkout, data_file

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_SETTINGS = {"partition": None, "account": None, "qos": None, "constraint": None, "job_name": None, "log": None}


@dataclass(frozen=True, slots=True)
class Job:
    """What SLURM is asked for, and what it runs."""

    script: str
    nodes: int
    gpus: int
    cpus: int
    time: str
    save_s: int
    sweep: tuple[str, ...]
    extra: dict[str, str]
    words: tuple[str, ...]

    @property
    def num_ranks(self) -> int:
        """One rank a GPU."""
        return self.nodes * self.gpus


def read(argv: list[str]) -> tuple[Job, bool] | None:
    """Read the command line, that of the training included; None where it asked for help."""
    if answered(argv, lambda _: parser_of_job().format_help()):
        return None
    job, dry_run = read_job(argv)
    for _ in configurations(job):
        pass
    return job, dry_run


def main(words: Sequence[str]) -> int:
    """Return the exit code: 0 submitted (or shown), 2 refused by us or by SLURM."""
    line = read(list(words))
    if line is None:
        return 0
    job, dry_run = line
    runtime = check(job)
    text = as_sbatch(job)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here: call this on a login node of the cluster, or add --dry_run")
    folder = Path(runtime.output_dir, "logs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_submit.sbatch"
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"output_dir {runtime.output_dir} cannot be written ({error.strerror})") from error
    _sbatch("--test-only", str(path))
    print(f"{_sbatch('--parsable', str(path))}  submitted {path}")
    return 0


def parser_of_job() -> argparse.ArgumentParser:
    """List the settings of the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--script", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--nodes", type=int, required=True, help="hosts")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of a host, one rank each")
    parser.add_argument("--cpus", type=int, default=8, help="cores of a rank, its loader workers included (default 8)")
    parser.add_argument("--time", default="24:00:00", help="limit of one attempt, HH:MM:SS or D-HH:MM:SS")
    parser.add_argument("--save_s", type=int, default=600, help="seconds before the limit at which the run saves")
    parser.add_argument("--sweep", default="", help="a setting and its values: one element of a job array each")
    for name in _SETTINGS:
        parser.add_argument(f"--{name}", help=f"as sbatch's --{name.replace('_', '-')}" if name != "log" else "the log")
    parser.add_argument("--no_gres", action="store_true", help="ask for tasks only: a cluster without GPUs")
    parser.add_argument("--dry_run", action="store_true", help="print the job and submit nothing")
    return parser


def read_job(argv: Sequence[str]) -> tuple[Job, bool]:
    """Take the settings of the job out of the command line; the rest belongs to the training.

    Raises:
        ConfigError: a setting is out of range.
    """
    options, rest = parser_of_job().parse_known_args(list(argv))
    for name in ("nodes", "gpus", "cpus", "save_s"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}, but must be at least 1")
    if not _TIME.fullmatch(options.time):
        raise ConfigError(f"time is {options.time!r}, but must look like 24:00:00 or 2-12:00:00")
    sweep = tuple(options.sweep.replace("=", " ").replace(",", " ").split())
    if len(sweep) == 1:
        raise ConfigError(f"sweep is {options.sweep!r}, but must be a setting and its values: 'mask_ratio 0.6 0.75'")
    extra = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name)}
    if not options.no_gres:
        extra["gpus_per_node"] = str(options.gpus)
    shape = (options.script, options.nodes, options.gpus, options.cpus, options.time, options.save_s)
    return Job(*shape, sweep, extra, tuple(rest)), options.dry_run


def check(job: Job) -> Runtime:
    """Check the command line as the training will, with the ranks that it will have, for every value of a sweep.

    Raises:
        ConfigError: as the training would.
    """
    for recipe, runtime in configurations(job):
        engine_settings(recipe, runtime, World(0, job.num_ranks, 0, job.gpus))
    return runtime


def configurations(job: Job) -> Iterator[tuple[Recipe, Runtime]]:
    """Read the command line of the training for every value of a sweep.

    Raises:
        ConfigError: as the training would.
    """
    setting, values = (job.sweep[0], job.sweep[1:]) if job.sweep else ("", ("",))
    flags = read_flags(list(job.words))
    if setting in flags:
        raise ConfigError(f"{setting} is given twice, in --sweep and as --{setting}: keep one")
    for name in ("data", "output_dir"):
        if name not in flags:
            raise ConfigError(f"{name} is not given: pass --{name}, a path that all nodes see")
    for value in values:
        words = [*job.words, *((f"--{setting}", value) if setting else ())]
        yield configure_script(job.script, words)


def as_sbatch(job: Job) -> str:
    """Write the job."""
    output = Path(read_flags(list(job.words))["output_dir"]).absolute()
    asked = {
        "job_name": f"{job.script}-{output.name}",
        "nodes": str(job.nodes),
        "ntasks_per_node": str(job.gpus),
        "cpus_per_task": str(job.cpus),
        "time": job.time,
        "signal": f"B:USR1@{job.save_s}",
        "open_mode": "append",
        "output": job.extra.get("log", str(output / "logs" / "slurm-%j.log")),
    } | {name: value for name, value in job.extra.items() if name != "log"}
    if job.sweep:
        asked["array"] = f"0-{len(job.sweep) - 2}"
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in asked.items())]
    lines += ["#SBATCH --requeue", "set -euo pipefail", *_project()]
    if job.sweep:
        lines.append(f"export TRAINER_SWEEP={shlex.quote(' '.join(job.sweep))}")
    lines += [f"source {shlex.quote(str(data_file('launch/slurm/common.sh')))}", "prepare"]
    lines.append(f"train {job.script} {shlex.join(job.words)}")
    return "\n".join(lines) + "\n"


def _project() -> list[str]:
    """Export the folder that the job runs in: the checkout, or this folder and this Python for an installed wheel."""
    if folder := checkout():
        return [f"export TRAINER_HOME={shlex.quote(str(folder))}"]
    python = f"export TRAINER_PYTHON=${{TRAINER_PYTHON:-{shlex.quote(sys.executable)}}}"
    return [f"export TRAINER_HOME={shlex.quote(str(Path.cwd()))}", python]


def _sbatch(*words: str) -> str:
    done = subprocess.run(["sbatch", *words], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ") or "no reason given"
        raise ConfigError(f"SLURM refuses the job ({reason}): fit --nodes, --gpus, --cpus, --time or --partition")
    return done.stdout.strip()


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
