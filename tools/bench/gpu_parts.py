"""What tools/bench/gpu.py measures: parts made of cases, each run in a process of its own.

A part takes less than ten minutes, so that a machine that is lent for ten minutes a command can run it. On a CPU the
same code runs with tiny models, to try it: see `Bench.rehearsal`.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tools.bench.common import Training, medians, seconds, take_turns
from trainer.config.recipes import RECIPES
from trainer.distributed.measured import read_figures
from trainer.errors import DataError, TrainerError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config.settings import PretrainRecipe

ROOT = Path(__file__).resolve().parents[2]
PART_LIMIT_S = 590
"""Of all cases of a part together."""
REFERENCE = "fp32 on the CPU"
BF16_BOUND = 0.02
"""Losses of bf16 lie so close to those of fp32, as a share."""
SIZES = {"ViT-B": ("mae_vit_base", 256), "ViT-L": ("mae_vit_large", 128), "ViT-H": ("mae_vit_huge", 64)}
"""Name -> recipe, and images of a micro batch on a GPU of 80 GB."""
_TINY: dict[str, Any] = {
    **{"model": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "encoder_depth": 2},
    **{"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4},
}
_SMOKE_STEPS, _RESUME_STEPS = 20, 12
_REQUEUE = 85

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases share."""

    rehearsal: bool
    """Run tiny models on the CPU: the figures mean nothing, but every line has run."""
    output: Path
    """JSON of the figures so far."""
    folder: Path
    """Scratch folder for shards, runs and checkpoints."""

    @property
    def device(self) -> str:
        """Where the cases compute."""
        return "cpu" if self.rehearsal else "cuda"

    def training(
        self,
        recipe: str,
        images: int,
        *,
        accumulation: int = 1,
        ds_config: str = "zero1_bf16",
        checkpointing: bool = False,
    ) -> Training:
        """Build a training of this recipe, with so many images where a GPU has 80 GB."""
        return Training(
            self.recipe(recipe),
            micro_batch=self.micro_batch(images),
            accumulation=accumulation,
            ds_config=f"ds_configs/{ds_config}.json",
            grad_checkpointing=checkpointing,
        )

    def recipe(self, name: str) -> "PretrainRecipe":
        """Return the recipe; in a rehearsal its decoder, masks and loss on a tiny model."""
        recipe, _ = RECIPES[name]()
        return dataclasses.replace(recipe, **_TINY) if self.rehearsal else recipe

    def micro_batch(self, images: int) -> int:
        """Return the largest power of two of images that fits as many GB: 128 of 80 GB are 64 of 48 and 32 of 24."""
        if self.rehearsal:
            return 4
        import torch

        share = torch.cuda.get_device_properties(0).total_memory / 2**30 / 79
        return 1 << max(0, int(images * min(share, 1.0)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement."""

    part: str
    name: str
    measure: Callable[[Bench], Values]
    limit_s: int
    """It is ended after this time."""
    place: Literal["anywhere", "cpu", "gpu"] = "anywhere"
    """cpu: runs there, whatever the bench measures; gpu: is left out of a rehearsal."""

    @property
    def key(self) -> str:
        """Part and name."""
        return f"{self.part}/{self.name}"


def cases() -> Iterator[Case]:
    """Yield all cases, those first that the others build on."""
    yield Case("machine", "ceilings", ceilings, 60)
    yield Case("machine", "gather or embedding of the decoder's table", table_backward, 60)
    yield Case("smoke", REFERENCE, partial(smoke, "cpu_fp32", 1), 60, "cpu")
    for config, stage in (
        ("cpu_fp32", 0),
        ("zero1_bf16", 1),
        ("zero2_bf16", 2),
        ("zero3_bf16", 3),
        ("zero3_offload", 3),
    ):
        yield Case("smoke", f"{config}, ZeRO {stage}", partial(smoke, config, stage), 90)
    for name, size in SIZES.items():
        yield Case("step", name, partial(step, *size, for_plans=True), 180)
        yield Case("peers", name, partial(peers, *size), 190)
    large = SIZES["ViT-L"]
    yield Case("stages", "ViT-L, 4 accumulated", partial(step, *large, accumulation=4), 140)
    for config in ("zero2_bf16", "zero3_bf16", "zero3_offload"):
        yield Case("stages", f"ViT-L, {config}", partial(step, *large, ds_config=config), 150)
    yield Case("compile", "ViT-L, compile_mode default", partial(step, *large, mode="default"), 290)
    yield Case("compile", "ViT-L, CUDA graphs", partial(step, *large, mode="reduce-overhead"), 290, "gpu")
    yield Case("checkpointing", "ViT-L", partial(step, *large, checkpointing=True), 150)
    yield Case("lora", "ViT-B", lora, 120)
    yield Case("cross", "mae_vit_base_fast", partial(step, "mae_vit_base_fast", 256, for_plans=True), 150)
    yield Case("profile", "ViT-L", profile, 150)
    for side in (256, 512):
        yield Case("loader", f"files of {side} pixels", partial(loader, side), 290)
    yield Case("save", "ViT-L", save, 290)
    for name, more in (("default", ()), ("deterministic", ("--deterministic", "true"))):
        yield Case("resume", name, partial(resume, more), 290)


# ------------------------------------------------------------------------------------------- the machine


def _median_s(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the time of some work among others of its kind, so that the host's time to start it is hidden [s]."""

    def several() -> None:
        for _ in range(repeats):
            work()

    several()
    return statistics.median(seconds(several, device) for _ in range(5)) / repeats


def ceilings(bench: Bench) -> Values:
    """Measure a matrix product and copies: what any step could reach at most."""
    import torch

    device, side, size = bench.device, *((128, 2**20) if bench.rehearsal else (8192, 2**31))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(size // 8, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty_like(host, device=device)
    values: Values = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "matrix_tflop_per_s": 2 * side**3 / _median_s(lambda: a @ b, device) / 1e12,
        "copy_gb_per_s": 2 * size / _median_s(lambda: target.copy_(source), device) / 1e9,
        "to_device_gb_per_s": host.nbytes / _median_s(lambda: there.copy_(host, non_blocking=True), device) / 1e9,
        "to_host_gb_per_s": host.nbytes / _median_s(lambda: host.copy_(there, non_blocking=True), device) / 1e9,
    }
    if device == "cuda":
        from trainer.training.throughput import peak_flops

        found = torch.cuda.get_device_properties(0)
        values |= {"memory_gib": found.total_memory / 2**30, "cuda": torch.version.cuda, "sheet_flops": peak_flops()}
        values["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return values


def table_backward(bench: Bench) -> Values:
    """Time the gradient of the table that all images share, by gather as the model takes it, and by embedding."""
    import torch

    device, images, width = bench.device, *((2, 32) if bench.rehearsal else (128, 512))
    index_BM = torch.rand(images, 196, device=device).argsort(1)[:, :147]
    table_1NE = torch.randn(1, 196, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_BME = torch.randn(images, 147, width, device=device, dtype=torch.bfloat16)
    taken = table_1NE.expand(images, -1, -1).gather(1, index_BM[..., None].expand(-1, -1, width))
    looked_up = torch.nn.functional.embedding(index_BM, table_1NE[0])

    def backward(result: "Tensor") -> object:
        return torch.autograd.grad(result, table_1NE, grad_BME, retain_graph=True)

    return {
        "gather_ms": 1000 * _median_s(lambda: backward(taken), device),
        "embedding_ms": 1000 * _median_s(lambda: backward(looked_up), device),
    }


# ------------------------------------------------------------------------------------------- smoke


def smoke(ds_config: str, zero_stage: int, bench: Bench) -> Values:
    """Train a tiny model for 20 steps; its losses are those of the CPU in fp32, and a saved state comes back.

    Raises:
        DataError: one of the two is not so.
    """
    import torch

    recipe = dataclasses.replace(RECIPES["mae_vit_base"]()[0], **_TINY)
    training = Training(
        recipe, micro_batch=4, accumulation=2, ds_config=f"ds_configs/{ds_config}.json", zero_stage=zero_stage
    )
    engine = training.engine
    draw = torch.Generator().manual_seed(0)

    def micro_batch() -> "tuple[Tensor, ...]":
        coarse = torch.randint(0, 256, (4, 3, 4, 4), generator=draw).float()
        images_BCHW = torch.nn.functional.interpolate(coarse, size=recipe.image_size, mode="bilinear").to(torch.uint8)
        noise_BN = torch.rand(4, training.num_patches, generator=draw)
        return training.mask(images_BCHW.to(engine.device), noise_BN.to(engine.device))

    losses = []
    for number in range(_SMOKE_STEPS):
        rate = 2e-3 * min(1, (number + 1) / 5)
        losses.append(training.step([micro_batch(), micro_batch()], learning_rate=rate, seed=number))
    engine.check_finite()
    state = bench.folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    engine.capture(copy=True)(state)
    before = engine.trainable_state()
    training.step([micro_batch(), micro_batch()], seed=0)
    engine.load(state, written_by=1)
    after = engine.trainable_state()
    if differing := [name for name in before if not torch.equal(before[name], after[name])]:
        raise DataError(f"a state that was saved and loaded differs in {differing[0]}")
    return {"losses": losses} | _compared(losses, bench)


def _compared(losses: list[float], bench: Bench) -> Values:
    reference = read_figures(bench.output).find("smoke", REFERENCE) if bench.output.exists() else None
    if reference is None or reference.error:
        return {}
    largest = max(abs(a / b - 1) for a, b in zip(losses, reference.values["losses"], strict=True))
    if not largest <= BF16_BOUND:
        raise DataError(f"losses differ by {largest:.2%} from those of {REFERENCE}, but {BF16_BOUND:.0%} are allowed")
    return {"loss_difference": largest}


# ------------------------------------------------------------------------------------------- steps


def step(
    recipe: str,
    images: int,
    bench: Bench,
    *,
    accumulation: int = 1,
    ds_config: str = "zero1_bf16",
    checkpointing: bool = False,
    mode: str = "off",
    for_plans: bool = False,
) -> Values:
    """Time optimizer steps under DeepSpeed, on a batch that stays in memory.

    Args:
        recipe: of launch/pretrain.py.
        images: of a micro batch, on a GPU of 80 GB.
        bench: where.
        accumulation: micro batches in a step.
        ds_config: name of a file in ds_configs.
        checkpointing: recompute activations.
        mode: compile_mode.
        for_plans: tools/plan_run.py takes the MFU.
    """
    from trainer.training.throughput import forget_peak

    idle_gib = forget_peak()
    training = bench.training(
        recipe, images, accumulation=accumulation, ds_config=ds_config, checkpointing=checkpointing
    )
    if mode != "off":
        training.engine.compile(mode)
    first_s = seconds(training.step, bench.device)
    times = [seconds(training.step, bench.device) for _ in range(4 if bench.rehearsal else 16)]
    return {
        **({"kind": "pretrain"} if for_plans else {}),
        "model": bench.recipe(recipe).model,
        "precision": training.engine.precision,
        "zero_stage": training.engine.zero_stage,
        "micro_batch": training.images_per_step // accumulation,
        "first_step_s": first_s,
        **rates(statistics.median(times[2:]), training.images_per_step, training.flops_per_image, bench.device),
        "memory_gib": _peak_gib(bench.device, idle_gib),
    }


def rates(step_s: float, images: int, flops_per_image: int, device: str) -> Values:
    """Return the figures of a step; the share of the peak only of a GPU that is known."""
    from trainer.training.throughput import peak_flops

    values = {"step_ms": 1000 * step_s, "images_per_s": images / step_s, "flops_per_image": flops_per_image}
    peak = peak_flops() if device == "cuda" else None
    return values | ({"mfu": images / step_s * flops_per_image / peak} if peak else {})


def _peak_gib(device: str, idle_gib: float) -> float:
    import torch

    from trainer.training.throughput import peak_resident_gib

    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_resident_gib() - idle_gib


def peers(recipe: str, images: int, bench: Bench) -> Values:
    """Time this project's form, transformers' ViTMAE and the published form: same weights, fused AdamW, in turns."""
    from tools.bench import step as bench_step

    wanted = bench.recipe(recipe)
    settings = bench_step.Settings(
        model=wanted.model,
        image_size=wanted.image_size,
        patch_size=wanted.patch_size,
        encoder_depth=wanted.encoder_depth,
        micro_batch=bench.micro_batch(images),
        repeats=2 if bench.rehearsal else 7,
        steps_in_a_row=1 if bench.rehearsal else 4,
        device=bench.device,
        variants=("exact", bench_step.PUBLISHED),
    )
    measured, _ = bench_step.measure(settings)
    values: Values = {"model": wanted.model, "micro_batch": settings.micro_batch}
    for name, found in measured.items():
        short = {"exact": "ours"}.get(name, name)
        figures = rates(found.step_s, settings.micro_batch, found.flops, bench.device)
        del figures["flops_per_image"]
        memory = {} if bench.rehearsal else {"memory_gib": found.memory_gib}
        values |= {f"{short}_{key}": value for key, value in (figures | memory).items()}
    losses = [found.first_loss for found in measured.values()]
    if max(losses) > (1 + BF16_BOUND) * min(losses):
        raise DataError(f"the losses before any step differ ({losses}), so these are different models")
    return values | {"losses": losses}


def lora(bench: Bench) -> Values:
    """Time detectors with LoRA and with all weights, in turns; their memory is measured by tools/bench/lora.py."""
    from tools.bench import lora as bench_lora

    settings = bench_lora.Settings(device=bench.device, micro_batch=bench.micro_batch(128))
    if bench.rehearsal:
        settings = dataclasses.replace(settings, model=_TINY["model"], image_size=_TINY["image_size"])
    modes = {name: bench_lora.Mode(settings, lora=name == "lora") for name in bench_lora.MODES}
    steps = {name: partial(seconds, mode.step, bench.device) for name, mode in modes.items()}
    step_s = medians(take_turns(steps, repeats=2 if bench.rehearsal else 10, warmup=2))
    flops = modes["lora"].model.flops_per_image()
    return {
        "kind": "lora",
        "model": settings.model,
        "micro_batch": settings.micro_batch,
        **rates(step_s["lora"], settings.micro_batch, flops, bench.device),
        "all_weights_step_ms": 1000 * step_s["full"],
        "lora_of_all_weights": step_s["lora"] / step_s["full"],
    }


def profile(bench: Bench) -> Values:
    """Count what the host starts and waits for in a step; a table of kernels goes beside the JSON."""
    import torch
    from torch.profiler import ProfilerActivity

    training = bench.training(*SIZES["ViT-L"])
    for _ in range(3):
        training.step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        wall_s = seconds(training.step, bench.device)
    events = seen.key_averages()
    starts = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch")
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    key = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
    table = events.table(sort_by=key, row_limit=45, max_name_column_width=90)
    bench.output.with_suffix(".profile.txt").write_text(table)
    return {
        "step_ms": 1000 * wall_s,
        "device_busy_ms": sum(getattr(event, "self_device_time_total", 0.0) for event in events) / 1000,
        "kernels": sum(event.count for event in events if event.key in starts),
        "waits": sum(event.count for event in events if event.key in waits),
    }


# ------------------------------------------------------------------------------------------- whole runs


def _pretrain(bench: Bench, data: Path, output: Path, *argv: str) -> list[dict[str, Any]]:
    """Run launch/pretrain.py; returns the rows of its metrics.jsonl."""
    tiny = [word for name, value in _TINY.items() for word in (f"--{name}", str(value))] if bench.rehearsal else []
    words = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *tiny, *argv]
    words += ["--data", f"{data}/*.tar", "--output_dir", str(output), "--progress_bar", "false", "--warmup_epochs", "1"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if done.returncode not in (0, _REQUEUE):
        raise DataError(f"launch/pretrain.py ended with {done.returncode}: {done.stdout[-1500:]}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _shards(bench: Bench, side: int) -> Path:
    """Write synthetic photographs of this side as shards, once."""
    from trainer.parallel import parallel_map

    folder = bench.folder / f"shards-{side}"
    if not folder.exists():
        folder.mkdir(parents=True)
        shards, images = (2, 32) if bench.rehearsal else (16 * 256 // side, 512)
        work = [(folder / f"s-{number:03d}.tar", side, images) for number in range(shards)]
        list(parallel_map(_write_shard, work, num_processes=len(os.sched_getaffinity(0))))
    return folder


def _write_shard(work: tuple[Path, int, int]) -> None:
    import io
    import tarfile

    import numpy as np

    from tools.bench.loader import picture

    path, side, images = work
    rng = np.random.default_rng([side, int(path.stem[2:])])
    pictures = [picture(rng, side) for _ in range(min(images, 64))]  # drawing takes longer than reading
    with tarfile.open(path, "w") as tar:
        for number, payload in zip(range(images), itertools.cycle(pictures), strict=False):
            info = tarfile.TarInfo(f"{path.stem}-{number:05d}.jpg")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def loader(side: int, bench: Bench) -> Values:
    """Run launch/pretrain.py on shards, with worker processes, pinned memory and saves; what its metrics say."""
    micro, steps = bench.micro_batch(256), "8" if bench.rehearsal else "60"
    workers = 1 if bench.rehearsal else max(1, len(os.sched_getaffinity(0)) - 2)
    rows = _pretrain(
        bench, _shards(bench, side), bench.folder / f"run-{side}",
        "--recipe", "mae_vit_base", "--micro_batch", str(micro), "--global_batch", str(4 * micro), "--epochs", "400",
        "--stop_at_step", steps, "--log_every", "2", "--save_every", "1000", "--num_workers", str(workers),
    )  # fmt: skip
    rows = [row for row in rows if "images_per_s" in row]
    names = ("images_per_s", "data_wait_share", *(() if bench.rehearsal else ("mfu", "memory_gib")))
    late = rows[len(rows) // 2 :]  # the first ones fill the workers' queues
    return {"micro_batch": micro, "workers": workers} | {
        name: statistics.median(row[name] for row in late) for name in names if name in late[0]
    }


def save(bench: Bench) -> Values:
    """Measure how long the loop stands still for a checkpoint, and the first copies to host memory."""
    from tools.bench import checkpoint

    training = bench.training(*SIZES["ViT-L"])
    training.step()
    copies = [seconds(lambda: training.engine.capture(copy=True), bench.device) for _ in range(3)]
    rounds, size = checkpoint.measure(training, str(bench.folder), steps=2 if bench.rehearsal else 10, repeats=2)
    return {
        "checkpoint_gb": size / 1e9,
        "first_copy_s": copies[0],
        "next_copy_s": copies[-1],
        "stall_at_once_s": rounds[checkpoint.AT_ONCE].stall,
        "stall_in_background_s": rounds[checkpoint.BACKGROUND].stall,
    }


def resume(more: tuple[str, ...], bench: Bench) -> Values:
    """Train 12 steps twice, and once in two halves: are losses and checkpoints equal bit for bit?"""
    micro = str(bench.micro_batch(64))
    seen: dict[str, tuple[Any, ...]] = {}
    for name, stops in (("once", [12]), ("again", [12]), ("in halves", [6, 12])):
        output = bench.folder / f"resume-{'-'.join(more).strip('-')}-{name}"
        for stop in stops:
            rows = _pretrain(
                bench, _shards(bench, 256), output,
                "--recipe", "mae_vit_base", "--micro_batch", micro, "--global_batch", str(2 * int(micro)),
                "--epochs", "50", "--stop_at_step", str(stop), "--log_every", "1", "--save_every", "6", *more,
            )  # fmt: skip
        [manifest] = output.glob(f"checkpoints/step-*{_RESUME_STEPS}/manifest.json")
        files = json.loads(manifest.read_text())["files"]
        seen[name] = ([row["loss"] for row in rows if "loss" in row], {n: f["sha256"] for n, f in files.items()})
    once = seen["once"]
    difference = max(abs(a / b - 1) for a, b in zip(seen["in halves"][0], once[0], strict=True))
    return {
        "losses_repeat_bitwise": seen["again"][0] == once[0],
        "losses_resume_bitwise": seen["in halves"][0] == once[0],
        "weights_resume_bitwise": seen["in halves"][1] == once[1],
        "loss_difference": difference,
    }


def why(error: Exception) -> str:
    """Say on one line what ended a case."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TrainerError) else f"{type(error).__name__}: {text}"
