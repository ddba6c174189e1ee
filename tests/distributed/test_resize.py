"""A run goes on with another number of ranks: the same weights, moments and steps, and nothing left behind."""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT, TINY, TINY_DETECTOR, Run, argv_of, forks, ledger, metrics, steps_done
from tests.helpers.shards import faces
from tests.helpers.workers import run_worker
from trainer.distributed import zero_state as zero_files
from trainer.errors import CheckpointError
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
WORLDS = (2, 1, 3, 2)
OUTSIDE = Path(tempfile.gettempdir()) / "owned-by-a-checkpoint"
FP32 = [*(f"{kind}-cpu_fp32-{stage}" for stage in (2, 1, 3) for kind in ("lora", "mae")), "mae-cpu_fp32-0"]
BF16 = ["mae-zero1_bf16-1", "lora-zero3_bf16-3"]


def hop(root: Path, number: int) -> list[dict[str, Any]]:
    """Run the ranks of one hop; returns what each saw, by case."""
    folder = root / f"hop-{number}"
    folder.mkdir()
    words = [str(root), str(number), str(WORLDS[number - 1]), str(len(WORLDS)), *FP32, *BF16]
    return run_worker("resize_worker.py", words, folder, ranks=WORLDS[number])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hops") / "c++ (1)"  # a folder whose name means something in a pattern


@pytest.fixture(scope="module")
def hops(root: Path) -> list[list[dict[str, Any]]]:
    root.mkdir()
    return [hop(root, number) for number in range(len(WORLDS))]


@pytest.mark.parametrize("case", FP32 + BF16)
def test_two_to_one_to_three_to_two_ranks_keep_every_bit_of_the_state(
    hops: list[list[dict[str, Any]]], case: str
) -> None:
    losses = []
    for number, ranks in enumerate(hops):
        first = ranks[0][case]
        assert all(seen[case]["saved"] == first["saved"] for seen in ranks)
        assert first["saved"]["steps"] == str({number + 1.0})
        assert first["saved"]["counted"] == str(number + 1)
        losses += first["losses"]
        if number:
            for seen in ranks:
                assert seen[case]["loaded"] == hops[number - 1][0][case]["saved"]
                assert seen[case]["left"] == []
    assert losses == pytest.approx(hops[0][0][case]["whole"], rel=0.02 if "bf16" in case else 1e-4)
    assert losses[-1] != losses[0]


def test_a_conversion_that_fails_is_refused_on_all_ranks_and_leaves_nothing(hops: list[list[dict[str, Any]]]) -> None:
    for seen in hops[-1]:
        altered, lost, full = seen["failed"]
        assert "changed in its conversion to 2 ranks (exp_avg)" in altered
        assert "cannot be loaded" in lost
        assert "No space left" in full
        assert "free space" in full
        assert seen["left"] == []


# ---------------------------------------------------------------------------------------------- hostile checkpoints


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def renamed(group: dict[str, Any], name: str) -> None:
    group[name] = group.pop(next(iter(group)))


def tampered(state: dict[str, Any], place: str, name: str) -> None:
    if place == "slices":
        renamed(state["optimizer_state_dict"]["param_slice_mappings"][0], name)
    elif place == "shapes":
        renamed(state["param_shapes"][0], name)
    elif place == "module":
        renamed(state["module"], name)
    else:
        state[place] = [{"expert_key_prefix": name}]


def model_of_the_mae() -> MaskedAutoencoder:
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    return MaskedAutoencoder(encoder, DecoderOptions(decoder_width=32, decoder_depth=2, decoder_heads=4))


def hostile_copy(root: Path, folder: Path, stage: int, place: str, name: str) -> None:
    shutil.copytree(root / f"mae-cpu_fp32-{stage}" / "step-1", folder)
    pattern = "*_optim_states.pt" if place == "slices" else "*_model_states.pt"
    path = sorted((folder / "state").glob(pattern))[-1]
    state = torch.load(path, weights_only=False)
    tampered(state, place, name)
    torch.save(state, path)


