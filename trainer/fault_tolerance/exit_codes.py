"""From a command's end, or an error, to one message and an exit code."""

import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar

from trainer.config.command_line import Reader, call, given_places
from trainer.config.parse import expand_home
from trainer.distributed.refusal import report_to_ranks, wait_for_main
from trainer.errors import SupersededError, TrainerError
from trainer.fault_tolerance.watchdog import explain_loss, set_phase
from trainer.fault_tolerance.watchdog_process import Phase
from trainer.progress import is_main
from trainer.startup import EXIT_INTERRUPTED, EXIT_MISSING, missing_package, say_interrupted

L = TypeVar("L")

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85
EXIT_PEER_LOST = 86
EXIT_SUPERSEDED = 87
_MAIN_SPEAKS_FIRST_S = 15.0
_AGAIN_S = 0.05
"""An interrupt that Python dropped is raised again after this time; the collection that dropped it is over by then."""


def run(main: Callable[[L], int], cli: Reader[L]) -> NoReturn:
    """Run a command on the words that it was started with, and end the process; `exit_with` lists the exit codes.

    Args:
        main: does the work and returns the exit code.
        cli: what the command line may hold.
    """
    exit_with(lambda: call(main, cli, sys.argv[1:]))


def exit_with(work: Callable[[], int]) -> NoReturn:
    """Do some work and end the process.

    The exit code is what the work returns; 2 with one message on stderr if the user can fix what went wrong; 86 if
    another rank or its host was lost, which the same command may survive; 87 if a newer attempt has taken over; 130
    with one line after Ctrl-C; 1 with a traceback for anything else.
    """
    sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)
    interrupt = _Interrupt()
    try:
        try:
            code = work()
        except Exception as error:  # noqa: BLE001  (every error is shown; this process must not linger)
            code = EXIT_INTERRUPTED if interrupt.seen else explain(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if interrupt.seen:
        set_phase(Phase.FAILED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a rank that failed must not wait in the clean-up of a group that lost its members


class _PatientFile(io.FileIO):
    """Standard output that takes text although its reader has left, as ``head`` does; nobody sees that text.

    Other commands are ended by SIGPIPE there. But what these ones have to write into files does not depend on who reads
    what they print: a training goes on.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for processes that are started later, too
            os.close(nowhere)
            return memoryview(data).nbytes


def _patient(stream: TextIO) -> TextIO:
    """Return a stream of text that no character and no lost reader breaks: what was printed must not end the work."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    file = _PatientFile(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def explain(error: Exception) -> int:
    """Show an error, and return the exit code."""
    if isinstance(error, TrainerError):
        set_phase(Phase.FAILED)
        code = EXIT_SUPERSEDED if isinstance(error, SupersededError) else EXIT_USER_ERROR
        if is_main() or not _main_speaks_first(code):
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        if is_main():
            report_to_ranks()
        return code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("trainer", "tools"):
        set_phase(Phase.FAILED)
        print(missing_package(error), file=sys.stderr)
        return EXIT_MISSING
    if isinstance(error, OSError) and (place := _place_of(error)):
        set_phase(Phase.FAILED)
        print(f"\nerror: {place}", file=sys.stderr)
        return EXIT_USER_ERROR
    loss = explain_loss(error)
    if loss is None:
        set_phase(Phase.FAILED)
        traceback.print_exception(error)
        return 1
    if is_main():
        print(f"\nerror: {loss}", file=sys.stderr)
    return EXIT_PEER_LOST


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def _place_of(error: OSError) -> str | None:
    """Say which setting leads to a file that the system refuses; None where none does: then it is a mistake of ours."""
    if error.errno not in _REFUSALS or not isinstance(error.filename, str):
        return None
    path = Path(error.filename).absolute()
    for name, value in given_places(sys.argv[1:]):
        given = Path(expand_home(value)).absolute()
        above, below = path == given or path in given.parents, given in path.parents
        if above or (below and error.errno != errno.ENOENT):  # that something is missing below is not the user's doing
            return f"{name} is {value!r}, but {path} cannot be used: {error.strerror}. Name another place"
    return None


class _Interrupt:
    """Answers Ctrl-C with one line and `KeyboardInterrupt`, so that what is half written is removed; a second one ends.

    Processes that this one has started get SIGTERM, and forks of it end in silence: a terminal interrupts them too.

    Python drops an exception that is raised while an object is collected, and goes on. An interrupt that falls there is
    raised once more, a moment later.
    """

    def __init__(self) -> None:
        self.seen, self._pid, self._was_dropped = False, os.getpid(), False
        signal.signal(signal.SIGINT, self._note)
        self._show_dropped, sys.unraisablehook = sys.unraisablehook, self._note_dropped

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._was_dropped:
            self._was_dropped = False
            raise KeyboardInterrupt
        if self.seen or os.getpid() != self._pid:
            os._exit(EXIT_INTERRUPTED)
        self.seen = True
        say_interrupted()
        for child in multiprocessing.active_children():
            child.terminate()
        raise KeyboardInterrupt

    def _note_dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            self._show_dropped(dropped)
            return
        self._was_dropped = True
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()


def _main_speaks_first(code: int) -> bool:
    """Wait on another rank until rank 0 has shown the refusal; False if it has not within the time limit.

    The launcher ends all ranks when the first leaves, and rank 0 has the better message. A rank that is ended while it
    waits leaves with the same code, so that nobody takes a mistake for a lost rank.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    return wait_for_main(_MAIN_SPEAKS_FIRST_S)
