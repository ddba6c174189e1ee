import dataclasses
import errno
import itertools
import json
import re
from pathlib import Path

import pytest

from trainer.config import foreign_names
from trainer.config.command_line import TrainingCommandLine, check_places, configure, read_flags
from trainer.config.parse import expand_home, help_text, settings_of
from trainer.config.recipes import FINETUNING, PRETRAINING, RECIPES
from trainer.config.record import LEGACY_VALUES, differing_fields, from_dict, to_dict
from trainer.config.settings import DetectorRecipe, DetectorRuntime, Launch, PretrainRecipe, PretrainRuntime
from trainer.data.shards.index import list_shards
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import explain
from trainer.fault_tolerance.resume import check_run
from trainer.fault_tolerance.watchdog import Limits, backend_timeout_s
from trainer.fault_tolerance.watchdog_process import Phase

PRETRAIN = TrainingCommandLine(Launch, "Doc.\n", (PRETRAINING,), required=("data",), trains=True)
FINETUNE = TrainingCommandLine(Launch, "Doc.\n", (FINETUNING,), required=("data",), trains=True)


def test_flags_and_overrides_and_the_launchers_words_mix() -> None:
    words = "--local_rank=1 --mask_ratio 0.6 --override decoder_depth=3 --override=seed=5 --deepspeed"
    words += " --deepspeed_config f.json"
    assert read_flags(words.split()) == {"mask_ratio": "0.6", "decoder_depth": "3", "seed": "5", "ds_config": "f.json"}


def test_text_that_python_would_take_for_a_number_stays_text() -> None:
    _, runtime = configure(["--output_dir", "2024_01", "--recipe", "demo"], PRETRAINING)
    assert runtime.output_dir == "2024_01"


