"""Reading an args.json back as flags, so that argparse checks it like the command line."""

import argparse
import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.core.errors import UserError


def make_grouped_parser(doc: str, groups: Sequence[Callable]) -> argparse.ArgumentParser:
    """Return a script's parser.

    Args:
        doc: Of the script; its first line describes it.
        groups: Functions that add flags, given `add` and `switch`; their docstrings name the groups. A switch is set
            by `--flag` and undone by `--no-flag`, so that the command line can undo one of --config.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir DIR --instance_prompt PROMPT [...]",
        description=doc.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="ARGS_JSON", help="Repeat the run of this args.json; other flags win.")
    for add_flags in groups:
        group = parser.add_argument_group(add_flags.__doc__.removeprefix("Add the flags of ").rstrip("."))
        action = argparse.BooleanOptionalAction
        add_flags(group.add_argument, functools.partial(group.add_argument, action=action, default=False))
    return parser


def parse_with_config(parser, argv: list[str]) -> Any:
    """Parse a command line over the file that its --config names, if it names one; mistakes end in `parser.error`.

    The --hub_token is taken out of sys.argv, which trackers copy into their files.
    """
    parser.error = functools.partial(say_without_tokens, parser.error)
    args = parser.parse_args(argv)
    if args.config:
        args = _parse_over_file(parser, args.config, argv)
    if args.hub_token:
        sys.argv[:] = [word.replace(args.hub_token, "<token>") for word in sys.argv]
    return args


def _parse_over_file(parser, path: str, argv: list[str]) -> Any:
    """Parse a command line over the values of a file."""
    known = [action for action in parser._actions if action.dest not in ("help", "config")]
    switches = {action.dest: any(word.startswith("--no-") for word in action.option_strings) for action in known}
    lists = {action.dest for action in known if action.nargs == "+"}
    try:
        return parser.parse_args([*read_flags(path, switches, lists), *argv])
    except UserError as error:
        return parser.error(str(error))


def say_without_tokens(say: Callable[[str], Any], message: str) -> None:
    """Say a message of the parser, which repeats words that it does not know, without access tokens."""
    say(re.sub(r"\bhf_[\w-]+", "<token>", message))


def read_flags(path: str, switches: dict[str, bool], lists: set[str]) -> list[str]:
    """Return the content of a JSON file of flags and values as words of a command line.

    Args:
        path: The file; `null` leaves a flag at its default.
        switches: Every known flag without its dashes; True for those that are on or off.
        lists: Those flags that take several values, as a list.

    Raises:
        UserError: The file cannot be read, holds no object, has an unknown key, or a value of the wrong type.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds no JSON object of flags and values.")
    return [word for key, value in values.items() for word in _words(path, key, value, switches, lists)]


def _words(path: str, key: str, value: object, switches: dict[str, bool], lists: set[str]) -> list[str]:
    """Return the words that set one flag."""
    if key not in switches:
        near = difflib.get_close_matches(key, switches, n=1)
        raise UserError(f"--config {path} has the unknown key {key!r}." + (f" Meant: {near[0]!r}?" if near else ""))
    if value is None:
        return []
    values = value if isinstance(value, list) and key in lists else [value]
    if any(switches[key] != isinstance(one, bool) or isinstance(one, dict | list) for one in values):
        wanted = "true or false" if switches[key] else "a list of values" if key in lists else "a value"
        raise UserError(f"--config {path} has {key!r}: {json.dumps(value)}, but that flag takes {wanted}.")
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, values)]
    return [f"--{key}={value}"]


def flags_to_repeat(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags with which --config repeats a run, and does not continue it; without the token, a secret."""
    return {key: value for key, value in flags.items() if key not in ("config", "resume_from_checkpoint", "hub_token")}


def convert_flag(convert: Callable[[str], Any], text: str) -> Any:
    """Convert the text of a flag; a UserError becomes argparse's own message, with the name of the flag."""
    try:
        return convert(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
