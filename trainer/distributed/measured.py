"""Figures that tools/bench/gpu.py has measured on a GPU: the JSON that it writes, and tools/plan_run.py reads.

A rehearsal on a CPU writes the same JSON to try the bench. It is marked, and nothing here takes a figure from it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.files import write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Row:
    """What one case of the bench has measured, or why it could not."""

    part: str
    name: str
    values: dict[str, Any]
    """Figures by name; the unit is the end of the name."""
    error: str = ""
    """Why there are no figures."""


@dataclass(slots=True)
class Figures:
    """All rows of one GPU."""

    device: str
    """As CUDA names it."""
    rehearsal: bool = False
    """Whether a CPU ran tiny models to try the bench."""
    rows: list[Row] = field(default_factory=list)

    def put(self, row: Row) -> None:
        """Add a row; it replaces that of the same part and name."""
        kept = [one for one in self.rows if (one.part, one.name) != (row.part, row.name)]
        self.rows = [*kept, row]

    def find(self, part: str, name: str) -> Row | None:
        """Return the row of a case, if it was run."""
        return next((row for row in self.rows if (row.part, row.name) == (part, name)), None)

    def write(self, path: Path) -> None:
        """Write the JSON; it is replaced as a whole."""
        write_atomically(path, json.dumps({"format_version": FORMAT_VERSION} | asdict(self), indent=1) + "\n")

    def mfu(self, kind: str, model: str, flops: float) -> tuple[float, str] | None:
        """Return the measured share of the peak that fits a training best, and the model that it was measured with.

        A figure of the same model counts. Without one it is that of the model whose FLOPs are nearest: of ViT-B (57
        GFLOP an image) and ViT-H (288), ViT-L (122) takes ViT-B's, because 122 / 57 = 2.1 is less than 288 / 122 = 2.4.

        Args:
            kind: "pretrain" or "lora".
            model: timm's name of the encoder.
            flops: of one image and step.

        Returns:
            found: the share, and the model; None if no such training was measured, or this is a rehearsal.
        """
        found = list(self._trainings(kind))
        if not found:
            return None
        values = min(found, key=lambda one: (one["model"] != model, abs(math.log(one["flops_per_image"] / flops))))
        return float(values["mfu"]), str(values["model"])

    def _trainings(self, kind: str) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            if not self.rehearsal and not row.error and row.values.get("kind") == kind and row.values.get("mfu"):
                yield row.values


def read_figures(path: Path) -> Figures:
    """Read the JSON.

    Raises:
        ConfigError: there is none, or it is not one of tools/bench/gpu.py.
    """
    remedy = "name the JSON that tools/bench/gpu.py has written"
    try:
        found = json.loads(path.read_text())
        if found.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format_version is not {FORMAT_VERSION}")
        return Figures(**found | {"rows": [Row(**row) for row in found["rows"]]})
    except OSError as error:
        raise ConfigError(f"the figures {path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no figures of a GPU ({error}): {remedy}") from error
