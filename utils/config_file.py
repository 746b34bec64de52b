"""Reading an args.json back as flags, so that argparse checks it like the command line."""

import difflib
import json
from pathlib import Path
from typing import Any

from utils.errors import InputError


def parse_with_config(parser, argv: list[str]) -> Any:
    """Parse a command line over the file that its --config names, if it names one; mistakes end in `parser.error`."""
    args = parser.parse_args(argv)
    if not args.config:
        return args
    known = [action for action in parser._actions if action.dest not in ("help", "config")]
    switches = {action.dest: any(word.startswith("--no-") for word in action.option_strings) for action in known}
    try:
        return parser.parse_args([*read_flags(args.config, switches), *argv])
    except InputError as error:
        return parser.error(str(error))


def read_flags(path: str, switches: dict[str, bool]) -> list[str]:
    """Return the content of a JSON file of flags and values as words of a command line.

    Args:
        path: The file; `null` leaves a flag at its default, a list gives one flag several values.
        switches: Every known flag without its dashes; True for those that are on or off.

    Raises:
        InputError: The file cannot be read, holds no object, has an unknown key, or a value of the wrong type.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no JSON object of flags and values.")
    return [word for key, value in values.items() for word in _words(path, key, value, switches)]


def _words(path: str, key: str, value: object, switches: dict[str, bool]) -> list[str]:
    """Return the words that set one flag."""
    if key not in switches:
        near = difflib.get_close_matches(key, switches, n=1)
        raise InputError(f"--config {path} has the unknown key {key!r}." + (f" Meant: {near[0]!r}?" if near else ""))
    if value is None:
        return []
    if switches[key] != isinstance(value, bool) or isinstance(value, dict):
        wanted = "true or false" if switches[key] else "a value"
        raise InputError(f"--config {path} has {key!r}: {json.dumps(value)}, but that flag takes {wanted}.")
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]
