"""Self-morph: an attack made from one bona fide photograph, on the fly, so that training needs no morphs.

A region of the face is taken from a slightly warped and altered copy and blended back. That leaves the traces of every
landmark morph (doubled structure, seams, mixed sharpness) without a second person. A detector that trains on these
images learns the traces of blending instead of one morphing tool.

Everything is a pure function of the image and its draws. With landmarks the regions follow the face; without them they
are ellipses at the place of the face in an aligned portrait.

Shapes: H, W image size; K draws; L landmarks (x, y) [pixels].
Source: the idea is that of self-blended images (Shiohara and Yamasaki 2022, arXiv 2204.08376) and of SelfMAD (2025).
"""

import cv2
import numpy as np
from numpy.typing import NDArray

_GRID = 5
_FIELD_DRAWS = 2 * _GRID * _GRID
_CHOICES = 12
NUM_DRAWS = _CHOICES + _FIELD_DRAWS
"""Uniform numbers that `self_morph` needs."""

# Drawn uniformly, so that 0.5 comes in 3 of 7 images.
_BLENDS = (0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 1.0)
# Regions without landmarks: centre x, y and half-axes, as shares of the image: face, eyes, nose, mouth.
_ELLIPSES = ((0.5, 0.52, 0.36, 0.42), (0.5, 0.42, 0.34, 0.14), (0.5, 0.54, 0.16, 0.16), (0.5, 0.70, 0.22, 0.12))
# The same regions as bands of the landmarks' bounding box: top and bottom.
_BANDS = ((0.0, 1.0), (0.12, 0.5), (0.3, 0.68), (0.62, 0.92))
_LARGEST_SHIFT, _LARGEST_TURN, _LARGEST_ZOOM, _ELASTIC = 0.03, 0.03, 0.05, 0.012


