"""Pre-training from weights: those of another size, of other libraries, and what does not fit."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, launch, metrics

from launch.init_weights import read_init
from launch.pretrain import build_model, take_weights
from trainer.config import PretrainRecipe, PretrainRuntime
from trainer.errors import ConfigError
from trainer.models.mae import MaskedAutoencoder

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
    model = build_model(recipe, runtime)
    return model, take_weights(model, recipe, runtime)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of facebookresearch/mae, where the decoder has a place for the class token."""
    state = build_model(PretrainRecipe(**SHAPE, image_size=32, seed=5), PretrainRuntime()).state_dict()
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["decoder_pos_embed"]], dim=1)
    path = tmp_path_factory.mktemp("official") / "mae.pth"
    named = {name.removeprefix("encoder.vit."): value for name, value in state.items()}
    torch.save({"model": named, "args": Namespace(norm_pix_loss=True, mask_ratio=0.75)}, path)
    return path


def test_a_published_file_gives_every_weight_and_an_identity(official: Path) -> None:
    model, sha256 = started(official, seed=9)
    wanted = build_model(PretrainRecipe(**SHAPE, image_size=32, seed=5), PretrainRuntime())
    for (name, ours), theirs in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(sha256) == 64
    assert sha256 != started(official, encoder_only=True)[1]


def test_the_encoder_alone_leaves_the_decoder_as_the_seed_draws_it(official: Path) -> None:
    model, _ = started(official, encoder_only=True, seed=9, decoder_type="cross", decoder_depth=3)
    fresh = build_model(
        PretrainRecipe(**SHAPE | {"decoder_type": "cross", "decoder_depth": 3}, image_size=32, seed=9),
        PretrainRuntime(),
    )
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
        ({"encoder_depth": 3}, "set --model, --patch_size, --encoder_depth"),
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


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_goes_on_at_a_higher_resolution_and_resumes_only_with_its_init(shards: Path, tmp_path: Path) -> None:
    data = f"{shards}/*.tar"
    flags = TINY | {"data": data, "heldout_data": data, "heldout_every": "4", "num_workers": "0"}
    low = {"output_dir": str(tmp_path / "low"), "image_size": "32", "epochs": "2"}
    assert launch(flags | low).returncode == 0
    high = flags | {"output_dir": str(tmp_path / "high"), "image_size": "48", "init": str(tmp_path / "low")}
    assert launch(high | {"stop_at_step": "4"}).returncode == 0
    cold = flags | {"output_dir": str(tmp_path / "cold"), "image_size": "48", "stop_at_step": "4"}
    assert launch(cold).returncode == 0
    warm_error, cold_error = (
        next(row["heldout_loss"] for row in metrics(tmp_path / name) if "heldout_loss" in row)
        for name in ("high", "cold")
    )
    assert warm_error < cold_error

    manifest = next((tmp_path / "high" / "checkpoints").glob("step-*/manifest.json"))
    assert len(json.loads(manifest.read_text())["identity"]["init"]) == 64
    done = launch({name: value for name, value in high.items() if name != "init"})
    assert done.returncode == 2
    assert "point --init at the weights that this run started from" in done.stderr
    assert launch(high | {"stop_at_step": "6"}).returncode == 0
