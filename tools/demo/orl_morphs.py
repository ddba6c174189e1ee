"""The demo's attacks: morphs of the ORL faces for training, validation and test, no person in two of these.

People 1-24 train, 25-32 validate, 33-40 test. Training and validation hold untouched photographs and blends of one
person as bona fides, and whole and spliced morphs as attacks. There are two test sets, of the same people:

    whole    whole morphs against untouched photographs: blending blur alone gives most of them away
    splice   spliced morphs against spliced blends of one person: both were blended, only one shows two people

Four photographs for launch/detect.py lie in FOLDER/photographs: the first whole and the first spliced morph of the test
people, and the first photograph of both parents of the former.

Usage: python tools/demo/orl_morphs.py FOLDER   (writes FOLDER/train.csv, val.csv, test-whole.csv, test-splice.csv)

Examples:
    python tools/demo/orl_morphs.py demo/detect
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tools.demo.orl_faces import IMAGES_A_PERSON, NUM_PEOPLE, TRAIN_PEOPLE, VALIDATION_PEOPLE, Target, find_faces
from tools.make_morphs import Settings, make_morphs
from trainer.config.command_line import CommandLine
from trainer.fault_tolerance.exit_codes import run
from trainer.files import data_file

LANDMARKS = data_file("tools/demo/data/orl_landmarks_468.npz")
_ATTACKS = ("landmark-whole", "landmark-splice")
_COLUMNS = ("path", "key", "label", "identity", "identity_2", "attack", "control", "source")
_PEOPLE = {
    "train": [p for p in TRAIN_PEOPLE if p not in VALIDATION_PEOPLE],
    "val": list(VALIDATION_PEOPLE),
    "test": [p for p in range(1, NUM_PEOPLE + 1) if p not in TRAIN_PEOPLE],
}

Row = dict[str, str]


def write_manifests(output: Path) -> dict[str, int]:
    """Make the morphs and write the manifests; returns their numbers of images."""
    counts = {}
    for split, people in _PEOPLE.items():
        untouched = _bona_fides(people)
        source = output / f"{split}-faces.csv"
        source.parent.mkdir(parents=True, exist_ok=True)
        _write(source, untouched, ("path", "key", "identity", "landmark_name"))
        common = Settings(source=str(source), landmarks=str(LANDMARKS), num_processes=1, progress_bar=False)
        kinds = {"morphs": False, "controls": True}
        morphs, controls = (
            _read(make_morphs(replace(common, output_dir=str(output / f"{split}-{name}"), same_person=same)))
            for name, same in kinds.items()
        )
        if split == "test":
            write_photographs(output / "photographs", untouched, morphs)
            sets = {
                "test-whole": untouched + [row for row in morphs if row["attack"] == "landmark-whole"],
                "test-splice": [row for row in controls if row["control"] == "same-person-splice"]
                + [row for row in morphs if row["attack"] == "landmark-splice"],
            }
        else:
            sets = {split: untouched + controls + morphs}
        for name, rows in sets.items():
            _write(output / f"{name}.csv", rows, _COLUMNS)
            counts[name] = len(rows)
    return counts


def write_photographs(folder: Path, bona_fides: Sequence[Row], morphs: Sequence[Row]) -> None:
    """Write the first morph of each kind, and the first photograph of both parents of the first one, as PNG.

    They are the first, not the best: nobody has chosen them by their scores.
    """
    firsts = {attack: next(row for row in morphs if row["attack"] == attack) for attack in _ATTACKS}
    parents = [firsts[_ATTACKS[0]][name] for name in ("identity", "identity_2")]
    chosen = {f"bona-fide-{p}": next(row for row in bona_fides if row["identity"] == p) for p in parents}
    for attack, row in firsts.items():
        chosen[f"{attack.removeprefix('landmark-')}-morph-{row['identity']}-{row['identity_2']}"] = row
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in chosen.items():
        with Image.open(row["path"]) as image:
            image.convert("RGB").save(folder / f"{name}.png")


def _bona_fides(people: list[int]) -> list[Row]:
    faces = find_faces()
    return [
        {
            "path": str(faces / f"s{person}" / f"{image}.pgm"),
            "key": f"orl/s{person:02d}_{image:02d}",
            "label": "0",
            "identity": str(person),
            "landmark_name": f"s{person}_{image}",
        }
        for person in people
        for image in range(1, IMAGES_A_PERSON + 1)
    ]


def _read(manifest: Path) -> list[Row]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        # Batches are balanced by the source: each kind of attack and of bona fide gets an equal part.
        writer.writerows({"source": row.get("attack") or row.get("control") or "photograph"} | row for row in rows)


CLI = CommandLine(Target, __doc__, required=("folder",), positional="folder")


def main(settings: Target) -> int:
    """Write the manifests into the folder named on the command line."""
    print(", ".join(f"{name}: {count} images" for name, count in write_manifests(Path(settings.folder)).items()))
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
