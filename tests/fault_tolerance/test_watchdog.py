"""Hung, stopped and killed ranks: named with their hosts, the whole job gone within the stated time, nothing left."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, TINY, TINY_DETECTOR, Run, argv_of, command, environment, forks, free_port
from tests.helpers.shards import faces
from trainer.fault_tolerance.watchdog import Limits, SlowRanks
from trainer.fault_tolerance.watchdog_process import Phase, blame, grace_s

HOST = socket.gethostname()
RANKS = ROOT / "tests" / "ranks"
TIMEOUT_S = 8
LATE_S = 15.0
"""What a loaded machine may add."""


def processes_of(folder: Path, *runs: Run) -> list[str]:
    """Processes that name a folder (watchdogs, and ranks under a launcher) or belong to a run: ranks and workers."""
    found, groups = [], {run.pid for run in runs}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state, _, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if (str(folder) in words or int(group) in groups) and int(path.name) != os.getpid() and state != "Z":
            found.append(words)
    return found


def wait_until(holds: Callable[[], Any], within_s: float = 120.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def beat_of(logs: Path, rank: int) -> dict[str, Any]:
    return json.loads((logs / "heartbeats" / f"rank-{rank:05d}.json").read_text())


def verdict_in(logs: Path) -> str:
    [path] = logs.glob("*_watchdog.txt")
    return path.read_text()


# ---------------------------------------------------------------- the watchdog process of a rank that only sets phases


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts watched ranks below tmp_path and returns when they are ready."""
    started = []

    def start(*phases: str, rank: int = 0, num_ranks: int = 1, limit_s: int = 0) -> Run:
        numbers = map(str, (rank, num_ranks, limit_s))
        out, err = tmp_path / f"stdout-{rank}", tmp_path / f"stderr-{rank}"
        started.append(forks().start(RANKS / "watched.py", [str(tmp_path), *numbers, *phases], out, err))
        assert wait_until(lambda: out.exists() and out.read_text() == "ready\n", 30)
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("end", ["leaves", "killed", "stopped and killed"])
def test_a_watchdog_process_ends_with_its_rank_and_its_last_heartbeat_shows_how(
    end: str, tmp_path: Path, watched: Callable[..., Run]
) -> None:
    process = watched("STEP:7", *(["LEAVING:7"] if end == "leaves" else []))
    if end != "leaves":
        assert wait_until(lambda: (tmp_path / "heartbeats" / "rank-00000.json").exists())
        os.kill(process.pid, signal.SIGSTOP if "stopped" in end else 0)
        process.kill()
    process.wait()
    assert wait_until(lambda: not processes_of(tmp_path), 10)
    beat = beat_of(tmp_path, 0)
    assert (beat["gone"], beat["step"], beat["host"], beat["pid"]) == (True, 7, HOST, process.pid)
    assert beat["doing"] == ("leaving" if end == "leaves" else "computing the step and its collectives")
    named = [path.read_text() for path in tmp_path.glob("*_watchdog.txt")]
    assert len(named) == (end != "leaves")
    assert all(f"rank 0 on {HOST} (pid {process.pid}) died in step 7" in text for text in named)


