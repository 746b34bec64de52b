"""Photos from a dataset of the Hub, or from a copy of one on this disk, as a folder of picture files.

The package `datasets` finds splits, columns and rows, always in files that are on this disk: what the Hub has is first
downloaded, all splits of it. It is never let decode a picture. The bytes of each row become a file, so that whatever
reads a photo reads what the dataset holds. Of the dataset's own names none is written to, and none is followed out of
its folder: a list that somebody shares may name the reader's private files.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterable, Iterator
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
from tqdm.auto import tqdm

from utils.core.errors import OF_THE_DISK, UserError, cannot_write, explain_write_errors, list_first
from utils.data.captions import METADATA_FILE
from utils.data.list_images import find_images
from utils.data.cache import default_folder
from utils.flags.flag_checks import is_installed
from utils.hub.hub_requests import BROKEN, FAILURES, reason_of, request_timeout, with_retries

logger = logging.getLogger(__name__)

LISTING = ".export.json"  # in an export: the size in bytes of each of its files
KINDS = (
    "imagefolder",
    "parquet",
    "arrow",
    "webdataset",
)  # modules of `datasets` that yield pictures as bytes or paths
_FORMAT = 1  # part of every key: exports of another layout are never looked at
_PARTIAL = ".writing-"  # starts the names of folders that are being written
_DAY = 24 * 60 * 60  # seconds; by then, who was writing a folder is dead
_PATIENCE = 60  # seconds without a byte of the Hub
_PATTERN_SIGNS = re.compile(r"[*?\[\]]|::")  # `datasets` takes paths for patterns, and "::" for a way into an archive

_BEGINNINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tif"),
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), ".avif"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), ".heic"),
}


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
            count = _write(name, source, photos, image_column, caption_column)
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
        raise UserError(_cannot_read(name, path, error)) from error


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
    try:
        secret = (token or "").strip() or huggingface_hub.get_token()
    except FAILURES as error:
        raise UserError(f"The environment's login failed: {reason_of(error, token)}. Run `hf auth login`.") from None
    if secret and not (secret.isascii() and secret.isprintable() and " " not in secret):
        # Must come before the first request, because the HTTP client's error would quote the token.
        raise UserError("The token has spaces or signs in it that no token has. Copy it again, the whole of it.")
    ask = functools.partial(huggingface_hub.snapshot_download, name, repo_type="dataset", cache_dir=folder)
    try:
        with contextlib.nullcontext() if _is_watched() else disable_progress_bars():
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


def _write(name: str, source: Path, folder: Path, image_column: str, caption_column: str | None) -> int:
    """Write a file for each row, the captions, and a list of it all into an empty folder; return how many rows.

    Raises:
        UserError: The dataset cannot be read, lacks a column, or has rows that cannot be used.
    """
    lines, bad, used, number = [], [], set(), -1
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as locks:
        builder, split, rows = _open(name, source, Path(locks), (image_column, caption_column))
        progress = tqdm(_watch(name, source, rows), desc="Reading the dataset", unit=" pictures", disable=None)
        for number, row in enumerate(progress):
            try:
                content, path = _read_picture(row[image_column], source)
                file = folder / f"{number:06d}{_suffix_of(content, path)}"
                if caption_column is not None:
                    lines.append({"file_name": file.name, "text": _read_caption(row[caption_column])})
            except UserError as error:
                bad.append(f"row {number} ({error})")
                continue
            file.write_bytes(content)
            used.add(path)
    if bad or number < 0:
        what = (
            f"{len(bad)} of {number + 1} rows cannot be used, counted from 0: {list_first(bad)}"
            if bad
            else "it has no rows"
        )
        raise UserError(f"--dataset_name {name}, split {split}: {what}. Mend the dataset, or use a copy without them.")
    if builder.name == "imagefolder":
        _warn_of_unused(name, source, builder, split, used)
    if caption_column is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / METADATA_FILE).write_text(text, encoding="utf-8")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / LISTING).write_text(json.dumps(sizes), encoding="utf-8")
    return number + 1


def _open(
    name: str, source: Path, locks: Path, columns: tuple[str, str | None]
) -> tuple[Any, str, Iterable[dict[str, Any]]]:
    """Return what `datasets` reads a dataset with, the split that is taken, and its rows with undecoded pictures.

    Args:
        locks: An empty folder for what `datasets` leaves behind.
        columns: Of the pictures and, unless None, of the captions.
    """
    import datasets  # takes a second

    if not _is_watched():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors become messages here
    if signs := " ".join(_PATTERN_SIGNS.findall(str(source))):
        raise UserError(
            f"--dataset_name {name}: the package datasets misreads {signs} in {source}. Rename the folder."
        )
    try:
        builder = _make_builder(source, locks)
    except Exception as error:  # broken files and lists raise nearly every type
        raise UserError(_cannot_read(name, source, error)) from error
    if builder.name not in KINDS:
        raise UserError(
            f"--dataset_name {name} is, by most of its files, a dataset of kind {builder.name}, and none of pictures. "
            "Give a folder of pictures or of parquet files; photos of your own are those of --instance_data_dir."
        )
    split = _choose_split(name, builder)
    _check_places(name, source, builder)
    try:
        rows = builder.as_streaming_dataset(split)  # not `as_dataset`, which would first copy all pictures
    except Exception as error:
        raise UserError(_cannot_read(name, source, error)) from error
    _check_columns(name, rows.features, *columns)
    wanted = [column for column in columns if column is not None]
    if builder.name == "parquet":
        return builder, split, _read_parquet(builder.config.data_files[split], wanted)
    is_decoded = isinstance(rows.features[columns[0]], datasets.Image)
    rows = rows.select_columns(wanted)
    return builder, split, rows.cast_column(columns[0], datasets.Image(decode=False)) if is_decoded else rows


def _read_parquet(files: Iterable[str], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files; through `datasets` it would take two to four times the memory."""
    from pyarrow.parquet import ParquetFile  # comes with `datasets`

    for file in files:
        with ParquetFile(str(file), buffer_size=2**20, pre_buffer=False) as table:
            if lacking := [column for column in columns if column not in table.schema_arrow.names]:
                raise ValueError(f"{file} has no column {', '.join(lacking)}, which others have")
            for batch in table.iter_batches(8, columns=columns, use_threads=False):
                yield from batch.to_pylist()


