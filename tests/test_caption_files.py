"""Captions beside photos, in their names and in a list: what is read, what is refused, and what is trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import draw_picture
from tests.runs import PROMPT, SCRIPTS, SIZE, differing, names, read_tensors, untimed
from utils.core.errors import UserError
from utils.data.captions import find_captions
from utils.run.run_summary import list_prompts


@pytest.fixture
def folder(tmp_path) -> Path:
    """Make a folder of three photos without content."""
    (tmp_path / "more").mkdir()
    for name in ("a dog_on grass (2).jpg", "more/b.png", "001.webp"):
        (tmp_path / name).touch()
    return tmp_path


def photos_of(folder: Path) -> list[Path]:
    """Return the photos."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))


def found(folder: Path, strategy: str, prompt: str | None = None, prepend: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the captions by the photos' names."""
    captions = find_captions(strategy, folder, photos_of(folder), prompt, prepend)
    return {path.relative_to(folder).as_posix(): texts for path, texts in captions.items()}


def write(folder: Path, files: dict[str, str]) -> None:
    """Write text files."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def test_the_instance_prompt_is_every_photos(folder):
    """Files that hold captions are not looked at."""
    write(folder, {"001.txt": "a cat", "metadata.jsonl": "rubbish"})
    assert set(found(folder, "instanceprompt", "a sks dog").values()) == {("a sks dog",)}


def test_each_line_of_a_text_file_is_a_caption(folder):
    """Empty lines are none, spaces around it do not count, and neither does a mark of the byte order."""
    texts = {
        "001.txt": "\ufeff one \n\n  two\r\n\n",
        "more/b.txt": "ein Hund – süß",
        "a dog_on grass (2).txt": "three",
    }
    write(folder, texts)
    assert found(folder, "textfile") == {
        "001.webp": ("one", "two"),
        "a dog_on grass (2).jpg": ("three",),
        "more/b.png": ("ein Hund – süß",),
    }
    assert found(folder, "textfile", "a sks dog,", True)["001.webp"] == ("a sks dog, one", "a sks dog, two")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a dog_on grass (2)", "a dog on grass"),
        ("a_dog_02", "a dog"),
        ("a dog-3", "a dog"),
        ("well-kept dog", "well-kept dog"),
        ("dog", "dog"),
        ("p3rs0n at 7", "p3rs0n at"),
    ],
)
def test_names_are_words(tmp_path, name, caption):
    """Underlines are spaces, and the number of a copy says nothing."""
    (tmp_path / f"{name}.jpg").touch()
    assert found(tmp_path, "filename") == {f"{name}.jpg": (caption,)}


def test_a_list_names_photos_by_their_paths(folder):
    """A text or several; lines for other files of the folder, and empty ones, are passed over."""
    write(folder, {"notes.txt": ""})
    entries = [
        {"file_name": "001.webp", "text": ["one", " two "], "other": 1},
        {"file_name": "more/b.png", "text": "three"},
        {"file_name": "a dog_on grass (2).jpg", "text": "four"},
        {"file_name": "notes.txt", "text": "no photo"},
    ]
    write(folder, {"metadata.jsonl": "\n\n".join(map(json.dumps, entries)) + "\n"})
    assert found(folder, "metadata") == {
        "001.webp": ("one", "two"),
        "a dog_on grass (2).jpg": ("four",),
        "more/b.png": ("three",),
    }


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_caption_in_a_list_may_hold_signs_that_end_lines_elsewhere(tmp_path, end):
    """JSON writes them as they are, and a file from Windows ends its lines by two signs."""
    texts = ["a dog\u2028on grass", "a dog\u0085on sand"]
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": texts[n]}, ensure_ascii=False) for n in range(2)]
    for number in range(2):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" + end.join([*lines, ""])).encode())
    assert found(tmp_path, "metadata") == {f"{number}.jpg": (texts[number],) for number in range(2)}


def test_accents_may_be_stored_in_two_ways(tmp_path):
    """A list from one system finds the photos of another."""
    (tmp_path / "cafe\u0301.jpg").touch()
    write(tmp_path, {"metadata.jsonl": '{"file_name": "caf\u00e9.jpg", "text": "a dog"}'})
    assert found(tmp_path, "metadata") == {"cafe\u0301.jpg": ("a dog",)}


def test_the_screen_shows_the_beginning_of_long_captions():
    """A captioner writes a hundred words about each photo; two that begin alike are two."""
    texts = ["a short one", "word " * 100 + "x", "word " * 100 + "y", "字" * 100]
    shown = list_prompts([SimpleNamespace(prompts=texts[:2]), SimpleNamespace(prompts=texts[1:])])
    assert shown == ["'a short one'", *[f"'{('word ' * 16).strip()}…'"] * 2, f"'{'字' * 79}…'"]


@pytest.mark.parametrize(
    ("strategy", "wants"),
    [
        ("textfile", "a text file beside them"),
        ("filename", "words in their names"),
        ("metadata", "a line in {folder}/metadata.jsonl"),
    ],
)
def test_all_photos_without_a_caption_are_named(tmp_path, strategy, wants):
    """The first ten, and how many more there are; an empty file or text is no caption."""
    for number in range(13):
        (tmp_path / f"{number:02d}.jpg").touch()
    write(tmp_path, {"00.txt": "a dog", "01.txt": " \n", "metadata.jsonl": '{"file_name": "00.jpg", "text": "a dog"}'})
    lacking = 13 if strategy == "filename" else 12
    listed = ", ".join(str(tmp_path / f"{number:02d}.jpg") for number in range(13 - lacking, 23 - lacking))
    with pytest.raises(UserError) as refusal:
        found(tmp_path, strategy)
    assert str(refusal.value) == (
        f"{lacking} of 13 photos have no caption: {listed} and {lacking - 10} more. --caption_strategy {strategy} "
        f"wants {wants.format(folder=tmp_path)} for each."
    )


LINES = {  # a line of metadata.jsonl, and what is said of it
    '{"file_name": "001.webp"': "is no valid JSON: Expecting",
    "[1]": "must be an object like",
    '{"file_name": "001.webp"}': "must be an object like",
    '{"file_name": "001.webp", "text": 1}': "must be an object like",
    '{"file_name": "001.webp", "text": ["a", 1]}': "must be an object like",
    '{"file_name": 1, "text": "a"}': "must be an object like",
    '{"file_name": "002.webp", "text": "a"}': "'002.webp' is not in that folder.",
    '{"file_name": "../outside.jpg", "text": "a"}': "'../outside.jpg' leaves the folder.",
    '{"file_name": "/etc/hostname", "text": "a"}': "'/etc/hostname' leaves the folder.",
    '{"file_name": "more/../../outside.jpg", "text": "a"}': "'more/../../outside.jpg' leaves the folder.",
    '{"file_name": "first.webp", "text": "b"}': "'first.webp' has a line already.",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_wrong_is_named(tmp_path, line):
    """With its number; a file outside of the folder is never looked at."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in (folder / "001.webp", folder / "first.webp", tmp_path / "outside.jpg"):
        path.touch()
    write(folder, {"metadata.jsonl": f'{{"file_name": "first.webp", "text": "a"}}\n{line}\n'})
    with pytest.raises(UserError) as refusal:
        found(folder, "metadata")
    head = f"{folder}/metadata.jsonl, line 2"
    assert str(refusal.value).startswith((f"{head} {LINES[line]}", f"{head}: {LINES[line]}"))


@pytest.mark.parametrize(("strategy", "name"), [("textfile", "001.txt"), ("metadata", "metadata.jsonl")])
def test_captions_that_are_no_text_are_an_error(folder, strategy, name):
    """The file is named."""
    (folder / name).write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match=rf"{name}.* cannot be read"):
        found(folder, strategy)


