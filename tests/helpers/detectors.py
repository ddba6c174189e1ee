"""Detectors without training."""

from pathlib import Path

import numpy as np
import torch

from trainer.config.record import to_dict
from trainer.config.settings import DetectorRecipe
from trainer.detection.build import build_detector, preprocessing_of
from trainer.detection.error_rates import Calibration
from trainer.detection.saved_detector import save_detector
from trainer.detection.scoring import Decision
from trainer.fault_tolerance.attempts import acquire

THRESHOLD = 0.5
RECIPE = DetectorRecipe(model="vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=2)


def drawn_detector(
    output: Path, *, recipe: DetectorRecipe = RECIPE, mae: Path | None = None, **preprocessing: str
) -> Path:
    """A detector with drawn weights: its scores differ from image to image, and that is all that matters here.

    Args:
        output: of the run.
        recipe: its own.
        mae: the weights that it says it started from.
        preprocessing: more of what it records.
    """
    output.mkdir()
    model, _ = build_detector(recipe, None)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=2.0)
    description = {
        "recipe": to_dict(recipe), "preprocessing": preprocessing_of(recipe) | preprocessing,
        "step": 1, "data": "a.tar",
        "init": {"source": str(mae or ""), "path": str(mae or ""), "pretrained": False, "sha256": ""},
        "selection": {"figures": None},
    }  # fmt: skip
    decision = Decision(Calibration(0.7, 0.1), {"d_eer": THRESHOLD, "macer_0.01": -np.inf})
    weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    save_detector(output / "detector", description, weights, decision, {}, lease=acquire(output, num_ranks=1))
    return output