def _make_builder(source: Path, locks: Path) -> Any:
    """Return what `datasets` reads a folder or a parquet file with."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    if source.is_dir():
        return datasets.load_dataset_builder(str(source), cache_dir=str(locks))
    # Not `load_dataset_builder("parquet", …)`, which tells the Hub of each use.
    return Parquet(cache_dir=str(locks), data_files=DataFilesDict({"train": DataFilesList([str(source)], [])}))


def _choose_split(name: str, builder: Any) -> str:
    """Return "train", or the only split that there is."""
    splits = [str(split) for split in builder.config.data_files or {}]
    if "train" not in splits and len(splits) != 1:
        found = ", ".join(splits) or "none"
        raise UserError(f"--dataset_name {name} has no split train. It has: {found}. Give the folder of one of them.")
    return "train" if "train" in splits else splits[0]


def _check_places(name: str, source: Path, builder: Any) -> None:
    """Raise UserError if a split has files outside of its dataset, as its README.md can tell `datasets`."""
    files = [str(file) for files in builder.config.data_files.values() for file in files]
    if outside := [file for file in files if "://" in file or not Path(os.path.abspath(file)).is_relative_to(source)]:
        raise UserError(
            f"--dataset_name {name} names files that are not its own: {list_first(outside)}. Mend its README.md."
        )


def _check_columns(name: str, features: dict[str, Any], image_column: str, caption_column: str | None) -> None:
    """Raise UserError if a column is missing or of a type that is not read."""
    found = list_first([f"{column} ({_describe(feature)})" for column, feature in features.items()])
    wanted = {"--image_column": image_column, "--caption_column": caption_column}
    for flag, column in wanted.items():
        if column is not None and column not in features:
            raise UserError(
                f"{flag} {column} is no column of --dataset_name {name}. It has: {found}. Name one of them."
            )
    if not _is_picture(features[image_column]):
        held = _describe(features[image_column])
        raise UserError(f"--image_column {image_column} of {name} holds {held}, no pictures. Its columns: {found}.")
    if caption_column is not None and _describe(features[caption_column]).removeprefix("list of ") != "string":
        held = _describe(features[caption_column])
        raise UserError(f"--caption_column {caption_column} of {name} holds {held}, no texts. Its columns: {found}.")


def _describe(feature: Any) -> str:
    """Name the type of a column in a few words."""
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_")
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return f"list of {_describe(feature.feature)}"
    if isinstance(feature, dict):
        return f"{{{', '.join(f'{key}: {_describe(value)}' for key, value in feature.items())}}}"
    return type(feature).__name__


def _is_picture(feature: Any) -> bool:
    """Say whether a column holds pictures, or bytes that may be some, with or without a path."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _describe(feature["bytes"]) == "binary"
    return _describe(feature) in ("Image", "binary")


