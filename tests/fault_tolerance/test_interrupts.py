"""Ctrl-C: one line, exit 130, nothing half written; a training saves first. Real signals, real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT, TINY, argv_of, environment, forks, metrics
from tests.helpers.shards import write_tar
from trainer.fault_tolerance.exit_codes import _Interrupt
from trainer.fault_tolerance.guards import StopRequest
from trainer.training.run import Ending


def exit_code_of(child: Callable[[], None]) -> int:
    """Run a function in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            child()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupt(run: "subprocess.Popen[str]", *, when: Callable[[], bool]) -> str:
    """Press Ctrl-C in a terminal, which signals every process of the command; returns what it printed."""
    deadline = time.monotonic() + 120
    while not when() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    return run.communicate(timeout=120)[0]


@contextlib.contextmanager
def started(*argv: str) -> Iterator["subprocess.Popen[str]"]:
    run = subprocess.Popen(
        [sys.executable, *argv],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def test_ctrl_c_saves_says_how_to_go_on_and_asks_no_scheduler_to_start_again(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = TINY | {"data": f"{shards}/*.tar", "output_dir": str(output), "epochs": "200", "save_every": "100000"}
    run = forks().start(ROOT / "launch" / "pretrain.py", argv_of(flags), tmp_path / "log")
    run.until((output / "metrics.jsonl").exists)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    code, said = run.wait(60), (tmp_path / "log").read_text()
    assert code == 130, said[-2000:]
    last = metrics(output)[-1]["step"]
    assert (output / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    assert f"Stopped by Ctrl-C at step {last} of 1600, saved: start the same command again to go on." in said
    assert "Traceback" not in said
    assert said.count("got Ctrl-C") == 1  # not from the loader's worker


def test_ctrl_c_before_the_first_step_is_one_line(shards: Path, tmp_path: Path) -> None:
    flags = TINY | {"data": f"{shards}/*.tar", "output_dir": str(tmp_path / "out")}
    run = forks().start(ROOT / "launch" / "pretrain.py", argv_of(flags), tmp_path / "log")
    run.until((tmp_path / "out" / "logs").exists)
    os.killpg(run.pid, signal.SIGINT)
    code, said = run.wait(60), (tmp_path / "log").read_text()
    assert code == 130, said[-2000:]
    assert "Traceback" not in said
    assert said.count("interrupted: ") == 1


def test_ctrl_c_while_an_object_is_collected_is_not_dropped() -> None:
    """Python ignores what a finaliser raises, and a signal's handler may run in one."""
    script = """
import os, signal, time
from trainer.fault_tolerance.exit_codes import exit_with

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def work():
    Collected()
    time.sleep(20)
    return 0

exit_with(work)
"""
    with started("-c", script) as run:
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 130, said
    assert said == "\ninterrupted: nothing half written stays; the same command starts it again\n"


@pytest.mark.parametrize("after_s", [0.0, 0.5])
def test_ctrl_c_while_a_command_loads_torch_is_one_line(after_s: float, tmp_path: Path) -> None:
    flags = {"recipe": "demo", "data": "nowhere/*.tar", "output_dir": str(tmp_path / "out")}
    with started("launch/pretrain.py", *argv_of(flags)) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "loading torch and DeepSpeed ...\n"
        time.sleep(after_s)
        os.killpg(run.pid, signal.SIGINT)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 130, said
    assert said == "\ninterrupted: nothing half written stays; the same command starts it again\n"


def test_a_second_ctrl_c_ends_a_training_at_once_and_the_same_keystroke_does_not() -> None:
    def press(again_s: float) -> None:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        stop._first_s -= again_s
        os.kill(os.getpid(), signal.SIGINT)

    assert exit_code_of(lambda: press(1.5)) == 130
    assert exit_code_of(lambda: press(0.0)) == 0  # as a launcher that passes it on


def test_a_second_ctrl_c_ends_a_tool_at_once() -> None:
    def press() -> None:
        _Interrupt()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    assert exit_code_of(press) == 130


@pytest.mark.parametrize("when", ["its processes start", "they work"])
def test_a_tool_with_many_processes_ends_in_one_line_and_leaves_nothing_half_written(when: str, tmp_path: Path) -> None:
    noise = os.urandom(30_000_000)
    for number in range(6):
        write_tar(tmp_path / "in" / f"{number}.tar", [(f"{i}.jpg", noise) for i in range(4)])
    target = tmp_path / "out"
    words = ["tools/check_shards.py", "--data", str(tmp_path / "in"), "--repair", str(target), "--num_processes", "2"]
    with started(*words) as run:
        process = psutil.Process(run.pid)
        starts, works = lambda: len(process.children()) > 2, lambda: target.exists() and any(target.iterdir())
        said = interrupt(run, when=starts if when == "its processes start" else works)
        assert run.returncode == 130, said
    assert "Traceback" not in said
    assert said.count("interrupted: ") == 1
    assert not [path.name for path in target.iterdir() if not path.name.endswith(".tar") or path.name.startswith(".")]


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        (Ending(250, 250), 0, "Finished: step 250 of 250."),
        (Ending(1, 250), 0, "Stopped at step 1 of 250, as --stop_at_step says"),
        (
            Ending(7, 250, signal.SIGTERM),
            85,
            "Stopped by SIGTERM at step 7 of 250, saved: start the same",
        ),
        (Ending(7, 250, signal.SIGINT), 130, "Stopped by Ctrl-C at step 7 of 250, saved"),
    ],
)
def test_the_last_line_says_why_the_training_ended(ending: Ending, code: int, words: str) -> None:
    assert ending.exit_code == code
    assert str(ending).startswith(words)
