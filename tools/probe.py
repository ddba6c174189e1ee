r"""Probe saved features: what do they tell apart, by kNN, ridge and logistic regression, beside other features?

Features are those of launch/embed.py. Give several sets of the same images, such as those of a pre-trained encoder, of
random weights and of raw pixels: all are judged alike, and differences from the first set have paired intervals.

    --field identity    kNN judges each image by all others, the regressions by folds that hold out images of each
                        person; pairs of images are verified: EER, and TAR at FAR 1 % and 0.1 %
    --field label ...   cross-validation over people: nobody is both among the fitted and the tested images
    --test_features     fit on --features, test on these instead

Accuracies are means over the classes. Intervals are 95 % of a bootstrap over people (over images, if nobody is named)
of the tested images. Writes the figures as JSON, and the table as Markdown beside it.

Usage: python tools/probe.py --features 'NAME=FOLDER;NAME=FOLDER' --field identity [--output FILE.json]

Examples:
    python tools/probe.py --features 'base=features/base;random=features/random;pixels=features/pixels' \
        --field identity --output probe.json
    python tools/probe.py --features features/detector --field label --feature mean
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.errors import ConfigError
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

if TYPE_CHECKING:
    from trainer.features import Features


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    features: str = ""
    """Folders of launch/embed.py, as NAME=FOLDER;NAME=FOLDER; all of the same images. One folder needs no name."""
    field: Literal["label", "identity", "source", "attack"] = "label"
    """What the probes tell apart: the label, or a field of the images' json."""
    test_features: str = ""
    """Features of other images to test on, by the same names; empty tests --features by cross-validation."""
    feature: str = ""
    """Which feature of a set, such as mean, cls or block_5_mean; empty takes the first of each set."""
    k: int = 20
    """Neighbours that vote; near ones count more."""
    num_replicates: int = 1000
    """Replicates of the bootstrap, for the intervals; 0 for none."""
    seed: int = 0
    """Of the bootstrap."""
    output: str = "probe.json"
    """JSON file of the figures; the table goes beside it, as .md."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)
        if Path(self.output).suffix != ".json" or Path(self.output).is_dir():
            raise ConfigError(f"output is {self.output!r}, but must be a file that ends in .json: name one")


CLI = CommandLine(Settings, __doc__, required=("features",))


def main(settings: Settings) -> int:
    """Measure, print and write; returns the exit code."""
    with loading("torch and scikit-learn"):
        import numpy as np

        from trainer.features import comparison
        from trainer.files import write_together
    sets = read_sets(settings.features, "features", settings.feature)
    values = {name: found.values_ND for name, found in sets.items()}
    first = next(iter(sets.values()))
    if settings.test_features:
        tests = read_sets(settings.test_features, "test_features", settings.feature)
        if tests.keys() != sets.keys():
            raise ConfigError(
                f"test_features names {', '.join(tests)}, but features names {', '.join(sets)}: use the same names"
            )
        for name, test in tests.items():
            if test.values_ND.shape[1] != values[name].shape[1]:
                raise ConfigError(f"features and test_features of {name} have other widths: take the same model")
            values[name] = np.concatenate([values[name], test.values_ND])
        task = comparison.make_test_task(first, next(iter(tests.values())), settings.field)
    else:
        task = comparison.make_task(first, settings.field)
    weights_RN = comparison.weights_of(task, num_replicates=settings.num_replicates, seed=settings.seed)
    measured = {name: comparison.measure_set(value, task, weights_RN, k=settings.k) for name, value in values.items()}
    found = comparison.describe(measured, task)
    about = {"field": settings.field, "k": settings.k, "num_replicates": settings.num_replicates} | found
    about["models"] = {name: one.about["model"] for name, one in sets.items()}
    lines = headline(settings, found)
    print("\n".join([*lines, "", *comparison.table(found), ""]))
    text = "\n".join([*lines, "", *comparison.table(found, markdown=True)]) + "\n"
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_together({output: json.dumps(about, indent=1, allow_nan=False) + "\n", output.with_suffix(".md"): text})
    print(f"  figures  {output}\n  table    {output.with_suffix('.md')}")
    return 0


def read_sets(text: str, setting: str, feature: str) -> dict[str, "Features"]:
    """Read NAME=FOLDER;NAME=FOLDER, or one folder, which is named after itself.

    Raises:
        ConfigError: a part has no name, there are no such features, or the sets are of other images.
    """
    from trainer.detection.evaluation import named_values
    from trainer.features import read_features
    from trainer.features.comparison import check_same_images

    named = named_values(text, setting) if "=" in text else [(Path(text).name, text)]
    sets = {name: read_features(folder, feature) for name, folder in named}
    check_same_images(sets, setting=setting)
    return sets


def headline(settings: Settings, found: dict[str, Any]) -> list[str]:
    """Say what was probed, how, and what was left out."""
    people = f" of {found['num_people']} people" if found["num_people"] else ""
    how = "fitted on others" if settings.test_features else "cross-validated"
    lines = [
        f"{settings.field}: {len(found['classes'])} classes, chance {100 * found['chance']:.1f} %; "
        f"{found['num_tested']} of {found['num_images']} images{people} tested, {how}; kNN with k = {settings.k}"
    ]
    if settings.num_replicates:
        drawn = f"{settings.num_replicates} replicates of a bootstrap over {found['resampled']}"
        lines.append(f"in brackets: 95 % of {drawn}")
    return lines + [f"note: {note}" for note in found["notes"]]


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
