"""The sheet of what a training command gives the model: it holds the very pixels, and nothing else is written."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import train_dreambooth_lora
from tests.conftest import draw_picture
from tests.runs import ROOT, SIZE, environment, names
from utils import preview_data
from utils.data.geometry import Size
from utils.sampling import image_grid


def find(picture: Image.Image, sheet: Image.Image) -> list[tuple[int, int]]:
    """Return where a picture lies in a sheet, as (top, left)."""
    small, large = np.asarray(picture), np.asarray(sheet)
    height, width = small.shape[:2]
    corners = np.argwhere((large == small[0, 0]).all(axis=-1))
    fits = [(y, x) for y, x in corners if large[y : y + height, x : x + width].shape == small.shape]
    return [(int(y), int(x)) for y, x in fits if (large[y : y + height, x : x + width] == small).all()]


def test_the_sheet_holds_what_the_model_is_given(tiny, tmp_path):
    """Photos of the training size are there pixel by pixel, each once before any comes again; nothing else is made."""
    photos, sheet = tmp_path / "photos", tmp_path / "sheets" / "sheet.png"
    photos.mkdir()
    drawn = [draw_picture(SIZE, SIZE, number) for number in range(4)]
    for number, picture in enumerate(drawn):
        picture.save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"sks {number}")
    flags = f"--resolution {SIZE} --train_batch_size 2 --seed 3 --caption_strategy textfile --report_to none"
    flags += " --with_prior_preservation --class_prompt dog --num_class_images 2"
    command = ["-m", "utils.preview_data", "--output", sheet, "--count", "12", "train_dreambooth_lora.py"]
    command += ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, *flags.split()]
    command += ["--output_dir", tmp_path / "out"]
    before = names(tmp_path)
    variables = environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"{sheet}\n"), done.stderr
    assert sorted([*before, "sheets"]) == [name for name in names(tmp_path) if name != "home"]
    found = [find(picture, Image.open(sheet).convert("RGB")) for picture in drawn]
    # Three batches of two photos each, with as many class images: two photos come a second time.
    assert sorted(len(places) for places in found) == [1, 1, 2, 2]
    rows = [sorted({y for places in found for y, _ in places}).index(y) for places in found for y, _ in places]
    assert sorted(rows) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("cleans", "caption"), [(False, "A SKS Dog"), (True, "a sks dog")])
def test_a_picture_is_labelled_with_what_the_text_encoder_reads(tmp_path, cleans, caption):
    """Its file, its caption, cleaned if the model's are, and how often it was seen; what is to be drawn is grey."""
    path, size = tmp_path / "dog.png", (8, 6)
    example = train_dreambooth_lora.Example(path, ("A SKS Dog",), None, size)
    missing = train_dreambooth_lora.Example(tmp_path / "00001.png", ("a dog",), None, size, True, True)

    class Dataset:
        def __init__(self, row: int):
            self.row, self.examples = row, [example, missing]

        def __getitem__(self, draw):
            return {"pixel_values": torch.linspace(-1, 1, 3 * 6 * 8).reshape(3, 6, 8), "prompt_rows": self.row}

    texts, draws = (
        ["A SKS Dog", ""],
        [SimpleNamespace(example=index, earlier_visits=visit, size=Size(*size)) for index, visit in ((0, 0), (0, 2))],
    )
    picture, label = preview_data.describe(Dataset(0), texts, draws[0], cleans)
    assert picture.size == size and np.asarray(picture)[0, 0, 0] == 0 and np.asarray(picture)[-1, -1, -1] == 255
    assert label == f"dog.png, 8x6 px: {caption}"
    assert preview_data.describe(Dataset(1), texts, draws[1], cleans)[1] == "dog.png, 8x6 px, seen 2x: (no caption)"
    to_draw = SimpleNamespace(example=1, earlier_visits=0, size=Size(*size))
    grey, label = preview_data.describe(Dataset(0), texts, to_draw, cleans)
    assert grey.size == size and label == "00001.png: to be drawn from 'a dog'"


def test_what_a_mask_hides_is_tinted_and_sizes_are_told(tiny, tmp_path):
    """Each picture has its own size; places that count nothing are tinted, those that count are the picture's own."""
    photos, masks, sheet = tmp_path / "photos", tmp_path / "masks", tmp_path / "sheet.png"
    photos.mkdir()
    masks.mkdir()
    for number, (width, height) in enumerate(((SIZE, SIZE), (56, 80))):
        draw_picture(width, height, number).save(photos / f"{number}.png")
        mask = Image.new("L", (width, height))
        mask.paste(255, (16, 16, 40, 48))
        mask.save(masks / f"{number}.png")
    flags = f"--resolution {SIZE} --train_batch_size 1 --seed 3 --crop_aspect preserve --report_to none"
    words = [
        "--output",
        str(sheet),
        "--count",
        "2",
        "train_dreambooth.py",
        "--pretrained_model_name_or_path",
        str(tiny),
    ]
    words += ["--instance_data_dir", str(photos), "--mask_data_dir", str(masks), "--instance_prompt", "a sks dog"]
    words += [*flags.split(), "--output_dir", str(tmp_path / "out")]
    variables = environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "utils.preview_data", *words]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = Image.open(sheet).convert("RGB")
    for number, (width, height) in enumerate(((SIZE, SIZE), (56, 80))):
        picture = draw_picture(width, height, number)
        ((top, left),) = find(picture.crop((16, 16, 40, 48)), drawn)
        cell = drawn.crop((left - 16, top - 16, left - 16 + width, top - 16 + height))
        hidden = np.asarray(Image.blend(picture, Image.new("RGB", picture.size, preview_data.TINT), 0.75), int)
        counts = np.zeros((height, width), bool)
        counts[16:48, 16:40] = True
        shown, wanted = np.asarray(cell, int), np.where(counts[..., None], np.asarray(picture, int), hidden)
        assert np.abs(shown - wanted).max() <= 1


def test_a_caption_is_shown_whole_also_under_a_small_picture(monkeypatch):
    """Otherwise nobody sees what a picture of 64 px is told to show; the picture itself stays as it is."""
    words = " ".join(f"word{number}" for number in range(33))  # 77 tokens of CLIP, and more
    shown = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, text, *rest, **options: shown.append(text))
    picture = draw_picture(64, 48, 0)
    cell = preview_data.widen(picture)
    image_grid.make_grid([cell] * 4, 4, [words] * 4, lines=preview_data.LINES)
    assert " ".join(shown).split() == words.split() * 4
    left = (preview_data.NARROWEST - 64) // 2
    assert cell.crop((left, 0, left + 64, 48)).tobytes() == picture.tobytes()
    assert preview_data.widen(draw_picture(300, 20, 0)).size == (300, 20)


def test_mistakes_of_the_training_flags_are_told_as_by_the_script(capsys):
    """The usage is the script's; so is the exit status."""
    with pytest.raises(SystemExit, match="2"):
        preview_data.main(["train_dreambooth.py", "--train_batch_size", "0"])
    assert "--train_batch_size 0 is out of range" in capsys.readouterr().err
    for words in (["--count", "0", "train_dreambooth.py"], ["train.py"]):
        with pytest.raises(SystemExit, match="2"):
            preview_data.main(words)
    assert Path("data-preview.png").exists() is False
