"""Make a mask of a photo from where its subject was found: cleaned, grown, with a soft edge.

H, W are the height and width in pixels of a photo, or of the smaller version of it in which the subject was found.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError:  # it is optional; `utils.make_masks` says so
    cv2 = None

NOTHING, EVERYTHING = 0.005, 0.95  # shares of a picture beyond which no subject was told from the rest
CENTRAL = 0.35  # standard deviation of the weight that falls off from the middle, in fractions of the edges
MINOR = 0.15  # of the main part's weight, from which on another part counts as the subject's

Finder = Callable[[Image.Image], np.ndarray]


def draw_mask(photo: Image.Image, find: Finder, padding: float, feather: float) -> Image.Image | None:
    """Return a mask of a photo's size, mode "L", white where its subject is; None if none was told from the rest.

    Args:
        find: Takes the photo and returns where its subject is, (H, W) bool, of any size.
        padding: How far the mask goes beyond the subject, in fractions of the shorter edge.
        feather: Width of the soft edge outside of that.
    """
    found = clean(find(photo)).astype(np.float32)
    blurred = cv2.GaussianBlur(found, (0, 0), 1)  # else pixels of the smaller version stand out
    is_subject = cv2.resize(blurred, photo.size, interpolation=cv2.INTER_LINEAR) > 0.5
    if not NOTHING <= is_subject.mean() <= EVERYTHING:
        return None
    return Image.fromarray(soften(is_subject, padding * min(photo.size), feather * min(photo.size)))


def soften(is_subject: np.ndarray, padding: float, feather: float) -> np.ndarray:
    """Return a mask that is 255 up to a distance from the subject and falls to 0 over a further one.

    Args:
        is_subject: (H, W) bool.
        padding: The distance in pixels.
        feather: The further one in pixels; 0 is a hard edge.

    Returns:
        (H, W) uint8.
    """
    distance = cv2.distanceTransform((~is_subject).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if not feather:
        return np.where(distance <= padding, 255, 0).astype(np.uint8)
    return np.rint(255 * np.clip((padding + feather - distance) / feather, 0, 1)).astype(np.uint8)


def clean(found: np.ndarray) -> np.ndarray:
    """Return (H, W) bool without specks, far-off parts, cracks and holes."""
    opened = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_OPEN, disc(3))
    count, parts = cv2.connectedComponents(opened, connectivity=8)
    weights = np.bincount(parts.ravel(), weights=central_weight(*found.shape).ravel(), minlength=count)
    weights[0] = 0  # what was not found
    kept = weights >= MINOR * weights.max()
    kept[0] = False
    closed = cv2.morphologyEx(kept[parts].astype(np.uint8), cv2.MORPH_CLOSE, disc(9))
    outside = np.pad(closed, 1)
    cv2.floodFill(outside, None, (0, 0), 2)
    return outside[1:-1, 1:-1] != 2


def disc(diameter: int) -> np.ndarray:
    """Return a disc for OpenCV's morphology."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how far down and to the right each pixel lies, (H, 1) and (1, W) in (0, 1)."""
    return (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def central_weight(height: int, width: int) -> np.ndarray:
    """Return (H, W) weights that fall off from 1 in the middle."""
    y, x = grid(height, width)
    return np.exp(-((y - 0.5) ** 2 + (x - 0.5) ** 2) / (2 * CENTRAL**2))
