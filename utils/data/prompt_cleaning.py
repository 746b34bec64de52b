"""Prompts on their way to a text encoder: DeepFloyd IF's cleaning, words that are lost, tokenizers that do not fit.

IF's cleaning was made for captions from the web. Beside addresses and markup it deletes words such as p3rs0n, zwx5k,
sks123, <sks> and @me, file names, shipping, download and the letters of jpg, png, pdf or eps at the start of a word.
It is not idempotent: ":-:sks" becomes ":sks" and that "sks", "__123456" becomes "123456" and that nothing. So a prompt
is cleaned exactly once: what has been cleaned here must not go through a pipeline's own cleaning.
"""

import functools
import html
import itertools
import logging
import operator
import re
import unicodedata
import urllib.parse
import warnings
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from utils.core.errors import UserError

logger = logging.getLogger(__name__)

SHOWN = 5  # warnings of a kind

IDENTIFIERS = ("sks", "ohwx", "zwx", "xjy", "qvx", "krtz", "vqw", "jxk")  # rare strings that mean nothing

_ENTITY = re.compile(r"&#?\w+;")
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of the % of "100%beef"
_MARKS = "®©™"  # signs behind a word, which the cleaning drops
_NO_MARKS = str.maketrans("", "", _MARKS)
_WORD_CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No", "So"}  # letters, digits and pictures such as emoji


def clean(text: str) -> str:
    """Return what a call of IF's pipeline hands to its tokenizer for a prompt; the pipeline's own code decides.

    Without the packages of `find_missing_packages` that is the text in lower case.
    """
    with warnings.catch_warnings(action="ignore"):  # Beautiful Soup's, about texts that look like a file's name
        return _cleaner()._text_preprocessing(text, clean_caption=True)[0]


def find_missing_packages() -> list[str]:
    """Return the packages that diffusers needs for the cleaning; without one it warns and does not clean."""
    installed = {"ftfy": is_ftfy_available(), "beautifulsoup4": is_bs4_available()}
    return [package for package, is_there in installed.items() if not is_there]


def find_prompt_problems(flag: str, prompt: str) -> list[str]:
    """Return a sentence if the packages that clean are missing, or if a flag's prompt would lose words to them."""
    if missing := find_missing_packages():
        return [f"IF's prompts are cleaned with {' and '.join(missing)}: pip install {' '.join(missing)}."]
    if not (lost := lost_words(prompt)):
        return []
    return [
        f"{flag} would lose {', '.join(map(repr, lost))}. IF's pipelines clean prompts: {prompt!r} becomes "
        f"{clean(prompt)!r}. Identifiers that survive: {', '.join(suggest_identifiers())}."
    ]


