"""One picture of what the demo did: reconstructions beside DET curves, for README.md.

Left, validation photographs in three rows: original, masked, reconstructed. Right, the DET curves of the LoRA detector,
of the plain CNN (tools/demo/peer.py) and of the best shortcut on whole morphs. All come from the demo's own run.

Usage: python tools/demo/picture.py FOLDER   (reads FOLDER/run and FOLDER/results, writes FOLDER/results/overview.png)

Examples:
    python tools/demo/picture.py demo

Shapes: HWC uint8 RGB; T points of a curve.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.config.command_line import CommandLine
from trainer.errors import DataError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import atomic_draft

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DETECTOR, TEST_SET = "lora", "whole"
_NUM_FACES = 5
_ROWS = ("original", "masked", "reconstructed")
_ENDS = (0.01, 0.98)
_COLOURS, _DASHES = ("#0072b2", "#009e73", "#d55e00"), ("-", (0, (1, 1)), (0, (5, 2)))
_STYLE: Any = ["default", {"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    folder: str = ""
    """The demo's folder; may be given as the first word."""


CLI = CommandLine(Settings, __doc__, required=("folder",), positional="folder")


def main(settings: Settings) -> int:
    """Draw the picture; returns the exit code."""
    folder = Path(settings.folder)
    figure = draw(reconstructions(folder / "run"), curves(folder / "results"))
    output = folder / "results" / "overview.png"
    with atomic_draft(output) as draft:
        figure.savefig(draft, format="png", dpi=110, metadata={"Software": None})
    print(output)
    return 0


def reconstructions(run_folder: Path) -> NDArray[np.uint8]:
    """Read the newest reconstructions: three rows of square faces.

    Raises:
        DataError: the run has drawn none.
    """
    with Image.open(newest(run_folder / "pictures", "step-*.png")) as picture:
        rows_HWC = np.asarray(picture.convert("RGB"))
    side = rows_HWC.shape[0] // len(_ROWS)
    return rows_HWC[:, : _NUM_FACES * side]


def curves(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the curves of the detector, the plain CNN and the best shortcut from the newest evaluation.

    Returns:
        (name, {macer, bscer}) of each.

    Raises:
        DataError: no evaluation is there, or it lacks one of them.
    """
    from trainer.detection.figures import det_points, percent

    path = newest(results, "*_eval.json")
    evaluation = json.loads(path.read_text())
    found = [r["summary"] for r in evaluation["results"] if (r["model"], r["test_set"]) == (DETECTOR, TEST_SET)]
    others = [row for row in evaluation["baselines"] if row["test_set"] == TEST_SET]
    peers, shortcuts = ([row for row in others if ("cpu_seconds" in row) == is_peer] for is_peer in (True, False))
    if not found or not peers or not shortcuts:
        raise DataError(
            f"{path} lacks the detector {DETECTOR!r}, the plain CNN or the shortcuts on {TEST_SET!r}: run 'make demo' "
            "again"
        )
    best = min(shortcuts, key=lambda row: d_eer_of(row["summary"]))
    with path.with_name(path.name.replace("_eval.json", "_scores.csv")).open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["model"], r["test_set"]) == (DETECTOR, TEST_SET) and r["score"]]
    detector = det_points([float(row["score"]) for row in rows], [int(row["label"]) for row in rows])
    return [
        (f"detector, LoRA: D-EER {percent(d_eer_of(found[0]))}", detector),
        (f"plain CNN: D-EER {percent(d_eer_of(peers[0]['summary']))}", peers[0]["det"]),
        (f"best shortcut, {best['name']}: D-EER {percent(d_eer_of(best['summary']))}", best["det"]),
    ]


def d_eer_of(summary: Mapping[str, Any]) -> float:
    """Return the D-EER over all attack tools."""
    return float(summary["pooled"]["d_eer"]["value"])


def newest(folder: Path, pattern: str) -> Path:
    """Return the last file by name; names hold the step or the time.

    Raises:
        DataError: there is none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"{folder} holds no {pattern}: run 'make demo' first")
    return found[-1]


def draw(rows_HWC: NDArray[np.uint8], found: list[tuple[str, dict[str, Any]]]) -> "Figure":
    """Draw faces left and curves right; sizes are inches."""
    from matplotlib import style
    from matplotlib.figure import Figure

    side = rows_HWC.shape[0] // len(_ROWS)
    with style.context(_STYLE):
        figure = Figure(figsize=(10.0, 4.1), facecolor="white")
        left = figure.add_axes((0.035, 0.12, 0.545, 0.80))
        left.imshow(rows_HWC, aspect="equal", interpolation="nearest")
        left.set_anchor("N")
        left.set_xticks([])
        left.set_yticks([side * (number + 0.5) for number in range(len(_ROWS))], _ROWS, rotation=90, va="center")
        left.tick_params(length=0)
        left.spines[:].set_visible(False)
        for line, count in ((left.axhline, len(_ROWS)), (left.axvline, rows_HWC.shape[1] // side)):
            for number in range(1, count):
                line(side * number - 0.5, color="white", linewidth=2)
        left.set_title("Validation photographs, 75 % of the patches masked", loc="left", fontsize=10)
        _draw_curves(figure.add_axes((0.665, 0.12, 0.32, 0.80)), found)
    return figure


def _draw_curves(axis: "Axes", found: list[tuple[str, dict[str, Any]]]) -> None:
    from trainer.detection.figures import det_axes, probit

    det_axes(axis, _ENDS).set_label("_nolegend_")
    for (name, rates), colour, dash in zip(found, _COLOURS, _DASHES, strict=True):
        x_T, y_T = (probit(rates[rate], _ENDS) for rate in ("macer", "bscer"))
        axis.plot(x_T, y_T, color=colour, linestyle=dash, linewidth=1.6, drawstyle="steps-post", label=name)
    axis.set(xlabel="MACER: morphs accepted [%]", ylabel="BSCER: bona fides rejected [%]")
    axis.set_title("Whole morphs of 8 unseen people", loc="left", fontsize=10)
    axis.grid(visible=True, color="#e4e4e4", linewidth=0.6)
    axis.legend(loc="upper right", fontsize=8)


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
