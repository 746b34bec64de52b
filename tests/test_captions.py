"""Captions against what IF's own pipelines tokenize, and words that come back, or do not, against a list of each."""

import random
import warnings

import diffusers
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import pipeline_if
from transformers import CLIPTokenizer

from utils.data import prompt_cleaning
from utils.data.prompt_cleaning import (
    IDENTIFIERS,
    _align,
    clean,
    find_missing_packages,
    lost_words,
    suggest_identifiers,
)
from utils.synthetic.random_models import make_model

PIPELINES = [name for name in dir(diffusers) if name.startswith("IF") and name.endswith("Pipeline")]
TEXTS = [
    "a photo of sks dog",
    "  A Photo of   SKS Dog, on a beach! ",
    "a <sks> dog with p3rs0n and @me",
    "a well-known black-and-white state-of-the-art dog",
    "“tom” &amp; jerry’s café 😀 100% [v] *bold* 日本語",
    ":-:sks",
    "dog.txt",
    "",
]

KEPT = [  # cleaned on its own, each is still to be seen
    *("dog", "dog.", "Dog,", "(dog)", "dog!", '"dog"', "'dog'", "“dog”", "«dog»", "`dog`", "*dog*", "~dog~", "dog?"),
    *("dog's", "dog’s", "dogs'", "o'clock", "rock'n'roll", "it's", "d'artagnan"),
    *("black-and-white", "state-of-the-art", "a-b-c-d-e-f", "a_b_c_d_e_f", "sks_dog", "sks-dog", "-sks-", "_sks_"),
    *(
        "café",
        "cafe\u0301",
        "naïve",
        "ñandú",
        "İstanbul",
        "Straße",
        "собака",
        "हिन्दी",
        "한국어",
        "コーヒー",
        "Σίσυφος",
    ),
    *(
        "😀",
        "❤️",
        "👨\u200d👩\u200d👧",
        "dog🐕",
        "dog™",
        "dog®",
        "#dog",
        "[v]",
        "{dog}",
        "ﬁne",
        "ｆｕｌｌ",
        "10°",
        "x²",
    ),
    *("and/or", "w/o", "dog,cat", "dog.cat", "e.g.", "U.S.", "Ph.D.", "R&B", "AT&T", "a+b", "c++", "wait…", "a—b"),
    *("3d", "4k", "35mm", "1990s", "f/1.8", "16:9", "3.5", "$100", "100,000", "50%", "2021", "r2-d2", "iphone14"),
    *("&eacute;t&eacute;", "tom&amp;jerry", "dog&quot;s", "caf%C3%A9", "(masterpiece:1.2)", "--ar", "sks12", "<3"),
    *IDENTIFIERS,
]
LOST = [
    *("p3rs0n", "<sks>", "zwx5k", "sks123", "sks2dog", "5sks5", "@me", "a@b", "123456", "#12", "img_1234.jpg"),
    *("dog.png", "example.com", "shipping", "download", "png", "epson", "webpage", "pdfs", "4x4", "h2o", "r2d2"),
    *("犬", "日本語", "東京tower", "½", "nº", "100%beef", "127.0.0.1", "dog<br>cat", "<b>dog</b>", "㊗", "䷀"),
]
PUNCTUATION = ["-", "--", "&", "&amp;", "…", "!", "()", "—", '"', "|", "*", "%20", "→"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Make a small IF pipeline that notes which texts reach its tokenizer."""
    pipeline = diffusers.IFPipeline.from_pretrained(make_model(tmp_path_factory.mktemp("if") / "if1", "tiny-if1"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:The input passed in")
def test_the_pipeline_tokenises_the_same_texts(pipeline, monkeypatch):
    """What a call with defaults hands to the tokenizer for prompts and negative prompts is the cleaned text."""
    tokenizer, seen = pipeline.tokenizer, []
    monkeypatch.setattr(
        pipeline, "tokenizer", lambda texts, **options: (seen.append(texts), tokenizer(texts, **options))[1]
    )
    monkeypatch.setattr(pipeline, "prepare_intermediate_images", stop)
    texts = [*TEXTS, *KEPT, *LOST]
    with pytest.raises(InterruptedError):
        pipeline(texts, negative_prompt=texts[::-1])
    cleaned = [clean(text) for text in texts]
    assert cleaned in seen and cleaned[::-1] in seen


@pytest.mark.filterwarnings("ignore:The input passed in")
def test_the_pipeline_encodes_the_same_texts(pipeline):
    """Text by text, too, and to the numbers that come out when cleaned text goes in."""
    for text in TEXTS:
        ours = pipeline.encode_prompt(clean(text), clean_caption=False)
        assert torch.equal(ours[0], pipeline.encode_prompt(text, clean_caption=True)[0])


def stop(*_):
    """End a call of the pipeline when its texts are encoded."""
    raise InterruptedError


@pytest.mark.filterwarnings("ignore:The input passed in")
@pytest.mark.parametrize("name", PIPELINES)
def test_all_stages_clean_alike(name):
    """The pipelines of both stages have copies of the same code."""
    kind = getattr(diffusers, name)
    other = kind.__new__(kind)
    texts = [*TEXTS, *KEPT, *LOST]
    assert len(PIPELINES) >= 2 and other._text_preprocessing(texts, clean_caption=True) == [clean(t) for t in texts]


def test_cleaning_is_silent(capfd):
    """A text that looks like a file or an address gives no warning, however talkative Python is."""
    with warnings.catch_warnings(record=True, action="always") as seen:
        assert clean("dog.txt") == "dog. txt" and clean("http://x.y") == "x. y"
    assert seen == [] and capfd.readouterr() == ("", "")


def test_what_cleaning_is_known_to_do():
    """The docstring's examples: it is not idempotent, by signs at the ends and once by a whole word."""
    assert (clean(":-:sks"), clean(":sks"), clean("__123456"), clean("123456")) == (":sks", "sks", "123456", "")


def test_packages_that_are_missing_are_named(monkeypatch):
    """What counts is what diffusers sees, because that decides whether it cleans."""
    assert find_missing_packages() == []
    monkeypatch.setattr("diffusers.utils.import_utils._bs4_available", False)
    assert find_missing_packages() == ["beautifulsoup4"]
    monkeypatch.setattr("diffusers.utils.import_utils._ftfy_available", False)
    assert find_missing_packages() == ["ftfy", "beautifulsoup4"]
    monkeypatch.setattr(pipeline_if.logger, "warning", lambda *_: None)
    assert clean(" A <sks> Dog ") == "a <sks> dog"


# Lost words


@pytest.mark.parametrize("prompt", ["{}", "a photo of {} dog", "{0} and {0} again", "dog: {}"])
def test_words_that_come_back_are_not_reported(prompt):
    """Not alone, not in a prompt, not twice."""
    reported = {word: lost_words(prompt.format(word)) for word in KEPT}
    assert reported == {word: [] for word in KEPT}


@pytest.mark.parametrize("prompt", ["{}", "a photo of {} dog", "{0} and {0} again", "A dog ({}), running.", "“{}” x"])
def test_words_that_do_not_are(prompt):
    """Each time they occur, as they are written, without the sentence's punctuation."""
    reported = {word: lost_words(prompt.format(word)) for word in LOST}
    assert reported == {word: [word] * prompt.replace("{0}", "{}").count("{}") for word in LOST}


def test_punctuation_is_no_word():
    """It may go."""
    assert [sign for sign in PUNCTUATION if lost_words(sign) or lost_words(f"a {sign} dog {sign}")] == []


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("sks <sks>", ["<sks>"]),
        ("<sks> sks", ["<sks>"]),
        ("SKS <sks>", ["<sks>"]),
        ("<sks> SKS", ["<sks>"]),
        ("me and @me with me", ["@me"]),
        ("on an epson on", ["epson"]),
        ("age of a webpage", ["webpage"]),
        ("a webpage of age", ["webpage"]),
        ("sks sks sks123 sks", ["sks123"]),
        ("SKS sks", []),
        ("sks, SKS123; sks", ["SKS123"]),
        ("free shipping on the dog", ["free", "shipping"]),
        ("a dog, click for more", ["click", "for", "more"]),
        ("page 12 of a dog", ["page", "12"]),
        ("a jpg image of a dog", ["jpg", "image"]),
        ("ab a b", []),
        ("a b ab", []),
        ("", []),
        ("  \n ", []),
    ],
)
def test_each_occurrence_needs_one_of_its_own(text, lost):
    """A word does not come back in another word's remains, and neighbours can be lost together."""
    assert lost_words(text) == lost


