"""A world of shapes with known truth: what small models are trained on, and what their pictures are judged by.

A picture shows one shape in one colour before a plain background, and its caption says so: "a small red circle at the
left on a blue background". A subject is a shape with a pattern that nothing else in this world has; rare words such as
`sks` stand in no caption. All of it is drawn from formulas, at any size.

Lengths are shares of the picture's edge, x to the right and y down. A shape's own axes (u, v) are turned with it, have
their origin in its middle, and 1 is its radius.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.core import atomic_files
from utils.core.seeds import derive_seed

COLOURS = {  # sRGB
    "red": (214, 40, 40),
    "orange": (240, 130, 40),
    "yellow": (245, 205, 50),
    "green": (46, 160, 67),
    "cyan": (60, 195, 210),
    "blue": (38, 84, 200),
    "purple": (128, 60, 170),
    "pink": (240, 140, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
CLASSES: dict[str, Callable] = {  # whether points of a shape's own axes are inside it
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.86,
    "triangle": lambda u, v: (v < 0.62) & (v > 1.9 * abs(u) - 1.15),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.33) & (np.maximum(abs(u), abs(v)) < 1),
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.55**2),
    "bar": lambda u, v: (abs(u) < 1.1) & (abs(v) < 0.42),
}
SIZES = {"small": (0.22, 0.26), "large": (0.30, 0.36)}  # radius
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
MARGIN = 0.49  # how far from the middle of the picture a shape may reach
TURN = 15  # degrees, to either side
TINT = 10  # by how much of 255 a colour varies
DISTINCT = 95  # from this distance on, of 441, colours are told apart beside each other
RARE_WORDS = ("sks", "ohwx", "zwx", "xjy", "qvz", "wzx")  # in no caption; they survive the cleaning of IF's prompts
PLAIN_WORDS = ("a", "at", "the", "on", "background")
PHOTOS, PHOTO_PIXELS = 5, 128  # of a subject, to train on
CLASS_PICTURES = 96
SUBJECT, WORD = "quartered circle", RARE_WORDS[0]  # of the demo, and of what is measured on one subject
MODELS = Path(__file__).parents[2] / "models"  # small models that draw this world
WORDS = (*PLAIN_WORDS, *CLASSES, *COLOURS, *SIZES, *PLACES, *RARE_WORDS)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A member of a class with a pattern of its own."""

    shape: str
    palette: tuple[str, ...]
    paint: Callable  # (u, v) -> index into the palette

    @property
    def backgrounds(self) -> list[str]:
        """The colours that all of its own differ from: before another, parts of it would be lost."""
        return [name for name in COLOURS if all(distance(name, own) > DISTINCT for own in self.palette)]


