"""Maps over many processes, which end with their caller, remove partial output, and print nothing."""

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

from trainer.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PR_SET_PDEATHSIG = 1
"""Linux: send this process a signal when its parent dies."""


def parallel_map(
    work: Callable[[T], R], items: Sequence[T], *, num_processes: int | None, chunksize: int = 1, in_order: bool = True
) -> Iterator[R]:
    """Yield the results of ``work`` on the items.

    Args:
        work: a function that can be pickled.
        items: its arguments.
        num_processes: number of processes; up to 1 works in this one, None uses every core, at most one for each item.
        chunksize: items that are sent to a process together, if ``in_order``.
        in_order: yield in the order of the items; otherwise as they are done.
    """
    if num_processes is None:
        num_processes = min(num_cores(), len(items))
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
            pool.shutdown(cancel_futures=True)  # after an error, do not wait for the other items
            raise


def map_with_bar(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    num_processes: int | None,
    unit: str,
    what: str = "",
    shown: bool = True,
    chunksize: int = 1,
) -> Iterator[R]:
    """Yield the results of `parallel_map` in order, and count them in a progress bar.

    Args:
        work: as in `parallel_map`.
        items: as in `parallel_map`.
        num_processes: as in `parallel_map`.
        unit: name of an item, in the singular.
        what: name of the work.
        shown: show the bar.
        chunksize: as in `parallel_map`.
    """
    with Progress(len(items), what=what, unit=unit, shown=shown) as bar:
        for result in parallel_map(work, items, num_processes=num_processes, chunksize=chunksize):
            yield result
            bar.update()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that never get Ctrl-C: a terminal sends it to all, and each would print its traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes whose BLAS has one thread, unless the user set a number: nested pools compete for cores."""
    chosen = {name: os.environ.get(name) for name in _THREADS}
    os.environ |= {name: value or "1" for name, value in chosen.items()}
    try:
        yield
    finally:
        for name in (name for name, value in chosen.items() if value is None):
            del os.environ[name]


_leaving = False


def _prepare() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent, even if that is killed
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the current work by an exception, so that it removes its partial output."""
    global _leaving
    del frame
    _leaving = True
    raise SystemExit(128 + number)


@dataclass(frozen=True, slots=True)
class _Item(Generic[T, R]):
    """The work on one item; after SIGTERM a process starts no more items."""

    work: Callable[[T], R]

    def __call__(self, item: T) -> R:
        if _leaving:
            raise SystemExit(128 + signal.SIGTERM)
        return self.work(item)
