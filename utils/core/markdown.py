"""Tables in Markdown that are also readable as plain text."""

from collections.abc import Sequence


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table with aligned columns.

    Args:
        heads: The names of the columns.
        rows: A cell for each column. A shorter row ends in a sentence that fills the rest of its line.
        texts: How many columns, from the left, hold text. The others hold numbers and are aligned at the right.
    """
    whole = [row for row in (heads, *rows) if len(row) == len(heads)]
    widths = [max(3, *(len(row[column]) for row in whole)) for column in range(len(heads))]
    widths[:texts] = [max(3, *(len(row[column]) for row in (heads, *rows))) for column in range(texts)]
    marks = ["<"] * texts + [">"] * (len(heads) - texts)
    rule = ["-" * width if mark == "<" else "-" * (width - 1) + ":" for width, mark in zip(widths, marks, strict=True)]
    return "\n".join(_join(row, widths, marks, texts) for row in (heads, rule, *rows))


def _join(row: Sequence[str], widths: list[int], marks: list[str], texts: int) -> str:
    """Return a line of the table."""
    if len(row) == len(widths):
        return (
            f"| {' | '.join(f'{cell:{mark}{width}}' for cell, mark, width in zip(row, marks, widths, strict=True))} |"
        )
    return f"| {' | '.join(f'{row[column]:<{widths[column]}}' for column in range(texts))} | {row[-1]} |"
