"""Read what a picture of the world of shapes shows, by comparing it with drawings; no network has a say.

The background is the colour of the frame. What differs from it is the silhouette; its middle and its area fix where
and how large each class would have to be, and the class whose drawing covers it best is there. Turns and small errors
of place and size are searched for. Everything is read at 16 x 16 pixels; larger pictures are shrunk first.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from utils.synthetic import shapes
from utils.synthetic.shapes import CLASSES, COLOURS, SUBJECTS

PIXELS = 16  # that pictures are read at
SAMPLES = 3  # points along a pixel's edge in drawings to compare with
ANGLES = (-15, -10, -5, 0, 5, 10, 15)  # degrees
SCALES = (0.9, 0.97, 1.04)  # of the radius that the area suggests; soft edges make it look too large
THERE = 0.6  # from this overlap on, a silhouette counts as the class
LARGEST = 0.5  # radius beyond which a silhouette is of no shape, but noise all over the picture
PRESENT = 0.5  # from this match on, a subject counts as present
NOISE, CLEAR = 30, 100  # distance of colours up to which a pixel is background, and from which on it is none, of 441


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows, in the words of captions."""

    shape: str | None  # None: the silhouette is of no class
    colour: str
    background: str
    size: str
    place: str | None  # None: in the middle
    overlap: float  # of the silhouette with the class's drawing, intersection over union, 0 to 1
    pose: tuple[float, float, float, float]  # x, y, radius, angle


def read(picture: Image.Image) -> Reading:
    """Tell class, colour, background, size and place."""
    pixels = to_pixels(picture)
    ground = background_of(pixels)
    silhouette = find_silhouette(pixels, ground)
    best = max((fit(silhouette, shape) for shape in CLASSES), key=lambda found: found[0])
    overlap, shape, (x, y, radius, angle), mask = best
    ink = ground + (mask[..., None] * (pixels - ground)).sum((0, 1)) / max((mask**2).sum(), 1e-6)  # least squares
    room = shapes.MARGIN - 1.15 * radius
    offsets = {name: np.dot(step, (x - 0.5, y - 0.5)) for name, step in shapes.PLACES.items()}
    place = max(offsets, key=offsets.get)
    return Reading(
        shape=shape if overlap >= THERE and radius <= LARGEST else None,
        colour=nearest_colour(ink),
        background=nearest_colour(ground),
        size=min(shapes.SIZES, key=lambda name: abs(np.mean(shapes.SIZES[name]) - radius)),
        place=place if offsets[place] > 0.5 * room else None,
        overlap=overlap,
        pose=(x, y, radius, angle),
    )


def match(picture: Image.Image, subject: str, shape: str | None = None) -> float:
    """Measure how much of a subject's pattern a picture shows.

    Args:
        shape: The class that the pattern is looked for on; None: the subject's own.

    Returns:
        1 - (mean squared error of the colours inside the shape) / (variance of the subject's colours there), at the
        pose that fits best, at least 0: 1 is the subject, 0 is what a plain shape of the mean colour gets, or one
        whose silhouette is not of the class.
    """
    pixels = to_pixels(picture)
    ground = background_of(pixels)
    shape = shape or SUBJECTS[subject].shape
    overlap, _, pose, _ = fit(find_silhouette(pixels, ground), shape)
    if overlap < THERE or pose[2] > LARGEST:
        return 0.0
    # A round silhouette does not tell the turn, so all turns are tried.
    best, pose = best_pose(pixels, ground, subject, shape, poses_around((*pose[:3], 0), 0.03, 0.06, ANGLES))
    best, _ = best_pose(pixels, ground, subject, shape, poses_around(pose, 0.012, 0.025, (-3, 0, 3)))
    return max(0.0, best)


# -------------------------------------------------------------------------------------------------------------- pixels


def to_pixels(picture: Image.Image) -> np.ndarray:
    """Return a picture as (16, 16, 3) float32 in [0, 255]."""
    if picture.size != (PIXELS, PIXELS):
        picture = picture.resize((PIXELS, PIXELS), Image.Resampling.BOX)
    return np.asarray(picture.convert("RGB"), np.float32)


def background_of(pixels: np.ndarray) -> np.ndarray:
    """Return the median colour of a picture's frame, of one pixel."""
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return np.median(frame, axis=0)


