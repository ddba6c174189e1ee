"""Compare pre-training runs after the same time: validation error and probes against seconds of training.

Usage: python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast [--plot curves.png]

Examples:
    python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast --plot curves.png
    python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast,base=runs/base

The first run is the reference. Seconds are those of optimizer steps (step_s of metrics.jsonl), without start, saving,
measuring and drawing. Runs must have seen the same validation images: give both the same --val_data. Probes are
compared where runs have them: give both the same --probe_data, --probe_field and --probe_samples.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.checks import check_types
from trainer.config.command_line import CommandLine
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


PROBED = {
    "probe_knn_accuracy": "kNN",
    "probe_linear_accuracy": "linear",
    "probe_eer": "EER",
    "probe_rank_me": "rank",
    "probe_chance": "chance",
}
"""Figures of probes in metrics.jsonl, and their names here."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Validation error and probes over training time."""

    seconds: np.ndarray
    errors: np.ndarray
    baseline: float
    probes: dict[str, np.ndarray]
    """Name of a figure -> (seconds, value) of each probe that measured it."""

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
    probes: dict[str, list[tuple[float, float]]] = {}
    for row in read_metrics(path):
        if "step_s" in row:
            clock += row["step_s"] * (row["step"] - last_step)
            last_step = row["step"]
        if row.get("val_loss") is not None:
            points.append((clock, row["val_loss"]))
            baseline = row["val_mean_face_loss"]
        for name in PROBED:
            if row.get(name) is not None:
                probes.setdefault(name, []).append((clock, row[name]))
    if not points:
        raise ConfigError(f"runs names {folder}, which measured no validation images: train with --val_data")
    seconds, errors = np.array(points).T
    return Curve(seconds, errors, baseline, {name: np.array(values) for name, values in probes.items()})


def describe(curves: dict[str, Curve]) -> list[str]:
    """Tabulate the ends, and the time that each needed for the reference's last error."""
    reference, *_ = curves.values()
    lines = [f"{'':20}{'seconds':>9}{'validation':>10}{'s to ' + format(reference.errors[-1], '.4f'):>14}{'faster':>9}"]
    for name, curve in curves.items():
        when = curve.reaches(float(reference.errors[-1]))
        first = reference.reaches(float(reference.errors[-1]))
        cells = f"{when:14.1f}{first / when:8.2f}x" if when and first else f"{'never':>14}"
        lines.append(f"{name:20}{curve.seconds[-1]:9.1f}{curve.errors[-1]:10.4f}{cells}")
    return [*lines, f"{'mean face':20}{'':9}{reference.baseline:10.4f}", *describe_probes(curves)]


def describe_probes(curves: dict[str, Curve]) -> list[str]:
    """Tabulate the last probes of each run that has some; the rank is a number of directions, all else percent."""
    names = [name for name in PROBED if any(name in curve.probes for curve in curves.values())]
    if not names:
        return []
    lines = ["", f"{'last probe':20}" + "".join(f"{PROBED[name]:>10}" for name in names)]
    for run_name, curve in curves.items():
        last = {name: curve.probes[name][-1, 1] for name in names if name in curve.probes}
        shown = {name: f"{v:.3g}" if name == "probe_rank_me" else f"{100 * v:.1f} %" for name, v in last.items()}
        lines.append(f"{run_name:20}" + "".join(f"{shown.get(name, '-'):>10}" for name in names))
    return lines


def draw(curves: dict[str, Curve], path: str) -> None:
    """Draw all curves: the validation error, and beside it the accuracies of probes, if a run has some."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    probed = any(curve.probes for curve in curves.values())
    figure, axes = plt.subplots(1, 1 + probed, figsize=(7 + 6 * probed, 4.4), layout="constrained", squeeze=False)
    axis = axes[0, 0]
    for name, curve in curves.items():
        axis.plot(curve.seconds, curve.errors, marker="o", markersize=3, label=name)
    axis.set(xlabel="seconds of training", ylabel="validation masked error", yscale="log")
    axis.yaxis.set_major_formatter("{x:.2f}")
    axis.yaxis.set_minor_formatter("{x:.2f}")
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    if probed:
        draw_probes(curves, axes[0, 1])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_probes(curves: dict[str, Curve], axis: Any) -> None:
    """Draw kNN (solid) and linear probe (dashed) of each run in its colour, and chance (dotted)."""
    chance = None
    for number, (name, curve) in enumerate(curves.items()):
        for figure, style in (("probe_knn_accuracy", "-"), ("probe_linear_accuracy", "--")):
            if figure in curve.probes:
                seconds, values = curve.probes[figure].T
                label = f"{name}, {PROBED[figure]}"
                axis.plot(seconds, 100 * values, style, marker="o", markersize=3, color=f"C{number}", label=label)
        if "probe_chance" in curve.probes:
            chance = 100 * curve.probes["probe_chance"][0, 1]
    if chance is not None:
        axis.axhline(chance, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="seconds of training", ylabel="probe accuracy [%]")
    axis.grid(visible=True, alpha=0.3)
    axis.legend()


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
    if len({curve.probes["probe_chance"][0, 1] for curve in curves.values() if "probe_chance" in curve.probes}) > 1:
        raise ConfigError(
            f"runs is {settings.runs!r}, which were not probed on the same classes: give all the same --probe_data, "
            "--probe_field and --probe_samples"
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
