"""Every command answers help, version and mistakes at once: without torch, and within a second of CPU time."""

import json
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, environment

COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if "__main__" in path.read_text()
)
ASKED = {
    "help": ["--help"],
    "version": ["--version"],
    "mistake": ["--no_such_setting", "1"],
    "help that nobody reads": ["--help", "| head"],
}
SLOW = ("torch", "deepspeed", "timm", "webdataset", "albumentations", "transformers", "sklearn", "matplotlib")
RUN_ALL = f"""
import json, os, runpy, sys, tempfile
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {SLOW!r}:
            raise SystemExit(f"imports {{name}}")

sys.meta_path.insert(0, Refuse())
reader, closed = os.pipe()
os.close(reader)
found = {{}}
for script, argv in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 2)
            os.dup2(closed if "| head" in argv else said.fileno(), 1)
            code = 99
            try:
                sys.argv = [script, *(word for word in argv if word != "| head")]
                runpy.run_path(script, run_name="__main__")
            except SystemExit as leaving:
                print(leaving.code)
                code = leaving.code if isinstance(leaving.code, int) else 98
            finally:
                try:
                    sys.stdout.flush()
                finally:
                    os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        found[" ".join([script, *argv])] = [code, said.read()]
print(json.dumps(found))
"""


@cache
def answers() -> dict[str, tuple[int, str]]:
    """Ask every command everything, in forks of one process without the slow libraries."""
    asked = [(command, argv) for command in COMMANDS for argv in ASKED.values()]
    words = [sys.executable, "-c", RUN_ALL, json.dumps(asked)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


def answer(command: str, what: str) -> tuple[int, str]:
    return answers()[" ".join([command, *ASKED[what]])]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help_without_the_slow_imports(command: str) -> None:
    code, said = answer(command, "help")
    assert code == 0, said
    assert command in said
    assert "\nExamples:\n" in said
    assert "--config FILE" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_whose_reader_leaves_ends_quietly(command: str) -> None:
    code, said = answer(command, "help that nobody reads")
    assert (code, said) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_does_its_work_although_nobody_reads_what_it_prints(unbuffered: str, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from trainer.fault_tolerance.exit_codes import exit_with

def work():
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 9999, file=stream, flush=True)
    Path("result").write_text("whole")
    return 0

exit_with(work)
"""
    reader, closed = os.pipe()
    os.close(reader)
    env = environment() | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=closed, stderr=closed, cwd=tmp_path)
    os.close(closed)
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version(command: str) -> None:
    code, said = answer(command, "version")
    assert code == 0, said
    assert said.startswith("face-mae-trainer 0."), said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_setting_in_one_message_without_the_slow_imports(command: str) -> None:
    code, said = answer(command, "mistake")
    assert code == 2, said
    assert "error: unknown setting --no_such_setting" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help_within_a_second_of_cpu_time(command: str) -> None:
    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_s()
    done = subprocess.run([sys.executable, command, "--help"], env=environment(), capture_output=True, cwd=ROOT)
    assert done.returncode == 0
    assert cpu_s() - before < 1


def test_a_nearly_right_setting_is_suggested() -> None:
    words = [sys.executable, "tools/make_shards.py", "--max_shard_byte", "3"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "unknown setting --max_shard_byte: did you mean --max_shard_bytes" in done.stderr


def test_one_rank_prints_the_help() -> None:
    for rank, said in (("0", True), ("1", False)):
        words = [sys.executable, "launch/pretrain.py", "--local_rank=1", "--help"]
        done = subprocess.run(words, env=environment() | {"RANK": rank}, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0
        assert bool(done.stdout) == said


def test_a_wrong_value_is_refused_before_the_slow_imports() -> None:
    code = (
        f"import runpy, sys\nclass Refuse:\n    def find_spec(self, name, *_):\n        assert name not in {SLOW!r}\n"
    )
    code += "sys.meta_path.insert(0, Refuse()); sys.argv = ['x', '--max_side', '1']\n"
    code += "runpy.run_path('tools/make_shards.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "error: max_side is 1, but must be at least" in done.stderr


def test_a_missing_package_is_one_message_that_says_how_to_install() -> None:
    for command, name in (("launch/finetune.py", "fire"), ("tools/check_shards.py", "numpy")):
        words = [sys.executable, "-S", str(ROOT / command), "--help"]  # without site-packages, as another Python
        done = subprocess.run(words, env={}, capture_output=True, text=True, cwd="/")
        assert done.returncode == 2
        assert f"the Python package {name} is missing from" in done.stderr
        assert "make install" in done.stderr
        assert "Traceback" not in done.stderr
