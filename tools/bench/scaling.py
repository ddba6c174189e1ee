"""Two ranks against one, by ZeRO stage, on this machine: how much of a step is communication, and the memory it takes.

Two processes that know nothing of each other already share caches and memory bandwidth; so they are the measure, and
what two ranks take longer is communication (gloo over loopback). Counted first, in float32: stages 0 to 2 all-reduce
the gradients, 4 bytes a parameter each way; stages 1 and 2 gather the weights after the step as well, stage 3 in the
forward and the backward pass.

Usage: python tools/bench/scaling.py [--model NAME] [--micro_batch N] [--steps N] [--repeats N] [--stages 0,1,2,3]

Examples:
    python tools/bench/scaling.py --stages 1,3 --repeats 3
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import statistics
from dataclasses import dataclass
from functools import partial

from tools.bench.common import Training, machine, run_ranks, seconds, take_turns
from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run

WORLDS = {"one": [1], "apart": [1, 1], "two": [2, 2]}
"""What runs side by side: the world sizes of the processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    model: str = "vit_tiny_patch16_224"
    """timm's name of the encoder."""
    image_size: int = 224
    """Side of the view [pixels]."""
    micro_batch: int = 4
    """Images of a rank in a step [images]."""
    steps: int = 5
    """Steps that count, after two that do not [steps]."""
    repeats: int = 1
    """Runs of each kind, in turns."""
    stages: tuple[str, ...] = ("0", "1", "2", "3")
    """ZeRO stages."""
    stage: int | None = None
    """Be one rank, of the environment's world, at this stage, and print the time of a step; for the tool itself."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        if self.stage is not None and not 0 <= self.stage <= 3:
            raise ConfigError(f"stage is {self.stage}, but must be from 0 to 3")


CLI = CommandLine(Settings, __doc__)


def rank(settings: Settings, stage: int) -> tuple[float, float]:
    """Train as one rank of the environment's world; returns the median time of a step [s] and its peak memory [GiB]."""
    import torch

    from trainer.config.settings import PretrainRecipe
    from trainer.distributed.engine import disconnect
    from trainer.training.throughput import forget_peak, peak_resident_gib

    torch.set_num_threads(1)
    idle_gib = forget_peak()
    recipe = PretrainRecipe(model=settings.model, image_size=settings.image_size)
    training = Training(recipe, micro_batch=settings.micro_batch, zero_stage=stage)
    times = [seconds(training.step) for _ in range(settings.steps + 2)]
    peak_gib = peak_resident_gib() - idle_gib
    disconnect()
    return statistics.median(times[2:]), peak_gib


def measure(stage: int, worlds: list[int]) -> tuple[float, float]:
    """Run ranks side by side; returns the largest time of a step [s] and the largest memory [GiB]."""
    printed = run_ranks(__file__, worlds, "--stage", str(stage))
    times, gib = zip(*(map(float, line.split()) for line in printed), strict=True)
    return max(times), max(gib)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    if settings.stage is not None:
        print(*rank(settings, settings.stage))
        return 0
    print(f"{machine()}, {settings}")
    names = ("one rank", "two apart", "two ranks", "communication", "images/s of 2 / 1", "GiB a rank: 1", "2")
    print("ZeRO" + "".join(f"{name:>{max(11, len(name) + 2)}}" for name in names))
    for stage in map(int, settings.stages):
        kinds = {name: partial(measure, stage, worlds) for name, worlds in WORLDS.items()}
        measured = take_turns(kinds, repeats=settings.repeats, warmup=0)
        one, apart, two = (statistics.median(taken for taken, _ in measured[name]) for name in WORLDS)
        alone, shared = (statistics.median(gib for _, gib in measured[name]) for name in ("one", "two"))
        print(
            f"{stage:4}{one:9.3f} s{apart:9.3f} s{two:9.3f} s{100 * max(0.0, 1 - apart / two):13.1f} %"
            f"{2 * one / two:18.2f}x{alone:15.2f}{shared:11.2f}",
            flush=True,
        )
    return 0


def command() -> None:
    """Start the bench."""
    run(main, CLI)


if __name__ == "__main__":
    command()
