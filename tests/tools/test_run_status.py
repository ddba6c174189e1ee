"""How a run stands is read from its folder: of a real run alive, killed, and finished; and what its records hold."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import ROOT, TINY, argv_of, forks, launch, metrics
from tools import run_status
from trainer.config.command_line import call
from trainer.fault_tolerance.attempts import Lease, acquire, attempts_of


def asked(words: list[str]) -> int:
    return call(run_status.main, run_status.CLI, words)


def test_a_folder_without_a_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(["--run", str(tmp_path)]) == 2
    assert "holds no run: name the output_dir" in capsys.readouterr().err


def an_attempt(output: Path, *, host: str, began: int | None = 0, end: str = "") -> Lease:
    lease = acquire(output, num_ranks=1)
    told = json.loads((lease.folder / "lease.json").read_text()) | {"host": host}
    (lease.folder / "lease.json").write_text(json.dumps(told))
    if began is not None:
        lease.began(began, 40)
    if end:
        lease.ended(end)
    return lease


def test_another_hosts_run_is_alive_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    an_attempt(tmp_path, host="elsewhere")
    beats = tmp_path / "logs" / "heartbeats"
    beats.mkdir(parents=True)
    (beats / "rank-00000.json").write_text(json.dumps({"gone": False, "host": "elsewhere"}))
    assert run_status.status_of(tmp_path).state == "running"
    os.utime(beats / "rank-00000.json", (0, time.time() - 60))
    assert run_status.status_of(tmp_path).state == "interrupted"
    (beats / "rank-00000.json").write_text(json.dumps({"gone": True, "host": "elsewhere"}))
    assert run_status.status_of(tmp_path).state == "interrupted"


def test_every_attempt_and_its_end_is_listed(tmp_path: Path) -> None:
    an_attempt(tmp_path, host="a", end="stopped by a signal")
    an_attempt(tmp_path, host="b", began=None, end="refused: the data are rotten")
    told = "\n".join(run_status.describe(tmp_path, run_status.status_of(tmp_path)))
    assert f"{tmp_path}: interrupted at step 0 of 40" in told
    assert "on a, 1 rank, from step 0: stopped by a signal" in told
    assert "on b, 1 rank, ended before its first step: refused: the data are rotten" in told
    assert "checkpoint  none yet" in told
    assert [attempt.number for attempt in attempts_of(tmp_path)] == [1, 2]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_is_running_then_killed_then_finished_and_its_records_say_what_ran(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = TINY | {"data": f"{shards}/*.tar", "output_dir": str(output), "epochs": "12", "save_every": "2"}
    run = forks().start(ROOT / "launch" / "pretrain.py", argv_of(words), tmp_path / "log")
    run.until(lambda: list(output.glob("checkpoints/step-*")))
    assert asked(["--run", str(output)]) == run_status.EXIT_RUNNING, (tmp_path / "log").read_text()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert asked(["--run", str(output)]) == run_status.EXIT_INTERRUPTED_RUN
    told = capsys.readouterr().out
    assert f"{output}: running at step" in told
    assert f"{output}: interrupted at step" in told
    assert "of 96" in told
    assert "killed or crashed: see its log" in told
    assert f"go on with  cd {ROOT} && python {ROOT}/launch/pretrain.py --recipe demo" in told

    done = launch(words | {"stop_at_step": "96"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert asked(["--run", str(output)]) == 0
    assert f"{output}: finished, 96 steps" in capsys.readouterr().out

    start = json.loads((output / "recipe.json").read_text())["start"]
    assert start["recipe_name"] == "demo"
    assert start["command"].endswith("--stop_at_step 96")
    assert start.keys() == {"recipe_name", "command", "folder", "git_commit", "host", "time", "num_ranks"}
    rows = metrics(output)
    assert [row["epoch"] for row in rows] == [pytest.approx(row["step"] * 8 / 64) for row in rows]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 3600
    log = max(output.glob("logs/*_training.log")).read_text()
    for line in (*done.stdout.splitlines(), "device: ", "96 steps of 8 images", "a step takes"):
        assert line.strip() in log, "the log file lacks a line of the console"
    board = EventAccumulator(str(output / "tensorboard")).Reload()
    shown = {name: board.Tensors(f"run/{name}/text_summary")[0] for name in ("recipe", "start")}
    text = {name: event.tensor_proto.string_val[0] for name, event in shown.items()}
    assert b"| mask_ratio | `0.75` |" in text["recipe"]
    assert b"pretrain.py --recipe demo" in text["start"]
    plugins = {data.plugin_data.plugin_name for data in board.summary_metadata.values()}
    assert {"hparams", "custom_scalars", "text"} <= plugins
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 97))