def find_undecodable(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag whose value is a prompt with bytes that are no text."""
    prompts = {name: value for name, value in flags.items() if name.endswith("_prompt") and isinstance(value, str)}
    return [
        f"--{name} {prompt!r} is not written in UTF-8."
        for name, prompt in prompts.items()
        if any("\ud800" <= sign <= "\udfff" for sign in prompt)  # Python's stand-ins for such bytes
    ]


def check_tokenizer(tokenizer, length: int, vocabulary: int | None) -> None:
    """Raise UserError if a tokenizer does not say how long prompts are, or knows words that a text encoder does not.

    Args:
        length: Tokens per prompt, of a flag or of the tokenizer.
        vocabulary: How many words the text encoder's config says it knows.
    """
    name = tokenizer.name_or_path
    if length > 10**6:  # transformers writes 10^30 where a tokenizer says nothing
        raise UserError(
            f"The tokenizer of {name} does not say how many tokens a prompt may have: give --tokenizer_max_length."
        )
    if vocabulary and len(tokenizer) > vocabulary:
        raise UserError(
            f"The tokenizer of {name} has {len(tokenizer)} words, the text encoder {vocabulary}. Use another."
        )


def lost_words(text: str) -> list[str]:
    """Return the words that the cleaning deletes or damages, as they are written.

    A word is kept if its letters and digits come back in their order, next to each other and complete, whatever
    punctuation or space has come between them. Words of punctuation alone do not count; each occurrence does.
    """
    words = [word for word in text.split() if _letters(_decodings(word)[-1])]
    cleaned = clean(text)
    pieces = [piece for token in cleaned.split() for piece in _pieces(token)]
    kept = _align([_spellings(word) for word in words], pieces, [word.lower() in cleaned.split() for word in words])
    return [_without_punctuation(word) for index, word in enumerate(words) if index not in kept]


def tokenize_texts(tokenizer, texts: list[str], length: int, cleans: bool) -> tuple[Tensor, Tensor]:
    """Return the tokens of prompts and their attention mask, (N, L) int64 each; words that a model loses are told.

    Args:
        length: Tokens per prompt.
        cleans: Clean the words first, as IF's pipelines do; Stable Diffusion's gives them as they are.
    """
    words = [clean(text) for text in texts] if cleans else texts
    rows = tokenizer(words, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    warn_of_losses(texts, words, tokenizer, length)
    return rows["input_ids"], rows["attention_mask"]


def warn_of_losses(texts: list[str], cleaned_texts: list[str], tokenizer, length: int) -> None:
    """Warn of the prompts of which a model does not see all: words are deleted, or beyond its tokens.

    The first `SHOWN` such losses are told in full, and how many there are.

    Args:
        cleaned_texts: What is left of the texts after cleaning; the texts themselves for a model that does not clean.
    """
    rows = tokenizer(cleaned_texts, return_offsets_mapping=tokenizer.is_fast)
    places = rows.get("offset_mapping", [None] * len(texts))
    losses = []
    for text, cleaned, ids, spans in zip(texts, cleaned_texts, rows["input_ids"], places, strict=True):
        if cleaned != text and (lost := lost_words(text)):
            words = ", ".join(map(repr, lost))
            losses.append(f"The prompt {text!r} loses {words} when IF's pipelines clean it: T5 reads {cleaned!r}.")
        if len(ids) > length:
            # The last token that is seen is the one that ends each prompt.
            cut = _from_word(cleaned, spans[length - 1][0]) if spans else tokenizer.decode(ids[length - 1 : -1])
            losses.append(f"The prompt {text!r} is longer than {length} tokens; the model will not see {cut!r}.")
    if len(losses) > SHOWN:
        losses[SHOWN:] = [f"{len(losses)} of {len(texts)} prompts lose words: the first {SHOWN} are told above."]
    for loss in losses:
        logger.warning(loss)


def _from_word(text: str, start: int) -> str:
    """Return the end of a text from the word on that has a character at a place, or is the next one there."""
    rest = text[start:].lstrip()
    return text[:start].rpartition(" ")[2] + rest if rest == text[start:] else rest


def suggest_identifiers(count: int = 4) -> list[str]:
    """Return up to `count` short rare words for a subject that the cleaning leaves as they are."""
    return [word for word in IDENTIFIERS if clean(f"a photo of {word} dog") == f"a photo of {word} dog"][:count]


@functools.cache
def _cleaner() -> Any:
    """Return IF's pipeline without any of its models: cleaning needs none."""
    from diffusers import IFPipeline  # here, because other models' runs need not wait for it

    return IFPipeline.__new__(IFPipeline)


def _decodings(word: str) -> list[str]:
    """Return a word as it stands, and after each round of decoding %C3%A9 and &eacute; until nothing changes."""
    found = [word]
    while (decoded := _decode(found[-1])) not in found and _UNREADABLE not in decoded:
        found.append(decoded)
    return found


def _decode(word: str) -> str:
    """Decode a word once as a part of an address and of a page."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), urllib.parse.unquote_plus(word))


def _spellings(word: str) -> set[str]:
    """Return the letters and digits that a word may come back with."""
    return {_letters(form) for form in _decodings(word)} - {""}


def _pieces(text: str) -> list[str]:
    """Split a text at everything but letters and digits, and return these in one form for all ways to write them."""
    # Folded first: "İ" becomes two characters.
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text.translate(_NO_MARKS)).casefold())
    return "".join(sign if unicodedata.category(sign) in _WORD_CATEGORIES else " " for sign in plain).split()


def _letters(text: str) -> str:
    """Return a text's letters and digits alone."""
    return "".join(_pieces(text))


def _without_punctuation(word: str) -> str:
    """Return a word without the punctuation of the sentence around it; <, @ and # stay, they may be why it is lost."""
    return word.lstrip("\"'“‘(").rstrip(".,;:!?\"'”’)…")


def _align(words: list[set[str]], pieces: list[str], exact: list[bool]) -> set[int]:
    """Return which words come back, when as many as possible do, each from pieces of its own and in their order.

    Args:
        words: For each word what it may come back as.
        pieces: What came back.
        exact: For each word whether it occurs in the very same form; such words come first where two are equal.
    """
    # For each word and piece: the best that they and all behind them can give, as a score and the words that are kept.
    nothing, best = (0, ()), {}
    for row, column in itertools.product(reversed(range(len(words))), reversed(range(len(pieces)))):
        options = [best.get((row, column + 1), nothing), best.get((row + 1, column), nothing)]
        if end := _run_end(words[row], pieces, column):
            score, kept = best.get((row + 1, end), nothing)
            # No number of exact forms outweighs one word more.
            options.insert(0, (score + len(words) + 1 + exact[row], (row, *kept)))
        best[row, column] = max(options, key=operator.itemgetter(0))
    return set(best.get((0, 0), nothing)[1])


def _run_end(word: set[str], pieces: list[str], start: int) -> int | None:
    """Return the end of the run of pieces from `start` on that spells a word, None if there is none."""
    last = min(len(pieces), start + max(map(len, word)))
    return next((end for end in range(start + 1, last + 1) if "".join(pieces[start:end]) in word), None)
