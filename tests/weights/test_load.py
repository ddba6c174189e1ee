"""Pre-training from weights: those of another size, of other libraries, and what does not fit."""

import dataclasses
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.helpers.runs import TINY, launch, metrics
from trainer.config.settings import DetectorRecipe, PretrainRecipe, PretrainRuntime
from trainer.detection.build import build_detector
from trainer.errors import ConfigError
from trainer.models.mae import MaskedAutoencoder
from trainer.training.pretraining import build_model, load_init_weights
from trainer.weights.load import find_again, fitting_recipe, place_of, read_init

SHAPE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "patch_size": 8,
    "encoder_depth": 2,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
}


def started(init: Path, *, encoder_only: bool = False, **changes: Any) -> tuple[MaskedAutoencoder, str]:
    recipe = PretrainRecipe(**(SHAPE | {"image_size": 32} | changes))
    runtime = PretrainRuntime(init=str(init), init_encoder_only=encoder_only)
    model = build_model(recipe)
    return model, load_init_weights(model, recipe, runtime)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of facebookresearch/mae, where the decoder has a place for the class token."""
    state = build_model(PretrainRecipe(**SHAPE, image_size=32, seed=5)).state_dict()
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["decoder_pos_embed"]], dim=1)
    path = tmp_path_factory.mktemp("official") / "mae.pth"
    named = {name.removeprefix("encoder.vit."): value for name, value in state.items()}
    torch.save({"model": named, "args": Namespace(norm_pix_loss=True, mask_ratio=0.75)}, path)
    return path


def test_a_published_file_gives_every_weight_and_an_identity(official: Path) -> None:
    model, sha256 = started(official, seed=9)
    wanted = build_model(PretrainRecipe(**SHAPE, image_size=32, seed=5))
    for (name, value), expected in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert len(sha256) == 64
    assert sha256 != started(official, encoder_only=True)[1]


def test_the_encoder_alone_leaves_the_decoder_as_the_seed_draws_it(official: Path) -> None:
    model, _ = started(official, encoder_only=True, seed=9, decoder_type="cross", decoder_depth=3)
    fresh = build_model(PretrainRecipe(**SHAPE | {"decoder_type": "cross", "decoder_depth": 3}, image_size=32, seed=9))
    whole, drawn = model.state_dict(), fresh.state_dict()
    assert all(torch.equal(whole[name], drawn[name]) for name in whole if not name.startswith("encoder."))
    assert not torch.equal(whole["encoder.vit.blocks.0.attn.qkv.weight"], drawn["encoder.vit.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depth": 3}, "decoder_blocks.2"),
        ({"decoder_width": 64}, "the decoder's weights are of another one"),
        ({"decoder_type": "cross"}, "add --init_encoder_only true"),
        ({"use_separate_pos_embed": False}, "use_separate_pos_embed is False, but init was trained with True"),
        ({"encoder_depth": 3}, "encoder_depth is 3, but --init was trained with 2: pass --encoder_depth 2"),
    ],
)
def test_another_model_is_refused(official: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        started(official, **changes)


def test_weights_without_a_decoder_must_be_meant(official: Path, tmp_path: Path) -> None:
    init = read_init(str(official), pretrained=False)
    assert init is not None
    torch.save(init.weights, tmp_path / "encoder.pth")
    with pytest.raises(ConfigError, match="which has no decoder: add --init_encoder_only true"):
        started(tmp_path / "encoder.pth")
    started(tmp_path / "encoder.pth", encoder_only=True)


def test_what_an_official_file_tells_of_its_training_must_be_what_the_recipe_says(tmp_path: Path) -> None:
    def with_args(name: str, **args: Any) -> Path:
        state = build_model(PretrainRecipe(**SHAPE, image_size=32)).state_dict()
        named = {name.removeprefix("encoder.vit."): value for name, value in state.items()}
        torch.save({"model": named, "args": Namespace(**args)}, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ConfigError, match="norm_pix_loss is True, but --init was trained with False: pass --norm_pix"):
        started(with_args("plain.pth", norm_pix_loss=False))
    started(with_args("plain.pth", norm_pix_loss=False), norm_pix_loss=False)
    started(with_args("plain.pth", norm_pix_loss=False), encoder_only=True)
    with pytest.raises(ConfigError, match="decoder_heads is 4, but --init was trained with 2"):
        started(with_args("heads.pth", decoder_num_heads=2))


def test_official_files_are_known_by_their_names(official: Path, tmp_path: Path) -> None:
    for name, normalised in (("visualize_vit_large_ganloss", False), ("pretrain_vit_large_full", True)):
        path = tmp_path / f"mae_{name}.pth"
        torch.save({"model": torch.load(official, weights_only=False)["model"]}, path)
        init = read_init(str(path), pretrained=False)
        assert init is not None
        assert (init.recipe["norm_pix_loss"], init.recipe["decoder_heads"]) == (normalised, 16)
        assert init.recipe["model"] == "vit_large_patch16_224"


def test_what_a_file_with_a_decoder_does_not_tell_is_said_aloud(
    tmp_path: Path, official: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(torch.load(official, weights_only=False)["model"], tmp_path / "own.pth")
    started(tmp_path / "own.pth")
    assert "does not record decoder_heads and norm_pix_loss" in caplog.text
    assert "decoder_heads 4 and norm_pix_loss True" in caplog.text


def test_weights_with_a_part_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0}
    dino = timm.create_model("vit_small_patch14_dinov2", **options)  # with layer scale
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    init = read_init(str(tmp_path / "dino.pth"), pretrained=False)
    recipe = DetectorRecipe(model="vit_small_patch16_224", image_size=32, patch_size=8, encoder_depth=2)
    with pytest.raises(ConfigError, match=r"have blocks\.0\.ls1\.gamma, which has no place in this model"):
        build_detector(recipe, init)
    build_detector(dataclasses.replace(recipe, model="vit_small_patch14_dinov2"), init)


def test_a_detector_takes_shape_and_normalisation_from_its_weights_but_for_what_is_given(tmp_path: Path) -> None:
    encoder = timm.create_model("vit_large_patch16_224", img_size=48, patch_size=8, depth=2, num_classes=0)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    told = {"architecture": "vit_large_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    init = read_init(str(tmp_path), pretrained=False)
    recipe = fitting_recipe(init, DetectorRecipe(), ())
    found = (recipe.model, recipe.image_size, recipe.patch_size, recipe.encoder_depth, recipe.normalisation)
    assert found == ("vit_large_patch16_224", 48, 8, 2, "half")
    assert fitting_recipe(init, recipe, ()) == recipe
    assert fitting_recipe(init, DetectorRecipe(image_size=96), {"image_size"}).image_size == 96
    assert fitting_recipe(init, DetectorRecipe(image_size=96), ()).image_size == recipe.image_size != 96
    cropped = DetectorRecipe(image_size=96, view_resize="native")  # a crop of the photographs, whatever the weights saw
    assert fitting_recipe(init, cropped, ()) == dataclasses.replace(recipe, image_size=96, view_resize="native")
    build_detector(recipe, init)
    wrong = DetectorRecipe(model="vit_base_patch16_224", patch_size=16, encoder_depth=3)
    with pytest.raises(ConfigError) as error:
        build_detector(fitting_recipe(init, wrong, {"model", "patch_size", "encoder_depth", "normalisation"}), init)
    for setting in ("model", "patch_size", "encoder_depth", "normalisation"):
        assert f"{setting} is" in str(error.value)
        assert f"pass --{setting}" in str(error.value)


def test_a_model_of_the_same_shape_keeps_the_recipe_that_older_runs_recorded(tmp_path: Path) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(encoder.state_dict(), tmp_path / "vit.safetensors")
    recipe = DetectorRecipe(model="vit_tiny_patch16_224")
    assert fitting_recipe(read_init(str(tmp_path / "vit.safetensors"), pretrained=False), recipe, ()) == recipe


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_name_on_a_hub_without_network_is_refused_within_seconds(
    pretrained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    name = "vit_tiny_patch16_224" if pretrained else "facebook/vit-mae-base"
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot be reached .*: download .*model\.safetensors"):
        read_init(name, pretrained=pretrained)
    assert time.monotonic() - start < 8
    with pytest.raises(ConfigError, match="timm knows no weights 'nosuch'"):
        read_init("vit_tiny_patch16_224.nosuch", pretrained=True)


def test_a_model_of_transformers_in_the_hubs_cache_is_taken_without_network(
    tmp_path: Path, official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the cache is huggingface_hub's: a reference names the snapshot."""
    place = tmp_path / "models--someone--vit-mae"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    torch.save(torch.load(official, weights_only=False)["model"], place / "snapshots" / "abc" / "pytorch_model.bin")
    (place / "snapshots" / "abc" / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 8}))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    init = read_init("someone/vit-mae", pretrained=False)
    assert init is not None
    assert init.recipe["decoder_heads"] == 8


