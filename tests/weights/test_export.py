"""Weights out to timm, transformers, peft and ONNX and back in; the oracles are these libraries, as the card says."""

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from argparse import Namespace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import logit
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from tests.helpers.runs import ROOT, TINY, argv_of, forks, launch
from tools.export import CLI, main
from trainer.config.command_line import call
from trainer.config.record import to_dict
from trainer.config.settings import DetectorRecipe, PretrainRecipe
from trainer.data.sources import pixels_of
from trainer.data.transforms.views import CenterView, Photo, Pixels
from trainer.detection.build import build_detector, preprocessing_of, rebuild, recipe_of
from trainer.detection.error_rates import Calibration
from trainer.detection.leakage import Fingerprints
from trainer.detection.saved_detector import load_detector, save_detector
from trainer.detection.scoring import UNCALIBRATED, Decision
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.fault_tolerance import attempts as leases
from trainer.models.encoder import PatchEncoder
from trainer.models.mask_utils import draw_mask, patchify
from trainer.training.pretraining import build_model
from trainer.weights import export as formats
from trainer.weights.load import fitting_recipe, read_init
from trainer.weights.onnx_graph import reference_view, scaled_and_cut

pytestmark = pytest.mark.filterwarnings("ignore")  # the other libraries' own

NAME = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"model": NAME, "image_size": 32, "patch_size": 8, "encoder_depth": 2}
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PIXELS = (IMAGES.float() / 255 - MEAN) / STD


def export(source: Path | str, to: str, output: Path, **flags: str) -> Path:
    assert call(main, CLI, argv_of({"source": str(source), "format": to, "output": str(output)} | flags)) == 0
    return output


def code_of(folder: Path) -> str:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    return code[1]


def run_card(folder: Path, photo: Path) -> dict[str, Any]:
    """Run the README's own code inside its folder; returns what it has found."""
    known: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["score.py", str(photo)])
        try:
            exec(code_of(folder), known)
        finally:
            torch.set_grad_enabled(True)
    return known


def follow_the_card(folder: Path, image: torch.Tensor | None = None) -> dict[str, Any]:
    """Run it on a photograph of exactly the size that the model takes."""
    with tempfile.TemporaryDirectory() as place:
        photo = Path(place, "photo.png")
        Image.fromarray((IMAGES[0] if image is None else image).permute(1, 2, 0).numpy()).save(photo)
        return run_card(folder, photo)


def scores_on_the_card(folder: Path) -> torch.Tensor:
    return torch.tensor([follow_the_card(folder, image)["score"] for image in IMAGES])


