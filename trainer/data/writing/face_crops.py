"""Samples of cropped faces: the stored image, and what its json says of the face.

The json of such a sample gets these fields beside its own:

    face_crop    how the face was cropped, as text; part of the preprocessing of a detector
    crop_box     left, top, right, bottom of the crop in the upright photograph [pixels]
    face_box     left, top, right, bottom of the landmarks in the stored image [pixels]
    landmarks    468 points [x, y] in the stored image [pixels], which self-morphs and make_morphs read
    faces        number of faces in the photograph; the largest one is cropped
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.data.shards.members import FACE_CROP, LANDMARKS
from trainer.data.transforms.faces import REFUSALS, check_installed
from trainer.data.writing.image_files import Storing, as_trainable, rewritten
from trainer.data.writing.source_images import Entry
from trainer.errors import ConfigError

JSON_BYTES = 12 << 10
"""Bound of the fields of a face [bytes]: 468 points take up to 9 kB."""


def cropped_image(payload: bytes, how: Storing) -> tuple[str, bytes, dict[str, Any]]:
    """Return the suffix and the bytes of the cropped image, and its fields.

    Raises:
        SampleError: the image is damaged or too large, or has no usable face.
    """
    assert how.crop is not None
    crop = how.crop.of_payload(as_trainable(payload))
    suffix, stored, side = rewritten(crop.image_HWC, "png", how)
    scale = side / crop.image_HWC.shape[0]
    landmarks_L2 = np.round(crop.landmarks_L2.astype(np.float64) * scale, 1)
    fields = {
        "crop_box": list(crop.box),
        "face_box": [*landmarks_L2.min(axis=0).tolist(), *landmarks_L2.max(axis=0).tolist()],
        "faces": crop.num_faces,
        FACE_CROP: how.crop_text,
        LANDMARKS: landmarks_L2.tolist(),
    }
    return suffix, stored, fields


def with_crop(entries: list[Entry], how: Storing) -> list[Entry]:
    """Note in every entry that its face will be cropped; without cropping the entries stay as they are.

    Raises:
        ConfigError: the networks are not installed, or an image has been cropped before.
    """
    if how.crop is None:
        return entries
    check_installed()
    again = next((entry for entry in entries if entry.metadata.get(FACE_CROP)), None)
    if again is not None:
        raise ConfigError(
            f"face_crop is {how.crop.margin:g}, but {again.name} is cropped already ({again.metadata[FACE_CROP]}): "
            "name the whole photographs as source, or leave face_crop away"
        )
    return [replace(entry, metadata=entry.metadata | {FACE_CROP: how.crop_text}) for entry in entries]


def with_fields(json_text: bytes | None, fields: dict[str, Any]) -> bytes:
    """Return a sample's json with the fields of its face; a json that is none is replaced."""
    try:
        values = json.loads(json_text or b"{}")
    except (ValueError, RecursionError):
        values = None
    return json.dumps(
        (values if isinstance(values, dict) else {}) | fields, sort_keys=True, ensure_ascii=False
    ).encode()


def is_refusal(reason: str) -> bool:
    """Whether an image was left out because it has no usable face, by the text of its `SampleError`."""
    return reason.partition(":")[0] in REFUSALS


def count_refusals(reasons: Iterable[str]) -> dict[str, int]:
    """Count the images without a usable face by reason."""
    return dict(Counter(reason.partition(":")[0] for reason in reasons if is_refusal(reason)).most_common())
