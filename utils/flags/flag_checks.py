"""Checks of flags' values that need no knowledge of what the flags do."""

import importlib.util
import math
from typing import Any

RANGES = {
    "any": lambda value: True,
    "above 0": lambda value: 0 < value < math.inf,
    "0 or more": lambda value: 0 <= value < math.inf,
    "from 1 to 10,000": lambda value: 1 <= value <= 10_000,
    "1 or more": lambda value: 1 <= value < math.inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def find_out_of_range(values: dict[str, Any], ranges: dict[str, str]) -> list[str]:
    """Return a sentence for each number that is out of its range; NaN is in none, None is unset.

    Args:
        ranges: Names of values, and for each a key of `RANGES`.
    """
    return [
        f"--{name} {values[name]} is out of range: it must be {words}."
        for name, words in ranges.items()
        if values.get(name) is not None and not RANGES[words](values[name])
    ]


def usual_ranges(flags: dict[str, Any]) -> dict[str, str]:
    """Return the usual range of each flag that is a number: whole numbers 1 or more, fractions 0 or more."""
    numbers = {name: value for name, value in flags.items() if type(value) in (int, float)}
    return {name: "1 or more" if type(value) is int else "0 or more" for name, value in numbers.items()}


def find_unused(flags: dict[str, Any], needs: dict[str, str]) -> list[str]:
    """Return a sentence for each flag that is given without another that it needs.

    Args:
        needs: For a flag, or a flag and its value, another or another and its value.
    """
    return [
        f"--{name} has no effect without --{need}."
        for name, need in needs.items()
        if is_given(flags, name) and not is_given(flags, need)
    ]


def is_given(flags: dict[str, Any], words: str) -> bool:
    """Say whether a flag is set, or has the value that is named behind it."""
    name, _, value = words.partition(" ")
    return str(flags.get(name)) == value if value else bool(flags.get(name))


def messages_if(*checks: tuple[Any, str]) -> list[str]:
    """Return the sentences of those (condition, sentence) pairs whose condition is true."""
    return [sentence for condition, sentence in checks if condition]


def is_text(value: str) -> bool:
    """Say whether a text can be written in UTF-8; Python's stand-ins for bytes that are no text cannot."""
    return not any("\ud800" <= sign <= "\udfff" for sign in value)


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
