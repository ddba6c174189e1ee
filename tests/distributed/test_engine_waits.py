"""How often the host waits for the device in a step, and what cannot be compiled. Counted here, timed on a GPU."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ds_configs import filled_ds_config
from tests.helpers.fake_cuda import TRACES_CUDA
from tests.helpers.runs import ROOT
from trainer.config.settings import DetectorRecipe
from trainer.distributed import deepspeed_changes, devices
from trainer.distributed import engine as engines
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.models.detector import HeadOptions, MorphDetector
from trainer.models.encoder import PatchEncoder
from trainer.models.mae import DecoderOptions, MaskedAutoencoder
from trainer.models.mask_utils import draw_mask

MICRO_BATCH, ACCUMULATION = 2, 3


def engine_of(name: str, world: World, **changes: Any) -> Engine:
    config = filled_ds_config(ROOT / "ds_configs" / f"{name}.json", global_batch=MICRO_BATCH * ACCUMULATION)
    for block, values in changes.items():
        config[block] |= values
    torch.manual_seed(0)
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2, fixed_positions=True)
    model = MaskedAutoencoder(encoder, DecoderOptions(decoder_width=32, decoder_depth=2, decoder_heads=4))
    return Engine(model, ds_config=config, weight_decay=0.05, world=world)


def micro_batches() -> Iterator[tuple[torch.Tensor, ...]]:
    for _ in range(ACCUMULATION):
        images = torch.randint(0, 256, (MICRO_BATCH, 3, 32, 32), dtype=torch.uint8)
        yield images, *draw_mask(torch.rand(MICRO_BATCH, 16), mask_ratio=0.75, grid=(4, 4))


class Reads(TorchDispatchMode):
    """Counts values of the device that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "reads"), [("zero1_bf16", 2), ("zero2_bf16", 3), ("zero3_bf16", 1), ("cpu_fp32", 3)])
def test_the_host_reads_a_few_numbers_at_the_end_of_a_step_and_none_in_a_micro_batch(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, reads: int
) -> None:
    """Beside these, ZeRO's norm and overflow, the host reads the verdict of the ranks, one copy of three numbers."""
    engine = engine_of(name, world)
    engine.step(micro_batches(), learning_rate=1e-3, seed=0)
    waits: list[str] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *device: waits.append("synchronize"))
    with Reads() as seen:
        engine.step(micro_batches(), learning_rate=1e-3, seed=1)
    assert waits == [], "the host waits for all that the device was given"
    assert seen.calls["_local_scalar_dense"] == reads


@pytest.mark.parametrize("clip_grad", [0.01, 1e9])
def test_norms_of_flat_gradients_clip_alike_in_a_tenth_of_the_kernels(
    world: World, monkeypatch: pytest.MonkeyPatch, clip_grad: float
) -> None:
    """GPUs take them; here a CPU does, which is told to. All steps are clipped, or none, or skipped for a NaN."""
    torch.manual_seed(0)
    batches = [list(micro_batches()) for _ in range(4)]
    found = {}
    for devices_of_flat_norms in ((), ("cpu",)):
        monkeypatch.setattr(deepspeed_changes, "_FLAT_NORM_DEVICES", devices_of_flat_norms)
        engine = engine_of("zero1_bf16", world)
        engine._engine.optimizer.clip_grad = clip_grad
        losses, norms, applied = [], [], []
        for number, batch in enumerate(batches):
            if number == 2:
                unclean = next(p for p in engine.module.parameters() if p.requires_grad)
                hook = unclean.register_hook(lambda gradient: gradient * float("nan"))
            with Reads() as seen:
                result = engine.step(batch, learning_rate=1e-2, seed=number)
            if number == 2:
                hook.remove()
            losses.append(result.loss)
            norms.append(engine.grad_norm())
            applied.append(result.applied)
        assert applied == [True, True, False, True]
        found[devices_of_flat_norms] = losses, norms, seen.calls["norm"] + seen.calls["linalg_vector_norm"]
        trained = sum(p.requires_grad for p in engine.module.parameters())
    (losses, norms, kernels), (flat_losses, flat_norms, flat_kernels) = found.values()
    assert all((norm > clip_grad) == (clip_grad < 1) for norm in norms if norm < float("inf"))
    assert flat_norms == pytest.approx(norms, rel=1e-5)
    assert flat_losses == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == 4
    assert kernels >= trained
    assert flat_kernels <= kernels / 10


def whole_model(kind: str) -> MaskedAutoencoder | MorphDetector:
    torch.manual_seed(1)
    checkpointing = kind == "checkpointing"
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=4, grad_checkpointing=checkpointing)
    if kind == "detector":
        return MorphDetector(encoder, normalisation="imagenet", head=HeadOptions.of(DetectorRecipe()))
    options = {"decoder_width": 32, "decoder_depth": 4, "decoder_heads": 4}
    return MaskedAutoencoder(encoder, DecoderOptions(**options, decoder_type="cross" if kind == "cross" else "self"))


