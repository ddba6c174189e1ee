"""Check whether a cluster is ready for a training, one line for each check; the sbatch scripts begin with it.

It takes the settings of the training, so it also finds mistakes in them. Under ``deepspeed`` or ``srun`` it examines
all ranks; with --hostfile it asks every host over ssh, before ranks can start. Lines begin with ok, warn or FAIL; with
any FAIL the exit code is 2. No file is left behind.

Usage: python launch/doctor.py [--script finetune] [--hostfile FILE] [settings of that training]

Examples:
    python launch/doctor.py --recipe mae_vit_base --data 'shards/train/*.tar'
    python launch/doctor.py --script finetune --recipe lora --data 'detect/train/*.tar' --output_dir runs/lora
    python launch/doctor.py --hostfile hosts --recipe mae_vit_base --data 'shards/train/*.tar'
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_types
from trainer.config.command_line import Training, TrainingCommandLine
from trainer.config.recipes import TRAININGS
from trainer.config.settings import Recipe, Runtime
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the doctor takes beside the settings of the training."""

    script: Literal["pretrain", "finetune"] = "pretrain"
    """The training to come."""
    recipe: str = ""
    """Its recipe."""
    hostfile: str | None = None
    """Ask every host of this DeepSpeed hostfile over ssh instead; none examines the ranks that run this."""
    facts: bool = False
    """Print what is known of this host as JSON, and leave: for the doctor that asks over ssh."""
    dry_run: bool = False
    """Accepted as a setting of the training; the doctor never trains."""

    def __post_init__(self) -> None:
        check_types(self)


CLI = TrainingCommandLine(Settings, __doc__, TRAININGS)


def main(line: Training[Settings, Recipe, Runtime]) -> int:
    """Return the exit code: 0 if a training can start, else 2."""
    with loading("torch and DeepSpeed"):
        from trainer.distributed.world import World
        from trainer.training.readiness import check_hosts, examine, facts_of, list_shards_of, report
    settings, runtime = line.settings, line.runtime
    if settings.facts:
        print(json.dumps(facts_of(World(), line.recipe, runtime, list_shards_of(runtime)[:2])))
        return 0
    if settings.hostfile:
        argv = ["--script", settings.script, *line.file_argv, *line.argv, "--facts"]
        return report(check_hosts(Path(settings.hostfile), Path(__file__).resolve(), argv))
    return examine(line.recipe, runtime)


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
