r"""A plain CNN beside the demo's detectors: the same images, and as many CPU seconds as the slowest of them.

The peer and its training are those of tools/bench/detector.py, with one seed: resnet10t from random weights on one
thread, random crops at the images' own resolution. Its seconds are of training steps alone. Those of a detector are of
launch/finetune.py from start to end, so the peer has a little more. Each detector's folder holds them in `finished`, as
the shell's `times` prints them. Writes rows for launch/evaluate.py --baselines, behind those of the shortcuts.

Usage: python tools/demo/peer.py --data 'train/*.tar' --test_sets 'NAME=a/*.tar;...' --detectors 'a;b' \
           --baselines FILE.json --output FILE.json

Examples:
    python tools/demo/peer.py --data 'demo/detect/shards/train/*.tar' \
        --test_sets 'whole=demo/detect/shards/test-whole/*.tar;splice=demo/detect/shards/test-splice/*.tar' \
        --detectors 'demo/detect/lora;demo/detect/scratch' --baselines demo/detect/baselines.json \
        --output demo/detect/beside.json
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench import detector as bench
from trainer.config.command_line import CommandLine
from trainer.errors import DataError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import write_atomically
from trainer.startup import loading

_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Training shards."""
    test_sets: str = ""
    """Labelled shards, as NAME=SHARDS;NAME=SHARDS."""
    detectors: str = ""
    """Folders of finished detectors, as FOLDER;FOLDER."""
    baselines: str = ""
    """JSON of tools/shortcut_baselines.py on the same test sets."""
    output: str = ""
    """JSON file for launch/evaluate.py --baselines."""


CLI = CommandLine(Settings, __doc__, required=("data", "test_sets", "detectors", "baselines", "output"))


def main(settings: Settings) -> int:
    """Train and measure; returns the exit code."""
    folders = [Path(folder.strip()) for folder in settings.detectors.split(";")]
    seconds = {folder.name: cpu_seconds(folder / "finished") for folder in folders}
    with loading("torch and timm"):
        import torch

        from trainer.config.scoring_settings import EvaluationSettings
        from trainer.detection.error_rates import summarise
        from trainer.detection.evaluation import named_values, open_test_set, read_baselines
        from trainer.detection.figures import det_points

    torch.set_num_threads(1)
    how = EvaluationSettings(models="-", test_sets=settings.test_sets, progress_bar=False)
    sets = [open_test_set(name, shards, how) for name, shards in named_values(settings.test_sets, "test_sets")]
    rows: list[dict[str, Any]] = read_baselines(Path(settings.baselines), sets)
    print("CPU seconds of detectors: " + ", ".join(f"{name} {spent_s:.0f}" for name, spent_s in seconds.items()))
    as_bench = bench.Settings(data=settings.data, val_data="-", test_sets=settings.test_sets, output_dir="-")
    train = bench.read_photographs(bench.open_labelled(settings.data, "data"), as_bench.crop_size, "data")
    model, spent_s = bench.train_peer(as_bench, train, max(seconds.values()), _SEED)
    for one in sets:
        photographs = bench.read_photographs(one.index, as_bench.crop_size, f"test set {one.name}")
        score_N = 1 / (1 + np.exp(-bench.score_peer(model, photographs, as_bench.crop_size)))
        truth = one.truth
        summary = summarise(score_N, truth.label_N, truth.tool_N, truth.people_N, threshold=0.5)
        row = {
            "name": f"plain CNN ({as_bench.peer}, {spent_s:.0f} CPU s)",
            "test_set": one.name,
            "cpu_seconds": spent_s,
        }
        row |= {"fingerprint": one.index.fingerprint, "summary": summary, "det": det_points(score_N, truth.label_N)}
        rows.append(row)
    write_atomically(Path(settings.output), json.dumps(rows, indent=1) + "\n")
    return 0


def cpu_seconds(times: Path) -> float:
    """Return the CPU seconds of a shell's finished children, user and system, from what its `times` printed.

    Example: "0m0.01s 0m0.00s" and, below, "1m2.50s 0m3.25s" are 65.75 s of children.

    Raises:
        DataError: there is no such file, or something else is in it.
    """
    text = times.read_text() if times.is_file() else ""
    found = re.findall(r"(\d+)m(\d+(?:\.\d+)?)s", text)
    if len(found) != 4:
        raise DataError(f"{times} does not hold the CPU seconds of a detector: run 'make demo', which writes them")
    return sum(60 * int(minutes) + float(rest) for minutes, rest in found[2:])


def command() -> None:
    """Start the command."""
    run(main, CLI)


if __name__ == "__main__":
    command()
