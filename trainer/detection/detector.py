"""A trained detector, ready to score: for evaluation, for photographs, and for other programs.

from trainer.detection import Detector
detector = Detector.load("runs/detector")
print(detector.score("photo.jpg"), detector.thresholds["d_eer"])
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from trainer.config.settings import DetectorRecipe
from trainer.data.photographs import read_photograph
from trainer.data.shards.index import ShardIndex
from trainer.data.sources import pixels_of
from trainer.data.transforms.decode import MIN_SIDE, to_rgb
from trainer.data.transforms.faces import FaceCropping
from trainer.data.transforms.views import CenterView, Photo, Pixels
from trainer.detection.build import preprocessing, preprocessing_of, rebuild, recipe_of
from trainer.detection.cropping import cropping_for, recorded_cropping
from trainer.detection.saved_detector import SavedDetector, decision_of, load_detector
from trainer.distributed.devices import default_device
from trainer.errors import ConfigError, DataError
from trainer.models.detector import MorphDetector
from trainer.weights.onnx_file import OnnxFile, holds_onnx, refuse_other_exports

Photograph: TypeAlias = str | PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Detector(ABC):
    """A named detector, ready to score."""

    name: str
    saved: SavedDetector

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, init: str | None = None, name: str = "", image_size: int | None = None
    ) -> "Detector":
        """Load a detector and the encoder that it stands on, to this process's GPU where there is one.

        An ONNX export is complete, and runs on the CPU.

        Args:
            path: an output_dir of launch/finetune.py, its detector folder, or an export of tools/export.py --format
                onnx.
            init: where the frozen encoder's weights are now, if not where training found them.
            name: for messages; the path if empty.
            image_size: refuse a detector of another image size [pixels].

        Raises:
            CheckpointError: it is damaged, or its encoder's weights are missing or different.
            ConfigError: it is another export, or its preprocessing is not what this version would do.
        """
        wanted = {"image_size": image_size} if image_size else {}
        if holds_onnx(Path(path)):
            return ExportedDetector.open(Path(path), name or fspath(path), wanted)
        return TrainedDetector.open(Path(path), name or fspath(path), wanted, init=init)

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of its view [pixels]."""

    @property
    @abstractmethod
    def pixels(self) -> Pixels:
        """How its images are decoded and scaled."""

    @abstractmethod
    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, 2) of uint8 views."""

    @property
    def view(self) -> CenterView:
        """How it sees a whole photograph; raises as `recorded_cropping`."""
        return self._view(recorded_cropping(self.saved.description["preprocessing"]))

    def view_of(self, index: ShardIndex, *, setting: str) -> CenterView:
        """Return how it sees the images of shards, which may be cropped already; raises as `cropping_for`.

        Args:
            index: of the shards.
            setting: the flag that named them, for messages.
        """
        return self._view(cropping_for(self.saved.description["preprocessing"], index, name=self.name, setting=setting))

    def _view(self, crop: FaceCropping | None) -> CenterView:
        return CenterView(size=self.image_size, pixels=self.pixels, crop=crop)

    @property
    def thresholds(self) -> dict[str, float]:
        """Name -> threshold: an image is a morph where its score is >= the threshold."""
        return self.saved.decision.thresholds

    def check_threshold(self, threshold: str) -> None:
        """Refuse the name of a threshold that it does not have.

        Raises:
            ConfigError: as said.
        """
        if threshold not in self.thresholds:
            raise ConfigError(
                f"threshold is {threshold!r}, but {self.name} has {', '.join(self.thresholds)}"
                + ("" if "val.npz" in self.saved.description["files"] else " (it was trained without --val_data)")
            )

    def score(self, image: Photograph) -> float:
        """Return the calibrated P(morph) of one photograph, as evaluation computes it.

        Args:
            image: a path, an image of Pillow, or uint8 RGB pixels (H, W, 3).

        Raises:
            SampleError: the photograph cannot be read, or is damaged, too large or too small.
            DataError: the pixels have another type or shape.
        """
        view_HWC = self._seen(image)
        images_BCHW = torch.from_numpy(view_HWC.copy())[None].permute(0, 3, 1, 2).to(default_device())
        with torch.inference_mode():
            logits_BC = self.logits(images_BCHW).double().cpu()
        return float(self.saved.decision.probability((logits_BC[:, 1] - logits_BC[:, 0]).numpy())[0])

    def _seen(self, image: Photograph) -> NDArray[np.uint8]:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIDE:
                raise DataError(
                    f"image has type {image.dtype} and shape {image.shape}: give uint8 RGB pixels (H, W, 3) with "
                    f"sides of at least {MIN_SIDE}"
                )
            return self.view.of_pixels(np.ascontiguousarray(image))[0]
        if isinstance(image, Image.Image):
            upright = to_rgb(ImageOps.exif_transpose(image), srgb=self.view.srgb)
            return self._seen(np.asarray(upright))
        view, size = self.view, self.image_size
        out_BSSC = np.empty((1, size, size, 3), dtype=np.uint8)
        view(Photo(read_photograph(Path(image))), view.draw(0), out_BSSC)
        return np.asarray(out_BSSC[0], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class TrainedDetector(Detector):
    """A detector as launch/finetune.py leaves it."""

    recipe: DetectorRecipe
    model: MorphDetector

    @classmethod
    def open(cls, path: Path, name: str, wanted: dict[str, Any], *, init: str | None) -> "TrainedDetector":
        """Read and build it; see `Detector.load`."""
        refuse_other_exports(path, name)
        saved = load_detector(path)
        recipe = recipe_of(saved)
        _refuse_other_preprocessing(name, saved.description["preprocessing"], preprocessing_of(recipe) | wanted)
        return cls(name, saved, recipe, rebuild(saved, recipe, name=name, init=init).eval().to(default_device()))

    @property
    def image_size(self) -> int:
        """Side of its view [pixels]."""
        return self.recipe.image_size

    @property
    def pixels(self) -> Pixels:
        """How its images are decoded and scaled."""
        return pixels_of(self.recipe)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, 2) of uint8 views."""
        logits_BC: Tensor = self.model(images_BCHW, want="logits")
        return logits_BC


