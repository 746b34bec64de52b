"""Two plots: bars of seconds and samples a second, and lines of losses."""

import statistics
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from utils.lab.step_timing import PARTS

LETTERS, ROW, HEAD, BAR, ROOM = 20, 36, 136, 560, 120  # of the plot, in pixels; ROOM is for the number behind a bar
INK, FAINT_INK, PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
# By Okabe and Ito: told apart by the colour-blind, too.
PART_COLOURS = dict(zip(PARTS, ("#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#BBBBBB"), strict=True))
WHOLE, SPEED = "#7F8A99", "#D55E00"
WINDOW = 25  # steps that a point of the plot is the mean of
SIZE, MARGIN = (900, 420), 60  # of the plot, in pixels
COLOURS = (
    "#202124",
    "#9aa0a6",
    "#1a73e8",
    "#d93025",
    "#188038",
    "#f9ab00",
    "#9334e6",
    "#12b5cb",
    "#e8710a",
    "#c2185b",
)


def draw_bars(title: str, measured: Sequence[Any]) -> Image.Image:
    """Draw a row for each measurement: the seconds of a step and the samples a second.

    Args:
        measured: Each has `label`, `seconds`, `samples_per_second` (None if it failed), and `parts`: seconds by the
            names of `PARTS`, or None.
    """
    font = ImageFont.load_default(LETTERS)
    left = round(max(font.getlength(one.label) for one in measured)) + 2 * LETTERS
    right = left + BAR + ROOM
    sheet = Image.new("RGB", (right + BAR + ROOM, HEAD + ROW * len(measured) + LETTERS), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((LETTERS, ROW), title, INK, font, anchor="lm")
    write_legend(draw, font, (LETTERS, 2 * ROW), any(one.parts for one in measured))
    longest = max((max(one.seconds, sum((one.parts or {}).values())) for one in measured if one.seconds), default=1)
    fastest = max((one.samples_per_second for one in measured if one.seconds), default=1)
    for place, head in ((left, "seconds a step"), (right, "samples a second")):
        draw.text((place, 3 * ROW), head, INK, font, anchor="lm")
        draw.line((place, HEAD, place, sheet.height - LETTERS), INK)
    for number, one in enumerate(measured):
        middle = HEAD + ROW * number + ROW // 2
        draw.text((LETTERS, middle), one.label, INK, font, anchor="lm")
        if one.seconds is None:
            draw.text((left + LETTERS // 2, middle), "failed", FAINT_INK, font, anchor="lm")
            continue
        end, tick = draw_bar(draw, (left, middle), stack_of(one), BAR / longest), left + one.seconds * BAR / longest
        if one.parts:
            draw.line((tick, middle - ROW // 2 + 2, tick, middle + ROW // 2 - 2), INK, 3)
        draw.text((max(end, tick) + LETTERS // 2, middle), f"{one.seconds:.3g}", INK, font, anchor="lm")
        end = draw_bar(draw, (right, middle), [(one.samples_per_second, SPEED)], BAR / fastest)
        draw.text((end + LETTERS // 2, middle), f"{one.samples_per_second:.3g}", INK, font, anchor="lm")
    return sheet


def stack_of(one: Any) -> list[tuple[float, str]]:
    """Return seconds and colours, from left to right."""
    return [(one.parts[part], PART_COLOURS[part]) for part in PARTS] if one.parts else [(one.seconds, WHOLE)]


def draw_bar(draw: ImageDraw.ImageDraw, start: tuple[int, int], stack: list[tuple[float, str]], scale: float) -> float:
    """Draw values beside each other, from the middle of a bar's left edge; return where its right edge is."""
    place, middle = start
    for value, colour in stack:
        draw.rectangle((place, middle - ROW // 3, place + value * scale, middle + ROW // 3), colour)
        place += value * scale
    return place


def write_legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, start: tuple[int, int], has_parts: bool
) -> None:
    """Write what the colours of a step's parts mean, if there are any."""
    place, middle = start
    for part, colour in PART_COLOURS.items() if has_parts else ():
        draw.rectangle((place, middle - LETTERS // 2, place + LETTERS, middle + LETTERS // 2), colour)
        draw.text((place + 1.5 * LETTERS, middle), part, INK, font, anchor="lm")
        place += round(font.getlength(part)) + 3 * LETTERS
    if has_parts:
        draw.line((place, middle - LETTERS // 2, place, middle + LETTERS // 2), INK, 3)
        draw.text((place + LETTERS // 2, middle), "as it runs, without stops between parts", INK, font, anchor="lm")


def draw_lines(title: str, losses: dict[str, list[float]]) -> Image.Image:
    """Draw a smoothed line for each run's losses over the steps, with its name at the right."""
    smooth = {name: smoothed(values) for name, values in losses.items()}
    top = max(max(values) for values in smooth.values())
    low = min(min(values) for values in smooth.values())
    steps = max(len(values) for values in losses.values())
    sheet = Image.new("RGB", (SIZE[0] + 260, SIZE[1] + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN / 3), title, COLOURS[0], ImageFont.load_default(18))
    for number in range(5):
        value = low + (top - low) * number / 4
        y = MARGIN + SIZE[1] * (top - value) / (top - low or 1)
        draw.line((MARGIN, y, SIZE[0], y), "#dadce0")
        draw.text((MARGIN - 8, y), f"{value:.3f}", COLOURS[1], font, anchor="rm")
    for number, (name, values) in enumerate(smooth.items()):
        colour, across = COLOURS[number % len(COLOURS)], (SIZE[0] - MARGIN) / max(1, len(values) - 1)
        points = [
            (MARGIN + across * index, MARGIN + SIZE[1] * (top - value) / (top - low or 1))
            for index, value in enumerate(values)
        ]
        draw.line(points, colour, 2)
        draw.line((SIZE[0] + 16, MARGIN + 22 * number + 8, SIZE[0] + 40, MARGIN + 22 * number + 8), colour, 3)
        draw.text((SIZE[0] + 48, MARGIN + 22 * number), name, COLOURS[0], font)
    draw.text((SIZE[0] / 2, MARGIN * 1.3 + SIZE[1]), f"steps {WINDOW} to {steps}", COLOURS[1], font)
    return sheet


def smoothed(values: list[float]) -> list[float]:
    """Return the means of windows that move by one step."""
    window = min(WINDOW, len(values))
    return [statistics.fmean(values[end - window : end]) for end in range(window, len(values) + 1)]
