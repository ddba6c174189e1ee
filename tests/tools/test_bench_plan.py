"""The index that tools/bench/plan.py makes up is one that a run opens."""

from pathlib import Path

from tools.bench import plan as bench_plan


def test_the_made_up_index_opens_and_is_planned(tmp_path: Path) -> None:
    row = bench_plan.measure(tmp_path, 100_000)
    assert row.keys() == {"first_s", "resume_s", "mb", "us"}
    assert min(row["first_s"], row["resume_s"], row["us"]) > 0
