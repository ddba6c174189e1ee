"""Features on disk: parts that ranks write whole, and an index that appears when all are there.

Layout of OUTPUT::

    features.json            the index, written last: what was computed, from what; files with sha256; counts
    part-00000.safetensors   each feature as an array (n, D); with --format npy part-00000.FEATURE.npy for each
    part-00000.jsonl         n lines, one a sample: key, shard, label, identity ... or the reason for no features
    features.partial.json    until the end: the job that the parts are of

Part p holds the samples p * n to (p + 1) * n - 1 in the order of the images, so parts depend neither on the number of
ranks nor on interruptions. A sample that could not be read has a row of NaN and a reason.

Shapes: N samples of all parts, n of one part, D width.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainer.errors import ConfigError, DataError
from trainer.fault_tolerance.jobs import open_alone, refuse_other_job
from trainer.files import atomic_draft, describe_files, read_json, readable, write_atomically

FORMAT_VERSION = 1
INDEX, PARTIAL = "features.json", "features.partial.json"
DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
REASON = "reason"
"""Of a row: why the sample has no features."""

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Features:
    """Features of images, and what is known of the images."""

    values_ND: Array
    """float32, or float16 as they were stored; a row of NaN where the image could not be read."""
    rows: list[dict[str, Any]]
    """Of each sample ``key``; ``shard``, ``label``, ``identity`` and so on where known; ``reason`` if unreadable."""
    about: dict[str, Any]
    """The index: what was computed, from what."""

    @property
    def keys(self) -> list[str]:
        """The key of each sample."""
        return [str(row["key"]) for row in self.rows]

    @property
    def is_readable(self) -> NDArray[np.bool_]:
        """Whether each sample has features, bool (N,)."""
        return np.array([REASON not in row for row in self.rows], dtype=bool)

    def field(self, name: str) -> list[Any]:
        """Return a field of each sample; None where it has none."""
        return [row.get(name) for row in self.rows]


def read_features(folder: str | Path, feature: str = "") -> Features:
    """Read one feature of all samples, in the order of the images.

    Args:
        folder: an output_dir of launch/embed.py.
        feature: its name, such as "mean"; empty takes the only one, or the first.

    Returns:
        features: values (N, D) and a row for each sample.

    Raises:
        ConfigError: there are no features, they are unfinished, or have no such name.
        DataError: a file is missing, cut or changed.
    """
    folder = Path(folder).expanduser()
    about = read_json(folder / INDEX)
    if not about:
        raise ConfigError(f"{folder} {_what_is_missing(folder)}")
    feature = feature or next(iter(about["features"]))
    if feature not in about["features"]:
        raise ConfigError(f"{folder} has no feature {feature!r}: choose {' or '.join(about['features'])}")
    _check_lengths(folder, about["files"])
    values: list[Array] = []
    rows: list[dict[str, Any]] = []
    for part in range(about["num_parts"]):
        values.append(_read_array(folder, part, feature, about["format"]))
        rows += _read_rows(_rows_path(folder, part))
    values_ND = np.concatenate(values)
    if not len(values_ND) == len(rows) == about["num_samples"]:
        raise DataError(f"{folder} holds {len(rows)} of {about['num_samples']} samples: compute the features again")
    return Features(values_ND, rows, about)


@dataclass(frozen=True, slots=True)
class FeatureStore:
    """The output of one computation of features."""

    folder: Path
    job: dict[str, Any]
    """Whatever the files depend on; JSON-able. Needs num_samples, part_samples, dtype, format and features (to D)."""

    @property
    def num_parts(self) -> int:
        """Number of parts, the last of which may be shorter."""
        return -(-int(self.job["num_samples"]) // int(self.job["part_samples"]))

    def is_finished(self) -> bool:
        """Whether an earlier start has computed all of it.

        Raises:
            ConfigError: the folder holds the output of another job, or other files.
        """
        index = self.folder / INDEX
        if index.exists():
            self._compare(read_json(index).get("job") or {}, index)
            return True
        if not (self.folder / PARTIAL).exists() and self.folder.is_dir():
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if others:
                raise ConfigError(f"output_dir is {self.folder}, but it holds other files ({others[0]}): name another")
        return False

    def begin(self) -> BinaryIO:
        """Say in the folder which job it is of, and keep other commands from it until the file is closed.

        Raises:
            ConfigError: another job has begun there, another command writes there, or nobody may.
        """
        file = open_alone(self.folder / PARTIAL, setting="output_dir", output=self.folder)
        found = read_json(self.folder / PARTIAL)
        try:
            if found:
                self._compare(found, self.folder / PARTIAL)
            else:  # new, or cut by a kill
                file.truncate(0)
                file.write(json.dumps(self.job).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except ConfigError:
            file.close()
            raise
        except OSError as error:
            raise self._failed(error) from error
        return file

    def done_parts(self) -> list[int]:
        """List the parts that an earlier start has written."""
        # The rows are written after the arrays.
        return [part for part in range(self.num_parts) if _rows_path(self.folder, part).exists()]

    def write_part(self, part: int, values: Mapping[str, Array], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part: its arrays, then its rows.

        Args:
            part: its number.
            values: feature -> (n, D), converted to the job's type of numbers.
            rows: of its samples.

        Raises:
            DataError: the storage fails.
        """
        arrays = {name: np.ascontiguousarray(array, DTYPES[self.job["dtype"]]) for name, array in values.items()}
        text = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
        try:
            if self.job["format"] == "safetensors":
                with atomic_draft(_array_path(self.folder, part, "", "safetensors")) as draft:
                    save_file(arrays, draft)
            else:
                for name, array in arrays.items():
                    with atomic_draft(_array_path(self.folder, part, name, "npy")) as draft, draft.open("wb") as file:
                        np.save(file, array)
            write_atomically(_rows_path(self.folder, part), text)
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from error

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index; returns it.

        Args:
            more: what it says beside the job and its files.

        Raises:
            DataError: a part is missing or has other samples, or the storage fails.
        """
        reasons: Counter[str] = Counter()
        names, num_rows = [], 0
        for part in range(self.num_parts):
            rows = _read_rows(_rows_path(self.folder, part))
            num_rows += len(rows)
            reasons.update(row[REASON] for row in rows if REASON in row)
            names += [_rows_path(self.folder, part).name, *self._array_names(part)]
        files = describe_files(self.folder, only=names)
        if num_rows != self.job["num_samples"] or len(files) != len(names):
            raise DataError(
                f"{self.folder} holds {num_rows} of {self.job['num_samples']} samples in {len(files)} of {len(names)} "
                "files: remove it and compute the features again"
            )
        about = {
            "format_version": FORMAT_VERSION,
            "num_samples": num_rows,
            "num_parts": self.num_parts,
            "num_unreadable": sum(reasons.values()),
            "unreadable": dict(reasons),
            **{name: self.job[name] for name in ("features", "dtype", "format")},
            **more,
            "job": self.job,
            "files": files,
        }
        try:
            write_atomically(self.folder / INDEX, json.dumps(about, indent=1, allow_nan=False) + "\n")
            for path in (self.folder / PARTIAL, *self.folder.glob(".*.tmp-*")):  # of killed ranks
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        return about

    def _array_names(self, part: int) -> list[str]:
        names = [""] if self.job["format"] == "safetensors" else self.job["features"]
        return [_array_path(self.folder, part, name, self.job["format"]).name for name in names]

    def _compare(self, found: Mapping[str, Any], path: Path) -> None:
        refuse_other_job(self.job, found, setting="output_dir", output=self.folder, path=path)

    def _failed(self, error: OSError | SafetensorError) -> DataError:
        reason = getattr(error, "strerror", None) or error
        return DataError(f"output_dir {self.folder} cannot be written ({reason}): free space, then start again")


def _array_path(folder: Path, part: int, feature: str, kind: str) -> Path:
    return folder / (f"part-{part:05d}.{feature}.npy" if kind == "npy" else f"part-{part:05d}.safetensors")


def _rows_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.jsonl"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: readable(value) if isinstance(value, str) else value for name, value in row.items()}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): compute the features again") from error


def _read_array(folder: Path, part: int, feature: str, kind: str) -> Array:
    path = _array_path(folder, part, feature, kind)
    try:
        array: Array = np.load(path, allow_pickle=False) if kind == "npy" else load_file(path)[feature]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}): compute the features again") from error
    return array


def _check_lengths(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path} is missing or was changed: compute the features again")


def _what_is_missing(folder: Path) -> str:
    if (folder / PARTIAL).exists():
        return "holds unfinished features: give the same command of launch/embed.py again"
    return f"holds no features ({INDEX}): name an output_dir of launch/embed.py"
