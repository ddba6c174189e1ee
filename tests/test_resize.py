"""A run goes on with another number of ranks: the same weights, moments and steps, and nothing left behind."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
WORLDS = (2, 1, 3, 2)
FP32 = [f"{kind}-cpu_fp32-{stage}" for stage in range(4) for kind in ("mae", "lora")]
BF16 = ["mae-zero1_bf16-1", "mae-zero2_bf16-2", "mae-zero3_bf16-3", "lora-zero1_bf16-1"]


def hop(root: Path, number: int, cases: list[str], *, port: int) -> list[dict[str, Any]]:
    """Run the ranks of one hop; returns what each saw, by case."""
    ranks = WORLDS[number]
    worker = ROOT / "tests" / "ranks" / "resize_worker.py"
    words = [str(root), str(number), str(WORLDS[number - 1]), str(len(WORLDS)), *cases]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    logs = [root / f"hop-{number}-rank-{rank}.log" for rank in range(ranks)]
    started = []
    for rank, log in enumerate(logs):
        place = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(worker), *words], env=environment() | place, stdout=file, stderr=file
                )
            )
    for process, log in zip(started, logs, strict=True):
        process.wait(timeout=400)
        assert process.returncode == 0, log.read_text()[-4000:]
    return [json.loads((root / f"hop-{number}-rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_two_to_one_to_three_to_two_ranks_keep_every_bit_of_the_state(tmp_path: Path) -> None:
    cases = FP32 + BF16
    hops = []
    for number in range(len(WORLDS)):
        before = time.monotonic()
        hops.append(hop(tmp_path, number, cases, port=29860 + number))
        print(number, time.monotonic() - before)
    for case in cases:
        losses = []
        for number, ranks in enumerate(hops):
            first = ranks[0][case]
            assert all(seen[case]["saved"] == first["saved"] for seen in ranks), case
            assert first["saved"]["steps"] == str({2.0 * (number + 1)})
            assert first["saved"]["counted"] == str(2 * (number + 1))
            losses += first["losses"]
            if number:
                for seen in ranks:
                    assert seen[case]["loaded"] == hops[number - 1][0][case]["saved"], (case, number)
                    assert seen[case]["left"] == []
        tolerance = 0.02 if "bf16" in case else 1e-4
        assert losses == pytest.approx(hops[0][0][case]["whole"], rel=tolerance), case
