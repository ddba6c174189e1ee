"""What an older version has written is continued, read or rebuilt; it is never a traceback, and never "remove it"."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import TINY, launch, metrics
from trainer.config import record
from trainer.config.command_line import configure
from trainer.config.recipes import PRETRAINING
from trainer.config.record import LEGACY_VALUES, complete_record, from_dict, keep_legacy_values, to_dict
from trainer.config.settings import DetectorRecipe, PretrainRecipe, PretrainRuntime, Recipe
from trainer.errors import CheckpointError, ConfigError
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.resume import check_run

# The names that releases have written, as they were. Only append new releases; never correct these.
_COMMON_0_1 = {
    *("seed", "model", "image_size", "patch_size", "encoder_depth", "global_batch", "epochs", "warmup_epochs"),
    *("base_learning_rate", "learning_rate", "min_learning_rate", "weight_decay", "beta1", "beta2", "clip_grad_norm"),
    *("spike_threshold", "spike_patience", "on_spike", "crop_scale_min", "crop_scale_max", "flip_probability"),
    *("balance_by", "use_balanced_sampler", "num_lanes", "block_samples", "window_blocks"),
}
PRETRAIN_BEFORE_CROSS = _COMMON_0_1 | {
    *("mask_ratio", "mask_strategy", "mask_block", "use_learned_mask_token", "use_separate_pos_embed"),
    *("fixed_pos_embed", "decoder_width", "decoder_depth", "decoder_heads", "norm_pix_loss", "decode_quality"),
}
PRETRAIN_BEFORE_REPEATS = PRETRAIN_BEFORE_CROSS | {"decoder_type", "predict_share"}
PRETRAIN_0_1 = PRETRAIN_BEFORE_REPEATS | {"aug_repeats"}
DETECTOR_0_1 = _COMMON_0_1 | {
    *("use_learned_mask_token", "use_separate_pos_embed", "normalisation", "freeze_backbone", "use_lora", "lora_r"),
    *("lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora", "layer_decay", "drop_path"),
    *("pooling", "use_projection_head", "proj_dim", "proj_hidden_dim", "use_improved_classifier", "cls_hidden_dim"),
    *("use_margin_loss", "margin", "margin_scale", "class_weights", "label_smoothing", "mixup_alpha", "use_mixstyle"),
    *("mixstyle_p", "mixstyle_alpha", "mixstyle_blocks", "mixstyle_same_label", "use_advanced_aug"),
    *("advanced_aug_magnitude", "advanced_aug_num_ops", "passport_aug", "passport_p", "self_morph_share"),
}
MANIFEST_0_1 = {
    "progress": {
        *("step", "skipped_steps", "skips", "recent_losses", "spiking_since", "num_spikes", "data_changes"),
    },
    "identity": {
        *("recipe", "data_fingerprint", "data_shares", "plan_version", "zero_stage", "precision", "num_ranks", "init"),
    },
}
_PRETRAIN = set(PretrainRecipe.__dataclass_fields__)
RELEASES = [(PretrainRecipe, PRETRAIN_BEFORE_CROSS), (PretrainRecipe, PRETRAIN_0_1), (DetectorRecipe, DETECTOR_0_1)]


@pytest.mark.parametrize(("kind", "release"), RELEASES)
def test_every_recipe_field_that_a_release_lacks_has_a_legacy_value(kind: type[Recipe], release: set[str]) -> None:
    names = {entry.name for entry in dataclasses.fields(kind)}
    assert names - release <= LEGACY_VALUES.keys(), "add the new field to trainer.config.record.LEGACY_VALUES"
    whole = complete_record(dict.fromkeys(release), names)
    assert whole.keys() >= names
    made = from_dict(kind, {name: LEGACY_VALUES[name] for name in names & LEGACY_VALUES.keys()})
    assert to_dict(made).items() >= {n: v for n, v in LEGACY_VALUES.items() if n in names}.items()


def test_every_manifest_field_that_release_0_1_lacks_has_a_legacy_value() -> None:
    for part, kind in (("progress", checkpoint.Progress), ("identity", checkpoint.Identity)):
        names = {entry.name for entry in dataclasses.fields(kind)}
        assert names - MANIFEST_0_1[part] <= checkpoint.LEGACY_FIELDS[part].keys()


@pytest.fixture
def updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that brought mask_ratio, and with it another behaviour by default."""
    monkeypatch.setitem(record.LEGACY_VALUES, "mask_ratio", 0.6)


