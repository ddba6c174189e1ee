"""Workers, prefetch and the copy to the device: batches are ready when the step wants them."""

import ctypes
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from trainer.data.stream import Batch, Guarded, Stream
from trainer.errors import TrainerError

_PR_SET_PDEATHSIG = 1
"""Linux: send this process a signal when its parent dies."""


class Loader:
    """Iterates over the batches of a stream, loaded by ``num_workers`` processes."""

    def __init__(self, stream: Stream, *, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> None:
        self._stream = stream
        self._loader: DataLoader[Batch | TrainerError] = DataLoader(
            Guarded(stream),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_prepare_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in plan order.

        Raises:
            DataError: what a worker met, with the sample's key and shard.
            RuntimeError: a sample arrived twice, in another order, or not at all: a fault of this program.
        """
        expected = self._stream.expected_positions()
        for item in self._loader:
            if isinstance(item, TrainerError):
                raise item
            _compare(next(expected, None), item.positions)
            yield item
        _compare(next(expected, None), None)


def _compare(expected: list[int] | None, delivered: list[int] | None) -> None:
    if expected != delivered:
        raise RuntimeError(
            f"the loader delivered {_describe(delivered)} where {_describe(expected)} had to come, so figures would be "
            "wrong: this is a fault of the trainer, please report it; --num_workers 0 may avoid it"
        )


def _describe(positions: list[int] | None) -> str:
    return "the end of the data" if positions is None else f"{len(positions)} samples from position {positions[0]}"


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Start copying the tensors of a batch to the device; from pinned memory the copy overlaps with computing."""
    batch.images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    batch.noise_BN = batch.noise_BN.to(device, non_blocking=True)
    return batch


def _prepare_worker(worker: int) -> None:
    """Workers are the parallelism: threads inside each would only fight over the cores.

    A scheduler sends its warning to every process of the job, as a terminal does Ctrl-C. The training process answers
    by saving, for which it needs its workers alive. A killed training process takes them along: they hold copies of its
    connections, so that the other ranks would learn of its end only when its workers end, and one that hangs with the
    storage never does.
    """
    del worker
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
