"""Every command answers help, version and mistakes before it imports torch."""

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from launch.early import slice_of
from tests.helpers.runs import ROOT, environment

COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "tools")
    for path in (ROOT / folder).glob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)
NEEDED = {
    "tools/plan_run.py": ["--recipe", "demo", "--images", "9"],
    "tools/submit.py": ["--nodes", "1", "--gpus", "1", "--data", "a", "--output_dir", "b"],
}
"""Without these settings, a command speaks of them first."""
ASKED = {"help": ["--help"], "version": ["--version"], "mistake": ["--no_such_setting", "1"]}
SLOW = ("torch", "deepspeed", "timm", "webdataset", "albumentations", "transformers", "sklearn", "matplotlib")
RUN_ALL = f"""
import json, os, runpy, sys, tempfile
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {SLOW!r}:
            raise SystemExit(f"imports {{name}}")

sys.meta_path.insert(0, Refuse())
found = {{}}
for script, argv in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            code = 99
            try:
                sys.argv = [script, *argv]
                runpy.run_path(script, run_name="__main__")
            except SystemExit as leaving:
                print(leaving.code)
                code = leaving.code if isinstance(leaving.code, int) else 98
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        found[" ".join([script, *argv])] = [code, said.read()]
print(json.dumps(found))
"""


@cache
def answers() -> dict[str, tuple[int, str]]:
    """Ask every command everything, in forks of one process without the slow libraries."""
    asked = [(command, argv_of(command, what)) for command in COMMANDS for what in ASKED]
    words = [sys.executable, "-c", RUN_ALL, json.dumps(asked)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


def argv_of(command: str, what: str) -> list[str]:
    return [*(NEEDED.get(command, []) if what == "mistake" else []), *ASKED[what]]


def answer(command: str, what: str) -> tuple[int, str]:
    return answers()[" ".join([command, *argv_of(command, what)])]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help_without_the_slow_imports(command: str) -> None:
    code, said = answer(command, "help")
    assert code == 0, said
    assert Path(command).stem in said or "usage" in said.lower() or "--" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version(command: str) -> None:
    code, said = answer(command, "version")
    assert code == 0, said
    assert said.startswith("face-mae-trainer 0."), said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_setting_in_one_message_without_the_slow_imports(command: str) -> None:
    code, said = answer(command, "mistake")
    assert code == 2, said
    assert "no_such_setting" in said
    assert "Traceback" not in said


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


def test_only_what_a_function_needs_of_a_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "tool.py"
    path.write_text(
        '"""Doc."""\nimport no_such_module\nfrom math import no_such_name, pi\nLIMIT = 3\nBROKEN = 1 / 0\n'
        "def limit() -> int:\n    return LIMIT\n"
        "def read(argv: list[str]) -> object:\n    return argv, limit(), pi, __doc__\n"
    )
    assert slice_of(path, "read")(["a"]) == (["a"], 3, math.pi, "Doc.")


def test_a_missing_package_is_one_message_that_says_how_to_install() -> None:
    for command in ("launch/finetune.py", "tools/splits.py"):
        words = [sys.executable, "-S", str(ROOT / command), "--help"]  # without site-packages, as another Python
        done = subprocess.run(words, env={}, capture_output=True, text=True, cwd="/")
        assert done.returncode == 2
        assert "the Python package fire is missing from" in done.stderr
        assert "make install" in done.stderr
        assert "Traceback" not in done.stderr
