"""The world of shapes: what is drawn, what captions say, and what the judge reads from it."""

import numpy as np
import pytest
from PIL import Image

from utils.data import prompt_cleaning
from utils.evaluation import shape_reader
from utils.synthetic import shapes, small_tokenizers
from utils.synthetic.shapes import CLASSES, COLOURS, RARE_WORDS, SUBJECTS, WORDS


def test_the_world_is_as_large_as_it_has_to_be():
    """Enough classes, colours, subjects and words that stand in no caption."""
    assert len(CLASSES) >= 5 and len(COLOURS) >= 8 and len(SUBJECTS) >= 8 and len(RARE_WORDS) >= 3
    assert {subject.shape for subject in SUBJECTS.values()} <= set(CLASSES)
    assert len({subject.shape for subject in SUBJECTS.values()}) >= 4
    _, texts, _ = shapes.draw_corpus(2000, 4, np.random.default_rng(0))
    assert not {word for text in texts for word in text.split()} & set(RARE_WORDS)
    assert {word for text in texts for word in text.split()} == set(WORDS) - set(RARE_WORDS)


def test_captions_say_what_is_drawn():
    """Every word of a caption is true, and each attribute is left out at times."""
    rng = np.random.default_rng(0)
    left_out = dict.fromkeys(("colour", "background", "size", "place"), 0)
    for _ in range(400):
        scene = shapes.random_scene(rng)
        text = shapes.caption(scene, rng)
        words = text.split()
        assert scene.shape in words and scene.colour != scene.background
        assert not set(words) & (set(CLASSES) - {scene.shape})
        assert not set(words) & (set(COLOURS) - {scene.colour, scene.background})
        assert not set(words) & (set(shapes.SIZES) - {scene.size})
        assert not set(words) & (set(shapes.PLACES) - {scene.place})
        for name in left_out:
            left_out[name] += getattr(scene, name) not in words
    assert 30 < left_out["colour"] < 110 and 30 < left_out["background"] < 110 and 120 < left_out["size"] < 280
    assert (
        shapes.phrase("circle", "red", "blue", "small", "left")
        == "a small red circle at the left on a blue background"
    )
    assert shapes.phrase("ring") == "a ring"


@pytest.mark.parametrize("pixels", [16, 32, 64])
def test_the_judge_reads_what_was_drawn(pixels):
    """Class, colour, background, size and place of every picture, also under some noise."""
    rng = np.random.default_rng(pixels)
    right = dict.fromkeys(("shape", "colour", "background", "size", "place"), 0)
    for number in range(120):
        scene = shapes.random_scene(rng)
        drawn = np.asarray(shapes.draw(scene, pixels), np.float32) + rng.normal(
            0, 8 * (number % 2), (pixels, pixels, 3)
        )
        reading = shape_reader.read(Image.fromarray(np.clip(drawn, 0, 255).astype(np.uint8)))
        for name in right:
            right[name] += getattr(reading, name) == getattr(scene, name)
    assert min(right.values()) >= 117, right


def test_the_judge_knows_nothing_in_an_empty_or_noisy_picture():
    """Neither a plain colour nor noise is a shape."""
    rng = np.random.default_rng(0)
    for pixels in (np.full((16, 16, 3), 90), rng.normal(90, 12, (16, 16, 3)), rng.integers(0, 256, (16, 16, 3))):
        picture = Image.fromarray(pixels.astype(np.uint8))
        assert shape_reader.read(picture).shape is None
        assert all(shape_reader.match(picture, subject) == 0 for subject in SUBJECTS)


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_a_subject_matches_itself_and_nothing_else_does(subject):
    """Its pictures match wherever it stands; plain members of its class and other subjects of it do not."""
    rng = np.random.default_rng(1)
    shape = SUBJECTS[subject].shape
    for pixels in (16, 32):
        own = [
            shape_reader.match(shapes.draw(shapes.random_scene(rng, subject=subject), pixels), subject)
            for _ in range(8)
        ]
        plain = [
            shape_reader.match(shapes.draw(shapes.random_scene(rng, shape=shape), pixels), subject) for _ in range(12)
        ]
        assert min(own) > 0.85 and max(plain) < 0.3, (min(own), max(plain))
    others = [name for name in SUBJECTS if name != subject]
    strangers = [
        shape_reader.match(shapes.draw(shapes.random_scene(rng, subject=name), 16), subject) for name in others
    ]
    assert max(strangers) < shape_reader.PRESENT


def test_a_blurred_subject_matches_less_and_a_recoloured_one_not():
    """The match falls with what is lost."""
    rng = np.random.default_rng(2)
    sharp = shapes.draw(shapes.random_scene(rng, subject="quartered circle", size="large"), 32)
    blurred = sharp.resize((5, 5), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BICUBIC)
    turned = Image.fromarray(np.asarray(sharp)[..., [1, 2, 0]])
    values = [shape_reader.match(picture, "quartered circle") for picture in (sharp, blurred, turned)]
    assert values[0] > 0.9 > values[1] > 0.2 and values[2] == 0


def test_a_pattern_is_found_on_another_class():
    """Which tells a subject that leaks into it."""
    subject, rng = SUBJECTS["striped square"], np.random.default_rng(3)
    scene = shapes.random_scene(rng, shape="circle", background="green", size="large")
    drawn = shapes.to_image(shapes.paint_pattern(scene, subject, 32))
    assert shape_reader.match(drawn, "striped square", "circle") > 0.85
    assert shape_reader.match(drawn, "striped square") < shape_reader.match(drawn, "striped square", "circle")
    assert shape_reader.match(shapes.draw(scene, 32), "striped square", "circle") < 0.3


def test_photos_have_the_backgrounds_that_count_as_seen():
    """And no subject has a background that parts of it would be lost before."""
    for subject, entry in SUBJECTS.items():
        seen, unseen = shapes.split_backgrounds(subject)
        assert len(seen) >= 3 and len(unseen) >= 2 and not set(seen) & set(unseen)
        assert not (set(seen) | set(unseen)) & set(entry.palette)
        photos = shapes.draw_photos(subject, 5, 32, np.random.default_rng(0), seen)
        assert {shape_reader.read(photo).background for photo in photos} == set(seen[:5])
        assert len({photo.tobytes() for photo in photos}) == 5


def test_every_word_is_one_token_and_survives_the_cleaning():
    """Of both text encoders, rare words included."""
    text = " ".join(WORDS)
    assert prompt_cleaning.clean(text) == text
    for tokenizer in (small_tokenizers.build_tokenizer(words=WORDS), small_tokenizers.build_t5_tokenizer(WORDS)):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(WORDS)


def test_class_pictures_are_of_the_class_and_as_varied(tmp_path):
    """They show that shape in many colours, never a subject's pattern, and are the same again."""
    paths = shapes.write_class_pictures(tmp_path / "first", "circle")
    again = shapes.write_class_pictures(tmp_path / "second", "circle")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    readings = [shape_reader.read(Image.open(path)) for path in paths]
    assert len(paths) == shapes.CLASS_PICTURES and {reading.shape for reading in readings} == {"circle"}
    assert len({reading.colour for reading in readings}) == len(shapes.COLOURS)
    assert (
        max(shape_reader.match(Image.open(path), "quartered circle", "circle") for path in paths[:20])
        < shape_reader.PRESENT
    )
