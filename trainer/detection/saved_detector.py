"""A detector on disk: what evaluation needs, in a folder that is whole or absent.

Layout of OUTPUT/detector::

    detector.json        recipe, preprocessing, calibration, thresholds, where it comes from; sha256 of the other files
    weights.safetensors  what was trained: adapters and head, or everything; float32
    train.npz val.npz    prints of the images and people that it has seen (`trainer.detection.leakage`)
    adapter/             with LoRA: the same adapters and head in peft's own format

A frozen encoder is not in it: its weights are those of ``init``, whose sha256 is recorded and checked.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.detection.error_rates import Calibration
from trainer.detection.leakage import Prints
from trainer.detection.scoring import Decision
from trainer.errors import CheckpointError, without_secrets
from trainer.fault_tolerance.attempts import Lease
from trainer.files import describe_files, files_below, sync_files, write_synced

FORMAT_VERSION = 1
_DESCRIPTION = "detector.json"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class SavedDetector:
    """What a detector's folder holds."""

    path: Path
    description: dict[str, Any]
    weights: dict[str, Tensor]
    decision: Decision
    seen: dict[str, Prints]
    """Prints of the training set ("train") and of the validation set ("val"), where there was one."""


def save_detector(
    folder: Path,
    description: dict[str, Any],
    weights: dict[str, Tensor],
    decision: Decision,
    seen: dict[str, Prints],
    *,
    lease: Lease,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Replace a detector's folder; a kill leaves the old one or the new one.

    Raises:
        CheckpointError: the storage refuses; what was there stays.
        SupersededError: a newer attempt has taken over.
    """
    draft = lease.draft(folder.name)
    try:
        lease.check()
        draft.mkdir()
        save_file({name: value.contiguous() for name, value in weights.items()}, draft / _WEIGHTS)
        for name, prints in seen.items():
            prints.save(draft / f"{name}.npz")
        if write_more is not None:
            write_more(draft)
        sync_files(files_below(draft))
        fitted = {
            "calibration": {"slope": decision.calibration.slope, "offset": decision.calibration.offset},
            "thresholds": {name: repr(value) for name, value in decision.thresholds.items()},  # inf is no JSON number
            "threshold_rule": decision.rule,
            "threshold_notes": list(decision.notes),
        }
        text = {"format_version": FORMAT_VERSION} | description | fitted | {"files": describe_files(draft)}
        write_synced(draft / _DESCRIPTION, without_secrets(json.dumps(text, indent=1)) + "\n")
        restore(folder, lease)
        if folder.exists():  # no file system everywhere swaps two folders, so for a moment there is only the old one
            lease.move(folder, _old(folder))
        lease.move(draft, folder)
        if _old(folder).exists():
            lease.discard(_old(folder))
    except OSError as error:
        raise CheckpointError(f"detector {folder} cannot be written ({error}): mend the storage") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_detector(path: Path) -> SavedDetector:
    """Read a detector's folder, or that of a run which holds one. No code from the files is executed.

    Raises:
        CheckpointError: there is none, or a file is missing or altered.
    """
    places = (path, path / "detector", _old(path / "detector"))
    folder = next((place for place in places if (place / _DESCRIPTION).exists()), places[1])
    if not (folder / _DESCRIPTION).exists():
        raise CheckpointError(f"{path} holds no detector ({_DESCRIPTION}): name the output_dir of launch/finetune.py")
    description = read_description(folder)
    files = description["files"]
    found = describe_files(folder, only=set(files))
    for name, entry in files.items():
        if found.get(name) != entry:
            raise CheckpointError(f"detector {folder}: {name} is missing or altered: restore it, or train again")
    thresholds = {name: float(value) for name, value in description["thresholds"].items()}
    told = {"rule": description.get("threshold_rule", ""), "notes": tuple(description.get("threshold_notes", ()))}
    return SavedDetector(
        folder,
        description,
        load_file(folder / _WEIGHTS),
        Decision(Calibration(**description["calibration"]), thresholds, **told),
        {name: Prints.load(folder / f"{name}.npz") for name in ("train", "val") if f"{name}.npz" in files},
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Read detector.json.

    Raises:
        CheckpointError: it is unreadable, incomplete, or of another format.
    """
    try:
        description: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
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
        raise CheckpointError(f"detector {folder}: {_DESCRIPTION} is unreadable ({error!r}): restore it") from error
    if missing or description["format_version"] != FORMAT_VERSION:
        what = f"lacks {missing[0]}" if missing else f"has format {description['format_version']}"
        raise CheckpointError(f"detector {folder}: {_DESCRIPTION} {what}, this is format {FORMAT_VERSION}: train again")
    return description


def restore(folder: Path, lease: Lease) -> None:
    """Put a detector back that was about to be replaced when the process was killed."""
    if _old(folder).exists():
        if folder.exists():
            lease.discard(_old(folder))
        else:
            lease.move(_old(folder), folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-old")
