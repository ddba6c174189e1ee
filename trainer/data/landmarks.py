"""Landmarks of faces: from an .npz, or found by dlib where that is installed.

An .npz holds ``names`` and ``points`` (N, L, 2) in pixels, or ``points_64th_px`` in 1/64 pixel.

Shapes: N photographs, L landmarks (x, y) [pixels]; images are HWC uint8 RGB.
"""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError

Points = NDArray[np.float32]

DLIB = "dlib"
"""Value of the setting ``landmarks`` that lets dlib find the points."""

_MODEL = Path("models") / "shape_predictor_68_face_landmarks.dat"


def read_landmarks(path: Path) -> dict[str, Points]:
    """Read points by name [pixels].

    Raises:
        ConfigError: the file is missing, or an array has another shape or no finite values.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [str(name) for name in arrays["names"]]
            in_pixels = "points" in arrays
            points = arrays["points"].astype(np.float32) if in_pixels else arrays["points_64th_px"] / np.float32(64)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"landmarks {path} cannot be read ({error}): name an .npz with names and points") from error
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] < 3 or len(points) != len(names):
        raise ConfigError(f"landmarks {path} hold points of shape {points.shape}, but must be (names, points, 2)")
    twice, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ConfigError(f"landmarks {path} hold {count} entries {twice!r}: keep one of them")
    if not np.isfinite(points).all():
        lost = names[int(np.flatnonzero(~np.isfinite(points).all(axis=(1, 2)))[0])]
        raise ConfigError(f"landmarks {path}: the points of {lost!r} are not all numbers: leave that entry out")
    return dict(zip(names, points.astype(np.float32), strict=True))


def landmarks_of(name: str | None, key: str, path: Path, points: Mapping[str, Points]) -> Points | None:
    """Return a photograph's landmarks by its landmark_name, else its key, else the stem of its path; None for none."""
    candidates = (name or "", key, path.stem)
    return next((points[candidate] for candidate in candidates if candidate in points), None)


@cache
def dlib_finder() -> Callable[[NDArray[np.uint8]], Points | None]:
    """Load dlib's detector of 68 points. The result maps an image to the points of its largest face, or to None.

    Raises:
        ConfigError: dlib or its model is not installed.

    Source: King 2009, JMLR 10; Kazemi and Sullivan 2014, "One millisecond face alignment", CVPR.
    """
    spec = importlib.util.find_spec("face_recognition_models")  # not imported: that needs an old setuptools
    model = Path(next(iter(spec.submodule_search_locations or [""]))) / _MODEL if spec else None
    if importlib.util.find_spec(DLIB) is None or model is None or not model.is_file():
        raise ConfigError("landmarks is dlib, which is not installed: pip install dlib-bin face_recognition_models")
    dlib: Any = importlib.import_module(DLIB)
    detect, predict = dlib.get_frontal_face_detector(), dlib.shape_predictor(str(model))

    def find(image_HWC: NDArray[np.uint8]) -> Points | None:
        faces = detect(image_HWC, 0) or detect(image_HWC, 1)  # enlarged twofold, for faces below 80 pixels
        if not faces:
            return None
        points = predict(image_HWC, max(faces, key=lambda face: face.area())).parts()
        return np.array([(point.x, point.y) for point in points], dtype=np.float32)

    return find