def self_morph(
    image_HWC: NDArray[np.uint8], draws_K: NDArray[np.float32], landmarks_L2: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Blend a region of a photograph with an altered copy of itself.

    Args:
        image_HWC: a bona fide.
        draws_K: `NUM_DRAWS` numbers in [0, 1).
        landmarks_L2: points of the face; None, or points in a line, use ellipses.

    Returns:
        morph_HWC: of the same size; pixels outside the region are the same.
    """
    choices, field = draws_K[:_CHOICES], draws_K[_CHOICES:NUM_DRAWS]
    height, width = image_HWC.shape[:2]
    mask_HW = _region(height, width, choices[:4], landmarks_L2)
    copy_HWC = _altered(image_HWC, choices[4:7])
    x_HW, y_HW = _displaced(height, width, choices[7:11], field)
    warped_HWC = cv2.remap(copy_HWC, x_HW, y_HW, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    blend_HW1 = (mask_HW * np.float32(_BLENDS[int(choices[11] * len(_BLENDS))]))[..., None]
    mixed_HWC = image_HWC + blend_HW1 * (warped_HWC.astype(np.float32) - image_HWC)
    return np.asarray(np.rint(mixed_HWC).clip(0, 255).astype(np.uint8))


def _region(
    height: int, width: int, draws_4: NDArray[np.float32], landmarks_L2: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Draw a region and feather its border; 0 outside, up to 1 inside."""
    which = int(draws_4[0] * len(_ELLIPSES))
    mask_HW = np.zeros((height, width), dtype=np.uint8)
    hull = _hull(landmarks_L2, _BANDS[which])
    if hull is not None:
        centre = hull.mean(axis=0)
        # Scale the hull about its centre, by 0.9 to 1.1.
        grown = (centre + (hull - centre) * (0.9 + 0.2 * draws_4[1])).round().astype(np.int32)
        cv2.fillConvexPoly(mask_HW, grown, 1)
        extent = float(np.ptp(hull, axis=0).min())
    else:
        x, y, half_x, half_y = _ELLIPSES[which]
        centre_x = round(width * (x + 0.06 * (draws_4[2] - 0.5)))
        centre_y = round(height * (y + 0.06 * (draws_4[3] - 0.5)))
        # Keep the ellipse inside the image, one pixel away from its edges.
        room_x, room_y = min(centre_x, width - 1 - centre_x) - 1, min(centre_y, height - 1 - centre_y) - 1
        grow = 0.8 + 0.4 * draws_4[1]
        axes = (max(1, min(room_x, round(width * half_x * grow))), max(1, min(room_y, round(height * half_y * grow))))
        cv2.ellipse(mask_HW, (centre_x, centre_y), axes, 0, 0, 360, 1, -1)
        extent = 2.0 * min(axes)
    return feathered(mask_HW, max(1, round(extent * (0.03 + 0.09 * draws_4[3]))))


def feathered(mask_HW: NDArray[np.uint8], reach: int) -> NDArray[np.float32]:
    """Soften the border of a 0/1 mask so that it fades to exactly 0 at the border, float32.

    The mask is eroded by ``reach`` pixels and then blurred twice with a box of ``reach`` pixels. Each blur spreads it
    by at most reach / 2, so nothing leaves the original region.

    Args:
        mask_HW: 1 inside the region.
        reach: width of the border [pixels].
    """
    eroded_HW = cv2.erode(
        mask_HW, np.ones((2 * reach + 1, 2 * reach + 1), dtype=np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    return np.asarray(cv2.blur(cv2.blur(eroded_HW.astype(np.float32), (reach, reach)), (reach, reach)))


def _hull(landmarks_L2: NDArray[np.float32] | None, band: tuple[float, float]) -> NDArray[np.float32] | None:
    """Return the convex hull of the landmarks in a band of the face; None if they span no area."""
    if landmarks_L2 is None:
        return None
    top, extent = landmarks_L2[:, 1].min(), np.ptp(landmarks_L2[:, 1])
    low, high = top + band[0] * extent, top + band[1] * extent
    inside = landmarks_L2[(landmarks_L2[:, 1] >= low) & (landmarks_L2[:, 1] <= high)].astype(np.float32)
    if len(inside) < 3:
        return None
    hull: NDArray[np.float32] = cv2.convexHull(inside)[:, 0]
    return hull if len(hull) >= 3 and cv2.contourArea(hull) > 16 else None


def _altered(image_HWC: NDArray[np.uint8], draws_3: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Change colour and sharpness a little, because the second photograph of a morph is from another camera."""
    height, width = image_HWC.shape[:2]
    gain, offset = 1 + 0.08 * (draws_3[0] - 0.5), 8 * (draws_3[1] - 0.5)
    changed_HWC = cv2.convertScaleAbs(image_HWC, alpha=float(gain), beta=float(offset))
    if draws_3[2] < 0.4:  # softer: shrunk and enlarged
        share = 0.6 + 0.8 * float(draws_3[2])
        smaller = (max(4, round(width * share)), max(4, round(height * share)))
        return np.asarray(cv2.resize(cv2.resize(changed_HWC, smaller, interpolation=cv2.INTER_AREA), (width, height)))
    if draws_3[2] < 0.7:  # sharper
        soft_HWC = cv2.GaussianBlur(changed_HWC, (0, 0), 1.0)
        return np.asarray(cv2.addWeighted(changed_HWC, 1.5, soft_HWC, -0.5, 0))
    return np.asarray(changed_HWC)


def _displaced(
    height: int, width: int, draws_4: NDArray[np.float32], field: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the source (x, y) of each pixel of the warped copy: shift, zoom, rotation and a smooth elastic field."""
    shift_x, shift_y, zoom, turn = (2 * draws_4 - 1).tolist()
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float32)
    from_x, from_y = (x_HW - width / 2) / (1 + _LARGEST_ZOOM * zoom), (y_HW - height / 2) / (1 + _LARGEST_ZOOM * zoom)
    # The elastic field: 5 x 5 random vectors, enlarged smoothly to the size of the image.
    coarse_2GG = (2 * field.reshape(2, _GRID, _GRID) - 1).astype(np.float32)
    smooth = [cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) for coarse in coarse_2GG]
    moved_x = from_x + _LARGEST_TURN * turn * from_y + width * (0.5 + _LARGEST_SHIFT * shift_x + _ELASTIC * smooth[0])
    moved_y = from_y - _LARGEST_TURN * turn * from_x + height * (0.5 + _LARGEST_SHIFT * shift_y + _ELASTIC * smooth[1])
    return moved_x.astype(np.float32), moved_y.astype(np.float32)
