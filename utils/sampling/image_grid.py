"""Draw images side by side on one sheet, with labels."""

import functools
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT_INK, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
_MAX_LINES = 3  # of one text, unless told; the rest becomes "…"


def make_grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    lines: int = _MAX_LINES,
) -> Image.Image:
    """Draw images row by row on white, each in the middle of a cell that has the size of the largest one.

    Args:
        images: mode "RGB", of any size; the last row may be short.
        columns: cells per row.
        labels: one text below each image, wrapped to the cell's width and shortened.
        title: a text above the grid.
        row_labels: one text at the left of each row.
        lines: after so many, a text is shortened.

    Returns:
        One mode "RGB" image.

    Raises:
        ValueError: there is no image or no column, or the number of labels does not fit.
    """
    _check(images, columns, labels, row_labels)
    width, height = max(image.width for image in images), max(image.height for image in images)
    size = min(max(12, width // 20), 28)  # of the letters, in pixels; readable when the sheet is scaled to a screen
    gap, font = max(4, size // 2), ImageFont.load_default(size)
    texts = [_wrap(text, font, width, lines) for text in labels or [""] * len(images)]
    side = [_wrap(text, font, max(width // 2, 10 * size), lines) for text in row_labels or []]
    left = gap + (max(round(_width(text, font)) for text in side) + gap if side else 0)
    sheet_width = left + min(columns, len(images)) * (width + gap)
    title_font = ImageFont.load_default(round(size * 1.3))
    title = _wrap(title or "", title_font, sheet_width - 2 * gap, lines)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    text_heights = [max(_height(texts[index], font) for index in row) + gap // 2 for row in rows]
    top = gap + (_height(title, title_font) + gap if title else 0)
    sheet = Image.new("RGB", (sheet_width, top + sum(height + below + gap for below in text_heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (gap, gap), title, title_font, _INK)
    for number, row in enumerate(rows):
        if side:
            _write(draw, (gap, top + (height - _height(side[number], font)) // 2), side[number], font, _INK)
        for column, index in enumerate(row):
            image, x = images[index], left + column * (width + gap)
            sheet.paste(image, (x + (width - image.width) // 2, top + (height - image.height) // 2))
            _write(draw, (x + width / 2, top + height + gap // 2), texts[index], font, _FAINT_INK, align="center")
        top += height + text_heights[number] + gap
    return sheet


def _check(images, columns, labels, row_labels) -> None:
    """Raise a `ValueError` if the parts of a grid do not fit together."""
    if not images or columns < 1:
        raise ValueError(f"A grid needs an image and a column; it got {len(images)} images and {columns} columns.")
    rows = -(-len(images) // columns)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels do not fit {len(images)} images; give one for each.")
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels do not fit {rows} rows; give one for each.")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = _MAX_LINES) -> str:
    """Break a text between words, or within one that is too long, to at most so many lines of `width` pixels."""
    rest, lines = "".join(map(_drawable, " ".join(text.split()))), []
    while rest and len(lines) < most:
        end = _count_fitting(rest, font, width)
        if end < len(rest) and len(lines) == most - 1:
            rest = rest[: _count_fitting(rest, font, width - font.getlength("…"))].rstrip() + "…"
            end = len(rest)
        elif end < len(rest) and " " in rest[1 : end + 1]:
            end = rest.rindex(" ", 1, end + 1)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return "\n".join(lines)


@functools.lru_cache(maxsize=1024)
def _drawable(character: str) -> str:
    """Take the accents off a character that Pillow's font lacks; one without a plainer form is drawn as a box."""
    font = ImageFont.load_default(12)
    if bytes(font.getmask(character)) != bytes(font.getmask("\uffff")):
        return character
    if unicodedata.category(character) == "Pd":
        return "-"
    return "".join(part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part))


def _count_fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Count how many of a text's first characters fit into `width` pixels; at least one."""
    return max(1, bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count])))


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    """Measure the distance between two lines, in pixels."""
    return round(font.size * 1.3)


def _height(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Measure the height of wrapped lines, in pixels."""
    return len(text.splitlines()) * _line_height(font)


def _width(text: str, font: ImageFont.FreeTypeFont) -> float:
    """Measure the widest of wrapped lines, in pixels."""
    return max((font.getlength(line) for line in text.splitlines()), default=0.0)


def _write(draw: ImageDraw.ImageDraw, position, text: str, font: ImageFont.FreeTypeFont, ink, align="left") -> None:
    """Write wrapped lines below `position`, the top of their left edge or (align="center") of their middle."""
    x, y = position
    for line in text.splitlines():
        middle = y + _line_height(font) / 2
        draw.text((x, middle), line, ink, font, anchor="lm" if align == "left" else "mm")
        y += _line_height(font)
