"""Logging to the console and to training.log in the output folder."""

import logging
import sys
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


def start_console(*, is_main: bool, rank: int) -> None:
    """Log to the console: everything on rank 0, warnings on others. Rank 0 buffers the lines for the file."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    console = _BarFriendlyHandler()
    console.setFormatter(logging.Formatter("%(message)s" if is_main else f"[rank {rank}] %(message)s"))
    root.handlers = [console, MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)] if is_main else [console]


def _buffer() -> MemoryHandler | None:
    """Return the handler that buffers the lines logged before there is a file."""
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, MemoryHandler)), None)


def start_logging(output_dir: Path, *, is_main: bool, rank: int) -> Path | None:
    """Log to the console and, on rank 0, with all earlier lines, to OUTPUT/logs/[timestamp]_training.log."""
    root = logging.getLogger()
    early = _buffer()
    if early is None:
        start_console(is_main=is_main, rank=rank)
        early = _buffer()
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
    """Print lines to stdout, and write them to the log file as well."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    note(text)


def note(text: str) -> None:
    """Write lines to the log file only, if there is one; the console shows them by other means."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            for line in filter(None, text.splitlines()):
                handler.emit(logger.makeRecord(logger.name, logging.INFO, "", 0, line, (), None))


class _BarFriendlyHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001  (logging must never end a run)
            self.handleError(record)