def test_who_keeps_the_others_waiting_is_named_once_and_everybody_is_ended(
    tmp_path: Path, watched: Callable[..., Run]
) -> None:
    # Rank 1 starts first: on a loaded machine rank 0 may exceed its limit before another process has started.
    second = watched("STEP:3", "DATA:4", rank=1, num_ranks=2, limit_s=60)
    first = watched("DATA:4", "STEP:4", rank=0, num_ranks=2, limit_s=3)
    assert (first.wait(30), second.wait(30)) == (-signal.SIGKILL, -signal.SIGKILL)
    assert wait_until(lambda: not processes_of(tmp_path), 10)
    text = verdict_in(tmp_path)
    assert f"rank 1 on {HOST} (pid {second.pid}) is alive in step 4, waiting for data for" in text
    assert "behind the others" in text
    assert sum((tmp_path / f"stderr-{rank}").read_text().count("watchdog:") for rank in (0, 1)) == 1
    for rank in (0, 1):
        stack = (tmp_path / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert 'watched.py", line' in stack, "the Python stack of the rank"


def test_a_rank_without_a_heartbeat_is_named(tmp_path: Path, watched: Callable[..., Run]) -> None:
    assert watched("STEP:2", rank=0, num_ranks=2, limit_s=2).wait(30) == -signal.SIGKILL
    assert "rank 1 has sent no heartbeat in this attempt" in verdict_in(tmp_path)


def test_every_phase_ends_sometime_but_the_building_of_indices() -> None:
    limits = Limits(timeout_s=1, data_timeout_s=2, save_timeout_s=3).of_phases()
    assert set(limits) == set(Phase) - {Phase.STARTING}
    assert limits[Phase.CONNECTING] == ("save_timeout_s", 3)
    assert all(seconds <= 300 for phase, (_, seconds) in limits.items() if phase >= Phase.LEAVING)
    assert sorted(Phase) == list(Phase), "blame compares how far ranks are"


def test_a_rank_that_hangs_in_the_start_of_nccl_is_ended_and_named(tmp_path: Path, watched: Callable[..., Run]) -> None:
    process = watched("STARTING:0", "CONNECTING:0", limit_s=2)
    assert process.wait(30) == -signal.SIGKILL
    assert "is starting DeepSpeed and loading the state" in verdict_in(tmp_path)
    assert "but save_timeout_s is 2 s" in verdict_in(tmp_path)


def test_a_rank_that_nothing_ends_is_killed_after_another_was(tmp_path: Path, watched: Callable[..., Run]) -> None:
    """NCCL's kernels wait on after a peer was killed, and no time-out of a phase is near; gloo's raise an error."""
    second = watched("STEP:3", rank=1, num_ranks=2)
    first = watched("STEP:3", rank=0, num_ranks=2)
    assert wait_until(lambda: len(list((tmp_path / "heartbeats").glob("rank-*.json"))) == 2)
    os.kill(second.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    assert first.wait(60) == -signal.SIGKILL
    assert time.monotonic() - killed_s < grace_s(2) + LATE_S
    assert f"rank 1 on {HOST} (pid {second.pid}) died in step 3" in verdict_in(tmp_path)


def test_time_in_which_the_whole_machine_slept_is_not_the_ranks(tmp_path: Path, watched: Callable[..., Run]) -> None:
    process = watched("STEP:2", limit_s=6)
    assert wait_until(lambda: (tmp_path / "heartbeats" / "rank-00000.json").exists())
    [watchdog] = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.kill(process.pid, number)
        os.kill(watchdog, number)
        time.sleep(8 if number == signal.SIGSTOP else 2)
    assert process.poll() is None
    assert not list(tmp_path.glob("*_watchdog.txt"))
    assert process.wait(30) == -signal.SIGKILL, "later it is too late indeed"


def test_signals_of_a_launcher_do_not_end_the_watchdog_process_before_its_rank(
    tmp_path: Path, watched: Callable[..., Run]
) -> None:
    process = watched("STEP:2")
    assert wait_until(lambda: (tmp_path / "heartbeats" / "rank-00000.json").exists())
    [watchdog] = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(watchdog, number)
    time.sleep(0.5)
    process.kill()
    assert wait_until(lambda: list(tmp_path.glob("*_watchdog.txt")), 10), "it still speaks"


# ------------------------------------------------------------------------------------------------ who is to blame


def beat(rank: int, phase: Phase = Phase.STEP, step: int = 9, **changes: Any) -> dict[str, Any]:
    plain = {"rank": rank, "host": f"host{rank}", "pid": 70 + rank, "step": step, "phase": int(phase), "for_s": 5.0}
    return plain | {"state": "S", "gone": False, "age_s": 0.0, "time": 100.0 + rank} | changes


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([beat(0), beat(1, state="T"), beat(2)], ["rank 1 on host1 (pid 71) is stopped"]),
        ([beat(0), None, beat(2)], ["rank 1 has sent no heartbeat in this attempt"]),
        ([beat(0), beat(1, age_s=60.0), beat(2)], ["rank 1 on host1 (pid 71) has sent no heartbeat for 60 s"]),
        ([beat(0), beat(1, Phase.DATA), beat(2)], ["rank 1 on host1 (pid 71) is alive in step 9, waiting for data"]),
        ([beat(0), beat(1, step=8), beat(2)], ["rank 1 on host1 (pid 71) is alive in step 8"]),
        ([beat(0, Phase.SAVING), beat(1, state="D")], ["rank 1 on host1 (pid 71) is blocked in the kernel"]),
        ([beat(0), beat(1, gone=True), beat(2, Phase.LOST, gone=True)], ["rank 1 on host1 (pid 71) died in step 9"]),
        ([beat(0, gone=True, time=9.0), beat(1, gone=True, time=8.0)], ["rank 1 on host1", "rank 0 on host0"]),
        ([beat(0), beat(1, Phase.FAILED)], ["rank 1 on host1 (pid 71) fails in step 9, ending after an error of its"]),
        ([beat(0), beat(1)], ["no rank is behind: all 2 are in step 9"]),
        ([beat(0, Phase.DATA)], ["rank 0 on host0 (pid 70) is alive in step 9, waiting for data for 5 s"]),
    ],
)
def test_blame_falls_on_the_lost_the_silent_the_stopped_and_else_on_those_behind(
    beats: list[dict[str, Any] | None], expected: list[str]
) -> None:
    lines = blame(beats)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_a_rank_that_missed_two_heartbeats_is_the_lost_one_when_a_connection_broke() -> None:
    beats = [beat(0, age_s=2.0), beat(1, age_s=5.0)]
    assert blame(beats)[0].startswith("no rank is behind")
    [line] = blame(beats, silent_beats=2)
    assert line.startswith("rank 1 on host1 (pid 71) has sent no heartbeat for 5 s")


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([[0.0, 0.8, 0.0, 0.1]] * 7, [[], [], [1], [], [], [1], []]),
        ([[0.0, 0.8], [0.0, 0.8], [0.0, 0.0], [0.0, 0.8]], [[], [], [], []]),
        ([[0.9, 0.9, 0.9]] * 3, [[], [], []]),
        ([[0.01, 0.05, 0.01]] * 3, [[], [], []]),
    ],
)
def test_a_rank_whose_data_come_late_in_several_windows_is_slow(
    windows: list[list[float]], expected: list[list[int]]
) -> None:
    slow = SlowRanks()
    assert [slow.after(shares) for shares in windows] == expected


