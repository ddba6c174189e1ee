"""The file of scores of photographs, and what a killed command leaves of it.

Each rank appends a line of JSON for each batch to OUTPUT.partial-RANK, and syncs it. The first line describes the job.
The same command reads these lines, drops a line that was cut by the kill, and computes the batches that are missing::

    {"detector": "3f5a...", "threshold": "d_eer", "num_images": 200, "micro_batch": 64, ...}
    {"batch": 0, "logits": [-1.25, null, ...], "codes": ["Success", "corrupt", ...], "boxes": [null, ...]}
    {"batch": 2, "logits": [0.5, ...

At the end OUTPUT and OUTPUT.json, the description, appear together, and the partial files are removed.

Column names are those of NIST's FATE MORPH, API 2.1: imageLabel, isMorph, score, returnCode.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.transforms.faces import NO_FACE, SEVERAL_FACES, SMALL_FACE, TURNED_FACE, Box
from trainer.detection.scoring import SUCCESS, Scores
from trainer.errors import DataError
from trainer.fault_tolerance.jobs import open_alone, refuse_other_job
from trainer.files import read_json, readable, write_together

COLUMNS = ("path", "imageLabel", "score", "isMorph", "returnCode", "reason", "faceBox")
RETURN_CODES = {
    "no_file": "InputLocationError",
    "empty": "ParseError",
    "not_an_image": "ParseError",
    "corrupt": "ParseError",
    "checksum": "ParseError",
    "unknown_range": "ParseError",
    "too_large": "RefuseInput",
    "too_small": "RefuseInput",
    NO_FACE: "FaceDetectionError",
    **dict.fromkeys((SEVERAL_FACES, SMALL_FACE, TURNED_FACE), "RefuseInput"),
}
"""Reason -> NIST's return code; any other reason is an ExtractError."""


def return_code(reason: str) -> str:
    """Return NIST's return code for a reason of `Scores.code_N`."""
    return SUCCESS if reason == SUCCESS else RETURN_CODES.get(reason, "ExtractError")


