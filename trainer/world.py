"""Who we are among the ranks, as a plain value, and the few decisions that all ranks take together.

Only host-side words travel here: flags, verdicts, short texts, as JSON and never as pickles. Gradients are the
engine's business. Decisions use a process group of their own (gloo, on the CPU, with a long time-out), because rank 0
may index terabytes while the others wait.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from trainer.errors import CheckpointError, ConfigError, DataError, SupersededError, TrainerError

T = TypeVar("T")
_PATIENCE = timedelta(days=2)
_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, SupersededError)}


@dataclass(frozen=True, slots=True)
class World:
    """This process among ``size`` processes; ``local_rank`` of ``local_size`` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    decisions: Any = field(default=None, repr=False, compare=False)
    """Process group for host-side words; None in a world of one."""
    background: Any = field(default=None, repr=False, compare=False)
    """A second such group, for one thread beside the main one: words of two threads must not meet in one group."""

    def in_background(self) -> "World":
        """Return this world for use by a background thread."""
        return replace(self, decisions=self.background)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes shared files and talks to the user."""
        return self.rank == 0

    def any_over_ranks(self, flag: bool) -> bool:
        """Tell every rank whether the flag is up on any of them."""
        return any(self.gather_over_ranks(flag))

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Give every rank the JSON-able value of each rank, in rank order."""
        if self.size == 1:
            return [value]
        word = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(word)]), group=self.decisions)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(word)] = word
        words = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(words, padded, group=self.decisions)
        return [json.loads(w[: int(n)].numpy().tobytes()) for w, n in zip(words, lengths, strict=True)]

    def _from_main(self, value: Any) -> Any:
        """Give every rank the JSON-able value of rank 0."""
        if self.size == 1:
            return value
        word = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(word)])
        dist.broadcast(length, src=0, group=self.decisions)
        received = word.clone() if self.is_main else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=self.decisions)
        return json.loads(received.numpy().tobytes())

    def on_main(self, decide: Callable[[], T]) -> T:
        """Run ``decide`` on rank 0 and give its JSON-able result to all; its `TrainerError` is raised on all."""
        verdict: dict[str, Any] = {}
        if self.is_main:
            try:
                verdict = {"value": decide()}
            except TrainerError as error:
                verdict = {"error": str(error), "kind": type(error).__name__}
        verdict = self._from_main(verdict)
        if "error" in verdict:
            raise _KINDS.get(verdict["kind"], DataError)(verdict["error"])
        value: T = verdict["value"]
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails anywhere with `TrainerError`, that error is raised everywhere."""
        result, problem = None, None
        try:
            result = work()
        except TrainerError as error:
            problem = {"error": str(error), "kind": type(error).__name__}
        for found in self.gather_over_ranks(problem):
            if found:
                raise _KINDS.get(found["kind"], DataError)(found["error"])
        return result  # type: ignore[return-value]  # no rank failed, so work() returned

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        self.gather_over_ranks(None)


def world_from_environment() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE as the deepspeed launcher and torchrun set them.

    Raises:
        ConfigError: a variable is not an integer, the set of them is incomplete, or this is one of several processes
            that know nothing of each other.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        _refuse_lone_tasks()
        return World()
    numbers = {}
    for name, fallback in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", None), ("LOCAL_SIZE", "1")):
        text = os.environ.get(name) or os.environ.get("LOCAL_WORLD_SIZE" if name == "LOCAL_SIZE" else "") or fallback
        if text is None or not text.isdecimal():
            raise ConfigError(f"environment variable {name} is {text!r}, but must be an integer: start with deepspeed")
        numbers[name] = int(text)
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_SIZE"])


def _refuse_lone_tasks() -> None:
    """Refuse one of several processes of srun or mpirun: each would train alone, all into one output_dir.

    The script of a batch job and the shell of salloc see the number of tasks of their job too, but are one process:
    they have a job id and no step id.
    """
    alone = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ and not _number("SLURM_PROCID")
    slurm_tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    for name, starter in (
        *([] if alone else [(slurm_tasks, "srun")]),
        *((name, "mpirun") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
    ):
        if _number(name) > 1:
            raise ConfigError(
                f"{starter} has started {_number(name)} of these processes ({name}), but RANK is not set, so that each "
                "would train alone and write into one output_dir: start with deepspeed or torchrun, or submit with "
                "tools/submit.py or the scripts of launch/slurm, which set RANK for every task"
            )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def check_devices(world: World, num_devices: int, kind: str, *, oversubscribe: bool) -> None:
    """Refuse more ranks on this host than it has devices.

    Args:
        world: this process.
        num_devices: GPUs, or CPU cores where there is no GPU.
        kind: "cuda" or "cpu".
        oversubscribe: let CPU ranks share cores (slow, for tests).
    """
    if world.local_size <= num_devices or (kind == "cpu" and oversubscribe):
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


def meet(world: World, *, timeout_s: float) -> Store:
    """Call the roll at MASTER_ADDR:MASTER_PORT and return the store through which the ranks know each other.

    Args:
        world: this process.
        timeout_s: how long the first rank waits for the last one.

    Raises:
        ConfigError: the port is taken, rank 0 cannot be reached, or ranks did not come; all who came hear who did not.
    """
    if world.size == 1:
        return HashStore()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"environment variable {name} is empty: start with deepspeed, torchrun or launch/slurm")
    if not os.environ["MASTER_PORT"].isdecimal():
        raise ConfigError(f"environment variable MASTER_PORT is {os.environ['MASTER_PORT']!r}, but must be a number")
    store = _open_store(world, timeout_s)
    host = socket.gethostname()
    store.set(f"here/{world.rank}", host)
    if world.is_main:
        store.set("verdict", _call_roll(store, world, timeout_s))
    try:
        store.wait(["verdict"], timedelta(seconds=timeout_s + 30))
        verdict = store.get("verdict").decode()
        store.set(f"heard/{world.rank}", "")
    except (dist.DistError, RuntimeError) as error:
        raise ConfigError(f"rank {world.rank} on {host} lost rank 0 while it waited for others: see its log") from error
    if verdict:
        if world.is_main:  # the store ends with this process
            _wait_until_heard(store, world)
        raise ConfigError(verdict)
    return store


def _open_store(world: World, timeout_s: float) -> Store:
    """Listen at the rendezvous (rank 0; under torchrun its agent does), or reach who listens."""
    address, port, host = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    listens = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(address, port, is_master=listens, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if listens:
            raise ConfigError(
                f"port {port} is taken on {host}, where the ranks would meet: free it, or choose another "
                f"(deepspeed --master_port {port + 1}, or MASTER_PORT)"
            ) from error
        raise ConfigError(
            f"rank {world.rank} on {host} cannot reach rank 0 at {address}:{port} within {timeout_s:g} s: check that "
            "rank 0 runs there, the network between the hosts and its firewall"
        ) from error
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _call_roll(store: Store, world: World, timeout_s: float) -> str:
    """Return who is missing and what to do about it, or nothing where all are here."""
    keys = [f"here/{rank}" for rank in range(world.size)]
    with contextlib.suppress(dist.DistError, RuntimeError):
        store.wait(keys, timedelta(seconds=timeout_s))
        return ""
    hosts: dict[str, list[int]] = {}
    missing = []
    for rank, key in enumerate(keys):
        if store.check([key]):
            hosts.setdefault(store.get(key).decode(), []).append(rank)
        else:
            missing.append(rank)
    here = ", ".join(f"{host} (rank {_ranges(ranks)})" for host, ranks in hosts.items())
    return (
        f"rank {_ranges(missing)} of {world.size} did not come to {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} within {timeout_s:g} s; here are {here}: look at the hosts that are not named"
    )


def _wait_until_heard(store: Store, world: World) -> None:
    here = [rank for rank in range(world.size) if store.check([f"here/{rank}"])]
    with contextlib.suppress(dist.DistError, RuntimeError):
        store.wait([f"heard/{rank}" for rank in here], timedelta(seconds=5))


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def join(world: World) -> World:
    """Return the same world with its groups for decisions; the default process group must exist."""
    if world.size == 1:
        return world
    groups = [dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2)]
    return replace(world, decisions=groups[0], background=groups[1])
