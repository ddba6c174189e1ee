r"""Train a morph detector on labelled shards, from the weights of a pre-training.

A run is its output folder: the same command goes on where the run stands, also with another number of ranks. The
detector that validated best is in OUTPUT/detector.

Usage: deepspeed launch/finetune.py [--recipe NAME] --init RUN --data 'shards/*.tar' --output_dir RUN [--name value]

Examples:
    deepspeed launch/finetune.py --recipe lora --init runs/base --data 'detect/train/*.tar' \
        --val_data 'detect/dev/*.tar'
    deepspeed launch/finetune.py --recipe probe --init runs/base --data 'detect/train/*.tar' --dry_run
    python launch/finetune.py --config runs/detector/recipe.json --output_dir runs/again --dry_run
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from trainer.config.command_line import Training, TrainingCommandLine
from trainer.config.recipes import FINETUNING
from trainer.config.settings import DetectorRecipe, DetectorRuntime, Launch
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

CLI = TrainingCommandLine(Launch, __doc__, (FINETUNING,), required=("data",), trains=True)


def main(line: Training[Launch, DetectorRecipe, DetectorRuntime]) -> int:
    """Return the exit code: 0 finished; after saving, 85 stopped by a scheduler's signal, 130 by Ctrl-C."""
    with loading("torch and DeepSpeed"):
        from trainer.detection.finetuning import finetune
    return finetune(line.recipe, line.runtime, line.given, dry_run=line.settings.dry_run).exit_code


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
