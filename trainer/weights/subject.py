"""The subject of an export: a model of this trainer, and its outputs on random images."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.models.detector import MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import patchify

NUM_IMAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model to export, in evaluation mode, on the CPU, for the requested image size."""

    name: str
    """timm's name of the encoder."""
    encoder: PatchEncoder
    """For a detector its own encoder, with adapters."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    view: str = ""
    """The view of images that a detector records."""
    colours: str = ""
    """The change of colours that it records, if any."""
    mae: MaskedAutoencoder | None = None
    """The autoencoder around the encoder, if there is a decoder."""
    mask_ratio: float = 0.75
    detector: MorphDetector | None = None
    """The detector around the encoder, if there is one."""
    calibration: tuple[float, float] = (1.0, 0.0)
    """Slope and offset of a detector's score, see `calibrated`."""
    threshold: float = 0.5
    """On the calibrated score, for the card's code."""
    face_crop: str = ""
    """How its photographs are cropped to faces before anything else; empty for whole ones."""
    record: dict[str, Any] = field(default_factory=dict)
    """What an ONNX file says of a detector, JSON-able; see `trainer.weights.onnx_file`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        rows, columns = self.encoder.grid
        return rows * self.encoder.patch, columns * self.encoder.patch

    @property
    def scales_exactly(self) -> bool:
        """Whether its view scales as Pillow does, which graphs and code can repeat; "former" ones cannot."""
        return "antialias" in self.view

    @property
    def is_native(self) -> bool:
        """Whether its view keeps photographs at their own resolution, and scales up only those that do not cover it."""
        return "own resolution" in self.view

    @property
    def images(self) -> Tensor:
        """Random uint8 images (B, 3, H, W) for the comparison with other libraries, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (NUM_IMAGES, 3, *self.image_size), dtype=torch.uint8, generator=generator)

    @property
    def pixels(self) -> Tensor:
        """The same images, normalised."""
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.images.float() / 255 - mean_C11) / std_C11

    @property
    def tokens(self) -> Tensor:
        """The encoder's output for them (B, T, D)."""
        tokens_BTD: Tensor = self.encoder(patchify(self.pixels, self.encoder.patch))
        return tokens_BTD

    @property
    def logits(self) -> Tensor:
        """The detector's output for them (B, 2)."""
        assert self.detector is not None
        logits_BC: Tensor = self.detector(self.images, want="logits")
        return logits_BC

    @property
    def scores(self) -> Tensor:
        """The detector's calibrated P(morph) for them (B)."""
        return calibrated(self.logits, *self.calibration)

    def timm_options(self, **more: Any) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` beside the name."""
        height, width = self.image_size
        size = height if height == width else (height, width)
        shape = {"img_size": size, "patch_size": self.encoder.patch, "depth": len(self.encoder.vit.blocks)}
        pooling = {"global_pool": "avg", "fc_norm": True} if self.encoder.has_fc_norm else {}
        return shape | {"num_classes": 0} | pooling | more


@dataclass(frozen=True, slots=True)
class Loading:
    """How to use an export, for its card."""

    title: str
    notes: str
    snippet: str


def calibrated(logits_BC: Tensor, slope: float, offset: float) -> Tensor:
    """Return P(morph) as evaluation computes it: sigmoid(slope * (logit of morph - logit of bona fide) + offset)."""
    return torch.sigmoid(slope * (logits_BC[:, 1] - logits_BC[:, 0]) + offset)
