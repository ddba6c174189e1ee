"""The recipes of published detectors run as they are typed, on small models and random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.runs import launch, metrics
from tests.helpers.shards import faces
from trainer.config.recipes import DETECTOR_RECIPES
from trainer.detection.build import build_detector, training_view
from trainer.models.parameter_groups import parameter_groups

SMALL = {
    **{"encoder_depth": "1", "image_size": "32", "patch_size": "8", "global_batch": "8", "micro_batch": "8"},
    **{"max_steps": "4", "log_every": "1", "val_every": "2", "num_workers": "0", "num_lanes": "4", "num_threads": "1"},
    **{"progress_bar": "false", "oversubscribe": "true"},
}


def trained(recipe: str, tmp_path: Path, labels: tuple[int, ...]) -> Path:
    faces(tmp_path / "train.tar", range(0, 32), labels=labels)
    faces(tmp_path / "val.tar", range(100, 116))
    flags = {"data": str(tmp_path / "train.tar"), "val_data": str(tmp_path / "val.tar")}
    done = launch({"recipe": recipe} | SMALL | flags | {"output_dir": str(tmp_path / "run")}, script="finetune.py")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert np.isfinite([row["loss"] for row in steps]).all()
    return tmp_path / "run"


@pytest.mark.slow
def test_selfmad_trains_as_typed_on_bona_fides_alone(tmp_path: Path) -> None:
    run = trained("selfmad", tmp_path, labels=(0,))
    assert json.loads((run / "detector" / "detector.json").read_text())["recipe"]["self_morph_share"] == 0.5


@pytest.mark.slow
def test_madation_trains_as_typed_and_adapts_query_and_value_only(tmp_path: Path) -> None:
    run = trained("madation", tmp_path, labels=(0, 1))
    adapter = json.loads((run / "detector" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_rslora"]) == (2, 4, True)
    weights = load_file(run / "detector" / "adapter" / "adapter_model.safetensors")
    [low_to_qkv] = [value for name, value in weights.items() if name.endswith("lora_B.weight")]
    query, key, value = low_to_qkv.chunk(3)
    assert not key.any()
    assert query.any()
    assert value.any()
    assert len({row["lr"] for row in metrics(run) if "loss" in row}) == 1  # constant, as published


def test_selfmad_makes_attacks_of_half_of_the_bona_fides() -> None:
    recipe, _ = DETECTOR_RECIPES["selfmad"]()
    view = training_view(recipe)
    draws_NK = view.draw(np.arange(400))
    attacks = [view.wants_landmarks(0, draws_K) for draws_K in draws_NK]
    assert 160 <= sum(attacks) <= 240  # 200 expected, standard deviation 10
    assert not any(view.wants_landmarks(1, draws_K) for draws_K in draws_NK)


@pytest.mark.slow
def test_madation_has_the_published_number_of_weights_and_both_learning_rates() -> None:
    recipe, _ = DETECTOR_RECIPES["madation"]()
    model, _ = build_detector(recipe, None)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")}
    # 12 blocks of (2 x 768) into (3 x 768 x 2); the rows of the key stay zero.
    assert sum(p.numel() for p in adapters.values()) == 12 * (2 * 768 + 3 * 768 * 2)
    groups = parameter_groups(model, recipe.weight_decay, head_lr_scale=recipe.head_lr_scale)
    rates = {id(p): recipe.peak_learning_rate * group["lr_scale"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in adapters.values()} == {1e-5}
    assert [rates[id(p)] for p in model.head.parameters()] == pytest.approx([1e-4, 1e-4])
