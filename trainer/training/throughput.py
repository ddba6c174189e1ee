"""Step time, images per second, the share of peak FLOPs, and the time to go."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch

from trainer.distributed.hardware import dense_bf16_peak

_LONG_STEP_S, _STEPS_TO_FORECAST = 60.0, 6


class Forecast:
    """Estimates after the first steps of an attempt how long a step takes, and when the last one will be done."""

    def __init__(self, num_steps: int, *, clock: Callable[[], float] = time.time) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._done, self._start_s, self._was_given = 0, clock(), False

    def step_done(self) -> str | None:
        """Count a step; returns the estimate once: after six steps, or after the first one that takes a minute."""
        self._done += 1
        now = self._clock()
        taken_s = (now - self._start_s) / max(1, self._done - 1)
        if self._done == 1:  # a usual step does not wait for the workers' first batches
            self._start_s = now
        if self._was_given or (self._done != _STEPS_TO_FORECAST and taken_s < _LONG_STEP_S):
            return None
        self._was_given = True
        left_s = (self._num_steps - self._done) * taken_s
        end = datetime.fromtimestamp(now + left_s)
        return f"a step takes {taken_s:.3g} s: about {duration(left_s)} to go, until {end:%Y-%m-%d %H:%M}"


def duration(seconds: float) -> str:
    """Write a time in the unit that people would use."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


class Speedometer:
    """Rates over the steps since the last reading. Reading happens where the host waits for the device anyway."""

    def __init__(self, *, global_batch: int, flops_per_image: int, num_ranks: int) -> None:
        self._global_batch, self._num_ranks, self._flops_per_image = global_batch, num_ranks, flops_per_image
        self._start, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """Add time that the step waited for data."""
        self._waited_s += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of measuring, drawing and saving."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before

    def step_done(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the rates, memory, and MFU where the peak is known; the next reading starts from here."""
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


def _memory_gib() -> float:
    """Peak memory of this process: the GPU's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_gib()


def peak_resident_gib() -> float:
    """Return the most host memory that this process has held so far; NaN where the system does not report it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return math.nan


def forget_peak() -> float:
    """Let `peak_resident_gib` start again from what this process holds now, and return that [GiB]."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident_gib()


def peak_flops() -> float | None:
    """Return the dense bf16 peak of this GPU [FLOP/s]; None without a GPU that is known."""
    return dense_bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
