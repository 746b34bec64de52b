"""Datasets as folders of photos: what is read, bit for bit, what is refused, and what is left when a run is killed."""

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import draw_picture
from tests.hub_server import REPOSITORY, USER, WRITE_TOKEN, HubHandler, HubServer, Refusal, Repository
from utils.core.errors import UserError
from utils.data.captions import METADATA_FILE, find_captions
from utils.data.decode_images import open_rgb
from utils.data.list_images import find_images
from utils.hub import dataset_rows, hub_datasets
from utils.hub.hub_datasets import LISTING, export_dataset

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[1]
NAMES = ("a.png", "b.jpg", "c.jpg", "d.webp", "e.gif")
TEXTS = ["a dog on grass", "ein Hund – süß\u2028", "two\nlines", "d", "e"]
ARCHIVE = "train-00000-of-00001.parquet"
PROGRAM = r"""
import json, logging, os, re, sys
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own pool keeps what was freed, for as long as it likes
from pathlib import Path
from utils.core.errors import exit_status
from utils.hub.hub_datasets import export_dataset
logging.basicConfig(level=logging.INFO)
name, image, caption, cache, token = json.loads(sys.argv[1])
status = exit_status(lambda: print(export_dataset(name, image, caption, Path(cache), token)) or 0)
status_file = Path("/proc/self/status")  # getrusage counts what the parent had
peak = re.search(r"VmHWM:\s*(\d+) kB", status_file.read_text())[1] if status_file.exists() else 0
print("peak:", int(peak) // 1000, file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Draw pictures of several kinds: 16 bits, CMYK with a comment, turned, WebP, GIF."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    deep = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) * 31
    Image.fromarray(deep).save(folder / "a.png")
    draw_picture(40, 48, 1).convert("CMYK").save(folder / "b.jpg", comment=b"not re-encoded")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_picture(56, 40, 2).save(folder / "c.jpg", exif=exif)
    draw_picture(48, 48, 3).save(folder / "d.webp")
    draw_picture(40, 40, 4).save(folder / "e.gif")
    return folder


@pytest.fixture
def contents(pictures) -> list[bytes]:
    """Return the pictures' bytes."""
    return [(pictures / name).read_bytes() for name in NAMES]


@pytest.fixture
def cache(tmp_path) -> Iterator[Path]:
    """Return a folder for caches, in which nothing half written may be left."""
    yield tmp_path / "cache"
    assert not list((tmp_path / "cache" / "datasets").glob(".writing-*"))


def table(contents: list[bytes], **columns: list):
    """Return a dataset with a column of pictures."""
    rows = [None if content is None else {"bytes": content, "path": "../../evil.jpg"} for content in contents]
    return datasets.Dataset.from_dict({"image": rows, **columns}).cast_column("image", datasets.Image())


def write_parquet(path: Path, data) -> Path:
    """Write a parquet file, as the Hub has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path)
    return path


def read(folder: Path) -> list[bytes]:
    """Return the bytes of an export's pictures in their order."""
    return [path.read_bytes() for path in find_images(folder).images]


def captions(folder: Path) -> list[tuple[str, ...]]:
    """Return the captions of an export's pictures, as a run reads them."""
    return list(find_captions("metadata", folder, find_images(folder).images, None, False).values())