def test_every_repeated_override_counts() -> None:
    recipe, _ = configure(["--override", "mask_ratio=0.5", "--override", "decoder_depth=2"], PRETRAINING)
    assert (recipe.mask_ratio, recipe.decoder_depth) == (0.5, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask_ration 0.5", "--mask_ratio"),
        ("--mask_ratio 1.0", "mask_ratio is 1.0"),
        ("--mask_ratio nan", "mask_ratio"),
        ("--mask_ratio half", "must be a number"),
        ("--image_size 7.5", "must be an integer"),
        ("--image_size 224x160", "must be an integer: training and evaluation see squares, only tools/export.py takes"),
        ("--global_batch 0", "global_batch is 0"),
        ("--resume maybe", "auto, must, never"),
        ("--recipe mae_vit_bas", "mae_vit_base"),
        ("--override mask_ratio", "name=value"),
        ("--seed 1 --override seed=2", "given twice"),
        ("stray", "'stray'"),
        ("--grad_checkpointing perhaps", "true or false"),
        ("--decoder_width 100", "decoder_width is 100"),
        ("-- --seed 1", "lone --"),
        ("--seed 1 --seed 2", "seed is given twice, as '1' and '2'"),
        ("--output_dir --seed 1", "output_dir has no value"),
        ("--epochs", "epochs has no value"),
        ("--epochs 3 --max_steps 7", "epochs and max_steps are both given"),
        ("--compile_mode default --timeout_s 599", "timeout_s is 599, but must be at least 600: compile_mode makes"),
        ("--warmup_epochs 900", r"must be from 0 to epochs \(800\): set both"),
        ("--deepspeed a.json --ds_config b.json", "ds_config is given twice"),
        ("--lr 1e-3", "--lr: here it is --learning_rate or --base_learning_rate"),
        ("--blr 1e-3", "here it is --base_learning_rate"),
        ("--batch_size 8", "here it is --global_batch or --micro_batch"),
        ("--input_size 8", "here it is --image_size"),
        ("--bf16", "--ds_config ds_configs/zero1_bf16.json"),
        ("--cfg a.yaml", "--config FILE reads settings from a YAML or JSON file"),
        ("--config a.yaml", "config is 'a.yaml', which cannot be read: No such file"),
        ("--config", "config has no value"),
        ("--output a", "here it is --output_dir"),
        ("--num_train_epochs 3", "here it is --epochs"),
        ("--no_progress_bar", "write --progress_bar false"),
        ("--heldout_data a.tar", "since release 0.3 it is --val_data"),
        ("--num_gpus 2", "before the script"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(words.split(), PRETRAINING)


@pytest.mark.parametrize("words", ["", "--timeout_s 0", "--timeout_s 600"])
def test_a_first_step_has_time_to_compile(words: str) -> None:
    """By default, for ever, and at the least; without compile_mode a step may have any limit."""
    recipe = ["--recipe", "demo", *words.split()]
    for mode in ("default", "reduce-overhead"):
        _, runtime = configure([*recipe, "--compile_mode", mode], PRETRAINING)
        _, limit_s = Limits(runtime.timeout_s, 0, 0).of_phases()[Phase.STEP]
        assert limit_s == 0 or limit_s >= 600
        assert backend_timeout_s(runtime) > 600, "a rank that has compiled waits in the collectives for the others"
    assert configure(["--recipe", "demo", "--timeout_s", "1"], PRETRAINING)[1].timeout_s == 1


def test_a_boolean_needs_no_value_whatever_its_name() -> None:
    line = ["--norm_pix_loss", "--grad_checkpointing", "--seed", "4", "--oversubscribe"]
    recipe, runtime = configure([*line, "--recipe=demo"], PRETRAINING)
    assert recipe.norm_pix_loss
    assert runtime.grad_checkpointing
    assert runtime.oversubscribe
    assert recipe.seed == 4


def test_the_length_of_the_schedule_can_be_given_in_steps() -> None:
    recipe, _ = configure(["--recipe", "demo", "--max_steps", "50"], PRETRAINING)
    assert recipe.num_steps(320) == 50
    assert recipe.num_warmup_steps(320) == 5  # the demo's share: 14 of 140 epochs
    assert recipe.num_epochs(320) == 5  # of 10 steps of 32
    plain, _ = configure(["--recipe", "demo"], PRETRAINING)
    assert (plain.num_steps(320), plain.num_warmup_steps(320), plain.num_epochs(320)) == (1400, 140, 140)


def test_the_hugging_face_way_of_naming_a_deepspeed_file_is_understood() -> None:
    assert read_flags(["--deepspeed", "my.json", "--seed", "1"]) == {"ds_config": "my.json", "seed": "1"}
    assert read_flags(["--deepspeed=my.json"]) == {"ds_config": "my.json"}
    assert read_flags(["--deepspeed", "--seed", "1"]) == {"seed": "1"}


def test_a_tilde_is_the_home_folder_wherever_a_path_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = "--output_dir ~/run --data ~/a/*.tar@0.7,~/b/c~d/*.tar@0.3 --ds_config=~/my.json --index_dir ~"
    _, runtime = configure([*words.split(), "--init", "~nobody_/x"], PRETRAINING)
    assert (runtime.output_dir, runtime.ds_config, runtime.index_dir) == (
        "/home/me/run",
        "/home/me/my.json",
        "/home/me",
    )
    assert runtime.data == "/home/me/a/*.tar@0.7,/home/me/b/c~d/*.tar@0.3"
    assert runtime.init == "~nobody_/x"
    assert expand_home("a=~/x;b=~/y") == "a=/home/me/x;b=/home/me/y"


def test_names_of_other_trainers_lead_to_settings_that_exist() -> None:
    commands = [
        {entry.name for config in (recipe, runtime) for entry in dataclasses.fields(config)}
        for recipe, runtime in ((PretrainRecipe, PretrainRuntime), (DetectorRecipe, DetectorRuntime))
    ]
    others = {"source", "models", "test_sets", "output"}  # of the tools
    for theirs, ours in foreign_names.OURS.items():
        assert set(ours) <= commands[0] | commands[1] | others, theirs
        assert not all(theirs in known for known in commands), f"{theirs} is a setting of ours"
    for theirs in foreign_names.ADVICE:
        assert not any(theirs in known for known in commands), f"{theirs} is a setting of ours"


def test_no_message_shows_a_name_of_the_code() -> None:
    for folder in ("trainer", "launch", "tools"):
        for path in Path(folder).rglob("*.py"):
            shown = re.findall(r"\{[a-z_]+\.[a-z_.]+=[^\s]{0,5}\}", path.read_text())
            assert not shown, f"{path} prints {shown}"


def test_the_command_line_says_which_settings_were_given_and_whether_to_run() -> None:
    line = PRETRAIN.parse(["--recipe", "demo", "--seed=3", "--override", "mask_ratio=0.5", "--dry_run"])
    assert line.given == {"seed", "mask_ratio"}
    assert line.settings.dry_run
    assert line.argv == ("--recipe", "demo", "--seed=3", "--override", "mask_ratio=0.5")
    assert not PRETRAIN.parse(["--dry_run", "false"]).settings.dry_run


def test_help_shows_the_values_that_this_command_line_would_run_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert FINETUNE.read(["--recipe", "full", "--global_batch", "64", "--help"]) is None
    text = capsys.readouterr().out
    for setting, value in {"epochs": "20", "drop_path": "0.1", "global_batch": "64", "use_lora": "false"}.items():
        assert re.search(rf"--{setting} \w+ = {value}(\.0)?$", text, re.M), setting
    assert FINETUNE.read(["--version"]) is None
    assert "face-mae-trainer 0." in capsys.readouterr().out
    with pytest.raises(ConfigError, match="mask_ratio is 2"):
        PRETRAIN.read(["--mask_ratio", "2", "--help"])


def test_help_groups_the_settings_and_every_setting_has_its_section() -> None:
    for recipe, runtime in ((PretrainRecipe, PretrainRuntime), (DetectorRecipe, DetectorRuntime)):
        for config in (recipe, runtime):
            described = settings_of(config)
            assert all(setting.section for setting in described)
            sections = [setting.section for setting in described]
            assert [section for section, _ in itertools.groupby(sections)] == list(dict.fromkeys(sections))
            assert len(set(sections)) >= 5
    assert {"Model", "Schedule", "Optimizer", "Data"} <= {setting.section for setting in settings_of(PretrainRecipe)}


def test_flags_are_unique_and_every_field_has_help() -> None:
    for recipe, runtime in ((PretrainRecipe, PretrainRuntime), (DetectorRecipe, DetectorRuntime)):
        names = [entry.name for config in (recipe, runtime) for entry in dataclasses.fields(config)]
        assert len(names) == len(set(names))
        text = help_text(recipe, "a") + help_text(runtime, "b")
        assert all(f"--{name} " in text for name in names)


def test_help_lists_every_recipe_and_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert PRETRAIN.read(["--local_rank=0", "--help"]) is None
    text = capsys.readouterr().out
    assert all(f"--recipe {name}\n" in text for name in RECIPES)
    assert "--mask_ratio float = 0.75\n        Share of patches hidden, strictly between 0 and 1." in text
    assert "  --save_timeout_s int = 7200\n        Saving, measuring, drawing or starting DeepSpeed longer ends" in text


def test_recipes_are_valid_and_the_published_ones_scale_their_learning_rate() -> None:
    for function in RECIPES.values():
        recipe, _ = function()
        assert function.__doc__
        assert all(word in function.__doc__ for word in ("Source", "Hardware", "Cost", "Expected"))
        if function.__name__ != "demo":
            # CrossMAE scales the rate by the share of hidden patches that is predicted: 8e-4 at a third and 4096 images
            assert recipe.peak_learning_rate == pytest.approx(2.4e-3 * recipe.predict_share)


def test_differing_fields_name_both_values() -> None:
    assert differing_fields({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b (here 2, there 3)"]


def test_a_record_is_read_back_and_a_name_of_another_version_is_one_message() -> None:
    recipe = DetectorRecipe(lora_target_modules=("query", "fc1"), class_weights=(1.0, 2.0))
    assert from_dict(DetectorRecipe, to_dict(recipe)) == recipe
    legacy = {name: value for name, value in LEGACY_VALUES.items() if name in to_dict(recipe)}
    assert from_dict(DetectorRecipe, {"seed": 3}) == DetectorRecipe(seed=3, **legacy)
    with pytest.raises(ConfigError, match="the recorded recipe has lora_flavour, which this version does not know"):
        from_dict(DetectorRecipe, to_dict(recipe) | {"lora_flavour": 1})


def test_a_place_where_nobody_can_write_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ConfigError, match=r"output_dir is '.*', but .*file is a file: name another folder"):
            check_places(PretrainRuntime(output_dir=str(tmp_path / place)))
    check_places(PretrainRuntime(output_dir=str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists()


def test_a_file_that_the_system_refuses_is_a_message_and_what_no_setting_names_is_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--output_dir", str(tmp_path)])
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "logs"))
    assert explain(refused) == 2
    assert f"output_dir is {str(tmp_path)!r}, but {tmp_path}/logs cannot be used" in capsys.readouterr().err
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path.parent))) == 2
    for error in (
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/logs"),
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "missing")),
    ):
        capsys.readouterr()
        assert explain(error) == 1
        assert type(error).__name__ in capsys.readouterr().err


def test_a_run_of_another_recipe_leads_on_to_init(tmp_path: Path) -> None:
    record = {"recipe": to_dict(PretrainRecipe(seed=1))}
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"seed .*--init {tmp_path} there starts from this run's weights"):
        check_run(PretrainRecipe(seed=2), PretrainRuntime(output_dir=str(tmp_path)))


def test_images_instead_of_shards_lead_to_the_tool_that_packs_them(tmp_path: Path) -> None:
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "1.JPG").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"it holds images such as 1.JPG; .*make_shards.py --source {tmp_path}"):
        list_shards(str(tmp_path), setting="--data")
    with pytest.raises(ConfigError, match=r"1.JPG is an image, not a shard: .*make_shards.py"):
        list_shards(str(tmp_path / "anna" / "*"), setting="--data")
