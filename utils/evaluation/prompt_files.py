"""Files of prompts to evaluate with: a prompt a line, or the lists of the DreamBooth paper's data set."""

import re
from pathlib import Path

from utils.core.errors import UserError

PLAIN = "prompts"  # name of the list in a file that is no more than a list

_START = re.compile(r"prompt_list\s*=\s*\[")
_ENTRY = re.compile(r"""(['"])(?P<prompt>.*)\1\.format\(unique_token, class_token\),?""")


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Read lists of prompts, each with one {} for the subject: "sks dog" to draw with, "dog" to measure with.

    Args:
        path: prompts_and_classes.txt of the paper's data set (github.com/google/dreambooth), or a text file with a
            prompt on each line. Empty lines do not count.

    Returns:
        The data set's "object" and "live subject", or "prompts" alone.

    Raises:
        UserError: The file cannot be read, or one of its lines is no such prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read as text in UTF-8: {error}.") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    is_plain = not any(_START.fullmatch(line) for _, line in lines)
    lists = {PLAIN: lines} if is_plain else find_lists(lines, path)
    for name, entries in lists.items():
        if not entries:
            raise UserError(f"{path} has no prompts{'' if is_plain else f' for {name}'}: write one on each line.")
        for number, prompt in entries:
            check_prompt(prompt, f"{path}, line {number}")
    return {name: [prompt for _, prompt in entries] for name, entries in lists.items()}


def find_lists(lines: list[tuple[int, str]], path: str | Path) -> dict[str, list[tuple[int, str]]]:
    """Return the lists of the data set's file under their titles, each prompt with the number of its line.

    Args:
        lines: The file's, numbered, without empty ones.

    Raises:
        UserError: A list has no end, or a line that is no prompt.
    """
    lists, name, is_open = {}, PLAIN, False
    for number, line in lines:
        entry = _ENTRY.fullmatch(line)
        if is_open and entry:
            lists[name].append((number, entry["prompt"].replace("{0} {1}", "{}")))
        elif is_open and line != "]":
            expected = "'a {0} {1} ….'.format(unique_token, class_token), or the list's ]"
            raise UserError(f"{path}, line {number}: {line!r} is not {expected}. Download the file again.")
        elif _START.fullmatch(line):
            is_open = True
            lists.setdefault(name, [])
        else:
            is_open, name = False, line.removesuffix("Prompts").strip().lower()
    if is_open:
        raise UserError(f"{path} ends at line {lines[-1][0]} within a list: ] is missing. Download the file again.")
    return lists


def check_prompt(prompt: str, place: str) -> None:
    """Raise UserError unless a prompt has one {} and no other braces."""
    if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", "")):
        raise UserError(f"{place}: {prompt!r} needs one {{}} for the subject and no other braces: 'a {{}} at night'.")
