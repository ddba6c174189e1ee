import json
import logging
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.fault_tolerance.attempts import Lease, acquire
from trainer.fault_tolerance.ledger import Ledger
from trainer.log import note, print_and_log, start_console, start_logging
from trainer.training.monitor import Monitor, charts, hyperparameters
from trainer.training.throughput import Speedometer

pytestmark = pytest.mark.filterwarnings("ignore")  # tensorboard's own

LEASE = Lease(Path("nowhere"))
VALUES = {"loss": 0.5, "lr": 1e-3, "images_per_s": 10.0, "grad_norm": float("nan")}


def monitor_of(output: Path, **steps: int) -> Monitor:
    return Monitor(output, lease=acquire(output, num_ranks=1), is_main=True, progress_bar=False, **steps)


def test_numbers_and_pictures_reach_every_sink(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, first_step=0, total_steps=2)
    monitor.scalars(1, VALUES)
    monitor.scalars(2, {"loss": 0.25}, group="val")
    monitor.picture(2, "faces", torch.zeros(3, 8, 16, dtype=torch.uint8))
    monitor.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= time.time() - row.pop("time") < 60 for row in rows)
    assert rows == [
        {"step": 1, "loss": 0.5, "lr": 1e-3, "images_per_s": 10.0, "grad_norm": None},
        {"step": 2, "val_loss": 0.25},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [0.5]
    assert board.Images("faces")[0].width == 16
    assert (tmp_path / "pictures" / "step-00000002.png").exists()


def test_a_resumed_monitor_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for first in (0, 1):
        monitor = Monitor(
            tmp_path,
            lease=acquire(tmp_path, num_ranks=1),
            first_step=first,
            total_steps=3,
            is_main=True,
            progress_bar=False,
        )
        for step in range(first + 1, 4):
            monitor.scalars(step, VALUES | {"loss": float(step + 10 * first)})
        monitor.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 12.0), (3, 13.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "out", lease=LEASE, first_step=0, total_steps=2, is_main=False, progress_bar=False)
    monitor.scalars(1, VALUES)
    monitor.close()
    assert not (tmp_path / "out").exists()


def test_the_ledger_keeps_step_position_and_key(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", lease=acquire(tmp_path, num_ranks=1), first_step=0, rank=3)
    ledger.consumed(7, [56, 57], ["a", "b"])
    ledger.close()
    rows = [json.loads(line) for line in (tmp_path / "l" / "rank-00003.jsonl").read_text().splitlines()]
    assert rows == [{"step": 7, "position": 56, "key": "a"}, {"step": 7, "position": 57, "key": "b"}]


def test_rates_count_from_the_last_reading() -> None:
    speed = Speedometer(global_batch=4, flops_per_image=10, num_ranks=1)
    speed.waited(1e9)
    for _ in range(3):
        speed.step_done()
    first = speed.read()
    assert first["data_wait_share"] == 1.0
    assert first["images_per_s"] == pytest.approx(4 / first["step_s"])
    assert speed.read()["data_wait_share"] == 0.0


def test_the_log_file_holds_what_was_said_before_it_existed_and_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    try:
        start_console(is_main=True, rank=0)
        logging.getLogger("a").info("the device")
        path = start_logging(tmp_path, is_main=True, rank=0)
        logging.getLogger("b").warning("the data")
        print_and_log("\nFinished.\n  checkpoint x")
        note("error: told elsewhere")
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers, root.level = handlers, level
    assert path is not None
    lines = [line.partition(": ")[2] for line in path.read_text().splitlines()]
    assert lines == ["the device", "the data", "Finished.", "  checkpoint x", "error: told elsewhere"]
    assert capsys.readouterr().out == "\nFinished.\n  checkpoint x\n"


def test_the_epoch_stands_beside_the_step(tmp_path: Path) -> None:
    lease = acquire(tmp_path, num_ranks=1)
    options = {"first_step": 0, "total_steps": 4, "is_main": True, "progress_bar": False}
    monitor = Monitor(tmp_path, lease=lease, epoch_at=lambda step: step / 3, **options)  # type: ignore[arg-type]
    monitor.scalars(2, VALUES)
    monitor.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["epoch"] == 0.666667


def test_tensorboard_draws_only_charts_whose_numbers_a_run_records() -> None:
    """A detector's loss is no masked error, and a run without probes has no empty frames of them."""
    assert charts({"train/loss"}) == {}
    assert list(charts({"train/loss", "val/loss", "val/d_eer"})["validation"]) == ["loss", "detection error"]
    pretraining = charts({"train/loss", "val/loss", "val/mean_face_loss"})
    assert pretraining["validation"]["masked error"] == ["Multiline", ["val/loss", "val/mean_face_loss"]]
    assert "probe" not in pretraining


def test_a_learning_rate_that_does_not_count_is_no_hyperparameter() -> None:
    given = {"learning_rate": 0.003, "base_learning_rate": 0.00015, "max_steps": None, "lora_target_modules": ["q"]}
    assert hyperparameters(given) == {"learning_rate": 0.003, "max_steps": "none", "lora_target_modules": "['q']"}
    assert hyperparameters(given | {"learning_rate": None}).keys() == given.keys() - {"learning_rate"}
