"""Plan a training run before it is queued: memory, time, data, checkpoints and failures, each with its assumptions.

Usage: python tools/plan_run.py --recipe mae_vit_large --nodes 8 --gpus 8 --hardware h100 --images 300000000
           [--network ethernet] [--plot plan.png] [--name value: any setting below or of the launcher's recipe]

The model is the launchers' own, built without memory; its parameters, FLOPs and saved activations are counted from it.
--ds_config decides stage, precision and communication (default ds_configs/zero1_bf16.json). Without --micro_batch the
largest up to the recipe's is taken that divides the global batch.

Examples:
    python tools/plan_run.py --recipe mae_vit_large --nodes 8 --gpus 8 --hardware h100 --images 300000000
    python tools/plan_run.py --recipe mae_vit_base --nodes 4 --hardware a100 --network ethernet --images 1281167
    python tools/plan_run.py --recipe lora --gpus 1 --images 100000 --plot plan.png
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.checks import check_types
from trainer.config.command_line import Training, TrainingCommandLine
from trainer.config.recipes import TRAININGS
from trainer.config.settings import DetectorRecipe, PretrainRecipe, Recipe, Runtime
from trainer.distributed import cost_model as planning
from trainer.distributed.cost_model import Checkpoint, Failures, Memory, StepTime, Zero, divisors
from trainer.distributed.hardware import ETHERNET, GB, HARDWARE, dense_bf16_peak
from trainer.distributed.measured import read_figures
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import data_file
from trainer.startup import loading

if TYPE_CHECKING:
    from trainer.training.model_cost import BuildModel, ModelCost

GIB, HOUR, DAY = 2**30, 3600, 86400
LINK_SHARE, ASSUMED_MFU = 0.7, 0.25
MEASURED = (Path("gpu.json"), Path(__file__).resolve().parent / "bench" / "gpu.json")
"""Where figures of a GPU are looked for."""
SAVE_OVERHEAD_S = 0.1
REPEATS, SEED = 64, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Assumptions about the cluster and the data."""

    recipe: str = ""
    """A recipe of launch/pretrain.py or launch/finetune.py."""
    nodes: int = 1
    """Hosts."""
    gpus: int = 8
    """GPUs of a host."""
    hardware: Literal["a100", "h100", "h200"] = "h100"
    """The GPU, as SXM with 80, 80 or 141 GB."""
    network: Literal["infiniband", "ethernet"] = "infiniband"
    """Between hosts: an adapter of 200 (a100) or 400 Gbit/s for each GPU, or 100 Gbit/s Ethernet for the host."""
    images: int = 0
    """Size of the training set [images]."""
    mfu: float | None = None
    """Share of the peak that is reached; none takes the measured one, or else 0.25: published ViTs in eager or compiled
    PyTorch reach 0.1 to 0.37."""
    measured: str = "auto"
    """JSON of tools/bench/gpu.py, measured on this hardware; auto looks for gpu.json here and in tools/bench, off for
    none."""
    image_kb: float = 91.0
    """Mean size of an image file [kB]."""
    decode_per_core: float = 860.0
    """Decoding and augmenting; tools/bench/loader.py measures it (860 at 512 pixels, 91 kB) [images/s]."""
    cores: int = 96
    """CPU cores of a host that may load data."""
    storage_mb_s: float = 2000.0
    """What a host reads from and writes to storage, each [MB/s]."""
    host_copy_gb_s: float = 10.0
    """Copy from a GPU to pinned host memory, at the pace of a checkpoint [GB/s]."""
    node_mtbf_hours: float = 3700.0
    """Mean time between failures of a host: 6.5 in 1000 node-days on 16,000 A100s (arXiv 2410.21680); 419 in 54 days of
    2,048 hosts, or 6300 hours, for Llama 3 (arXiv 2407.21783) [hours]."""
    restart_s: float = 600.0
    """From a failure to the first step: notice, requeue, start, load [seconds]."""
    memory_reserve: float = 0.1
    """Share of the GPU's memory kept for CUDA, NCCL and fragmentation."""
    plot: str = ""
    """PNG file for the picture; empty for none."""

    def __post_init__(self) -> None:
        check_types(self)
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int | float) and value <= 0 and entry.name != "memory_reserve":
                raise ConfigError(f"{entry.name} is {value!r}, but must be above 0: pass --{entry.name}")
        for name, least in (("mfu", 1e-6), ("memory_reserve", 0.0)):
            if (share := getattr(self, name)) is not None and not least <= share < 1:
                raise ConfigError(f"{name} is {share!r}, but must be a share of the whole, from {least:g} to below 1")
        if self.plot and not (self.plot.endswith(".png") and Path(self.plot).absolute().parent.is_dir()):
            raise ConfigError(f"plot is {self.plot!r}, but must be a .png file in a folder that exists")


