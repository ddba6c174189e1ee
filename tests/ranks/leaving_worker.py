"""One rank that leaves while torch's threads still have collectives to end, whose tensors nobody else keeps."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed.engine import connect, disconnect
from trainer.distributed.world import world_from_environment


def main(output: str) -> None:
    torch.set_num_threads(1)
    world = connect(world_from_environment(), timeout_s=120)
    for _ in range(20):
        dist.all_reduce(torch.ones(1000), async_op=True)
    disconnect()
    Path(output, f"rank-{world.rank}.json").write_text("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
