"""Explanations of scores (launch/detect.py --explain): a picture for each photograph, and a table of them.

FOLDER/000012_NAME.png shows photograph 12, counted from 0, as the detector sees it; where blurring it changes the score
(`trainer.detection.occlusion`); and, if the detector's pre-training is a masked autoencoder that is found, what that
reconstructs of hidden patches and where it errs. FOLDER/explained.csv has a row for each photograph, in the order of
the scores.

The autoencoder sees the photograph as the pre-training sees validation images: whole, scaled to its own image size.
That is another view than the detector's, if the detector sees the centre at its own resolution. The reconstruction
error is the mean squared error over the hidden patches of `NUM_MASKS` masks of the pre-training, so it compares with
its val_loss. It says how unlike the faces of pre-training a photograph is, and not whether it is a morph.

Shapes: B images, H, W view, N patches, K kept, M masked, P values of a patch, G places a side.
"""

import csv
import dataclasses
import io
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainer.config.settings import PretrainRecipe
from trainer.data.images import Images
from trainer.data.loader import Loader
from trainer.data.sources import pixels_of
from trainer.data.stream import Batch
from trainer.data.transforms.views import CenterView
from trainer.detection.detector import Detector, TrainedDetector
from trainer.detection.exporting import build_mae, recipe_of_weights
from trainer.detection.occlusion import occlusion_map
from trainer.detection.scoring import SUCCESS, Scores
from trainer.distributed.devices import default_device
from trainer.errors import ConfigError, DataError
from trainer.files import atomic_draft, readable
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import MaskIndices
from trainer.seeds import Purpose, uniforms
from trainer.training.pretraining import mask_of
from trainer.weights.load import find_again, read_init

TABLE = "explained.csv"
NUM_MASKS = 8
"""Masks of each photograph: at a ratio of 0.75, a patch stays visible in all of them once in 65,000."""
PANEL = 336
"""Side of a panel [pixels]."""
_MARGIN, _CAPTION, _FONT = 12, 44, 15
"""Around panels, and above them for two lines of text; height of letters [pixels]."""
_SMALLEST_SCALE = 0.1
"""Full colour stands for at least this change of log odds, so that noise does not look like a finding."""
_OPACITY = 0.75


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What the masked autoencoder makes of one view."""

    error: float
    """As val_loss measures it."""
    view_HWC: NDArray[np.uint8]
    """What is reconstructed."""
    error_GG: NDArray[np.float64]
    """Of each patch, over the masks that hide it; NaN where none does."""
    picture_HWC: NDArray[np.uint8]
    """With the patches that the first mask hides filled in."""


@dataclass(frozen=True, slots=True)
class Pretraining:
    """The masked autoencoder that a detector started from."""

    mae: MaskedAutoencoder
    masks: MaskIndices
    """Which every photograph gets."""
    recipe: PretrainRecipe

    def view(self, seen: CenterView) -> CenterView:
        """Return how it sees the photographs that a detector sees so: cropped to the same face."""
        return CenterView(size=self.recipe.image_size, pixels=pixels_of(self.recipe), crop=seen.crop)


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains the scores of a detector.

    Args:
        detector: whose scores.
        folder: for the pictures.
        pretraining: the detector's own, if it is found.
        batch: images in one forward pass.
    """

    detector: Detector
    folder: Path
    pretraining: Pretraining | None
    batch: int

    @property
    def table_path(self) -> Path:
        """Return the path of the table."""
        return self.folder / TABLE

    def picture_of(self, position: int, key: str) -> Path:
        """Return the path of a photograph's picture."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(key).stem)[:60]
        return self.folder / f"{position:06d}_{stem}.png"

    def batches(self, images: Images, samples: list[int], *, batch: int, num_workers: int) -> Iterable[Batch | None]:
        """Yield batches of the same images as the pre-training sees them; nothing but None without one."""
        if self.pretraining is None:
            return itertools.repeat(None)
        view = self.pretraining.view(images.view(self.detector))
        return Loader(images.stream(samples, view, batch=batch), num_workers=num_workers)

    def explain(self, seen: Batch, whole: Batch | None, scores: Scores, keys: list[str], threshold: float) -> Scores:
        """Draw the picture of each image of a batch that has a score; returns the scores with reconstruction errors.

        Args:
            seen: as the detector sees them.
            whole: as its pre-training sees them.
            scores: of the batch.
            keys: for the names of the pictures.
            threshold: from which on an image is called a morph.

        Raises:
            DataError: the storage fails.
        """
        errors: dict[int, float] = {}
        for number, (view_CHW, position, logit, code, key) in enumerate(
            zip(seen.images_BCHW, scores.sample_N.tolist(), scores.logit_N, scores.code_N, keys, strict=True)
        ):
            if code != SUCCESS:
                continue
            slope = self.detector.saved.decision.calibration.slope
            worth_GG = slope * occlusion_map(self.detector.logits, view_CHW, batch=self.batch, device=default_device())
            rebuilt = reconstruct(self.pretraining, whole.images_BCHW[number]) if self.pretraining and whole else None
            score = float(self.detector.saved.decision.probability(np.array([logit]))[0])
            view_HWC: NDArray[np.uint8] = view_CHW.permute(1, 2, 0).cpu().numpy()
            called = "morph" if score >= threshold else "bona fide"
            drawn = draw(view_HWC, f"P(morph) {score:.3f}: {called}", worth_GG, rebuilt)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_draft(self.picture_of(position, key)) as draft:
                    drawn.save(draft, "PNG")
            except OSError as error:
                raise DataError(f"explain {self.folder} cannot be written ({error.strerror}): free space") from error
            if rebuilt is not None:
                errors[position] = rebuilt.error
        return dataclasses.replace(scores, reconstruction_errors=errors)

    def table(self, names: list[str], keys: list[str], scores: Scores, score_N: list[float]) -> str:
        """Return the text of the table: path, score, picture, reconstructionError."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "score", "picture", "reconstructionError"))
        for position, name, key, score, code in zip(
            scores.sample_N.tolist(), names, keys, score_N, scores.code_N, strict=True
        ):
            error = scores.reconstruction_errors.get(position)
            row = (repr(float(score)), self.picture_of(position, key).name) if code == SUCCESS else ("", "")
            writer.writerow((readable(name), *row, "" if error is None else f"{error:.6g}"))
        return file.getvalue()


