"""The output folder of a run, and folders in it that are complete or not there, however the run ends.

One run at a time works in an output folder. A folder in it is written under a hidden name, synced, and renamed. There
are three kinds of hidden names, none with the word that people and tools search for: `.saving-500-1a2b3c4d` is being
written. `.replaced-500-…` is the old checkpoint-500, until the new one is in place. `.removing-500-…` is on its way
out. A run that is killed leaves them, and `remove_leftovers` of the next one clears them away.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from utils.core import atomic_files
from utils.core.errors import UserError, cannot_write
from utils.run import checkpoints

logger = logging.getLogger(__name__)

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # in what torch says when it cannot write a file
HIDDEN_NAME = re.compile(r"\.(saving|replaced|removing)-(.+)-[0-9a-f]{8}")


def open_folder(output_dir: Path, flags: dict, step: int, resume_from: Path | None) -> None:
    """Make a run's output folder its own until it ends, clear it of what dead runs left, and write its args.json.

    Args:
        flags: The content of args.json; what differs from those beside `resume_from` is logged.
        step: At which the run begins; checkpoints beyond it are of another one, and set aside.

    Raises:
        UserError: It cannot be made or written, or another run is at work in it.
    """
    checkpoints.announce_changes(resume_from, step, flags)
    path = output_dir / checkpoints.ARGS_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        atomic_files.lock_for_life(path)
        remove_leftovers(output_dir)
        _set_aside_newer(output_dir, step)
        atomic_files.write_whole(path, json.dumps(flags, indent=2) + "\n", prepare=atomic_files.lock_for_life)
    except BlockingIOError as error:
        raise UserError(f"--output_dir {output_dir} is in use by another run. Wait, or use another folder.") from error
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used: {error.strerror}. Use another folder.") from error


def _set_aside_newer(output_dir: Path, step: int) -> None:
    """Rename checkpoints beyond a step: `latest` would take those of an abandoned run for this one's."""
    for path in checkpoints.list_checkpoints(output_dir):
        if checkpoints.step_of(path) > step:
            _set_aside(path, f"is from a later step than this run's start ({step})")


