"""Sizes of pictures in pixels, always width before height, and where a crop of one lies; numbers only."""

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

_TEXT = re.compile(r"([0-9]{1,6})(?:[xX×]([0-9]{1,6}))?")
_LARGEST_RATIO = 4  # of a bucket's edges; a longer picture is cut
_FREE_AREA = 0.1  # by which a bucket's area may differ from the resolution's
_LARGEST_STEP, _STEPS_AN_EDGE = 64, 8  # of a bucket's edges, in pixels, and in steps of the resolution's shorter edge
_LARGEST_SHIFT = 10  # a crop moves by at most this fraction of its own edge: a tenth, as DeepFloyd trained IF


class Size(NamedTuple):
    """A width and a height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        """Return what `parse` reads: 64 for a square, else WIDTHxHEIGHT such as 96x64."""
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"

    @classmethod
    def of_config(cls, edges: int | list[int]) -> "Size":
        """Return the size that a model's config gives as one edge or as height and width."""
        height, width = edges if isinstance(edges, list) else (edges, edges)
        return cls(width, height)

    @classmethod
    def parse(cls, text: int | str) -> "Size":
        """Read the edge of a square (512) or WIDTHxHEIGHT (96x64).

        Raises:
            ValueError: It is neither, or an edge is 0.
        """
        match = _TEXT.fullmatch(str(text).strip())
        size = match and cls(int(match[1]), int(match[2] or match[1]))
        if not size or 0 in size:
            raise ValueError(
                f"{str(text).strip() or 'an empty text'} is no size: give the edge of a square in pixels, such as "
                "512, or WIDTHxHEIGHT, such as 96x64."
            )
        return size


def parse_list(text: int | str) -> list[Size]:
    """Read sizes with commas between them, such as 64,96,64x96.

    Raises:
        ValueError: One of them is none.
    """
    return [Size.parse(part) for part in str(text).split(",")]


def find_size_problems(flag: str, text: int | str | None, many: bool = False) -> list[str]:
    """Return a sentence if a flag's value is no size, or with `many` no list of sizes; None is unset.

    Args:
        flag: With its dashes.
    """
    try:
        if text is not None:
            parse_list(text) if many else Size.parse(text)
    except ValueError as error:
        advice = " Put a comma between two sizes." if many else ""
        return [f"{flag} {text}: {error}{advice}" if many else f"{flag} {error}"]
    return []