def open_explainer(detector: Detector, folder: Path, *, init: str | None, batch: int) -> tuple[Explainer, str]:
    """Prepare explanations; returns them, and a line on the reconstruction error for the user."""
    pretraining, note = pretraining_of(detector, init)
    return Explainer(detector, folder, pretraining, batch), note


def pretraining_of(detector: Detector, init: str | None) -> tuple[Pretraining | None, str]:
    """Find the masked autoencoder that a detector started from; returns it, or None, and a line that says so."""
    without = "no reconstruction error: "
    if not isinstance(detector, TrainedDetector):
        return None, f"{without}an export does not hold the pre-training's decoder"
    origin = detector.saved.description["init"]
    if origin["pretrained"] or not (init or origin.get("path")):
        return None, f"{without}the detector started from {origin['source'] or 'random weights'}, not from an MAE here"
    try:
        place = init or find_again(origin, detector.saved.path, name=detector.name)
        found = read_init(place, pretrained=False)
        assert found is not None
        if "decoder_pred.weight" not in found.decoder:
            return None, f"{without}{place} holds no decoder"
        recipe = recipe_of_weights(found, place, detector.recipe.model)
        mae = build_mae(found, recipe)
    except ConfigError as error:
        return None, f"{without}{error}"
    note = (
        f"reconstruction errors by {os.path.normpath(place)}, of whole photographs scaled to {recipe.image_size} "
        "pixels, comparable with its val_loss"
    )
    mae = mae.eval().to(default_device())
    return Pretraining(mae, fixed_masks(mae, recipe), recipe), note


def fixed_masks(mae: MaskedAutoencoder, recipe: PretrainRecipe) -> MaskIndices:
    """Draw the masks that every photograph gets, as the pre-training draws those of validation images."""
    drawn_BN = uniforms(0, Purpose.HELD_OUT_MASK, np.arange(NUM_MASKS), mae.encoder.num_patches)
    noise_BN = torch.from_numpy(drawn_BN).to(mae.mask_token.device)
    return mask_of(recipe, mae.encoder, mask_ratio=recipe.mask_ratio)(noise_BN)