# In runs.


def captioned(trainer, folder: Path, captions: list[str]) -> Path:
    """Copy the photos and write captions beside them, in every way that there is."""
    shutil.copytree(trainer.photos, folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    for path in paths:
        path.with_suffix(".txt").write_text("\n".join(captions))
    entries = [{"file_name": path.relative_to(folder).as_posix(), "text": captions} for path in paths]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_for_all_and_the_same_caption_for_each_train_the_same(trainer, tmp_path, script):
    """To the bit, from all sources of captions, also behind the instance prompt."""
    whole = captioned(trainer, tmp_path / "whole", [PROMPT])
    rest = captioned(trainer, tmp_path / "rest", ["sks dog"])
    flags = {
        "plain": "",
        "textfile": f"--instance_data_dir {whole}",
        "metadata": f"--instance_data_dir {whole}",
        "textfile prepended": f"--instance_data_dir {rest} --prepend_instance_prompt --instance_prompt 'a photo of'",
    }
    words = {name: f"--caption_strategy {name.split()[0]}" if name != "plain" else "" for name in flags}
    outs = trainer.run_all(
        {tmp_path / name: (script, f"{text} {words[name]} --max_train_steps 4") for name, text in flags.items()}
    )
    for out in outs[1:]:
        assert differing(read_tensors(outs[0]), read_tensors(out)) == [] and untimed(outs[0]) == untimed(out)


def test_the_name_of_a_photo_is_what_it_shows(trainer, tmp_path):
    """A folder of photos whose names are the prompt trains as one with the prompt for all."""
    for folder in ("named", "plain"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            name = f"a_photo_of_sks_dog_{number}.png" if folder == "named" else f"{number}.png"
            draw_picture(SIZE, SIZE, number).save(tmp_path / folder / name)
    outs = trainer.run_all(
        {
            tmp_path / "one": ("lora", f"--instance_data_dir {tmp_path / 'plain'}"),
            tmp_path / "two": ("lora", f"--instance_data_dir {tmp_path / 'named'} --caption_strategy filename"),
        }
    )
    assert differing(*map(read_tensors, outs)) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_captions_take_turns_by_the_visit_alone(trainer, tmp_path, script):
    """Workers, prompts encoded in the loop and resuming change no bit; no instance prompt is needed."""
    folder = captioned(trainer, tmp_path / "photos", ["a red dog", "a dog on grass", "sks"])
    words = ["--pretrained_model_name_or_path", trainer.model, "--instance_data_dir", folder]
    words += f"--caption_strategy textfile --resolution {SIZE} --train_batch_size 2 --seed 51".split()
    words += "--learning_rate 1e-3 --report_to none --max_train_steps 5 --checkpointing_steps 2".split()
    ways = {
        "plain": [],
        "workers": ["--dataloader_num_workers", "2"],
        "encoded in the loop": ["--no-pre_compute_text_embeddings"],
        "resumed": [],
    }
    outs = {}
    for name, more in ways.items():
        out = outs[name] = tmp_path / name
        if name == "resumed":
            out.mkdir()
            shutil.copytree(outs["plain"] / "checkpoint-2", out / "checkpoint-2")
            shutil.copy(outs["plain"] / "metrics.jsonl", out)
            more = ["--resume_from_checkpoint", "latest"]
        run = trainer.start_words(script, out, [*map(str, words), *more, "--output_dir", str(out)]).finish()
        assert run.code == 0, run.text
        assert "5 of 'a red dog' or 'a dog on grass' or 'sks'" in run.stdout
    for out in outs.values():
        assert differing(read_tensors(outs["plain"]), read_tensors(out)) == []
    (folder / "beach.txt").write_text("another dog")
    more = ["--resume_from_checkpoint", "latest", "--output_dir", str(outs["plain"])]
    run = trainer.start_words(script, outs["plain"], [*map(str, words), *more]).finish()
    assert run.code == 1 and "captions: [['a red dog', 'a dog on grass', 'sks']" in run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_captions_are_an_error_before_anything_is_written(trainer, tmp_path, script):
    """And so is a list that leads out of the folder."""
    folder = captioned(trainer, tmp_path / "photos", ["a dog"])
    (folder / "beach.txt").unlink()
    flags = f"--instance_data_dir {folder} --caption_strategy"
    run = trainer.run(script, tmp_path / "out", f"{flags} textfile", code=1)
    assert f"error: 1 of 5 photos have no caption: {folder / 'beach.png'}." in run.stderr
    (folder / "metadata.jsonl").write_text('{"file_name": "../tiny/model_index.json", "text": "a"}')
    run = trainer.run(script, tmp_path / "out", f"{flags} metadata", code=1)
    assert "'../tiny/model_index.json' leaves the folder" in run.stderr and "Traceback" not in run.text
    assert names(tmp_path) == ["photos"]
