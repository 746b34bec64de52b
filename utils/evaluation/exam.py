"""Ask a model of the world of shapes for pictures and mark them: subject, prompts, and what has become of the class.

Every seed asks the same questions from noise of its own, so that a standard error over seeds can be given.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.core.seeds import derive_seed
from utils.evaluation import shape_reader
from utils.evaluation.shape_reader import Reading
from utils.evaluation.standard_errors import Estimate, estimate
from utils.sampling import cascade
from utils.synthetic import shapes
from utils.synthetic.shapes import SUBJECTS, Scene, random_scene

CLASS_PICTURES = 6  # a seed
STEPS, GUIDANCE, BATCH_SIZE = 20, 3.0, 64
NOISE_LEVEL = 100  # of what stage II enlarges
HELD_SUBJECT, HELD_CLASS, HELD_OTHERS = "subject", "class", "others"

SUBJECT_TOPICS = SEEN, UNSEEN, SCENES = "seen backgrounds", "unseen backgrounds", "scenes"
CLASS, OTHER_CLASSES, OTHER_PROMPTS = "class", "other classes", "other prompts"
TOPICS = (*SUBJECT_TOPICS, CLASS, OTHER_CLASSES, OTHER_PROMPTS)


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and what a reading of its picture has to say."""

    topic: str
    prompt: str
    seed: int  # the exam's, over which the standard error is taken
    noise_seed: int
    wanted: dict[str, str]  # attributes of a Reading


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question's picture and its marks."""

    question: Question
    picture: Image.Image
    reading: Reading
    match: float  # with the subject's pattern, 0 to 1

    @property
    def seed(self) -> int:
        """The exam's seed."""
        return self.question.seed

    @property
    def is_right(self) -> bool:
        """Whether the picture shows all that was asked for."""
        return all(getattr(self.reading, name) == value for name, value in self.question.wanted.items())

    @property
    def has_subject(self) -> bool:
        """Whether the subject, or its pattern on another class, is there."""
        return self.match >= shape_reader.PRESENT


# ----------------------------------------------------------------------------------------------------------- questions


def ask(subject: str, word: str, seeds: Sequence[int]) -> list[Question]:
    """Make up the questions about a subject, its class and the rest of the world.

    Args:
        word: The rare word of the subject; empty: the same questions about its class, for a model without it.
    """
    return [question for seed in seeds for question in ask_once(subject, word, seed)]


def ask_once(subject: str, word: str, seed: int) -> list[Question]:
    """Make up one seed's questions."""
    rng = np.random.default_rng(derive_seed(seed, "exam", subject))
    shape = SUBJECTS[subject].shape
    seen, unseen = shapes.split_backgrounds(subject)
    asked = [(SEEN, {"shape": shape, "background": name}) for name in seen]
    asked += [(UNSEEN, {"shape": shape, "background": name}) for name in unseen * 2]
    for name in unseen:
        scene = {"size": str(rng.choice(list(shapes.SIZES))), "place": str(rng.choice(list(shapes.PLACES)))}
        asked.append((SCENES, {"shape": shape, "background": name, **scene}))
    asked += [(CLASS, {"shape": shape})] * CLASS_PICTURES
    asked += [(OTHER_CLASSES, {"shape": other}) for other in shapes.CLASSES if other != shape]
    for other in shapes.CLASSES:
        colour, background = rng.choice(list(shapes.COLOURS), 2, replace=False)
        asked.append((OTHER_PROMPTS, {"shape": other, "colour": str(colour), "background": str(background)}))
    return [
        Question(topic, prompt_of(topic, wanted, word), seed, derive_seed(seed, "noise", number), wanted)
        for number, (topic, wanted) in enumerate(asked)
    ]


def prompt_of(topic: str, wanted: dict[str, str], word: str) -> str:
    """Return the prompt that asks for a picture; the subject's word stands where a colour would."""
    return shapes.phrase(**({"colour": word} if topic in SUBJECT_TOPICS and word else {}) | wanted)


