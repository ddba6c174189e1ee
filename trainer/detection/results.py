"""The files of an evaluation: scores while it runs, all results together at the end; and tables of the main figures.

A failure never loses what was computed before it: the scores of each finished pair of model and test set are written at
once to OUTPUT/[timestamp]_scores.partial.csv. That file is removed when the complete files are in place.
"""

import csv
import io
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trainer.detection.figures import ScoredSet
from trainer.detection.published import field_tables
from trainer.detection.scoring import SUCCESS
from trainer.errors import ConfigError, DataError
from trainer.files import write_together

_COLUMNS = ("model", "test_set", "key", "label", "attack", "score", "isMorph", "returnCode")


class Results:
    """The files of one evaluation, with a time stamp that is unique in its folder."""

    def __init__(self, output: Path) -> None:
        """Claim a time stamp and open the file of partial scores, before any work.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._stem, self._partial = _claim(output)
        except OSError as error:
            raise ConfigError(
                f"output_dir is {output}, which cannot be written ({error.strerror}): name another folder"
            ) from error
        self._rows: list[str] = []
        self._add(_text_of([_COLUMNS]))

    def path(self, name: str) -> Path:
        """Return the path of one of the files."""
        return self._stem.with_name(f"{self._stem.name}_{name}")

    def add(self, scored: ScoredSet, code_N: Sequence[str]) -> None:
        """Write the scores of one model on one test set to the disk."""
        self._add(_text_of(score_rows(scored, code_N)))

    def commit(self, evaluation: str, report: str, others: Mapping[Path, str]) -> None:
        """Put all files in place, or none if the storage fails."""
        files = {
            self.path("eval.json"): evaluation,
            self.path("scores.csv"): "".join(self._rows),
            self.path("report.html"): report,
        }
        try:
            write_together(files | dict(others))
        except OSError as error:
            raise DataError(f"the results cannot be written ({error}): free space or name another folder") from error
        Path(self._partial.name).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._partial.close()
        path = Path(self._partial.name)
        if kind is None:
            return
        if len(self._rows) > 1:
            print(f"\nThe scores that were computed are in {path}", file=sys.stderr)
        else:
            path.unlink(missing_ok=True)

    def _add(self, text: str) -> None:
        self._rows.append(text)
        try:
            self._partial.write(text)
            self._partial.flush()
            os.fsync(self._partial.fileno())
        except OSError as error:
            raise DataError(f"{self._partial.name} cannot be written ({error.strerror}): free space") from error


def score_rows(scored: ScoredSet, code_N: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return one row an image, with the columns of NIST's FATE MORPH (isMorph, score, return code)."""
    threshold = np.inf if scored.threshold is None else scored.threshold
    columns = (scored.key_N, scored.label_N.tolist(), scored.tool_N, scored.score_N.tolist(), code_N)
    rows: list[tuple[Any, ...]] = []
    for key, label, tool, value, code in zip(*columns, strict=True):
        decision = (f"{value:.6f}", str(bool(value >= threshold)).lower()) if code == SUCCESS else ("", "")
        rows.append((scored.model, scored.test_set, key, label, tool, *decision, code))
    return rows


def terminal_table(evaluation: Mapping[str, Any]) -> str:
    """Write the main figures for a terminal, and the field's table of each test set that several tools made."""
    rows = [("model", "test set", "D-EER [95 % interval]", "BSCER@MACER=0.10", "AUC", "worst tool")]
    for name, result in _results_of(evaluation):
        pooled, worst = result["summary"]["pooled"], result["summary"]["worst"]
        rows.append(
            (
                name,
                result["test_set"],
                _percent_and_interval(pooled["d_eer"], " %"),
                f"{100 * pooled['bscer_at_macer']['0.10']['bscer']:.1f} %",
                f"{pooled['auc']['value']:.3f}",
                f"{worst['d_eer_tool']} {100 * worst['d_eer']:.1f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tables = field_tables(evaluation)
    return "\n".join(lines + (["", tables] if tables else []))


def markdown_table(evaluation: Mapping[str, Any]) -> str:
    """Write the D-EER of every detector on every test set as a Markdown table; the lowest of a test set is bold."""
    sets = [test_set["name"] for test_set in evaluation["test_sets"]]
    cells = {(name, r["test_set"]): r["summary"]["pooled"]["d_eer"] for name, r in _results_of(evaluation)}
    lowest = {s: min((eer["value"] for (_, at), eer in cells.items() if at == s), default=None) for s in sets}

    def cell(name: str, test_set: str) -> str:
        eer = cells.get((name, test_set))
        return "-" if eer is None else _percent_and_interval(eer, "", bold=eer["value"] == lowest[test_set])

    head = ["D-EER in %, 95 % interval", *sets]
    rows = [[name, *(cell(name, test_set) for test_set in sets)] for name in dict.fromkeys(name for name, _ in cells)]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |\n" for line in lines)


def _results_of(evaluation: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(result["model"], result) for result in evaluation["results"]]
    return found + [(row["name"], row) for row in evaluation["baselines"]]


def _percent_and_interval(eer: Mapping[str, Any], unit: str, *, bold: bool = False) -> str:
    value = f"{100 * eer['value']:.1f}{unit}"
    interval = f" [{100 * eer['ci'][0]:.1f}, {100 * eer['ci'][1]:.1f}]" if eer["ci"] else ""
    return (f"**{value}**" if bold else value) + interval


def _claim(output: Path) -> tuple[Path, io.TextIOWrapper]:
    """Open the partial scores with the first free time stamp; two evaluations may start in the same second."""
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in itertools.count(1):
        stamp = now if number == 1 else f"{now}-{number}"
        if not any(output.glob(f"{stamp}_*")):
            try:
                path = output / f"{stamp}_scores.partial.csv"
                file = path.open("x", encoding="utf-8", errors="backslashreplace", newline="")
            except FileExistsError:
                continue
            return output / stamp, file
    raise AssertionError


def _text_of(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
