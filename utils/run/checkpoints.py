"""Checkpoints: which folders are complete ones, which one to go on from, and what is written into them."""

import contextlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from utils.core.errors import UserError
from utils.devices import shards
from utils.devices.device_memory import is_out_of_memory

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # its presence marks a complete checkpoint, so it must be written into the folder
ARGS_FILE = "args.json"
GIVEN = ("lr", "betas", "eps", "weight_decay")  # of an optimizer, by flags; the rest it may have learned
OPTIMIZER_FILE = "optimizer.pt"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


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
    for group, given in zip(optimizer.param_groups, flags, strict=True):
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


def _children(folder: Path) -> list[Path]:
    """Return what lies in a folder; nothing when there is no such folder."""
    return list(Path(folder).iterdir()) if Path(folder).is_dir() else []
