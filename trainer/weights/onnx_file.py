"""ONNX files of tools/export.py, run by onnxruntime on the CPU.

A file's metadata hold, under `RECORD`, what a detector's folder says of itself: preprocessing, calibration, thresholds.

Shapes: B images, H, W their size, C channels or classes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.errors import CheckpointError, ConfigError

MODEL = "model.onnx"
RECORD = "face_mae_detector"
"""Key of the metadata; its value is JSON."""
_NEEDED = ("preprocessing", "calibration", "thresholds")


class OnnxFile:
    """An opened file.

    Args:
        path: of the .onnx file, or the folder of an export that holds one.

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime  # an optional dependency
        except ImportError as error:
            raise ConfigError(f"{path} needs onnxruntime: pip install 'face-mae-trainer[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.path = path / MODEL if path.is_dir() else path
        try:
            self._session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an error of its own for each cause
            raise CheckpointError(f"{self.path} cannot be opened by onnxruntime ({error}): export it again") from error

    def run(self, names: list[str], images_BHWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return the named outputs for photographs of one size, uint8 RGB."""
        outputs: list[NDArray[np.float32]] = self._session.run(names, {"images": images_BHWC})
        return outputs

    def record(self) -> dict[str, Any]:
        """Return what the detector inside says of itself.

        Raises:
            ConfigError: the file holds none, or was written by an older version.
        """
        text = self._session.get_modelmeta().custom_metadata_map.get(RECORD)
        record: dict[str, Any] = json.loads(text) if text else {}
        if not all(name in record for name in _NEEDED):
            raise ConfigError(
                f"{self.path} is an ONNX file without the record of a detector: name one that tools/export.py "
                "--format onnx of this version has written from a run of launch/finetune.py"
            )
        return record


def as_metadata(record: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, str]:
    """Return the metadata of an ONNX file: a detector's record, at the height and width of the export [pixels]."""
    if not record:
        return {}
    height, width = image_size
    size = {"image_size": height if height == width else [height, width]}
    return {RECORD: json.dumps(dict(record) | {"preprocessing": record["preprocessing"] | size})}


def holds_onnx(path: Path) -> bool:
    """Whether it is an ONNX file, or an export of one."""
    return (path.suffix == ".onnx" and path.is_file()) or (path / MODEL).is_file()


def refuse_other_exports(path: Path, name: str) -> None:
    """Refuse the exports that are no detectors by themselves: those for timm, peft and transformers.

    Raises:
        ConfigError: as said.
    """
    kinds = {"adapter_config.json": "peft", "config.json": "timm or transformers"}
    kind = next((kind for file, kind in kinds.items() if (path / file).is_file()), None)
    if kind and not (path / "detector.json").exists():
        raise ConfigError(
            f"{name} is an export for {kind}, which holds neither calibration nor thresholds: name the run of "
            "launch/finetune.py, or export it with tools/export.py --format onnx"
        )
