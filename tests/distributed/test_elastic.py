"""Killed anywhere and resumed on other world sizes, a run consumes what an uninterrupted run consumes, step by step."""

import json
import signal
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY, argv_of, forks, launch, ledger, metrics, steps_done
from tests.helpers.shards import members_of, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
BATCH, STEPS = 12, 40
FLAGS = TINY | {
    "global_batch": str(BATCH),
    "micro_batch": "2",
    "epochs": str(BATCH * STEPS / 64),  # an epoch of 64 samples ends inside a step
    "save_every": "4",
    "prefetch": "10",
    "keep_checkpoints": "2",
}


def run_until(step: int, flags: dict[str, str], *, ranks: int, log: Path) -> None:
    """Start a run and SIGKILL every process of it as soon as it has done that step."""
    run = forks().start(ROOT / "launch" / "pretrain.py", argv_of(flags), log, ranks=ranks)
    run.until(lambda: steps_done(Path(flags["output_dir"])) >= step)
    run.kill()
    assert run.wait() == -signal.SIGKILL, log.read_text()[-3000:]


@pytest.mark.law
def test_kills_and_other_world_sizes_leave_no_trace_in_the_ledger(shards: Path, tmp_path: Path) -> None:
    replicated = json.loads((ROOT / "ds_configs" / "cpu_fp32.json").read_text())
    replicated["zero_optimization"] = {"stage": 0}  # every rank holds the whole state, so any number can load it
    (tmp_path / "zero0.json").write_text(json.dumps(replicated))

    def flags(name: str) -> dict[str, str]:
        return FLAGS | {
            "ds_config": str(tmp_path / "zero0.json"),
            "data": f"{shards}/*.tar",
            "output_dir": str(tmp_path / name),
            "sample_ledger": str(tmp_path / f"{name}-ledger"),
        }

    done = launch(flags("whole"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = ledger(tmp_path / "whole-ledger")
    assert sorted(whole) == list(range(1, STEPS + 1))

    killed = flags("killed")
    first = {"num_workers": "2", "micro_batch": "4"}
    run_until(6, killed | first, ranks=1, log=tmp_path / "log1")  # between saves, 10 batches ahead
    run_until(7, killed, ranks=3, log=tmp_path / "log2")  # again in the same epoch, right after the resume
    run_until(17, killed | {"num_workers": "0"}, ranks=3, log=tmp_path / "log3")  # step 16 ends epoch 3
    done = launch(killed | {"resume": "must", "micro_batch": "6"}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]

    assert ledger(tmp_path / "killed-ledger") == whole
    positions = [position for pairs in whole.values() for position, _ in pairs]
    assert sorted(positions) == list(range(BATCH * STEPS))
    losses = [
        {row["step"]: row["loss"] for row in metrics(tmp_path / name) if "loss" in row} for name in ("whole", "killed")
    ]
    assert losses[0].keys() == losses[1].keys()
    assert max(abs(losses[0][step] / losses[1][step] - 1) for step in losses[0]) < 1e-4


def test_other_data_need_permission_and_leave_a_record(shards: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"data": f"{shards}/*.tar", "output_dir": str(tmp_path / "out")}
    assert launch(flags | {"stop_at_step": "4"}).returncode == 0
    write_tar(tmp_path / "more" / "s-003.tar", members_of(range(64, 80)))
    more = flags | {"data": f"{shards}/*.tar,{tmp_path}/more/*.tar", "stop_at_step": "8"}
    refused = launch(more)
    assert refused.returncode == 2
    assert "--allow_data_change" in refused.stderr
    assert "data_fingerprint" in refused.stderr
    shares = launch(flags | {"data": f"{shards}/s-000.tar@1,{shards}/s-001.tar@2,{shards}/s-002.tar@1"})
    assert shares.returncode == 2
    assert "20 samples at 1, 30 samples at 2, 14 samples at 1" in shares.stderr
    allowed = launch(more | {"allow_data_change": "true"})
    assert allowed.returncode == 0, allowed.stderr[-3000:]
    manifest = json.loads((tmp_path / "out" / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    change = manifest["progress"]["data_changes"][0]
    assert change["step"] == 4
    assert change["before"] != change["after"]


@pytest.mark.parametrize("changes", [{"balance_by": "label"}, {"use_balanced_sampler": "true"}])
def test_balanced_runs_train_and_refuse_two_ways_at_once(shards: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    flags = FLAGS | {"data": f"{shards}/*.tar", "output_dir": str(tmp_path / "out"), "stop_at_step": "3"}
    done = launch(flags | changes | {"sample_ledger": str(tmp_path / "ledger")})
    assert done.returncode == 0, done.stderr[-3000:]
    for pairs in ledger(tmp_path / "ledger").values():
        odd = sum(int(key.removeprefix("face")) % 2 for _, key in pairs)
        assert odd == BATCH // 2 or "use_balanced_sampler" in changes
    both = {"balance_by": "label", "use_balanced_sampler": "true", "output_dir": str(tmp_path / "other")}
    refused = launch(flags | both)
    assert refused.returncode == 2
    assert "keep one" in refused.stderr
