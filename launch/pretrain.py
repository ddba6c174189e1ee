r"""Pre-train a masked autoencoder on shards of images.

A run is its output folder: the same command goes on where the run stands, also with another number of ranks.

Usage: deepspeed launch/pretrain.py [--recipe NAME] --data 'shards/*.tar' --output_dir RUN [--name value]

Examples:
    deepspeed launch/pretrain.py --recipe mae_vit_base --data 'shards/train/*.tar' \
        --val_data 'shards/val/*.tar' --output_dir runs/base
    deepspeed launch/pretrain.py --recipe demo --data 'shards/train/*.tar' --output_dir runs/small --dry_run
    python launch/pretrain.py --config runs/base/recipe.json --output_dir runs/again --dry_run
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from trainer.config.command_line import Training, TrainingCommandLine
from trainer.config.recipes import PRETRAINING
from trainer.config.settings import Launch, PretrainRecipe, PretrainRuntime
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

CLI = TrainingCommandLine(Launch, __doc__, (PRETRAINING,), required=("data",), trains=True)


def main(line: Training[Launch, PretrainRecipe, PretrainRuntime]) -> int:
    """Return the exit code: 0 finished; after saving, 85 stopped by a scheduler's signal, 130 by Ctrl-C."""
    with loading("torch and DeepSpeed"):
        from trainer.training.pretraining import pretrain
    return pretrain(line.recipe, line.runtime, dry_run=line.settings.dry_run).exit_code


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
