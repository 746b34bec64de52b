"""What each photo shows, in words: from a text file beside it, from its name, or from a list of all."""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, list_first

STRATEGIES = ("instanceprompt", "textfile", "filename", "metadata")
METADATA_FILE = "metadata.jsonl"
COPY_NUMBER = re.compile(r"\s*(\(\d+\)|[ _-]+\d+)$")  # "a dog (2)" and "a dog_02" show what "a dog" does


def find_captions(
    strategy: str, folder: Path, paths: Sequence[Path], prompt: str | None, prepend: bool
) -> dict[Path, tuple[str, ...]]:
    """Return the captions of each photo; of several, a run draws one at each visit.

    Args:
        strategy: "instanceprompt": `prompt` for all; "textfile": the lines of `photo.txt` beside `photo.jpg`;
            "filename": the name, with "_" for spaces and without a number at its end; "metadata": the `text`, or the
            texts, of that line of metadata.jsonl whose `file_name` is the photo's path below `folder`.
        folder: Of the photos.
        prompt: The instance prompt.
        prepend: Begin each caption with the instance prompt and a space.

    Raises:
        UserError: Photos lack a caption (all are listed), or captions cannot be read.
    """
    if strategy == "instanceprompt":
        return dict.fromkeys(paths, (prompt,))
    found = {
        "textfile": _read_text_files,
        "filename": _read_names,
        "metadata": _read_metadata,
    }[strategy](folder, paths)
    if lacking := [path for path in paths if not found.get(path)]:
        where = {"textfile": "a text file beside them", "metadata": f"a line in {folder / METADATA_FILE}"}
        raise UserError(
            f"{len(lacking)} of {len(paths)} photos have no caption: {list_first(lacking)}. "
            f"--caption_strategy {strategy} wants {where.get(strategy, 'words in their names')} for each."
        )
    start = f"{prompt} " if prepend else ""
    return {path: tuple(start + text for text in found[path]) for path in paths}


def _read_text_files(folder: Path, paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Return the lines of the text file beside each photo that has one, without empty lines."""
    found = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            text = beside.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"The captions in {beside} cannot be read: {error}. Save it again as UTF-8.") from error
        found[path] = [line.strip() for line in text.splitlines() if line.strip()]
    return found


def _read_names(folder: Path, paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Return what each photo's name says, where there are letters in it."""
    words = {path: COPY_NUMBER.sub("", path.stem).replace("_", " ").strip() for path in paths}
    return {path: [text] for path, text in words.items() if any(sign.isalpha() for sign in text)}


def _read_metadata(folder: Path, paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Return the captions of metadata.jsonl; it may name other files of the folder, but none outside or missing."""
    path, found = folder / METADATA_FILE, {}
    try:
        # Not `splitlines`, which ends a line at signs that a caption may hold, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. --caption_strategy metadata needs it.") from error
    known = {_composed(photo.relative_to(folder).as_posix()): photo for photo in paths}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, texts = _read_line(f"{path}, line {number}", line)
        photo = known.get(_composed(name))
        if photo in found:
            raise UserError(f"{path}, line {number}: {name!r} has a line already. Put both captions into one list.")
        if photo is None and not (_is_below(name) and (folder / name).is_file()):
            why = "is not in that folder" if _is_below(name) else "leaves the folder"
            raise UserError(f"{path}, line {number}: {name!r} {why}. Mend or remove the line.")
        if photo is not None:
            found[photo] = texts
    return found


def _composed(name: str) -> str:
    """Return a name in one spelling, because macOS may store "é" as two characters."""
    return unicodedata.normalize("NFC", name)


def _read_line(place: str, line: str) -> tuple[str, list[str]]:
    """Return the file name and the captions of a line of metadata."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no valid JSON: {error}.") from error
    texts = entry.get("text") if isinstance(entry, dict) else None
    texts = [texts] if isinstance(texts, str) else texts
    name = entry.get("file_name") if isinstance(entry, dict) else None
    is_right = isinstance(name, str) and isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_right:
        raise UserError(f'{place} must be an object like {{"file_name": "dog.jpg", "text": "a dog on grass"}}.')
    return name, [text.strip() for text in texts if text.strip()]


def _is_below(name: str) -> bool:
    """Say whether a relative path stays below its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
