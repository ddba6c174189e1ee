"""What --dry_run prints: settings, steps, memory and cost of a training, before anything is written or computed.

`tools/plan_run.py` answers the same for a cluster that is not there yet.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainer.config.parse import as_text
from trainer.config.settings import Recipe, Runtime
from trainer.data.order.mixture import Source
from trainer.data.shards.index import describe_index
from trainer.data.sources import open_sets
from trainer.distributed import cost_model as planning
from trainer.distributed.devices import default_device
from trainer.distributed.world import World
from trainer.fault_tolerance.resume import check_run
from trainer.training.model_cost import BuildModel, ModelCost, count_model
from trainer.training.throughput import peak_flops

GIB = 2**30
_MFU = {"cuda": 0.25, "cpu": 0.5}
"""Share of the peak that is assumed; the CPU's peak is measured by multiplying matrices."""
_MATRIX, _MEASURED_S = 1024, 0.3


def describe(
    recipe: Recipe,
    runtime: Runtime,
    ds_config: Mapping[str, Any],
    found: Mapping[str, list[Source]],
    world: World,
    build: BuildModel,
) -> str:
    """Describe what the run would do; writes nothing but a missing index of the shards, as the run would.

    Args:
        recipe: what the run computes, with what it takes from --init.
        runtime: likewise.
        ds_config: filled in.
        found: the shards by setting, as `trainer.data.sources.find_sources` lists them.
        world: this process among its ranks.
        build: builds the model, with or without gradient checkpointing.

    Raises:
        ConfigError: the output folder holds something else.
        DataError: a shard breaks the rules.
    """
    check_run(recipe, runtime)
    index = open_sets(found, recipe, runtime, World())  # one rank looks; the others have left
    zero = planning.zero_of(ds_config)
    model = count_model(recipe, build, zero.precision)
    images = len(index["data"])
    lines = ["Recipe:", *_values(recipe), "Runtime:", *_values(runtime), "Data:"]
    lines += [f"  --{setting}: {describe_index(each)}" for setting, each in index.items()]
    steps, warm_up = recipe.num_steps(images), recipe.num_warmup_steps(images)
    accumulated = recipe.global_batch // (world.size * runtime.micro_batch)
    last = f"; stops at {runtime.stop_at_step}" if (runtime.stop_at_step or steps) < steps else ""
    return "\n".join(
        [
            *lines,
            f"Steps:  {steps:,} of {recipe.global_batch} images ({recipe.num_epochs(images):g} epochs), {warm_up:,} of "
            f"warm-up{last}; {world.size} rank{'s' * (world.size > 1)} x {runtime.micro_batch} images x {accumulated} "
            "accumulated",
            _memory(model, zero, runtime, world),
            _cost(model, recipe, runtime, min(steps, runtime.stop_at_step or steps), world, zero.precision),
            f"Nothing was written to {runtime.output_dir}. Without --dry_run the same command trains.",
        ]
    )


def _values(config: Any) -> list[str]:
    return [f"  --{entry.name} {as_text(getattr(config, entry.name))}" for entry in dataclasses.fields(config)]


def _memory(model: ModelCost, zero: planning.Zero, runtime: Runtime, world: World) -> str:
    states = planning.state_memory(model.weights, zero, world.size)
    activations = model.activations(runtime.micro_batch, checkpointing=runtime.grad_checkpointing)
    total = states.total + activations
    device = default_device()
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
        where = f"a GPU of {has / GIB:.1f} GiB"
    else:
        has = _host_bytes() // world.local_size
        where = f"{has / GIB:.1f} GiB of this host for each rank"
    fits = "" if total <= has else " IT DOES NOT FIT: try a smaller --micro_batch, or --grad_checkpointing true"
    return (
        f"Memory: {total / GIB:.2f} GiB a rank at most, {activations / GIB:.2f} of it activations, in {where}; "
        f"{model.weights.total / 1e6:.1f} M parameters, {model.weights.trained / 1e6:.3g} M train, ZeRO {zero.stage}, "
        f"{zero.precision}{fits}"
    )


def _cost(model: ModelCost, recipe: Recipe, runtime: Runtime, steps: int, world: World, precision: str) -> str:
    flops = model.flops + model.recomputed_flops * runtime.grad_checkpointing
    total = float(flops) * recipe.global_batch * steps
    device = default_device()
    peak, how = (peak_flops(), "its data sheet's") if device.type == "cuda" else (_measured_flops(), "its measured")
    cost = f"Cost:   {flops / 1e9:.3g} GFLOP an image and step, {total:.2e} FLOP"
    if not peak or (device.type == "cuda" and precision == "fp32"):
        return f"{cost}; how fast this device computes in {precision} is not known here"
    share = _MFU[device.type]
    ranks = world.size if device.type == "cuda" else world.size / world.local_size
    took = timedelta(seconds=math.ceil(total / (peak * share * ranks)))
    return f"{cost}; about {took} (h:mm:ss) at {share:.0%} (assumed) of {how} {peak / 1e9:,.0f} GFLOP/s, loading aside"


def _measured_flops() -> float:
    """Multiply matrices for a moment, on all threads of this process [FLOP/s]."""
    a = torch.ones(_MATRIX, _MATRIX)
    a @ a
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _MEASURED_S:
        a @ a
        count += 1
    return 2.0 * _MATRIX**3 * count / elapsed


def _host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