@pytest.mark.usefixtures("updated")
def test_a_field_that_a_run_lacks_keeps_its_legacy_value_unless_the_user_names_it() -> None:
    asked = PretrainRecipe()
    begun = to_dict(asked)
    del begun["mask_ratio"]
    recipe, kept = keep_legacy_values(asked, begun, explicit=())
    assert (recipe.mask_ratio, kept) == (0.6, {"mask_ratio": 0.6})
    assert keep_legacy_values(asked, begun, explicit={"mask_ratio"}) == (asked, {})
    assert keep_legacy_values(recipe, begun, explicit=()) == (recipe, {}), "nothing is told twice"
    assert keep_legacy_values(asked, to_dict(asked), explicit=()) == (asked, {}), "a new run has the new default"
    assert keep_legacy_values(asked, to_dict(recipe), explicit=()) == (recipe, {"mask_ratio": 0.6})
    assert from_dict(PretrainRecipe, begun).mask_ratio == 0.6


@pytest.mark.usefixtures("updated")
def test_the_same_command_line_goes_on_after_an_update_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--recipe", "demo", "--output_dir", str(tmp_path)]
    fresh, _ = configure(words, PRETRAINING)
    assert fresh.mask_ratio == 0.75
    record = to_dict(fresh)
    del record["mask_ratio"]
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": record}))
    begun, _ = configure(words, PRETRAINING)
    assert begun == dataclasses.replace(fresh, mask_ratio=0.6)
    assert [entry.getMessage() for entry in caplog.records] == [
        "this run began before an update of the defaults and goes on as it began, with mask_ratio 0.6"
    ]
    explicit, _ = configure([*words, "--override", "mask_ratio=0.5"], PRETRAINING)
    assert explicit.mask_ratio == 0.5


def cut_to(release: set[str], output: Path) -> None:
    """Make the records of a run those that a release would have written."""

    def cut(recipe: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in recipe.items() if name in release}

    record = output / "recipe.json"
    record.write_text(json.dumps({"recipe": cut(json.loads(record.read_text())["recipe"]), "runtime": {}}))
    for path in output.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest.pop("sha256", None)
        for part, names in MANIFEST_0_1.items():
            manifest[part] = {name: manifest[part][name] for name in names}
        manifest["identity"]["recipe"] = cut(manifest["identity"]["recipe"])
        path.write_text(json.dumps(manifest))
    rows = [{n: v for n, v in row.items() if n not in ("time", "epoch")} for row in metrics(output)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_of_a_release_goes_on_bitwise_with_the_same_command_line(shards: Path, tmp_path: Path) -> None:
    words = TINY | {"data": f"{shards}/*.tar", "epochs": "1", "warmup_epochs": "0", "num_workers": "0"}
    legacy = {n: str(v) for n, v in LEGACY_VALUES.items() if n in _PRETRAIN and v is not None}
    whole, begun = words | {"output_dir": str(tmp_path / "whole")}, words | {"output_dir": str(tmp_path / "begun")}
    assert launch(whole | legacy).returncode == 0
    assert launch(begun | legacy | {"stop_at_step": "3"}).returncode == 0
    cut_to(PRETRAIN_0_1, tmp_path / "begun")
    assert launch(begun | {"stop_at_step": "5"}).returncode == 0
    cut_to(PRETRAIN_BEFORE_CROSS, tmp_path / "begun")
    begun_with = from_dict(PretrainRecipe, json.loads((tmp_path / "begun" / "recipe.json").read_text())["recipe"])
    with pytest.raises(ConfigError, match=r"aug_repeats \(here 2, there 1\): undo the change, or name a new output"):
        check_run(dataclasses.replace(begun_with, aug_repeats=2), PretrainRuntime(output_dir=str(tmp_path / "begun")))
    done = launch(begun)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [metrics(tmp_path / name) for name in ("whole", "begun")]
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in found] for found in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_checkpoint_of_another_format_says_so_and_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps({"format_version": 2, "step": 1}))
    with pytest.raises(CheckpointError, match="has format 2, but this is 3: use the old code"):
        checkpoint.verify(tmp_path / "step-00000001")
