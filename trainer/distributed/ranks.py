"""Ranks of a command that only measures: they share its work, and no engine connects them."""

import os

import torch

from trainer.distributed.world import World, world_from_environment

_COLLECTIVE_TIMEOUT_S = 1800


def join_ranks(num_threads: int | None) -> World:
    """Meet the other ranks, if a launcher has started several; divide the host's cores among its ranks.

    Args:
        num_threads: CPU threads of each rank; None leaves torch's choice to one process, and divides the cores.

    Raises:
        ConfigError: a rank is missing, or the launcher's variables are wrong.
    """
    world = world_from_environment()
    if num_threads:
        torch.set_num_threads(num_threads)
    elif world.local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    if world.size == 1:
        return world
    from trainer.distributed.engine import connect  # imports DeepSpeed, which takes seconds

    return connect(world, timeout_s=_COLLECTIVE_TIMEOUT_S)


def leave_ranks(world: World) -> None:
    """Wait for the other ranks and leave them."""
    if world.size > 1:
        from trainer.distributed.engine import disconnect

        world.wait_for_all()
        disconnect()