@pytest.mark.parametrize(("stage", "place"), [(1, "slices"), (1, "module"), (3, "shapes"), (3, "ds_autoep_layers")])
@pytest.mark.parametrize("name", ["../../../owned", str(OUTSIDE), "no_such.weight"], ids=["up", "absolute", "unknown"])
def test_a_name_in_a_checkpoint_never_becomes_a_place(
    hops: list[list[dict[str, Any]]], root: Path, tmp_path: Path, stage: int, place: str, name: str
) -> None:
    folder = tmp_path / "a" / "b" / "step-00000001"
    hostile_copy(root, folder, stage, place, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="which the model does not have"):
        zero_files.convert(folder, model_of_the_mae(), with_frozen=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert not OUTSIDE.exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_code_in_a_checkpoint_of_another_world_size_is_not_run(
    hops: list[list[dict[str, Any]]], root: Path, tmp_path: Path, stage: int
) -> None:
    folder = tmp_path / "step-00000001"
    shutil.copytree(root / f"mae-cpu_fp32-{stage}" / "step-1", folder)
    for path in sorted((folder / "state").iterdir()):
        whole = path.read_bytes()
        torch.save(torch.load(path, weights_only=False) | {"more": Evil(tmp_path / "owned")}, path)
        before = sorted(tmp_path.rglob("*"))
        for read in (
            lambda: zero_files.convert(folder, model_of_the_mae(), with_frozen=True),
            lambda: zero_files.read_weights(folder),
        ):
            with pytest.raises(CheckpointError, match="loaded safely"):
                read()
        with pytest.raises(CheckpointError, match="loaded safely"), zero_files._quiet_and_safe():
            torch.load(path, weights_only=False)  # as every module of DeepSpeed does
        assert sorted(tmp_path.rglob("*")) == before
        path.write_bytes(whole)
    converted, _ = zero_files.convert(folder, model_of_the_mae(), with_frozen=True)
    assert Path(converted).parent == tmp_path
    assert Path(converted).stat().st_mode & 0o077 == 0


# ---------------------------------------------------------------------------------------------- whole runs


def kill_when(reached: Callable[[], bool], run: Run) -> None:
    """SIGKILL every process of a run as soon as something is seen."""
    run.until(reached, timeout=300)
    run.kill()
    assert run.wait() == -signal.SIGKILL, run.err.read_text()[-3000:]


def finish(run: Run, returncode: int = 0) -> str:
    assert run.wait(400) == returncode, run.err.read_text()[-3000:]
    return run.err.read_text()


def same_losses(one: Path, other: Path) -> None:
    losses = [{row["step"]: row["loss"] for row in metrics(output) if "loss" in row} for output in (one, other)]
    assert losses[0].keys() == losses[1].keys()
    assert max(abs(losses[0][step] / losses[1][step] - 1) for step in losses[0]) < 1e-4


@pytest.mark.law
@pytest.mark.versions
def test_pre_training_killed_in_a_step_and_in_a_conversion_goes_on_with_other_ranks(
    shards: Path, tmp_path: Path
) -> None:
    settings = {"global_batch": "12", "micro_batch": "2", "epochs": str(12 * 12 / 64), "save_every": "2"}
    common = TINY | settings | {"data": f"{shards}/*.tar"}

    def start(name: str, ranks: int, **changes: str) -> Run:
        where = {"output_dir": str(tmp_path / name), "sample_ledger": str(tmp_path / f"{name}-ledger")}
        words = argv_of(common | where | changes)
        return forks().start(ROOT / "launch" / "pretrain.py", words, tmp_path / f"log-{time.monotonic()}", ranks=ranks)

    finish(start("whole", 0))
    killed = tmp_path / "killed"
    kill_when(lambda: steps_done(killed) >= 5, start("killed", 2))

    def half_converted() -> list[Path]:
        return list(killed.glob("checkpoints/.step-*.tmp-universal-*/state/tmp"))

    kill_when(lambda: bool(half_converted()), start("killed", 3))
    assert half_converted()
    refused = finish(start("killed", 0, micro_batch="5"), returncode=2)
    assert "global_batch is 12" in refused
    log = finish(start("killed", 3, resume="must"))
    assert not list(killed.glob("checkpoints/.*"))
    assert "written by 2 ranks" in log
    assert ledger(tmp_path / "killed-ledger") == ledger(tmp_path / "whole-ledger")
    same_losses(tmp_path / "whole", killed)


def test_fine_tuning_killed_on_one_rank_goes_on_with_two(tmp_path: Path) -> None:
    faces(tmp_path / "train" / "a.tar", range(0, 64))
    faces(tmp_path / "val" / "a.tar", range(100, 116))
    config = json.loads((ROOT / "ds_configs" / "cpu_fp32.json").read_text())
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    common = TINY_DETECTOR | {
        "data": f"{tmp_path}/train/*.tar",
        "val_data": f"{tmp_path}/val/*.tar",
        "ds_config": str(tmp_path / "zero3.json"),
        "use_lora": "true",
        "lora_dropout": "0.2",
        "epochs": "1.5",
        "save_every": "3",
        "log_every": "1",
        "micro_batch": "4",
    }

    def start(name: str, ranks: int) -> Run:
        where = {"output_dir": str(tmp_path / name), "sample_ledger": str(tmp_path / f"{name}-ledger")}
        words = argv_of(common | where)
        return forks().start(ROOT / "launch" / "finetune.py", words, tmp_path / f"log-{time.monotonic()}", ranks=ranks)

    finish(start("whole", 0))
    killed = tmp_path / "killed"
    kill_when(lambda: steps_done(killed) >= 4, start("killed", 0))
    log = finish(start("killed", 2))
    assert "written by 1 ranks" in log
    assert ledger(tmp_path / "killed-ledger") == ledger(tmp_path / "whole-ledger")
    same_losses(tmp_path / "whole", killed)
