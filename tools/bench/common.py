"""What the benches share: candidates in turns, the machine's line, processes of their own, and a small training.

Heavy libraries are imported by the functions that need them, so that ``--help`` of a bench answers at once.
"""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.files import data_file

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.models.mae import DecoderOptions

T = TypeVar("T")


def machine(device: str = "cpu") -> str:
    """Name the machine that a figure belongs to: processor or GPU, cores, torch."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {version('torch')}"


def take_turns(candidates: Mapping[str, Callable[[], T]], *, repeats: int, warmup: int = 1) -> dict[str, list[T]]:
    """Measure candidates in turns, so that a slow moment of the machine meets all of them alike.

    Args:
        candidates: each returns one measurement.
        repeats: rounds that count.
        warmup: rounds before them that do not count: they fill caches.
    """
    measured: dict[str, list[T]] = {name: [] for name in candidates}
    for repeat in range(warmup + repeats):
        for name, measure in candidates.items():
            value = measure()
            if repeat >= warmup:
                measured[name].append(value)
    return measured


def medians(measured: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each candidate."""
    return {name: statistics.median(values) for name, values in measured.items()}


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the time of some work [s]; on a GPU, until it is done there."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def run_alone(script: str, *argv: str) -> str:
    """Run a bench in a process of its own, with this command line and more; returns the last line that it prints.

    Memory is measured so: what a process has once held, the allocator may keep.
    """
    return run_ranks(script, [1], *argv)[0]


def run_ranks(script: str, worlds: Sequence[int], *argv: str) -> list[str]:
    """Run a bench in processes side by side, as the ranks of worlds of these sizes; returns the last line of each.

    Args:
        script: file of the bench.
        worlds: the size of each process's world: [1, 1] are two processes that do not know each other, [2, 2] are the
            two ranks of one world.
        argv: added to the command line of this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for number, size in enumerate(worlds):
        rank = {"RANK": number % size, "LOCAL_RANK": number % size, "WORLD_SIZE": size, "LOCAL_SIZE": size}
        env = os.environ | address | {name: str(value) for name, value in rank.items()}
        words = [sys.executable, script, *sys.argv[1:], *argv]
        started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{Path(script).name} {' '.join(argv)} failed: see above")
    return [text.splitlines()[-1] for text in printed]


class Training:
    """A masked autoencoder under DeepSpeed, as one rank of the environment's world, on a batch that stays in memory."""

    def __init__(
        self,
        model: str,
        decoder: "DecoderOptions",
        *,
        image_size: int,
        micro_batch: int,
        zero_stage: int | None = None,
    ) -> None:
        """Build model and engine.

        Args:
            model: timm's name of the encoder.
            decoder: the decoder's settings.
            image_size: side of the view [pixels].
            micro_batch: images of a rank in a step [images].
            zero_stage: instead of the stage of the usual ds_config.
        """
        import torch

        from trainer.config.settings import PretrainRecipe
        from trainer.distributed.ds_config import engine_settings
        from trainer.distributed.engine import Engine, connect
        from trainer.distributed.world import world_from_environment
        from trainer.models.encoder import PatchEncoder
        from trainer.models.mae import MaskedAutoencoder

        torch.manual_seed(0)
        world = connect(world_from_environment(), timeout_s=600)
        encoder = PatchEncoder(model, image_size=image_size, fixed_positions=True)
        self._grid, self.num_patches = encoder.grid, encoder.num_patches
        recipe = PretrainRecipe(global_batch=micro_batch * world.size)
        with tempfile.TemporaryDirectory() as folder:
            config = engine_settings(recipe, world, micro_batch, _at_stage(zero_stage, Path(folder)))
        mae = MaskedAutoencoder(encoder, decoder)
        self.engine = Engine(mae, ds_config=config, weight_decay=0.05, world=world)
        images_BCHW = torch.randint(0, 256, (micro_batch, 3, image_size, image_size), dtype=torch.uint8)
        self._inputs = self.mask(images_BCHW, torch.rand(micro_batch, encoder.num_patches))

    def mask(self, images_BCHW: "Tensor", noise_BN: "Tensor") -> "tuple[Tensor, ...]":
        """Return what `step` takes: images and their masks."""
        from trainer.models.mask_utils import draw_mask

        return images_BCHW, *draw_mask(noise_BN, mask_ratio=0.75, grid=self._grid)

    def step(self, inputs: "tuple[Tensor, ...] | None" = None) -> None:
        """Take one optimizer step, on this micro batch or on the one in memory."""
        self.engine.step([self._inputs if inputs is None else inputs], learning_rate=1e-4, seed=0)


def _at_stage(zero_stage: int | None, folder: Path) -> str | None:
    if zero_stage is None:
        return None
    config = json.loads(data_file("ds_configs/cpu_fp32.json").read_text())
    config.setdefault("zero_optimization", {})["stage"] = zero_stage
    path = folder / "stage.json"
    path.write_text(json.dumps(config))
    return str(path)
