"""Killed in every phase by real signals, a run can always go on, never starts afresh and loses nothing committed.

`make faults` runs the long form: TRAINER_KILLS=100.
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.helpers.runs import ROOT, TINY, Run, argv_of, forks, metrics
from trainer.distributed.zero_state import load_safely
from trainer.fault_tolerance import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
KILLED = ROOT / "tests" / "ranks" / "killed_pretrain.py"
NUM_KILLS = int(os.environ.get("TRAINER_KILLS", "0"))
PHASES = ("step", "shard", "sync", "manifest", "rename", "latest", "latest rename", "pruning", "pruned")
OF_RANK_0 = PHASES[3:]
"""Phases that only rank 0 comes to."""
FLAGS = TINY | {"save_every": "2", "keep_checkpoints": "2", "max_restarts": "0", "num_workers": "0", "timeout_s": "120"}


def start(flags: dict[str, str], log: Path, *, ranks: int = 2, fault: dict[str, Any] | None = None) -> Run:
    return forks().start(KILLED, argv_of(flags), log, ranks=ranks, FAULT=json.dumps(fault))


def run(flags: dict[str, str], log: Path, **more: Any) -> list[int | None]:
    """Run to the end; returns the exit codes of the ranks, negative for signals."""
    started = start(flags, log, **more)
    started.wait()
    return list(started.codes.values())


def flags_of(shards: Path, output: Path, steps: int, **changes: str) -> dict[str, str]:
    where = {"data": f"{shards}/*.tar", "output_dir": str(output), "sample_ledger": f"{output}-ledger"}
    return FLAGS | where | {"epochs": str(steps * 8 / 64)} | changes


def newest(output: Path) -> int:
    found = checkpoint.find(output / "checkpoints")
    return found[1]["progress"]["step"] if found else 0


def story(output: Path) -> tuple[Any, ...]:
    """What a run has computed and consumed, to the last bit."""
    rows = [(row["step"], row.get("loss"), row.get("lr"), row.get("grad_norm")) for row in metrics(output)]
    ledgers = {path.name: path.read_text() for path in sorted(Path(f"{output}-ledger").iterdir())}
    return rows, ledgers


def weights(output: Path, step: int) -> dict[str, list[Any]]:
    """Every tensor of a checkpoint, as bytes. The files differ: a fresh and a resumed engine share memory otherwise."""
    found = {}
    for path in sorted((output / "checkpoints" / f"step-{step:08d}" / "state").iterdir()):
        tensors = [leaf for leaf in tree_leaves(load_safely(str(path))) if isinstance(leaf, torch.Tensor)]
        found[path.name] = [(tensor.dtype, tensor.flatten().tolist()) for tensor in tensors]
    assert all(found.values())
    return found


def faults(seed: int) -> list[dict[str, Any]]:
    """Every phase by one rank and by all, then as many random ones as asked for."""
    chosen = [{"phase": p, "nth": 2, "action": a} for p in PHASES for a in ("kill", "kill all")]
    chosen = chosen if NUM_KILLS else chosen[::2] + chosen[1:2]
    draw = random.Random(seed)
    while len(chosen) < NUM_KILLS:
        phase, action = draw.choice(PHASES), draw.choice(("kill", "kill all"))
        chosen.append({"phase": phase, "nth": draw.randint(1, 4), "action": action})
    for fault in chosen:
        fault["rank"] = 0 if fault["phase"] in OF_RANK_0 else draw.randint(0, 1)
    draw.shuffle(chosen)
    return chosen


@pytest.mark.parametrize("background", [pytest.param("true", marks=pytest.mark.law), "false"])
def test_a_run_killed_in_every_phase_ends_as_if_it_never_was(shards: Path, tmp_path: Path, background: str) -> None:
    killed, log = tmp_path / "killed", tmp_path / "log"
    before, num_killed, chosen = 0, 0, faults(seed=int(background == "true"))
    steps = 4 * len(chosen) + 8
    flags = flags_of(shards, killed, steps, background_saves=background)
    for fault in chosen:
        log.write_text("")
        codes = run(flags, log, fault=fault)
        assert -signal.SIGKILL in codes or codes == [0, 0], (fault, codes, log.read_text()[-3000:])
        num_killed += -signal.SIGKILL in codes
        assert "Traceback" not in log.read_text() or fault["action"] == "kill", log.read_text()[-3000:]
        after = newest(killed)
        assert after >= before, (fault, before, after)
        latest = killed / "checkpoints" / "latest"
        assert not after or (killed / "checkpoints" / latest.read_text().strip() / "manifest.json").exists()
        started = f"from step {before}," in log.read_text() or f"step-{before:08d}" in log.read_text()
        assert started, (fault, log.read_text()[-3000:])
        before = after
    assert num_killed >= len(chosen) - 2
    log.write_text("")
    assert run(flags, log) == [0, 0], log.read_text()[-3000:]
    whole = tmp_path / "whole"
    assert run(flags_of(shards, whole, steps), log) == [0, 0], log.read_text()[-3000:]
    assert story(killed) == story(whole)
    assert weights(killed, steps) == weights(whole, steps)
    leftovers = [path.name for path in (killed / "checkpoints").iterdir()]
    assert sorted(leftovers) == ["latest", f"step-{steps - 2:08d}", f"step-{steps:08d}"]
    assert not [path for path in (killed / "attempts").rglob("*") if path.suffix == ".pt"]


@pytest.mark.parametrize(
    ("phase", "action", "background"),
    [("shard", "eio", "true"), ("sync", "eio", "false"), ("shard", "full", "true"), ("shard", "full", "false")],
)
def test_storage_that_fails_on_one_rank_stops_all_after_three_saves(
    shards: Path, tmp_path: Path, phase: str, action: str, background: str
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    fault = {"phase": phase, "nth": 2 if phase == "sync" else 3, "action": action, "rank": 1}
    flags = flags_of(shards, output, 16, background_saves=background)
    codes = run(flags, log, fault=fault)
    assert codes == [2, 2], log.read_text()[-3000:]
    assert log.read_text().count("was not written (rank 1: ") >= 3
    assert "3 saves in a row have failed" in log.read_text()
    assert newest(output) >= 2
    done = newest(output)
    assert not list((output / "attempts").rglob("*.pt"))
    assert run(flags, log) == [0, 0], log.read_text()[-3000:]
    assert f"resumed from {output}/checkpoints/step-{done:08d}" in log.read_text()


def cut(at: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(at * path.stat().st_size))


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1 << len(content) % 8
        path.write_bytes(content)

    return damage


DAMAGES = [cut(0.0), cut(0.3), cut(0.999), flip(0.0), flip(0.4), flip(1.0), Path.unlink]
POINTERS = [b"", b"\xff\x00", b"step-99999999\n", b"../../../etc\n", b"/etc/passwd\n", b"step-00000002", None]
"""What `latest` may come to say; None for no such file."""


def test_damage_to_any_file_is_seen_by_all_ranks_and_the_checkpoint_before_is_used(
    shards: Path, tmp_path: Path
) -> None:
    output, log, whole = tmp_path / "out", tmp_path / "log", tmp_path / "whole"
    flags, folder = flags_of(shards, output, 100), output / "checkpoints"
    assert run(flags | {"stop_at_step": "4"}, log) == [0, 0], log.read_text()[-3000:]
    victims = [path.relative_to(folder / "step-00000004") for path in (folder / "step-00000004").rglob("*.*")]
    assert len(victims) == 4  # the manifest, and DeepSpeed's files: parameters, and the optimizer of each rank
    for number, (damage, pointer) in enumerate(zip(DAMAGES, POINTERS, strict=True)):
        step = 2 * number + 4
        victim = folder / f"step-{step:08d}" / victims[number % 4]
        damage(victim)
        (folder / "step-88888888").mkdir()  # as a copy that was broken off leaves it
        (folder / "step-00000001.part").write_bytes(b"rubbish")
        (folder / "latest").unlink()
        if pointer is not None:
            (folder / "latest").write_bytes(pointer)
        log.write_text("")
        codes = run(flags | {"stop_at_step": str(step + 2)}, log)
        assert codes == [0, 0], (victim, log.read_text()[-3000:])
        assert log.read_text().count(f"resumed from {folder}/step-{step - 2:08d}") == 1
        assert f"checkpoint {folder}/step-{step:08d}: " in log.read_text()
        assert "step-88888888: manifest.json is unreadable" in log.read_text()
        assert newest(output) == step + 2
        assert (folder / "latest").read_text() == f"step-{step + 2:08d}\n"
        (folder / "step-88888888").rmdir()
    assert run(flags_of(shards, whole, 100, stop_at_step=str(step + 2)), log) == [0, 0]
    assert story(output) == story(whole)
    assert weights(output, step + 2) == weights(whole, step + 2)
    for pointer in (b"\xff\x00", None):  # nothing is left to do, so nothing is saved
        (folder / "latest").unlink()
        if pointer is not None:
            (folder / "latest").write_bytes(pointer)
        assert run(flags | {"stop_at_step": str(step + 2)}, log) == [0, 0], log.read_text()[-3000:]


def test_an_attempt_that_comes_back_changes_nothing_and_says_so(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = flags_of(shards, output, 16)
    old_log, new_log = tmp_path / "old-log", tmp_path / "new-log"
    fault = {"phase": "rename", "nth": 2, "action": "stop", "rank": 0}
    old = start(flags | {"background_saves": "false"}, old_log, ranks=1, fault=fault)
    old.until(lambda: " T " in Path(f"/proc/{old.pid}/stat").read_text())
    assert newest(output) == 2
    assert run(flags, new_log, ranks=1) == [0], new_log.read_text()[-3000:]
    assert "resumed from" in new_log.read_text()
    shared = [path for path in output.rglob("*") if path.is_file() and "attempts" not in path.parts]
    shared += list(Path(f"{output}-ledger").iterdir())
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in shared if "logs" not in path.parts}
    os.kill(old.pid, signal.SIGCONT)
    assert old.wait() == 87, old_log.read_text()[-3000:]
    assert "attempt 1 ends: attempt 2 has taken over" in old_log.read_text()
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before} == before
    assert newest(output) == 16