def test_as_many_words_as_possible_come_back():
    """One in its exact form does not take the place of two others."""
    assert _align([{"ab"}, {"a"}, {"b"}], ["a", "b"], [True, False, False]) == {1, 2}
    assert _align([{"a"}, {"b"}, {"ab"}], ["a", "b"], [False, False, True]) == {0, 1}
    assert _align([{"a"}, {"a"}], ["a"], [False, False]) == {0}, "the first of two that are equal"


def test_random_prompts_lose_what_they_must():
    """In any order, with any neighbours, the lost words are reported, those alone, in their order."""
    chance = random.Random(0)
    # Not those that change with their neighbours: tags, quotes, and what an address or number may join.
    kept = [word for word in KEPT if word.strip(".,!?").isalpha()] + ["dog's", "black-and-white", "3d", "R&B", "café"]
    lost = ["p3rs0n", "zwx5k", "sks123", "@me", "img_1234.jpg", "犬", "123456", "<sks>", "example.com", "epson"]
    for _ in range(400):
        words = chance.choices(kept, k=chance.randint(0, 12)) + chance.choices(lost, k=chance.randint(0, 4))
        chance.shuffle(words)
        assert lost_words(" ".join(words)) == [word for word in words if word in lost], words


def test_suggestions_survive(monkeypatch):
    """Some short words, none of which the cleaning changes; one that it would change is left out."""
    assert len(suggest_identifiers()) == 4 and suggest_identifiers(2) == ["sks", "ohwx"]
    assert suggest_identifiers(100) == list(IDENTIFIERS) and len(set(IDENTIFIERS)) == len(IDENTIFIERS)
    assert all(clean(word) == word and len(word) <= 5 for word in IDENTIFIERS)
    monkeypatch.setattr(prompt_cleaning, "IDENTIFIERS", ("zwx5k", "SKS", "ohwx", "<sks>"))
    assert suggest_identifiers() == ["ohwx"]


