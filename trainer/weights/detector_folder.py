"""Read and verify a detector's folder."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.files import describe_files

FORMAT_VERSION = 1
DESCRIPTION = "detector.json"
WEIGHTS = "weights.safetensors"


def read_description(folder: Path) -> dict[str, Any]:
    """Read detector.json.

    Raises:
        CheckpointError: it is unreadable, incomplete, or of another format.
    """
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        needed = (
            "format_version",
            "recipe",
            "preprocessing",
            "init",
            "calibration",
            "thresholds",
            "files",
            "selection",
        )
        missing = [name for name in needed if name not in description]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"detector {folder}: {DESCRIPTION} is unreadable ({error!r}): restore it") from error
    if missing or description["format_version"] != FORMAT_VERSION:
        what = f"lacks {missing[0]}" if missing else f"has format {description['format_version']}"
        raise CheckpointError(f"detector {folder}: {DESCRIPTION} {what}, this is format {FORMAT_VERSION}: train again")
    return description


def replaced_name(folder: Path) -> Path:
    """Return where the old detector is while a new one replaces it."""
    return folder.with_name(f".{folder.name}-old")


def read_detector(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read a detector's folder, or the output folder of a run that holds one. No code from the files is executed.

    Returns:
        folder: where it was found.
        description: detector.json.
        weights: the trained parameters, adapters and head or everything, in float32.

    Raises:
        CheckpointError: there is none, or a file is missing or altered.
    """
    places = (path, path / "detector", replaced_name(path / "detector"))
    folder = next((place for place in places if (place / DESCRIPTION).exists()), places[1])
    if not (folder / DESCRIPTION).exists():
        raise CheckpointError(f"{path} holds no detector ({DESCRIPTION}): name the output_dir of launch/finetune.py")
    description = read_description(folder)
    files = description["files"]
    found = describe_files(folder, only=set(files))
    for name, entry in files.items():
        if found.get(name) != entry:
            raise CheckpointError(f"detector {folder}: {name} is missing or altered: restore it, or train again")
    return folder, description, load_file(folder / WEIGHTS)
