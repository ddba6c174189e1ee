"""Landmarks of faces in an .npz: ``names`` and ``points`` (N, L, 2) in pixels, or ``points_64th_px`` in 1/64 pixel.

Shapes: N photographs, L landmarks (x, y) [pixels].
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError

Points = NDArray[np.float32]


def read_landmarks(path: Path) -> dict[str, Points]:
    """Read points by name [pixels].

    Raises:
        ConfigError: the file is missing or holds something else.
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
    return dict(zip(names, points.astype(np.float32), strict=True))


def landmarks_of(name: str | None, key: str, path: Path, points: Mapping[str, Points]) -> Points | None:
    """Find a photograph's landmarks by its landmark_name, else its key, else the stem of its path."""
    candidates = (name or "", key, path.stem)
    return next((points[candidate] for candidate in candidates if candidate in points), None)
