"""Read the pictures and captions of a dataset that lies on this disk.

The package `datasets` finds splits, columns and rows. It never decodes a picture: what reads a photo later reads the
bytes that the dataset holds. No name in a dataset is followed out of its folder, because a list that somebody shares
may name private files of the reader.
"""

import json
import logging
import os
import re
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from utils.core.errors import UserError, list_first
from utils.data.captions import METADATA_FILE
from utils.data.list_images import find_images

logger = logging.getLogger(__name__)

KINDS = ("imagefolder", "parquet", "arrow", "webdataset")  # modules of `datasets` that yield pictures undecoded
_PATTERN_SIGNS = re.compile(r"[*?\[\]]|::")  # `datasets` takes paths for patterns, and "::" for a way into an archive
# How files begin; a damaged photo keeps its suffix, so that --skip_bad_images can leave it out.
_BEGINNINGS = {
    ".jpg": rb"\xff\xd8\xff",
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".webp": rb"RIFF.{4}WEBP",
    ".gif": rb"GIF8",
    ".bmp": rb"BM",
    ".tif": rb"II[*+]\0|MM\0[*+]",
    ".avif": rb".{4}ftyp.{0,52}(?:avif|avis)",
    ".heic": rb".{4}ftyp.{0,52}(?:hei[cxms]|hev[cx]|mif1|msf1)",
}


def write_rows(name: str, source: Path, folder: Path, image_column: str, caption_column: str | None) -> int:
    """Write a file for each row, and the captions, into an empty folder; return how many rows there are.

    Raises:
        UserError: The dataset cannot be read, lacks a column, or has rows that cannot be used.
    """
    lines, bad, used, number = [], [], set(), -1
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as locks:
        builder, split, rows = _open_rows(name, source, Path(locks), (image_column, caption_column))
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
        what = f"{len(bad)} of {number + 1} rows cannot be used, counted from 0: {list_first(bad)}"
        what = what if bad else "it has no rows"
        raise UserError(f"--dataset_name {name}, split {split}: {what}. Mend the dataset, or use a copy without them.")
    if builder.name == "imagefolder":
        _warn_of_unused(name, source, builder, split, used)
    if caption_column is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / METADATA_FILE).write_text(text, encoding="utf-8")
    return number + 1


def cannot_read(name: str, source: Path, error: Exception) -> str:
    """Say that a dataset cannot be read, and why."""
    reason = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" …").rstrip(".")
    at = "" if name == str(source) else f" ({source})"
    advice = "Give a folder of pictures or of parquet files, and if they are damaged, download them again."
    return f"--dataset_name {name}{at} cannot be read as a dataset of pictures: {reason}. {advice}"


def is_watched() -> bool:
    """Say whether a person sees what is printed; progress bars would fill a log."""
    return bool(sys.stderr and sys.stderr.isatty())


def _open_rows(
    name: str, source: Path, locks: Path, columns: tuple[str, str | None]
) -> tuple[Any, str, Iterable[dict[str, Any]]]:
    """Return what `datasets` reads a dataset with, the split that is taken, and its rows with undecoded pictures.

    Args:
        locks: An empty folder for what `datasets` leaves behind.
        columns: Of the pictures and, unless None, of the captions.
    """
    import datasets  # takes a second

    if not is_watched():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors become messages here
    if signs := " ".join(_PATTERN_SIGNS.findall(str(source))):
        raise UserError(
            f"--dataset_name {name}: the package datasets misreads {signs} in {source}. Rename the folder."
        )
    try:
        builder = _make_builder(source, locks)
    except Exception as error:  # broken files and lists raise nearly every type
        raise UserError(cannot_read(name, source, error)) from error
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
        raise UserError(cannot_read(name, source, error)) from error
    _check_columns(name, rows.features, *columns)
    wanted = [column for column in columns if column is not None]
    if builder.name == "parquet":
        return builder, split, _read_parquet(builder.config.data_files[split], wanted)
    is_decoded = isinstance(rows.features[columns[0]], datasets.Image)
    rows = rows.select_columns(wanted)
    return builder, split, rows.cast_column(columns[0], datasets.Image(decode=False)) if is_decoded else rows


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


def _read_caption(value: Any) -> str | list[str]:
    """Return a row's caption or captions, or raise UserError if there is none."""
    texts = [
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()
    ]
    if not texts:
        raise UserError("no caption")
    return texts if isinstance(value, list) else value


def _suffix_of(content: bytes, path: str) -> str:
    """Return the suffix of a picture's format, or raise UserError if it is none that is read."""
    for suffix, beginning in _BEGINNINGS.items():
        if re.match(beginning, content[:64], re.DOTALL):
            return suffix
    raise UserError(f"{path or 'its content'} is no JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC")


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
    """Raise UserError if a split has files outside of its dataset; its README.md can name such files."""
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


def _read_parquet(files: Iterable[str], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files; through `datasets` it would take two to four times the memory."""
    from pyarrow.parquet import ParquetFile  # comes with `datasets`

    for file in files:
        with ParquetFile(str(file), buffer_size=2**20, pre_buffer=False) as table:
            if lacking := [column for column in columns if column not in table.schema_arrow.names]:
                raise ValueError(f"{file} has no column {', '.join(lacking)}, which others have")
            for batch in table.iter_batches(8, columns=columns, use_threads=False):
                yield from batch.to_pylist()


def _watch(name: str, source: Path, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows, and turn what reading them raises into UserErrors."""
    try:
        yield from rows
    except Exception as error:  # damaged files raise nearly every type
        raise UserError(cannot_read(name, source, error)) from error
