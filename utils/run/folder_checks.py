"""Checks of where a run reads and writes, before anything is there."""

from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.data.class_images import describe_source
from utils.data.concepts import Concept, read_concepts
from utils.flags.flag_checks import is_text, messages_if
from utils.hub import publish
from utils.run import checkpoints

FILES, FOLDERS = ("args.json", "metrics.jsonl", "README.md"), ("samples",)  # that a run writes, whatever it trains


def find_folder_problems(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each folder that is not there or lies where it would be mistaken for another.

    Args:
        flags: All flags by name.
    """
    output, resume_from = Path(flags["output_dir"]), flags["resume_from_checkpoint"]
    try:
        subjects = read_concepts(flags)
    except UserError:  # which is said by the check of the concepts
        subjects = []
    photos, masks, classes = (
        {one.flag_name(key): Path(folder) for one in subjects if (folder := getattr(one, key))}
        for key in ("instance_data_dir", "mask_data_dir", "class_data_dir")
    )
    given = photos | masks | {"--output_dir": output} | classes
    reasons = {flag: _why_unusable(folder) for flag, folder in given.items()}
    if any(reasons.values()):
        return [f"{flag} {given[flag]} cannot be used: {why}. Use another." for flag, why in reasons.items() if why]
    saved = checkpoints.list_checkpoints(output)
    left = [] if checkpoints.resumes_own_run(output, resume_from) else [*saved, *publish.result_files(output)[:1]]
    held = f"{output} holds {', '.join(path.name for path in left)} of an earlier run. Use another"
    held += ", or --resume_from_checkpoint latest" if saved else ""
    kinds = {name: (output / name).is_dir() for name in (*FILES, *FOLDERS) if (output / name).exists()}
    wrong = ", ".join(name for name, is_folder in kinds.items() if is_folder != (name in FOLDERS))
    trained, outside = "its images would be trained on as", "Choose a folder outside."
    return messages_if(
        *((folder.is_file(), f"{flag} {folder} is not a folder.") for flag, folder in (photos | masks).items()),
        *((not folder.exists(), f"{flag} {folder} does not exist.") for flag, folder in (photos | masks).items()),
        *((True, f"{inside}: {trained} photos. {outside}") for inside in _list_below(photos, given)),
        *((True, f"{inside}: {trained} class images. {outside}") for inside in _list_below(classes, given)),
        *((folder.is_file(), f"{flag} {folder} is not a folder.") for flag, folder in classes.items()),
        *((True, sentence) for sentence in _find_shared(subjects)),
        (output.is_file(), f"--output_dir {output} is a file. Use another name."),
        (left, f"--output_dir {held}."),
        (
            wrong,
            f"--output_dir {output} has {wrong}, which a run would write itself. Move it, or use another.",
        ),
    )


def _why_unusable(folder: Path) -> str:
    """Say why there cannot be a folder of that name, "" if there can be."""
    if not is_text(str(folder)):
        return "its name is not written in UTF-8"
    try:
        folder.stat()
    except FileNotFoundError:
        return "it is a link to nowhere" if folder.is_symlink() else ""
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a zero byte
        return str(error)
    return ""


def _list_below(outer: dict[str, Path], given: dict[str, Path]) -> list[str]:
    """Return, for each of some folders, the flags whose folders are that one or lie below it, and where.

    Concepts may share a folder of photos, or one of class images.
    """
    found = []
    for flag, folder in outer.items():
        own = folder.resolve()
        inside = {
            other: resolved
            for other, place in given.items()
            if (resolved := place.resolve()).is_relative_to(own) and not (other in outer and resolved == own)
        }
        where = flag + ("" if flag == "--class_data_dir" else f" {folder}")
        found += [f"{' and '.join(inside)} in {where}"] if inside else []
    return found


def _find_shared(subjects: list[Concept]) -> list[str]:
    """Return a sentence for each folder of class images that is to hold those of several prompts."""
    prompts = {}
    for one in subjects:
        if one.class_data_dir:
            source = describe_source(one.class_prompt or "", one.class_guidance_scale)
            prompts.setdefault(Path(one.class_data_dir).resolve(), []).append(source)
    return [
        f"class_data_dir {folder} cannot hold the class images of {' and '.join(map(repr, dict.fromkeys(texts)))}."
        for folder, texts in prompts.items()
        if len(set(texts)) > 1
    ]
