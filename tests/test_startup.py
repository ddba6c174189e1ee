"""Versions: what is too old is refused before any work, what is newer is noted, and all bounds say the same."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from tests.helpers.runs import ROOT, argv_of, environment
from trainer.errors import ConfigError
from trainer.startup import TESTED, check_version

SETS = sorted(path.stem for path in (ROOT / "constraints").glob("*.txt"))


def release(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", number.partition("+")[0]))


def pins(name: str) -> dict[str, str]:
    """Package, in lower case -> its version in a set."""
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().lower().splitlines()
    return dict(line.split("==") for line in lines)


def required() -> dict[str, str]:
    """Package -> its bounds in setup.py, for example ">=2.6.0"."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    [found] = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    ]
    lines = [re.fullmatch(r"([\w-]+)(.+)", line) for line in ast.literal_eval(found)]
    return {line[1]: line[2] for line in lines if line}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("torch", "2.5.1+cu124"), ("torch", "1.13.1"), ("torchvision", "0.20.1"), ("numpy", "1.26.3")),
        *(("deepspeed", "0.19.0"), ("deepspeed", "0.20.0")),
    ],
)
def test_a_version_that_does_not_work_is_refused_with_one_that_does(name: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {re.escape(found)}, but .*pip install '?{name}[>=]=[\d.]+"):
        check_version(name, found)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("torch", "2.6.0"), ("torch", "2.11.0+cu130"), ("torch", "2.7.0a0+7c8ec84dab.nv25.03"), ("torch", "2.15.1")),
        *(("deepspeed", "0.19.8"), ("deepspeed", "0.19.8+unknown"), ("numpy", "1.26.4"), ("torchvision", "0.21.0a0")),
    ],
)
def test_tested_versions_start_in_silence(name: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_version(name, found)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "found"), [("torch", "2.16.0.dev20261201"), ("deepspeed", "0.19.9"), ("numpy", "3.0")]
)
def test_a_newer_version_is_noted_by_one_rank(
    name: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_version(name, found)
    assert capsys.readouterr().err == f"note: {name} {found} is newer than {TESTED[name][1]}, the newest tested one\n"
    monkeypatch.setenv("RANK", "3")
    check_version(name, found)
    assert capsys.readouterr().err == ""


def test_a_training_with_an_old_torch_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    metadata = tmp_path / "torch-2.5.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')\n")
    flags = {"recipe": "demo", "data": "none/*.tar", "output_dir": str(tmp_path / "run")}
    env = environment() | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *argv_of(flags)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"\nerror: torch is 2\.5\.1, but 2\.6\.0 or newer is needed: .*\n", done.stderr)
    assert not (tmp_path / "run").exists()


def test_the_oldest_set_is_the_lower_bound_of_every_requirement() -> None:
    """So that no bound promises more than what the tests of the oldest set have seen."""
    oldest = pins("oldest")
    for name, bounds in required().items():
        lower = re.match(r"[>=]=([\d.]+)", bounds)
        assert lower, f"{name}{bounds}"
        bound = release(lower[1])
        assert release(oldest[name.lower()])[: len(bound)] == bound, f"{name}{bounds}: {oldest[name.lower()]}"


def test_the_tested_range_is_that_of_the_sets_and_of_setup_py() -> None:
    for name, (oldest, newest) in TESTED.items():
        assert pins("oldest")[name] == oldest
        assert release(pins("pinned")[name]) <= release(pins("newest")[name]), name
        assert release(pins("newest")[name])[: len(release(newest))] == release(newest), name
        assert required()[name] == (f"=={newest}" if name == "deepspeed" else f">={oldest}"), name


@pytest.mark.parametrize("name", SETS)
def test_a_set_names_every_requirement_and_stands_in_the_page(name: str) -> None:
    assert {each.lower() for each in required()} - pins(name).keys() <= {"setuptools"}
    page = (ROOT / "constraints" / "README.md").read_text()
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}.txt`")]
    for package in ("torch", "torchvision", "deepspeed", "numpy"):
        assert pins(name)[package] in row, f"{package} of {name}.txt in constraints/README.md"


@pytest.mark.versions
def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
        importlib.import_module(module.name)
