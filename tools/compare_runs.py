"""Compare pre-training runs after the same time: validation error against seconds of training.

Usage: python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast [--plot curves.png]

Examples:
    python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast --plot curves.png
    python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast,base=runs/base

The first run is the reference. Seconds are those of optimizer steps (step_s of metrics.jsonl), without start, saving,
measuring and drawing. Runs must have seen the same validation images: give both the same --val_data.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.config.command_line import CommandLine
from trainer.config.settings import check_types
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.fault_tolerance.ledger import read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    runs: str = ""
    """Runs of launch/pretrain.py: name=folder, separated by commas; the first is the reference."""
    plot: str = ""
    """PNG file for the curves; empty for none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Curve:
    """Validation error over training time."""

    seconds: np.ndarray
    errors: np.ndarray
    baseline: float

    def reaches(self, error: float) -> float | None:
        """Return the time at which the curve first reaches an error [s], linear between its points; None if never.

        Example: errors 0.8 at 10 s and 0.6 at 20 s reach 0.7 after 15 s.
        """
        below = np.flatnonzero(self.errors <= error)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0:
            return float(self.seconds[0])
        return float(np.interp(-error, -self.errors[i - 1 : i + 1], self.seconds[i - 1 : i + 1]))


def read_curve(folder: Path) -> Curve:
    """Read a run's metrics.

    Raises:
        ConfigError: there are none, or no validation errors among them.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"runs names {folder}, which holds no metrics.jsonl: name the output_dir of launch/pretrain.py"
        )
    clock, last_step, points, baseline = 0.0, 0, [], float("nan")
    for row in read_metrics(path):
        if "step_s" in row:
            clock += row["step_s"] * (row["step"] - last_step)
            last_step = row["step"]
        if row.get("val_loss") is not None:
            points.append((clock, row["val_loss"]))
            baseline = row["val_mean_face_loss"]
    if not points:
        raise ConfigError(f"runs names {folder}, which measured no validation images: train with --val_data")
    seconds, errors = np.array(points).T
    return Curve(seconds, errors, baseline)


def describe(curves: dict[str, Curve]) -> list[str]:
    """Tabulate the ends, and the time that each needed for the reference's last error."""
    reference, *_ = curves.values()
    lines = [f"{'':20}{'seconds':>9}{'validation':>10}{'s to ' + format(reference.errors[-1], '.4f'):>14}{'faster':>9}"]
    for name, curve in curves.items():
        when = curve.reaches(float(reference.errors[-1]))
        first = reference.reaches(float(reference.errors[-1]))
        cells = f"{when:14.1f}{first / when:8.2f}x" if when and first else f"{'never':>14}"
        lines.append(f"{name:20}{curve.seconds[-1]:9.1f}{curve.errors[-1]:10.4f}{cells}")
    return [*lines, f"{'mean face':20}{'':9}{reference.baseline:10.4f}"]


def draw(curves: dict[str, Curve], path: str) -> None:
    """Draw all curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for name, curve in curves.items():
        axis.plot(curve.seconds, curve.errors, marker="o", markersize=3, label=name)
    axis.set(xlabel="seconds of training", ylabel="validation masked error", yscale="log")
    axis.yaxis.set_major_formatter("{x:.2f}")
    axis.yaxis.set_minor_formatter("{x:.2f}")
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


CLI = CommandLine(Settings, __doc__, required=("runs",))


def main(settings: Settings) -> int:
    """Compare and print; returns the exit code."""
    named = [part.partition("=") for part in settings.runs.split(",")]
    if not all(name and folder for name, _, folder in named):
        raise ConfigError(f"runs is {settings.runs!r}, but must be name=folder, separated by commas")
    if settings.plot and not (settings.plot.endswith(".png") and Path(settings.plot).absolute().parent.is_dir()):
        raise ConfigError(f"plot is {settings.plot!r}, but must be a .png file in a folder that exists")
    curves = {name: read_curve(Path(folder)) for name, _, folder in named}
    if len({curve.baseline for curve in curves.values()}) > 1:
        raise ConfigError(
            f"runs is {settings.runs!r}, which were not measured on the same validation images or targets"
        )
    print("\n".join(describe(curves)))
    if settings.plot:
        draw(curves, settings.plot)
        print(f"plot: {settings.plot}")
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
