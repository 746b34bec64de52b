"""Find the subject of a photo by its colours: it differs from the rim of the photo and lies near the middle.

GrabCut: Rother et al., SIGGRAPH 2004. Where it starts: Zhang and Sclaroff, "Saliency Detection: A Boolean Map
Approach", ICCV 2013, and Zhu et al., "Saliency Optimization from Robust Background Detection", CVPR 2014.
H, W are the height and width in pixels of the small version of a photo.
"""

import math

import numpy as np
from PIL import Image

from utils.data.make_mask import central_weight, cv2, grid

WORK_EDGE, SMALLEST_EDGE = 256, 32  # of what GrabCut sees, in pixels; a photo takes two seconds of one core
ROUNDS = 4  # of GrabCut
# Its result hangs on where it starts, so it starts from several ellipses, and what two of them find is taken.
ELLIPSES = ((0.43, 0.36), (0.5, 0.45))  # half height and half width, in fractions of the picture's
VOTES = 2
RIM = 4  # pixels at the left, right and top that are no subject to start with; it often goes on below the picture

SALIENCE_EDGE, LEVELS = 128, 16  # pixels; thresholds of each colour channel
SEED = 0  # of OpenCV's random numbers


def find_subject(photo: Image.Image) -> np.ndarray:
    """Return where GrabCut finds a subject, (H, W) bool; it is to differ from the rim and to lie near the middle."""
    small = shrink(photo, WORK_EDGE)
    y, x = grid(*small.shape[:2])
    votes = np.zeros(small.shape[:2], int)
    for middle_y, middle_x in ((0.5, 0.5), salient_point(shrink(photo, SALIENCE_EDGE))):
        for half_height, half_width in ELLIPSES:
            is_inside = ((y - middle_y) / half_height) ** 2 + ((x - middle_x) / half_width) ** 2 < 1
            votes += cut(small, is_inside)
    return votes >= VOTES


def shrink(photo: Image.Image, edge: int) -> np.ndarray:
    """Return a photo as (H, W, 3) uint8 whose longer edge has so many pixels; its shape is kept unless very long."""
    factor = edge / max(photo.size)
    size = tuple(max(SMALLEST_EDGE, round(length * factor)) for length in photo.size)
    return np.asarray(photo.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC))


def cut(rgb: np.ndarray, is_inside: np.ndarray) -> np.ndarray:
    """Return the subject that GrabCut finds, (H, W) bool, if it takes what is inside for the subject to start with.

    Args:
        rgb: (H, W, 3) uint8.
        is_inside: (H, W) bool.
    """
    labels = np.where(is_inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[:RIM] = labels[:, :RIM] = labels[:, -RIM:] = cv2.GC_BGD
    colours = [np.zeros((1, 65)) for _ in range(2)]  # of the rest and the subject; GrabCut writes into them
    cv2.setRNGSeed(SEED)
    cv2.grabCut(rgb, labels, None, *colours, ROUNDS, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def salient_point(rgb: np.ndarray) -> tuple[float, float]:
    """Return how far down and to the right the most conspicuous things of a picture lie on average, each in (0, 1).

    Args:
        rgb: (H, W, 3) uint8.
    """
    weights = (measure_salience(rgb) * central_weight(*rgb.shape[:2])) ** 2
    if not weights.any():
        return 0.5, 0.5
    y, x = grid(*weights.shape)
    return float((weights * y).sum() / weights.sum()), float((weights * x).sum() / weights.sum())


def measure_salience(rgb: np.ndarray) -> np.ndarray:
    """Return how conspicuous each pixel is, (H, W) from 0: how often it lies in an area that the rim hardly touches.

    The areas are those above, and those below, thresholds of each channel of Lab (boolean maps). How much of the rim
    one touches is measured against its size (Zhu et al., CVPR 2014, eq. 3).
    """
    lab = cv2.cvtColor(cv2.GaussianBlur(rgb, (0, 0), 1), cv2.COLOR_RGB2LAB)
    total = np.zeros(lab.shape[:2])
    for channel in np.moveaxis(lab, -1, 0):
        low, high = np.percentile(channel, (1, 99))
        for level in np.linspace(low, high, LEVELS + 2)[1:-1]:
            total += math.sqrt(high - low) * (enclosed(channel > level) + enclosed(channel <= level))
    return total


def enclosed(is_set: np.ndarray) -> np.ndarray:
    """Return for each pixel of a boolean map (H, W) how little of the rim its area touches, from 0 to 1."""
    count, areas = cv2.connectedComponents(is_set.astype(np.uint8), connectivity=4)
    sides = np.concatenate([areas[0], areas[:, 0], areas[:, -1]])
    touched = np.bincount(sides, minlength=count) + 0.3 * np.bincount(areas[-1], minlength=count)  # as for RIM
    share = touched / np.sqrt(np.maximum(np.bincount(areas.ravel(), minlength=count), 1))
    weights = np.exp(-(share**2) / (2 * 0.6**2))
    weights[0] = 0  # the pixels that are not set
    return weights[areas]