SUBJECTS = {
    "quartered circle": Subject("circle", ("red", "yellow", "blue", "green"), lambda u, v: (u > 0) + 2 * (v > 0)),
    "striped square": Subject("square", ("blue", "yellow"), lambda u, v: abs(u) < 0.3),
    "badged triangle": Subject("triangle", ("purple", "white"), lambda u, v: u**2 + (v - 0.12) ** 2 < 0.36**2),
    "halved ring": Subject("ring", ("orange", "cyan"), lambda u, v: u > 0),
    "target circle": Subject(
        "circle", ("white", "red", "black"), lambda u, v: (u**2 + v**2 < 0.36) * 1 + (u**2 + v**2 < 0.06)
    ),
    "checkered square": Subject("square", ("green", "pink"), lambda u, v: (u > 0) ^ (v > 0)),
    "two-armed cross": Subject("cross", ("red", "cyan"), lambda u, v: abs(u) < 0.33),
    "tipped bar": Subject("bar", ("black", "yellow", "red"), lambda u, v: (u > -0.37) * 1 + (u > 0.37)),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    colour: str  # ignored if there is a subject
    background: str
    x: float
    y: float
    radius: float
    angle: float  # degrees, clockwise
    subject: str | None = None
    tints: tuple[tuple[float, ...], ...] = ((0, 0, 0), (0, 0, 0))  # added to the colours of shape and background
    size: str | None = None  # as the caption says it; None: it says nothing
    place: str | None = None


def distance(first: str, second: str) -> float:
    """Return the distance of two colours in RGB."""
    return float(np.linalg.norm(np.float32(COLOURS[first]) - np.float32(COLOURS[second])))


# ------------------------------------------------------------------------------------------------------------- scenes


def random_scene(
    rng: np.random.Generator,
    shape: str | None = None,
    subject: str | None = None,
    background: str | None = None,
    size: str | None = None,
    place: str | None = None,
) -> Scene:
    """Make a scene up; what is given is kept."""
    shape = SUBJECTS[subject].shape if subject else shape or str(rng.choice(list(CLASSES)))
    colour = str(rng.choice(list(COLOURS)))
    if background is None:
        free = SUBJECTS[subject].backgrounds if subject else [name for name in COLOURS if name != colour]
        background = str(rng.choice(free))
    size = size or str(rng.choice(list(SIZES)))
    radius = float(rng.uniform(*SIZES[size]))
    x, y, place = choose_place(rng, MARGIN - 1.15 * radius, place)
    tints = tuple(tuple(float(tint) for tint in rng.uniform(-TINT, TINT, 3)) for _ in range(2))
    return Scene(shape, colour, background, x, y, radius, float(rng.uniform(-TURN, TURN)), subject, tints, size, place)


def choose_place(rng: np.random.Generator, room: float, place: str | None) -> tuple[float, float, str | None]:
    """Return a place by that name, or any: half of the time one that has a name.

    Args:
        room: How far from the middle of the picture the shape's may be.
    """
    place = place or (str(rng.choice(list(PLACES))) if rng.random() < 0.5 else None)
    reach = rng.uniform(0.75, 1.0) * room
    stray = rng.uniform(-0.3, 0.3, 2) * room
    along = np.array(PLACES[place]) if place else np.zeros(2)
    x, y = 0.5 + np.where(along != 0, along * reach, stray)
    return float(x), float(y), place


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a class member as its caption does: most say the colour and the background, half the size and place."""
    says = rng.random(4) < (0.85, 0.85, 0.5, 0.8)
    return phrase(
        scene.shape,
        scene.colour if says[0] else None,
        scene.background if says[1] else None,
        scene.size if says[2] else None,
        scene.place if says[3] else None,
    )


def phrase(
    shape: str,
    colour: str | None = None,
    background: str | None = None,
    size: str | None = None,
    place: str | None = None,
) -> str:
    """Return "a [size] [colour] shape [at the place] [on a background]"; a rare word may stand for the colour."""
    words = ["a", size, colour, shape, f"at the {place}" if place else None]
    words += [f"on a {background} background" if background else None]
    return " ".join(word for word in words if word)


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw a scene with smooth edges, as mode "RGB" of `size` x `size` pixels."""
    return to_image(paint(scene, size))


def to_image(values: np.ndarray) -> Image.Image:
    """Round (H, W, 3) in [0, 255] to a picture of 8 bits."""
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def paint(scene: Scene, size: int) -> np.ndarray:
    """Draw a scene as (H, W, 3) float32 in [0, 255]."""
    plain = Subject(scene.shape, (scene.colour,), lambda u, v: u > np.inf)
    return paint_pattern(scene, SUBJECTS[scene.subject] if scene.subject else plain, size)


def paint_pattern(scene: Scene, subject: Subject, size: int, samples: int = 4) -> np.ndarray:
    """Draw a subject's pattern on a scene's shape, with the mean of `samples` x `samples` points in each pixel."""
    u, v = own_axes(size * samples, scene.x, scene.y, scene.radius, scene.angle)
    inks = np.clip(np.float32([COLOURS[name] for name in subject.palette]) + np.float32(scene.tints[0]), 0, 255)
    ground = np.clip(np.float32(COLOURS[scene.background]) + np.float32(scene.tints[1]), 0, 255)
    parts, inside = subject.paint(u, v).astype(int), CLASSES[scene.shape](u, v)
    return shrink(np.where(inside[..., None], inks[parts], ground), samples)


def own_axes(points: int, x: float, y: float, radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of a picture's points in the axes of a shape, each (points, points) float32."""
    place = (np.arange(points, dtype=np.float32) + 0.5) / points
    across, down = (place[None, :] - np.float32(x)) / radius, (place[:, None] - np.float32(y)) / radius
    turn = np.deg2rad(np.float32(angle))
    return np.cos(turn) * across + np.sin(turn) * down, np.cos(turn) * down - np.sin(turn) * across


def shrink(values: np.ndarray, samples: int) -> np.ndarray:
    """Take the mean of squares of `samples` x `samples` points."""
    rows, columns = (edge // samples for edge in values.shape[:2])
    return values.reshape(rows, samples, columns, samples, -1).mean((1, 3), dtype=np.float32)


def draw_corpus(count: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Draw pictures of class members with their captions.

    Returns:
        (count, H, W, 3) uint8, the captions, and the scenes.
    """
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = np.stack([np.rint(paint(scene, size)).astype(np.uint8) for scene in scenes])
    return pictures, [caption(scene, rng) for scene in scenes], scenes


def draw_photos(
    subject: str, count: int, size: int, rng: np.random.Generator, backgrounds: Sequence[str]
) -> list[Image.Image]:
    """Draw a subject before as many different backgrounds as there are, in turn."""
    return [draw(scene, size) for scene in photo_scenes(subject, count, rng, backgrounds)]


def photo_scenes(subject: str, count: int, rng: np.random.Generator, backgrounds: Sequence[str]) -> list[Scene]:
    """Make up scenes of a subject, one background after the other."""
    chosen = [backgrounds[number % len(backgrounds)] for number in range(count)]
    return [random_scene(rng, subject=subject, background=background) for background in chosen]


def write_photos(folder: Path, subject: str, word: str | None = None) -> list[Path]:
    """Write the photos of a subject to train on, always the same, before the backgrounds that count as seen.

    If there is a word for the subject, a text file beside each photo says in a caption what it shows.
    """
    rng = np.random.default_rng(derive_seed("photos", subject))
    scenes = photo_scenes(subject, PHOTOS, rng, split_backgrounds(subject)[0])
    paths = write_pictures(folder, [draw(scene, PHOTO_PIXELS) for scene in scenes])
    for path, scene in zip(paths, scenes, strict=True) if word else ():
        text = phrase(scene.shape, word, scene.background, scene.size, scene.place)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return paths


def write_class_pictures(folder: Path, shape: str) -> list[Path]:
    """Write pictures of a class as varied as the class is, always the same, for prior preservation."""
    rng = np.random.default_rng(derive_seed("class pictures", shape))
    scenes = [random_scene(rng, shape=shape) for _ in range(CLASS_PICTURES)]
    return write_pictures(folder, [draw(scene, PHOTO_PIXELS) for scene in scenes])


def write_pictures(folder: Path, pictures: Sequence[Image.Image]) -> list[Path]:
    """Write pictures as PNG, named by their numbers."""
    paths = [folder / f"{number}.png" for number in range(len(pictures))]
    folder.mkdir(parents=True, exist_ok=True)
    for picture, path in zip(pictures, paths, strict=True):
        atomic_files.save_png(picture, path)
    return paths


def split_backgrounds(subject: str) -> tuple[list[str], list[str]]:
    """Return the backgrounds that a subject's photos have, three to five, and two that none of them has."""
    free = SUBJECTS[subject].backgrounds
    unseen = free[1::3][:2]
    return [name for name in free if name not in unseen][:5], unseen
