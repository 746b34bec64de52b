"""Checkpoint folders that are either complete or not there, however a run ends.

A folder is written under a hidden name, synced, and renamed. Hidden names are `.saving-500-1a2b3c4d` (being written),
`.replaced-500-…` (the old checkpoint-500, until the new one is in place) and `.removing-500-…` (on its way out): none
has the word that people and tools search for. A run that dies in between leaves them for `remove_leftovers`. A file
lock, which ends with its process, tells the leftovers of dead runs from the work of a live one.
"""

import contextlib
import json
import logging
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from utils.core import atomic_files
from utils.core.errors import UserError, cannot_write
from utils.devices import shards
from utils.devices.device_memory import is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # its presence marks a complete checkpoint, so it must be written into the folder
ARGS_FILE = "args.json"
GIVEN = ("lr", "betas", "eps", "weight_decay")  # of an optimizer, by flags; the rest it may have learned
OPTIMIZER_FILE = "optimizer.pt"
_CLAIMS = []  # open files, whose locks say that this process works in their folders
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # in what torch says when it cannot write a file
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
HIDDEN_NAME = re.compile(r"\.(saving|replaced|removing)-(.+)-[0-9a-f]{8}")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoint folders, lowest step first."""
    return sorted((path for path in _children(output_dir) if not why_unusable(path)), key=step_of)


def step_of(path: Path) -> int | None:
    """Return N of a path named exactly `checkpoint-N`, None for other names."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def why_unusable(path: Path) -> str:
    """Say why a path is no complete checkpoint of the run, "" if it is one."""
    if step_of(path) is None:
        return "is not named checkpoint-N"
    if path.is_symlink():
        return "is a link"
    return why_incomplete(path)


def why_incomplete(folder: Path) -> str:
    """Say why a folder of any name is no complete checkpoint, "" if it is one."""
    if not folder.is_dir():
        return "is no folder"
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
    except OSError:
        return f"is incomplete: it has no readable {STATE_FILE}"
    except (ValueError, RecursionError):
        return f"is incomplete: its {STATE_FILE} is no valid JSON"
    if not isinstance(state, dict):
        return f"is incomplete: its {STATE_FILE} is no JSON object"
    kinds = {"step": int, "fits": dict, "files": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]:
        return f"is damaged: its {STATE_FILE} has no usable {' and no usable '.join(wrong)}"
    if step_of(folder) not in (None, state["step"]):
        return f"is damaged: its {STATE_FILE} is that of step {state['step']}"
    for name, size in state["files"].items():
        if not (folder / name).is_file():
            return f"is damaged: it lacks {name}"
        if (found := (folder / name).stat().st_size) != size:
            return f"is damaged: its {name} has {found} bytes, not {size}"
    return ""


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint folder that a person asked for.

    Args:
        output_dir: the run's output folder; need not exist.
        wanted: "latest", the name of a folder in `output_dir`, or a path.

    Returns:
        The folder; None for "latest" when there is no complete checkpoint.

    Raises:
        UserError: The named folder does not exist or is incomplete.
    """
    if wanted == "latest":
        return _find_latest(output_dir)
    inside = Path(output_dir, wanted)
    folder = inside if os.path.exists(inside) else Path(wanted)  # Path.exists raises for a name that is too long
    problem = why_incomplete(folder) if os.path.exists(folder) else "does not exist"
    if problem:
        names = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise UserError(f"The checkpoint {wanted} {problem}. Complete checkpoints in {output_dir}: {names}.")
    return folder


def resumes_own_run(output_dir: Path, wanted: str | None) -> bool:
    """Say whether a checkpoint that a person asked for is one of an output folder's own."""
    if wanted in (None, "latest"):
        return wanted is not None and bool(list_checkpoints(output_dir))
    own = os.path.realpath(output_dir)  # Path.resolve raises where links run in a circle
    return own in [os.path.dirname(os.path.realpath(path)) for path in (os.path.join(own, wanted), wanted)]


def open_folder(output_dir: Path, flags: dict, step: int, resume_from: Path | None) -> None:
    """Make a run's output folder its own until it ends, clear it of what dead runs left, and write its args.json.

    Args:
        flags: The content of args.json; what differs from those beside `resume_from` is logged.
        step: At which the run begins; checkpoints beyond it are of another one, and set aside.

    Raises:
        UserError: It cannot be made or written, or another run is at work in it.
    """
    announce_changes(resume_from, step, flags)
    path = output_dir / ARGS_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _lock_file(path)
        remove_leftovers(output_dir)
        _set_aside_newer(output_dir, step)
        atomic_files.write_whole(path, json.dumps(flags, indent=2) + "\n", prepare=_lock_file)
    except BlockingIOError as error:
        raise UserError(f"--output_dir {output_dir} is in use by another run. Wait, or use another folder.") from error
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used: {error.strerror}. Use another folder.") from error