def _set_aside(path: Path, why: str) -> None:
    """Rename what has a checkpoint's name to one that no run takes or deletes, and say why."""
    kept = path.with_name(f"passed-over-{checkpoints.step_of(path)}-{secrets.token_hex(4)}")
    logger.warning("%s %s: it is kept as %s.", path.name, why, kept.name)
    path.rename(kept)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder that replaces `final` at a clean exit and disappears after an exception.

    At every moment, also after a kill or a power cut, `final` is the old folder or the new one, complete; only between
    two renames it is absent, and `remove_leftovers` then puts the old one back.

    Args:
        final: the folder to write, `checkpoint-N` or a name without that word; missing parents are made.
    """
    final = Path(final)
    temporary, replaced = _hidden_path(final, "saving"), _hidden_path(final, "replaced")
    with _hidden_folder(temporary, final):
        yield temporary
        sync_tree(temporary)
        with atomic_files.hold_lock(final):
            _swap_in(temporary, final, replaced)
    _delete(replaced)


@contextlib.contextmanager
def atomic_result(output_dir: Path, last: str) -> Iterator[Path]:
    """Yield a hidden folder whose entries replace those of the same names in `output_dir` at a clean exit.

    Args:
        output_dir: the run's output folder; what else lies in it stays.
        last: the entry that makes the others loadable, such as model_index.json. The old one goes first and the new
            one comes last: a result that is half replaced is never taken for a whole one.
    """
    output_dir = Path(output_dir)
    temporary = output_dir / f".saving-result-{secrets.token_hex(4)}"
    with _hidden_folder(temporary, output_dir):
        yield temporary
        sync_tree(temporary)
        (output_dir / last).unlink(missing_ok=True)
        for entry in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            _delete(output_dir / entry.name)
            entry.rename(output_dir / entry.name)
        atomic_files.sync_folder(output_dir)


@contextlib.contextmanager
def checkpoint_if_saving_fails(save: Callable[[], None], step: int, at_once: bool = False) -> Iterator[None]:
    """Save a checkpoint if what is within, the saving of a result, ends in an UserError; it is raised all the same.

    Args:
        save: Writes the checkpoint; may fail for the same reason.
        step: Of the checkpoint.
        at_once: Save it before: if it takes all processes, one that has failed cannot do it any more.
    """
    if at_once:
        save()
    try:
        yield
    except UserError as error:
        try:
            if not at_once:
                save()
        except UserError:
            raise error from None
        way = f"Training is saved in checkpoint-{step}. Fix the problem, then resume from it to write the result."
        raise UserError(f"{error} {way}") from error


@contextlib.contextmanager
def _hidden_folder(temporary: Path, final: Path) -> Iterator[None]:
    """Make a hidden folder, lock it, and remove it at the end if it is still there.

    Args:
        final: what it is for: named with the room that is left there if writing fails.
    """
    try:
        temporary.mkdir(parents=True)
        with atomic_files.hold_lock(temporary):
            yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        way = "once that is mended, go on with --resume_from_checkpoint latest"
        way = way if checkpoints.list_checkpoints(temporary.parent) else "there was no checkpoint yet"
        raise UserError(f"{cannot_write(final, error)} What was saved before is as it was: {way}.") from error
    finally:
        _delete(temporary)


def _swap_in(temporary: Path, final: Path, replaced: Path) -> None:
    """Rename `temporary` to `final`, after renaming an old `final` to `replaced`; put it back if that fails."""
    try:
        _make_way(final, replaced)
        temporary.rename(final)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(final):
            replaced.rename(final)
        raise
    atomic_files.sync_folder(final.parent)


def _make_way(final: Path, replaced: Path) -> None:
    """Rename what lies in the place of a new folder: to `replaced`, but to a name that stays if it is not ours."""
    if os.path.lexists(final) and (checkpoints.step_of(final) is None or not checkpoints.why_unusable(final)):
        final.rename(replaced)
    elif os.path.lexists(final):
        _set_aside(final, checkpoints.why_unusable(final))


def remove_leftovers(output_dir: Path) -> None:
    """Undo what dead runs left half done: put a moved-aside folder back if its place is empty, delete the rest."""
    for path in list(output_dir.iterdir()):
        match = HIDDEN_NAME.fullmatch(path.name)
        if not match or atomic_files.is_locked(path):
            continue
        final = path.parent / (f"checkpoint-{match[2]}" if match[2].isdecimal() else match[2])
        if match[1] == "replaced" and not os.path.lexists(final):
            path.rename(final)
        else:
            _delete(path)


def prune(output_dir: Path, limit: int | None, newest: int) -> list[Path]:
    """Remove the oldest complete checkpoints after a save; leave incomplete ones and other names alone.

    Args:
        output_dir: the run's output folder.
        limit: how many to keep, at least 1; None keeps all.
        newest: the step just saved; checkpoints of later steps, from another run, are neither counted nor removed.

    Returns:
        The paths that are gone, lowest step first.
    """
    if limit is None:
        return []
    if limit < 1:
        raise ValueError(f"limit is {limit}; at least the checkpoint just saved must stay, so it is 1 or more.")
    own = [path for path in checkpoints.list_checkpoints(output_dir) if checkpoints.step_of(path) <= newest]
    gone = own[:-limit]
    # Under their own name, half-deleted checkpoints might still look complete.
    hidden = [path.rename(_hidden_path(path, "removing")) for path in gone]
    if hidden:
        atomic_files.sync_folder(output_dir)
    for path in hidden:
        _delete(path)
    return gone


def sync_tree(folder: Path) -> None:
    """Give all files below a folder the usual permissions and wait until they, and the folders, are on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for parent, _, names in os.walk(folder):
        for name in names:
            # safetensors makes its files readable for their owner alone.
            Path(parent, name).chmod(0o666 & ~mask)
            atomic_files.sync(Path(parent, name))
        atomic_files.sync_folder(Path(parent))


def _hidden_path(final: Path, purpose: str) -> Path:
    """Return a new hidden path beside `final`, without the word "checkpoint", that tells what belongs to what.

    Raises:
        ValueError: The name would not come back: all digits, or the word in another form than `checkpoint-N`.
    """
    step = checkpoints.step_of(final)
    if step is None and (final.name.isdecimal() or "checkpoint" in final.name):
        raise ValueError(
            f"{final.name}: only checkpoint-N, or a name without that word and not a number, can be written."
        )
    return final.parent / f".{purpose}-{final.name if step is None else step}-{secrets.token_hex(4)}"


def _delete(path: Path) -> None:
    """Remove a folder, file or link, if it is there; warn when that fails, since no run should end for it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    if os.path.lexists(path):
        logger.warning("Could not remove %s; it is of no use any more.", path)
