"""A detector on disk: all that an evaluation needs, in an atomic folder.

Layout of OUTPUT/detector::

    detector.json        recipe, preprocessing, calibration, thresholds, origin; sha256 of the other files
    weights.safetensors  the trained parameters: adapters and head, or everything; float32
    train.npz val.npz    fingerprints of the images and identities that it has seen (`trainer.detection.leakage`)
    adapter/             with LoRA: the same adapters and head in peft's own format

A frozen encoder is not saved: its weights are those of ``init``, whose sha256 is recorded and checked.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from trainer.detection.error_rates import Calibration
from trainer.detection.leakage import Fingerprints
from trainer.detection.scoring import Decision
from trainer.errors import CheckpointError, without_secrets
from trainer.fault_tolerance.attempts import Lease
from trainer.files import describe_files, files_below, sync_files, write_synced
from trainer.weights.detector_folder import (
    DESCRIPTION,
    FORMAT_VERSION,
    WEIGHTS,
    read_detector,
    replaced_name,
)

RECORDED = (
    *("preprocessing", "calibration", "thresholds", "threshold_rule", "threshold_notes"),
    *("step", "files", "selection"),
)
"""What an export that scores by itself keeps of a description; the sha256 of the files tell which detector it was."""


@dataclass(frozen=True, slots=True)
class SavedDetector:
    """The content of a detector's folder."""

    path: Path
    description: dict[str, Any]
    weights: dict[str, Tensor]
    decision: Decision
    seen: dict[str, Fingerprints]
    """Fingerprints of the training set ("train") and, if there was one, of the validation set ("val")."""


def save_detector(
    folder: Path,
    description: dict[str, Any],
    weights: dict[str, Tensor],
    decision: Decision,
    seen: dict[str, Fingerprints],
    *,
    lease: Lease,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Replace a detector's folder; a kill leaves the old one or the new one.

    Raises:
        CheckpointError: the storage fails; the old detector stays.
        SupersededError: a newer attempt has taken over.
    """
    draft = lease.draft(folder.name)
    try:
        lease.check()
        draft.mkdir()
        save_file({name: value.contiguous() for name, value in weights.items()}, draft / WEIGHTS)
        for name, fingerprints in seen.items():
            fingerprints.save(draft / f"{name}.npz")
        if write_more is not None:
            write_more(draft)
        sync_files(files_below(draft))
        fitted = {
            "calibration": {"slope": decision.calibration.slope, "offset": decision.calibration.offset},
            "thresholds": {name: repr(value) for name, value in decision.thresholds.items()},  # JSON has no infinity
            "threshold_rule": decision.rule,
            "threshold_notes": list(decision.notes),
        }
        text = {"format_version": FORMAT_VERSION} | description | fitted | {"files": describe_files(draft)}
        write_synced(draft / DESCRIPTION, without_secrets(json.dumps(text, indent=1)) + "\n")
        restore(folder, lease)
        # Not every file system can swap two folders: the old one moves away first; after a kill, `restore` undoes it.
        if folder.exists():
            lease.move(folder, replaced_name(folder))
        lease.move(draft, folder)
        if replaced_name(folder).exists():
            lease.discard(replaced_name(folder))
    except OSError as error:
        raise CheckpointError(f"detector {folder} cannot be written ({error}): repair the storage") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_detector(path: Path) -> SavedDetector:
    """Read a detector's folder, or the output folder of a run that holds one. No code from the files is executed.

    Raises:
        CheckpointError: there is none, or a file is missing or altered.
    """
    folder, description, weights = read_detector(path)
    return SavedDetector(
        folder,
        description,
        weights,
        decision_of(description),
        {
            name: Fingerprints.load(folder / f"{name}.npz")
            for name in ("train", "val")
            if f"{name}.npz" in description["files"]
        },
    )


def decision_of(description: dict[str, Any]) -> Decision:
    """Read calibration and thresholds from a description."""
    thresholds = {name: float(value) for name, value in description["thresholds"].items()}
    limits = {"rule": description.get("threshold_rule", ""), "notes": tuple(description.get("threshold_notes", ()))}
    return Decision(Calibration(**description["calibration"]), thresholds, **limits)


def restore(folder: Path, lease: Lease) -> None:
    """Restore the old detector if the process was killed while it was being replaced."""
    if replaced_name(folder).exists():
        if folder.exists():
            lease.discard(replaced_name(folder))
        else:
            lease.move(replaced_name(folder), folder)