def quarter(size: Size) -> Size:
    """Return what IF's stage II enlarges to a size."""
    return Size(size.width // 4, size.height // 4)


def cover(size: tuple[int, int], target: Size) -> tuple[int, int]:
    """Return the smallest (width, height) of the same shape, rounded, that is at no edge smaller than the target."""
    width, height = size
    if target.width * height >= target.height * width:  # the width decides; no fractions, which would be inexact
        return target.width, round(height * target.width / width)
    return round(width * target.height / height), target.height


class Shrinking(NamedTuple):
    """Which pictures are cut out of a larger version of themselves than one that just covers the crop.

    Attributes:
        maximum: Pictures whose `measure` is above it are shrunk to `wanted`, and the crop is cut out of that; None:
            all are shrunk until they just cover the crop.
        wanted: The measure that they are given, if they then cover the crop.
        unit: One of `UNITS`.
    """

    maximum: int | None = None
    wanted: int | None = None
    unit: str = "pixel_area"


UNITS = ("pixel_area", "pixel")


def measure(size: tuple[int, int], unit: str) -> float:
    """Return how large a picture is, in pixels: its shorter edge, or by "pixel_area" the edge of a square as large."""
    return math.sqrt(size[0] * size[1]) if unit == "pixel_area" else min(size)


def find_shrinking_problems(maximum: int | None, wanted: int | None) -> list[str]:
    """Return a sentence if --maximum_image_size and --target_downsample_size do not go together; None is unset."""
    if (maximum is None) != (wanted is None):
        return ["--maximum_image_size and --target_downsample_size need each other."]
    if maximum is not None and 0 < maximum < wanted:
        return [f"--target_downsample_size {wanted} is above --maximum_image_size {maximum}: nothing would shrink."]
    return []


def scaled_size(size: tuple[int, int], target: Size, shrinking: Shrinking) -> tuple[int, int]:
    """Return the (width, height) that a picture is scaled to before a crop of the target's size is cut out of it."""
    smallest = cover(size, target)
    if shrinking.maximum is None or measure(size, shrinking.unit) <= shrinking.maximum:
        return smallest
    factor = shrinking.wanted / measure(size, shrinking.unit)
    wanted = tuple(round(edge * factor) for edge in size)
    return wanted if all(edge >= least for edge, least in zip(wanted, smallest, strict=True)) else smallest


def bucket_step(target: Size, factor: int) -> int:
    """Return what the edges of buckets are multiples of, unless told: 64 px at 512, less below, as the model allows.

    Args:
        factor: What the model's edges must be multiples of.
    """
    return max(min(_LARGEST_STEP, min(target) // _STEPS_AN_EDGE) // factor * factor, factor)


def list_buckets(target: Size, step: int, unit: str) -> list[Size]:
    """Return the sizes that pictures of all shapes from 1:4 to 4:1 are cut to, the widest last.

    Args:
        target: The resolution.
        step: What the edges are multiples of, in pixels.
        unit: "pixel_area": about as many pixels as the target, at most a tenth more or less; "pixel": the target's
            shorter edge, and only the other one is a multiple. The target itself is always among them.
    """
    area, shorter = target.width * target.height, min(target)
    if unit == "pixel":
        longest = _LARGEST_RATIO * shorter // step * step
        pairs = {(shorter, longer) for longer in (shorter, *range(-(-shorter // step) * step, longest + 1, step))}
    else:
        widths = range(step, math.isqrt(int(area * (1 + _FREE_AREA))) + 1, step)
        pairs = {(edge, turn(area / edge / step) * step) for edge in widths for turn in (math.floor, math.ceil)}
        pairs = {(a, b) for a, b in pairs if a <= b <= _LARGEST_RATIO * a and abs(a * b - area) <= _FREE_AREA * area}
    edges = {edges for pair in pairs for edges in (pair, pair[::-1])} | {tuple(target)}
    return sorted((Size(*pair) for pair in edges), key=lambda size: size.width / size.height)


def find_step_problems(target: Size, step: int | None, factor: int, unit: str) -> list[str]:
    """Return a sentence if --bucket_step does not fit the model or leaves one bucket alone; None is unset.

    Args:
        factor: What the model's edges must be multiples of.
    """
    if step is None:
        return []
    if step % factor:
        return [f"--bucket_step {step}: the model needs multiples of {factor}."]
    alone = f"--bucket_step {step} leaves no bucket beside the resolution {target}: give a smaller one."
    return [alone] if list_buckets(target, step, unit) == [target] else []


def cut_off(size: tuple[int, int], target: Size) -> float:
    """Return the share of a picture's pixels that a crop of the target's shape leaves out, in [0, 1)."""
    shape, wanted = size[0] / size[1], target.width / target.height
    return 1 - min(shape, wanted) / max(shape, wanted)


def choose_bucket(size: tuple[int, int], buckets: Sequence[Size], target: Size) -> Size:
    """Return the bucket that cuts least off a picture; of two such ones, that whose area is nearer to the target's."""
    area = target.width * target.height
    return min(buckets, key=lambda bucket: (cut_off(size, bucket), abs(bucket.width * bucket.height - area), bucket))


CROP_STYLES = ("random", "center", "shifted_center")


class Crop(NamedTuple):
    """How a picture becomes what a model is given: scaled, cut, and perhaps mirrored."""

    scaled: tuple[int, int]  # width and height
    box: tuple[int, int, int, int]  # left, top, right and bottom, in what was scaled
    is_flipped: bool


def crop_box(size: tuple[int, int], target: Size, style: str, chance: random.Random) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of a picture that covers it; `style` is one of `CROP_STYLES`."""
    margins = [edge - wanted for edge, wanted in zip(size, target, strict=True)]
    left, top = (margin // 2 for margin in margins)
    if style == "random":
        left, top = (chance.randint(0, margin) for margin in margins)
    elif style == "shifted_center":
        left, top = shifted_center(*margins, target, (chance.uniform(-1, 1), chance.uniform(-1, 1)))
    return left, top, left + target.width, top + target.height


def shifted_center(margin_x: int, margin_y: int, target: Size, shift: tuple[float, float]) -> tuple[int, int]:
    """Return (left, top) of a crop that is moved off the centre, in pixels.

    Args:
        margin_x: Pixels of the picture's width beyond the crop's, 0 or more.
        margin_y: The same of the height.
        target: The crop's size.
        shift: To the right and down, each in [-1, 1]; 1 is a tenth of the crop's edge, or less at the picture's edge.
    """
    margins = margin_x, margin_y
    moved = [
        m // 2 + round(part * edge / _LARGEST_SHIFT) for m, part, edge in zip(margins, shift, target, strict=True)
    ]
    left, top = (min(max(place, 0), margin) for place, margin in zip(moved, margins, strict=True))
    return left, top
