"""Checks of where a run reads and writes, before anything is there."""

from pathlib import Path

from utils import checkpoints, hub
from utils.flag_checks import problems_that_hold

FILES, FOLDERS = ("args.json", "metrics.jsonl", "README.md"), ("samples",)  # that a run writes, whatever it trains


def find_folder_problems(
    photos: Path | None, output: Path, classes: Path | None, resume_from: str | None
) -> list[str]:
    """Return a sentence for each folder that is not there or lies where it would be mistaken for another.

    Args:
        photos: --instance_data_dir; None if it is not given.
        output: --output_dir.
        classes: Where class images are or will be; None without prior preservation.
        resume_from: --resume_from_checkpoint.
    """
    given = {"--instance_data_dir": photos, "--output_dir": output, "--class_data_dir": classes}
    given = {flag: folder for flag, folder in given.items() if folder}
    reasons = {flag: _why_unusable(folder) for flag, folder in given.items()}
    if any(reasons.values()):
        return [f"{flag} {given[flag]} cannot be used: {why}. Use another." for flag, why in reasons.items() if why]
    inside, swallowed = _list_below("--instance_data_dir", given), _list_below("--class_data_dir", given)
    saved = checkpoints.list_checkpoints(output)
    left = [] if checkpoints.is_of(output, resume_from) else [*saved, *hub.result_files(output)[:1]]
    held = f"{output} holds {', '.join(path.name for path in left)} of an earlier run. Use another"
    held += ", or --resume_from_checkpoint latest" if saved else ""
    kinds = {name: (output / name).is_dir() for name in (*FILES, *FOLDERS) if (output / name).exists()}
    wrong = ", ".join(name for name, is_folder in kinds.items() if is_folder != (name in FOLDERS))
    return problems_that_hold(
        (photos and photos.is_file(), f"--instance_data_dir {photos} is not a folder."),
        (photos and not photos.exists(), f"--instance_data_dir {photos} does not exist."),
        (inside, f"{inside} in --instance_data_dir {photos}: all pictures below it count as photos."),
        (swallowed, f"{swallowed} in --class_data_dir: all pictures below it count as class images."),
        (classes and classes.is_file(), f"--class_data_dir {classes} is not a folder."),
        (output.is_file(), f"--output_dir {output} is a file. Use another name."),
        (left, f"--output_dir {held}."),
        (
            wrong,
            f"--output_dir {output} has {wrong}, in the place of what a run writes. Move it away, or use another.",
        ),
    )


def _why_unusable(folder: Path) -> str:
    """Say why there cannot be a folder of that name, "" if there can be."""
    if any("\ud800" <= sign <= "\udfff" for sign in str(folder)):  # Python's stand-ins for bytes that are no text
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


def _list_below(flag: str, given: dict[str, Path]) -> str:
    """Return the other flags, with "and" between them, whose folders are the one of a flag or lie below it."""
    others = {other: folder.resolve() for other, folder in given.items() if other != flag and flag in given}
    return " and ".join(other for other, folder in others.items() if folder.is_relative_to(given[flag].resolve()))
