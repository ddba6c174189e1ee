"""Settings from a file are those of the command line. Flags win over them; the record of a run starts the same run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from launch import doctor, evaluate, finetune, pretrain
from tests.helpers.runs import TINY, launch, metrics
from tools import (
    check_shards,
    compare_runs,
    contact_sheet,
    export,
    make_morphs,
    make_shards,
    plan_run,
    run_status,
    shortcut_baselines,
    splits,
    submit,
)
from trainer.config.command_line import configure
from trainer.config.provenance import describe_start
from trainer.config.recipes import DETECTOR_RECIPES, FINETUNING, PRETRAINING, RECIPES
from trainer.config.record import LEGACY_VALUES, to_dict
from trainer.config.settings import PretrainRuntime
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import explain

TOOLS = (check_shards, compare_runs, contact_sheet, export, make_morphs, make_shards, run_status, shortcut_baselines)


def written(folder: Path, text: str, name: str = "run.yaml") -> list[str]:
    (folder / name).write_text(text)
    return ["--config", str(folder / name)]


def test_yaml_and_json_say_the_same_as_flags(tmp_path: Path) -> None:
    flags = ["--recipe", "demo", "--mask_ratio", "0.6", "--output_dir", "2024_01", "--patch_size", "none"]
    flags += ["--data", "a.tar,b.tar", "--learning_rate", "1e-4", "--norm_pix_loss", "false"]
    expected = configure(flags, PRETRAINING)
    yaml = (
        "recipe: demo\nmask-ratio: 0.6\noutput_dir: 2024_01\npatch_size:\ndata: [a.tar, b.tar]\nlearning_rate: 1e-4\n"
    )
    yaml += "norm_pix_loss: no   # as YAML people write it\n"
    assert configure(written(tmp_path, yaml), PRETRAINING) == expected
    values = {"recipe": "demo", "mask_ratio": 0.6, "output_dir": "2024_01", "patch_size": None, "norm_pix_loss": False}
    values |= {"data": ["a.tar", "b.tar"], "learning_rate": 1e-4}
    assert configure(written(tmp_path, json.dumps(values), "run.json"), PRETRAINING) == expected


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = written(tmp_path, "recipe: demo\nseed: 3\nmax_steps: 7\n")
    recipe, _ = configure([*config, "--seed", "4"], PRETRAINING)
    assert (recipe.seed, recipe.max_steps) == (4, 7)
    recipe, _ = configure([*config, "--epochs", "30"], PRETRAINING)
    assert (recipe.max_steps, recipe.epochs) == (None, 30)
    recipe, _ = configure([*config, "--recipe", "mae_vit_large"], PRETRAINING)
    assert (recipe.model, recipe.seed) == ("vit_large_patch16_224", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3\nmask_ration: 0.5\n", "unknown setting mask_ration in .*run.yaml: did you mean --mask_ratio"),
        ("heldout_data: a.tar\n", "unknown setting heldout_data in .*: since release 0.3 it is --val_data"),
        ("mask_ratio: 1.5\n", r"mask_ratio is 1.5, but must lie strictly .*\(mask_ratio stands in .*run.yaml\)"),
        ("seed: many\n", r"seed is 'many', but must be an integer \(seed stands in .*run.yaml\)"),
        ("seed: 1\nseed: 2\n", "names seed twice: keep one"),
        ("epochs: 3\nmax_steps: 7\n", "epochs and max_steps are both given"),
        ("optimizer:\n  lr: 3\n", "optimizer holds settings of its own: write all on one level; .*--ds_config"),
        ("- seed\n", "which holds no settings: write lines such as 'seed: 3'"),
        ("", "which holds no settings"),
        ("seed: [1\n", "which is not valid YAML: .*line 2"),
        ("1: 2\n", "unknown setting 1 in"),
        ("data:\n", r"data has no value: write --data VALUE \(data stands in"),
        ("config: other.yaml\n", "unknown setting config in"),
    ],
)
def test_a_bad_file_is_refused_by_name_before_any_work(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pretrain.CLI.read([*written(tmp_path, text), "--output_dir", str(tmp_path / "run")])
    assert explain(caught.value) == 2
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for words, message in (
        (["--config", str(tmp_path / "none.yaml")], "cannot be read: No such file"),
        (["--config", str(tmp_path)], "cannot be read: Is a directory"),
        (written(tmp_path, "{'seed': 3}", "run.json"), "not valid JSON"),
        (["--config"], "config has no value"),
        (["--config", "a.yaml", "--config", "b.yaml"], "config is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            configure(words, PRETRAINING)
    (tmp_path / "bytes.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        configure(["--config", str(tmp_path / "bytes.yaml")], PRETRAINING)


@pytest.mark.parametrize("module", [*TOOLS, splits, evaluate], ids=lambda module: module.__name__)
def test_every_tool_takes_a_file_of_settings(module: object, tmp_path: Path) -> None:
    cli = module.CLI  # type: ignore[attr-defined]
    places = {"output": "o.png", "output_dir": "out", "plot": ""}
    given = {name: places.get(name, "a=b") for name in cli.required}
    settings = cli.read(written(tmp_path, json.dumps(given), "tool.json"))
    assert {name: getattr(settings, name) for name in given} == given
    with pytest.raises(ConfigError, match=r"unknown setting no_such in .*tool.json"):
        cli.read(written(tmp_path, json.dumps(given | {"no_such": 1}), "tool.json"))


def test_tools_that_take_a_training_read_both_from_the_file(tmp_path: Path) -> None:
    words = written(tmp_path, "recipe: demo\nimages: 320\nnodes: 2\nmask_ratio: 0.5\n")
    plan = plan_run.CLI.read(words)
    assert plan is not None
    expected = dataclasses.replace(RECIPES["demo"]()[0], mask_ratio=0.5)
    assert (plan.settings.images, plan.settings.nodes, plan.recipe) == (320, 2, expected)
    examined = doctor.CLI.read(written(tmp_path, "script: finetune\nrecipe: probe\nmicro_batch: 8\n"))
    assert examined is not None
    assert examined.recipe == DETECTOR_RECIPES["probe"]()[0]
    assert examined.file_argv == ("--recipe=probe", "--micro_batch=8")


def test_a_job_holds_what_the_file_said_and_a_sweep_replaces_one_setting_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "nodes: 1\ngpus: 8\nrecipe: mae_vit_base\ndata: /d\noutput_dir: /runs/a b\nmask_ratio: 0.9\nmicro_batch: 64\n"
    )
    line = submit.CLI.read([*written(tmp_path, text), "--seed", "5", "--sweep", "mask_ratio 0.6 0.75", "--dry_run"])
    assert line is not None
    assert submit.main(line) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "train pretrain --recipe=mae_vit_base --data=/d '--output_dir=/runs/a b' --micro_batch=64 --seed 5"


def test_a_run_records_the_recipe_that_the_file_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: mae_vit_small\n")
    for argv, name in (([], "mae_vit_small"), (["--recipe", "demo"], "demo")):
        start = describe_start(["pretrain.py", "--config", str(path), *argv], num_ranks=1, local_size=1)
        assert start["recipe_name"] == name


def test_a_record_gives_recipe_and_runtime_back_exactly(tmp_path: Path) -> None:
    for recipes in (PRETRAINING, FINETUNING):
        for name in recipes.functions:
            recipe, runtime = configure(["--recipe", name, "--seed", "9", "--timeout_s", "77"], recipes)
            record = {"recipe": to_dict(recipe), "runtime": to_dict(runtime), "versions": {"torch": "1"}, "start": {}}
            words = written(tmp_path, json.dumps(record, indent=1), "recipe.json")
            assert configure(words, recipes) == (recipe, runtime)
            changed, _ = configure([*words, "--epochs", "999"], recipes)
            assert changed.epochs == 999


def test_a_record_of_an_older_version_behaves_as_its_run_did(tmp_path: Path) -> None:
    recipe, runtime = configure(["--recipe", "demo"], PRETRAINING)
    old = {name: value for name, value in to_dict(recipe).items() if name not in LEGACY_VALUES}
    places = {name: value for name, value in to_dict(runtime).items() if not name.startswith("val_")}
    record = {"recipe": old, "runtime": places | {"heldout_data": "v.tar", "heldout_every": 7}}
    found, where = configure(written(tmp_path, json.dumps(record), "recipe.json"), PRETRAINING)
    assert {name: to_dict(found)[name] for name in LEGACY_VALUES if name in to_dict(found)} == {
        name: value for name, value in LEGACY_VALUES.items() if name in to_dict(found)
    }
    assert isinstance(where, PretrainRuntime)
    assert (where.val_data, where.val_every) == ("v.tar", 7)


def test_a_record_without_the_key_of_an_address_asks_for_it(tmp_path: Path) -> None:
    recipe, runtime = configure(["--recipe", "demo", "--data", "https://a/b.tar?..."], PRETRAINING)
    words = written(tmp_path, json.dumps({"recipe": to_dict(recipe), "runtime": to_dict(runtime)}), "recipe.json")
    with pytest.raises(ConfigError, match=r"data in .*recipe.json lacks its key, which no run records: pass --data"):
        configure(words, PRETRAINING)
    _, found = configure([*words, "--data", "https://a/b.tar?key=1"], PRETRAINING)
    assert found.data == "https://a/b.tar?key=1"


def test_a_record_of_the_other_training_is_refused(tmp_path: Path) -> None:
    recipe, runtime = configure(["--recipe", "lora"], FINETUNING)
    words = written(tmp_path, json.dumps({"recipe": to_dict(recipe), "runtime": to_dict(runtime)}), "recipe.json")
    with pytest.raises(ConfigError, match=r"unknown setting \w+ in .*recipe.json"):
        pretrain.CLI.read(words)
    assert finetune.CLI.parse(words).recipe == recipe


@pytest.mark.slow
def test_a_run_starts_again_from_its_record_with_the_same_numbers(shards: Path, tmp_path: Path) -> None:
    flags = TINY | {"data": str(shards), "output_dir": str(tmp_path / "first"), "stop_at_step": "2"}
    done = launch(flags)
    assert done.returncode == 0, done.stderr
    record = tmp_path / "first" / "recipe.json"
    done = launch({"config": str(record), "output_dir": str(tmp_path / "second")})
    assert done.returncode == 0, done.stderr
    first, second = (metrics(tmp_path / name) for name in ("first", "second"))
    timeless = [
        [{name: row[name] for name in ("step", "loss", "learning_rate", "grad_norm") if name in row} for row in rows]
        for rows in (first, second)
    ]
    assert timeless[0] == timeless[1]
    assert any("loss" in row and np.isfinite(row["loss"]) for row in first)
    recorded = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("first", "second")]
    assert recorded[0]["recipe"] == recorded[1]["recipe"]
    assert recorded[1]["runtime"] == recorded[0]["runtime"] | {"output_dir": str(tmp_path / "second")}
    done = launch({"config": str(record), "stop_at_step": "3"})  # without another folder, it is the same run
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "first")[-1]["step"] == 3
