"""What a script does before its imports: one message for a missing or an old package, one line for Ctrl-C.

This module and what it imports need the standard library only.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

if sys.version_info < (3, 11):  # noqa: UP036  (with an old Python, say so instead of a SyntaxError)
    sys.exit(f"error: Python 3.11 or newer is needed, but {sys.executable} is {sys.version.split()[0]}: see README.md")

from trainer.errors import ConfigError
from trainer.progress import announce, is_main

EXIT_MISSING = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

TESTED = {
    "torch": ("2.6.0", "2.15"),
    "torchvision": ("0.21.0", "0.29"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "numpy": ("1.26.4", "2.5"),
}
"""Package -> the oldest and the newest version that was tested; constraints/ holds whole sets.

At ZeRO 1 and 2, DeepSpeed 0.19.0 and 0.19.2 do not check the norm of the gradients. A NaN would move the weights, as
the engine leaves out their scan of every gradient. 0.18.9 computed other losses in silence.
"""
_NEXT_DEEPSPEED = "0.20"
"""Refused: the trainer knows DeepSpeed's files and faults by version."""


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
    """Surround imports that take seconds: check versions, show ``what`` is loaded, let Ctrl-C end the process at once.

    A `KeyboardInterrupt` inside an import can be swallowed, or shown as another error.

    Raises:
        ConfigError: a package has a version that the trainer does not work with.
    """
    for name in TESTED:
        with contextlib.suppress(PackageNotFoundError):  # the import says what is missing
            check_version(name, version(name))
    if what:
        announce(f"loading {what}")
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_version(name: str, found: str) -> None:
    """Refuse a version that is too old, and note on rank 0 that one is newer than all that were tested.

    Only numbers count: 2.11.0+cu130 is 2.11.0, and so is NVIDIA's 2.11.0a0+eb7c1a1. 2.15.1 is no newer than 2.15.

    Args:
        name: a package of `TESTED`.
        found: its installed version.

    Raises:
        ConfigError: it is too old, or a DeepSpeed with other insides.
    """
    oldest, newest = TESTED[name]
    release = _release(found)
    if release < _release(oldest):
        raise ConfigError(
            f"{name} is {found}, but {oldest} or newer is needed: pip install '{name}>={oldest}' "
            "(constraints/README.md lists versions that fit together)"
        )
    if name == "deepspeed" and release >= _release(_NEXT_DEEPSPEED):
        raise ConfigError(
            f"deepspeed is {found}, but the trainer knows the files of {newest} only: pip install deepspeed=={newest}"
        )
    if release[: len(_release(newest))] > _release(newest) and is_main():
        print(f"note: {name} {found} is newer than {newest}, the newest tested one", file=sys.stderr, flush=True)


def _release(number: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 11, 0) of 2.11.0+cu130."""
    found = re.match(r"\d+(?:\.\d+)*", number)
    return tuple(map(int, found[0].split("."))) if found else ()


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
