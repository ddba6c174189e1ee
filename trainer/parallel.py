"""Work on many processes; they end with their caller, remove what is half written, and print nothing."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PR_SET_PDEATHSIG = 1
"""Linux: send this process a signal when its parent dies."""


def parallel_map(
    work: Callable[[T], R], items: Sequence[T], *, num_processes: int, chunksize: int = 1, in_order: bool = True
) -> Iterator[R]:
    """Yield the results of ``work`` on the items.

    Args:
        work: a function that can be pickled.
        items: its arguments.
        num_processes: how many processes work; 1 works in this one.
        chunksize: items that travel to a process together, where the order counts.
        in_order: yield in the order of the items; otherwise as they are done.
    """
    if num_processes <= 1:
        yield from map(work, items)
        return
    guarded = _Item(work)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        try:
            with _interrupts_held_back(), _one_thread_each():
                if in_order:
                    results = pool.map(guarded, items, chunksize=chunksize)
                else:
                    futures = [pool.submit(guarded, item) for item in items]
                    results = (future.result() for future in as_completed(futures))
            yield from results
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after an error the others need not be done first
            raise


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that never see Ctrl-C: a terminal sends it to all, and each would print its traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes whose BLAS has one thread, unless the user chose: pools inside pools fight over the cores."""
    chosen = {name: os.environ.get(name) for name in _THREADS}
    os.environ |= {name: value or "1" for name, value in chosen.items()}
    try:
        yield
    finally:
        for name in (name for name, value in chosen.items() if value is None):
            del os.environ[name]


_leaving = False


def _prepare() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a caller that is killed leaves nobody behind
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the work at hand by an exception, so that it removes what it has half written."""
    global _leaving
    del frame
    _leaving = True
    raise SystemExit(128 + number)


@dataclass(frozen=True, slots=True)
class _Item(Generic[T, R]):
    """The work on one item; none begins in a process that was told to leave."""

    work: Callable[[T], R]

    def __call__(self, item: T) -> R:
        if _leaving:
            raise SystemExit(128 + signal.SIGTERM)
        return self.work(item)