def test_weights_are_found_again_from_any_working_directory(
    tmp_path: Path, official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old" / "runs" / "x" / "detector").mkdir(parents=True)
    (tmp_path / "old" / "mae.pth").write_bytes(official.read_bytes())
    monkeypatch.chdir(tmp_path / "old")
    place = place_of("mae.pth", Path("runs/x/detector"))
    assert place == {"path": str(tmp_path / "old" / "mae.pth"), "relative": "../../../mae.pth"}
    monkeypatch.chdir("/")
    folder = tmp_path / "old" / "runs" / "x" / "detector"
    for known in (place, {"path": "mae.pth"}, {"path": "old/mae.pth"}):  # the last two are of older detectors
        found = find_again(known | {"pretrained": False}, folder, name="x")
        assert Path(found).read_bytes() == official.read_bytes()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new" / "runs" / "x" / "detector"
    assert Path(find_again(place | {"pretrained": False}, moved, name="x")).is_file()
    (tmp_path / "new" / "mae.pth").unlink()
    with pytest.raises(ConfigError, match=r"needs the encoder weights .*mae\.pth.* pass --init"):
        find_again(place | {"pretrained": False}, moved, name="x")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_goes_on_at_a_higher_resolution_and_resumes_only_with_its_init(shards: Path, tmp_path: Path) -> None:
    data = f"{shards}/*.tar"
    flags = TINY | {"data": data, "val_data": data, "val_every": "4", "num_workers": "0"}
    low = {"output_dir": str(tmp_path / "low"), "image_size": "32", "epochs": "2"}
    assert launch(flags | low).returncode == 0
    high = flags | {"output_dir": str(tmp_path / "high"), "image_size": "48", "init": str(tmp_path / "low")}
    assert launch(high | {"stop_at_step": "4"}).returncode == 0
    cold = flags | {"output_dir": str(tmp_path / "cold"), "image_size": "48", "stop_at_step": "4"}
    assert launch(cold).returncode == 0
    warm_error, cold_error = (
        next(row["val_loss"] for row in metrics(tmp_path / name) if "val_loss" in row) for name in ("high", "cold")
    )
    assert warm_error < cold_error

    manifest = next((tmp_path / "high" / "checkpoints").glob("step-*/manifest.json"))
    assert len(json.loads(manifest.read_text())["identity"]["init"]) == 64
    done = launch({name: value for name, value in high.items() if name != "init"})
    assert done.returncode == 2
    assert "point --init at the weights that this run started from" in done.stderr
    assert launch(high | {"stop_at_step": "6"}).returncode == 0