def on_the_card(folder: Path, title: str) -> dict[str, Any]:
    found = re.search(rf"## {title}\n\n```json\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def encoder_of(source: Path) -> PatchEncoder:
    init = read_init(str(source), pretrained=False)
    assert init is not None
    encoder = PatchEncoder(NAME, image_size=32, patch_size=8, depth=2).eval()
    encoder.load_weights(init.weights)
    return encoder


def features(encoder: PatchEncoder, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    with torch.no_grad():
        return encoder(patchify(pixels, 8))


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # also biases and norms, which start at 0 and 1
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def published(**changes: Any) -> dict[str, torch.Tensor]:
    """A masked autoencoder by the names and in the form of facebookresearch/mae."""
    mae = build_model(PretrainRecipe(**(SHAPE | {"decoder_width": 32, "decoder_depth": 2} | changes)))
    shake(mae)
    state = {name.removeprefix("encoder.vit."): value for name, value in mae.state_dict().items()}
    if "decoder_pos_embed" in state:
        state["decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["decoder_pos_embed"]], dim=1)
    return state


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "mae.pth"
    torch.save({"model": published(), "args": Namespace(norm_pix_loss=False, mask_ratio=0.7)}, path)
    return path


def detector(folder: Path, init: Path, *, decision: Decision = UNCALIBRATED, data: str = "", **changes: Any) -> Path:
    """A saved detector, as finetune.py leaves it, after a few steps."""
    recipe = DetectorRecipe(**(SHAPE | changes))
    model, sha256 = build_detector(recipe, read_init(str(init), pretrained=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    torch.manual_seed(0)  # of the adapters' dropout
    for _ in range(3):
        model.train()(IMAGES, torch.tensor([0, 1, 1]), torch.zeros(3, model.num_draws)).backward()
        optimizer.step()
    description = {
        "recipe": to_dict(recipe),
        "preprocessing": preprocessing_of(recipe),
        "init": {"source": str(init), "path": str(init), "pretrained": False, "sha256": sha256},
        "selection": {"data": "", "figures": {"d_eer": 0.25}},
        "data": data,
    }
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    seen, lease = Fingerprints(*(np.arange(3, dtype=np.uint64),) * 2), leases.acquire(folder, num_ranks=1)
    save_detector(folder / "detector", description, weights, decision, {"train": seen}, lease=lease)
    return folder


def logits(folder: Path) -> torch.Tensor:
    saved = load_detector(folder)
    with torch.no_grad():
        found: torch.Tensor = rebuild(saved, recipe_of(saved), name="x", init=None)(IMAGES, want="logits")
    return found


# ---------------------------------------------------------------------------------------------- out, and back in


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
@pytest.mark.versions
def test_a_run_at_zero_3_on_two_ranks_goes_out_and_comes_back_bitwise(shards: Path, tmp_path: Path) -> None:
    config = json.loads((ROOT / "ds_configs" / "cpu_fp32.json").read_text())
    config["zero_optimization"] = {"stage": 3}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    run, data = tmp_path / "run", f"{shards}/*.tar"
    flags = TINY | {"data": data, "val_data": data, "epochs": "1", "num_workers": "0", "output_dir": str(run)}
    done = launch(flags | {"ds_config": str(tmp_path / "zero3.json")}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    init = read_init(str(run), pretrained=False)
    assert init is not None

    plain = export(run, "timm", tmp_path / "timm", licence="CC-BY-4.0")
    torch.testing.assert_close(follow_the_card(plain)["tokens"], features(encoder_of(run))[:1], rtol=1e-4, atol=1e-5)
    assert (plain / "README.md").read_text().startswith('---\nlicense: "CC-BY-4.0"\nlibrary_name: timm\n---\n')
    assert on_the_card(plain, "Recipe") == init.manifest["identity"]["recipe"]
    assert on_the_card(plain, "Data")["fingerprint"] == init.manifest["identity"]["data_fingerprint"]
    assert on_the_card(plain, "Source")["zero_stage"] == 3
    assert on_the_card(plain, "Metrics")["val_loss"] > 0

    hf_model = follow_the_card(export(run, "vitmae", tmp_path / "vitmae"))["model"]
    mae = build_model(PretrainRecipe(**init.manifest["identity"]["recipe"]))
    mae.load_state_dict({f"encoder.vit.{name}": value for name, value in init.weights.items()} | init.decoder)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = mae(IMAGES, *draw_mask(noise, mask_ratio=0.75, grid=(4, 4)))
        assert float(hf_model(PIXELS, noise=noise).loss) == pytest.approx(float(expected), rel=1e-5)

    for folder in (plain, tmp_path / "vitmae"):
        back = read_init(str(folder), pretrained=False)
        assert back is not None
        assert back.weights.keys() == init.weights.keys()
        assert all(torch.equal(value, init.weights[name]) for name, value in back.weights.items())
    assert back.decoder.keys() == init.decoder.keys()
    padded = init.decoder | {"decoder_pos_embed": back.decoder["decoder_pos_embed"]}
    assert all(torch.equal(value, padded[name]) for name, value in back.decoder.items())
    assert torch.equal(back.decoder["decoder_pos_embed"][:, 1:], init.decoder["decoder_pos_embed"])
    newest = Path(init.description)
    with next((newest / "state").glob("*_model_states.pt")).open("r+b") as file:
        file.write(b"?")
    with pytest.raises(CheckpointError, match="is altered or cut"):
        export(newest, "timm", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    assert (back.recipe["mask_ratio"], back.recipe["norm_pix_loss"], back.recipe["decoder_heads"]) == (0.75, False, 4)


@pytest.mark.parametrize("layout", ["saved", "modules", "encoder alone"])
@pytest.mark.versions
def test_every_layout_of_transformers_is_read_with_equal_features(tmp_path: Path, layout: str) -> None:
    hf_model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=32,
            patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
            decoder_intermediate_size=128, layer_norm_eps=1e-6, mask_ratio=0.0,
        )
    ).eval()  # fmt: skip
    shake(hf_model)
    if layout == "modules":
        hf_model.config.save_pretrained(tmp_path)
        save_file({name: v.contiguous() for name, v in hf_model.state_dict().items()}, tmp_path / "model.safetensors")
    else:
        (hf_model if layout == "saved" else hf_model.vit).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hf_model.vit(PIXELS, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(features(encoder_of(tmp_path)), expected, rtol=1e-4, atol=1e-5)
    init = read_init(str(tmp_path), pretrained=False)
    assert init is not None
    assert len(init.decoder) == (0 if layout == "encoder alone" else 32)


def test_an_official_file_becomes_transformers_with_the_settings_that_it_tells(official: Path, tmp_path: Path) -> None:
    folder = export(official, "vitmae", tmp_path / "out", model=NAME)
    hf_model = follow_the_card(folder)["model"]
    assert (hf_model.config.norm_pix_loss, hf_model.config.decoder_num_attention_heads) == (False, 16)
    assert int(16 * (1 - hf_model.config.mask_ratio)) == round(
        16 * (1 - 0.7)
    )  # transformers truncates, the trainer rounds
    assert on_the_card(folder, "Recipe")["assumed_as_published"] == {"decoder_heads": 16}
    state = published()
    for name, value in load_file(export(folder, "timm", tmp_path / "timm", model=NAME) / "model.safetensors").items():
        assert torch.equal(value, state[name])


def finetuned(path: Path) -> dict[str, torch.Tensor]:
    """A file as the published fine-tuning leaves it: the last norm stands behind the pooling."""
    state = {name: value for name, value in published().items() if not name.startswith(("decoder_", "mask_token"))}
    state |= {f"fc_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    torch.save({"model": state | {"head.weight": torch.ones(9, 192)}}, path)
    return state


def test_an_official_fine_tuned_file_keeps_its_norm_behind_the_pooling(tmp_path: Path) -> None:
    state = finetuned(tmp_path / "finetuned.pth")
    folder = export(tmp_path / "finetuned.pth", "timm", tmp_path / "out", model=NAME)
    assert torch.equal(load_file(folder / "model.safetensors")["fc_norm.weight"], state["fc_norm.weight"])
    assert "fc_norm" in on_the_card(folder, "Source")["note"]
    known = follow_the_card(folder)
    mean = known["tokens"][:, 1:].mean(dim=1)  # what the published forward does: blocks, mean, norm
    expected = torch.nn.functional.layer_norm(mean, (192,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(known["model"](known["pixels"]), expected)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_detector_on_a_fine_tuned_file_pools_as_published_and_so_do_its_exports(
    tmp_path: Path, use_lora: bool
) -> None:
    state = finetuned(tmp_path / "finetuned.pth")
    init = read_init(str(tmp_path / "finetuned.pth"), pretrained=False)
    assert init is not None
    with pytest.raises(ConfigError, match="set --pooling avg_fc_norm"):
        build_detector(DetectorRecipe(**SHAPE), init)
    recipe = fitting_recipe(init, DetectorRecipe(model=NAME), {"model"})
    assert (recipe.pooling, recipe.patch_size, recipe.encoder_depth, recipe.image_size) == ("avg_fc_norm", 8, 2, 32)
    model, _ = build_detector(recipe, init)
    vit = timm.create_model(NAME, img_size=32, patch_size=8, depth=2, num_classes=2, global_pool="avg").eval()
    vit.load_state_dict(state | {f"head.{name}": value for name, value in model.head.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES, want="logits"), vit(PIXELS), rtol=1e-4, atol=1e-5)

    run = detector(tmp_path / "run", tmp_path / "finetuned.pth", pooling="avg_fc_norm", use_lora=use_lora)
    folder = export(run, "merged", tmp_path / "merged")
    expected = logits(run).softmax(dim=1)[:, 1]
    torch.testing.assert_close(scores_on_the_card(folder), expected, rtol=1e-4, atol=1e-5)


def test_pooling_behind_the_norm_starts_from_pretrained_weights_with_a_fresh_norm(official: Path) -> None:
    model, _ = build_detector(
        DetectorRecipe(**SHAPE, pooling="avg_fc_norm"), read_init(str(official), pretrained=False)
    )
    assert model.encoder.vit.fc_norm.weight.eq(1).all()
    assert isinstance(model.encoder.vit.norm, torch.nn.Identity)


def test_a_timm_model_is_exported_by_name_with_its_own_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    asked = []

    def download(name: str) -> tuple[dict[str, torch.Tensor], tuple[float, ...], tuple[float, ...]]:
        asked.append(name)
        return vit.state_dict(), (0.5, 0.5, 0.5), (0.25, 0.5, 0.5)

    monkeypatch.setattr("trainer.weights.load.pretrained_weights", download)
    monkeypatch.setattr("trainer.weights.hub._answers", lambda: True)
    folder = export("test_vit", "timm", tmp_path / "out", pretrained="true")
    assert asked == ["test_vit"]
    assert on_the_card(folder, "Preprocessing")["std"] == [0.25, 0.5, 0.5]
    assert torch.equal(load_file(folder / "model.safetensors")["pos_embed"], vit.pos_embed)


def test_another_size_is_timms_own_dynamic_size_square_or_not(official: Path, tmp_path: Path) -> None:
    export(official, "timm", tmp_path / "square", model=NAME)
    folder = export(official, "timm", tmp_path / "wide", model=NAME, image_size="24x48")
    image = torch.randint(0, 256, (3, 24, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pixels = ((image / 255 - MEAN) / STD)[None]
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0, "dynamic_img_size": True}
    dynamic = timm.create_model(NAME, **options, checkpoint_path=str(tmp_path / "square" / "model.safetensors")).eval()
    with torch.no_grad():
        expected = dynamic.forward_features(pixels)
    torch.testing.assert_close(follow_the_card(folder, image)["tokens"], expected, rtol=1e-4, atol=1e-5)
    assert on_the_card(folder, "Source")["trained_at"] == "32x32"
    with pytest.raises(ConfigError, match="3 x 6 patches"):
        read_init(str(folder), pretrained=False)


# ---------------------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize("changes", [{"pooling": "avg"}, {"pooling": "cls", "lora_target_modules": ("query", "fc1")}])
def test_a_lora_detector_goes_to_peft_and_merged_to_timm_with_equal_logits(
    official: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = detector(tmp_path / "run", official, use_lora=True, **changes)
    expected = logits(run).softmax(dim=1)[:, 1]
    base = export(official, "timm", tmp_path / "base", model=NAME)
    for folder in (export(run, "adapter", tmp_path / "adapter"), export(run, "merged", tmp_path / "merged")):
        torch.testing.assert_close(scores_on_the_card(folder), expected, rtol=1e-4, atol=1e-5)
        assert on_the_card(folder, "Metrics")["calibration"] == {"slope": 1.0, "offset": 0.0}
        told = load_detector(run).description
        assert on_the_card(folder, "Data")["prints_of_train"] == told["files"]["train.npz"]["sha256"]
        assert len(on_the_card(folder, "Preprocessing")["fingerprint"]) == 64
    tokens = follow_the_card(export(run, "timm", tmp_path / "timm"))["tokens"]
    saved = load_detector(run)
    adapted = rebuild(saved, recipe_of(saved), name="x", init=None).encoder
    torch.testing.assert_close(tokens, features(adapted)[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens, features(encoder_of(base))[:1], atol=1e-2), "the adapters are not in it"
    with pytest.raises(ConfigError, match="export it first"):
        read_init(str(run), pretrained=False)


def test_a_fully_trained_detector_is_an_init(official: Path, tmp_path: Path) -> None:
    run = detector(tmp_path / "run", official)
    weights = load_detector(run).weights
    init = read_init(str(run), pretrained=False)
    assert init is not None
    assert all(torch.equal(value, weights[f"encoder.vit.{name}"]) for name, value in init.weights.items())
    with pytest.raises(ConfigError, match="trained without LoRA"):
        export(run, "adapter", tmp_path / "out")


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24), (224, 224)])
def test_the_onnx_graph_scales_and_cuts_to_the_pixels_of_evaluation(height: int, width: int, native: bool) -> None:
    """The oracle is torch's own kernel; for square views, what evaluation sees."""
    generator = np.random.default_rng(0)
    sizes = [(height, width), (9, 8), (8, 61), (width, height), (33, 32), (32, 65), (447, 448), (448, 449), (97, 700)]
    sizes += generator.integers(8, 500, (40, 2)).tolist()
    for number, (rows, columns) in enumerate(sizes):
        photo_HWC = generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        if number % 2:
            photo_HWC = (photo_HWC > 127).astype(np.uint8) * np.uint8(255)  # ringing beyond black and white
        found = scaled_and_cut(torch.from_numpy(photo_HWC)[None], height, width, native=native)[0].permute(1, 2, 0)
        expected = reference_view(photo_HWC, height, width, native=native)
        np.testing.assert_array_equal(found.numpy(), expected, err_msg=f"{rows}x{columns}")
        if height == width:
            view = CenterView(size=height, pixels=Pixels(resize="native" if native else "antialias"))
            np.testing.assert_array_equal(found.numpy(), view.of_pixels(photo_HWC)[0])


@pytest.mark.slow
@pytest.mark.versions
def test_onnx_gives_the_score_of_any_head_from_uint8_images_in_batches_of_any_size(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"use_projection_head": True, "use_margin_loss": True, "use_improved_classifier": True}
    run = detector(tmp_path / "run", official, use_lora=True, **head)
    session = follow_the_card(export(run, "onnx", tmp_path / "onnx"))["session"]
    expected = logits(run)
    images_BHWC = IMAGES.permute(0, 2, 3, 1).numpy()
    for number in (1, 2, 3):
        p_morph, found = session.run(["p_morph", "logits"], {"images": images_BHWC[:number]})
        torch.testing.assert_close(torch.from_numpy(found), expected[:number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(p_morph), expected[:number].softmax(1)[:, 1], rtol=1e-4, atol=1e-5)
    for to in ("adapter", "merged"):
        with pytest.raises(ConfigError, match="the head is a Sequential, and timm has one linear layer"):
            export(run, to, tmp_path / to)

    monkeypatch.setattr(formats, "_MAX_ONNX_FILE_BYTES", 0)  # as if this were a ViT-H
    folder = export(official, "onnx", tmp_path / "tokens", model=NAME, image_size="16x24")
    assert (folder / "model.onnx.data").exists()
    tokens = follow_the_card(folder, IMAGES[0, :, :16, :24])["session"]
    found = tokens.run(["tokens"], {"images": images_BHWC[:, :16, :24]})[0]
    wide = encoder_of(official)
    wide.resize(16, 24)
    torch.testing.assert_close(torch.from_numpy(found), features(wide, PIXELS[:, :, :16, :24]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_residual_branch_goes_out_as_onnx_and_nowhere_else(official: Path, tmp_path: Path) -> None:
    run = detector(tmp_path / "run", official, use_lora=True, use_residual_branch=True, view_resize="native")
    session = follow_the_card(export(run, "onnx", tmp_path / "onnx"))["session"]
    found = session.run(["logits"], {"images": IMAGES.permute(0, 2, 3, 1).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(run), rtol=1e-4, atol=1e-4)
    for to in ("adapter", "merged"):
        with pytest.raises(ConfigError, match="has a residual branch, which timm has not: export it as onnx"):
            export(run, to, tmp_path / to)


# ---------------------------------------------------------------------------------------------- the card


def photographs(folder: Path) -> list[Path]:
    """Larger and smaller than the model's images, upright, wide, turned by EXIF and grey."""
    generator = np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate([(90, 71), (33, 120), (20, 25), (64, 64)]):
        blocks = generator.integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
        image = Image.fromarray(blocks.repeat(5, axis=0).repeat(5, axis=1)[:height, :width])
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 0 else 1
        made.append(folder / f"photo{number}.{'png' if number == 2 else 'jpg'}")
        (image.convert("L") if number == 3 else image).save(made[-1], exif=exif)
    return made


def judged(run: Path, photos: list[Path]) -> list[float]:
    """The calibrated scores of evaluation."""
    saved = load_detector(run)
    recipe = recipe_of(saved)
    model = rebuild(saved, recipe, name="x", init=None)
    images = np.empty((len(photos), 32, 32, 3), np.uint8)
    for photo, image in zip(photos, images, strict=True):
        view = CenterView(size=recipe.image_size, pixels=pixels_of(recipe))
        view(Photo(photo.read_bytes()), np.empty((1, 0), np.float32), image[None])
    with torch.no_grad():
        found = model(torch.from_numpy(images).permute(0, 3, 1, 2), want="logits").double().numpy()
    return saved.decision.probability(found[:, 1] - found[:, 0]).tolist()


BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trainer", "launch", "tools", PACKAGES):
            raise ImportError(f"the card does not name {name}")
sys.meta_path.insert(0, Refuse())
"""
HEAVY = '"torch", "timm", "cv2", "scipy"'


@pytest.mark.parametrize(
    ("to", "resize"),
    [
        ("merged", "antialias"),
        pytest.param("merged", "former", marks=pytest.mark.slow),
        pytest.param("adapter", "antialias", marks=pytest.mark.slow),
        pytest.param("onnx", "antialias", marks=pytest.mark.slow),
        pytest.param("onnx", "former", marks=pytest.mark.slow),
    ],
)
def test_the_code_on_a_card_alone_gives_the_score_of_evaluation(
    official: Path, tmp_path: Path, to: str, resize: str
) -> None:
    photos, kind = photographs(tmp_path), {"use_lora": True, "view_resize": resize}
    raw = logit(judged(detector(tmp_path / "raw", official, **kind), photos))
    slope = 3 / (raw.max() - raw.min())
    decision = Decision(Calibration(slope, -slope * float(raw.mean())), {"d_eer": 0.45, "macer_0.05": float("inf")})
    run = detector(tmp_path / "run", official, **kind, decision=decision)
    folder, expected = export(run, to, tmp_path / to), judged(run, photos)
    assert max(expected) > 0.6
    assert min(expected) < 0.4
    code, everything_inside = code_of(folder), (to, resize) == ("onnx", "antialias")
    assert len(code.splitlines()) < (11 if everything_inside else 25)
    rounding = 1.2e-7 * slope * float(np.abs(raw).max())  # of float32, inside the sigmoid
    tolerance, blocked = (max(1e-5, rounding), HEAVY) if everything_inside else (1e-4, "")
    if everything_inside:
        assert re.sub(r">= [0-9.]+", ">= 0.5", code) in (ROOT / "tools" / "README.md").read_text()
    for photo, score in zip(photos, expected, strict=True):
        assert run_card(folder, photo)["score"] == pytest.approx(score, abs=tolerance)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.replace("PACKAGES", blocked) + code, str(photos[0])],
        cwd=folder,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    value, decided = done.stdout.split()
    assert float(value) == pytest.approx(expected[0], abs=1e-4)
    assert decided == ("morph" if expected[0] >= 0.45 else "bonafide")
    card = (folder / "README.md").read_text()
    assert "| macer_0.05 | inf |" in card
    assert ">= the threshold" in card


def test_a_card_names_no_place_of_the_machine_that_wrote_it_and_the_sha256_of_every_file(
    official: Path, tmp_path: Path
) -> None:
    run = detector(tmp_path / "run", official, use_lora=True, data=f"{tmp_path}/a/*.tar@0.5,{tmp_path}/b c/*.tar@0.5")
    before = os.umask(0o022)
    try:
        folders = [export(run, to, tmp_path / to) for to in ("merged", "adapter", "timm")]
        folders.append(export(official, "vitmae", tmp_path / "vitmae", model=NAME))
    finally:
        os.umask(before)
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert str(tmp_path) not in card
        assert not re.search(r"\b(FOLDER|BASE)\b", card)
        listed = on_the_card(folder, "sha256 of the files")
        assert listed.keys() == {path.name for path in folder.iterdir()} - {"README.md"}
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
            assert path.name == "README.md" or listed[path.name] == sha256(path.read_bytes()).hexdigest()
        view = json.loads((folder / "preprocessor_config.json").read_text())
        assert (view["image_mean"], view["crop_size"]) == ([0.485, 0.456, 0.406], {"height": 32, "width": 32})


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "/nowhere"}, "no such file or folder"),
        ({"output": "TMP"}, "exists already: name a new folder"),
        ({"format": "coreml"}, "must be one of timm, vitmae, adapter, merged, onnx"),
        ({"format": "merged"}, "the source is no detector"),
        ({"image_size": "30"}, "image_size is 30x30, but both must be divisible by the patch size 8"),
        ({"image_size": "big"}, "must be N or HEIGHTxWIDTH"),
        ({"image_size": "64", "format": "vitmae"}, "a decoder's position embedding is not resized"),
        ({"model": ""}, "(width 192) does not tell it: pass --model NAME"),
        ({"model": "vit_small_patch16_224"}, "the weights have"),
        ({"source": "CODE"}, "cannot be loaded safely"),
        ({"source": "CUT"}, "is damaged"),
        ({"source": "ENCODER", "format": "vitmae"}, "the source has no decoder"),
        ({"source": "SHARED", "format": "vitmae"}, "use_separate_pos_embed false"),
        (
            {"source": "REGISTERS", "format": "vitmae", "model": "vit_small_patch14_reg4_dinov2"},
            "has 5 tokens there, 4 of them registers",
        ),
        ({"source": "PLACED", "format": "vitmae"}, "the class token has a position in the decoder"),
        ({"source": "HEADS"}, "the weights have 6 attention heads and the model 3"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_message_and_leaves_nothing(
    official: Path, tmp_path: Path, flags: dict[str, str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("the payload ran",)

    def saved(name: str, state: Any) -> str:
        torch.save({"model": state}, tmp_path / name)
        return str(tmp_path / name)

    def heads() -> str:
        folder = export(official, "vitmae", tmp_path / "heads", model=NAME)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
        return str(folder)

    def cut() -> str:
        save_file(published(), tmp_path / "cut.safetensors")
        data = (tmp_path / "cut.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
        return str(tmp_path / "cut.safetensors")

    made = {
        "TMP": lambda: str(tmp_path),
        "CODE": lambda: saved("code.pth", Code()),
        "CUT": cut,
        "ENCODER": lambda: saved("encoder.pth", {n: v for n, v in published().items() if not n.startswith("decoder_")}),
        "SHARED": lambda: saved("shared.pth", published(use_separate_pos_embed=False)),
        "REGISTERS": lambda: saved("reg.pth", published(model="vit_small_patch14_reg4_dinov2", patch_size=8)),
        "PLACED": lambda: saved("placed.pth", published() | {"decoder_pos_embed": torch.ones(1, 17, 32)}),
        "HEADS": heads,
    }
    chosen = {"source": str(official), "output": str(tmp_path / "out"), "model": NAME} | flags
    chosen = {name: made[value]() if value in made else value for name, value in chosen.items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TrainerError, match=re.escape(message)):
        call(main, CLI, argv_of(chosen))
    assert sorted(tmp_path.iterdir()) == before
    assert "the payload ran" not in capfd.readouterr().out


def test_a_mistake_ends_the_command_with_code_2_and_one_message(tmp_path: Path) -> None:
    words = argv_of({"source": str(tmp_path / "gone"), "output": str(tmp_path / "out")})
    started = forks().start(ROOT / "tools" / "export.py", words, tmp_path / "log")
    assert started.wait() == 2
    assert "error: source is" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("to", ["timm", "vitmae", "merged", "adapter"])
def test_what_the_other_library_computes_otherwise_is_not_written(
    official: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = detector(tmp_path / "run", official, use_lora=True) if to in ("merged", "adapter") else official
    before = sorted(tmp_path.iterdir())
    written = formats.save_file

    def falsify(tensors: dict[str, torch.Tensor], *rest: Any, **named: Any) -> None:
        name = max(name for name in tensors if re.search(r"fc2.weight|layer.1.output.dense.weight|lora_B", name))
        written(tensors | {name: tensors[name] * 1.01}, *rest, **named)

    def cut(tensors: dict[str, torch.Tensor], *rest: Any, **named: Any) -> None:
        written(dict(list(tensors.items())[:-1]), *rest, **named)

    place = "trainer.models.lora.save_file" if to == "adapter" else "trainer.weights.export.save_file"
    for wrong in (falsify, cut):
        monkeypatch.setattr(place, wrong)
        with pytest.raises(CheckpointError, match="export"):
            export(source, to, tmp_path / "out", model=NAME)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("vitmae", "transformers")])
def test_a_missing_library_is_named_before_any_work(to: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'face-mae-trainer\[export\]'"):
        call(main, CLI, argv_of({"source": "/nowhere", "format": to, "output": "/nowhere/else"}))
