r"""Compute the features of images: an encoder's class token, or the mean of its patch tokens, also after inner blocks.

The model is a run of launch/pretrain.py, a detector of launch/finetune.py with its adapters, an export, an encoder that
--init takes, an architecture of timm (timm:NAME), or pixels, the image itself. --weights random draws the weights of
the same architecture, for comparison. Images are seen as an evaluation sees them: in full, centred, without
augmentation. Writes into OUTPUT_DIR, in the order of the images:

    features.json            the index: what was computed, from what, sha256 of the files; written last
    part-00000.safetensors   arrays (n, width) by the name of the feature, or .npy files
    part-00000.jsonl         a row for each image: key, shard, label, identity, attack ... as far as they are known

An image that cannot be read is a row of NaN with a reason. After a kill, the same command goes on and writes the same
files. Start it with deepspeed to compute on several ranks. `trainer.features.read_features` reads the result, and
tools/probe.py measures how good the features are.

Usage: python launch/embed.py --model RUN --images 'shards/*.tar'|FOLDER|list.csv --output_dir features/base

Examples:
    python launch/embed.py --model runs/base --images 'detect/test/*.tar' --output_dir features/base
    python launch/embed.py --model runs/base --weights random --images 'detect/test/*.tar' --output_dir features/random
    python launch/embed.py --model pixels --images 'detect/test/*.tar' --output_dir features/pixels
    python launch/embed.py --model timm:vit_tiny_patch16_224 --weights random --images faces \
        --features mean,cls --blocks 5,11 --dtype fp16 --format npy --output_dir features/tiny
    deepspeed --num_gpus 2 launch/embed.py --model runs/detector --images 'detect/test/*.tar' \
        --output_dir features/detector
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from trainer.config.command_line import CommandLine
from trainer.config.feature_settings import EmbeddingSettings
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

CLI = CommandLine(EmbeddingSettings, __doc__, required=("model", "images", "output_dir"))


def main(settings: EmbeddingSettings) -> int:
    """Return the exit code."""
    with loading("torch and the model library"):
        from trainer.features.embedding import embed
    embed(settings)
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
