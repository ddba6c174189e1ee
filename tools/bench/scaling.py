"""Two ranks against one, by ZeRO stage, on this machine: how much of a step is communication, and the memory it takes.

Two processes that know nothing of each other already share caches and memory bandwidth; so they are the measure, and
what two ranks take longer is communication (gloo over loopback). Counted first, in float32: stages 0 to 2 all-reduce
the gradients, 4 bytes a parameter each way; stages 1 and 2 gather the weights after the step as well, stage 3 in the
forward and the backward pass.

Usage: python tools/bench/scaling.py [--model NAME] [--micro_batch N] [--steps N] [--repeats N] [--stages 0,1,2,3]
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import json
import os
import platform
import socket
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config.command_line import CommandLine
from trainer.config.settings import PretrainRecipe, check_types
from trainer.distributed.ds_config import engine_settings
from trainer.distributed.engine import Engine, connect, disconnect
from trainer.distributed.world import world_from_environment
from trainer.fault_tolerance.exit_codes import run
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask
from trainer.training.throughput import peak_resident_gib

CPU_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "cpu_fp32.json"


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


def rank(settings: Settings, stage: int) -> tuple[float, float]:
    """Train as one rank of the environment's world; returns the median time of a step [s] and its peak memory [GiB]."""
    torch.set_num_threads(1)
    forget_peak()
    idle = peak_resident_gib()
    torch.manual_seed(0)
    world = connect(world_from_environment(), timeout_s=300)
    size, batch = settings.image_size, settings.micro_batch
    encoder = PatchEncoder(settings.model, image_size=size, fixed_positions=True)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(CPU_CONFIG.read_text())
        config.setdefault("zero_optimization", {})["stage"] = stage
        path = Path(folder, "stage.json")
        path.write_text(json.dumps(config))
        recipe = PretrainRecipe(global_batch=batch * world.size)
        settings_of_engine = engine_settings(recipe, world, batch, str(path))
    engine = Engine(
        MaskedAutoencoder(encoder, DecoderOptions()), ds_config=settings_of_engine, weight_decay=0.05, world=world
    )
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    inputs = images, *draw_mask(torch.rand(batch, encoder.num_patches), mask_ratio=0.75, grid=encoder.grid)
    times = []
    for _ in range(settings.steps + 2):
        start = time.perf_counter()
        engine.step([inputs], learning_rate=1e-4, seed=0)
        times.append(time.perf_counter() - start)
    peak = peak_resident_gib() - idle
    disconnect()
    return statistics.median(times[2:]), peak


def forget_peak() -> None:
    """Let `peak_resident_gib` begin anew, at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(words: list[str], stage: int, worlds: list[int]) -> tuple[float, float]:
    """Run processes side by side, ranks of worlds of these sizes; returns the largest time [s] and memory [GiB]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for number, size in enumerate(worlds):
        place = dict.fromkeys(("RANK", "LOCAL_RANK"), str(number % size))
        place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(size))
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, *words, "--stage", str(stage)],
                env=os.environ | place | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank failed at stage {stage}: see above")
    seconds, gib = zip(*(map(float, text.split()[-2:]) for text in told), strict=True)
    return max(seconds), max(gib)


CLI = CommandLine(Settings, __doc__)


def main(settings: Settings) -> int:
    """Measure and print; returns the exit code."""
    if settings.stage is not None:
        print(*rank(settings, settings.stage))
        return 0
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {settings}")
    names = ("one rank", "two apart", "two ranks", "communication", "images/s of 2 / 1", "GiB a rank: 1", "2")
    print("ZeRO" + "".join(f"{name:>{max(11, len(name) + 2)}}" for name in names))
    for stage in map(int, settings.stages):
        kinds = {"one": [1], "apart": [1, 1], "two": [2, 2]}
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(settings.repeats):
            for name, worlds in kinds.items():
                seen[name].append(measure(sys.argv[1:], stage, worlds))
        one, apart, two = (statistics.median(seconds for seconds, _ in seen[name]) for name in kinds)
        alone, shared = (statistics.median(gib for _, gib in seen[name]) for name in ("one", "two"))
        print(
            f"{stage:4}{one:9.3f} s{apart:9.3f} s{two:9.3f} s{100 * max(0.0, 1 - apart / two):13.1f} %"
            f"{2 * one / two:18.2f}x{alone:15.2f}{shared:11.2f}",
            flush=True,
        )
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
