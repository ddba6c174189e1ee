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
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
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


def start_logging(output_dir: Path, *, is_main: bool, rank: int) -> Path | None:
    """Send the log to the console and OUTPUT/logs/[timestamp]_training.log on rank 0, warnings of others to stderr."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    console = _BarFriendlyHandler()
    console.setFormatter(logging.Formatter("%(message)s" if is_main else f"[rank {rank}] %(message)s"))
    root.handlers = [console]
    if not is_main:
        return None
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_training.log"
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    return path


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
    ) -> None:
        """Open the sinks and cut away what lies beyond ``first_step``, and what an older attempt may yet write."""
        self._is_main = is_main
        if not is_main:
            return
        self._pictures = output_dir / "pictures"
        metrics = output_dir / "metrics.jsonl"
        self._metrics = lease.append_to(metrics, rows_until(metrics, first_step))
        for events in (output_dir / "tensorboard").glob("events.*"):
            lease.detach(events)
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._progress = Progress(total_steps, initial=first_step, unit="step", shown=progress_bar)

    def step_done(self) -> None:
        """Move the bar."""
        if self._is_main:
            self._progress.update()

    def scalars(self, step: int, values: Mapping[str, float], *, group: str = "train") -> None:
        """Record numbers of one step in metrics.jsonl and TensorBoard, and the main ones in the bar."""
        if not self._is_main:
            return
        prefix = "" if group == "train" else f"{group}_"
        row = {"step": step} | {prefix + name: _plain(value) for name, value in values.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        if group == "train":
            self._progress.note(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_s']:.0f}")

    def picture(self, step: int, name: str, image_CHW: torch.Tensor) -> None:
        """Record a uint8 picture in TensorBoard and as OUTPUT/pictures/step-XXXXXXXX.png."""
        if self._is_main:
            self._board.add_image(name, image_CHW, step)
            self._pictures.mkdir(exist_ok=True)
            Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(self._pictures / f"step-{step:08d}.png")

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