@dataclass(frozen=True, slots=True)
class ExportedDetector(Detector):
    """An ONNX file with the record of its detector; it knows neither whom it has seen nor its encoder."""

    file: OnnxFile
    _pixels: Pixels

    @classmethod
    def open(cls, path: Path, name: str, wanted: dict[str, Any]) -> "ExportedDetector":
        """Read it; see `Detector.load`."""
        file = OnnxFile(path)
        record = file.record()
        recorded = record["preprocessing"]
        if not isinstance(recorded["image_size"], int):
            height, width = recorded["image_size"]
            raise ConfigError(
                f"{name} was exported for images of {height}x{width}, but photographs are cut to squares: export it "
                "without --image_size"
            )
        known = {text: resize for resize, text in CenterView.descriptions.items()}
        pixels = Pixels(known.get(recorded["view"], "antialias"), srgb=bool(recorded.get("colours")))
        expected = preprocessing(recorded["image_size"], recorded["mean"], recorded["std"], pixels=pixels) | wanted
        _refuse_other_preprocessing(name, recorded, expected)
        return cls(name, SavedDetector(file.path, record, {}, decision_of(record), {}), file, pixels)

    @property
    def image_size(self) -> int:
        """Side of its view [pixels]."""
        return int(self.saved.description["preprocessing"]["image_size"])

    @property
    def pixels(self) -> Pixels:
        """How its images are decoded and scaled."""
        return self._pixels

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, 2) of uint8 views."""
        images_BHWC = images_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(self.file.run(["logits"], images_BHWC)[0])


def _refuse_other_preprocessing(name: str, recorded: dict[str, Any], expected: dict[str, Any]) -> None:
    for field_name, value in expected.items():
        if recorded.get(field_name) != value:
            raise ConfigError(
                f"{name} was trained with {field_name} {recorded.get(field_name)!r}, but would be tested with "
                f"{value!r}: scores would mean nothing; test as it was trained, or train again"
            )
