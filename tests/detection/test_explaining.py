"""--explain: what the heat map measures, and the pictures and the table of a command."""

import csv
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.detectors import RECIPE, drawn_detector
from tests.helpers.shards import jpeg
from trainer.config.scoring_settings import DetectionSettings
from trainer.config.settings import PretrainRecipe
from trainer.detection import Detector, detecting
from trainer.detection.detecting import detect
from trainer.detection.explaining import pretraining_of, reconstruct
from trainer.detection.occlusion import GRID, occlusion_map, spots
from trainer.errors import ConfigError
from trainer.training.pretraining import build_model

CPU = torch.device("cpu")


def test_the_map_is_the_loss_of_logit_and_lies_where_the_detail_is() -> None:
    """A scorer that adds up the red contrast of neighbours: only a checked corner has any."""
    view_CHW = torch.full((3, 96, 96), 100, dtype=torch.uint8)
    view_CHW[0, 8:24, 56:72] = torch.from_numpy(np.indices((16, 16)).sum(axis=0) % 2 * 255).to(torch.uint8)

    def contrast(images_BCHW: torch.Tensor) -> torch.Tensor:
        red_BHW = images_BCHW[:, 0].float()
        logit_B = (red_BHW[:, :, 1:] - red_BHW[:, :, :-1]).abs().mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(logit_B), logit_B], dim=1)

    worth_GG = occlusion_map(contrast, view_CHW, batch=7, device=CPU)
    assert worth_GG.shape == (GRID, GRID)
    row, column = np.unravel_index(worth_GG.argmax(), worth_GG.shape)
    assert (row, column) in {(1, 7), (1, 8), (2, 7), (2, 8)}, "the corner is rows 8 to 24, columns 56 to 72 of 96"
    assert np.abs(worth_GG[6:]).max() < 0.01 * worth_GG.max(), "blurring what is plain changes nothing"
    whole = float(contrast(view_CHW[None])[0, 1])
    assert 0.3 * whole < worth_GG.max() < whole
    np.testing.assert_array_equal(worth_GG, occlusion_map(contrast, view_CHW, batch=144, device=CPU))


def test_places_cover_the_view_evenly() -> None:
    spot_PHW = spots(224)
    assert spot_PHW.shape == (GRID**2, 224, 224)
    assert 0.99 < float(spot_PHW.amax(dim=(1, 2)).min()) <= float(spot_PHW.max()) <= 1
    inside_HW = spot_PHW.sum(dim=0)[28:-28, 28:-28]  # two standard deviations of a place from the border
    assert float(inside_HW.max() / inside_HW.min()) < 1.1


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mae") / "mae.pth"
    shape = {"model": RECIPE.model, "image_size": 32, "patch_size": 8, "encoder_depth": 2}
    model = build_model(PretrainRecipe(**shape, decoder_width=32, decoder_depth=1))
    state = {name.removeprefix("encoder.vit."): value for name, value in model.state_dict().items()}
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["decoder_pos_embed"]], dim=1)
    torch.save({"model": state, "args": Namespace(norm_pix_loss=False, mask_ratio=0.75)}, path)
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number} a.jpg").write_bytes(jpeg(number, 60, 50))
    (folder / "2 a.jpg").write_bytes(b"damaged")
    return folder


def settings_of(model: Path, images: Path, output: Path, **changes: Any) -> DetectionSettings:
    options = {"num_workers": 0, "progress_bar": False, "micro_batch": 2} | changes
    return DetectionSettings(model=str(model), images=str(images), output=str(output), **options)