def _lock_file(path: Path) -> None:
    """Lock a file, made if need be, for the life of this process; forks of it, like data workers, hold no lock.

    This process must not open the file again: the lock would go with the first handle that is closed.

    Raises:
        BlockingIOError: Another process has it.
    """
    while fcntl is not None:
        _CLAIMS.append(path.open("a+b"))
        try:
            fcntl.lockf(_CLAIMS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BlockingIOError(str(error)) from error
        except OSError:
            return  # a file system without locks
        # Since it was opened, another run may have put its own file in the place of this one.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(_CLAIMS[-1].fileno())):
            return


def _set_aside_newer(output_dir: Path, step: int) -> None:
    """Rename checkpoints beyond a step: `latest` would take those of an abandoned run for this one's."""
    for path in list_checkpoints(output_dir):
        if step_of(path) > step:
            kept = path.with_name(f"passed-over-{step_of(path)}-{secrets.token_hex(4)}")
            logger.warning("%s lies ahead of this run, which begins at %d: kept as %s.", path.name, step, kept.name)
            path.rename(kept)


def write_state(folder: Path, step: int, fits: dict) -> None:
    """Write the last file of a checkpoint: its step, what a run that resumes it must share, and the others' sizes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    state = {"step": step, "fits": fits, "files": sizes}
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")


@contextlib.contextmanager
def explaining_damage(checkpoint: Path) -> Iterator[None]:
    """Turn a failure to read a checkpoint's files into an UserError that names it and the others."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        others = [path.name for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
        raise UserError(
            f"{checkpoint} cannot be read, so it is damaged or was not written by this script: {error}\nOther "
            f"checkpoints there: {', '.join(others) or 'none'}."
        ) from error


def read_state(checkpoint: Path) -> dict:
    """Return what a complete checkpoint says of its run: `step`, and `fits`, what a run that resumes it must share."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def find_state(output_dir: Path, wanted: str | None) -> tuple[Path | None, dict]:
    """Return the checkpoint to go on from and what it says of its run, or None and the state of a run's start.

    Raises:
        UserError: The checkpoint that a person asked for does not exist or is incomplete.
    """
    checkpoint = find_checkpoint(output_dir, wanted) if wanted else None
    if checkpoint is not None:
        return checkpoint, read_state(checkpoint)
    if wanted:
        logger.warning("%s holds no complete checkpoint: starting at step 0.", output_dir)
    return None, {"step": 0, "fits": {}}


def save_optimizer(folder: Path, state: dict, scaler: Any) -> None:
    """Write an optimizer's whole state, and that of fp16's scaler, which may be None."""
    scaled = None if scaler is None else scaler.state_dict()
    torch.save({"optimizer": state, "scaler": scaled}, folder / OPTIMIZER_FILE)


def load_optimizer(folder: Path, optimizer: Any, scaler: Any) -> None:
    """Read what `save_optimizer` wrote, but keep weight decay and the like as they are given now."""
    flags = [{key: group[key] for key in GIVEN if key in group} for group in optimizer.param_groups]
    with explaining_damage(folder):
        state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        shards.load_state(optimizer, state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    for group, given in zip(optimizer.param_groups, flags):
        group.update(given)


def announce_changes(checkpoint: Path | None, step: int, flags: dict) -> None:
    """Say which flags are others than in the run that is gone on with, as far as its args.json lies beside it."""
    path = checkpoint and checkpoint.parent / ARGS_FILE
    if path is None or not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(before, dict):
        return
    known = before.keys() - {"output_dir"}  # a folder may be moved
    changed = {name: value for name, value in flags.items() if name in known and before[name] != value}
    for name, value in changed.items():
        logger.info("From step %d on, --%s is %s; it was %s.", step, name, value, before[name])


def _find_latest(output_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step; warn of what looks like a newer one and is not usable."""
    complete = list_checkpoints(output_dir)
    latest = complete[-1] if complete else None
    for path in sorted(_children(output_dir)):
        older = latest and step_of(path) is not None and step_of(path) <= step_of(latest)
        if path.name.startswith("checkpoint") and not older:
            logger.warning("Passed over %s: it %s.", path, why_unusable(path))
    return latest


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
        way = f"What was learned is in checkpoint-{step}: once that is mended, resume from it to save the result."
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
        way = way if list_checkpoints(temporary.parent) else "there was no checkpoint yet"
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
    if os.path.lexists(final) and (step_of(final) is None or not why_unusable(final)):
        final.rename(replaced)
    elif os.path.lexists(final):
        kept = final.with_name(f"passed-over-{step_of(final)}-{secrets.token_hex(4)}")
        logger.warning("%s %s: it is kept as %s.", final, why_unusable(final), kept.name)
        final.rename(kept)


def remove_leftovers(output_dir: Path) -> None:
    """Undo what dead runs left half done: put a moved-aside folder back if its place is empty, delete the rest."""
    for path in _children(output_dir):
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
    own = [path for path in list_checkpoints(output_dir) if step_of(path) <= newest]
    gone = own[:-limit]
    # Under their own name, half-deleted checkpoints might still look complete.
    hidden = [path.rename(_hidden_path(path, "removing")) for path in gone]
    if hidden:
        atomic_files.sync_folder(output_dir)
    for path in hidden:
        _delete(path)
    return gone


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of a JSON-lines file whose "step" is at most `step`; drop later, torn and other lines."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [line for line in before.splitlines() if _line_step(line) <= step]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        atomic_files.write_whole(path, after)


def _line_step(line: bytes) -> float:
    """Return the "step" of a line of JSON, infinity if there is none."""
    try:
        return float(json.loads(line.decode())["step"])  # bytes alone might be of another encoding
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")


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
    step = step_of(final)
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


def _children(folder: Path) -> list[Path]:
    """Return what lies in a folder; nothing when there is no such folder."""
    return list(Path(folder).iterdir()) if Path(folder).is_dir() else []
