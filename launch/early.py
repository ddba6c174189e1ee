"""Read a command line before the slow imports of the command: torch and what builds on it take many seconds.

Every command has a function ``read`` that parses its command line, and calls `read_early` above its other imports. Only
``read`` and what it needs of the file run then, so that help, a mistyped name and a wrong value are answered at once.
"""

import ast
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

EXIT_MISSING = 2


def explain_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one message which Python package is missing, and end; any other error keeps its traceback."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"\nerror: the Python package {error.name} is missing from {sys.executable}: run 'make install' once, and "
        "'source .venv/bin/activate' in every shell",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_MISSING)


sys.excepthook = explain_missing  # the imports below, and later those of the command

from trainer.errors import TrainerError
from trainer.fault_tolerance.exit_codes import EXIT_INTERRUPTED, explain, say_interrupted
from trainer.progress import say


def read_early(path: str, *, loads: str = "") -> None:
    """Answer help, version and mistakes, and end the process then; otherwise return.

    Args:
        path: the file of the command.
        loads: what the command imports next that takes long, to say so.
    """
    signal.signal(signal.SIGINT, _leave)
    logging.disable()  # the command reads the line once more, and speaks then
    try:
        answer = slice_of(Path(path), "read")(sys.argv[1:])
    except TrainerError as error:
        _end(explain(error))
    if answer is None:
        _end(0)
    logging.disable(logging.NOTSET)
    if loads:
        say(f"loading {loads}")


def _leave(*_: object) -> None:
    say_interrupted()
    os._exit(EXIT_INTERRUPTED)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def slice_of(path: Path, name: str) -> Any:
    """Run only those statements of a file that one of its functions needs, and return the function."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    defined = {bound: node for node in tree.body for bound in _bound_by(node)}
    needed, todo = set[str](), [name]
    while todo:
        if (wanted := todo.pop()) in defined and wanted not in needed:
            needed.add(wanted)
            if not isinstance(defined[wanted], ast.Import | ast.ImportFrom):
                todo += [node.id for node in ast.walk(defined[wanted]) if isinstance(node, ast.Name)]
    body = [kept for node in tree.body if (kept := _part_of(node, needed)) is not None]
    namespace = {"__name__": "__main__", "__doc__": ast.get_docstring(tree, clean=False), "__file__": str(path)}
    exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
    return namespace[name]


def _bound_by(node: ast.stmt) -> Iterator[str]:
    """Name what a statement at the top of a file defines."""
    match node:
        case ast.Import() | ast.ImportFrom():
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        case ast.FunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Assign() | ast.AnnAssign():
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _part_of(node: ast.stmt, needed: set[str]) -> ast.stmt | None:
    """Return what of a statement defines needed names: of an import, only these."""
    if not needed & set(_bound_by(node)):
        return None
    if isinstance(node, ast.ImportFrom):
        names = [alias for alias in node.names if (alias.asname or alias.name) in needed]
        return ast.copy_location(ast.ImportFrom(node.module, names, node.level), node)
    return node
