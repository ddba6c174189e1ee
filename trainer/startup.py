"""What a script does before its imports: one message for a missing package, one line for Ctrl-C.

This module and what it imports need the standard library only.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

if sys.version_info < (3, 11):  # noqa: UP036  (with an old Python, say so instead of a SyntaxError)
    sys.exit(f"error: Python 3.11 or newer is needed, but {sys.executable} is {sys.version.split()[0]}: see README.md")

from trainer.progress import announce, is_main

EXIT_MISSING = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def guard_imports() -> None:
    """Until `exit_codes.run` takes over: explain a missing package, and end with one line after Ctrl-C.

    A script puts the folder above its own on the path. In a checkout that is the project; in an installed wheel it is
    the package itself, and leaves the path again: ``log`` or ``data`` shall not be found as top-level modules.
    """
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]
    sys.excepthook = _explain
    signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def loading(what: str = "") -> Iterator[None]:
    """Surround imports that take seconds: show ``what`` is loaded, and let Ctrl-C end the process at once.

    A `KeyboardInterrupt` inside an import can be swallowed, or shown as another error.
    """
    if what:
        announce(f"loading {what}")
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def missing_package(error: ModuleNotFoundError) -> str:
    """Say which Python package is missing and how to install it."""
    return (
        f"\nerror: the Python package {error.name} is missing from {sys.executable}: run 'make install' once, and "
        "'source .venv/bin/activate' in every shell"
    )


def say_interrupted() -> None:
    """Write the one line of a command that Ctrl-C ends."""
    if is_main():
        os.write(2, b"\ninterrupted: nothing half written stays; the same command starts it again\n")


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    print(missing_package(error), file=sys.stderr, flush=True)
    os._exit(EXIT_MISSING)


def _leave(*_: object) -> None:
    say_interrupted()
    os._exit(EXIT_INTERRUPTED)