def find_silhouette(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return how far each pixel is covered by something other than the background, (16, 16) in [0, 1]."""
    distance = np.linalg.norm(pixels - ground, axis=-1)
    full = distance[distance >= 0.5 * distance.max()].mean()
    return np.clip((distance - NOISE) / (np.clip(full, 2 * NOISE, CLEAR) - NOISE), 0, 1)


def nearest_colour(colour: np.ndarray) -> str:
    """Return the name of the colour that is closest in RGB."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.float32(COLOURS[name]) - colour)))


# ------------------------------------------------------------------------------------------------------------- fitting


def fit(silhouette: np.ndarray, shape: str) -> tuple[float, str, tuple[float, float, float, float], np.ndarray]:
    """Find the pose in which a class covers a silhouette best.

    Returns:
        The overlap (intersection over union, 0 to 1), the class, the pose (x, y, radius, angle), and its mask.
    """
    place = (np.arange(PIXELS) + 0.5) / PIXELS
    total = max(silhouette.sum(), 1e-6)
    x, y = float((silhouette.sum(0) * place).sum() / total), float((silhouette.sum(1) * place).sum() / total)
    radius = float(np.sqrt(total / PIXELS**2 / area_of(shape)))
    angles = (0,) if shape in ("circle", "ring") else ANGLES
    poses = [(x, y, max(radius * scale, 0.02), angle) for scale in SCALES for angle in angles]
    masks = shape_masks(shape, poses)
    overlaps = np.minimum(masks, silhouette).sum((1, 2)) / np.maximum(masks, silhouette).sum((1, 2)).clip(1e-6)
    best = int(overlaps.argmax())
    return float(overlaps[best]), shape, poses[best], masks[best]


@functools.cache
def area_of(shape: str) -> float:
    """Return the area of a class in units of its radius squared."""
    u, v = shapes.own_axes(400, 0.5, 0.5, 0.25, 0)
    return float(CLASSES[shape](u, v).mean() * 16)


def best_pose(
    pixels: np.ndarray, ground: np.ndarray, subject: str, shape: str, poses: list[tuple[float, float, float, float]]
) -> tuple[float, tuple[float, float, float, float]]:
    """Return how well a subject's pattern fits at the best of some poses, at most 1, and that pose."""
    colours, masks = draw_poses(subject, shape, poses)
    weights = masks[..., None]
    area = masks.sum((1, 2)).clip(1e-6)[:, None, None, None]
    mean = (colours * weights).sum((1, 2), keepdims=True) / area
    spread = (weights * (weights * (colours - mean)) ** 2).sum((1, 2, 3))
    error = (weights * (ground + weights * (colours - ground) - pixels) ** 2).sum((1, 2, 3))
    fits = 1 - error / spread.clip(1e-6)
    return float(fits.max()), poses[int(fits.argmax())]


def poses_around(
    pose: tuple[float, float, float, float], shift: float, scale: float, turns: Sequence[float]
) -> list[tuple[float, float, float, float]]:
    """Return poses with small errors of place, size and turn mended."""
    x, y, radius, angle = pose
    return [
        (x + right * shift, y + down * shift, max(radius * (1 + larger * scale), 0.02), angle + turn)
        for right in (-1, 0, 1)
        for down in (-1, 0, 1)
        for larger in (-1, 0, 1)
        for turn in turns
    ]


def axes_of(poses: Sequence[tuple[float, float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the own axes of several poses, each (poses, points, points)."""
    x, y, radius, angle = (np.float32(values)[:, None, None] for values in zip(*poses, strict=True))
    points = PIXELS * SAMPLES
    place = (np.arange(points, dtype=np.float32) + 0.5) / points
    across, down = (place[None, None, :] - x) / radius, (place[None, :, None] - y) / radius
    turn = np.deg2rad(angle)
    return np.cos(turn) * across + np.sin(turn) * down, np.cos(turn) * down - np.sin(turn) * across


def shape_masks(shape: str, poses: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """Return how far each pixel is covered by a class, (poses, 16, 16) float32 in [0, 1]."""
    return pool(CLASSES[shape](*axes_of(poses)))


def pool(points: np.ndarray) -> np.ndarray:
    """Take the means over each pixel's points."""
    return points.reshape(len(points), PIXELS, SAMPLES, PIXELS, SAMPLES).mean((2, 4), dtype=np.float32)


def draw_poses(
    subject: str, shape: str, poses: Sequence[tuple[float, float, float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a subject's pattern on a class, without a background.

    Returns:
        (poses, 16, 16, 3) colours in [0, 255], and the share of each pixel that it covers, (poses, 16, 16).
    """
    known = SUBJECTS[subject]
    u, v = axes_of(poses)
    inside, parts = CLASSES[shape](u, v), known.paint(u, v).astype(int)
    masks = pool(inside)
    drawings = np.zeros((*masks.shape, 3), np.float32)
    for number, name in enumerate(known.palette):
        share = pool(inside & (parts == number)) / np.maximum(masks, 1e-6)
        drawings += share[..., None] * np.float32(COLOURS[name])
    return drawings, masks
