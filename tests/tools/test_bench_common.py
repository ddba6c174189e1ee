"""What the benches share: candidates take turns, and ranks run side by side."""

import sys
from pathlib import Path

import pytest

from tools.bench.common import medians, run_alone, run_ranks, take_turns

RANK = "import os, sys\nprint('noise')\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'], *sys.argv[1:])\n"


def test_candidates_take_turns_and_warm_up_rounds_do_not_count() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = take_turns({"a": lambda: measure("a"), "b": lambda: measure("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert measured == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}
    assert medians(measured) == {"a": 7.0, "b": 8.0}


def test_ranks_run_side_by_side_with_the_command_line_of_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(sys, "argv", ["bench", "--steps", "2"])
    assert run_ranks(str(script), [1, 1], "--stage", "3") == ["0 1 --steps 2 --stage 3"] * 2
    assert run_ranks(str(script), [2, 2]) == ["0 2 --steps 2", "1 2 --steps 2"]
    assert run_alone(str(script), "--only", "x") == "0 1 --steps 2 --only x"


def test_a_rank_that_fails_ends_the_bench(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"rank\.py .*failed"):
        run_ranks(str(script), [1])
