"""What people see of a run: progress bar, metrics.jsonl, TensorBoard, the log file, the sample ledger.

Only rank 0 writes, except for the ledger, of which every rank keeps its own file. Nothing here waits for the device:
values arrive as floats, and arrive at logging steps only.

After a resume, records of steps beyond the checkpoint are cut away, so that every file tells the story of the
weights that exist.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm.auto import tqdm

from trainer.lease import Lease
from trainer.progress import Progress

logger = logging.getLogger(__name__)

_DENSE_BF16_PEAK = {
    # FLOP/s without sparsity, from NVIDIA's data sheets; the first name found in the device name counts.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


_LONG_STEP_S, _STEPS_TO_TELL = 60.0, 6
_CHARTS = {
    "held-out": {"masked error": ["Multiline", ["heldout/loss", "heldout/mean_face_loss"]]},
    "validation": {"error rates": ["Multiline", ["val/d_eer"]], "loss": ["Multiline", ["train/loss", "val/loss"]]},
}
"""TensorBoard's custom scalars: what belongs into one chart."""
_COMPARED = ("train/loss", "heldout/loss", "val/d_eer", "val/loss")
"""Numbers beside the hyperparameters."""


def start_console(*, is_main: bool, rank: int) -> None:
    """Send the log to the console: of rank 0 all of it, of others the warnings. What it says is kept for the file."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    console = _BarFriendlyHandler()
    console.setFormatter(logging.Formatter("%(message)s" if is_main else f"[rank {rank}] %(message)s"))
    root.handlers = [console, MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)] if is_main else [console]


def _held_back() -> MemoryHandler | None:
    """Return what keeps the lines that were said before there was a file."""
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, MemoryHandler)), None)


def start_logging(output_dir: Path, *, is_main: bool, rank: int) -> Path | None:
    """Send the log to the console and, on rank 0, with all said so far to OUTPUT/logs/[timestamp]_training.log."""
    root = logging.getLogger()
    early = _held_back()
    if early is None:
        start_console(is_main=is_main, rank=rank)
        early = _held_back()
    if not is_main or early is None:
        return None
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_training.log"
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    early.setTarget(file)
    early.flush()
    root.removeHandler(early)
    root.addHandler(file)
    return path


def print_and_log(text: str) -> None:
    """Print lines for people, and keep them in the log file as well."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    note(text)


def note(text: str) -> None:
    """Write lines into the log file, where there is one, that the console has from elsewhere."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            for line in filter(None, text.splitlines()):
                handler.emit(logger.makeRecord(logger.name, logging.INFO, "", 0, line, (), None))


class Forecast:
    """Says after the first steps of an attempt how long a step takes, and when the last one will be done."""

    def __init__(self, num_steps: int, *, clock: Callable[[], float] = time.time) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._done, self._start_s, self._told = 0, clock(), False

    def step_done(self) -> str | None:
        """Count a step; returns the words once: after six steps, or after the first one that takes minutes."""
        self._done += 1
        now = self._clock()
        taken_s = (now - self._start_s) / max(1, self._done - 1)
        if self._done == 1:  # a usual step does not wait for the workers' first batches
            self._start_s = now
        if self._told or (self._done != _STEPS_TO_TELL and taken_s < _LONG_STEP_S):
            return None
        self._told = True
        left_s = (self._num_steps - self._done) * taken_s
        end = datetime.fromtimestamp(now + left_s)
        return f"a step takes {taken_s:.3g} s: about {duration(left_s)} to go, until {end:%Y-%m-%d %H:%M}"


def duration(seconds: float) -> str:
    """Write a time in the unit that people would use."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


