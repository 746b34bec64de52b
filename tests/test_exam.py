"""The exam's questions, and that its measures say of drawings what is true of them."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from utils.evaluation import exam, shape_reader
from utils.evaluation.exam import CLASS, OTHER_CLASSES, OTHER_PROMPTS, SCENES, SEEN, UNSEEN, Answer, Enlarged, Question
from utils.evaluation.standard_errors import Estimate, estimate, mean_of
from utils.synthetic import shapes
from utils.synthetic.shapes import COLOURS

SUBJECT = "quartered circle"


def test_the_questions_cover_backgrounds_scenes_the_class_and_the_rest():
    """Photos have the seen backgrounds, never the others; the word is in the subject's prompts alone."""
    questions = exam.ask(SUBJECT, "sks", range(3))
    seen, unseen = shapes.split_backgrounds(SUBJECT)
    by_topic = {topic: [one for one in questions if one.topic == topic] for topic in exam.TOPICS}
    assert {one.wanted["background"] for one in by_topic[SEEN]} == set(seen)
    assert {one.wanted["background"] for one in by_topic[UNSEEN] + by_topic[SCENES]} == set(unseen)
    assert {one.prompt for one in by_topic[CLASS]} == {"a circle"}
    assert len({one.noise_seed for one in by_topic[CLASS]}) == 3 * exam.CLASS_PICTURES
    for one in questions:
        assert ("sks" in one.prompt) == (one.topic in (SEEN, UNSEEN, SCENES))
        assert all(value in one.prompt.split() for value in one.wanted.values())
    assert {one.wanted["shape"] for one in by_topic[OTHER_CLASSES]} == set(shapes.CLASSES) - {"circle"}
    assert all(one.wanted["colour"] != one.wanted["background"] for one in by_topic[OTHER_PROMPTS])
    without = exam.ask(SUBJECT, "", range(3))
    assert [one.prompt for one in without] == [one.prompt.replace("sks ", "") for one in questions]
    assert [(one.noise_seed, one.wanted) for one in without] == [(one.noise_seed, one.wanted) for one in questions]


def draw_answer(question: Question, rng: np.random.Generator, knows: bool = True, leaks: bool = False) -> Answer:
    """Draw what a model would that knows the subject or not, and puts it into class prompts or not."""
    wanted = dict(question.wanted)
    colour = wanted.pop("colour", None)
    is_subject = (question.topic in (SEEN, UNSEEN, SCENES) and knows) or (question.topic == CLASS and leaks)
    if is_subject:
        wanted.pop("shape")
        wanted.setdefault("background", shapes.split_backgrounds(SUBJECT)[0][0])
    scene = shapes.random_scene(rng, subject=SUBJECT if is_subject else None, **wanted)
    free = [name for name in COLOURS if shapes.distance(name, scene.background) > shapes.DISTINCT]
    scene = dataclasses.replace(scene, colour=colour or str(rng.choice(free)))
    return exam.mark(question, shapes.draw(scene, 32), SUBJECT)


@pytest.mark.parametrize(("knows", "leaks"), [(True, False), (False, False), (True, True)])
def test_the_scores_say_what_was_drawn(knows, leaks):
    """Of a good model, of one that learned nothing, and of one whose class became the subject."""
    rng = np.random.default_rng(0)
    scores = exam.score([draw_answer(one, rng, knows, leaks) for one in exam.ask(SUBJECT, "sks", range(2))])
    value = {name: found.value for name, found in scores.items()}
    for name in ("seen", "unseen"):
        assert value[f"subject, {name} backgrounds"] == knows
        assert value[f"match, {name} backgrounds"] > 0.9 if knows else value[f"match, {name} backgrounds"] < 0.1
    assert value["leak into the class"] == leaks and value["leak into other classes"] == 0
    assert value["prompts obeyed"] > 0.9 and value["other prompts obeyed"] > 0.9
    assert value["class drawn for its prompt"] == 1
    assert (value["diversity of class backgrounds, bits"] < 0.1) == leaks


