"""A trace of some steps by torch.profiler: what the CPU and the GPU of rank 0 do, kernel by kernel.

The trace is in Chrome's format, which https://ui.perfetto.dev opens. The training computes the same; profiled steps
take longer.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger(__name__)
_ROWS = 40


class StepProfiler:
    """Profiles the steps ``first`` to ``last`` of rank 0, as far as this start of the run makes them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, is_main: bool) -> None:
        """Profile nothing if ``steps`` is None, and on other ranks than 0."""
        self._steps, self._folder = steps if is_main else None, folder
        self._running: profile | None = None
        self._range: record_function | None = None
        self._first = 0

    def before_step(self, step: int) -> None:
        """Call before each step, counted from 1: starts, names the step in the trace, or writes the trace."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self.close()
            self._steps = None
        elif step >= first:
            if self._running is None:
                self._start(step)
            self._end_range()
            self._range = record_function(f"training step {step}")
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Write what was profiled, if anything was. A file that cannot be written costs the trace, not the run."""
        if self._running is None:
            return
        self._end_range()
        running, self._running = self._running, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels of the last step are still queued
        running.stop()
        assert self._steps is not None
        path = self._folder / f"rank-0-steps-{self._first}-{self._steps[1]}.pt.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(path))
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = running.key_averages().table(sort_by=by, row_limit=_ROWS)
            path.with_name(path.name.replace(".pt.trace.json.gz", ".txt")).write_text(table)
        except (OSError, RuntimeError) as error:
            logger.warning("the trace of the profiled steps cannot be written to %s (%s)", path, error)
            return
        logger.info("trace of steps %d to %d: %s, for https://ui.perfetto.dev", self._first, self._steps[1], path)

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._first, self._running = step, profile(activities=activities)
        self._running.start()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
