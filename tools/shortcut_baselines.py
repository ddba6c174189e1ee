r"""Baselines that do not look at the face: logistic regressions on features of the image processing alone.

Morphing blurs, because it resamples and averages. A detector can learn that alone and look good on a test in which only
the morphs were processed. The demo's report shows these baselines beside every detector:

    radial-spectrum   log power in rings of spatial frequency
    high-pass         energy that a Laplacian leaves, and its spread over the image
    small-pixels      the image at an eighth of its size: who, not how

Usage: python tools/shortcut_baselines.py --data 'train/*.tar' --test_sets 'NAME=a/*.tar;...' --output FILE.json

Examples:
    python tools/shortcut_baselines.py --data 'detect/train/*.tar' --test_sets 'test=detect/test/*.tar' \
        --output baselines.json
    python tools/shortcut_baselines.py --data 'detect/train/*.tar' --test_sets 'test=detect/test/*.tar' \
        --output baselines-64.json --image_size 64 --num_replicates 100
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.config.checks import check_counts, check_types
from trainer.config.command_line import CommandLine
from trainer.data.shards.index import describe_index, list_shards, open_index
from trainer.errors import DataError
from trainer.fault_tolerance.exit_codes import run
from trainer.files import write_atomically
from trainer.startup import loading

if TYPE_CHECKING:
    from trainer.detection.scoring import Truth

_RINGS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user may set."""

    data: str = ""
    """Training shards."""
    test_sets: str = ""
    """Labelled shards, as NAME=SHARDS;NAME=SHARDS."""
    output: str = ""
    """JSON file for launch/evaluate.py --baselines."""
    image_size: int = 96
    """Side of the view [pixels]."""
    index_dir: str | None = None
    """Where shard indices are kept; none keeps them beside the shards."""
    image_member: str | None = None
    """Suffix of the image to read where samples hold several, as left.jpg; none: the only one, or the plain one."""
    num_replicates: int = 1000
    """Replicates of the bootstrap over people."""

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self)


def radial_spectrum(grey_HW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean log power in rings of spatial frequency."""
    height, width = grey_HW.shape
    window_HW = np.hanning(height)[:, None] * np.hanning(width)
    power_HW = np.abs(np.fft.fft2((grey_HW - grey_HW.mean()) * window_HW)) ** 2
    radius_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring_HW = np.minimum((radius_HW / 0.5 * _RINGS).astype(np.int64), _RINGS)
    sums, counts = np.bincount(ring_HW.ravel(), np.log(power_HW + 1e-3).ravel()), np.bincount(ring_HW.ravel())
    return np.asarray(sums / counts)


def high_pass(grey_HW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log energy of the Laplacian over the image and in its 4 x 4 parts."""
    energy_HW = np.square(cv2.Laplacian(grey_HW, cv2.CV_32F))
    parts = cv2.resize(energy_HW, (4, 4), interpolation=cv2.INTER_AREA).ravel()
    return np.log(np.append(parts, energy_HW.mean()).astype(np.float64) + 1e-3)


def small_pixels(grey_HW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the image at an eighth of its size."""
    size = (grey_HW.shape[1] // 8, grey_HW.shape[0] // 8)
    return np.asarray(cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA), dtype=np.float64).ravel()


FEATURES: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float64]]] = {
    "radial-spectrum": radial_spectrum,
    "high-pass": high_pass,
    "small-pixels": small_pixels,
}


CLI = CommandLine(Settings, __doc__, required=("data", "test_sets", "output"))


def main(settings: Settings) -> int:
    """Fit and measure; returns the exit code."""
    with loading("torch and scikit-learn"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        from trainer.detection.error_rates import summarise
        from trainer.detection.evaluation import named_values
        from trainer.detection.figures import det_points

    train_images, train_truth, _ = read_set(settings.data, "--data", settings)
    rows: list[dict[str, Any]] = []
    tests = {
        name: read_set(shards, f"--test_sets {name}", settings)
        for name, shards in named_values(settings.test_sets, "test_sets")
    }
    for feature, describe in FEATURES.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit([describe(image) for image in train_images], train_truth.label_N)
        for name, (images, truth, fingerprint) in tests.items():
            score_N = model.predict_proba([describe(image) for image in images])[:, 1]
            summary = summarise(
                score_N,
                truth.label_N,
                truth.tool_N,
                truth.people_N,
                threshold=0.5,
                num_replicates=settings.num_replicates,
            )
            row = {"name": feature, "test_set": name, "fingerprint": fingerprint, "summary": summary}
            rows.append(row | {"det": det_points(score_N, truth.label_N)})
            print(f"{feature:16} {name:10} AUC {summary['pooled']['auc']['value']:.3f}")
    write_atomically(Path(settings.output), json.dumps(rows, indent=1) + "\n")
    return 0


def read_set(shards: str, setting: str, settings: Settings) -> tuple[list[NDArray[np.float32]], "Truth", str]:
    """Read a set's images as grey values, what is known of them, and the set's fingerprint."""
    from trainer.data.stream import fixed_stream
    from trainer.data.transforms.views import CenterView
    from trainer.detection.scoring import check_labels, truth_of

    folder = Path(settings.index_dir) if settings.index_dir else None
    index = open_index(list_shards(shards, setting=setting), index_dir=folder, image_member=settings.image_member)
    print(f"{setting}: {describe_index(index)}")
    check_labels(index, setting=setting)
    images, kept, failed = [], list[int](), list[str]()
    view = CenterView(size=settings.image_size)
    every = list(range(len(index)))
    for batch in fixed_stream(index, every, view, batch=64, noise_per_sample=1, substitute=False):
        grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in _pixels(batch)]
        for image, number, key, failure in zip(grey, batch.positions, batch.keys, batch.failures, strict=True):
            if failure:
                failed.append(f"{key} ({failure})")
            else:
                images.append(image)
                kept.append(number)
    print(f"{setting}: {len(kept)} of {len(index)} images" + (f"; damaged: {', '.join(failed[:3])}" if failed else ""))
    truth = truth_of(index, np.array(kept, dtype=np.int64))
    if len(set(truth.label_N.tolist())) < 2:
        raise DataError(f"{setting}: no image of one of the two classes can be read: verify with tools/check_shards.py")
    return images, truth, index.fingerprint


def _pixels(batch: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = batch.images_BCHW.permute(0, 2, 3, 1).numpy()
    return pixels


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