@dataclass(frozen=True, slots=True)
class Plan:
    """All results of the planner."""

    settings: Settings
    recipe: Recipe
    runtime: Runtime
    zero: Zero
    model: "ModelCost"
    step: StepTime
    sent: tuple[float, float]
    link: float
    checkpoint: Checkpoint
    failures: Failures
    mfu: float
    mfu_source: str
    """Where it is from: measured, given or assumed."""

    @property
    def ranks(self) -> int:
        """GPUs of the run."""
        return self.settings.nodes * self.settings.gpus

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, as trainer/training/run.py counts them."""
        return self.recipe.num_steps(self.settings.images)

    @property
    def memory_limit(self) -> float:
        """Usable bytes of a GPU."""
        return HARDWARE[self.settings.hardware].memory * (1 - self.settings.memory_reserve)

    def memory(self, stage: int, micro_batch: int, *, checkpointing: bool) -> Memory:
        """Memory of a GPU at a given stage and micro batch."""
        states = planning.state_memory(self.model.weights, self.zero.at_stage(stage), self.ranks)
        return dataclasses.replace(states, activations=self.model.activations(micro_batch, checkpointing=checkpointing))

    def fits(self, stage: int, micro_batch: int) -> bool:
        """Whether that fits into a GPU, with the run's setting of checkpointing."""
        return self.memory(stage, micro_batch, checkpointing=self.runtime.grad_checkpointing).total <= self.memory_limit

    def interval_steps(self) -> int:
        """Return the best interval between checkpoints, at least the time to write one [steps].

        Daly's best interval of 900 s, 60 s to write and 0.4 s a step: 900 / 0.4 = 2250 steps.
        """
        wanted = round(max(self.failures.daly(), self.failures.write) / self.step.total)
        return min(self.steps, max(1, wanted))


CLI = TrainingCommandLine(Settings, __doc__, TRAININGS, required=("recipe",))


def main(line: Training[Settings, Recipe, Runtime]) -> int:
    """Print the plan; returns the exit code."""
    settings = line.settings
    plan = make_plan(settings, line.recipe, fitting_runtime(line))
    print("\n".join([*describe_run(plan), *describe_memory(plan), *describe_time(plan), *describe_failures(plan)]))
    print("\n".join(describe_assumptions(plan)))
    if settings.plot:
        draw(plan, settings.plot)
    return 0


def fitting_runtime(line: Training[Settings, Recipe, Runtime]) -> Runtime:
    """Return the runtime with the largest micro batch, up to the recipe's, that divides a rank's share of the batch.

    A micro_batch that was given by name stays.
    """
    share, rest = divmod(line.recipe.global_batch, line.settings.nodes * line.settings.gpus)
    if "micro_batch" in line.given or rest:
        return line.runtime
    fitting = max(n for n in divisors(share) if n <= line.runtime.micro_batch)
    return dataclasses.replace(line.runtime, micro_batch=fitting)


