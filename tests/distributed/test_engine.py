"""The mathematics does not depend on ZeRO stage, world size or accumulation; configurations are filled or refused."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ds_configs import OWNED
from tests.helpers.runs import ROOT
from tests.helpers.workers import run_worker
from trainer.distributed.ds_config import fill_ds_config, owned_by_recipe, read_ds_config
from trainer.errors import ConfigError
from trainer.training.schedule import learning_rate_at

CPU = ROOT / "ds_configs" / "cpu_fp32.json"


def train(
    folder: Path, *, ranks: int, stage: int, micro_batch: int, config: Path = CPU, compile_mode: str = "off"
) -> list[dict[str, Any]]:
    folder.mkdir()
    words = [str(config), str(micro_batch), str(folder), str(stage), compile_mode]
    return run_worker("engine_worker.py", words, folder, ranks=ranks)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
@pytest.mark.versions
def test_all_stages_and_one_rank_and_accumulation_compute_the_same(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", ranks=1, stage=0, micro_batch=8)[0]
    assert alone["losses"][-1] < alone["losses"][0]
    for stage in (0, 1, 2, 3):
        ranks = train(tmp_path / f"stage{stage}", ranks=2, stage=stage, micro_batch=2)
        assert ranks[0]["losses"] == ranks[1]["losses"]
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        assert ranks[0]["errors"] == ranks[1]["errors"], "the ranks hold different weights"
        assert ranks[0]["copy_is_equal"], "what is saved in the background differs from what is saved at once"
        if stage < 3:
            assert ranks[0]["parameters"] == ranks[1]["parameters"]
    accumulated = train(tmp_path / "accumulated", ranks=1, stage=1, micro_batch=2)[0]
    assert accumulated["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.versions
def test_a_rank_leaves_although_torchs_threads_still_drop_its_collectives(tmp_path: Path) -> None:
    """Before 2.8, torch waited for them in `destroy_process_group`, and they for the GIL."""
    assert len(run_worker("leaving_worker.py", [str(tmp_path)], tmp_path, ranks=2)) == 2


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.versions
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", ranks=1, stage=0, micro_batch=4)[0]
    compiled = train(tmp_path / "compiled", ranks=1, stage=1, micro_batch=4, compile_mode="default")[0]
    assert compiled["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert compiled["errors"] == pytest.approx(alone["errors"], rel=1e-3)
    assert compiled["copy_is_equal"]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("name", "stage"), [("zero1_bf16", 1), ("zero2_bf16", 2), ("zero3_bf16", 3)])
def test_bf16_follows_fp32_within_its_precision(tmp_path: Path, name: str, stage: int) -> None:
    exact = train(tmp_path / "fp32", ranks=1, stage=1, micro_batch=8)[0]
    config = ROOT / "ds_configs" / f"{name}.json"
    ranks = train(tmp_path / "bf16", ranks=2, stage=stage, micro_batch=4, config=config)
    assert ranks[0]["losses"] == pytest.approx(exact["losses"], rel=0.02)
    assert ranks[0]["errors"] == ranks[1]["errors"]
    assert ranks[0]["copy_is_equal"]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_fills_without_a_rest(path: Path) -> None:
    filled = fill_ds_config(read_ds_config(path), OWNED)
    assert "auto" not in json.dumps(filled)
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["optimizer"]["params"] == {
        "torch_adam": True, "fused": True, "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.05,
    } or "offload_optimizer" in filled["zero_optimization"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"scheduler": {}}', "recipe owns the schedule"),
        ('{"elasticity": {}}', "elasticity"),
        ('{"train_batch_size": 16}', "train_batch_size to 16, but the recipe says 8"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}', "optimizer.params.lr"),
        ('{"optimizer": 3}', "must be a JSON object"),
        ('{"steps_per_print": "auto"}', "steps_per_print"),
    ],
)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        fill_ds_config(read_ds_config(path), OWNED)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "num_ranks", "remedy"),
    [
        (8, 2, 3, "start 1, 2 or 4 ranks"),
        (8, 3, 2, "set micro_batch to 1, 2 or 4"),
        (12, 4, 2, "start 1 or 3 ranks, or set micro_batch to 1, 2, 3 or 6"),
        (12, 5, 5, "start 1, 2, 3, 4, 6 or 12 ranks with a micro_batch that divides theirs"),
        (7, 7, 2, "start 1 ranks"),
        (4096, 64, 48, "start 1, 2, 4, 8, 16, 32 or 64 ranks"),
    ],
)
def test_a_global_batch_of_no_whole_micro_batches_is_refused_naming_what_divides(
    global_batch: int, micro_batch: int, num_ranks: int, remedy: str
) -> None:
    options = {"learning_rate": 1.0, "betas": (0.9, 0.95), "weight_decay": 0.0, "clip_grad_norm": 0.0}
    batch = {"global_batch": global_batch, "micro_batch": micro_batch}
    with pytest.raises(ConfigError) as caught:
        owned_by_recipe(**batch, num_ranks=num_ranks, **options)
    assert str(caught.value).endswith(f": {remedy}")


def test_the_schedule_warms_up_linearly_and_ends_at_its_floor() -> None:
    at = [learning_rate_at(s, peak=1.0, floor=0.1, warmup_steps=4, total_steps=12) for s in range(13)]
    assert at[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert at[8] == pytest.approx(0.55)
    assert at[12] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(at[4:]))
