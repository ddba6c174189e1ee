"""Whole runs of launch/finetune.py and launch/evaluate.py, and LoRA under every ZeRO stage."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import ROOT, TINY, TINY_DETECTOR, argv_of, environment, forks, launch, metrics
from tests.helpers.shards import faces, picture, write_tar
from tests.helpers.workers import run_worker
from trainer.config.scoring_settings import EvaluationSettings
from trainer.config.settings import DetectorRecipe
from trainer.detection.build import build_detector, load_trained
from trainer.detection.evaluation import evaluate
from trainer.detection.saved_detector import load_detector
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.encoder import PatchEncoder
from trainer.weights.load import read_init


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    faces(folder / "train" / "a.tar", range(0, 64))
    faces(folder / "val" / "a.tar", range(100, 132))
    faces(folder / "test" / "a.tar", range(200, 240))
    return folder


def finetune(sets: Path, output: Path, **flags: str) -> subprocess.CompletedProcess[str]:
    data = {"data": str(sets / "train" / "*.tar"), "val_data": str(sets / "val" / "*.tar"), "output_dir": str(output)}
    ranks = int(flags.pop("ranks", "0"))
    return launch(TINY_DETECTOR | data | flags, ranks=ranks, script="finetune.py")


@pytest.fixture(scope="module")
def mae(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mae") / "run"
    flags = TINY | {"data": str(sets / "train" / "*.tar"), "output_dir": str(output), "num_workers": "0", "epochs": "1"}
    done = launch(flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def lora(sets: Path, mae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "run"
    done = finetune(sets, output, init=str(mae), use_lora="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.ranks
def test_a_spike_of_a_fine_tuning_is_left_behind_with_its_data(sets: Path, mae: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    flags = TINY_DETECTOR | {
        "data": str(sets / "train" / "*.tar"), "output_dir": str(output), "init": str(mae), "use_lora": "true",
        "sample_ledger": str(tmp_path / "ledger"), "log_every": "1", "save_every": "8", "spike_threshold": "20",
        "on_spike": "rollback",
    }  # fmt: skip
    spikes = {8 * step + step % 8: "1000" for step in (37, 38, 39)}
    faulty = ROOT / "tests" / "ranks" / "faulty_training.py"
    run = forks().start(faulty, argv_of(flags), log, ranks=2, FAULTS=json.dumps(spikes), SCRIPT="finetune")
    run.wait()
    assert list(run.codes.values()) == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("are left out") == 1
    rows = [row for row in metrics(output) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 49))
    assert [row["rollbacks"] for row in rows] == [0] * 32 + [1] * 16
    lines = [line for path in (tmp_path / "ledger").iterdir() for line in path.read_text().splitlines()]
    positions = [json.loads(line)["position"] for line in lines]
    assert sorted(positions) == [*range(8 * 32), *range(8 * 40, 8 * 56)]


@pytest.mark.slow
def test_the_detector_learns_and_its_folder_and_checkpoint_hold_only_what_trained(lora: Path) -> None:
    rows = [row for row in metrics(lora) if "val_d_eer" in row]
    assert rows[-1]["val_loss"] < 0.8 * math.log(2)  # what knowing nothing costs
    assert rows[-1]["val_d_eer"] < 0.2
    saved = load_detector(lora)
    selection, of_step = saved.description["selection"], {row["step"]: row["val_d_eer"] for row in rows}
    assert selection["figures"]["d_eer"] == of_step[saved.description["step"]]
    assert selection["lowest"]["d_eer"] == of_step[selection["lowest"]["step"]] == min(of_step.values())
    assert selection["lowest"]["step"] <= saved.description["step"]
    assert "at most one standard error" in selection["rule"]
    assert all(".lora_" in name or name.startswith("head.") for name in saved.weights)
    assert {"d_eer", "macer_0.05", "bscer_0.10"} <= saved.decision.thresholds.keys()
    newest = lora / "checkpoints" / (lora / "checkpoints" / "latest").read_text().strip()
    assert sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) < 400_000
    assert (lora / "detector" / "adapter" / "adapter_model.safetensors").exists()
    board = EventAccumulator(str(lora / "tensorboard")).Reload()
    assert board.Images("training_views")[0].width > 32
    assert (lora / "pictures" / "training-views-00000000.png").exists()
    assert len(board.Tensors("val/precision_recall")) == len(rows)


@pytest.mark.slow
@pytest.mark.law
def test_the_adapter_of_a_run_loads_in_plain_peft_on_plain_timm_with_equal_logits(lora: Path, mae: Path) -> None:
    import timm
    from peft import PeftModel

    init = read_init(str(mae), pretrained=False)
    assert init is not None
    recipe = DetectorRecipe(model="vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=2, use_lora=True)
    detector, _ = build_detector(recipe, init)
    load_trained(detector, load_detector(lora).weights)
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 2, "global_pool": "avg", "fc_norm": False}
    peft_model = timm.create_model("vit_tiny_patch16_224", **options)
    peft_model.load_state_dict(init.weights, strict=False)
    peft_model = PeftModel.from_pretrained(peft_model, lora / "detector" / "adapter").eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = detector._normalise(images)
    torch.testing.assert_close(peft_model(pixels), detector.eval()(images, want="logits"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
def test_a_killed_fine_tuning_goes_on_bitwise(sets: Path, mae: Path, tmp_path: Path) -> None:
    flags = {
        "init": str(mae),
        "use_lora": "true",
        "save_every": "20",
        "use_mixstyle": "true",
        "mix_group": "4",
        "use_advanced_aug": "true",
        "use_residual_branch": "true",
        "view_resize": "native",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(sets, whole, **flags).returncode == 0
    assert finetune(sets, parts, **flags, stop_at_step="20").returncode == 0
    done = finetune(sets, parts, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    exact = [
        [(row["step"], row.get("loss"), row.get("val_loss")) for row in metrics(output)] for output in (whole, parts)
    ]
    assert exact[0] == exact[1]
    for name, value in load_detector(whole).weights.items():
        assert torch.equal(value, load_detector(parts).weights[name])
    chosen = [load_detector(output).description for output in (whole, parts)]
    assert [(c["step"], c["selection"]) for c in chosen[:1]] == [(c["step"], c["selection"]) for c in chosen[1:]]
    done = finetune(sets, parts, **flags | {"init": ""}, stop_at_step="30")
    assert done.returncode == 2
    assert "init" in done.stderr


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.law
@pytest.mark.versions
def test_lora_under_zero_trains_alike_on_all_ranks_and_resumes_exactly(tmp_path: Path, stage: int) -> None:
    def run(folder: Path, ranks: int, stage: int) -> list[dict[str, Any]]:
        folder.mkdir()
        words = [str(ROOT / "ds_configs" / "cpu_fp32.json"), str(folder), str(stage)]
        return run_worker("detector_worker.py", words, folder, ranks=ranks)

    alone = run(tmp_path / "alone", 1, 0)[0]
    ranks = run(tmp_path / "ranks", 2, stage)
    assert ranks[0]["digest"] == ranks[1]["digest"], "the ranks train different adapters"
    assert ranks[0]["logits"] == ranks[1]["logits"]
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    np.testing.assert_allclose(ranks[0]["logits"], alone["logits"], rtol=1e-3, atol=1e-4)
    for seen in (alone, *ranks):
        assert seen["resumed"] == seen["losses"][3:]
        assert seen["digest_resumed"] == seen["digest"]
        assert seen["key_rows_are_zero"]
        assert all(".lora_" in name or name.startswith(("head.", "residual.")) for name in seen["names"])
        assert any(name.startswith("residual.") for name in seen["names"])
        assert seen["bytes"] < seen["whole_bytes"], "the frozen encoder is in the checkpoint"


# ---------------------------------------------------------------------------------------------- the seed's commands


ALL_FEATURES = """use_advanced_aug=True use_balanced_sampler=True use_projection_head=True use_improved_classifier=True
use_margin_loss=True use_learned_mask_token=True use_separate_pos_embed=True"""
LORA_ONLY = "use_lora=True freeze_backbone=True learning_rate=1e-4"


@pytest.mark.slow
@pytest.mark.parametrize("features", [ALL_FEATURES, LORA_ONLY])
def test_the_seeds_command_lines_run(sets: Path, mae: Path, tmp_path: Path, features: str) -> None:
    named = {feature.partition("=")[0] for feature in features.split()}
    flags = {n: v for n, v in TINY_DETECTOR.items() if n not in named} | {"balance_by": "none", "init": str(mae)}
    flags |= {
        "data": str(sets / "train" / "*.tar"),
        "val_data": str(sets / "val" / "*.tar"),
        "output_dir": str(tmp_path / "r"),
    }
    words = argv_of(flags) + [word for feature in features.split() for word in ("--override", feature)]
    started = forks().start(ROOT / "launch" / "finetune.py", words, tmp_path / "log")
    assert started.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    recipe = load_detector(tmp_path / "r").description["recipe"]
    for feature in features.split():
        name, _, value = feature.partition("=")
        assert str(recipe[name]) == {"1e-4": "0.0001"}.get(value, value)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_target_modules": "gate", "use_lora": "true"}, "lora_target_modules is"),
        ({"class_weights": "[1.0]"}, "class_weights is"),
        ({"init": "/nowhere"}, "no such file or folder"),
        ({"use_learned_mask_token": "true"}, "without --init there is no pre-training"),
        ({"passport_aug": "fax"}, "passport_aug"),
        ({"use_dora": "true"}, "set use_lora true"),
        ({"val_data": "SAME"}, "--data and --val_data share"),
        ({"data": "ONE"}, "none of 8 samples is a morph"),
        ({"data": "TWO"}, "neither 0 (bona fide) nor 1 (morph)"),
        ({"data": "NONE"}, "has no label"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    sets: Path, tmp_path: Path, flags: dict[str, str], message: str
) -> None:
    made = {
        "SAME": lambda: sets / "train" / "a.tar",
        "ONE": lambda: faces(tmp_path / "one.tar", range(8), labels=(0,)),
        "TWO": lambda: faces(tmp_path / "two.tar", range(8), labels=(0, 1, 2)),
        "NONE": lambda: write_tar(tmp_path / "none.tar", [(f"a{i}.png", picture(i, 0)) for i in range(8)]),
    }
    flags = {name: str(made[value]()) if value in made else value for name, value in flags.items()}
    done = finetune(sets, tmp_path / "run", **flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    save_file(encoder.vit.state_dict(), tmp_path / "export.safetensors")
    init = read_init(str(tmp_path / "export.safetensors"), pretrained=False)
    fitting = DetectorRecipe(model="vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=2)
    model, _ = build_detector(fitting, init)
    assert torch.equal(model.encoder.vit.blocks[0].attn.qkv.weight, encoder.vit.blocks[0].attn.qkv.weight)
    larger = DetectorRecipe(model="vit_tiny_patch16_224", image_size=48, patch_size=8, encoder_depth=2)
    assert build_detector(larger, init)[0].encoder.num_patches == 36
    deeper = DetectorRecipe(model="vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=3)
    with pytest.raises(ConfigError, match="encoder_depth is 3, but --init was trained with 2"):
        build_detector(deeper, init)


def test_an_official_mae_file_is_read_and_one_with_code_is_not(tmp_path: Path) -> None:
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    state = encoder.vit.state_dict() | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    init = read_init(str(tmp_path / "mae.pth"), pretrained=False)
    assert init is not None
    assert init.recipe == {"use_learned_mask_token": True, "use_separate_pos_embed": True}
    assert init.weights.keys() == encoder.vit.state_dict().keys()
    torch.save({"model": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        read_init(str(tmp_path / "code.pth"), pretrained=False)


# ---------------------------------------------------------------------------------------------- evaluation


def judge(lora: Path, tests: str, tmp_path: Path, **changes: Any) -> Path:
    options = {"num_workers": 0, "progress_bar": False, "num_replicates": 50, "num_hardest": 3} | changes
    return evaluate(
        EvaluationSettings(models=f"lora={lora}", test_sets=tests, output_dir=str(tmp_path / "results"), **options)
    )


@pytest.mark.slow
def test_an_evaluation_writes_figures_scores_and_a_page_that_needs_nothing_else(
    sets: Path, lora: Path, tmp_path: Path
) -> None:
    shards = faces(tmp_path / "odd" / "b.tar", range(300, 332), source="<script>alert(1)</script>")
    report = judge(lora, f"plain={sets / 'test' / '*.tar'};odd={shards}", tmp_path)
    folder = report.parent
    figures = json.loads(next(folder.glob("*_eval.json")).read_text())
    rows = list(csv.DictReader(next(folder.glob("*_scores.csv")).read_text().splitlines()))
    assert [result["test_set"] for result in figures["results"]] == ["plain", "odd"]
    assert len(rows) == 72
    plain = [row for row in rows if row["test_set"] == "plain"]
    threshold = figures["results"][0]["threshold"]
    for row in plain:
        assert 0 <= float(row["score"]) <= 1
        assert row["returnCode"] == "Success"
        assert (
            abs(float(row["score"]) - threshold) < 1e-6
            or row["isMorph"] == str(float(row["score"]) >= threshold).lower()
        )
    pooled = figures["results"][0]["summary"]["pooled"]
    stopped = [row["isMorph"] == "true" for row in plain if row["label"] == "0"]
    assert pooled["at_threshold"]["bscer"] == pytest.approx(np.mean(stopped))
    assert figures["results"][0]["summary"]["tools"].keys() == {"stripes", "lines"}
    page = report.read_text()
    for forbidden in ('src="http', "src='http", 'href="http', "<script", "@import", "url(http"):
        assert forbidden not in page
    for needed in ("BSCER@MACER", "plain", "odd", "stripes", "<svg"):
        assert needed in page

    class Balanced(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.stack: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br", "hr", "link", "col", "wbr"):
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    parser = Balanced()
    parser.feed(page)
    assert parser.stack == []


@pytest.mark.slow
@pytest.mark.law
def test_the_command_as_typed_with_its_defaults_scores_every_image_once(sets: Path, lora: Path, tmp_path: Path) -> None:
    words = ["--models", f"lora={lora}", "--test_sets", f"plain={sets / 'test' / '*.tar'}"]
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        kind: next((tmp_path / "results").glob(f"*_{kind}")) for kind in ("eval.json", "scores.csv", "report.html")
    }
    assert all(str(path.relative_to(tmp_path)) in done.stdout for path in found.values())
    rows = list(csv.DictReader(found["scores.csv"].read_text().splitlines()))
    assert [row["key"] for row in rows] == [f"f{number:04d}" for number in range(200, 240)]
    pooled = json.loads(found["eval.json"].read_text())["results"][0]["summary"]["pooled"]
    assert (pooled["num_bona_fide"], pooled["num_morphs"]) == (20, 20)
    alone = judge(lora, f"plain={sets / 'test' / '*.tar'}", tmp_path / "alone")
    assert next(alone.parent.glob("*_scores.csv")).read_text() == found["scores.csv"].read_text()


@pytest.mark.slow
def test_a_set_that_cannot_be_measured_costs_no_scores_of_the_sets_before_it_and_odd_names_cost_nothing(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def members(name: str, payload: Callable[[int], bytes]) -> list[tuple[str, bytes]]:
        labels = [(f"{name}{n}", n, json.dumps({"label": n % 2}).encode()) for n in range(600, 612)]
        return [part for key, n, text in labels for part in ((f"{key}.png", payload(n)), (f"{key}.json", text))]

    odd = write_tar(tmp_path / "odd.tar", members("caf\udce9", lambda n: picture(n, n % 2)))
    broken = write_tar(
        tmp_path / "broken.tar", members("x", lambda n: b"\x89PNG\r\n\x1a\n" if n % 2 else picture(n, 0))
    )
    with pytest.raises(DataError, match="test set broken: no morph can be read"):
        judge(lora, f"odd={odd};broken={broken}", tmp_path)
    (partial,) = (tmp_path / "results").iterdir()
    assert str(partial) in capsys.readouterr().err
    rows = list(csv.DictReader(partial.read_text().splitlines()))
    assert [row["key"] for row in rows if row["test_set"] == "odd"] == [f"caf\\xe9{n}" for n in range(600, 612)]
    assert len([row for row in rows if row["test_set"] == "broken"]) == 12, "they were scored"
    partial.unlink()
    report = judge(lora, f"odd={odd}", tmp_path, num_hardest=2, markdown=str(tmp_path / "table.md"))
    told = capsys.readouterr().out
    assert "note: test set odd names no identities" in told
    figures = json.loads(next(report.parent.glob("*_eval.json")).read_text())
    assert any("names no identities" in warning for warning in figures["warnings"])
    assert any("6 images in one class" in warning for warning in figures["warnings"])
    page = report.read_text()
    assert page.count("caf\\xe9") == 4, "two of each class"
    assert "bootstrap over images." in page
    assert (
        (tmp_path / "table.md")
        .read_text()
        .startswith("| D-EER in %, 95 % interval | odd |\n| --- | --- |\n| lora | **")
    )


@pytest.mark.slow
def test_an_infinite_threshold_is_said_and_costs_nothing(sets: Path, lora: Path, tmp_path: Path) -> None:
    """The 16 morphs and 16 bona fides of the validation data cannot guarantee 1 %."""
    for name, what, called in (
        ("macer_0.01", "minus infinity: 16 attacks", "true"),
        ("bscer_0.01", "infinity", "false"),
    ):
        report = judge(lora, f"plain={sets / 'test' / '*.tar'}", tmp_path / name, threshold=name)
        figures = json.loads(next(report.parent.glob("*_eval.json")).read_text())
        assert figures["results"][0]["threshold"] == {"true": "-inf", "false": None}[called]
        assert any(f"{name} is {what}" in warning for warning in figures["warnings"])
        rows = csv.DictReader(next(report.parent.glob("*_scores.csv")).read_text().splitlines())
        assert {row["isMorph"] for row in rows} == {called}
        assert "need at least 99" in report.read_text()
    assert "need at least 99" in (lora / "detector" / "detector.json").read_text()


@pytest.mark.slow
@pytest.mark.law
def test_what_the_detector_has_seen_is_no_test_set(sets: Path, lora: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        with pytest.raises(ConfigError, match=r"people and \d+ identical images of test set seen"):
            judge(lora, f"seen={sets / name / '*.tar'}", tmp_path)
    report = judge(lora, f"seen={sets / 'train' / '*.tar'}", tmp_path, allow_overlap=True)
    assert "lora was trained on" in report.read_text()


@pytest.mark.slow
def test_wrong_detectors_and_sets_are_refused(sets: Path, lora: Path, tmp_path: Path) -> None:
    plain = f"plain={sets / 'test' / '*.tar'}"
    with pytest.raises(ConfigError, match="image_size 32, but would be tested with 64"):
        judge(lora, plain, tmp_path, image_size=64)
    with pytest.raises(ConfigError, match="threshold is 'best'"):
        judge(lora, plain, tmp_path, threshold="best")
    with pytest.raises(CheckpointError, match="holds no detector"):
        judge(tmp_path, plain, tmp_path)
    with pytest.raises(DataError, match="is a morph"):
        judge(lora, f"one={faces(tmp_path / 'one.tar', range(400, 408), labels=(0,))}", tmp_path)
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    save_file(encoder.vit.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="name its weights with --init"):
        judge(lora, plain, tmp_path, init=str(tmp_path / "other.safetensors"))
    weights = lora / "detector" / "weights.safetensors"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    try:
        with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing or altered"):
            judge(lora, plain, tmp_path)
    finally:
        weights.write_bytes(kept)


@pytest.mark.slow
def test_an_unreadable_image_is_a_failure_and_no_score(lora: Path, tmp_path: Path) -> None:
    members = []
    for number in range(500, 512):
        payload = b"\x89PNG\r\n\x1a\n broken" if number == 503 else picture(number, number % 2)
        values = json.dumps({"label": number % 2}).encode()
        members += [(f"g{number}.png", payload), (f"g{number}.json", values)]
    report = judge(lora, f"some={write_tar(tmp_path / 'some.tar', members)}", tmp_path)
    figures = json.loads(next(report.parent.glob("*_eval.json")).read_text())
    assert (figures["test_sets"][0]["num_failed_bona_fide"], figures["test_sets"][0]["num_failed_morphs"]) == (0, 1)
    rows = csv.DictReader(next(report.parent.glob("*_scores.csv")).read_text().splitlines())
    row = next(row for row in rows if row["key"] == "g503")
    assert (row["score"], row["isMorph"], row["returnCode"]) == ("", "", "corrupt")
