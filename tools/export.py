"""Export weights to timm, transformers, peft or ONNX, with a model card; each is read back and compared first.

What --source may be: a run or checkpoint of launch/pretrain.py, a run of launch/finetune.py, an official MAE .pth file,
a folder or .safetensors file of transformers' ViTMAE, a .safetensors file of timm's, or with --pretrained true the name
of a timm model.

    --format timm      the encoder (of a detector with adapters merged in): timm.create_model(..., checkpoint_path=...)
    --format vitmae    encoder and decoder: transformers' ViTMAEForPreTraining
    --format adapter   a LoRA detector's adapters and head: peft on a timm model
    --format merged    a detector as a timm model with two classes, adapters merged in
    --format onnx      a detector, or else an encoder: from uint8 RGB photographs of any size; view, normalisation and
                       calibration are inside the graph, and launch/detect.py --model takes it

Usage: python tools/export.py --source RUN_OR_FILE --format timm --output FOLDER [--image_size N] [--licence TEXT]

Examples:
    python tools/export.py --source runs/base --format timm --output exported/encoder
    python tools/export.py --source runs/detector --format merged --output exported/merged
    python tools/export.py --source runs/detector --format adapter --output exported/adapter
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.checks import check_types
from trainer.config.command_line import CommandLine
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    source: str = ""
    """Where the weights are; see above."""
    format: Literal["timm", "vitmae", "adapter", "merged", "onnx"] = "timm"
    """What to write."""
    output: str = ""
    """Folder to write; must not exist yet."""
    image_size: str | None = None
    """N or HEIGHTxWIDTH: interpolate the positions for such images; none keeps the size that it was trained at
    [pixels]."""
    licence: str = ""
    """Licence of the weights, for the card; empty says unknown."""
    model: str = ""
    """timm's name of the encoder in a file; empty: the published MAE of that width. Runs know their own."""
    pretrained: bool = False
    """Take --source as the name of a timm model, whose weights are downloaded."""
    normalisation: Literal["imagenet", "half"] = "imagenet"
    """Mean and deviation of pixels that the encoder in a file expects. Runs and timm's models know their own."""
    init: str | None = None
    """Where a detector's frozen encoder is now, if not where training found it; it is checked."""

    def __post_init__(self) -> None:
        check_types(self)
        parse_size(self.image_size)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read N or HEIGHTxWIDTH.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    size = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if size is None:
        raise ConfigError(f"image_size is {text!r}, but must be N or HEIGHTxWIDTH, such as 224 or 224x160")
    return int(size[1]), int(size[2] or size[1])


CLI = CommandLine(Settings, __doc__, required=("source", "output"))


def main(settings: Settings) -> int:
    """Return the exit code."""
    with loading("torch and the model library"):
        from trainer.detection.exporting import open_detector, open_weights
        from trainer.weights.export import export, refuse_early
        from trainer.weights.load import holds_detector
    output = Path(settings.output)
    refuse_early(settings.format, output)
    is_detector = holds_detector(Path(settings.source)) and not settings.pretrained
    subject, card = (
        open_detector(settings.source, settings.init)
        if is_detector
        else open_weights(
            settings.source,
            model=settings.model,
            pretrained=settings.pretrained,
            normalisation=settings.normalisation,
            with_decoder=settings.format == "vitmae",
        )
    )
    if size := parse_size(settings.image_size):
        trained = "x".join(map(str, subject.image_size))
        subject.encoder.resize(*size)
        card["Source"] |= {"trained_at": trained, "exported_for": "x".join(map(str, size))}
    export(subject, card, to=settings.format, output=output, licence=settings.licence)
    print(f"{output}: {settings.format}, read back and compared; how to load it stands in {output / 'README.md'}")
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
