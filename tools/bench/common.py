"""What the benches share: candidates in turns, the machine's line, processes of their own, and a small training.

Heavy libraries are imported by the functions that need them, so that ``--help`` of a bench answers at once.
"""

import dataclasses
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config.settings import PretrainRecipe

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
    """A masked autoencoder under DeepSpeed, as one rank of the environment's world, on batches that stay in memory."""

    def __init__(
        self,
        recipe: "PretrainRecipe",
        *,
        micro_batch: int,
        accumulation: int = 1,
        ds_config: str | None = None,
        zero_stage: int | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        """Build model and engine as launch/pretrain.py does.

        Args:
            recipe: of the model; the global batch is that of micro batch, accumulation and ranks.
            micro_batch: images of a rank in one forward pass [images].
            accumulation: micro batches in a step.
            ds_config: a DeepSpeed JSON; none takes the device's.
            zero_stage: instead of its stage.
            grad_checkpointing: recompute the encoder's activations.
        """
        import torch

        from trainer.distributed.ds_config import engine_settings
        from trainer.distributed.engine import Engine, connect
        from trainer.distributed.world import world_from_environment
        from trainer.training.model_cost import flops_of
        from trainer.training.pretraining import build_model

        world = connect(world_from_environment(), timeout_s=600)
        recipe = dataclasses.replace(recipe, global_batch=micro_batch * accumulation * world.size)
        config = engine_settings(recipe, world, micro_batch, ds_config)
        if zero_stage is not None:
            config.setdefault("zero_optimization", {})["stage"] = zero_stage
        mae = build_model(recipe, grad_checkpointing=grad_checkpointing)
        self._recipe, self._grid, self.num_patches = recipe, mae.encoder.grid, mae.encoder.num_patches
        self.images_per_step, self.flops_per_image = recipe.global_batch, flops_of(mae, recipe)
        self.engine = Engine(mae, ds_config=config, weight_decay=0.05, world=world)
        torch.manual_seed(0)
        images_BCHW = torch.randint(0, 256, (micro_batch, 3, recipe.image_size, recipe.image_size), dtype=torch.uint8)
        noise_BN = torch.rand(micro_batch, self.num_patches)
        device = self.engine.device
        self._inputs = self.mask(images_BCHW.to(device), noise_BN.to(device))

    def mask(self, images_BCHW: "Tensor", noise_BN: "Tensor") -> "tuple[Tensor, ...]":
        """Return what `step` takes: images and their masks."""
        from trainer.models.mask_utils import draw_mask

        recipe = self._recipe
        how: dict[str, Any] = {"mask_ratio": recipe.mask_ratio, "predict_share": recipe.predict_share}
        return images_BCHW, *draw_mask(noise_BN, grid=self._grid, **how)

    def step(
        self, micro_batches: "Sequence[tuple[Tensor, ...]] | None" = None, *, learning_rate: float = 1e-4, seed: int = 0
    ) -> float:
        """Take one optimizer step, on these micro batches or on the one in memory; returns the loss."""
        given = [self._inputs] * self.engine.accumulation if micro_batches is None else micro_batches
        return self.engine.step(given, learning_rate=learning_rate, seed=seed).loss
