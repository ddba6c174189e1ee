"""Workers, prefetch and the copy to the device: batches are ready when the step wants them."""

import contextlib
import ctypes
import dataclasses
import math
import mmap
import multiprocessing.queues
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.data.stream import Batch, Guarded, Stream
from trainer.errors import DataError, TrainerError

_PR_SET_PDEATHSIG = 1
"""Linux: send this process a signal when its parent dies."""


class Loader:
    """Iterates over the batches of a stream, loaded by ``num_workers`` processes."""

    def __init__(self, stream: Stream, *, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> None:
        self._stream = stream
        with _many_workers_allowed():
            self._loader: DataLoader[Batch | TrainerError] = DataLoader(
                _HandedOver(Guarded(stream)),
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
        for item in self._start():  # held by no name: a kept traceback would keep the workers, which ignore SIGTERM
            if isinstance(item, TrainerError):
                raise item
            _compare(next(expected, None), item.positions)
            yield item
        _compare(next(expected, None), None)

    def _start(self) -> Iterator[Batch | TrainerError]:
        with _many_workers_allowed():
            return iter(self._loader)


@contextlib.contextmanager
def _many_workers_allowed() -> Iterator[None]:
    """Leave out torch's warnings of more workers than cores: a training says so once, with the setting."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _compare(expected: list[int] | None, delivered: list[int] | None) -> None:
    if expected != delivered:
        raise RuntimeError(
            f"the loader delivered {_describe(delivered)} where {_describe(expected)} had to come, so figures would be "
            "wrong: this is a fault of the trainer, please report it; --num_workers 0 may avoid it"
        )


def _describe(positions: list[int] | None) -> str:
    return "the end of the data" if positions is None else f"{len(positions)} samples from position {positions[0]}"


class _HandedOver(IterableDataset[Any]):
    """Passes batches from a worker to the training process through anonymous memory (memfd), each in one piece.

    torch would put them into /dev/shm, which has 64 MB in a container unless told otherwise: a worker that finds it
    full loses its batch with a traceback, and the training process waits for that batch until its time-out. Anonymous
    memory has no limit but that of the machine or container, costs the same, and an error here travels as a value.
    """

    def __init__(self, stream: Guarded) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        for item in self._stream:
            yield _Parcel.of(item) if get_worker_info() and isinstance(item, Batch) else item


class _Parcel:
    """A batch that is pickled as a file descriptor, and is a batch again when it is unpickled."""

    def __init__(self, batch: Batch, memory: Any) -> None:
        self._batch, self._memory = batch, memory

    @classmethod
    def of(cls, batch: Batch) -> "_Parcel | DataError":
        """Copy the pixels and numbers; an error is returned, to be raised where the user sees it."""
        parts = [batch.noise_BN.contiguous(), batch.images_BCHW.permute(0, 2, 3, 1).contiguous()]
        try:
            fd = os.memfd_create("batch")
            try:
                for part in filter(torch.numel, parts):
                    _write_all(fd, part.numpy().data.cast("B"))
                return cls(batch, DupFd(fd))
            finally:
                os.close(fd)
        except (OSError, MemoryError) as error:
            num_bytes = sum(part.nbytes for part in parts)
            return DataError(
                f"a loader worker cannot hand over its batch of {num_bytes} bytes ({error}): lower num_workers, "
                "prefetch or micro_batch, or give the job more memory"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        batch, shapes = self._batch, (tuple(self._batch.images_BCHW.shape), tuple(self._batch.noise_BN.shape))
        light = dataclasses.replace(batch, images_BCHW=None, noise_BN=None)  # type: ignore[arg-type]
        return _unpack, (light, self._memory, *shapes)


def _write_all(fd: int, view: memoryview) -> None:
    while view:  # one call writes no more than 2 GB
        view = view[os.write(fd, view) :]


def _unpack(batch: Batch, memory: Any, image_shape: tuple[int, ...], noise_shape: tuple[int, ...]) -> Batch:
    fd = memory.detach()
    try:
        mapped = mmap.mmap(fd, 0)
    finally:
        os.close(fd)
    num, channels, height, width = image_shape
    num_noise, num_pixels = math.prod(noise_shape), math.prod(image_shape)
    noise: Tensor = torch.empty(noise_shape)
    if num_noise:  # the numbers come first, because they are aligned there
        noise = torch.frombuffer(mapped, dtype=torch.float32, count=num_noise).view(noise_shape)
    images_BHWC = torch.frombuffer(mapped, dtype=torch.uint8, count=num_pixels, offset=4 * num_noise)
    batch.images_BCHW = images_BHWC.view(num, height, width, channels).permute(0, 3, 1, 2)
    batch.noise_BN = noise
    return batch


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
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_worker(error: BaseException, item: object) -> None:
    """End a worker that cannot send something: Python would drop it, and the training process would wait for it."""
    del item
    sys.stderr.write(f"a loader worker cannot hand over its batch ({error!r}) and ends\n")
    sys.stderr.flush()
    os._exit(1)