class Monitor:
    """Rank 0's view of the run; on other ranks every method does nothing."""

    def __init__(
        self,
        output_dir: Path,
        *,
        lease: Lease,
        first_step: int,
        total_steps: int,
        is_main: bool,
        progress_bar: bool,
        epoch_at: Callable[[int], float] | None = None,
        last_step: int | None = None,
    ) -> None:
        """Open the sinks and cut away what lies beyond ``first_step``, and what an older attempt may yet write.

        Args:
            output_dir: of the run.
            lease: the right of this attempt to change it.
            first_step: where this attempt begins.
            total_steps: length of the schedule.
            is_main: whether this is rank 0.
            progress_bar: whether to draw one.
            epoch_at: passes over the training set after a step; none leaves them out.
            last_step: where this attempt ends, if before the schedule does.
        """
        self._is_main = is_main
        if not is_main:
            return
        self._epoch_at = epoch_at
        self._forecast = Forecast((last_step or total_steps) - first_step)
        self._pictures = output_dir / "pictures"
        metrics = output_dir / "metrics.jsonl"
        self._metrics = lease.append_to(metrics, rows_until(metrics, first_step))
        for events in (output_dir / "tensorboard").glob("events.*"):
            lease.detach(events)
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._progress = Progress(total_steps, initial=first_step, unit="step", shown=progress_bar)
        self._board.add_custom_scalars(_CHARTS)

    def describe(self, step: int, texts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Show in TensorBoard what runs: texts, and the settings as hyperparameters, by which runs compare."""
        if not self._is_main:
            return
        for name, text in texts.items():
            self._board.add_text(f"run/{name}", text, step)
        plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(_COMPARED, 0.0)):  # type: ignore[no-untyped-call]
            self._board._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def step_done(self) -> None:
        """Move the bar, and say once when the run will end."""
        if self._is_main:
            self._progress.update()
            if text := self._forecast.step_done():
                logger.info("%s", text)

    def scalars(self, step: int, values: Mapping[str, float], *, group: str = "train") -> None:
        """Record numbers of one step in metrics.jsonl and TensorBoard, and the main ones in the bar."""
        if not self._is_main:
            return
        prefix = "" if group == "train" else f"{group}_"
        row = {"step": step} | {prefix + name: _plain(value) for name, value in values.items()}
        if self._epoch_at is not None:
            row["epoch"] = round(self._epoch_at(step), 6)
        row["time"] = round(time.time(), 3)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        if group == "train":
            self._progress.note(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_s']:.0f}")

    def precision_recall(self, step: int, name: str, label_N: Any, score_N: Any) -> None:
        """Draw in TensorBoard how precision falls as more attacks are found.

        Args:
            step: when.
            name: of the curve.
            label_N: 1 for attacks, 0 otherwise.
            score_N: probability of an attack, in [0, 1].
        """
        if self._is_main:
            self._board.add_pr_curve(name, label_N, score_N, step)

    def picture(self, step: int, name: str, image_CHW: torch.Tensor, *, file: str = "step") -> None:
        """Record a uint8 picture in TensorBoard and as OUTPUT/pictures/step-XXXXXXXX.png, or another word than step."""
        if self._is_main:
            self._board.add_image(name, image_CHW, step)
            self._pictures.mkdir(exist_ok=True)
            Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(self._pictures / f"{file}-{step:08d}.png")

    def flush(self) -> None:
        """Bring everything recorded so far to disk; called with each checkpoint."""
        if self._is_main:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._board.flush()

    def close(self) -> None:
        """Close the sinks."""
        if self._is_main:
            self.flush()
            self._progress.close()
            self._board.close()
            self._metrics.close()


class Ledger:
    """JSON lines {step, position, key} of every sample that this rank's optimizer steps consumed."""

    def __init__(self, folder: Path | None, *, lease: Lease, first_step: int, rank: int) -> None:
        """Open this rank's file; rows beyond ``first_step`` belong to weights that no longer exist."""
        self._file: TextIO | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _ledger_name(rank)
            self._file = lease.append_to(path, rows_until(path, first_step))

    def consumed(self, step: int, positions: Iterable[int], keys: Iterable[str]) -> None:
        """Note samples after their optimizer step; buffered until `flush`."""
        if self._file is not None:
            rows = (
                {"step": step, "position": position, "key": key} for position, key in zip(positions, keys, strict=True)
            )
            self._file.writelines(json.dumps(row) + "\n" for row in rows)

    def flush(self) -> None:
        """Bring the rows to disk; a checkpoint is committed only after this."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self.flush()
            self._file.close()


class Speedometer:
    """Rates over the steps since the last reading. Reading happens where the host waits for the device anyway."""

    def __init__(self, *, global_batch: int, flops_per_image: int, num_ranks: int) -> None:
        self._global_batch, self._num_ranks, self._flops_per_image = global_batch, num_ranks, flops_per_image
        self._start, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """Add time that the step waited for data."""
        self._waited_s += seconds

    def step_done(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return images/s, step time, data-wait share, memory, and MFU where the peak is known; start anew."""
        now = time.perf_counter()
        elapsed, steps = max(now - self._start, 1e-9), max(self._steps, 1)
        images_per_s = self._steps * self._global_batch / elapsed
        values = {
            "images_per_s": images_per_s,
            "step_s": elapsed / steps,
            "data_wait_share": min(1.0, self._waited_s / elapsed),
            "memory_gib": _memory_gib(),
        }
        peak = peak_flops()
        if peak:
            values["mfu"] = images_per_s * self._flops_per_image / (peak * self._num_ranks)
        self._start, self._waited_s, self._steps = now, 0.0, 0
        return values


def rows_until(path: Path, step: int) -> str:
    """Return the JSON lines of a file up to a step, without later ones and a torn last line; "" where there is none."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the process was killed in the middle of this line
    return "".join(kept)


def cut_other_ledgers(folder: Path | None, step: int, *, lease: Lease, num_ranks: int) -> None:
    """Cut the ledgers of ranks that the resumed run no longer has; the others cut their own."""
    ours = {_ledger_name(rank) for rank in range(num_ranks)}
    for path in sorted(folder.glob("rank-*.jsonl")) if folder else []:
        if path.name not in ours:
            lease.write(path, rows_until(path, step))


def _ledger_name(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"


def _memory_gib() -> float:
    """Peak memory of this process: the GPU's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_gib()


def peak_resident_gib() -> float:
    """Return the most host memory that this process has held so far; NaN where the system does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return math.nan


def peak_flops() -> float | None:
    """Return the dense bf16 peak of this GPU [FLOP/s]; None without a GPU that is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in _DENSE_BF16_PEAK.items() if key in name), None)


def _plain(value: Any) -> Any:
    """JSON has no NaN; a missing number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _BarFriendlyHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001  (logging must never end a run)
            self.handleError(record)