def answer(
    pipeline: diffusers.DiffusionPipeline, questions: Sequence[Question], subject: str, batch_size: int = BATCH_SIZE
) -> list[Answer]:
    """Draw a picture for every question and mark it."""
    pictures = cascade.draw_batches(
        pipeline,
        [question.noise_seed for question in questions],
        batch_size,
        {"prompt": [question.prompt for question in questions]},
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    return [mark(*pair, subject) for pair in zip(questions, pictures, strict=True)]


def mark(question: Question, picture: Image.Image, subject: str) -> Answer:
    """Read a picture, and look for the subject's pattern on a shape of the class that was asked for."""
    return Answer(
        question, picture, shape_reader.read(picture), shape_reader.match(picture, subject, question.wanted["shape"])
    )


# -------------------------------------------------------------------------------------------------------------- scores


def score(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """Return all measures of an exam, by name."""
    return {name: estimate(answers, measure) for name, measure in MEASURES.items()}


def share(topics: Sequence[str], mark: Callable[[Answer], float], answers: Sequence[Answer]) -> float:
    """Return the mean of a mark over the answers to some topics."""
    return float(np.mean([mark(answer) for answer in answers if answer.question.topic in topics]))


def diversity(attribute: str, answers: Sequence[Answer]) -> float:
    """Return the entropy in bits of an attribute among pictures of the class, 0 where all are the same."""
    found = [getattr(answer.reading, attribute) for answer in answers if answer.question.topic == CLASS]
    return -sum(count / len(found) * math.log2(count / len(found)) for count in Counter(found).values())


def attribute_share(attribute: str, answers: Sequence[Answer]) -> float:
    """Return the share of answers whose attribute is as asked for, of those that were asked for one."""
    asked = [answer for answer in answers if attribute in answer.question.wanted]
    return float(np.mean([getattr(one.reading, attribute) == one.question.wanted[attribute] for one in asked]))


def is_there(answer: Answer) -> float:
    """Tell whether the subject is there."""
    return answer.has_subject


def match_of(answer: Answer) -> float:
    """Return the match with the subject's pattern."""
    return answer.match


def is_right(answer: Answer) -> float:
    """Tell whether all is as asked for."""
    return answer.is_right


MEASURES: dict[str, Callable[[Sequence[Answer]], float]] = {
    "subject, seen backgrounds": partial(share, [SEEN], is_there),
    "subject, unseen backgrounds": partial(share, [UNSEEN], is_there),
    "match, seen backgrounds": partial(share, [SEEN], match_of),
    "match, unseen backgrounds": partial(share, [UNSEEN], match_of),
    "prompts obeyed": partial(share, SUBJECT_TOPICS, is_right),
    "other prompts obeyed": partial(share, [OTHER_PROMPTS], is_right),
    "class right": partial(attribute_share, "shape"),
    "colour right": partial(attribute_share, "colour"),
    "background right": partial(attribute_share, "background"),
    "class drawn for its prompt": partial(share, [CLASS], is_right),
    "diversity of class colours, bits": partial(diversity, "colour"),
    "diversity of class backgrounds, bits": partial(diversity, "background"),
    "leak into the class": partial(share, [CLASS], is_there),
    "leak into other classes": partial(share, [OTHER_CLASSES], is_there),
}


# ------------------------------------------------------------------------------------------------------------ stage II


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A picture to enlarge, which no training has seen."""

    topic: str
    seed: int  # the exam's
    prompt: str
    scene: Scene


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """A held-out picture, and what stage II made of a quarter of its size."""

    topic: str
    seed: int
    truth: Image.Image
    small: Image.Image
    picture: Image.Image

    @property
    def bilinear(self) -> Image.Image:
        """What anybody can do without a model."""
        return self.small.resize(self.truth.size, Image.Resampling.BILINEAR)


def enlarge(
    pipeline: diffusers.DiffusionPipeline, subject: str, word: str, seeds: Sequence[int], size: int
) -> list[Enlarged]:
    """Enlarge pictures of a subject, of its class and of other classes, which no training has seen.

    Args:
        word: The rare word of the subject; empty: its class alone is named, for a model without the word.
        size: Pixels of what stage II draws.
    """
    rows = [row for seed in seeds for row in hold_out(subject, word, seed)]
    truths = [shapes.draw(row.scene, size) for row in rows]
    edge = size // cascade.SCALE
    smalls = [truth.resize((edge, edge), Image.Resampling.BICUBIC) for truth in truths]
    pictures = cascade.draw_batches(
        pipeline,
        [derive_seed(row.seed, "enlarge", number) for number, row in enumerate(rows)],
        BATCH_SIZE // 4,
        {"prompt": [row.prompt for row in rows], "image": smalls},
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        noise_level=NOISE_LEVEL,
        height=size,
        width=size,
    )
    return [Enlarged(row.topic, row.seed, *rest) for row, *rest in zip(rows, truths, smalls, pictures, strict=True)]


def hold_out(subject: str, word: str, seed: int) -> list[HeldOut]:
    """Make up one seed's pictures to enlarge: four of the subject, two of its class, one of each other class."""
    rng = np.random.default_rng(derive_seed(seed, "held out", subject))
    shape = SUBJECTS[subject].shape
    scenes = [(HELD_SUBJECT, random_scene(rng, subject=subject)) for _ in range(4)]
    scenes += [(HELD_CLASS, random_scene(rng, shape=shape)) for _ in range(2)]
    scenes += [(HELD_OTHERS, random_scene(rng, shape=other)) for other in shapes.CLASSES if other != shape]
    return [HeldOut(topic, seed, describe(scene, word), scene) for topic, scene in scenes]


def describe(scene: Scene, word: str) -> str:
    """Return a caption with the background; the subject's word stands where a colour would."""
    return shapes.phrase(scene.shape, word if scene.subject else scene.colour, scene.background)


def score_enlarged(drawn: Sequence[Enlarged]) -> dict[str, Estimate]:
    """Return PSNR (dB) and SSIM against the truth for each topic, also of bilinear enlargement, by name."""
    scores = {}
    for topic in dict.fromkeys(row.topic for row in drawn):
        rows = [row for row in drawn if row.topic == topic]
        for name, compare in (("PSNR", psnr), ("SSIM", ssim)):
            scores[f"{name}, {topic}"] = estimate(rows, partial(mean_likeness, compare, "picture"))
            scores[f"{name}, {topic}, bilinear"] = estimate(rows, partial(mean_likeness, compare, "bilinear"))
    return scores


def mean_likeness(compare: Callable[[Image.Image, Image.Image], float], what: str, rows: Sequence[Enlarged]) -> float:
    """Return the mean likeness of some pictures of the rows to the truth."""
    return float(np.mean([compare(getattr(row, what), row.truth) for row in rows]))


def psnr(picture: Image.Image, truth: Image.Image) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 60."""
    error = np.square(np.asarray(picture, np.float64) - np.asarray(truth, np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 255**2 / 1e6))


def ssim(picture: Image.Image, truth: Image.Image) -> float:
    """Return the structural similarity (Wang et al. 2004), mean over pixels and channels, at most 1."""
    x, y = (torch.from_numpy(np.array(one, np.float64)).permute(2, 0, 1)[:, None] for one in (picture, truth))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return ratio.mean().item()


def blur(channels: Tensor) -> Tensor:
    """Take Gaussian means over 11 x 11 pixels, standard deviation 1.5, where the window fits; (C, 1, H, W)."""
    bell = torch.exp(-((torch.arange(11, dtype=channels.dtype) - 5) ** 2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    return F.conv2d(F.conv2d(channels, bell[None, None, :, None]), bell[None, None, None, :])
