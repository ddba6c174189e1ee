"""The door: sdist and wheel hold what they must, and an installed wheel trains, tunes, evaluates and scores anywhere.

The clean environment sees the libraries of the test environment, but not this repository: a path in a .pth file is put
on sys.path, and the .pth files there, that of the editable installation among them, are not read. A machine without a
network, which has only a torch of its own, is imitated in the same way.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, argv_of, free_port, metrics
from tests.helpers.shards import jpeg, members_of, write_tar
from trainer import __version__

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

DEEPSPEED = "#!{python}\nfrom deepspeed.launcher.runner import main\nmain()\n"
"""What pip writes as bin/deepspeed."""
STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"\n',
    "scontrol": "echo localhost\n",
    "show": 'echo "python $*"\n',
}
"""A cluster of one task, and a Python that shows what it would run."""
TINY = {"image_size": "32", "global_batch": "8", "micro_batch": "4", "num_workers": "1", "progress_bar": "false"}
TINY |= {"max_steps": "2", "warmup_epochs": "0", "data": "shards/train/*.tar", "val_data": "shards/val/*.tar"}
MODEL = {"encoder_depth": "1", "patch_size": "8", "decoder_width": "32", "decoder_depth": "1", "oversubscribe": "true"}


def run(*words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end; returns its output."""
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", str(into), str(source), cwd=into)
    return next(into.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the repository: building leaves folders beside the source."""
    folder = tmp_path_factory.mktemp("build")
    source, into = folder / "source", folder / "wheel"
    into.mkdir()
    litter = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("trainer", "launch", "tools", "tests", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=litter)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return build_wheel(source, into)


def contents(wheel: Path) -> dict[str, int]:
    """Name of each file -> its checksum."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def test_the_wheel_holds_the_package_trainer_and_nothing_else(wheel: Path) -> None:
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.py")}
    for folder in ("launch", "tools"):
        expected |= {f"trainer/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    expected |= {f"trainer/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    expected |= {f"trainer/launch/slurm/{path.name}" for path in (ROOT / "launch" / "slurm").glob("*.sh")}
    expected |= {f"trainer/tools/demo/data/{name}" for name in ("README.md", "orl_landmarks_468.npz")}
    assert names == expected | {"trainer/py.typed", "trainer/detection/report.html.jinja"}
    assert wheel.name == f"face_mae_trainer-{__version__}-py3-none-any.whl"


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source, into = wheel.parent.parent / "source", tmp_path / "wheel"
    into.mkdir()
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    again = build_wheel(next(tmp_path.glob("*.tar.gz")), into)
    assert contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An empty folder, and the variables of a shell in which a clean environment with the wheel is activated."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    binaries, python = folder / "venv" / "bin", folder / "venv" / "bin" / "python"
    own = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    libraries = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (own / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    run(*pip, str(wheel), cwd=folder)
    scripts = {"deepspeed": DEEPSPEED.format(python=python)}
    scripts |= {name: f"#!/usr/bin/env bash\n{text}" for name, text in STUBS.items()}
    for name, text in scripts.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    env = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(folder)}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    (folder / "work").mkdir()
    return folder / "work", env


def test_the_installed_package_is_that_of_the_wheel(place: tuple[Path, dict[str, str]]) -> None:
    folder, env = place
    found = run(
        "python", "-c",
        "import trainer, importlib.util as u; print(trainer.__file__, u.find_spec('launch'), u.find_spec('tools'))",
        cwd=folder, env=env,
    )  # fmt: skip
    file, *others = found.split()
    assert Path(file).is_relative_to(folder.parent / "venv")
    assert others == ["None", "None"]
    for command in ("face-mae-pretrain", "face-mae-make-shards"):
        assert f"face-mae-trainer {__version__}, " in run(command, "--version", cwd=folder, env=env)
    doctor = str(Path(file).parent / "launch" / "doctor.py")  # as `--hostfile` starts it on other hosts
    for words in (["-m", "trainer.launch.pretrain"], [doctor]):
        assert f"face-mae-trainer {__version__}, " in run("python", *words, "--version", cwd=folder, env=env)


def test_an_installed_wheel_packs_trains_tunes_evaluates_and_scores(place: tuple[Path, dict[str, str]]) -> None:
    folder, env = place
    splits = ("train", "val", "test")
    for number in range(48):
        split, label = splits[number % 3], ("bonafide", "morph")[number // 3 % 2]
        path = folder / "photos" / split / label / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    for split in splits:
        pack = {"source": f"photos/{split}", "output_dir": f"shards/{split}", "folder_labels": "true"}
        run("face-mae-make-shards", *argv_of(pack), cwd=folder, env=env)

    script = shutil.which("face-mae-pretrain", path=env["PATH"]) or ""
    launcher = ["deepspeed", "--master_port", str(free_port()), "--num_gpus"]
    in_wheel = {"ds_config": "ds_configs/cpu_fp32.json"}  # no such file lies in this folder
    flags = TINY | MODEL | in_wheel | {"recipe": "demo", "output_dir": "run"}
    run(*launcher, "2", script, *argv_of(flags), cwd=folder, env=env)
    assert [line["step"] for line in metrics(folder / "run") if "loss" in line][-1] == 2

    flags = TINY | {"recipe": "detector_demo", "init": "run", "freeze_backbone": "true", "output_dir": "detector"}
    flags |= {"mix_group": "4", "balance_by": "label"}  # whole groups in the micro batch; these shards name no source
    run(*launcher, "1", "--module", "trainer.launch.finetune", *argv_of(flags), cwd=folder, env=env)
    assert (folder / "detector" / "detector" / "detector.json").exists()

    flags = {"models": "a=detector", "test_sets": "test=shards/test/*.tar", "output_dir": "results"}
    run("face-mae-evaluate", *argv_of(flags), cwd=folder, env=env)
    [scores] = (folder / "results").glob("*_scores.csv")
    with scores.open() as file:
        assert len(list(csv.DictReader(file))) == 16
    [figures] = (folder / "results").glob("*_eval.json")
    assert json.loads(figures.read_text())
    assert len(list((folder / "results").glob("*_report.html"))) == 1

    flags = {"model": "detector", "images": "photos/test/morph", "output": "scores.csv"}
    run("face-mae-detect", *argv_of(flags), cwd=folder, env=env)
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(f"photos/test/morph/{number}.jpg" for number in range(5, 48, 6))
    assert all(0 <= float(row["score"]) <= 1 for row in rows)


def test_a_job_of_an_installed_wheel_runs_its_modules_in_the_folder_of_the_user(
    place: tuple[Path, dict[str, str]],
) -> None:
    folder, env = place
    words = ["--recipe", "demo", "--data", "shards", "--output_dir", "runs/a", "--micro_batch", "4"]
    job = run("face-mae-submit", "--nodes", "1", "--gpus", "1", *words, "--dry_run", cwd=folder, env=env)
    task = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    said = run("bash", "-c", job, cwd=folder.parent, env=env | task | {"TRAINER_PYTHON": "show"})
    assert "python -P -m trainer.launch.doctor --script pretrain --recipe demo" in said
    assert "python -P -m trainer.launch.pretrain --recipe demo" in said
    assert f"export TRAINER_HOME={folder}\n" in job
    assert "/venv/bin/python" in job


OWN_TORCH = re.compile(r"(torch|torchvision|torchgen|functorch|triton|nvidia|cuda|numpy)([-._]|$)")
"""What a machine has of its own, among the names in a folder of packages."""


@pytest.mark.skipif("TRAINER_WHEELS" not in os.environ, reason="downloads 200 MB: set TRAINER_WHEELS=1")
def test_the_folder_of_make_wheels_installs_without_an_index_beside_a_torch_that_stays_and_trains(
    tmp_path: Path,
) -> None:
    wheels, machine = tmp_path / "wheels", tmp_path / "machine"
    its_python = ".".join(map(str, sys.version_info[:2]))
    make = ["make", "-o", f"{sys.prefix}/.installed", f"VENV={sys.prefix}", f"WHEELS={wheels}", f"FOR={its_python}"]
    run(*make, "wheels", cwd=ROOT)
    names = {path.name.partition("-")[0] for path in wheels.glob("*.whl")}
    assert {"face_mae_trainer", "deepspeed", "timm"} <= names
    assert not {name for name in names if re.match("torch(vision)?$|triton|nvidia|cuda", name)}
    assert len(list(wheels.glob("deepspeed-*-py3-none-any.whl"))) == 1

    for library in {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}:
        for path in filter(lambda path: OWN_TORCH.match(path.name), library.iterdir()):
            machine.mkdir(exist_ok=True)
            (machine / path.name).symlink_to(path)
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    (own / "machine.pth").write_text(f"{machine}\n")
    shell = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    shell |= {"PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}", "PIP_CONFIG_FILE": os.devnull}
    shell |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--find-links", "wheels"]
    run(*pip, "face-mae-trainer", cwd=tmp_path, env=shell)
    assert not [path.name for path in own.iterdir() if OWN_TORCH.match(path.name)]

    write_tar(tmp_path / "shards" / "train.tar", members_of(range(16)))
    flags = TINY | MODEL | {"recipe": "demo", "data": "shards/train.tar", "output_dir": "run"}
    del flags["val_data"]
    launcher = [str(tmp_path / "env" / "bin" / "deepspeed"), "--master_port", str(free_port()), "--num_gpus", "2"]
    run(*launcher, "--module", "trainer.launch.pretrain", *argv_of(flags), cwd=tmp_path, env=shell)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line][-1] == 2
