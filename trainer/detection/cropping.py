"""Whether images are cropped to faces: the same in training, validation and tests of a detector.

Shards tell how their images were cropped (`trainer.data.writing.face_crops`), a detector records it with its
preprocessing. Whole photographs are cropped as the detector was trained when they are scored.
"""

from typing import Any

import numpy as np

from trainer.data.shards.index import NO_GROUP, ShardIndex
from trainer.data.shards.members import FACE_CROP
from trainer.data.transforms.faces import FaceCropping, check_installed
from trainer.errors import ConfigError, DataError


def face_crop_of(index: ShardIndex, *, setting: str) -> str:
    """Return how the images of a set were cropped to faces, as text; empty for whole photographs.

    Args:
        index: of the set.
        setting: the flag that named it, for messages.

    Raises:
        DataError: not all were cropped in the same way.
    """
    if FACE_CROP not in index.group_fields:
        return ""
    values, codes_N = index.groups(FACE_CROP)
    used = np.unique(codes_N).tolist()
    if len(used) > 1:
        shown = " and ".join(_shown("" if code == NO_GROUP else values[code]) for code in used[:2])
        raise DataError(
            f"{setting} mixes {shown}: write all its shards with the same face_crop of tools/make_shards.py"
        )
    return str(values[used[0]])


def check_same_crop(data: ShardIndex, val_data: ShardIndex) -> None:
    """Refuse validation images that were cropped otherwise than those of training.

    Raises:
        DataError: they were, or a set mixes several ways.
    """
    train, val = face_crop_of(data, setting="--data"), face_crop_of(val_data, setting="--val_data")
    if train != val:
        raise DataError(
            f"--data holds {_shown(train)}, but --val_data {_shown(val)}: write both with the same face_crop of "
            "tools/make_shards.py"
        )


def described_crop(index: ShardIndex, *, setting: str) -> dict[str, str]:
    """Return the part of a detector's preprocessing that says how its training images were cropped to faces."""
    crop = face_crop_of(index, setting=setting)
    return {FACE_CROP: crop} if crop else {}


def recorded_cropping(preprocessing: dict[str, Any]) -> FaceCropping | None:
    """Return how a detector's photographs are cropped before they are scored; None for a detector of whole ones.

    Raises:
        ConfigError: this version crops otherwise, or the networks are not installed.
    """
    recorded = preprocessing.get(FACE_CROP, "")
    if not recorded:
        return None
    cropping = FaceCropping.parse(recorded)
    check_installed()
    return cropping


def cropping_for(preprocessing: dict[str, Any], index: ShardIndex, *, name: str, setting: str) -> FaceCropping | None:
    """Return how the images of a set are still to be cropped for a detector; None if they are as it was trained.

    Args:
        preprocessing: what the detector has recorded.
        index: of the set.
        name: of the detector, for messages.
        setting: the flag that named the set, for messages.

    Raises:
        ConfigError: they were cropped otherwise, or cannot be cropped here.
        DataError: the set mixes several ways.
    """
    recorded, found = preprocessing.get(FACE_CROP, ""), face_crop_of(index, setting=setting)
    if recorded == found:
        return None
    if found:
        raise ConfigError(
            f"{name} was trained on {_shown(recorded)}, but {setting} holds {_shown(found)}: scores would mean "
            "nothing; name shards of the whole photographs"
            + (", which are then cropped in the same way" if recorded else "")
        )
    return recorded_cropping(preprocessing)


def _shown(face_crop: str) -> str:
    return f"faces cropped with {face_crop!r}" if face_crop else "whole photographs"
