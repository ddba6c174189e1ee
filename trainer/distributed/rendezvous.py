"""How ranks find each other at the start, and which of them are missing.

Every rank opens the store at MASTER_ADDR:MASTER_PORT and writes its host there. Rank 0 waits for all of them and writes
the outcome, which every rank reads::

    joined/0 = hosta, joined/1 = hosta, joined/3 = hostb      rank 2 has not joined within the time-out
    outcome = "rank 2 of 4 did not join ..."                  empty where all have joined
    read/0, read/1, read/3                                    who has read the outcome

Without this torch raises a time-out on each rank that names no rank and no host.
"""

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

_DECISION_TIMEOUT = timedelta(days=2)
_OUTCOME_TIMEOUT_S = 30
_READ_TIMEOUT_S = 5


def rendezvous(world: World, *, timeout_s: float) -> Store:
    """Wait at MASTER_ADDR:MASTER_PORT until all ranks have joined; return the store that connects them.

    Args:
        world: this process.
        timeout_s: how long the first rank waits for the last one.

    Raises:
        ConfigError: the port is taken, rank 0 cannot be reached, or ranks are missing; every rank that joined names
            the missing ones.
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
    store.set(f"joined/{world.rank}", host)
    if world.is_main:
        store.set("outcome", _missing_ranks(store, world, timeout_s))
    try:
        store.wait(["outcome"], timedelta(seconds=timeout_s + _OUTCOME_TIMEOUT_S))
        outcome = store.get("outcome").decode()
        store.set(f"read/{world.rank}", "")
    except (dist.DistError, RuntimeError) as error:
        raise ConfigError(
            f"rank {world.rank} on {host} lost rank 0 while it waited for other ranks: see the log of rank 0"
        ) from error
    if outcome:
        if world.is_main:  # the store ends with this process, so the others must have read it first
            _wait_for_readers(store, world)
        raise ConfigError(outcome)
    return store


def _open_store(world: World, timeout_s: float) -> Store:
    """Open the store: rank 0 listens (under torchrun its agent does), all others connect."""
    address, port, host = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    listens = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(address, port, is_master=listens, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if listens:
            raise ConfigError(
                f"port {port} is taken on {host}, but the rendezvous of the ranks needs it: free it, or choose another "
                f"(deepspeed --master_port {port + 1}, or MASTER_PORT)"
            ) from error
        raise ConfigError(
            f"rank {world.rank} on {host} cannot reach rank 0 at {address}:{port} within {timeout_s:g} s: check that "
            "rank 0 runs there, the network between the hosts and its firewall"
        ) from error
    # torchrun keeps one store over its restarts; the prefix hides the keys of the restart before.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _missing_ranks(store: Store, world: World, timeout_s: float) -> str:
    """Wait for all ranks; return a message that names the missing ones, empty where all have joined."""
    keys = [f"joined/{rank}" for rank in range(world.size)]
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
    joined = ", ".join(f"{host} (rank {_ranges(ranks)})" for host, ranks in hosts.items())
    return (
        f"rank {_ranges(missing)} of {world.size} did not join at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} within {timeout_s:g} s; joined: {joined}; check the hosts that are not named"
    )


def _wait_for_readers(store: Store, world: World) -> None:
    joined = [rank for rank in range(world.size) if store.check([f"joined/{rank}"])]
    with contextlib.suppress(dist.DistError, RuntimeError):
        store.wait([f"read/{rank}" for rank in joined], timedelta(seconds=_READ_TIMEOUT_S))


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def add_decision_groups(world: World) -> World:
    """Return the same world with its process groups for decisions; the default process group must exist."""
    if world.size == 1:
        return world
    groups = [dist.new_group(backend="gloo", timeout=_DECISION_TIMEOUT) for _ in range(2)]
    return replace(world, decisions=groups[0], background=groups[1])
