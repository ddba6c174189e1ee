"""Pre-train a masked autoencoder: ``deepspeed launch/pretrain.py --recipe mae_vit_base --data 'shards/*.tar'``.

`pretrain` is the table of contents; ``--help`` lists every setting.
"""

if __name__ == "__main__":
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")
    from launch.early import read_early

    read_early(__file__, loads="torch and DeepSpeed")

import logging
import sys

from trainer.config.command_line import CommandLine, read_training
from trainer.config.recipes import DEFAULT, RECIPES
from trainer.config.settings import PretrainRecipe, PretrainRuntime
from trainer.fault_tolerance.exit_codes import run
from trainer.training.pretraining import pretrain

logger = logging.getLogger(__name__)


def read(argv: list[str]) -> CommandLine[PretrainRecipe, PretrainRuntime] | None:
    """Read the command line; None where it asked for help."""
    return read_training(argv, RECIPES, DEFAULT)


def main(argv: list[str]) -> int:
    """Return the exit code: 0 finished; after saving, 85 stopped by a scheduler's signal, 130 by Ctrl-C."""
    line = read(argv)
    if line is None:
        return 0
    return pretrain(line.recipe, line.runtime, dry_run=line.dry_run).exit_code


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
