"""Probes of a run: the same figures on any number of ranks, and a training that does not notice them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, TINY, launch, metrics
from tests.helpers.shards import faces, jpeg, write_tar
from tests.helpers.states import last_state
from trainer.config.command_line import configure
from trainer.config.recipes import PRETRAINING, RECIPES
from trainer.errors import ConfigError
from trainer.training.model_cost import flops_of, on_meta_device
from trainer.training.pretraining import build_model
from trainer.training.probing import affordable_interval, batches_of, table

RUN = TINY | {"epochs": "2", "save_every": "100"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on 64 images; probe 26 people of 4 images in different places: two batches, the second one not full."""
    path = tmp_path_factory.mktemp("probing")
    faces(path / "train.tar", range(64))
    members = []
    for number in range(104):
        fields = {"label": number % 26 % 2, "identity": f"p{number % 26}"}
        image = jpeg(number % 26, 40 + number // 26, 38)
        members += [(f"f{number:04d}.jpg", image), (f"f{number:04d}.json", json.dumps(fields).encode())]
    write_tar(path / "probe.tar", members)
    for stage in range(4):
        config = json.loads((ROOT / "ds_configs" / "cpu_fp32.json").read_text())
        config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (path / f"zero{stage}.json").write_text(json.dumps(config))
    return path


def train(folder: Path, name: str, *, ranks: int, stage: int, field: str = "none", **changes: str) -> Path:
    output = folder / name
    flags = RUN | {"data": f"{folder}/train.tar", "output_dir": str(output)}
    flags |= {"ds_config": f"{folder}/zero{stage}.json", "micro_batch": "4" if ranks == 2 else "8"} | changes
    if field != "none":
        flags |= {"probe_data": f"{folder}/probe.tar", "probe_field": field, "probe_every": "3"}
    done = launch(flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    (output / "stdout").write_text(done.stdout)
    return output


def probes(output: Path) -> dict[int, dict[str, Any]]:
    kept = {row["step"]: row for row in metrics(output) if "probe_knn_accuracy" in row}
    return {step: {n: v for n, v in row.items() if n.startswith("probe_")} for step, row in kept.items()}


def losses(output: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(output) if "loss" in row]


def check_that_training_does_not_notice(folder: Path, stage: int) -> Path:
    plain = train(folder, f"plain{stage}", ranks=2, stage=stage)
    probed = train(folder, f"probed{stage}", ranks=2, stage=stage, field="identity")
    assert list(probes(probed)) == [0, 3, 6, 9, 12, 15, 16]
    assert losses(probed) == losses(plain)
    assert len(losses(plain)) == 16
    assert last_state(probed) == last_state(plain)
    return probed


def compare(one: dict[str, float], other: dict[str, float], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"probe_seconds"}:
        assert one[name] == pytest.approx(other[name], abs=tolerance), name


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
def test_probes_equal_one_process_and_training_does_not_notice_them_at_zero_3(folder: Path) -> None:
    alone = train(folder, "alone", ranks=0, stage=0, field="identity")
    ranks = check_that_training_does_not_notice(folder, stage=3)
    compare(probes(alone)[0], probes(ranks)[0], 1e-6)  # equal weights
    for step, figures in probes(alone).items():  # by now the weights differ by rounding
        for name in ("probe_rank_me", "probe_feature_std"):
            assert probes(ranks)[step][name] == pytest.approx(figures[name], rel=1e-4)
    assert set(probes(alone)[16]) >= {"probe_eer", "probe_tar_at_far_0.01", "probe_linear_accuracy"}
    printed = (ranks / "stdout").read_text()
    assert "probe by identity: 104 images of 26 classes, chance 3.85 %" in printed
    assert "% of the time (7 of " in printed
    assert f"{100 * probes(ranks)[16]['probe_knn_accuracy']:.1f} %" in printed


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_training_does_not_notice_probes_at_other_stages(stage: int, folder: Path) -> None:
    check_that_training_does_not_notice(folder, stage)


@pytest.mark.slow
@pytest.mark.ranks
def test_three_ranks_and_another_field_give_the_figures_of_one_process(folder: Path) -> None:
    """More ranks than batches: the third rank only keeps the others company."""
    changes = {"global_batch": "12", "stop_at_step": "1"}
    alone = train(folder, "one", ranks=1, stage=1, field="label", **changes | {"micro_batch": "12"})
    three = train(folder, "three", ranks=3, stage=3, field="label", **changes | {"micro_batch": "4"})
    compare(probes(alone)[0], probes(three)[0], 1e-6)
    assert "52 people" not in (three / "stdout").read_text()
    assert "26 people, who are kept apart" in (three / "stdout").read_text()
    assert "probe_eer" not in probes(three)[0]


@pytest.mark.slow
@pytest.mark.ranks
def test_an_unreadable_image_is_left_out_on_every_rank(folder: Path, tmp_path: Path) -> None:
    members = []
    for number in range(60):
        image = b"<html>404</html>" if number in (7, 51) else jpeg(number)
        members += [
            (f"f{number:04d}.jpg", image),
            (f"f{number:04d}.json", json.dumps({"identity": number % 6}).encode()),
        ]
    bad = str(write_tar(tmp_path / "bad.tar", members))
    wanted = {"probe_data": bad, "probe_field": "identity", "stop_at_step": "1"}
    found = [
        train(folder, f"bad{ranks}", ranks=ranks, stage=1, **wanted | {"micro_batch": str(8 // ranks)})
        for ranks in (1, 2)
    ]
    compare(probes(found[0])[0], probes(found[1])[0], 1e-6)
    assert "probe by identity: 58 images of 6 classes" in (found[1] / "stdout").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--probe_field identity", "probe_field is 'identity', but needs labelled shards"),
        ("--probe_data a.tar", "probe_field is 'none', but must name what --probe_data is probed by"),
        ("--probe_data a.tar --probe_field age", "must be one of none, label, identity"),
        ("--probe_data a.tar --probe_field label --probe_samples 20", "probe_samples is 20"),
        ("--probe_data a.tar --probe_field label --probe_every 0", "probe_every is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(argv.split(), PRETRAINING)


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_interval_keeps_probes_of_every_recipe_below_two_percent_of_the_flops(name: str) -> None:
    recipe, runtime = RECIPES[name]()
    model = on_meta_device(lambda grad_checkpointing: build_model(recipe), grad_checkpointing=False, precision="fp32")
    probe = runtime.probe_samples * model.encoder.flops(model.encoder.num_patches)
    step = recipe.global_batch * flops_of(model, recipe)
    every = affordable_interval(probe, step)
    assert runtime.probe_every is None
    assert probe <= 0.02 * every * step
    assert every == 500 or probe > 0.02 * (every - 1) * step
    assert (every == 500) == (name != "demo"), "small steps pay for a probe of 2,048 images after more of them"


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_data": "/nowhere/*.tar", "probe_field": "label"}, "/nowhere"),
        ({"probe_data": "PROBE", "probe_field": "source"}, "--probe_data by source: no sample has that field"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_any_work(
    changes: dict[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    words = {name: value.replace("PROBE", f"{folder}/probe.tar") for name, value in changes.items()}
    done = launch(RUN | {"data": f"{folder}/train.tar", "output_dir": str(tmp_path / "out")} | words, ranks=2)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_the_ranks_share_all_batches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.training.probing._BATCH", 2)
    samples = [5, 6, 7, 8, 9]
    assert [batches_of(samples, rank=r, num_ranks=2) for r in (0, 1)] == [[[5, 6], [9, 5]], [[7, 8], [5, 5]]]
    for num_ranks in (1, 2, 3, 7):
        shares = [batches_of(samples, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        assert len({len(share) for share in shares}) == 1
        in_order = [batch for row in zip(*shares, strict=True) for batch in row]
        assert [s for batch in in_order for s in batch][:5] == samples


def test_the_table_shows_the_first_and_the_last_step_in_few_lines() -> None:
    rows = [{"step": 5 * i, "probe_knn_accuracy": i / 100, "probe_rank_me": 7.25} for i in range(40)]
    lines = table(rows)
    assert lines[0].split() == ["step", "kNN", "rank"]
    assert lines[1].split() == ["0", "0.0", "%", "7.25"]
    assert lines[-1].split() == ["195", "39.0", "%", "7.25"]
    assert len(lines) <= 13
    assert table([]) == []
