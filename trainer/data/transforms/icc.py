"""ICC profiles: their names, and the conversion of images to sRGB.

Phones write Display P3, cameras often Adobe RGB. The same colour then has other pixel values than in sRGB. If only one
class of a data set comes from phones, a detector learns the profile instead of the face.

Shapes: H, W image size; HWC uint8 RGB.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MAX_PROFILE_BYTES = 4 << 20
_GRID_STEPS = 9
_SRGB_TOLERANCE_LEVELS = 2
"""A profile that moves no colour by more than this counts as sRGB: its images keep their values [levels of 255]."""
_MODE_OF = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}


def profile_name(profile: bytes | None) -> str | None:
    """Return the description of a profile, "unreadable" for a damaged one, None without a profile."""
    if not profile:
        return None
    opened = _opened(profile)
    try:
        return "unreadable" if opened is None else ImageCms.getProfileDescription(opened).strip() or "unnamed"
    except ImageCms.PyCMSError:
        return "unnamed"


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours of an image to sRGB.

    Args:
        image: in mode RGB, L, CMYK or LAB. An RGB image with a grey profile counts as grey.
        profile: its ICC profile. Without one, or with a damaged one or one of another mode, nothing is converted.

    Returns:
        An RGB image, or the image itself if its values are sRGB already.
    """
    if not profile or len(profile) > _MAX_PROFILE_BYTES:
        return image
    mode, transform = _to_srgb_transform(profile)
    if transform is None:
        return image
    if mode == "L" and image.mode == "RGB":
        image = image.getchannel(0)
    if mode != image.mode:
        return image
    converted: Image.Image | None = ImageCms.applyTransform(image, transform)
    return image if converted is None else converted


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image in CIE L*a*b* (D50) to sRGB."""
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted: Image.Image | None = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None


@lru_cache(maxsize=16)  # a data set has few profiles, and building a transform costs milliseconds
def _to_srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of a profile and its transform to sRGB; None if there is nothing to convert."""
    source = _opened(profile)
    if source is None or source.profile.xcolor_space not in _MODE_OF:
        return "", None
    mode = _MODE_OF[source.profile.xcolor_space]
    try:
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return mode, None
    return mode, None if mode in ("RGB", "L") and _is_identity(transform, mode) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform keeps a grid of 9 x 9 x 9 colours to within `_SRGB_TOLERANCE_LEVELS`."""
    level_K = np.linspace(0, 255, _GRID_STEPS).round().astype(np.uint8)
    grid_HWC = np.stack(np.meshgrid(level_K, level_K, level_K, indexing="ij"), axis=-1).reshape(_GRID_STEPS, -1, 3)
    image = Image.fromarray(grid_HWC)
    image = image if mode == "RGB" else image.getchannel(0)
    converted = ImageCms.applyTransform(image, transform)
    moved = np.asarray(converted).astype(int) - np.asarray(image.convert("RGB")).astype(int)
    return bool(np.abs(moved).max() <= _SRGB_TOLERANCE_LEVELS)