def test_the_standard_error_is_over_seeds():
    """The jackknife of a mean is the sample standard deviation over the root of the number of seeds."""
    rows = [dataclasses.make_dataclass("Row", ["seed", "value"])(seed, seed**2) for seed in range(5) for _ in range(3)]
    found = estimate(rows, lambda some: float(np.mean([row.value for row in some])))
    per_seed = np.array([0, 1, 4, 9, 16])
    assert found.value == pytest.approx(6) and found.error == pytest.approx(per_seed.std(ddof=1) / math.sqrt(5))
    assert estimate(rows[:3], len) == Estimate(3, None)
    assert mean_of([2.0]) == Estimate(2, None)
    assert dataclasses.astuple(mean_of(per_seed.tolist())) == pytest.approx(dataclasses.astuple(found))


def test_diversity_is_the_entropy_of_the_class():
    """Two colours half of the time each are one bit."""
    question = Question(CLASS, "a circle", 0, 0, {"shape": "circle"})
    rng = np.random.default_rng(0)
    drawn = [shapes.draw(shapes.random_scene(rng, shape="circle", background="black"), 16) for _ in range(2)]
    readings = [
        dataclasses.replace(shape_reader.read(drawn[0]), colour=colour) for colour in ("red", "blue", "red", "blue")
    ]
    answers = [Answer(question, drawn[0], reading, 0.0) for reading in readings]
    assert exam.diversity("colour", answers) == pytest.approx(1) and exam.diversity("background", answers) == 0


def test_psnr_and_ssim_by_hand():
    """Against the definitions, written out for one window."""
    rng = np.random.default_rng(0)
    one = Image.fromarray(rng.integers(0, 256, (11, 11, 3)).astype(np.uint8))
    other = Image.fromarray(rng.integers(0, 256, (11, 11, 3)).astype(np.uint8))
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert exam.psnr(one, other) == pytest.approx(10 * math.log10(255**2 / ((x - y) ** 2).mean()))
    assert exam.psnr(one, one) == 60 and exam.ssim(one, one) == pytest.approx(1)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = np.outer(bell, bell)[..., None] / bell.sum() ** 2
    mean_x, mean_y = (weights * x).sum((0, 1)), (weights * y).sum((0, 1))
    var_x, var_y = (weights * (x - mean_x) ** 2).sum((0, 1)), (weights * (y - mean_y) ** 2).sum((0, 1))
    both = (weights * (x - mean_x) * (y - mean_y)).sum((0, 1))
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert exam.ssim(one, other) == pytest.approx(expected.mean())


def test_enlarged_pictures_are_scored_by_topic_and_against_bilinear():
    """A perfect enlargement has 60 dB; the other columns are of what anybody can do."""
    rng = np.random.default_rng(0)
    truths = [shapes.draw(shapes.random_scene(rng, subject=SUBJECT), 64) for _ in range(4)]
    smalls = [truth.resize((16, 16), Image.Resampling.BICUBIC) for truth in truths]
    rows = [
        Enlarged("subject", seed, truth, small, truth)
        for seed, (truth, small) in enumerate(zip(truths, smalls, strict=True))
    ]
    scores = exam.score_enlarged(rows)
    assert scores["PSNR, subject"] == Estimate(60, 0) and scores["SSIM, subject"].value == pytest.approx(1)
    assert 15 < scores["PSNR, subject, bilinear"].value < 30 and scores["PSNR, subject, bilinear"].error > 0


def test_held_out_pictures_are_no_photos():
    """And their prompts name the subject only if asked to."""
    rows = exam.hold_out(SUBJECT, "sks", 0)
    assert {row.topic for row in rows} == {"subject", "class", "others"}
    assert all(("sks" in row.prompt) == (row.topic == "subject") == bool(row.scene.subject) for row in rows)
    assert not any("sks" in row.prompt for row in exam.hold_out(SUBJECT, "", 0))
    assert all(row.scene.background in row.prompt and row.scene.shape in row.prompt for row in rows)
    photos = shapes.draw_photos(SUBJECT, 5, 64, np.random.default_rng(0), shapes.split_backgrounds(SUBJECT)[0])
    assert not {photo.tobytes() for photo in photos} & {shapes.draw(row.scene, 64).tobytes() for row in rows}
