"""A plan says beforehand what real runs then take: bytes by ZeRO stage, FLOPs, activations, and time under failures."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.runs import ROOT, environment
from tools import plan_run
from trainer.config.command_line import call
from trainer.config.parse import with_flags
from trainer.config.recipes import DETECTOR_RECIPES, RECIPES
from trainer.config.settings import Recipe, Runtime
from trainer.distributed import cost_model as planning
from trainer.distributed.cost_model import Failures, Weights, Zero
from trainer.distributed.measured import Figures, Row
from trainer.errors import ConfigError
from trainer.training.model_cost import BLOCK_TENSORS, ModelCost, count_model, example, on_meta_device

SMALL = {"model": "vit_tiny_patch16_224", "encoder_depth": "2", "image_size": "32", "patch_size": "8", "num_lanes": "4"}
MAE = ("demo", SMALL | {"decoder_width": "64", "decoder_depth": "1", "global_batch": "12", "micro_batch": "2"})
LORA = ("detector_demo", SMALL | {"use_lora": "true", "global_batch": "12", "micro_batch": "2"})
BUCKETS = {
    "reduce_bucket_size": 300_000,
    "allgather_bucket_size": 300_000,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_live_parameters": 400_000,
    "stage3_max_reuse_distance": 400_000,
    "stage3_param_persistence_threshold": 1000,
}
CASES = [
    *((MAE, stage, "fp32", "fp32", ranks) for stage, ranks in enumerate((2, 3, 2, 2))),
    *((MAE, stage, "bf16", "fp32", ranks) for stage, ranks in ((1, 2), (2, 3), (3, 3))),
    (MAE, 0, "bf16", "bf16", 2),
    *((LORA, stage, "bf16", "fp32", 2) for stage in (1, 3)),
]
Measured = list[tuple[list[dict[str, int]], int]]


def ds_config(stage: int, precision: str, accum: str) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": stage} | BUCKETS}
    if precision != "fp32":
        config |= {precision: {"enabled": True}, "data_types": {"grad_accum_dtype": accum}}
    return config | {"communication_data_type": accum}


def count(recipe: Recipe, precision: str) -> ModelCost:
    return count_model(recipe, plan_run.builder_of(recipe), precision)


def planned(words: list[str]) -> tuple[plan_run.Settings, Recipe, Runtime]:
    line = plan_run.CLI.read(words)
    assert line is not None
    return line.settings, line.recipe, plan_run.fitting_runtime(line)


def recipe_of(name: str, flags: dict[str, str]) -> Recipe:
    return with_flags((RECIPES | DETECTOR_RECIPES)[name]()[0], flags)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """For each case: what each rank saw, and the bytes of the checkpoint."""
    folder, cases = tmp_path_factory.mktemp("memory"), []
    for number, ((name, flags), stage, precision, accum, ranks) in enumerate(CASES):
        path = folder / f"{number}-ds_config.json"
        path.write_text(json.dumps(ds_config(stage, precision, accum)))
        cases.append((name, flags | {"ds_config": str(path)}, ranks, 29840))
    worker = ROOT / "tests" / "ranks" / "memory_worker.py"
    words = [sys.executable, str(worker), json.dumps(cases), str(folder)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (
            [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(case[-1])],
            sum(path.stat().st_size for path in (folder / str(number)).rglob("*") if path.is_file()),
        )
        for number, case in enumerate(CASES)
    ]


@pytest.mark.slow
@pytest.mark.ranks
def test_planned_bytes_are_those_of_real_ranks_at_every_stage(measured: Measured) -> None:
    models = {name: count(recipe_of(name, flags), "fp32").weights for name, flags in (MAE, LORA)}
    for ((name, _), stage, precision, accum, ranks), (seen, on_disk) in zip(CASES, measured, strict=True):
        said = f"{name}, ZeRO {stage}, {precision}, {accum}, {ranks} ranks"
        weights, zero = models[name], planning.zero_of(ds_config(stage, precision, accum))
        memory, element = planning.state_memory(weights, zero, ranks), planning.BYTES[precision]
        whole = element * planning.gathered(weights, zero)
        held = memory.total - memory.buffers + (memory.buffers - whole) * (stage == 3)
        assert held == pytest.approx(max(rank["before_step"] for rank in seen), rel=0.02), said
        if stage != 3 and not zero.accumulates_full:
            assert held - memory.gradients == pytest.approx(seen[0]["after_step"], rel=0.02), said
        if stage == 3:
            assert 0.5 * whole < max(rank["gathered"] for rank in seen) <= whole, said
        saved = planning.checkpoint_of(weights, zero, 1, ranks, with_frozen=name == "demo")
        assert on_disk == pytest.approx(saved.total, rel=0.1, abs=60_000 * ranks), said


@pytest.mark.slow
@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        MAE,
        LORA,
        ("mae_vit_small", {}),
        ("detector_demo", {"drop_path": "0.1", "use_mixstyle": "true", "mix_group": "2"}),
    ],
)
def test_planned_activations_are_what_autograd_really_saves(
    name: str, flags: dict[str, str], grad_checkpointing: bool
) -> None:
    recipe = recipe_of(name, flags)
    planned = count(recipe, "fp32")
    model = on_meta_device(
        plan_run.builder_of(recipe), grad_checkpointing=grad_checkpointing, precision="fp32"
    ).to_empty(device="cpu")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def really_saved(images: int) -> int:
        saved: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
        ):
            loss = model(*example(model, recipe, images))
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for where, t in saved.items() if where not in parameters)

    real = (really_saved(6) - really_saved(2)) / 4
    assert (planned.saved_checkpointing if grad_checkpointing else planned.saved) == pytest.approx(real, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "grad_checkpointing"), [("mae_vit_small", True), ("full", False), ("full", True), ("probe", False)]
)
def test_the_real_peak_of_a_forward_and_backward_pass_lies_just_below_the_planned(
    name: str, grad_checkpointing: bool
) -> None:
    recipe = recipe_of(name, {"encoder_depth": "4"})
    planned = count(recipe, "fp32").activations(2, checkpointing=grad_checkpointing)
    model = on_meta_device(
        plan_run.builder_of(recipe), grad_checkpointing=grad_checkpointing, precision="fp32"
    ).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = example(model, recipe, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(*inputs).backward()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(itertools.accumulate(size for _, size in changes))
    assert 0.65 * planned < peak <= planned


def test_a_block_keeps_sixteen_numbers_for_each_of_its_outputs() -> None:
    shallow, deep = (count(recipe_of("mae_vit_small", {"encoder_depth": depth}), "bf16") for depth in ("1", "2"))
    assert deep.saved - shallow.saved == pytest.approx(BLOCK_TENSORS * 2 * 50 * 384, rel=0.02)
    assert deep.saved_checkpointing - shallow.saved_checkpointing == 2 * 50 * 384


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mae_vit_base", {}),
        ("mae_vit_small", {}),
        ("mae_vit_base", {"decoder_type": "cross", "predict_share": "0.33", "encoder_depth": "4"}),
        ("demo", {}),
        *((name, {"encoder_depth": "6"}) for name in ("lora", "probe", "full", "detector_demo")),
    ],
)
def test_planned_flops_are_those_that_torch_counts(name: str, flags: dict[str, str]) -> None:
    recipe = recipe_of(name, flags)

    def counted(images: int) -> int:
        model = on_meta_device(plan_run.builder_of(recipe), grad_checkpointing=False, precision="fp32")
        counter = FlopCounterMode(display=False)  # it does not know the fused attention of CPUs
        with FakeTensorMode(allow_non_fake_inputs=True), counter, sdpa_kernel(SDPBackend.MATH):
            model.to_empty(device="cpu")
            model(*example(model, recipe, images)).backward()
        return int(counter.get_total_flops())

    assert count(recipe, "fp32").flops == pytest.approx(counted(2) - counted(1), rel=0.02)


@pytest.mark.parametrize("interval", [1000, 4000, 16000])
def test_simulated_runs_take_as_long_as_daly_expects(interval: int) -> None:
    fail = Failures(mtbf=30_000, stall=60, write=200, restart=900)
    runs = fail.simulate(interval, 300 * fail.mtbf, repeats=100, seed=1)
    assert runs.mean() == pytest.approx(fail.goodput(interval), abs=4 * runs.std() / 10)
    assert runs.std() < 0.02
    rare = Failures(mtbf=1e12, stall=60, write=0, restart=900).simulate(interval, 1e6, repeats=2, seed=1)
    assert rare == pytest.approx(interval / (interval + 60), rel=0.02)


@given(st.floats(1e3, 1e7), st.floats(1e-4, 0.3))
def test_no_other_interval_beats_dalys(mtbf: float, share: float) -> None:
    fail = Failures(mtbf=mtbf, stall=share * mtbf, write=0, restart=100)
    best = fail.goodput(fail.daly())
    assert all(fail.goodput(fail.daly() * factor) <= best * 1.001 for factor in (0.2, 0.5, 0.8, 1.25, 2, 5))
    if share < 1e-3:
        assert fail.daly() == pytest.approx(fail.young(), rel=0.05)


sizes = st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=8).map(tuple), min_size=1, max_size=3)


@given(sizes, st.integers(1, 40))
def test_a_rank_keeps_the_gradients_of_parameters_that_reach_into_its_part(
    groups: list[tuple[int, ...]], num_ranks: int
) -> None:
    kept = [0] * num_ranks
    for group in groups:
        part, start = 2 * -(-sum(group) // (2 * num_ranks)), 0
        for size in group:
            for rank in range(num_ranks):
                if start < (rank + 1) * part and rank * part < start + size:
                    kept[rank] += size
            start += size
    assert planning.touched(Weights(groups=tuple(groups)), num_ranks) == max(kept)


@given(sizes, st.integers(0, 3), st.integers(1, 64), st.sampled_from(["fp32", "bf16"]), st.integers(1, 4))
def test_more_nodes_and_higher_stages_never_take_more_memory_for_the_state(
    groups: list[tuple[int, ...]], stage: int, ranks: int, precision: str, times: int
) -> None:
    weights = Weights(groups=tuple(groups), frozen=(500,))
    zero = Zero(stage=stage, precision=precision, accum="fp32", bucket=1, persistence=0, reuse_distance=0, live=0)
    few, many = (planning.state_memory(weights, zero, n) for n in (ranks, ranks * times))
    assert many.parameters + many.optimizer <= few.parameters + few.optimizer
    if stage in (0, 3) or precision == "bf16":  # else whole parameters are kept where one reaches into a rank's part
        assert many.gradients <= few.gradients
    assert planning.traffic(weights, zero, 1, 1) == (0, 0)
    if stage == 3:
        assert many.total <= few.total
    elif stage:
        above = planning.state_memory(weights, zero.at_stage(stage + 1), ranks)
        slack = 12 * ranks * sum(map(len, groups))  # stage 3 pads each parameter, the others each group
        assert above.optimizer + above.parameters <= few.optimizer + few.parameters + slack


@pytest.mark.parametrize(
    ("stage", "bucket", "exposed_s"),
    [(1, 10**7, 0.3), (2, 10**8, 0.3), (2, 5 * 10**8, 0.3), (2, 2 * 10**7, 0.14), (2, 10**7, 0.12), (3, 10**8, 0.2)],
)
def test_what_leaves_before_the_last_bucket_hides_behind_the_backward_pass(
    stage: int, bucket: int, exposed_s: float
) -> None:
    """100 M elements, 0.2 s of gradients and 0.1 s of parameters; at most 0.4 s of the 0.6 s of computation hide."""
    zero = Zero(stage=stage, overlap=stage > 1, bucket=bucket)
    sent, link = (2e9, 1e9), 1e10
    step = planning.step_time(zero, trained=10**8, compute_s=0.6, sent=sent, link=link, decode_s=0, storage_s=0)
    assert step.exposed == pytest.approx(exposed_s)
    hurried = planning.step_time(zero, trained=10**8, compute_s=0.06, sent=sent, link=link, decode_s=0, storage_s=0)
    assert hurried.exposed == pytest.approx(max(exposed_s, 0.26))


WORDS = ["--recipe", "mae_vit_base", "--nodes", "2", "--gpus", "8", "--images", "1000000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "mae_vit_larg", "--images", "5"], "must be one of demo, .*try mae_vit_large"),
        (["--recipe", "lora"], "pass --images"),
        ([*WORDS, "--hardware", "h1000"], "must be one of a100, h100, h200"),
        ([*WORDS, "--network", "carrier"], "must be one of infiniband, ethernet"),
        (["--recipe", "lora", "--images", "0"], "images is 0, but must be above 0"),
        (["--recipe", "lora", "--images", "9", "--nodes", "-1"], "nodes is -1, but must be above 0"),
        ([*WORDS, "--mfu", "25"], "mfu is 25.0"),
        ([*WORDS, "--ds_config", "nope.json"], "nope.json cannot be read"),
        ([*WORDS, "--micro_batch", "100"], r"set micro_batch to 1, 2, .* or 128"),
        (["--recipe", "lora", "--nodes", "3", "--images", "5"], r"global_batch is 256, but must be divisible by .*24"),
        ([*WORDS, "--micro_bath", "8"], "did you mean --micro_batch"),
        ([*WORDS, "--plot", "nowhere/plan.png"], "plot is 'nowhere/plan.png'"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_any_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run.make_plan(*planned(words))


def test_stage_0_with_two_types_of_gradients_is_refused_as_deepspeed_does(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ds_config(0, "bf16", "fp32")))
    with pytest.raises(ConfigError, match=r"choose stage 1, or data_types\.grad_accum_dtype"):
        plan_run.make_plan(*planned([*WORDS, "--ds_config", str(tmp_path / "ds.json")]))


def write_figures(path: Path, device: str, *, rehearsal: bool = False) -> None:
    """Figures of a GPU, made up."""
    figures = Figures(device, rehearsal)
    for model, flops, share in (("vit_base_patch16_224", 57e9, 0.24), ("vit_huge_patch14_224", 288e9, 0.4)):
        figures.put(Row("step", model, {"kind": "pretrain", "model": model, "flops_per_image": flops, "mfu": share}))
    figures.put(Row("step", "failed", {}, "out of memory"))
    figures.write(path)


def test_a_measured_share_of_the_peak_replaces_the_assumed_one_and_the_plan_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_run, "MEASURED", (tmp_path / "gpu.json",))

    def share(*words: str, recipe_name: str = "mae_vit_base") -> tuple[float, str]:
        settings, recipe, _ = planned(["--recipe", recipe_name, *WORDS[2:], *words])
        flops = {"vit_base_patch16_224": 57, "vit_large_patch16_224": 122}[recipe.model] * 10**9
        return plan_run.mfu_of(settings, recipe, flops, "bf16")

    assert share() == (0.25, share()[1])
    assert "assumed, not measured on any GPU" in share()[1]
    write_figures(tmp_path / "gpu.json", "NVIDIA H100 80GB HBM3")
    assert share()[0] == 0.24
    assert share()[1].startswith("measured on NVIDIA H100 80GB HBM3: ")
    nearest = share(recipe_name="mae_vit_large")
    assert nearest[0] == 0.24
    assert "with vit_base_patch16_224, the nearest by FLOPs" in nearest[1]
    assert share("--mfu", "0.3") == (0.3, "given by --mfu")
    assert share("--measured", "off")[0] == 0.25
    plan = plan_run.make_plan(*planned(WORDS))
    given = plan_run.make_plan(*planned([*WORDS, "--mfu", "0.12"]))
    assert given.step.compute == pytest.approx(2 * plan.step.compute)
    assert "measured on NVIDIA H100" in "\n".join(plan_run.describe_assumptions(plan))

    for device, rehearsal in (("NVIDIA A100-SXM4-80GB", False), ("NVIDIA H100 PCIe", False), ("H100", True)):
        write_figures(tmp_path / "gpu.json", device, rehearsal=rehearsal)
        assert share()[0] == 0.25, device
        assert f"figures of {device}" in share()[1]
        with pytest.raises(ConfigError, match=f"with figures of {device}, but hardware is h100"):
            share("--measured", str(tmp_path / "gpu.json"))
    (tmp_path / "gpu.json").write_text("[]")
    assert share()[0] == 0.25
    with pytest.raises(ConfigError, match=r"gpu\.json holds no figures of a GPU"):
        share("--measured", str(tmp_path / "gpu.json"))


@pytest.mark.slow
def test_a_plan_names_what_fits_what_limits_and_how_often_to_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(plan_run.main, plan_run.CLI, [*WORDS, "--plot", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    for said in (
        "4096 = 16 GPUs x 256 images",
        "  fits: ",
        "bottleneck is",
        "--save_every",
        "<- this run",
        "dense bf16",
    ):
        assert said in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    alone = ["--recipe", "mae_vit_huge", "--gpus", "1", "--images", "1000000", "--hardware", "a100", "--micro_batch"]
    plan = plan_run.make_plan(*planned([*alone, "1024"]))
    verdict = plan_run.describe_memory(plan)[-1]
    assert "DOES NOT FIT" in verdict
    largest = int(verdict.partition("--micro_batch ")[2].split()[0])
    assert plan.fits(1, largest)
    assert not plan.fits(1, 2 * largest)
    assert "--grad_checkpointing true takes" in verdict
    assert "stage to try is 2" in verdict
