import dataclasses

import pytest

from launch.command_line import configure, read_flags
from launch.recipes import DEFAULT, RECIPES
from trainer.config import (
    DetectorRecipe,
    DetectorRuntime,
    PretrainRecipe,
    PretrainRuntime,
    as_record,
    differing_fields,
    from_record,
    help_text,
)
from trainer.errors import ConfigError


def test_flags_and_overrides_and_the_launchers_words_mix() -> None:
    words = "--local_rank=1 --mask_ratio 0.6 --override decoder_depth=3 --override=seed=5 --deepspeed"
    words += " --deepspeed_config f.json"
    assert read_flags(words.split()) == {"mask_ratio": "0.6", "decoder_depth": "3", "seed": "5", "ds_config": "f.json"}


def test_text_that_python_would_take_for_a_number_stays_text() -> None:
    _, runtime = configure(["--output_dir", "2024_01", "--recipe", "demo"], RECIPES, DEFAULT)
    assert runtime.output_dir == "2024_01"


def test_every_repeated_override_counts() -> None:
    recipe, _ = configure(["--override", "mask_ratio=0.5", "--override", "decoder_depth=2"], RECIPES, DEFAULT)
    assert (recipe.mask_ratio, recipe.decoder_depth) == (0.5, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask_ration 0.5", "--mask_ratio"),
        ("--mask_ratio 1.0", "mask_ratio is 1.0"),
        ("--mask_ratio nan", "mask_ratio"),
        ("--mask_ratio half", "must be a number"),
        ("--image_size 7.5", "must be an integer"),
        ("--global_batch 0", "global_batch is 0"),
        ("--resume maybe", "auto, must, never"),
        ("--recipe mae_vit_bas", "mae_vit_base"),
        ("--override mask_ratio", "name=value"),
        ("--seed 1 --override seed=2", "given twice"),
        ("stray", "'stray'"),
        ("--grad_checkpointing perhaps", "true or false"),
        ("--decoder_width 100", "decoder_width is 100"),
        ("-- --seed 1", "lone --"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(words.split(), RECIPES, DEFAULT)


def test_flags_are_unique_and_every_field_has_help() -> None:
    for recipe, runtime in ((PretrainRecipe, PretrainRuntime), (DetectorRecipe, DetectorRuntime)):
        names = [entry.name for config in (recipe, runtime) for entry in dataclasses.fields(config)]
        assert len(names) == len(set(names))
        text = help_text(recipe, "a") + help_text(runtime, "b")
        assert all(f"--{name} " in text for name in names)


def test_help_lists_every_recipe_and_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.pretrain import main

    assert main(["--local_rank=0", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--recipe {name}\n" in text for name in RECIPES)
    assert "--mask_ratio float\n        Share of patches hidden, strictly between 0 and 1. Default: 0.75" in text
    assert "  --save_timeout_s int\n        Saving, measuring or drawing longer ends the job, likewise; 0 for" in text


def test_recipes_are_valid_and_the_published_ones_scale_their_learning_rate() -> None:
    for function in RECIPES.values():
        recipe, _ = function()
        assert function.__doc__
        assert all(word in function.__doc__ for word in ("Source", "Hardware", "Cost", "Expected"))
        if function.__name__ != "demo":
            assert recipe.peak_learning_rate == pytest.approx(1.5e-4 * 4096 / 256)


def test_differing_fields_name_both_values() -> None:
    assert differing_fields({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b (here 2, there 3)"]


def test_a_record_is_read_back_and_a_name_of_another_version_is_one_message() -> None:
    recipe = DetectorRecipe(lora_target_modules=("query", "fc1"), class_weights=(1.0, 2.0))
    assert from_record(DetectorRecipe, as_record(recipe)) == recipe
    assert from_record(DetectorRecipe, {"seed": 3}) == DetectorRecipe(seed=3)
    with pytest.raises(ConfigError, match="the recorded recipe has lora_flavour, which this version does not know"):
        from_record(DetectorRecipe, as_record(recipe) | {"lora_flavour": 1})
