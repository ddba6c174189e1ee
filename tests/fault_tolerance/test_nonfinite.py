"""Numbers that are not finite move nothing and are told; losses that jump are left behind with their data."""

import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.runs import ROOT, TINY, Run, argv_of, forks, metrics
from tests.helpers.workers import run_worker
from trainer.distributed.ds_config import read_ds_config
from trainer.distributed.engine import StepResult
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError
from trainer.fault_tolerance import checkpoint
from trainer.fault_tolerance.attempts import acquire
from trainer.fault_tolerance.checkpoint import Identity, Progress
from trainer.fault_tolerance.nonfinite import WINDOW, SpikeWatch, is_spike

FAULTY = ROOT / "tests" / "ranks" / "faulty_training.py"
CPU = ROOT / "ds_configs" / "cpu_fp32.json"
LOSS = st.floats(0.001, 1000)


def start(words: list[str], folder: Path, **variables: str) -> Run:
    """Two ranks."""
    return forks().start(Path(words[0]), words[1:], folder / "log", ranks=2, **variables)


def codes_of(words: list[str], folder: Path, **variables: str) -> list[int | None]:
    run = start(words, folder, **variables)
    run.wait()
    return list(run.codes.values())


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def pretrain(script: Path, **changes: Any) -> list[str]:
    flags = TINY | {name: str(value) for name, value in changes.items()}
    return [str(script), *argv_of(flags)]


def faults(found: Mapping[int, str]) -> str:
    return json.dumps({str(position): fault for position, fault in found.items()})


def manifest(output: Path, step: int) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((output / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return read


def ledger(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What both ranks consumed, by step."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            rows.setdefault(json.loads(line)["step"], []).append(json.loads(line))
    return rows


# ---------------------------------------------------------------------------------------------- one step


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1)])
@pytest.mark.law
@pytest.mark.versions
def test_a_step_with_numbers_that_are_not_finite_leaves_no_trace(tmp_path: Path, precision: str, stage: int) -> None:
    config = CPU if precision == "fp32" else ROOT / "ds_configs" / "zero1_bf16.json"
    seen = worker(tmp_path, config, stage)
    for rank in seen:
        assert rank["applied"] == [True, True, False, False, False, True, True, True]
        assert rank["untouched"] == [not applied for applied in rank["applied"]]
        assert rank["stop"] == [number == 6 for number in range(8)], "one hand is raised at step 6, on the last rank"
        assert rank["losses"][5:] == rank["oracle"][5:], "as if the bad steps had never been"
        assert rank["again"] == rank["losses"][6:], "the same engine goes back to a checkpoint exactly"
        assert "not finite on rank 0" in rank["refusal"]
        assert [str(loss) for loss in rank["losses"][2:4]] == ["nan", "inf"]
    assert [rank["micro_losses"][2][1] for rank in seen][1] == "nan"
    assert seen[0]["losses"][5:] == seen[1]["losses"][5:]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_loss_scale_that_is_too_high_skips_steps_without_poison(tmp_path: Path) -> None:
    config = json.loads(CPU.read_text()) | {"fp16": {"enabled": True, "initial_scale_power": 26, "hysteresis": 1}}
    (tmp_path / "fp16.json").write_text(json.dumps(config))
    for rank in worker(tmp_path, tmp_path / "fp16.json", 1):
        assert rank["untouched"] == [not applied for applied in rank["applied"]]
        assert not rank["applied"][0]
        assert rank["losses"][0] < 10
        assert rank["losses"][0] == rank["oracle"][0]


def worker(folder: Path, config: Path, stage: int) -> list[dict[str, Any]]:
    return run_worker("numerics_worker.py", [str(config), str(folder), str(stage)], folder, ranks=2)


@pytest.mark.slow
@pytest.mark.ranks
def test_what_fills_up_a_share_is_no_weight(tmp_path: Path) -> None:
    """On three ranks few sizes divide, so the last rank's shares at stage 3 end in memory that nobody wrote."""
    assert len(run_worker("padding_worker.py", [str(CPU), str(tmp_path)], tmp_path, ranks=3)) == 3


