"""Starts the scripts of tests/ranks: one law each, on several ranks."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.runs import ROOT, forks


def run_worker(name: str, words: list[str], folder: Path, *, ranks: int) -> list[dict[str, Any]]:
    """Run a script of tests/ranks/ on so many ranks; returns what each wrote as rank-R.json."""
    started = forks().start(ROOT / "tests" / "ranks" / name, words, folder / "log", ranks=ranks)
    assert started.wait(600) == 0, (folder / "log").read_text()[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
