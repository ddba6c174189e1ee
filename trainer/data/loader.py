"""Worker processes, prefetch and the copy to the device: batches are ready when the step needs them."""

import contextlib
import ctypes
import dataclasses
import math
import mmap
import multiprocessing.queues
import os
import re
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
_LOST_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (exited unexpectedly|is killed by signal: \w+)"
)
"""What torch says in the training process when a worker is gone."""


class Loader:
    """Iterates over the batches of a stream.

    Args:
        stream: yields batches and knows their positions.
        num_workers: processes that load; 0 loads in this one.
        prefetch: batches that each worker loads ahead.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, stream: Stream, *, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> None:
        self._stream = stream
        with _many_workers_allowed():
            self._loader: DataLoader[Batch | TrainerError] = DataLoader(
                _InSharedMemory(Guarded(stream)),
                batch_size=None,
                num_workers=num_workers,
                prefetch_factor=prefetch if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_prepare_worker,
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in plan order.

        Raises:
            DataError: a worker's error, with the sample's key and shard; or a worker was killed.
            RuntimeError: a sample arrived twice, in another order, or not at all: a bug of this program.
        """
        expected = self._stream.expected_positions()
        # The iterator has no name here: a kept traceback would keep it, and with it the workers, which ignore SIGTERM.
        for item in self._items():
            if isinstance(item, TrainerError):
                raise item
            _compare(next(expected, None), item.positions)
            yield item
        _compare(next(expected, None), None)

    def _items(self) -> Iterator[Batch | TrainerError]:
        with _many_workers_allowed():
            items = iter(self._loader)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                if lost := _LOST_WORKER.match(str(error)):
                    raise _lost(*lost.groups()) from error
                raise
            yield item


@contextlib.contextmanager
def _many_workers_allowed() -> Iterator[None]:
    """Suppress torch's warning of more workers than cores: training logs that once, with the setting."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _compare(expected: list[int] | None, delivered: list[int] | None) -> None:
    if expected != delivered:
        raise RuntimeError(
            f"the loader delivered {_describe(delivered)} where {_describe(expected)} had to come, so figures would be "
            "wrong: this is a fault of the trainer, please report it; --num_workers 0 may avoid it"
        )


def _lost(pids: str, how: str) -> DataError:
    return DataError(
        f"loader worker {pids} {how.replace('is killed', 'was killed')}: most often the machine or the job ran out of "
        "memory (the kernel's log says so), or somebody ended the process; lower num_workers, prefetch or micro_batch, "
        "or give the job more memory"
    )


def _describe(positions: list[int] | None) -> str:
    return "the end of the data" if positions is None else f"{len(positions)} samples from position {positions[0]}"


class _InSharedMemory(IterableDataset[Any]):
    """Passes batches from a worker to the training process through anonymous memory (memfd), each as one file.

    torch uses /dev/shm, which has 64 MB in a container by default. A worker that finds it full loses its batch with a
    traceback, and the training process waits for that batch until its time-out. Anonymous memory is limited only by the
    machine or the container, costs the same, and an error here is passed on as a value.
    """

    def __init__(self, stream: Guarded) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        for item in self._stream:
            yield _SharedBatch.of(item) if get_worker_info() and isinstance(item, Batch) else item


class _SharedBatch:
    """A batch that is pickled as a file descriptor and unpickled as a `Batch`.

    The file holds the noise as float32 (B * N * 4 bytes), then the pixels as uint8 in the order B, H, W, C. The noise
    comes first, so that it is aligned. Example: 64 images of 224 pixels with 196 patches take 50,176 + 9,633,792 bytes.
    """

    def __init__(self, batch: Batch, memory: Any) -> None:
        self._batch, self._memory = batch, memory

    @classmethod
    def of(cls, batch: Batch) -> "_SharedBatch | DataError":
        """Copy the tensors; an error is returned, so that the training process can raise it."""
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
    while view:  # one call writes at most 2 GB
        view = view[os.write(fd, view) :]


def _unpack(batch: Batch, memory: Any, image_shape: tuple[int, ...], noise_shape: tuple[int, ...]) -> Batch:
    fd = memory.detach()
    try:
        mapped = mmap.mmap(fd, 0)  # it holds the memory without the descriptor, and the tensors hold it
    finally:
        os.close(fd)
    num, channels, height, width = image_shape
    num_noise, num_pixels = math.prod(noise_shape), math.prod(image_shape)
    noise: Tensor = torch.empty(noise_shape)
    if num_noise:
        noise = torch.frombuffer(mapped, dtype=torch.float32, count=num_noise).view(noise_shape)
    images_BHWC = torch.frombuffer(mapped, dtype=torch.uint8, count=num_pixels, offset=4 * num_noise)
    batch.images_BCHW = images_BHWC.view(num, height, width, channels).permute(0, 3, 1, 2)
    batch.noise_BN = noise
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Start to copy the tensors of a batch to the device.

    From pinned memory the host does not wait. The copy is queued on the stream that computes, in front of the batch's
    own kernels: 64 images of 224 pixels are 9.6 MB, which take 0.4 ms at 25 GB/s.
    """
    batch.images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    batch.noise_BN = batch.noise_BN.to(device, non_blocking=True)
    return batch


def numbers_on(numbers: list[int], device: torch.device) -> Tensor:
    """Copy integers to the device as int64, through pinned memory where the device is a GPU: the host does not wait."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _prepare_worker(worker: int) -> None:
    """Set up a worker process: one thread, no signals, and an end together with the training process.

    Threads inside a worker would compete with the other workers for the cores.

    A scheduler sends its warning to every process of the job, and a terminal sends Ctrl-C. The training process then
    saves and needs its workers alive, so workers ignore these signals.

    If the training process is killed, its workers must end too. They hold copies of its connections, so the other ranks
    would notice its end only when the last worker ends; a worker that waits for storage might never end.
    """
    del worker
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_worker(error: BaseException, item: object) -> None:
    """End a worker that cannot send an item: Python would drop the item, and the training process would wait for it."""
    del item
    sys.stderr.write(f"a loader worker cannot hand over its batch ({error!r}) and ends\n")
    sys.stderr.flush()
    os._exit(1)
