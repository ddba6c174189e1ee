"""Saving beside training against saving at once: how long the step loop stands still, and what steps beside it cost.

Counted first: the state is 12 bytes a parameter (weights, two moments) and 4 or 2 more for the model's own weights. At
once, it is serialised, synced and hashed while the training waits: about a second a gigabyte on a fast disk, more on a
slow one. In the background the training waits for a copy to memory only, some 0.2 s a gigabyte, and then shares cores
and bandwidth with the writer for a while. Rounds of both ways are interleaved in one process:

    stall    seconds that save() keeps the loop, and those of waiting for a save that is not done at the next one
    drag     seconds by which the steps of an interval were slower than quiet ones: what the writer takes beside them

Usage: python tools/bench/checkpoint.py [--model NAME] [--steps N] [--repeats N]

Examples:
    python tools/bench/checkpoint.py --model vit_base_patch16_224 --folder /scratch
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.common import Training, machine, seconds, take_turns
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

if TYPE_CHECKING:
    from trainer.fault_tolerance.checkpoint import Progress, Saver


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    model: str = "vit_small_patch16_224"
    """timm's name of the encoder."""
    image_size: int = 224
    """Side of the view [pixels]."""
    global_batch: int = 8
    """Images in a step [images]."""
    steps: int = 6
    """Steps between two saves [steps]."""
    repeats: int = 3
    """Saves of each way."""
    num_threads: int = 1
    """Threads of the training; the writer needs a core as well."""
    folder: str | None = None
    """Where to write, for example on the storage of a cluster; none takes the machine's temporary folder."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)


CLI = CommandLine(Settings, __doc__)
AT_ONCE, BACKGROUND = "at once", "in background"


@dataclass(frozen=True, slots=True)
class Round:
    """One save, and the steps before and beside it; times in seconds."""

    stall: float
    drag: float
    stall_share: float
    """Of the interval between two saves."""


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    with loading("torch and DeepSpeed"):
        import torch

        from trainer.config.settings import PretrainRecipe
    torch.set_num_threads(settings.num_threads)
    recipe = PretrainRecipe(model=settings.model, image_size=settings.image_size)
    training = Training(recipe, micro_batch=settings.global_batch)
    rounds, size = measure(training, settings.folder, steps=settings.steps, repeats=settings.repeats)
    print(f"{machine()}, {settings}")
    print(f"a checkpoint of {size / 1e6:.0f} MB every {settings.steps} steps, medians of {settings.repeats}")
    for name, found in rounds.items():
        print(
            f"{name:14} stall {found.stall:6.3f} s = {100 * found.stall_share:4.1f} % of the interval, "
            f"drag {found.drag:6.3f} s"
        )
    print(f"the loop stands still {rounds[AT_ONCE].stall / rounds[BACKGROUND].stall:.1f} times shorter")
    return 0


def measure(training: Training, folder: str | None, *, steps: int, repeats: int) -> tuple[dict[str, Round], int]:
    """Save in turns at once and in the background; returns the medians of each way, and a checkpoint's bytes.

    Args:
        training: whose state is saved.
        folder: where to write; none takes the machine's temporary folder.
        steps: between two saves.
        repeats: saves of each way, after one that does not count.
    """
    from trainer.distributed.world import World
    from trainer.fault_tolerance.attempts import acquire
    from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver

    engine = training.engine
    for _ in range(2):
        training.step()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        record = {"global_batch": training.images_per_step}
        identity = Identity(record, "", "", 1, engine.zero_stage, engine.precision, 1)
        lease = acquire(Path(name), num_ranks=1)
        ways: dict[str, Callable[[], Round]] = {}
        for way in (AT_ONCE, BACKGROUND):
            saver = Saver(
                Path(name, way), identity, {}, lease=lease, world=World(), keep=1, background=way == BACKGROUND
            )
            ways[way] = partial(save_beside_steps, training, saver, Progress(), steps)
        rounds = take_turns(ways, repeats=repeats)
        size = sum(path.stat().st_size for path in Path(name, AT_ONCE).rglob("*.pt"))
    return {
        way: Round(*(statistics.median(getattr(one, field) for one in measured) for field in Round.__slots__))
        for way, measured in rounds.items()
    }, size


def save_beside_steps(training: Training, saver: "Saver", progress: "Progress", steps: int) -> Round:
    """Take steps, save, and take steps while the writer works."""
    step = partial(seconds, training.step, training.engine.device.type)
    quiet = statistics.median(step() for _ in range(steps))
    progress.step += 1
    stall = seconds(lambda: saver.save(progress, training.engine.capture))
    beside = sum(step() for _ in range(steps))
    stall += seconds(saver.finish)
    return Round(stall, beside - quiet * steps, stall / (stall + beside))


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