def reconstruct(pretraining: Pretraining, view_CHW: Tensor) -> Reconstruction:
    """Hide patches of a view and compare what the autoencoder predicts there."""
    mae, masks = pretraining.mae, pretraining.masks
    images_BCHW = view_CHW[None].to(mae.mask_token.device).expand(NUM_MASKS, -1, -1, -1)
    predicted_BMP = mae(images_BCHW, *masks, want="prediction").float()
    error_BM = (predicted_BMP - mae.target(images_BCHW, masks.masked_BM)).square().mean(dim=2).double().cpu()
    num_patches, hidden = mae.encoder.num_patches, masks.masked_BM.flatten().cpu()
    total_N, count_N = (
        torch.zeros(num_patches, dtype=torch.float64).index_add_(0, hidden, values.flatten())
        for values in (error_BM, torch.ones_like(error_BM))
    )
    picture_CHW = mae(images_BCHW[:1], masks.keep_BK[:1], masks.masked_BM[:1], want="pictures")[2, 0].cpu()
    return Reconstruction(
        float(error_BM.mean()),
        view_CHW.permute(1, 2, 0).cpu().numpy(),
        (total_N / count_N).numpy().reshape(mae.encoder.grid),
        picture_CHW.permute(1, 2, 0).numpy(),
    )


# ---------------------------------------------------------------------------------------------- drawing


def draw(
    view_HWC: NDArray[np.uint8], title: str, worth_GG: NDArray[np.float64], rebuilt: Reconstruction | None
) -> Image.Image:
    """Draw the panels of one photograph side by side."""
    largest = float(np.abs(worth_GG).max())
    panels = [
        (Image.fromarray(view_HWC), title, "as the detector sees it"),
        (
            _overlaid(view_HWC, worth_GG / max(largest, _SMALLEST_SCALE) / 2 + 0.5, "RdBu_r", centred=True),
            "red speaks for morph, blue for bona fide",
            f"log odds change by up to {largest:.2f} if blurred here",
        ),
    ]
    if rebuilt is not None:
        top = float(np.nanmax(rebuilt.error_GG))
        panels += [
            (
                Image.fromarray(rebuilt.picture_HWC),
                "MAE: hidden patches filled in",
                "the photograph as pre-training sees it",
            ),
            (
                _overlaid(rebuilt.view_HWC, np.nan_to_num(rebuilt.error_GG / max(top, 1e-9)), "magma", centred=False),
                f"reconstruction error {rebuilt.error:.3f}",
                f"bright: up to {top:.2f}; no sign of a morph in itself",
            ),
        ]
    sheet = Image.new("RGB", ((PANEL + _MARGIN) * len(panels) + _MARGIN, PANEL + _CAPTION + 2 * _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for number, (panel, first, second) in enumerate(panels):
        left = _MARGIN + number * (PANEL + _MARGIN)
        pen.text((left, _MARGIN - 4), f"{first}\n{second}", fill="black", font=font, spacing=4)
        sheet.paste(panel.resize((PANEL, PANEL), Image.Resampling.BICUBIC), (left, _MARGIN + _CAPTION))
    return sheet


def _overlaid(
    view_HWC: NDArray[np.uint8], value_GG: NDArray[np.float64], colours: str, *, centred: bool
) -> Image.Image:
    """Lay colours over the grey image; values are from 0 to 1, and the stronger a value, the less shows through."""
    grey = Image.fromarray(view_HWC).convert("L").convert("RGB").resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    fine_HW = np.asarray(Image.fromarray(value_GG.astype(np.float32)).resize((PANEL, PANEL), Image.Resampling.BICUBIC))
    fine_HW = fine_HW.clip(0, 1)
    strength_HW1 = (np.abs(2 * fine_HW - 1) if centred else fine_HW)[..., None] * _OPACITY
    colour_HW3 = colormaps[colours](fine_HW)[..., :3] * 255
    return Image.fromarray((np.asarray(grey) * (1 - strength_HW1) + colour_HW3 * strength_HW1).astype(np.uint8))
