"""The exact record of the samples that the optimizer has consumed, across kills and resumes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from trainer.fault_tolerance.attempts import Lease


class Ledger:
    """One JSON line {step, position, key} for each sample that this rank's optimizer steps consumed."""

    def __init__(self, folder: Path | None, *, lease: Lease, first_step: int, rank: int) -> None:
        """Open this rank's file without the rows after ``first_step``: the weights of those steps are lost."""
        self._file: TextIO | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _ledger_name(rank)
            self._file = lease.append_to(path, rows_until(path, first_step))

    def consumed(self, step: int, positions: Iterable[int], keys: Iterable[str]) -> None:
        """Record samples after their optimizer step; buffered until `flush`."""
        if self._file is not None:
            rows = (
                {"step": step, "position": position, "key": key} for position, key in zip(positions, keys, strict=True)
            )
            self._file.writelines(json.dumps(row) + "\n" for row in rows)

    def flush(self) -> None:
        """Write the rows to disk; a checkpoint is committed only after this."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self.flush()
            self._file.close()


def rows_until(path: Path, step: int) -> str:
    """Return a file's JSON lines up to a step, without later ones and without a torn last line; "" if it is missing."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the process was killed in the middle of this line
    return "".join(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, without a torn last line; [] if it is missing.

    Release 0.2 called the validation of pre-training ``heldout_...``; here such names begin with ``val_``.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the run may be writing the last one
    return [{name.replace("heldout_", "val_", 1): value for name, value in row.items()} for row in rows]


def cut_other_ledgers(folder: Path | None, step: int, *, lease: Lease, num_ranks: int) -> None:
    """Cut the ledgers of ranks that the resumed run no longer has; each rank cuts its own."""
    current = {_ledger_name(rank) for rank in range(num_ranks)}
    for path in sorted(folder.glob("rank-*.jsonl")) if folder else []:
        if path.name not in current:
            lease.write(path, rows_until(path, step))


def _ledger_name(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"
