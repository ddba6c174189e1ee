"""How ranks find each other, and which are missing."""

import contextlib
import os
import socket
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from trainer.distributed.refusal import know_ranks
from trainer.distributed.world import World
from trainer.errors import ConfigError

_PATIENCE = timedelta(days=2)


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
    know_ranks(store, world.rank, world.size)
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
