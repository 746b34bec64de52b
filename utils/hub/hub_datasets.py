"""Photos of a dataset, from the Hub or from this disk, as a folder of picture files.

A dataset of the Hub is first downloaded, with all its splits. Then `dataset_rows` writes a file for each row, under
names that this module chooses.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from utils.core.errors import OF_THE_DISK, UserError, cannot_write, explain_write_errors
from utils.data.cache import default_folder
from utils.flags.flag_checks import is_installed
from utils.hub.dataset_rows import cannot_read, is_watched, write_rows
from utils.hub.hub_requests import BROKEN, find_token, reason_of, request_timeout, with_retries

logger = logging.getLogger(__name__)

LISTING = ".export.json"  # in an export: the size in bytes of each of its files
_FORMAT = 1  # part of every key: exports of another layout are never looked at
_PARTIAL = ".writing-"  # starts the names of folders that are being written
_DAY = 24 * 60 * 60  # seconds; the process that began a folder so long ago is dead
_PATIENCE = 60  # seconds without a byte from the Hub


def open_source(concept: Any, cache_dir: str | None, token: str | None) -> Path:
    """Return the folder of a concept's photos, which are written there first if they are those of a dataset.

    Args:
        concept: The script's `Concept`.
        cache_dir: Where datasets are kept; None takes `default_folder`.
    """
    if not concept.dataset_name:
        return Path(concept.instance_data_dir)
    columns, cache = (concept.image_column, concept.caption_column), Path(cache_dir or default_folder())
    return export_dataset(concept.dataset_name, *columns, cache, token)


def export_dataset(
    name: str, image_column: str, caption_column: str | None, cache_dir: Path, token: str | None
) -> Path:
    """Write the pictures of a dataset's train split into a folder, unless they are there already, and return it.

    Args:
        name: `owner/name` on the Hub; or a folder of pictures or of parquet files; or a parquet file.
        image_column: Holds the pictures.
        caption_column: Holds a text or a list of texts for each; None leaves captions out.
        cache_dir: Exports, and what is downloaded for them, lie in its subfolder `datasets`.
        token: None takes the login of the environment or of `hf auth login`.

    Returns:
        A folder of `000000.jpg`, `000001.png`, … in the order of the rows, whose bytes are the dataset's, and with
        captions a metadata.jsonl. Another state of the dataset, or other columns, give another folder.

    Raises:
        ImportError: The package `datasets` is missing.
        UserError: There is no such dataset, split or column, or rows lack a picture or a caption.
    """
    if not is_installed("datasets"):
        raise ImportError(f"--dataset_name {name} needs datasets: pip install datasets.")
    root = Path(cache_dir).absolute() / "datasets"
    source, state = _find_source(name, root, token)
    key = json.dumps([_FORMAT, state, image_column, caption_column])
    readable = re.sub(r"[^\w.-]+", "-", source.name if os.path.exists(name) else name, flags=re.ASCII).strip(".-")[:60]
    place = root / f"{readable}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    if _is_complete(place):
        logger.info(f"The pictures of {name} lie in {place}.")
        return place
    with explain_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root, ignore_cleanup_errors=True) as work:
            photos = Path(work, "photos")
            photos.mkdir()
            count = write_rows(name, source, photos, image_column, caption_column)
            sizes = {file.name: file.stat().st_size for file in photos.iterdir()}
            (photos / LISTING).write_text(json.dumps(sizes), encoding="utf-8")
            _put(photos, place, Path(work, "damaged"))
    logger.info(f"The {count} pictures of {name} were written to {place}.")
    return place


def _find_source(name: str, root: Path, token: str | None) -> tuple[Path, list]:
    """Return the folder or file that holds a dataset, downloaded or given, and what changes when the dataset does."""
    if not os.path.exists(name):
        folder = _download(name, root / "hub", token)
        return folder, [name, folder.name]  # …/snapshots/COMMIT
    path = Path(name).resolve()
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise UserError(f"--dataset_name {name} is a file, but no parquet file. Give a .parquet file, or a folder.")
    if root.resolve().is_relative_to(path):
        raise UserError(
            f"--dataset_name {name} is a folder around --cache_dir {root.parent}. Use another --cache_dir."
        )
    try:
        return path, [str(path), _list_files(path)]
    except OSError as error:
        raise UserError(cannot_read(name, path, error)) from error


def _list_files(path: Path) -> list[list]:
    """Return the path, bytes, time of change in nanoseconds and a hash of a file, or of each file below a folder.

    Sorted. All bytes are read, as those of the photos will be anyway: one may be another of the same size and time.
    """
    found, seen = [path] if path.is_file() else [], set()
    for place, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [folder for folder in folders if not folder.startswith(".")]  # as `datasets` leaves them out
        found += [Path(place, file) for file in names]
    states = [(str(file), file.stat()) for file in found if file.exists()]
    return sorted([file, state.st_size, state.st_mtime_ns, _hash(Path(file))] for file, state in states)


def _hash(path: Path) -> str:
    """Return a hash of what is in a file; of a pipe, which would be waited for, none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