@dataclass(frozen=True, slots=True)
class Job:
    """What is scored, how, and where the scores go."""

    output: Path
    description: dict[str, Any]
    """Whatever the content of the output depends on; JSON-able."""

    @property
    def about(self) -> Path:
        """Return the path of the description beside the output."""
        return self.output.with_name(f"{self.output.name}.json")

    def partial(self, rank: int) -> Path:
        """Return the path of a rank's partial file."""
        return self.output.with_name(f"{self.output.name}.partial-{rank}")

    def partials(self) -> list[Path]:
        """List the partial files of an earlier start."""
        prefix = self.partial(0).name[:-1]
        return sorted(path for path in self.output.parent.glob("*") if path.name.startswith(prefix))

    def is_finished(self) -> bool:
        """Whether an earlier start has written the output.

        Raises:
            ConfigError: the output exists and is of another job.
        """
        if not self.output.exists():
            return False
        self._compare(read_json(self.about).get("job") or {}, self.output)
        return True

    def _compare(self, found: Mapping[str, Any], path: Path) -> None:
        refuse_other_job(self.description, found, setting="output", output=self.output, path=path)

    def read_partials(self) -> dict[int, dict[str, Any]]:
        """Return batch -> its line of an earlier start, and drop lines that a kill has cut.

        Raises:
            ConfigError: they are of another job.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in self.partials():
            with path.open("rb+") as file:
                lines = file.read().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith(b"\n")]
                file.truncate(sum(map(len, kept)))
            if kept:
                self._compare(json.loads(kept[0]), path)
                found |= {line["batch"]: line for line in map(json.loads, kept[1:])}
        return found

    def commit(
        self,
        names: Iterable[str],
        scores: Scores,
        more: Mapping[str, Any],
        render: Mapping[str, Any],
        others: Mapping[Path, str],
    ) -> None:
        """Write output, description and other files together, and remove the partial files.

        Raises:
            DataError: the storage fails; the partial files stay.
        """
        rows = score_rows(names, scores, **render)
        text = _as_csv(rows) if self.output.suffix == ".csv" else _as_json_lines(rows)
        about = json.dumps({"job": self.description} | dict(more), indent=1, allow_nan=False) + "\n"
        try:
            write_together({**others, self.about: about, self.output: text})
        except OSError as error:
            raise DataError(f"output {self.output} cannot be written ({error.strerror}): free space") from error
        self.remove_partials()

    def remove_partials(self) -> None:
        """Remove the partial files."""
        for path in self.partials():
            path.unlink(missing_ok=True)


class PartialFile:
    """The partial file of this rank, open for the rest of the command; one command at a time has it."""

    def __init__(self, job: Job, rank: int) -> None:
        """Open it.

        Raises:
            ConfigError: the folder cannot be written, or another command writes the same output.
        """
        self._file = open_alone(job.partial(rank), setting="output", output=job.output)
        self._job = job

    def begin(self) -> None:
        """Write the first line where the file is new."""
        if not os.fstat(self._file.fileno()).st_size:
            self._add(self._job.description)

    def add(self, batch: int, scores: Scores) -> None:
        """Append a batch, and sync it.

        Raises:
            DataError: the storage fails.
        """
        logits = [None if np.isnan(logit) else logit for logit in scores.logit_N.tolist()]
        boxes = [scores.face_boxes.get(i) for i in scores.sample_N.tolist()]
        line = {"batch": batch, "logits": logits, "codes": scores.code_N, "boxes": boxes}
        if scores.reconstruction_errors:
            line["errors"] = [scores.reconstruction_errors.get(i) for i in scores.sample_N.tolist()]
        self._add(line)

    def _add(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self._job.output} cannot be written ({error.strerror}): free space") from error

    def close(self) -> None:
        """Close it, and let another command have it."""
        self._file.close()


def scores_of(lines: Mapping[int, Mapping[str, Any]], micro_batch: int) -> Scores:
    """Join the lines of partial files."""
    samples: list[int] = []
    logits: list[float] = []
    codes: list[str] = []
    boxes: dict[int, Box] = {}
    errors: dict[int, float] = {}
    for batch, line in lines.items():
        mine = range(batch * micro_batch, batch * micro_batch + len(line["codes"]))
        samples += mine
        boxes |= {i: tuple(box) for i, box in zip(mine, line.get("boxes", ()), strict=False) if box}
        errors |= {i: error for i, error in zip(mine, line.get("errors", ()), strict=False) if error is not None}
        logits += [np.nan if logit is None else logit for logit in line["logits"]]
        codes += line["codes"]
    return Scores(np.array(samples, dtype=np.int64), np.array(logits, dtype=np.float64), codes, boxes, errors)


def score_rows(
    names: Iterable[str], scores: Scores, *, score_N: Sequence[float], threshold: float, label: str
) -> Iterator[dict[str, Any]]:
    """Yield one row an image, in the order of the images."""
    for sample, name, score, code in zip(scores.sample_N.tolist(), names, score_N, scores.code_N, strict=True):
        read, box = code == SUCCESS, scores.face_boxes.get(sample)
        yield {
            "path": readable(name),
            "imageLabel": label,
            "score": float(score) if read else None,
            "isMorph": bool(score >= threshold) if read else None,
            "returnCode": return_code(code),
            "reason": "" if read else code,
            "faceBox": [round(edge, 1) for edge in box] if box else None,
        }


def _as_csv(rows: Iterator[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        score, is_morph = row["score"], row["isMorph"]
        texts = {
            "score": "" if score is None else repr(score),
            "isMorph": "" if is_morph is None else str(is_morph).lower(),
            "faceBox": " ".join(map(repr, row["faceBox"] or ())),
        }
        writer.writerow((row | texts)[name] for name in COLUMNS)
    return file.getvalue()


def _as_json_lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