@pytest.mark.parametrize("kind", ["published", "cross", "checkpointing", "detector"])
def test_zero_3_gathers_each_block_at_once_and_computes_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    torch.manual_seed(0)
    batches = [list(micro_batches()) for _ in range(3)]
    if kind == "detector":
        labels, draws = torch.tensor([0, 1]), torch.zeros(2, 1)
        batches = [[(images, labels, draws) for images, *_ in batch] for batch in batches]
    config = filled_ds_config(ROOT / "ds_configs" / "zero3_bf16.json", global_batch=MICRO_BATCH * ACCUMULATION)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every weight must be gathered
    losses, fetches = [], []
    for whole in (True, False):
        model, calls = whole_model(kind), Counter[str]()
        if not whole:
            monkeypatch.setattr(type(model), "whole_blocks", lambda model: [])
        engine = Engine(model, ds_config=config, weight_decay=0.05, world=world)
        coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()

        def fetching(
            *words: Any, fetch: Any = coordinator.fetch_sub_module, calls: Any = calls, **options: Any
        ) -> None:
            calls["fetch"] += 1
            fetch(*words, **options)

        monkeypatch.setattr(coordinator, "fetch_sub_module", fetching)
        losses.append([engine.step(batch, learning_rate=1e-3, seed=0).loss for batch in batches])
        fetches.append(calls["fetch"])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    assert fetches[0] < 0.6 * fetches[1]


def test_the_hook_of_a_whole_block_would_come_too_early_where_its_input_needs_no_gradient() -> None:
    encoder = PatchEncoder("test_vit", image_size=32, patch_size=8, depth=2)
    assert len(encoder.trained_blocks) == 2
    encoder.vit.blocks[0].norm1.weight.requires_grad_(False)
    assert encoder.trained_blocks == [encoder.vit.blocks[1]]
    encoder.vit.patch_embed.proj.bias.requires_grad_(False)
    assert not encoder.trained_blocks


def test_all_gradients_but_those_of_the_last_bucket_leave_in_the_backward_pass(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plans count on (`cost_model.step_time`). The model is smaller than one bucket of ds_configs/."""
    early: dict[str | int, int] = {}
    for bucket in (10_000, 50_000_000):
        engine = engine_of("zero2_bf16", world, zero_optimization={"reduce_bucket_size": bucket})
        optimizer, left = engine._engine.optimizer, []
        reduce, finish = optimizer.reduce_ipg_grads, optimizer.overlapping_partition_gradients_reduce_epilogue

        def reducing(reduce: Any = reduce, optimizer: Any = optimizer, left: Any = left, **options: Any) -> None:
            left.append(sum(bucket.elements for bucket in optimizer.ipg_buckets.values()))
            reduce(**options)

        def finishing(finish: Any = finish, left: Any = left, bucket: int = bucket) -> None:
            early[bucket] = sum(left)
            finish()
            early["all"] = sum(left)
            left.clear()

        monkeypatch.setattr(optimizer, "reduce_ipg_grads", reducing)
        monkeypatch.setattr(optimizer, "overlapping_partition_gradients_reduce_epilogue", finishing)
        engine.step(micro_batches(), learning_rate=1e-3, seed=0)
        assert early["all"] == sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert early["all"] - 10_000 <= early[10_000] < early["all"] < 50_000_000
    assert early[50_000_000] == 0


def test_a_background_save_copies_through_pinned_memory_and_waits_once_before_it_writes(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                asked.append(("without waiting", args[2]))
            elif (kwargs or {}).get("pin_memory") is not None:
                asked.append(("pinned", kwargs["pin_memory"]))
            return func(*args, **(kwargs or {}))

    for device, pinned in (("cuda", True), ("cpu", False)) if TRACES_CUDA else (("cpu", False),):
        asked: list[tuple[str, bool]] = []
        with FakeTensorMode():
            tensor = torch.empty(3, 4, dtype=torch.bfloat16, device=device)
            with Copies():
                copy = engines._on_host(tensor)
        assert (copy.device.type, copy.shape, copy.dtype) == ("cpu", (3, 4), torch.bfloat16)
        assert asked == [("pinned", pinned), ("without waiting", True)]

    engine, events = engine_of("zero1_bf16", world), []
    on_host = engines._on_host
    monkeypatch.setattr(engines, "_on_host", lambda tensor: events.append("copy") or on_host(tensor))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait for {device}"))
    engine.device = torch.device("cuda", 0)
    write = engine.capture(copy=True)
    assert events == ["copy"] * events.count("copy") + ["wait for cuda:0"]
    assert events.count("copy") > sum(1 for _ in engine.module.parameters())
    assert all(path.is_file() for path in write(tmp_path))


def test_what_compiled_code_would_do_wrong_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ZeRO stage 3 gathers weights in hooks"):
        engine_of("zero3_bf16", world).compile("default")
    engine = engine_of("zero1_bf16", world)
    with pytest.raises(ConfigError, match="needs a GPU"):
        engine.compile("reduce-overhead")
    compiled: list[str] = []
    monkeypatch.setattr(engines, "missing_compiler", lambda device_type: "")
    for accumulates_at_once in (False, True):
        engine = engine_of("zero1_bf16", world, bf16={"immediate_grad_update": accumulates_at_once})
        engine.device = torch.device("cuda")
        monkeypatch.setattr(engine._engine, "compile", lambda **how: compiled.append(how["compile_kwargs"]["mode"]))
        if accumulates_at_once:
            engine.compile("reduce-overhead")
        else:
            with pytest.raises(ConfigError, match=r"with 3 accumulated micro batches: write .*immediate_grad_update"):
                engine.compile("reduce-overhead")
    assert compiled == ["reduce-overhead"]


def test_a_compiler_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert "install g++" in devices.missing_compiler("cpu")
    assert "Triton needs a C compiler" in devices.missing_compiler("cuda")
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(devices.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in devices.missing_compiler("cuda")
    (tmp_path / "Python.h").touch()
    assert devices.missing_compiler("cuda") == ""
