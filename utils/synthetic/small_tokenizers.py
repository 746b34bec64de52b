"""Tokenizers with a small vocabulary for random models: CLIP's and T5's, built without a download."""

import json
import string
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from transformers import CLIPTokenizer, T5Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (  # one token each; other words become one token a letter
    "an the of in on with and photo picture painting dog cat person man woman toy teapot backpack sks red green blue "
    "black white sitting running beach snow forest house table grass"
).split()
T5_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0, 1, 2
T5_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))  # T5's own training used them, IF does not
T5_LENGTH = 512  # of T5 itself; IF's prompts are cut to 77 tokens by whoever encodes them


def build_tokenizer(pad_token: str = END, words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """Build a byte-level CLIP tokenizer that knows some words, and everything else letter by letter."""
    merges = find_merges([word for word in words if len(word) > 1])
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def build_t5_tokenizer(words: Sequence[str] = WORDS) -> T5Tokenizer:
    """Build a T5 tokenizer that knows some words, and every other printable ASCII text letter by letter."""
    sentinels = [(token, 0.0) for token in reversed(T5_SENTINELS)]
    return T5Tokenizer(vocab=[*t5_pieces(words), *sentinels], model_max_length=T5_LENGTH)


def t5_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Return the SentencePiece vocabulary with log probabilities, for which one word beats its letters."""
    whole = [("▁" + word, -4.0) for word in dict.fromkeys(("a", *words))]
    letters = string.ascii_lowercase + string.digits + string.punctuation + string.ascii_uppercase
    return [*((token, 0.0) for token in T5_SPECIAL.values()), ("▁", -8.0), *whole, *((one, -8.0) for one in letters)]


def write_t5_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Write a T5 tokenizer as IF's folders hold it: a SentencePiece model without `tokenizer.json`."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = {"<pad>": model.SentencePiece.CONTROL, "</s>": model.SentencePiece.CONTROL}
    kinds["<unk>"] = model.SentencePiece.UNKNOWN
    for piece, score in t5_pieces(words):
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, model.SentencePiece.NORMAL))
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.UNIGRAM, len(model.pieces)
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    special = {**T5_SPECIAL, "additional_special_tokens": list(T5_SENTINELS)}
    config = {
        **special,
        "extra_ids": len(T5_SENTINELS),
        "model_max_length": T5_LENGTH,
        "tokenizer_class": "T5Tokenizer",
    }
    for name, entries in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(entries, indent=2) + "\n")


def byte_letters() -> list[str]:
    """Return the 256 characters for which byte-level tokenizers let the bytes stand, printable ASCII first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def find_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, in order of use, that make each word one token.

    A word is first split by the merges of the words before it and then joined from the left. So no earlier merge can
    ever tear a later word apart: it was already applied when the later word's own merges were chosen.
    """
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            parts = apply_merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = apply_merge(parts, merges[-1])
    return merges


def apply_merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each adjacent occurrence of the pair, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