def test_many_captions_that_are_cut_are_counted(tiny, caplog):
    """The first five are told in full."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny, subfolder="tokenizer")
    texts = [*(f"a photo of a dog number {number} on green grass" for number in range(7)), "a dog"]
    prompt_cleaning.warn_of_losses(texts, texts, tokenizer, 6)
    assert len(caplog.messages) == 6
    assert caplog.messages[4].startswith(f"The prompt {texts[4]!r} is longer than 6 tokens; the model will not see ")
    assert caplog.messages[5] == "7 of 8 prompts lose words: the first 5 are told above."


def test_prompts_of_stable_diffusion_are_left_alone(tiny):
    """Its pipeline does not clean either: capitals, tags and marks reach the tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny, subfolder="tokenizer")
    texts = ["a <dog> & a @cat", "a photo"]
    ids, mask = prompt_cleaning.tokenize_texts(tokenizer, texts, 20, cleans=False)
    wanted = tokenizer(texts, max_length=20, padding="max_length", return_tensors="pt")
    assert torch.equal(ids, wanted["input_ids"]) and torch.equal(mask, wanted["attention_mask"])
    cleaned, _ = prompt_cleaning.tokenize_texts(tokenizer, texts, 20, cleans=True)
    assert not torch.equal(ids[0], cleaned[0]) and torch.equal(ids[1], cleaned[1])


def test_a_single_token_too_many_is_told(tiny, caplog):
    """A prompt that just fits is not."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny, subfolder="tokenizer")
    length = len(tokenizer("a photo of a dog")["input_ids"])
    for tokens, told in ((length, 0), (length - 1, 1)):
        prompt_cleaning.tokenize_texts(tokenizer, ["a photo of a dog"], tokens, cleans=False)
        assert len(caplog.messages) == told
