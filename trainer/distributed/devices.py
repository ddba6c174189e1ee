"""Which device a rank uses, and whether the host has enough of them."""

import logging
import os
import shutil
import socket
import sysconfig
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from trainer.config.settings import Runtime
from trainer.distributed.world import World
from trainer.errors import ConfigError

logger = logging.getLogger(__name__)

_CUBLAS, _CUBLAS_ORDERED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; SLURM writes the last one."""


def check_devices(world: World, num_devices: int, kind: str, *, oversubscribe: bool) -> None:
    """Raise `ConfigError` if this host has fewer devices than ranks.

    Args:
        world: this process.
        num_devices: GPUs, or CPU cores where there is no GPU.
        kind: "cuda" or "cpu".
        oversubscribe: let CPU ranks share cores (slow, for tests).

    One GPU for several ranks is no error here: a scheduler may show each rank its own (`refuse_shared_gpus` tells).
    """
    if world.local_size <= num_devices or (kind == "cpu" and oversubscribe) or (kind == "cuda" and num_devices == 1):
        return
    if num_devices == 0:
        raise ConfigError(
            f"this host shows no {'GPU' if kind == 'cuda' else 'CPU core'}: see nvidia-smi and CUDA_VISIBLE_DEVICES, "
            "or set DS_ACCELERATOR=cpu to train on the CPU"
        )
    remedy = f"start with --num_gpus {num_devices}"
    if kind == "cpu":
        remedy += ", or pass --oversubscribe true to let CPU ranks share cores"
    noun = "GPUs" if kind == "cuda" else "CPU cores"
    raise ConfigError(f"{world.local_size} ranks were started on a host with {num_devices} {noun}: {remedy}")


def use_devices(world: World, runtime: Runtime, *, refuse_unusable: bool = True) -> None:
    """Log the devices, check that there are enough for the ranks, and divide the host's cores among its ranks.

    Args:
        world: this process.
        runtime: settings of the command.
        refuse_unusable: refuse a host whose GPUs cannot be used; otherwise it computes on the CPU.

    Raises:
        ConfigError: there are more ranks than devices, the GPUs cannot be used, or cuBLAS was told to add in any order.
    """
    if refuse_unusable:
        refuse_unusable_gpus()
    if runtime.deterministic:
        compute_deterministically()
    cores = len(os.sched_getaffinity(0))
    device = default_device()
    num_devices = torch.cuda.device_count() if device.type == "cuda" else cores
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU cores"
    logger.info("device: %d x %s, for %d ranks on this host", num_devices, name, world.local_size)
    check_devices(world, num_devices, device.type, oversubscribe=runtime.oversubscribe)
    torch.set_num_threads(runtime.num_threads or max(1, cores // world.local_size))


def compute_deterministically() -> None:
    """Have torch use only kernels that give the same bits each time; call before the first work of a GPU.

    An operator that has no such kernel raises an error. torch must not only warn: the backward pass of its
    memory-efficient attention then keeps adding in any order (torch.use_deterministic_algorithms).

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG asks for something else.
    """
    given = os.environ.setdefault(_CUBLAS, _CUBLAS_ORDERED[0])  # cuBLAS reads it when it starts
    if given not in _CUBLAS_ORDERED:
        raise ConfigError(
            f"deterministic is true, but {_CUBLAS} is {given!r}, with which matrix products may add in any order: "
            f"unset it, or set it to {' or '.join(_CUBLAS_ORDERED)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # It is a help for debugging, and writes all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def refuse_shared_gpus(world: World) -> None:
    """Refuse ranks that compute on the same GPU; all ranks call, and all raise the same error.

    Raises:
        ConfigError: two ranks of a host have one GPU, where NCCL would stop with "Duplicate GPU detected".
    """
    found = [tuple(place) for place in world.gather_over_ranks([socket.gethostname(), _gpu_id()])]
    for rank, place in enumerate(found):
        first = found.index(place)
        if first != rank:
            raise ConfigError(
                f"ranks {first} and {rank} on {place[0]} compute on the same GPU ({place[1]}): start one rank for each "
                f"GPU (--num_gpus), or let the scheduler give each rank its own (--gpus-per-task 1)"
            )


def _gpu_id() -> str:
    properties = torch.cuda.get_device_properties(default_device())
    return str(getattr(properties, "uuid", f"{properties.name} {torch.cuda.current_device()}"))


def refuse_unusable_gpus() -> None:
    """Raise `ConfigError` if this host has GPUs that CUDA cannot use: the run would compute on the CPU unnoticed."""
    if problem := unusable_gpus():
        raise ConfigError(f"{problem}; to compute on the CPU anyway, set DS_ACCELERATOR=cpu")


def unusable_gpus(devices: Path = Path("/dev")) -> str:
    """Return why CUDA cannot use this host's NVIDIA GPUs; empty if it can, there are none, or they are not wanted.

    GPUs are there if the host has device files, or if the job was given some: a container that is started without its
    NVIDIA runtime has CUDA_VISIBLE_DEVICES or SLURM_GPUS_ON_NODE, and no file.

    Args:
        devices: folder of the device files.
    """
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ and os.environ["CUDA_VISIBLE_DEVICES"].strip() in _NO_GPU
    files = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    # DeepSpeed's launcher numbers its ranks in CUDA_VISIBLE_DEVICES on hosts without GPUs as well (launcher/launch.py).
    from_job = os.environ.get("CUDA_VISIBLE_DEVICES") and "CROSS_RANK" not in os.environ
    given = "CUDA_VISIBLE_DEVICES" if from_job else ""
    given = given or ("SLURM_GPUS_ON_NODE" if os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0" else "")
    wanted = (files or given) and not hidden and not os.environ.get("DS_ACCELERATOR")
    if not wanted or torch.cuda.is_available():
        return ""
    reason = "this torch was built without CUDA: install one with it"
    if torch.version.cuda:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            reason = "torch finds no device: check the driver with nvidia-smi, and which devices this job may use"
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
    built = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}"
    have = f"this host has {len(files)} NVIDIA GPUs ({', '.join(files[:8])})"
    if not files:
        have = f"{given} is {os.environ[given]!r}"
    return f"{have}, but CUDA cannot use them ({reason}; {built})"


def default_device() -> torch.device:
    """Return this rank's device: its GPU where there is one, else the CPU.

    With 8 GPUs a host, rank 3 of the host takes cuda:3. With one visible GPU for each rank (srun --gpus-per-task,
    Kubernetes, MIG), every rank takes cuda:0, which is another GPU in each.
    """
    if get_accelerator().device_name() == "cpu":
        return torch.device("cpu")
    index = 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(get_accelerator().device_name(), index)


def missing_compiler(device_type: str) -> str:
    """Say what torch.compile needs and this host lacks, with the remedy; empty if nothing is missing.

    On a CPU it compiles C++. On a GPU Triton builds the launcher of its kernels in C, with Python's header.
    """
    if device_type == "cpu":
        return "" if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler: install g++"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return "Triton needs a C compiler and there is none: install gcc"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.exists() else f"Triton needs {header}, which is missing: install python3-dev"
