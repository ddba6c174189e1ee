"""Views of images: bytes -> the S x S pixels that a model sees, written straight into the batch.

The random view of pre-training is a function of (seed, position). Its crop is chosen from the file's header, before any
pixel is decoded, so a JPEG whose crop will be shrunk anyway is decoded at a half, a quarter or an eighth of its size.

Shapes: H, W input size, S output size, N positions, R views of one image, K draws; images are HWC uint8 RGB.
"""

import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.transforms import selfmorph
from trainer.data.transforms.decode import Scratch, decode_image, upright_jpeg_size
from trainer.data.transforms.faces import Box, FaceCropping, crop_face
from trainer.data.transforms.resize import Resize, at_least, resize_into, resized
from trainer.seeds import Purpose, uniforms

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version at import

import albumentations as A
import cv2

cv2.setNumThreads(0)  # one thread a process: the workers are the parallelism

_CROP_ATTEMPTS = 10
_SMALLEST_RATIO, _LARGEST_RATIO = 3 / 4, 4 / 3


class Distortion(Protocol):
    """A change of an image that keeps its size and depends on the image and its draws only."""

    @property
    def num_draws(self) -> int:
        """Uniform numbers for each image."""

    def __call__(self, image_HWC: NDArray[np.uint8], draws_K: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the changed image; the input is not modified."""


class Photo(NamedTuple):
    """One sample as stored."""

    payload: bytes
    label: int = -1
    landmarks_L2: NDArray[np.float32] | None = None
    """Points (x, y) in the image [pixels]."""


class Seen(NamedTuple):
    """What a view tells of a photo beside its pixels."""

    labels: list[int]
    """The class of each view."""
    face_box: Box | None = None
    """Of the face that the view was cropped to, in the upright photo [pixels]."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """How images are decoded and scaled; the same in training, validation and tests of a model."""

    resize: Resize = "antialias"
    """"former" scales as release 0.1 did; "native" does not scale (detectors only)."""
    srgb: bool = False
    """Convert images with another colour profile to sRGB; otherwise pixel values stay as stored."""


AS_STORED = Pixels()


class View(Protocol):
    """Turns the bytes of an image into the pixels that a model sees."""

    size: int
    """Side S of the view [pixels]."""

    def draw(self, position_N: ArrayLike) -> NDArray[np.float32]:
        """Return the random numbers (N, K) of N positions."""

    def wants_landmarks(self, label: int, draws_K: NDArray[np.float32]) -> bool:
        """Whether the view needs the sample's landmarks."""

    def __call__(self, photo: Photo, draws_RK: NDArray[np.float32], out_RSSC: NDArray[np.uint8]) -> Seen:
        """Decode one image once and write R views of it.

        Raises:
            SampleError: the bytes are no usable image.
        """


class PretrainView:
    """Random resized crop and mirror, as in the published MAE (He et al. 2021, arXiv 2111.06377, appendix A.1).

    Crops are drawn as by torchvision's RandomResizedCrop: ten attempts at an area and a ratio, then the largest centre
    crop. `trainer.data.transforms.resize` scales them.

    Args:
        size: side of the view [pixels].
        crop_scale: smallest and largest share of the image's area.
        flip_probability: chance of a mirror.
        seed: run seed.
        fast: decode with libjpeg-turbo's faster transforms, and reduced if all crops are at least twice the view.
            Never for detection: artefacts are the signal.
        pixels: how images are decoded and scaled; "former" is cubic without antialiasing.
    """

    def __init__(
        self,
        *,
        size: int,
        crop_scale: tuple[float, float],
        flip_probability: float,
        seed: int,
        fast: bool,
        pixels: Pixels = AS_STORED,
    ) -> None:
        self.size, self._pixels = size, pixels
        self._scratch = Scratch()
        self._crop_scale, self._flip_probability, self._seed, self._fast = crop_scale, flip_probability, seed, fast

    def wants_landmarks(self, label: int, draws_K: NDArray[np.float32]) -> bool:
        """Never."""
        return False

    def draw(self, position_N: ArrayLike) -> NDArray[np.float32]:
        """Return areas, ratios, top, left and mirror, in [0, 1)."""
        return uniforms(self._seed, Purpose.AUGMENT, position_N, 2 * _CROP_ATTEMPTS + 3)

    def __call__(self, photo: Photo, draws_RK: NDArray[np.float32], out_RSSC: NDArray[np.uint8]) -> Seen:
        """Decode one image once and write crops of it."""
        payload = photo.payload
        size = upright_jpeg_size(payload) if self._fast else None
        shrink, image_HWC = 1, None
        if size is None:
            image_HWC = decode_image(payload, fast=self._fast, scratch=self._scratch, srgb=self._pixels.srgb)
            size = image_HWC.shape[0], image_HWC.shape[1]
        # The size in the header is enough to choose the crops, and the smallest crop decides how far to reduce.
        boxes = [crop_box(*size, draws, scale=self._crop_scale) for draws in draws_RK.tolist()]
        if image_HWC is None:
            shrink = self._shrink(min(min(height, width) for _, _, height, width in boxes))
            image_HWC = decode_image(payload, shrink=shrink, fast=True, scratch=self._scratch, srgb=self._pixels.srgb)
        for (top, left, height, width), draws_K, out_SSC in zip(boxes, draws_RK, out_RSSC, strict=True):
            # The crop in reduced pixels: rows 100 to 299 of the image are rows 25 to 74 at a quarter of its size.
            rows = slice(top // shrink, (top + height) // shrink)
            columns = slice(left // shrink, (left + width) // shrink)
            crop_HWC = image_HWC[rows, columns]
            if self._pixels.resize == "former":
                cv2.resize(crop_HWC, (self.size, self.size), dst=out_SSC, interpolation=cv2.INTER_CUBIC)
            else:
                resize_into(crop_HWC, out_SSC)
            if draws_K[-1] < self._flip_probability:
                cv2.flip(out_SSC, 1, dst=out_SSC)
        return Seen([photo.label] * len(boxes))

    def _shrink(self, shorter_side: int) -> int:
        """Return the factor by which a crop may be decoded smaller without being enlarged afterwards.

        Example: a view of 224 pixels needs 225 decoded ones. A crop of 1800 pixels allows 8, 1000: 4, 450: 2, 449: 1.
        """
        return next((shrink for shrink in (8, 4, 2) if shorter_side >= shrink * (self.size + 1)), 1)


def crop_box(
    height: int, width: int, draws: Sequence[float], *, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Choose (top, left, height, width) of a crop [pixels] from the draws of one position.

    Args:
        height: of the image [pixels].
        width: of the image [pixels].
        draws: area and ratio of ten attempts, then top, left and mirror, in [0, 1).
        scale: smallest and largest share of the image's area.
    """
    low, high = scale
    for attempt in range(_CROP_ATTEMPTS):
        area = height * width * (low + (high - low) * draws[2 * attempt])
        # The ratio width / height is uniform in the logarithm, and height * width is the area.
        ratio = _SMALLEST_RATIO * (_LARGEST_RATIO / _SMALLEST_RATIO) ** draws[2 * attempt + 1]
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = int(draws[-3] * (height - crop_height + 1)), int(draws[-2] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # No attempt fits inside the image: the largest centre crop with a ratio from 3/4 to 4/3.
    crop_height = min(height, round(width / _SMALLEST_RATIO))
    crop_width = min(width, round(height * _LARGEST_RATIO))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


class DetectorView:
    """A detector's view in training: full decoding, perhaps a self-morph, distortions, a crop, a mirror.

    Args:
        size: side of the view [pixels].
        crop_scale: smallest and largest share of the image's area.
        flip_probability: chance of a mirror.
        seed: run seed.
        before: distortions of the whole image, such as `passport.PassportChain`.
        after: distortions of the view, such as RandAugment.
        self_morph_share: share of the bona fides (label 0) that become attacks (label 1) before anything else.
        pixels: how images are decoded and scaled; "former" is area interpolation if both sides shrink, otherwise cubic
            without antialiasing.
    """

    def __init__(
        self,
        *,
        size: int,
        crop_scale: tuple[float, float],
        flip_probability: float,
        seed: int,
        before: Sequence[Distortion] = (),
        after: Sequence[Distortion] = (),
        self_morph_share: float = 0.0,
        pixels: Pixels = AS_STORED,
    ) -> None:
        self.size, self._pixels = size, pixels
        self._crop_scale, self._flip_probability, self._seed = crop_scale, flip_probability, seed
        self._before, self._after, self._self_morph_share = before, after, self_morph_share
        # Number of draws of each stage. `uniforms` gives the same first numbers for any count, so another distortion
        # changes neither the crop nor the stages before it.
        self._stages = [2 * _CROP_ATTEMPTS + 3, 1 + selfmorph.NUM_DRAWS, *(d.num_draws for d in (*before, *after))]

    def draw(self, position_N: ArrayLike) -> NDArray[np.float32]:
        """Return the draws of crop and mirror, of the self-morph, and of each distortion, in [0, 1)."""
        return uniforms(self._seed, Purpose.AUGMENT, position_N, sum(self._stages))

    def wants_landmarks(self, label: int, draws_K: NDArray[np.float32]) -> bool:
        """Whether these draws make a self-morph of the sample."""
        return self._morphs(label, self._parts(draws_K)[1])

    def __call__(self, photo: Photo, draws_RK: NDArray[np.float32], out_RSSC: NDArray[np.uint8]) -> Seen:
        """Decode one image once and write views of it."""
        image_HWC = decode_image(photo.payload, srgb=self._pixels.srgb)
        return Seen([self._write(image_HWC, photo, *one) for one in zip(draws_RK, out_RSSC, strict=True)])

    def _write(
        self,
        image_HWC: NDArray[np.uint8],
        photo: Photo,
        draws_K: NDArray[np.float32],
        out_SSC: NDArray[np.uint8],
    ) -> int:
        crop, morph, *distort = self._parts(draws_K)
        label = photo.label
        if self._morphs(label, morph):
            image_HWC, label = selfmorph.self_morph(image_HWC, morph[1:], photo.landmarks_L2), 1
        for distortion, mine in zip(self._before, distort, strict=False):
            image_HWC = distortion(image_HWC, mine)
        if self._pixels.resize == "native":
            image_HWC = at_least(image_HWC, self.size)
            height = width = self.size
            top, left = (int(u * (side - self.size + 1)) for u, side in zip(crop[-3:-1], image_HWC.shape, strict=False))
        else:
            box = crop_box(image_HWC.shape[0], image_HWC.shape[1], crop.tolist(), scale=self._crop_scale)
            top, left, height, width = box
        view_HWC = image_HWC[top : top + height, left : left + width]
        scaled_SSC = self._scaled(view_HWC)
        mirrored = crop[-1] < self._flip_probability
        view_SSC = np.asarray(cv2.flip(scaled_SSC, 1) if mirrored else scaled_SSC, dtype=np.uint8)
        for distortion, mine in zip(self._after, distort[len(self._before) :], strict=True):
            view_SSC = distortion(view_SSC, mine)
        out_SSC[...] = view_SSC
        return label

    def _scaled(self, view_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._pixels.resize == "native":
            return view_HWC
        if self._pixels.resize == "antialias":
            return resized(view_HWC, self.size, self.size)
        interpolation = cv2.INTER_AREA if min(view_HWC.shape[:2]) > self.size else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(view_HWC, (self.size, self.size), interpolation=interpolation), dtype=np.uint8)

    def _parts(self, draws_K: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return np.split(draws_K, np.cumsum(self._stages)[:-1])

    def _morphs(self, label: int, draws_K: NDArray[np.float32]) -> bool:
        return label == 0 and bool(draws_K[0] < self._self_morph_share)


class CenterView:
    """Resize the shorter side and cut the centre: the same view of an image every time, fully decoded.

    Args:
        size: side of the view [pixels].
        pixels: how images are decoded and scaled.
        crop: crop each photograph to its face first; None for whole ones, and for shards that are cropped already.
    """

    descriptions: typing.ClassVar[dict[Resize, str]] = {
        "antialias": "shorter side to the size, antialiased bicubic as Pillow's, then the centre; RGB; decoded in full",
        "native": "the centre at the image's own resolution; a smaller image is enlarged first, antialiased bicubic as "
        "Pillow's; RGB; decoded in full",
        "former": "shorter side to the size with area interpolation, then the centre; RGB; decoded in full",
    }
    """What a detector records of its view of test images."""

    def __init__(self, *, size: int, pixels: Pixels = AS_STORED, crop: FaceCropping | None = None) -> None:
        self.size, self.crop, self._native = size, crop, pixels.resize == "native"
        self.srgb = pixels.srgb or crop is not None  # crops are stored in sRGB
        self._former: A.Compose | None = None
        if pixels.resize == "former":
            scale = A.SmallestMaxSize(max_size=size, interpolation=cv2.INTER_AREA)
            self._former = A.Compose([scale, A.CenterCrop(height=size, width=size)], seed=0)

    def draw(self, position_N: ArrayLike) -> NDArray[np.float32]:
        """Return an array of shape (N, 0): nothing is random."""
        return np.empty((np.size(position_N), 0), dtype=np.float32)

    def wants_landmarks(self, label: int, draws_K: NDArray[np.float32]) -> bool:
        """Never."""
        return False

    def __call__(self, photo: Photo, draws_RK: NDArray[np.float32], out_RSSC: NDArray[np.uint8]) -> Seen:
        """Decode one image and write its centre."""
        out_RSSC[...], face_box = self.of_pixels(decode_image(photo.payload, srgb=self.srgb))
        return Seen([photo.label] * len(draws_RK), face_box)

    def of_pixels(self, image_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Box | None]:
        """Return the view of an image that is decoded already, upright.

        Returns:
            view_SSC: its pixels.
            face_box: of the face that it was cropped to, in the image [pixels]; None if it was not cropped.

        Raises:
            SampleError: it is to be cropped, but has no usable face.
        """
        face_box = None
        if self.crop is not None:
            face = crop_face(image_HWC, self.crop.margin)
            image_HWC, face_box = face.image_HWC, face.face_box
        view_SSC = self._former(image=image_HWC)["image"] if self._former else self._centre(image_HWC)
        return np.asarray(view_SSC, dtype=np.uint8), face_box

    def _centre(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._native:
            scaled_HWC = at_least(image_HWC, self.size)
            height, width = scaled_HWC.shape[:2]
        else:
            shorter = min(image_HWC.shape[:2])
            height, width = (round(side * self.size / shorter) for side in image_HWC.shape[:2])
            scaled_HWC = resized(image_HWC, height, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return scaled_HWC[top : top + self.size, left : left + self.size]