def names(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def refusal(name: Path | str, cache: Path, image: str = "image", caption: str | None = None) -> str:
    """Return why a dataset is refused, and check that nothing of it is left."""
    with pytest.raises(UserError) as refused:
        export_dataset(str(name), image, caption, cache, None)
    assert [path for path in (cache / "datasets").glob("*") if path.name != "hub"] == []
    return str(refused.value)


def test_a_folder_of_pictures(pictures, contents, cache):
    """The files are numbered in their order, and their bytes stay as they are."""
    found = export_dataset(str(pictures), "image", None, cache, None)
    assert found.parent == cache / "datasets" and found.name.startswith("pictures-")
    assert names(found) == [LISTING, "000000.png", "000001.jpg", "000002.jpg", "000003.webp", "000004.gif"]
    assert read(found) == contents
    assert [open_rgb(path).mode for path in find_images(found).images] == ["RGB"] * 5
    assert names(cache / "datasets") == [found.name]


@pytest.mark.parametrize("form", ["folder", "one shard", "two shards", "file"])
def test_parquet(contents, cache, tmp_path, form):
    """A copy of a dataset of the Hub, or one file of it; the paths inside lead nowhere."""
    data = table(contents, text=TEXTS)
    if form == "two shards":
        write_parquet(tmp_path / "copy/data/train-00000-of-00002.parquet", data.select([0, 1]))
        path = write_parquet(tmp_path / "copy/data/train-00001-of-00002.parquet", data.select([2, 3, 4])).parents[1]
    else:
        place = {"folder": f"copy/data/{ARCHIVE}", "one shard": f"copy/{ARCHIVE}", "file": "any [name]*.PARQUET"}[form]
        path = write_parquet(tmp_path / place, data)
        path = path if form == "file" else tmp_path / "copy"
    if form == "file":
        path = path.rename(tmp_path / "any name.PARQUET")
    found = export_dataset(str(path), "image", "text", cache, None)
    assert read(found) == contents
    assert captions(found) == [(text.strip(),) for text in TEXTS]
    assert not (tmp_path / "evil.jpg").exists()


def test_splits_of_folders(pictures, contents, cache, tmp_path, caplog):
    """Only train/ is taken, and nothing is said of the other's pictures, which are in a split."""
    for name in NAMES:
        folder = tmp_path / "photos" / ("train" if name < "d" else "test")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / name, folder)
    assert read(export_dataset(str(tmp_path / "photos"), "image", None, cache, None)) == contents[:3]
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_of_a_folder(pictures, contents, cache, tmp_path, caplog, suffix):
    """Rows are the list's, in its order; pictures that it lacks are not, and a warning names them."""
    photos = shutil.copytree(pictures, tmp_path / "photos")
    lines = [{"file_name": name, "text": f"a {name[0]}"} for name in ("c.jpg", "a.png")]
    text = "file_name,text\n" + "".join(f"{line['file_name']},{line['text']}\n" for line in lines)
    text = "\n".join(map(json.dumps, lines)) if suffix == "jsonl" else text
    (photos / f"metadata.{suffix}").write_text(text)
    found = export_dataset(str(photos), "image", "text", cache, None)
    assert read(found) == [contents[2], contents[0]] and captions(found) == [("a c",), ("a a",)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "3 pictures are in none of its splits (train)" in record.message
    assert all(name in record.message for name in ("b.jpg", "d.webp", "e.gif")) and "c.jpg" not in record.message


def test_a_photo_whose_name_makes_a_split(pictures, cache, tmp_path, caplog):
    """The package takes `my test.jpg` for all that there is; that is said."""
    photos = shutil.copytree(pictures, tmp_path / "photos")
    (photos / "c.jpg").rename(photos / "my test.jpg")
    assert len(read(export_dataset(str(photos), "image", None, cache, None))) == 1
    assert "4 pictures are in none of its splits (test), and not used" in caplog.text


def test_archives(pictures, contents, cache, tmp_path):
    """Pictures in a zip file, and in a tar file with captions."""
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip/train.zip", "w") as archive:
        for name in NAMES:
            archive.write(pictures / name, f"deep/{name}")
    assert read(export_dataset(str(tmp_path / "zip"), "image", None, cache, None)) == contents
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar/train.tar", "w") as archive:
        for name in ("b.jpg", "c.jpg"):
            (tmp_path / f"{name[0]}.txt").write_text(f"a {name[0]}")
            archive.add(pictures / name, name)
            archive.add(tmp_path / f"{name[0]}.txt", f"{name[0]}.txt")
    found = export_dataset(str(tmp_path / "tar"), "jpg", "txt", cache, None)
    assert read(found) == contents[1:3] and captions(found) == [("a b",), ("a c",)]


@pytest.mark.parametrize("form", ["struct", "binary", "large"])
def test_plain_bytes(contents, cache, tmp_path, form):
    """Columns of bytes are pictures, whoever wrote them, under any name."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.large_binary() if form == "large" else pyarrow.binary()
    values = [{"bytes": content} for content in contents] if form == "struct" else contents
    kind = pyarrow.struct({"bytes": kind}) if form == "struct" else kind
    rows = pyarrow.table({"photo": pyarrow.array(values, kind), "n": range(5)})
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet")
    assert read(export_dataset(str(tmp_path / "x.parquet"), "photo", None, cache, None)) == contents


def test_a_shard_of_other_types(contents, cache, tmp_path):
    """Its rows are named; numbers are no captions, and paths lead only to files of the dataset."""
    write_parquet(tmp_path / "copy/train-00000-of-00002.parquet", table(contents[:2], text=TEXTS[:2]))
    rows = {"image": ["pictures/b.bin", "../x.jpg", "pictures/b.bin"], "text": [7, 8, 9]}
    write_parquet(tmp_path / "copy/train-00001-of-00002.parquet", datasets.Dataset.from_dict(rows))
    (tmp_path / "copy/pictures").mkdir()
    (tmp_path / "copy/pictures/b.bin").write_bytes(contents[1])
    message = refusal(tmp_path / "copy", cache, caption="text")
    assert "3 of 5 rows" in message
    assert "row 2 (no caption), row 3 (../x.jpg lies outside of the dataset), row 4 (no caption)" in message


def test_what_save_to_disk_wrote(contents, cache, tmp_path):
    """The package's own format is read, too."""
    datasets.DatasetDict({"train": table(contents), "test": table(contents[:1])}).save_to_disk(tmp_path / "saved")
    assert read(export_dataset(str(tmp_path / "saved"), "image", None, cache, None)) == contents


def test_lists_of_captions(contents, cache, tmp_path):
    """All that say something are kept."""
    texts = [["a", "b"], ["c", " ", None], ["d"], ["é"], ["f"]]
    path = write_parquet(tmp_path / ARCHIVE, table(contents, texts=texts))
    found = export_dataset(str(path), "image", "texts", cache, None)
    assert captions(found) == [("a", "b"), ("c",), ("d",), ("é",), ("f",)]
    assert (found / METADATA_FILE).read_text().isascii()


def test_every_kind_of_picture_has_its_suffix(cache, tmp_path):
    """The content decides, whatever a name says."""
    kinds = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}
    kinds |= {"AVIF": ".avif"} if "AVIF" in {*Image.SAVE, *Image.registered_extensions().values()} else {}
    for kind in kinds:
        draw_picture(40, 40, 1).save(tmp_path / "x", kind)
        assert dataset_rows._suffix_of((tmp_path / "x").read_bytes(), "x.png") == kinds[kind]
    assert dataset_rows._suffix_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "") == ".heic"
    assert dataset_rows._suffix_of(b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1", "") == ".avif"
    assert dataset_rows._suffix_of(b"MM\0*" + bytes(9), "") == ".tif"


# What is refused.


def test_rows_without_picture_or_caption(contents, cache, tmp_path):
    """All such rows are listed, up to ten."""
    data = table([*contents, None, b"", b"%PDF-1.4"] + [None] * 9, text=["a", " ", None, "", *"abcdefghijklm"])
    message = refusal(write_parquet(tmp_path / ARCHIVE, data), cache, caption="text")
    wanted = "split train: 15 of 17 rows cannot be used, counted from 0: row 1 (no caption), row 2 (no caption), "
    assert wanted + "row 3 (no caption), row 5 (no picture), row 6 (no picture)" in message
    assert "row 7 (its content is no JPEG, PNG, " in message and message.count("row ") == 10
    assert " and 5 more. Mend the dataset" in message
    lists = table(contents[:2], text=[["a"], []])
    assert "1 of 2 rows" in refusal(write_parquet(tmp_path / "lists.parquet", lists), cache, caption="text")


COLUMNS = {
    "missing": ("photo", None, "--image_column photo is no column of --dataset_name {}. It has: image (Image), "),
    "no caption": (
        "image",
        "prompt",
        "--caption_column prompt is no column of --dataset_name {}. It has: image (Image",
    ),
    "no picture": ("text", None, "--image_column text of {} holds string, no pictures. Its columns: image (Image), "),
    "numbers": ("image", "n", "--caption_column n of {} holds int64, no texts. Its columns: image (Image), text (str"),
    "labels": ("image", "label", "--caption_column label of {} holds ClassLabel, no texts."),
    "itself": ("image", "image", "--caption_column image of {} holds Image, no texts."),
    "list of pictures": ("many", None, "--image_column many of {} holds list of Image, no pictures."),
    "other struct": ("box", None, "--image_column box of {} holds {{x: int64}}, no pictures."),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_are_not_right(contents, cache, tmp_path, case):
    """The message has the columns that there are, and what they hold."""
    image, caption, words = COLUMNS[case]
    columns = {"text": TEXTS, "n": [*range(5)], "label": [0, 1, 0, 1, 0], "box": [{"x": 1}] * 5}
    data = table(contents, **columns, many=[[{"bytes": one, "path": None}] for one in contents])
    data = data.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    data = data.cast_column("many", datasets.List(datasets.Image()))
    path = write_parquet(tmp_path / ARCHIVE, data)
    message = refusal(path, cache, image, caption)
    assert words.format(path) in message
    assert "text (string), n (int64), label (ClassLabel), box ({x: int64}), many (list of Image)." in message


def test_splits_that_are_not_right(contents, cache, tmp_path):
    """Without train, one split is taken, and two are one too many."""
    copy = write_parquet(tmp_path / "copy/data/test-00000-of-00001.parquet", table(contents)).parents[1]
    assert read(export_dataset(str(copy), "image", None, cache, None)) == contents
    shutil.rmtree(cache)
    write_parquet(copy / "data/validation-00000-of-00001.parquet", table(contents))
    assert f"{copy} has no split train. It has: validation, test. Give the folder of" in refusal(copy, cache)


def test_places_that_are_not_right(contents, cache, tmp_path, monkeypatch):
    """Each message says what is there instead."""
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert "notes.csv is a file, but no parquet file." in refusal(tmp_path / "notes.csv", cache)
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files. Give a folder of pictures" in refusal(tmp_path / "empty", cache)
    (tmp_path / "tables").mkdir()
    shutil.copy(tmp_path / "notes.csv", tmp_path / "tables")
    assert "by most of its files, a dataset of kind csv, and none of pictures" in refusal(tmp_path / "tables", cache)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and so on")
    assert "bad.parquet cannot be read as a dataset of pictures: Parquet magic" in refusal(
        tmp_path / "bad.parquet", cache
    )
    write_parquet(tmp_path / "none.parquet", table(contents).select([]))
    assert "split train: it has no rows." in refusal(tmp_path / "none.parquet", cache)
    write_parquet(tmp_path / "odd [1]" / ARCHIVE, table(contents))
    assert "misreads [ ] in " in refusal(tmp_path / "odd [1]", cache)
    write_parquet(tmp_path / "around" / ARCHIVE, table(contents))
    assert "is a folder around --cache_dir" in refusal(tmp_path / "around", tmp_path / "around/cache")
    monkeypatch.setattr(hub_datasets, "is_installed", {"datasets": False}.get)
    with pytest.raises(ImportError, match=r"--dataset_name x/y needs datasets: pip install datasets\."):
        export_dataset("x/y", "image", None, cache, None)


def test_damage_in_the_middle(pictures, cache, tmp_path):
    """What the package raises while rows are read becomes a message, and nothing is left."""
    path = write_parquet(tmp_path / ARCHIVE, table([os.urandom(5000) for _ in range(50)]))
    content = bytearray(path.read_bytes())
    content[5000:200000] = b"\xff" * 195000
    path.write_bytes(content)
    assert f"{ARCHIVE} cannot be read as a dataset of pictures: " in refusal(path, cache)
    photos = shutil.copytree(pictures, tmp_path / "photos")
    (photos / "metadata.jsonl").write_text('{"file_name": "gone.jpg", "text": "a"}\n{"file_name": null, "text": "b"}')
    message = refusal(photos, cache, caption="text")
    assert f"row 0 ({photos}/gone.jpg is no file of the dataset), row 1 (no picture)." in message


def test_a_shard_lacks_a_column(contents, cache, tmp_path):
    """Which one is said."""
    write_parquet(tmp_path / "copy/train-00000-of-00002.parquet", table(contents, text=TEXTS))
    write_parquet(tmp_path / "copy/train-00001-of-00002.parquet", table(contents))
    assert "00001-of-00002.parquet has no column text" in refusal(tmp_path / "copy", cache, caption="text")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say a process's memory")
def test_pictures_are_not_held(tmp_path, cache):
    """Of 200 MB in parts of 10 MB, only a few parts more are in memory than of a single part."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"image": pyarrow.binary()})
    peaks = []
    for parts in (1, 20):
        with pyarrow.parquet.ParquetWriter(tmp_path / ARCHIVE, schema) as writer:
            for _ in range(parts):
                pictures = [b"\xff\xd8\xff" + os.urandom(10**6) for _ in range(10)]
                writer.write_table(pyarrow.table([pictures], schema))
        _, err = finish(start(tmp_path / ARCHIVE, "image", None, cache, None))
        peaks.append(int(err.rpartition("peak: ")[2]))
    assert peaks[1] - peaks[0] < 100, f"{peaks} MB"


@pytest.mark.parametrize(
    "path", ["{}/secret.jpg", "../secret.jpg", "zip://secret.jpg::{}/secret.zip", "http://x/a.jpg"]
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_dataset_names_a_file_of_another(pictures, cache, tmp_path, path, form):
    """A list that somebody shares brings no picture of the reader's into the training."""
    shutil.copy(pictures / "b.jpg", tmp_path / "secret.jpg")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(pictures / "b.jpg", "secret.jpg")
    rows = [{"bytes": b"", "path": None}, {"bytes": None, "path": path.format(tmp_path)}]
    file = write_parquet(tmp_path / "copy" / ARCHIVE, datasets.Dataset.from_dict({"image": rows}))
    message = refusal(file if form == "file" else file.parent, cache)
    assert ("is no file of the dataset" if path.startswith("http") else "lies outside of the dataset") in message


@pytest.mark.parametrize("pattern", ["{}/*.jpg", "../*.jpg"])
def test_a_card_names_files_of_others(pictures, cache, tmp_path, pattern):
    """A README.md cannot do so either."""
    shutil.copy(pictures / "b.jpg", tmp_path / "secret.jpg")
    (tmp_path / "copy").mkdir()
    lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train"]
    lines += [f"    path: {pattern.format(tmp_path)}", "---", ""]
    (tmp_path / "copy/README.md").write_text("\n".join(lines))
    assert "names files that are not its own: " in refusal(tmp_path / "copy", cache)


def test_several_configurations(pictures, cache, tmp_path):
    """Which there are is said."""
    photos = shutil.copytree(pictures, tmp_path / "photos")
    lines = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.*" for name in "ab"]
    (photos / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    assert "pick one among the available configs: ['a', 'b']" in refusal(photos, cache)


# What is used again.


def test_an_export_is_used_again(pictures, contents, cache, monkeypatch):
    """It is not made again, unless something that it depends on is another, or it lacks a file."""
    first = export_dataset(str(pictures), "image", None, cache, None)
    with monkeypatch.context() as patch:
        patch.setattr(hub_datasets, "write_rows", None)
        assert export_dataset(str(pictures), "image", None, cache, None) == first
        (first / ".DS_Store").touch()
        assert export_dataset(f"{pictures}/../pictures", "image", None, cache, None) == first
    (first / "000002.jpg").unlink()
    assert export_dataset(str(pictures), "image", None, cache, None) == first and read(first) == contents
    (first / "000001.jpg").write_bytes(b"")
    assert export_dataset(str(pictures), "image", None, cache, None) == first and read(first) == contents
    assert names(cache / "datasets") == [first.name]


def test_a_changed_dataset_is_another(contents, cache, tmp_path):
    """Its files, their times, what is in them, and the columns that are asked for decide."""
    path = write_parquet(tmp_path / "copy/data" / ARCHIVE, table(contents, text=TEXTS, other=TEXTS))
    copy, found = tmp_path / "copy", set()
    for column in (None, "text", "other"):
        found.add(export_dataset(str(copy), "image", column, cache, None))
    found.add(export_dataset(str(path), "image", None, cache, None))
    os.utime(path, ns=(1, 1))
    found.add(export_dataset(str(copy), "image", None, cache, None))
    write_parquet(path, table(contents[:3]))
    found.add(last := export_dataset(str(copy), "image", None, cache, None))
    (copy / "README.md").write_text("A card.")
    found.add(export_dataset(str(copy), "image", None, cache, None))
    assert len(found) == 7 and read(last) == contents[:3]


def test_a_photo_with_the_size_and_time_of_another_is_another(pictures, cache, tmp_path):
    """As of pictures without compression that were edited, and of files that come out of an archive."""
    folder = tmp_path / "copy"
    shutil.copytree(pictures, folder)
    path = folder / "dog.bmp"
    Image.new("RGB", (9, 7), "red").save(path)
    state, red = path.stat(), path.read_bytes()
    assert red in read(export_dataset(str(folder), "image", None, cache, None))
    Image.new("RGB", (9, 7), "blue").save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    now = read(export_dataset(str(folder), "image", None, cache, None))
    assert path.read_bytes() in now and red not in now


def start(*arguments, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a process that exports a dataset and prints its folder."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments, default=str)]
    variables = (environment or os.environ) | {"USE_TORCH": "0"}  # else the package takes seconds to import it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Return what a process printed, and check that it showed neither a bar, nor a token, nor a traceback."""
    out, err = process.communicate(timeout=60)
    assert not any(word in out + err for word in (WRITE_TOKEN, "Traceback", "it/s", "pictures/s", "examples/s"))
    return out.strip(), err


def write_many(contents: list[bytes], path: Path) -> Path:
    """Write a parquet file whose pictures take a while."""
    return write_parquet(path, table([contents[1]] * 6000))


def test_a_killed_process_leaves_nothing_that_is_used(contents, cache, tmp_path):
    """What it wrote is removed once it is a day old, and the next one starts afresh."""
    path = write_many(contents, tmp_path / ARCHIVE)
    process, work = start(path, "image", None, cache, None), []
    while not (work := list((cache / "datasets").glob(".writing-*/photos/000100.jpg"))) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate() and process.returncode == -signal.SIGKILL and work
    left = work[0].parents[1]
    assert names(cache / "datasets") == [left.name]
    assert len(read(export_dataset(str(path), "image", None, cache, None))) == 6000 and left.exists()
    for folder in (left / "photos", left, *(one for one in left.iterdir() if one.is_dir())):
        os.utime(folder, (0, 0))
    small = write_parquet(tmp_path / "small.parquet", table(contents))
    export_dataset(str(small), "image", None, cache, None)
    assert not left.exists()


def test_two_processes_at_once(contents, cache, tmp_path):
    """Both get the same folder, and one export is there in the end."""
    path = write_parquet(tmp_path / ARCHIVE, table(contents * 200))
    (one, _), (two, _) = map(finish, [start(path, "image", None, cache, None) for _ in range(2)])
    assert one == two and len(read(Path(one))) == 1000
    assert names(cache / "datasets") == [Path(one).name]


def test_a_loser_uses_the_winners(contents, cache, tmp_path, monkeypatch):
    """Who comes second finds the place taken, and leaves it as it is."""
    path = write_parquet(tmp_path / ARCHIVE, table(contents))
    put = hub_datasets._put
    monkeypatch.setattr(hub_datasets, "_put", functools.partial(put_late, put))
    found = export_dataset(str(path), "image", None, cache, None)
    assert (found / "first").exists() and read(found) == contents


def put_late(put, done: Path, place: Path, aside: Path) -> None:
    """Let another process put its export there first."""
    shutil.copytree(done, place)
    (place / "first").touch()
    put(done, place, aside)


def test_a_full_disk_is_named(contents, cache, tmp_path):
    """As is a place that cannot be written."""
    path = write_parquet(tmp_path / ARCHIVE, table(contents))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not be written: .* GB are free there"):
        export_dataset(str(path), "image", None, tmp_path / "file", None)


# The Hub.


class DatasetHandler(HubHandler):
    """Serve datasets, too; `gated/` ones show their files' names, and nothing else, to anybody."""

    ROUTES = (
        *HubHandler.ROUTES,
        ("GET", f"/api/datasets/{REPOSITORY}(?:/revision/main)?", "dataset"),
        ("GET", f"/api/datasets/{REPOSITORY}/tree/[0-9a-f]{{40}}", "tree"),
        ("GET", f"/datasets/{REPOSITORY}/resolve/[0-9a-f]{{40}}/(.+)", "file"),
        ("HEAD", f"/datasets/{REPOSITORY}/resolve/[0-9a-f]{{40}}/(.+)", "file"),
    )
    OPEN = (*HubHandler.OPEN, "dataset", "tree", "file")

    def dataset(self, name: str, body: bytes) -> dict:
        """Describe a dataset, a private one only to those who are logged in."""
        if self.find(name, write=False).private and self.role is None:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        return self.info(name, body)

    def tree(self, name: str, body: bytes) -> list[dict]:
        """List the files."""
        files = self.find(name, write=False).files
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in sorted(files)]

    def file(self, name: str, path: str, body: bytes) -> bytes:
        """Return a file."""
        if name.startswith("gated/"):
            raise Refusal(403, f"Access to dataset {name} is restricted", "GatedRepo")
        return self.find(name, write=False).files[path]

    def send(self, status: int, content, headers: dict[str, str | None] | None = None) -> None:
        """Send an answer, of JSON or the bytes of a file."""
        if not isinstance(content, bytes):
            return super().send(status, content, headers)
        self.send_response(status)
        name = "/".join(self.path.split("/")[2:4])
        self.send_header("X-Repo-Commit", self.server.repositories[name].sha)
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content) if self.command == "GET" else None


@pytest.fixture
def server(contents, tmp_path):
    """Serve a Hub with datasets."""
    with HubServer() as server:
        server.RequestHandlerClass = DatasetHandler
        file = write_parquet(tmp_path / "hub.parquet", table(contents, text=TEXTS)).read_bytes()
        files = {f"data/{ARCHIVE}": file, "README.md": b"---\nlicense: mit\n---\nDogs.\n"}
        for name in (f"{USER}/dogs", "gated/dogs"):
            server.repositories[name] = Repository(files=dict(files))
        server.repositories[f"{USER}/mine"] = Repository(private=True, files=dict(files))
        yield server


def ask(server: HubServer, cache: Path, name: str, token: str | None = None, **changes: str) -> tuple[str, str]:
    """Export a dataset of the Hub, and check that nothing was written to the client's home."""
    environment = server.environment(cache.parent / "home") | changes
    answer = finish(start(name, "image", "text", cache, token, environment=environment))
    written = {path.name for path in (cache.parent / "home").rglob("*")}
    assert written <= {".agent_harnesses.json"}  # of the client, at every start
    return answer


def test_a_dataset_of_the_hub(server, contents, cache):
    """It is downloaded once, read offline, and read again when it is another."""
    name = f"{USER}/dogs"
    found = Path(ask(server, cache, name)[0])
    assert found.name.startswith("tester-dogs-") and read(found) == contents and len(captions(found)) == 5
    assert ask(server, cache, name)[0] == str(found)
    shutil.rmtree(found)
    before = len(server.requests)
    assert ask(server, cache, name, HF_HUB_OFFLINE="1")[0] == str(found) and read(found) == contents
    assert len(server.requests) == before
    files = [request.path for request in server.requests if request.method == "GET" and "/resolve/" in request.path]
    assert len(files) == 2
    server.repositories[name].commits.append("more")
    other = ask(server, cache, name)[0]
    assert other != str(found) and read(Path(other)) == contents


def test_a_private_dataset(server, contents, cache):
    """It needs a login, which is asked for."""
    out, err = ask(server, cache, f"{USER}/mine")
    assert not out and "the Hub shows this login no such dataset: 401 " in err and "a private one needs" in err
    assert read(Path(ask(server, cache, f"{USER}/mine", WRITE_TOKEN)[0])) == contents


@pytest.mark.parametrize("name", ["gated/dogs", "tester/cats", "a/b/c", "-x/y", "no such folder"])
def test_datasets_that_cannot_be_had(server, cache, name):
    """Each message says what to do."""
    words = {
        "gated/dogs": "lets only some read it: 403 Access to dataset gated/dogs is restricted. Ask for access at http",
        "tester/cats": "the Hub shows this login no such dataset: 404 Repository not found. Check the name;",
    }
    out, err = ask(server, cache, name, WRITE_TOKEN)
    assert not out and f"error: --dataset_name {name!r} is no file or folder here, and " in err
    assert words.get(name, "no dataset's name on the Hub: ") in err


def test_offline_without_a_copy(server, cache):
    """It is said that the Hub was not asked, and when only a part was downloaded."""
    name = f"{USER}/dogs"
    out, err = ask(server, cache, name, HF_HUB_OFFLINE="1")
    assert not out and "nothing of it was downloaded before HF_HUB_OFFLINE forbade" in err and not server.requests
    server.fail(r"/resolve/.*parquet", status=403)
    out, err = ask(server, cache, name, WRITE_TOKEN)
    assert not out and "it could not be downloaded: " in err and "Check the connection" in err
    out, err = ask(server, cache, name, HF_HUB_OFFLINE="1")
    assert not out and "only a part of it was downloaded before" in err


def test_a_hub_that_cannot_be_reached(cache, monkeypatch):
    """The reason is the connection's."""
    monkeypatch.setattr(hub_datasets, "BROKEN", ())  # no second try
    monkeypatch.setattr(hub_datasets.huggingface_hub, "snapshot_download", refuse_connection)
    monkeypatch.setattr(hub_datasets.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = refusal("owner/name", cache)
    assert "and it could not be downloaded: [Errno 111] Connection refused. Check the connection to http" in message


def refuse_connection(*_, **options) -> None:
    """Raise what the client does without a connection."""
    assert options["repo_type"] == "dataset" and "trust_remote_code" not in options
    cause = hub_datasets.huggingface_hub.errors.OfflineModeIsEnabled("[Errno 111] Connection refused")
    raise hub_datasets.huggingface_hub.errors.LocalEntryNotFoundError("Got: much more") from cause


def test_a_token_that_is_none(server, cache):
    """It is not quoted."""
    out, err = ask(server, cache, f"{USER}/dogs", f"{WRITE_TOKEN}\nx")
    assert not out and "The token has spaces or signs in it" in err and not server.requests