# -------------------------------------------------------------------------------------------------- how a rank ends


def script(folder: Path, text: str) -> Run:
    path = folder / "script.py"
    path.write_text(text)
    return forks().start(path, [], folder / "stdout", folder / "stderr")


def reads(path: Path, text: str) -> bool:
    return wait_until(lambda: path.exists() and text in path.read_text(), 60)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("ZeroDivisionError('x')", 1, "Traceback"),
        ("ConfigError('fix it')", 2, "error: fix it"),
        ("RuntimeError('[/a/gloo/b.cc:5] Connection closed by peer. GLHF')", 86, "could not connect (Connection"),
        ("RuntimeError('shapes differ')", 1, "Traceback"),
    ],
)
def test_the_exit_code_tells_a_lost_peer_from_a_mistake_and_from_a_bug(
    error: str, code: int, message: str, tmp_path: Path
) -> None:
    process = script(
        tmp_path,
        f"""
from trainer.fault_tolerance.exit_codes import exit_with
from trainer.errors import ConfigError
def fail():
    raise {error}
exit_with(fail)""",
    )
    assert process.wait(60) == code
    text = process.err.read_text()
    assert message in text
    assert ("Traceback" in text) == (code == 1)


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not(tmp_path: Path) -> None:
    process = script(
        tmp_path,
        """
import time
from trainer.fault_tolerance import guards
guards._SAME_REQUEST_S = 1.5
stop = guards.StopRequest()
print("ready", flush=True)
while True:
    time.sleep(0.1)""",
    )
    assert reads(process.out, "ready")
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGTERM)  # the scheduler's own and the one that the launcher passes on
    time.sleep(2.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert process.err.read_text().count("saving after this step or the next") == 1


def test_a_killed_rank_takes_its_loader_workers_along_even_one_that_hangs_with_the_storage(tmp_path: Path) -> None:
    process = script(
        tmp_path,
        """
import time
from torch.utils.data import IterableDataset
from trainer.data.loader import Loader
class Hung(IterableDataset):
    def __iter__(self):
        print("ready", flush=True)
        time.sleep(60)
        yield from ()
    def expected_positions(self):
        yield [0]
next(iter(Loader(Hung(), num_workers=1)))""",
    )
    assert reads(process.out, "ready")
    assert len(processes_of(tmp_path, process)) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert wait_until(lambda: not processes_of(tmp_path, process), 10)


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flags"), [("pretrain", TINY), ("finetune", TINY_DETECTOR)])
def test_a_run_that_hangs_in_deepspeeds_start_is_ended(command: str, flags: dict[str, str], tmp_path: Path) -> None:
    faces(tmp_path / "shards" / "train.tar", range(64))
    faces(tmp_path / "shards" / "val.tar", range(100, 132))
    places = {"data": "train.tar", "val_data": "val.tar"}
    places = {name: str(tmp_path / "shards" / file) for name, file in places.items()}
    argv = argv_of(flags | places | {"output_dir": str(tmp_path / "out"), "save_timeout_s": "2"})
    process = script(
        tmp_path,
        f"""
import runpy, sys, time
from trainer.distributed.engine import Engine
Engine.__init__ = lambda self, model, **options: time.sleep(120)
sys.argv[1:] = {argv}
runpy.run_path({str(ROOT / "launch" / f"{command}.py")!r}, run_name="__main__")""",
    )
    assert process.wait(100) == -signal.SIGKILL, process.err.read_text()
    assert "is starting DeepSpeed and loading the state in step 0" in verdict_in(tmp_path / "out" / "logs")


def run_flags(shards: Path, output: Path, **changes: object) -> dict[str, str]:
    endless = {"data": f"{shards}/*.tar", "output_dir": output, "epochs": 2000, "save_every": 5}
    limits = {"timeout_s": TIMEOUT_S, "data_timeout_s": TIMEOUT_S}
    return TINY | {name: str(value) for name, value in (endless | limits | changes).items()}


def start_ranks(flags: dict[str, str], tmp_path: Path, *, program: Path) -> Run:
    """Two ranks without a launcher, which would hide their exit codes and end the second when the first ends."""
    return forks().start(program, argv_of(flags), tmp_path / "log-ranks", ranks=2)


def logs_of(tmp_path: Path) -> str:
    return "".join(path.read_text() for path in sorted(tmp_path.glob("log-*")))


def has_trained(output: Path) -> bool:
    return (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").read_text().count("\n") >= 6


@pytest.mark.slow
@pytest.mark.ranks
def test_a_stopped_rank_is_named_and_the_whole_job_is_gone_in_the_stated_time(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (tmp_path / "log-0").open("w") as log:
        launcher = subprocess.Popen(
            command(run_flags(shards, output), ranks=2, port=free_port()), env=environment(), stdout=log, stderr=log
        )
    assert wait_until(lambda: has_trained(output)), logs_of(tmp_path)[-3000:]
    pid = beat_of(output / "logs", 1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    launcher.wait(120)
    assert time.monotonic() - stopped_s < TIMEOUT_S + grace_s(2) + LATE_S
    assert launcher.returncode != 0
    assert wait_until(lambda: not processes_of(output), 10), processes_of(output)
    text = logs_of(tmp_path)
    assert text.count("watchdog:") == 1
    assert re.search(f"but (data_)?timeout_s is {TIMEOUT_S} s", text)  # by where the signal met it
    assert f"rank 1 on {HOST} (pid {pid}) is stopped (SIGSTOP) in step" in verdict_in(output / "logs")
    stacks = [(output / "logs" / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert 'trainer/training/loop.py", line' in stacks[0]
    assert "T (stopped)" in stacks[1]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.law
def test_a_killed_rank_ends_the_others_with_86_and_one_message_that_names_it(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = run_flags(shards, output, timeout_s=600, data_timeout_s=600, num_workers=2)
    run = start_ranks(flags, tmp_path, program=ROOT / "launch" / "pretrain.py")
    assert wait_until(lambda: has_trained(output)), logs_of(tmp_path)[-3000:]
    victim = run.pids[1]
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    run.wait(60)
    assert time.monotonic() - killed_s < LATE_S
    assert list(run.codes.values()) == [86, -signal.SIGKILL]
    assert wait_until(lambda: not processes_of(output, run), 10), processes_of(output, run)
    text = logs_of(tmp_path)
    assert text.count("watchdog:") == 1
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert f"rank 1 on {HOST} (pid {victim}) died in step" in text


@pytest.mark.slow
@pytest.mark.ranks
def test_a_loader_that_never_delivers_is_named_and_leaves_no_worker_behind(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = run_flags(shards, output, timeout_s=600)
    run = start_ranks(flags, tmp_path, program=RANKS / "stuck_loader.py")
    run.wait(180)
    assert 0 not in run.codes.values(), "both"
    assert wait_until(lambda: not processes_of(output, run), 10), processes_of(output, run)
    text = logs_of(tmp_path)
    assert text.count("watchdog:") == 1
    assert f"but data_timeout_s is {TIMEOUT_S} s" in text
    assert f"rank 1 on {HOST} (pid {run.pids[1]}) is alive in step 1, waiting for data for" in text
    assert "loader.py" in (output / "logs" / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_that_ends_well_leaves_no_watchdog_process_and_blames_nobody(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = run_flags(shards, output, stop_at_step=6)
    run = start_ranks(flags, tmp_path, program=ROOT / "launch" / "pretrain.py")
    assert run.wait(180) == 0, logs_of(tmp_path)[-3000:]
    assert list(run.codes.values()) == [0, 0]
    assert wait_until(lambda: not processes_of(output, run), 10), processes_of(output, run)
    assert not list((output / "logs").glob("*_watchdog.txt"))
    assert [beat_of(output / "logs", rank)["doing"] for rank in (0, 1)] == ["leaving", "leaving"]