@request_timeout(_PATIENCE)
def _download(name: str, folder: Path, token: str | None) -> Path:
    """Download a dataset, unless all its files are here, and return its folder; offline, the last one that was whole.

    Raises:
        UserError: There is none that this login may read, or the Hub cannot be reached.
    """
    missing = f"--dataset_name {name!r} is no file or folder here"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{missing}, and no dataset's name on the Hub: {error} Check it.") from None
    secret = find_token(token)
    ask = functools.partial(huggingface_hub.snapshot_download, name, repo_type="dataset", cache_dir=folder)
    try:
        with contextlib.nullcontext() if is_watched() else disable_progress_bars():
            return Path(with_retries(functools.partial(ask, token=secret or False), BROKEN))
    except Exception as error:  # hf_xet's errors and those of download threads have no base class in common
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise UserError(cannot_write(Path(error.filename or folder), error)) from None
        raise UserError(f"{missing}, and {_explain(name, error, secret)}") from None


def _explain(name: str, error: Exception, token: str | None) -> str:
    """Say why a dataset could not be downloaded, and what to do."""
    is_vague = isinstance(error, LocalEntryNotFoundError) and error.__cause__  # "an error happened while trying to …"
    reason = reason_of(error.__cause__ if is_vague else error, token)
    page, login = f"{huggingface_hub.constants.ENDPOINT}/datasets/{name}", "`hf auth login`, or HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"on the Hub its owner lets only some read it: {reason}. Ask for access at {page}, and log in: {login}."
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub shows this login no such dataset: {reason}. Check the name; a private one needs {login}."
    if huggingface_hub.constants.is_offline_mode():
        what = "only a part of it" if isinstance(error, IncompleteSnapshotError) else "nothing of it"
        way = "Run once with HF_HUB_OFFLINE=0 and the same --cache_dir, or give the folder of a copy."
        return f"{what} was downloaded before HF_HUB_OFFLINE forbade to ask the Hub. {way}"
    host = huggingface_hub.constants.ENDPOINT
    return f"it could not be downloaded: {reason}. Check the connection to {host}, or give the folder of a copy."


def _is_complete(folder: Path) -> bool:
    """Say whether a folder is an export of which nothing is missing."""
    try:
        sizes = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False


def _put(done: Path, place: Path, aside: Path) -> None:
    """Rename an export to its place, unless another process has just done so; one that lacks files is moved aside."""
    with contextlib.suppress(OSError):
        os.rename(done, place)
        return
    if not _is_complete(place):
        with contextlib.suppress(FileNotFoundError):
            os.rename(place, aside)
        os.rename(done, place)


def _remove_leftovers(root: Path) -> None:
    """Delete what was being written more than a day ago; a live process may still write the others."""
    for folder in root.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if newest < time.time() - _DAY:
                shutil.rmtree(folder, ignore_errors=True)