def _watch(name: str, source: Path, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows, and turn what reading them raises into InputErrors."""
    try:
        yield from rows
    except Exception as error:  # damaged files raise nearly every type
        raise UserError(_cannot_read(name, source, error)) from error


def _cannot_read(name: str, source: Path, error: Exception) -> str:
    """Say that a dataset cannot be read, and why."""
    reason = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" …").rstrip(".")
    at = "" if name == str(source) else f" ({source})"
    advice = "Give a folder of pictures or of parquet files, and if they are damaged, download them again."
    return f"--dataset_name {name}{at} cannot be read as a dataset of pictures: {reason}. {advice}"


def _read_picture(value: Any, source: Path) -> tuple[bytes, str]:
    """Return the bytes of a row's picture, and the path of the file that holds it, "" if the row itself does.

    Raises:
        UserError: There is none, or none in the dataset.
    """
    value = {"path": value} if isinstance(value, str) else value
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content and isinstance(content, bytes):
        return content, ""
    if content is not None or not path:
        raise UserError("no picture")
    inner, _, outer = path.rpartition("::")  # zip://dog.jpg::/photos/train.zip
    file = Path(os.path.abspath(source / outer))
    if not file.is_relative_to(source):
        raise UserError(f"{path} lies outside of the dataset")
    if not os.path.isfile(file):  # a pipe would be waited for
        raise UserError(f"{path} is no file of the dataset")
    try:
        if not inner:
            return file.read_bytes(), str(file)
        with zipfile.ZipFile(file) as archive:
            return archive.read(inner.removeprefix("zip://")), path
    except (OSError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _suffix_of(content: bytes, path: str) -> str:
    """Return the suffix of a picture's format, or raise UserError if it is none that is read."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:8] == b"ftyp":
        head = content[8:64]  # the brand, and those that it is compatible with
        found = [suffix for brand, suffix in _BRANDS.items() if brand in head]
    else:
        found = [suffix for beginning, suffix in _BEGINNINGS.items() if content.startswith(beginning)]
    if not found:
        raise UserError(f"{path or 'its content'} is no JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC")
    return found[0]


def _read_caption(value: Any) -> str | list[str]:
    """Return a row's caption or captions, or raise UserError if there is none."""
    texts = [
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()
    ]
    if not texts:
        raise UserError("no caption")
    return texts if isinstance(value, list) else value


def _warn_of_unused(name: str, source: Path, builder: Any, split: str, used: set[str]) -> None:
    """Warn of a folder's pictures that are in no split; `datasets` leaves them out without a word."""
    splits = {str(other): files for other, files in builder.config.data_files.items()}
    taken = used | {os.path.abspath(file) for other in splits if other != split for file in splits[other]}
    unused = [path for path in map(str, find_images(source).images) if path not in taken]
    if unused:
        logger.warning(
            f"--dataset_name {name}: {len(unused)} pictures are in none of its splits ({', '.join(splits)}), and not "
            f"used: {list_first(unused)}. Metadata files, README.md, and words like train and test in names, decide."
        )


def _is_watched() -> bool:
    """Say whether a person looks at what is printed, and not a log, which progress bars would fill."""
    return bool(sys.stderr and sys.stderr.isatty())


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
    """Delete what was being written more than a day ago; of the rest, someone may still be writing it."""
    for folder in root.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if newest < time.time() - _DAY:
                shutil.rmtree(folder, ignore_errors=True)
