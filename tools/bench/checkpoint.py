"""Saving beside training against saving at once: how long the step loop stands still, and what steps beside it cost.

Counted first: the state is 12 bytes a parameter (weights, two moments) and 4 or 2 more for the model's own weights. At
once, it is serialised, synced and hashed while the training waits: about a second a gigabyte on a fast disk, more on a
slow one. In the background the training waits for a copy to memory only, some 0.2 s a gigabyte, and then shares cores
and bandwidth with the writer for a while. Rounds of both ways are interleaved in one process:

    stall    seconds that save() keeps the loop, and those of waiting for a save that is not done at the next one
    drag     seconds by which the steps of an interval were slower than quiet ones: what the writer takes beside them

Usage: python tools/bench/checkpoint.py [--model NAME] [--steps N] [--repeats N]
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config.command_line import CommandLine
from trainer.config.settings import PretrainRecipe, check_types
from trainer.distributed.ds_config import engine_settings
from trainer.distributed.engine import Engine, connect
from trainer.distributed.world import World
from trainer.fault_tolerance.attempts import acquire
from trainer.fault_tolerance.checkpoint import Identity, Progress, Saver
from trainer.fault_tolerance.exit_codes import run
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask


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


class Training:
    """A masked autoencoder under DeepSpeed, on one rank, on one batch."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(0)
        size, batch = settings.image_size, settings.global_batch
        world = connect(World(), timeout_s=600)
        encoder = PatchEncoder(settings.model, image_size=size, fixed_positions=True)
        self.model = MaskedAutoencoder(encoder, DecoderOptions(decoder_depth=4))
        config = engine_settings(PretrainRecipe(global_batch=batch), world, micro_batch=batch)
        self.engine = Engine(self.model, ds_config=config, weight_decay=0.05, world=world)
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        noise = torch.rand(batch, encoder.num_patches)
        self._inputs = (images, *draw_mask(noise, mask_ratio=0.75, grid=encoder.grid))

    def steps(self, count: int) -> list[float]:
        """Take steps; returns their times [s]."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.engine.step([self._inputs], learning_rate=1e-4, seed=0)
            times.append(time.perf_counter() - start)
        return times


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    training = Training(settings)
    training.steps(2)
    stall: dict[str, list[float]] = {"at once": [], "in background": []}
    drag: dict[str, list[float]] = {name: [] for name in stall}
    shares: dict[str, list[float]] = {name: [] for name in stall}
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        identity = Identity({"global_batch": settings.global_batch}, "", "", 1, training.engine.zero_stage, "fp32", 1)
        lease = acquire(Path(folder), num_ranks=1)
        savers = {
            name: Saver(
                Path(folder, name), identity, {}, lease=lease, world=World(), keep=1,
                background=name == "in background",
            )
            for name in stall
        }  # fmt: skip
        for repeat in range(settings.repeats + 1):
            for name, saver in savers.items():
                quiet = statistics.median(training.steps(settings.steps))
                start = time.perf_counter()
                saver.save(Progress(repeat + 1), training.engine.capture)
                waited = time.perf_counter() - start
                beside = training.steps(settings.steps)
                start = time.perf_counter()
                saver.finish()
                waited += time.perf_counter() - start
                if repeat:  # the first round fills caches
                    stall[name].append(waited)
                    drag[name].append(sum(beside) - quiet * settings.steps)
                    shares[name].append(waited / (waited + sum(beside)))
        size = sum(path.stat().st_size for path in Path(folder, "at once").rglob("*.pt"))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {settings}")
    print(f"a checkpoint of {size / 1e6:.0f} MB every {settings.steps} steps, medians of {settings.repeats}")
    for name in stall:
        print(
            f"{name:14} stall {statistics.median(stall[name]):6.3f} s = {100 * statistics.median(shares[name]):4.1f} % "
            f"of the interval, drag {statistics.median(drag[name]):6.3f} s"
        )
    ratio = statistics.median(stall["at once"]) / statistics.median(stall["in background"])
    print(f"the loop stands still {ratio:.1f} times shorter")
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