@pytest.mark.parametrize(
    "setting", [{"bf16": {"check_grad_overflow": False}}, {"zero_optimization": {"compute_grad_norm": False}}]
)
def test_a_ds_config_that_blinds_the_check_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(setting))
    with pytest.raises(ConfigError, match="not finite would move the weights"):
        read_ds_config(tmp_path / "ds.json")


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.ranks
def test_bad_steps_are_counted_and_a_row_of_them_ends_the_run_with_their_samples(shards: Path, tmp_path: Path) -> None:
    output, notes = tmp_path / "out", tmp_path / "ledger"
    words = pretrain(
        FAULTY, data=f"{shards}/*.tar", output_dir=output, sample_ledger=notes, save_every=4, max_bad_steps=3
    )
    poison = {8 * 5 + 1: "nan", **{8 * step + 3: "inf" for step in (9, 10, 11)}}  # odd positions belong to rank 1
    assert codes_of(words, tmp_path, FAULTS=faults(poison)) == [2, 2]
    log = log_of(tmp_path)
    assert "Traceback" not in log
    assert log.count("was skipped") == 4
    message = log[log.index("error: ") :]
    assert "3 steps in a row up to step 12 had a loss or gradient that is not finite (loss inf on rank 1" in message
    assert socket.gethostname() in message
    report = json.loads((output / "logs" / "nonfinite-step-00000012.json").read_text())
    (part,) = report["ranks"][1]["micro_batches"]
    assert part["loss"] == "inf"
    assert 8 * 11 + 3 in part["positions"]
    assert all(key in message for key in part["keys"])
    assert isinstance(report["ranks"][0]["micro_batches"][0]["loss"], float)
    rows = {row["step"]: row for row in metrics(output)}
    assert [rows[step]["skipped_steps"] for step in (5, 6, 7, 9)] == [0, 1, 1, 1]
    assert rows[6]["loss"] is rows[6]["grad_norm"] is None
    assert (output / "checkpoints" / "latest").read_text() == "step-00000008\n"
    assert manifest(output, 8)["progress"]["skipped_steps"] == 1

    assert codes_of(words, tmp_path, FAULTS="{}") == [0, 0], log_of(tmp_path)[-3000:]
    assert manifest(output, 32)["progress"]["skipped_steps"] == 1
    consumed = ledger(notes)
    assert sorted(consumed) == [step for step in range(1, 33) if step != 6]
    assert all(len(consumed[step]) == 8 for step in consumed)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_state_that_is_not_finite_is_never_saved(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = pretrain(FAULTY, data=f"{shards}/*.tar", output_dir=output, save_every=4)
    # One weight of rank 1 turns NaN before step 7, of which step 8 is a date to save.
    assert codes_of(words, tmp_path, FAULTS=faults({8 * 6 + 1: "weight"})) == [2, 2]
    message = "weights or optimizer state are not finite on rank 1, so nothing was saved"
    assert log_of(tmp_path).count(message) == 1  # rank 0 says it for all; the codes show that both agree
    assert "Traceback" not in log_of(tmp_path)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step-00000004"]
    checkpoint.verify(output / "checkpoints" / "step-00000004")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_signal_to_one_rank_stops_all_at_the_same_step(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = pretrain(
        ROOT / "launch" / "pretrain.py",
        data=f"{shards}/*.tar", output_dir=output, epochs=5000, log_every=100_000, save_every=100_000,
    )  # fmt: skip
    run = start(words, tmp_path)
    run.until((output / "metrics.jsonl").exists)  # opened before the first step
    time.sleep(1)
    os.kill(run.pids[1], signal.SIGUSR1)
    run.wait()
    assert list(run.codes.values()) == [85, 85], log_of(tmp_path)[-3000:]
    assert re.findall(".*got SIGUSR1", log_of(tmp_path)) == ["[rank 1] got SIGUSR1"]
    (last,) = metrics(output)
    assert manifest(output, int(last["step"]))["progress"]["step"] == last["step"]
    assert (output / "checkpoints" / "latest").read_text() == f"step-{last['step']:08d}\n"


@pytest.mark.slow
@pytest.mark.ranks
def test_a_spike_is_left_behind_with_its_data_and_a_kill_changes_nothing(shards: Path, tmp_path: Path) -> None:
    # Data steps 37-39 spike at steps 38-40; back at step 32, data go on with 40, of which 41-43 spike at 34-36.
    spikes = {8 * step + step % 8: "50" for step in (37, 38, 39, 41, 42, 43)}
    numbers, consumed = {}, {}
    for name, kills in (("whole", {}), ("killed", {8 * 50 + 1: "kill"})):
        output = tmp_path / name / "out"
        output.parent.mkdir()
        words = pretrain(
            FAULTY, data=f"{shards}/*.tar", output_dir=output, sample_ledger=tmp_path / name / "ledger", epochs=6,
            save_every=8, spike_threshold=20, on_spike="rollback",
        )  # fmt: skip
        if kills:
            assert -signal.SIGKILL in codes_of(words, output.parent, FAULTS=faults(spikes | kills))
            assert log_of(output.parent).count("are left out") == 2
            assert manifest(output, 32)["progress"]["skips"][1] == {"at_step": 32, "num_steps": 4}
            assert (output / "checkpoints" / "latest").read_text() == "step-00000032\n"
            words += ["--resume", "must"]
        assert codes_of(words, output.parent, FAULTS=faults(spikes)) == [0, 0], log_of(output.parent)[-3000:]
        rows = metrics(output)
        assert [row["step"] for row in rows] == list(range(1, 49))
        assert [row["rollbacks"] for row in rows] == [0] * 32 + [2] * 16
        numbers[name] = [(row["loss"], row["grad_norm"], row["lr"]) for row in rows]
        consumed[name] = ledger(tmp_path / name / "ledger")
        end = manifest(output, 48)
        assert end["progress"]["skips"] == [{"at_step": 32, "num_steps": 8}, {"at_step": 32, "num_steps": 4}]
        assert end["samples"] == 8 * (48 + 12)
    assert numbers["killed"] == numbers["whole"]
    assert consumed["killed"] == consumed["whole"]
    taken = [sorted(row["position"] for row in rows) for _, rows in sorted(consumed["whole"].items())]
    assert taken == [list(range(8 * step, 8 * step + 8)) for step in (*range(32), *range(44, 60))]


# ---------------------------------------------------------------------------------------------- going back


def test_the_same_checkpoint_is_gone_back_to_three_times_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (4, 8, 12):
        commit(root, Progress(step))
    spiked = Progress(12, spiking_since=10)
    for attempt in range(3):
        path = rewind(root, spiked)
        assert path is not None
        assert path.name == "step-00000008"
        found = checkpoint.find(root)
        assert found is not None
        assert found[0] == path
        saved = Progress(**found[1]["progress"])
        assert len(saved.skips) == attempt + 1
        spiked = Progress(12, skips=saved.skips, spiking_since=10)
    with pytest.raises(DataError, match="3 times"):
        rewind(root, spiked)
    assert rewind(root, Progress(4, spiking_since=4)) is None
    # A spike that began before that checkpoint: further back, with all that was left out since left out at once.
    assert rewind(root, replace(spiked, spiking_since=6)) == root / "step-00000004"
    found = checkpoint.find(root)
    assert found is not None
    assert found[1]["progress"]["skips"] == [{"at_step": 4, "num_steps": spiked.data_step - 4}]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004"]


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["step", "step", "step", "save", "back"]), max_size=25), st.data())
def test_what_was_trained_and_what_was_left_out_are_all_data_once(moves: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, progress, taken, num_back = Path(folder, "checkpoints"), Progress(), [], 0
        for move in moves:
            if move == "step":
                taken.append(progress.data_step)
                progress.step += 1
            elif move == "save":
                commit(root, progress)
            elif progress.step:
                progress.spiking_since = data.draw(st.integers(1, progress.step))
                behind, path = progress.data_step, rewind(root, progress, 99)
                if path is not None:
                    found = checkpoint.find(root)
                    assert found is not None
                    progress, num_back = Progress(**found[1]["progress"]), num_back + 1
                    assert progress.data_step == behind, "the data go on behind the spike"
                    del taken[progress.step :]
        left_out = []
        for i, skip in enumerate(progress.skips):  # in the order in which they were made
            before = skip["at_step"] + sum(s["num_steps"] for s in progress.skips[:i])
            left_out += list(range(before, before + skip["num_steps"]))
        assert len(taken) == progress.step
        assert sorted(taken + left_out) == list(range(progress.data_step))


def commit(root: Path, progress: Progress) -> None:
    identity = Identity({"global_batch": 8}, "abc", "", 1, 1, "fp32", 1)
    lease = acquire(root.parent, num_ranks=1)
    checkpoint.Saver(root, identity, {}, lease=lease, world=World(), keep=3).save(progress, lambda copy: lambda _: [])


def rewind(root: Path, progress: Progress, max_attempts: int = 3) -> Path | None:
    return checkpoint.rewind(root, progress, lease=acquire(root.parent, num_ranks=1), max_attempts=max_attempts)


# ---------------------------------------------------------------------------------------------- what a spike is


@given(LOSS, st.integers(0, 2 * WINDOW))
def test_a_constant_loss_is_no_spike(loss: float, count: int) -> None:
    assert not is_spike(loss, [loss] * count, 4)


@given(LOSS, st.floats(-0.9, 10), st.integers(32, WINDOW))
def test_an_even_drift_is_no_spike(start: float, slope: float, count: int) -> None:
    line = [start * (1 + slope * i / count) for i in range(count + 1)]
    assert not is_spike(line[-1], line[:-1], 4)


@given(st.lists(LOSS, min_size=32, max_size=WINDOW), st.floats(4, 100))
def test_a_spike_begins_at_the_threshold(recent: list[float], threshold: float) -> None:
    ordered = sorted(recent)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    away = sorted(abs(loss - middle) for loss in recent)
    spread = max((away[(len(away) - 1) // 2] + away[len(away) // 2]) / 2, 1e-3 * middle)
    assert is_spike(middle + 1.01 * threshold * spread, recent, threshold)
    assert not is_spike(middle + 0.99 * threshold * spread, recent, threshold)
    assert not is_spike(middle + 2 * threshold * spread, recent[:31], threshold)
    assert not is_spike(1e9, recent, 0)


def test_only_a_row_of_spikes_is_an_incident_and_skipped_steps_are_no_part_of_it() -> None:
    losses: list[float | None] = [1.0] * 40 + [9, 9, 1, 9, None, 9, 9, 9]
    assert followed(SpikeWatch(20, 3, True), losses) == [47]
    assert followed(SpikeWatch(20, 3, False), losses) == []


def followed(watch: SpikeWatch, losses: list[float | None]) -> list[int]:
    """The steps at which the run must go back; None stands for a step that was not applied."""
    progress, found = Progress(), []
    for loss in losses:
        progress.step += 1
        if watch.note(progress, StepResult(loss or float("nan"), loss is not None, False)):
            found.append(progress.step)
    assert len(progress.recent_losses) <= WINDOW
    return found
