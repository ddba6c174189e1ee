"""Which GPU a rank takes under a scheduler, and what is refused before a training computes on the wrong device."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from trainer.config.settings import PretrainRuntime
from trainer.distributed import devices, engine
from trainer.distributed.hardware import dense_bf16_peak
from trainer.distributed.world import World
from trainer.errors import ConfigError


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_rank_takes_its_gpu_of_the_host_or_the_only_one_that_its_task_sees(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    accelerator = CUDA_Accelerator()
    monkeypatch.setattr(devices, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5, 9))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device = devices.default_device()
    assert device == torch.device("cuda", index)
    devices.check_devices(World(3, 8, local_rank, 8), visible, "cuda", oversubscribe=False)

    engine.use_gpu(device)
    assert engine.os.environ["LOCAL_RANK"] == str(index), "DeepSpeed computes on this index"
    assert accelerator.available_memory() == 5, "NVML knows no UUIDs"


@pytest.mark.parametrize(
    ("places", "refused"), [([["a", "1"], ["b", "1"], ["a", "2"]], ""), ([["a", "1"]] * 2, "0 and 1")]
)
def test_two_ranks_on_one_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, places: list[list[str]], refused: str
) -> None:
    monkeypatch.setattr(devices, "_gpu_id", lambda: "1")
    world: Any = SimpleNamespace(gather_over_ranks=lambda place: places)
    if not refused:
        devices.refuse_shared_gpus(world)
        return
    with pytest.raises(ConfigError, match=f"ranks {refused} on a compute on the same GPU .1.: start one rank for each"):
        devices.refuse_shared_gpus(world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs here work")
@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("CUDA_VISIBLE_DEVICES", "0", True),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937", True),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles", False),
        ("SLURM_GPUS_ON_NODE", "4", True),
        ("SLURM_GPUS_ON_NODE", "0", False),
    ],
)
def test_a_job_that_was_given_gpus_does_not_compute_on_the_cpu(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    for variable in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    problem = devices.unusable_gpus(tmp_path)
    assert problem.startswith(f"{name} is {value!r}, but CUDA cannot use them (" if refused else "")
    assert bool(problem) == refused
    assert not refused or f"torch {torch.__version__} was built for CUDA" in problem


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 836e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_a_gpu_gets_the_peak_of_its_own_data_sheet(name: str, peak: float | None) -> None:
    assert dense_bf16_peak(name) == peak


def test_numbers_that_deepspeeds_launcher_gives_its_ranks_are_no_gpus(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", "0"), ("CROSS_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name in ("DS_ACCELERATOR", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.unusable_gpus(tmp_path) == ""
    monkeypatch.delenv("CROSS_RANK")
    assert "CUDA_VISIBLE_DEVICES is '0'" in devices.unusable_gpus(tmp_path)


@pytest.fixture
def _torchs_own_choices() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_torchs_own_choices")
def test_a_deterministic_run_gets_ordered_kernels_everywhere_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = PretrainRuntime(deterministic=True, oversubscribe=True, num_threads=1)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0', .*set it to :4096:8"):
        devices.use_devices(world, runtime)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    devices.use_devices(world, runtime)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    devices.use_devices(world, runtime)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would add in any order, and only warn"
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