def make_plan(settings: Settings, recipe: Recipe, runtime: Runtime) -> Plan:
    """Compute everything that is printed.

    Raises:
        ConfigError: the ds_config or the batch is not usable; the message is that of the launchers.
    """
    with loading("torch and the model library"):
        from trainer.distributed.ds_config import engine_settings
        from trainer.distributed.world import World
        from trainer.training.model_cost import count_model

    ranks, hardware = settings.nodes * settings.gpus, HARDWARE[settings.hardware]
    runtime = dataclasses.replace(runtime, ds_config=runtime.ds_config or str(data_file("ds_configs/zero1_bf16.json")))
    world = World(size=ranks, local_size=settings.gpus)
    config = engine_settings(recipe, world, runtime.micro_batch, runtime.ds_config)
    zero = planning.zero_of(config)
    if zero.stage == 0 and zero.accum != zero.precision:
        raise ConfigError(
            f"ds_config {runtime.ds_config} has stage 0 with {zero.precision} weights and {zero.accum} accumulation, "
            f"which DeepSpeed refuses: choose stage 1, or data_types.grad_accum_dtype {zero.precision}"
        )
    model = count_model(recipe, builder_of(recipe), zero.precision)
    accumulation: int = config["gradient_accumulation_steps"]
    sent = planning.traffic(model.weights, zero, ranks, accumulation)
    between = ETHERNET if settings.network == "ethernet" else hardware.infiniband * settings.gpus
    link = LINK_SHARE * min(hardware.nvlink, between if settings.nodes > 1 else math.inf)
    flops = model.flops + model.recomputed_flops * runtime.grad_checkpointing
    mfu, mfu_source = mfu_of(settings, recipe, model.flops, zero.precision)
    node_images = recipe.global_batch / settings.nodes
    step = planning.step_time(
        zero,
        trained=model.weights.trained,
        compute_s=recipe.global_batch / ranks * flops / (hardware.dense_flops[zero.precision] * mfu),
        sent=sent,
        link=link,
        decode_s=node_images / (settings.decode_per_core * settings.cores),
        storage_s=node_images / views_of_a_file(recipe) * settings.image_kb / (1000 * settings.storage_mb_s),
    )
    frozen = not (isinstance(recipe, DetectorRecipe) and recipe.backbone_is_frozen)
    saved = planning.checkpoint_of(model.weights, zero, settings.nodes, settings.gpus, with_frozen=frozen)
    copy_s = SAVE_OVERHEAD_S + saved.rank / (settings.host_copy_gb_s * GB)
    write_s = saved.node / (settings.storage_mb_s * 1e6)
    background = runtime.background_saves
    failures = Failures(
        mtbf=settings.node_mtbf_hours * HOUR / settings.nodes,
        stall=copy_s if background else copy_s + write_s,
        write=write_s if background else 0.0,
        restart=settings.restart_s + write_s,
    )
    return Plan(settings, recipe, runtime, zero, model, step, sent, link, saved, failures, mfu, mfu_source)


def mfu_of(settings: Settings, recipe: Recipe, flops: int, precision: str) -> tuple[float, str]:
    """Return the share of the peak that the plan takes, and where it is from.

    What was given counts, then what was measured on this hardware in bf16, then an assumption.

    Raises:
        ConfigError: the figures that were named are not of this hardware.
    """
    if settings.mfu is not None:
        return settings.mfu, "given by --mfu"
    named = settings.measured not in ("auto", "off")
    places = [Path(settings.measured)] if named else [place for place in MEASURED if place.exists()]
    if settings.measured == "off" or not places:
        return ASSUMED_MFU, "assumed, not measured on any GPU: optimizer and kernels that wait for memory are in it"
    try:
        figures = read_figures(places[0])
    except ConfigError as error:
        if named:
            raise
        return ASSUMED_MFU, f"assumed: {error}"
    sheet = HARDWARE[settings.hardware].dense_flops["bf16"]
    same = re.search(rf"\b{settings.hardware}\b", figures.device.lower()) and dense_bf16_peak(figures.device) == sheet
    fits = bool(same) and not figures.rehearsal
    if named and not fits:
        raise ConfigError(
            f"measured is {settings.measured}, with figures of {figures.device}, but hardware is {settings.hardware}: "
            "name figures of this hardware, or leave measured out"
        )
    kind = "pretrain" if isinstance(recipe, PretrainRecipe) else "lora"
    found = figures.mfu(kind, recipe.model, flops) if fits and precision == "bf16" else None
    if found is None:
        lacking = f"{kind} in {precision}" if fits else settings.hardware
        return ASSUMED_MFU, f"assumed: {places[0]} has figures of {figures.device}, none of {lacking}"
    share, model = found
    other = "" if model == recipe.model else f" with {model}, the nearest by FLOPs"
    return share, f"measured on {figures.device}{other}: {places[0]}"