def test_each_photograph_with_a_score_has_a_picture_and_a_row_in_the_order_of_the_scores(
    mae: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = drawn_detector(tmp_path / "run", mae=mae), tmp_path / "explained"
    detect(settings_of(model, photographs, tmp_path / "plain.csv"))
    detect(settings_of(model, photographs, tmp_path / "out.csv", explain=str(folder)))
    note = f"145 forward passes of each image; reconstruction errors by {mae}, of whole photographs scaled to 32 pixels"
    assert note in capsys.readouterr().out
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "plain.csv").read_text()
    scores, table = (
        list(csv.DictReader(path.read_text().splitlines())) for path in (tmp_path / "out.csv", folder / "explained.csv")
    )
    names = [f"{number:06d}_{number}_a.png" for number in range(5)]
    names[2] = ""
    assert [row["picture"] for row in table] == names
    assert {path.name for path in folder.iterdir()} == {"explained.csv", *filter(None, names)}
    assert [(row["path"], row["score"]) for row in table] == [(row["path"], row["score"]) for row in scores]
    assert [bool(row["reconstructionError"]) for row in table] == [True, True, False, True, True]
    detector = Detector.load(model)
    pretraining, _ = pretraining_of(detector, None)
    assert pretraining is not None
    view_CHW = torch.from_numpy(detector._seen(photographs / "3 a.jpg").copy()).permute(2, 0, 1)
    with torch.no_grad():
        expected = pretraining.mae(view_CHW[None].expand(8, -1, -1, -1), *pretraining.masks, want="error").mean()
        rebuilt = reconstruct(pretraining, view_CHW)
    assert (
        rebuilt.error
        == pytest.approx(float(expected), rel=1e-5)
        == pytest.approx(float(table[3]["reconstructionError"]), rel=1e-4)
    )
    with Image.open(folder / names[0]) as picture:
        assert picture.size == (4 * (336 + 12) + 12, 336 + 44 + 24)
    detect(settings_of(model, photographs, tmp_path / "out.csv", explain=str(folder)))
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_command_keeps_its_pictures_errors_and_boxes(
    mae: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn_detector(tmp_path / "run", mae=mae)
    settings = settings_of(model, photographs, tmp_path / "out.csv", explain=str(tmp_path / "explained"))
    whole = dataclasses.replace(settings, output=str(tmp_path / "whole.csv"), explain=str(tmp_path / "whole"))
    detect(whole)
    commit = detecting.Job.commit

    def fail(*given: Any) -> None:
        raise ConfigError("interrupted")

    monkeypatch.setattr(detecting.Job, "commit", fail)
    with pytest.raises(ConfigError, match="interrupted"):
        detect(settings)
    monkeypatch.setattr(detecting.Job, "commit", commit)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "explained").iterdir()}
    assert len(stamps) == 4
    detect(settings)
    assert {name: (tmp_path / "explained" / name).stat().st_mtime_ns for name in stamps} == stamps
    tables = [(tmp_path / name / "explained.csv").read_text() for name in ("explained", "whole")]
    assert tables[0] == tables[1]


def test_without_a_pretraining_that_is_said_and_the_heat_map_is_drawn(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, lost = drawn_detector(tmp_path / "scratch"), drawn_detector(tmp_path / "lost", mae=tmp_path / "gone.pth")
    detect(settings_of(scratch, photographs / "0 a.jpg", tmp_path / "a.csv", explain=str(tmp_path / "a")))
    assert "no reconstruction error: the detector started from random weights" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "000000_0_a.png") as picture:
        assert picture.size[0] == 2 * (336 + 12) + 12
    assert (tmp_path / "a" / "explained.csv").read_text().endswith("000000_0_a.png,\n")
    assert "pass --init" in pretraining_of(Detector.load(lost), None)[1]


def test_a_detector_with_a_residual_branch_is_explained_on_photographs_at_their_own_resolution(
    photographs: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, use_residual_branch=True, view_resize="native")
    model, photograph = drawn_detector(tmp_path / "run", recipe=recipe), photographs / "0 a.jpg"
    detect(settings_of(model, photograph, tmp_path / "a.csv", explain=str(tmp_path / "a")))
    detector = Detector.load(model)
    view_CHW = torch.from_numpy(detector._seen(photograph).copy()).permute(2, 0, 1)
    whole_HWC = np.asarray(Image.open(photograph).convert("RGB"))
    top, left = ((side - 32) // 2 for side in whole_HWC.shape[:2])
    np.testing.assert_array_equal(view_CHW.permute(1, 2, 0), whole_HWC[top : top + 32, left : left + 32])
    with torch.inference_mode():
        worth_GG = occlusion_map(detector.logits, view_CHW, batch=16, device=CPU)
    assert np.abs(worth_GG).max() > 1e-3
    with Image.open(tmp_path / "a" / "000000_0_a.png") as picture:
        assert picture.size[0] == 2 * (336 + 12) + 12


def test_the_mae_sees_whole_photographs_scaled_as_validation_images_whatever_the_detector_sees(
    mae: Path, photographs: Path, tmp_path: Path
) -> None:
    """A detector of another image size, at the photographs' own resolution: the errors are those of val_loss."""
    native = dataclasses.replace(RECIPE, view_resize="native", image_size=24)
    errors = {}
    for name, recipe in (("scaled", RECIPE), ("native", native)):
        model, folder = drawn_detector(tmp_path / name, recipe=recipe, mae=mae), tmp_path / f"{name}-explained"
        detect(settings_of(model, photographs, tmp_path / f"{name}.csv", explain=str(folder)))
        rows = csv.DictReader((folder / "explained.csv").read_text().splitlines())
        errors[name] = [row["reconstructionError"] for row in rows]
    assert errors["native"] == errors["scaled"]
    assert len(set(errors["native"])) > 1


@pytest.mark.parametrize(
    ("explain", "message"),
    [
        ("true", "explain is 'true', but must name a folder"),
        ("FULL", "holds files of something else: name a new folder"),
        ("FILE", "it is a file: name a new folder"),
    ],
)
def test_a_folder_that_cannot_take_pictures_is_refused_before_any_work(
    explain: str, message: str, photographs: Path, tmp_path: Path
) -> None:
    places = {"FULL": str(photographs), "FILE": str(photographs / "0 a.jpg")}
    model = drawn_detector(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        detect(settings_of(model, photographs, tmp_path / "out.csv", explain=places.get(explain, explain)))
    assert not (tmp_path / "out.csv").exists()
    assert not list(tmp_path.glob("out.csv*"))
