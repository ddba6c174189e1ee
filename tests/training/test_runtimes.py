"""The law: a Runtime does not change the numbers. Every field is tried, or says why it cannot be."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import ROOT, TINY, Run, argv_of, forks, metrics
from tests.helpers.shards import jpeg, write_tar
from trainer.config.settings import DetectorRuntime, PretrainRuntime, Runtime

pytestmark = pytest.mark.ranks

BITWISE: dict[str, list[str]] = {
    "data": ["TRAIN/a.tar,TRAIN/b.tar", "TRAIN/{a,b}.tar"],
    "output_dir": ["OUT/one", "OUT/two"],
    "index_dir": ["OUT/index", "none"],
    "cache_dir": ["OUT/cache", "none"],
    "cache_bytes": ["1", "1000"],
    "allow_data_change": ["true"],
    "sample_ledger": ["OUT/one-ledger", "none"],
    "resume": ["never", "auto"],
    "num_workers": ["2", "3"],
    "prefetch": ["1", "5"],
    "log_every": ["1", "2"],
    "save_every": ["1", "3"],
    "keep_checkpoints": ["1", "2"],
    "background_saves": ["true", "false"],
    "max_restarts": ["0", "3"],
    "stop_at_step": ["none", "2"],
    "max_bad_steps": ["1", "9"],
    "max_bad_sample_share": ["0", "0.5"],
    "start_timeout_s": ["60"],
    "timeout_s": ["0", "100"],
    "data_timeout_s": ["0", "100"],
    "save_timeout_s": ["0", "100"],
    "oversubscribe": ["true"],
    "deterministic": ["true"],
    "progress_bar": ["true", "false"],
    "profile_steps": ["1:2", ""],
    # pre-training
    "val_data": ["TRAIN/a.tar", ""],
    "val_every": ["1", "2"],
    "picture_every": ["1", "3"],
    "val_samples": ["3", "0"],
    "val_mask_ratio": ["0.5", "none"],
    "probe_data": ["TRAIN/*.tar", ""],
    "probe_field": ["label", "none"],
    "probe_every": ["1", "3"],
    "probe_samples": ["24", "2048"],
    # detectors
    "allow_overlap": ["true"],
}
"""Values under which every loss stays what it was, to the last bit; the n-th of each field are tried together."""

ROUNDING: dict[str, list[str]] = {"micro_batch": ["4", "8"], "grad_checkpointing": ["true"], "num_threads": ["2"]}
"""Values, tried together, under which sums are taken in another order."""

REASONS = {
    "ds_config": "precision and ZeRO stage, of which the run's identity has both",
    "init": "weights, whose sha256 the run's identity has",
    "init_encoder_only": "says which of these weights",
    "pretrained": "says where these weights are",
    "compile_mode": "takes minutes; tests/distributed/test_engine.py compares compiled steps with others",
}
"""Why a field cannot be tried here."""

TOLERANCE = 1e-6
"""Measured: 8e-8, one bit of float32."""

SMALL = {name: TINY[name] for name in ("encoder_depth", "image_size", "patch_size", "num_lanes", "num_threads")}
QUICK = {"epochs": "2", "warmup_epochs": "0.5", "progress_bar": "false", "log_every": "1", "num_workers": "0"}
COMMON = SMALL | QUICK | {"global_batch": "16", "micro_batch": "16", "oversubscribe": "true"}
KINDS: dict[str, tuple[type[Runtime], dict[str, str]]] = {
    "pretrain": (PretrainRuntime, {"recipe": "demo", "decoder_width": "32", "decoder_depth": "2", "aug_repeats": "2"}),
    "finetune": (
        DetectorRuntime,
        {
            "recipe": "detector_demo",
            "balance_by": "label",
            "use_lora": "true",
            "freeze_backbone": "false",
            "lora_dropout": "0.2",
            "drop_path": "0.3",
            "use_mixstyle": "true",
            "mixup_alpha": "0.4",
            "mix_group": "4",
            "use_improved_classifier": "true",
            "learning_rate": "3e-3",
        },
    ),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtimes") / "train"
    for name, numbers in (("a", range(20)), ("b", range(20, 32))):
        members = [
            (f"f{n:03d}{end}", content)
            for n in numbers
            for end, content in ((".jpg", jpeg(n)), (".json", json.dumps({"label": n % 2, "identity": n}).encode()))
        ]
        write_tar(folder / f"{name}.tar", members)
    return folder


def test_every_field_is_tried_or_says_why_not() -> None:
    fields = {entry.name for runtime, _ in KINDS.values() for entry in dataclasses.fields(runtime)}
    lists = [set(BITWISE), set(ROUNDING), set(REASONS)]
    assert set.union(*lists) == fields
    assert sum(map(len, lists)) == len(fields), "a field stands in two lists"
    defaults = {entry.name: entry.default for runtime, _ in KINDS.values() for entry in dataclasses.fields(runtime)}
    for name, values in (BITWISE | ROUNDING).items():
        assert any(value != str(defaults[name]).lower() for value in values), f"{name} is only tried at its default"


def variant(fields: dict[str, list[str]], number: int, runtime: type[Runtime]) -> dict[str, str]:
    mine = {entry.name for entry in dataclasses.fields(runtime)}
    return {name: values[number % len(values)] for name, values in fields.items() if name in mine}


def start(script: str, flags: dict[str, str], folder: Path, train: Path, *, ranks: int = 0) -> Run:
    words = [word.replace("TRAIN", str(train)).replace("OUT", str(folder)) for word in argv_of(flags)]
    log = folder / f"log-{flags['output_dir'].removeprefix('OUT/')}"
    return forks().start(ROOT / "launch" / f"{script}.py", words, log, ranks=ranks)


def finish(*runs: Run) -> None:
    for run in runs:
        assert run.wait(300) == 0, run.err.read_text()[-4000:]


def losses(output: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in metrics(output) if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param("pretrain", marks=pytest.mark.law), "finetune"])
def test_any_two_runtimes_give_the_same_losses(script: str, train: Path, tmp_path: Path) -> None:
    runtime, recipe = KINDS[script]
    base = COMMON | recipe | {"data": "TRAIN/*.tar", "output_dir": "OUT/base"}
    one, two = (base | variant(BITWISE, number, runtime) for number in (0, 1))
    rounding = base | variant(ROUNDING, 0, runtime) | {"output_dir": "OUT/rounding"}
    over_ranks = base | {"micro_batch": "8", "output_dir": "OUT/ranks"}
    finish(start(script, base, tmp_path, train))  # builds the index beside the shards
    started = [start(script, flags, tmp_path, train) for flags in (one, two, rounding)]
    finish(*started, start(script, over_ranks, tmp_path, train, ranks=2))
    finish(start(script, two | {"stop_at_step": "none"}, tmp_path, train))

    wanted = losses(tmp_path / "base")
    assert sorted(wanted) == [1, 2, 3, 4]
    for name in ("one", "two"):
        found = losses(tmp_path / name)
        assert len(found) >= 2
        assert found == {step: wanted[step] for step in found}, f"the runtime {name} changed the numbers"
    for name in ("rounding", "ranks"):
        found = losses(tmp_path / name)
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose([found[s] for s in wanted], list(wanted.values()), rtol=TOLERANCE)


def test_a_micro_batch_that_would_cut_the_mixed_groups_is_refused(train: Path, tmp_path: Path) -> None:
    from trainer.config.command_line import configure
    from trainer.config.recipes import FINETUNING
    from trainer.detection.finetuning import check_groups
    from trainer.errors import ConfigError

    def checked(words: str) -> None:
        recipe, runtime = configure(words.split(), FINETUNING)
        check_groups(recipe, runtime.micro_batch)

    plain = "--recipe detector_demo --use_residual_branch false"
    checked(f"{plain} --micro_batch 4")  # nothing is mixed
    checked(f"{plain} --micro_batch 16 --use_mixstyle true --mix_group 8")
    with pytest.raises(ConfigError, match=r"micro_batch is 4, .*use_mixstyle .*try --micro_batch 8"):
        checked(f"{plain} --micro_batch 4 --use_mixstyle true --mix_group 8")
    checked("--recipe detector_demo --micro_batch 4")  # the residual branch sees each image by itself
    with pytest.raises(ConfigError, match=r"mix_group is 5, .*mixup_alpha .*--mix_group 8"):
        checked(f"{plain} --mixup_alpha 0.2 --mix_group 5")
    with pytest.raises(ConfigError, match=r"mix_group is 0, .*began before"):
        checked(f"{plain} --mixup_alpha 0.2 --mix_group 0")