def builder_of(recipe: Recipe) -> "BuildModel":
    """Return the function that builds the launchers' model."""
    from trainer.detection.build import assemble_detector
    from trainer.training.pretraining import build_model

    if isinstance(recipe, PretrainRecipe):
        return functools.partial(build_model, recipe)
    assert isinstance(recipe, DetectorRecipe)
    return functools.partial(assemble_detector, recipe, None)


def describe_run(plan: Plan) -> list[str]:
    """Describe the run."""
    settings, recipe, model, zero = plan.settings, plan.recipe, plan.model, plan.zero
    accumulation = recipe.global_batch // (plan.ranks * plan.runtime.micro_batch)
    trained, total = model.weights.trained, model.weights.total
    return [
        f"{settings.recipe} on {settings.nodes} x {settings.gpus} {settings.hardware.upper()} = {plan.ranks} GPUs, "
        f"{settings.network} between hosts; {Path(plan.runtime.ds_config or '').name}: ZeRO {zero.stage}, "
        f"{zero.precision}, gradients add up in {zero.accum} and travel in {zero.communication}",
        f"  model        {recipe.model} at {recipe.image_size} pixels, {total / 1e6:.1f} M parameters, of which "
        f"{trained / 1e6:.3g} M train; {model.flops / 1e9:.1f} GFLOP an image and step",
        f"  batch        {recipe.global_batch} = {plan.ranks} GPUs x {plan.runtime.micro_batch} images "
        f"(--micro_batch {plan.runtime.micro_batch}) x {accumulation} accumulated",
        f"  schedule     {recipe.num_epochs(settings.images):g} epochs of {settings.images:,} images = "
        f"{plan.steps:,} steps",
    ]


def describe_memory(plan: Plan) -> list[str]:
    """Tabulate the memory of a GPU by stage, and whether the run fits, else what would fit."""
    micro, lean = plan.runtime.micro_batch, plan.runtime.grad_checkpointing
    names = ("parameters", "gradients", "optimizer", "buffers", "activations", "total")
    lines = [
        f"\nmemory of a GPU [GiB], {micro} images; limit {plan.memory_limit / GIB:.1f}; * with --grad_checkpointing",
        "  ZeRO" + "".join(f"{name:>13}" for name in (*names, "activations*", "total*")),
    ]
    for stage in range(4):
        plain, lighter = (plan.memory(stage, micro, checkpointing=on) for on in (False, True))
        values = [*(getattr(plain, name) for name in names), lighter.activations, lighter.total]
        host = f"  and {plain.host / GIB:.1f} in host memory" if plain.host else ""
        mark = "  <- this run" if stage == plan.zero.stage else ""
        lines.append(f"  {stage:4d}" + "".join(f"{value / GIB:13.2f}" for value in values) + host + mark)
    need = plan.memory(plan.zero.stage, micro, checkpointing=lean).total / GIB
    if plan.fits(plan.zero.stage, micro):
        return [*lines, f"  fits: {need:.1f} of {plan.memory_limit / GIB:.1f} GiB"]
    return [*lines, f"  DOES NOT FIT: {need:.1f} of {plan.memory_limit / GIB:.1f} GiB. {remedies(plan)}"]


