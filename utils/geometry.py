"""Sizes of pictures in pixels, always width before height, and where a crop of one lies; numbers only."""

import random
import re
from typing import NamedTuple

_TEXT = re.compile(r"([0-9]{1,6})(?:[xX×]([0-9]{1,6}))?")
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


CROP_STYLES = ("random", "center", "shifted_center")


def crop_box(size: tuple[int, int], target: Size, style: str, chance: random.Random) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of a picture that covers it; `style` is one of `CROP_STYLES`."""
    margins = [edge - wanted for edge, wanted in zip(size, target)]
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
    moved = [m // 2 + round(part * edge / _LARGEST_SHIFT) for m, part, edge in zip(margins, shift, target)]
    left, top = (min(max(place, 0), margin) for place, margin in zip(moved, margins))
    return left, top