def remedies(plan: Plan) -> str:
    """Return changes that would fit: a smaller micro batch, checkpointing, a higher stage."""
    stage, micro = plan.zero.stage, plan.runtime.micro_batch
    smaller = [n for n in divisors(plan.recipe.global_batch // plan.ranks) if n < micro and plan.fits(stage, n)]
    found = [f"--micro_batch {max(smaller)} is the largest that fits" if smaller else "no smaller micro batch fits"]
    if not plan.runtime.grad_checkpointing:
        total = plan.memory(stage, micro, checkpointing=True).total
        verb = "fits" if total <= plan.memory_limit else "does not fit"
        found.append(f"--grad_checkpointing true takes {total / GIB:.1f} GiB and {verb}")
    if stage < 3:
        fitting = next((n for n in range(stage + 1, 4) if plan.fits(n, micro)), None)
        found.append(
            f"the next stage to try is {fitting or stage + 1}{'' if fitting else ', which does not fit either'}"
        )
    return "; ".join(found) + "."


def describe_time(plan: Plan) -> list[str]:
    """Describe the time of a step, its bottleneck, and the rates of reading and decoding."""
    settings, step = plan.settings, plan.step
    images_s = plan.recipe.global_batch / step.total
    per_node = images_s / settings.nodes
    read = per_node / views_of_a_file(plan.recipe)
    gradients, parameters = (size / GB for size in plan.sent)
    return [
        f"\nstep {1000 * step.total:.1f} ms; the bottleneck is {step.bottleneck}",
        f"  compute      {1000 * step.compute:.1f} ms at MFU {plan.mfu:.3g}",
        f"  network      {1000 * step.communication:.1f} ms at {plan.link / GB:.4g} GB/s, "
        f"{1000 * step.exposed:.1f} of it waited for; a GPU sends {gradients:.3g} GB of gradients and "
        f"{parameters:.3g} GB of parameters",
        f"  loading      {1000 * step.decode:.1f} ms to decode, {1000 * step.storage:.1f} ms to read",
        f"  rate         {images_s:,.0f} images/s, {images_s / plan.ranks:,.0f} a GPU; each host reads {read:,.0f} "
        f"images/s, {read * settings.image_kb / 1000:,.0f} MB/s, and decodes on "
        f"{math.ceil(per_node / settings.decode_per_core)} cores",
        f"  whole run    {duration(plan.steps * step.total)} without failures, "
        f"{plan.steps * step.total * plan.ranks / HOUR:,.0f} GPU hours; the set has "
        f"{settings.images * settings.image_kb / 1e9:,.2f} TB",
    ]


def describe_failures(plan: Plan) -> list[str]:
    """Describe the size of checkpoints, the best interval between them, and the cost of failures."""
    fail, saved, step_s = plan.failures, plan.checkpoint, plan.step.total
    how = "a copy in host memory" if plan.runtime.background_saves else "the files"
    best = plan.interval_steps()
    lines = [
        f"\ncheckpoint {saved.total / GB:.3g} GB; the training waits {fail.stall:.2f} s for {how} "
        f"({saved.rank / GB:.3g} GB of the largest rank), written {fail.write:.1f} s later",
        f"  failures     one in {fail.mtbf / HOUR:,.1f} hours, {plan.steps * step_s / fail.mtbf:.1f} in the run; "
        f"{fail.restart:.0f} s to start again",
        f"  best         every {fail.daly():,.0f} s (Daly; Young {fail.young():,.0f} s): --save_every {best}",
    ]
    for name, every in (("best", best), ("recipe's", plan.runtime.save_every)):
        goodput = fail.simulate(every * step_s, plan.steps * step_s, repeats=REPEATS, seed=SEED)
        took = sorted(plan.steps * step_s / goodput)
        low, middle, high = took[3], sum(took) / REPEATS, took[-4]
        lines.append(
            f"  {name:12s} --save_every {every}, {every * step_s:,.0f} s: goodput {goodput.mean():.2%}, "
            f"{duration(middle)} ({duration(low)} to {duration(high)} in nine of ten of {REPEATS} simulated runs)"
        )
    return lines


def duration(seconds: float) -> str:
    """Write a time in days, or in hours if it is short."""
    return f"{seconds / DAY:.2f} days" if seconds >= DAY else f"{seconds / HOUR:.2f} hours"


def views_of_a_file(recipe: Recipe) -> int:
    """Return how many images of a batch come from one file; each still counts as decoded separately."""
    return recipe.aug_repeats if isinstance(recipe, PretrainRecipe) else 1


def describe_assumptions(plan: Plan) -> list[str]:
    """List the assumptions behind the numbers."""
    settings, hardware = plan.settings, HARDWARE[plan.settings.hardware]
    peak = hardware.dense_flops[plan.zero.precision]
    rows = [
        ("peak", f"{peak / 1e12:.4g} TFLOP/s", f"dense {plan.zero.precision}, NVIDIA's data sheet"),
        ("memory", f"{hardware.memory / GB:.0f} GB", f"data sheet; {settings.memory_reserve:.0%} in reserve"),
        ("links", f"{plan.link / GB:.4g} GB/s", f"{LINK_SHARE:.0%} of the slower of NVLink ({hardware.nvlink / GB:.0f} "
         "GB/s a GPU) and the host's network"),
        ("MFU", f"{plan.mfu:.3g}", plan.mfu_source),
        ("decoding", f"{settings.decode_per_core:g} images/s", f"of a core, {settings.cores} cores a host"),
        ("storage", f"{settings.storage_mb_s:g} MB/s", f"of a host; files of {settings.image_kb:g} kB"),
        ("host copy", f"{settings.host_copy_gb_s:g} GB/s", f"and {SAVE_OVERHEAD_S} s a save; assumed"),
        ("failures", f"{settings.node_mtbf_hours:g} hours", "between those of one host; arXiv 2410.21680, see --help"),
        ("restart", f"{settings.restart_s:g} s", "assumed, and reading the checkpoint"),
    ]  # fmt: skip
    lines = ["\nassumptions (each is a setting; --help)", *(f"  {n:12s} {value:16s} {why}" for n, value, why in rows)]
    return [
        *lines,
        "  Rings over all GPUs without latency; with overlap_comm traffic hides behind the backward pass,",
        "  but for the last bucket of gradients (reduce_bucket_size).",
        "  Memory is a sum of parts that are not all there at once; ZeRO 0 adds gradients up in the type of weights.",
        "  Validation, pictures and start-up are left out.",
    ]


def draw(plan: Plan, path: str) -> None:
    """Draw memory by stage and goodput by checkpoint interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    parts = ("parameters", "gradients", "optimizer", "buffers", "activations")
    bars = [plan.memory(n, plan.runtime.micro_batch, checkpointing=on) for n in range(4) for on in (False, True)]
    places, bottom = [n + shift for n in range(4) for shift in (-0.2, 0.2)], [0.0] * 8
    for part in parts:
        heights = [getattr(bar, part) / GIB for bar in bars]
        left.bar(places, heights, 0.36, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    top, limit = 1.35 * max(bottom), plan.memory_limit / GIB
    left.axhline(limit, color="black", linestyle="--", label=f"limit, {limit:.0f} GiB" + " (above)" * (limit > top))
    left.set_xticks(places, ["plain", "ckpt"] * 4, fontsize=8)
    for stage in range(4):
        left.text(stage, -0.1, f"ZeRO {stage}", ha="center", va="top", transform=left.get_xaxis_transform())
    left.set(title=f"memory of a GPU, micro batch {plan.runtime.micro_batch}", ylabel="GiB", ylim=(0, top))
    left.legend(ncols=3, fontsize=8, loc="upper center")
    _draw_goodput(plan, right)
    figure.suptitle(f"{plan.settings.recipe}, {plan.ranks} {plan.settings.hardware.upper()}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot: {path}")


def _draw_goodput(plan: Plan, axis: Any) -> None:
    fail, work = plan.failures, plan.steps * plan.step.total
    best, chosen = plan.interval_steps() * plan.step.total, plan.runtime.save_every * plan.step.total
    low, high = math.log10(min(best, chosen) / 10), math.log10(max(best, chosen) * 10)
    intervals = [10 ** (low + (high - low) * i / 60) for i in range(61)]
    axis.plot(intervals, [100 * fail.goodput(t) for t in intervals], color="tab:blue", label="expected (Daly)")
    some = intervals[::4]
    runs = [100 * fail.simulate(t, work, repeats=REPEATS, seed=SEED) for t in some]
    middle = [float(r.mean()) for r in runs]
    spread = [[max(0.0, sign * (m - sorted(r)[n])) for m, r in zip(middle, runs, strict=True)]
              for sign, n in ((1, 3), (-1, -4))]  # fmt: skip
    axis.errorbar(some, middle, yerr=spread, fmt="o", ms=4, lw=1, color="tab:gray", label=f"{REPEATS} simulated runs")
    axis.axvline(fail.young(), color="gold", linewidth=5, alpha=0.6, label="Young")
    axis.axvline(best, color="tab:green", linewidth=1.5, label=f"best (Daly), --save_every {plan.interval_steps()}")
    axis.axvline(chosen, color="tab:red", linestyle="--", label=f"--save_every {plan.runtime.save_every}")
    axis.set(xscale="log", title="goodput", xlabel="interval between checkpoints [s]", ylabel="% of the time")
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
