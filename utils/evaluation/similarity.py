"""How alike drawn pictures, photos and prompts are, by the DreamBooth paper's measures (arXiv 2208.12242, section 4).

Each measure is a mean of cosines between embeddings, so it is at most 1. CLIP-I and DINO compare drawn pictures with
photos of the subject, CLIP-T compares them with their prompts, PRES compares pictures of the class with the photos.
The paper's own numbers for Stable Diffusion are DINO 0.668, CLIP-I 0.803 and CLIP-T 0.305, with DINO ViT-S/16 and 25
prompts a subject. Every CLIP and every DINO has a scale of its own: only numbers of the same two can be compared.

P counts prompts, S seeds, N pictures, K photos; D is an encoder's width. Embeddings are float32, of length 1.
"""

import dataclasses
import logging
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, PreTrainedModel

from utils.core.errors import UserError
from utils.evaluation.standard_errors import Estimate, mean_of
from utils.models import model_files

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # of pictures or prompts that are encoded at a time
CLIP = {"clip": {}}  # kinds of model by their config.json, and how each is loaded
DINO = {"vit": {"add_pooling_layer": False}, "dinov2": {}}  # DINO's ViT has no pooler: it would be made at random
PLAIN = "prompts"  # name of the list in a file that is no more than a list

_START = re.compile(r"prompt_list\s*=\s*\[")
_ENTRY = re.compile(r"""(['"])(?P<prompt>.*)\1\.format\(unique_token, class_token\),?""")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network that embeds pictures, CLIP's also prompts, and what its own files say of preparing them."""

    name: str
    network: PreTrainedModel
    processor: Any  # of pictures
    tokenizer: Any = None  # None: it reads no text


# ----------------------------------------------------------------------------------------------------------- loading


def load_clip(name: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """Load a CLIP in float32, from a folder or the Hub, such as openai/clip-vit-base-patch32.

    Raises:
        UserError: It is no CLIP, or not all of one.
    """
    name = str(name)
    options = find_options(name, CLIP, "CLIP, such as openai/clip-vit-base-patch32")
    network = load_network(CLIPModel, name, device, options)
    tokenizer = load_part(AutoTokenizer, name)
    known, expected = len(tokenizer), network.config.text_config.vocab_size
    if known != expected:  # without its files, transformers makes a tokenizer of two tokens and says nothing
        raise UserError(
            f"The tokenizer of {name} has {known} tokens, its text encoder {expected}: files are missing or belong to "
            "another model. Add tokenizer.json, or vocab.json and merges.txt, of this CLIP."
        )
    return Encoder(name, network, load_processor(name), tokenizer)


def load_dino(name: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """Load a DINO or DINOv2 in float32, from a folder or the Hub; facebook/dino-vits16 is the paper's.

    Raises:
        UserError: It is no vision transformer, or not all of one.
    """
    name = str(name)
    options = find_options(name, DINO, "DINO, such as facebook/dino-vits16")
    return Encoder(name, load_network(AutoModel, name, device, options), load_processor(name))


def find_options(name: str, kinds: dict[str, dict], wanted: str) -> dict:
    """Return what a model's class is loaded with, after its own config.json.

    Raises:
        UserError: There is no such model, or it is of another kind; transformers would fill it with random weights.
    """
    kind = model_files.read_config(name, "config.json").get("model_type")
    if kind not in kinds:
        raise UserError(f"{name} is a model of type {kind}, but {' or '.join(kinds)} is needed here. Name a {wanted}.")
    return kinds[kind]


def load_network(kind: type, name: str, device: torch.device | str, options: dict) -> PreTrainedModel:
    """Load a network in float32, for evaluation, and make sure that none of its weights is made up.

    Raises:
        UserError: Files or weights are missing or broken.
    """
    network, report = load_part(kind, name, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} lacks {len(missing)} weights, the first being {missing[0]}: they would be random. Download or "
            "export the model again."
        )
    return network.to(device).eval().requires_grad_(False)


def load_processor(name: str) -> Any:
    """Load what a model's preprocessor_config.json describes, for Pillow, so that torchvision makes no difference.

    Some of these files, those of the first DINO among them, have a picture stretched into a square, not cropped.
    """
    return load_part(AutoImageProcessor, name, backend="pil")


def load_part(kind: type, name: str, **options) -> Any:
    """Load one part of a model.

    Args:
        kind: The class that loads it.
        options: Of its `from_pretrained`.

    Raises:
        UserError: Files are missing or broken.
    """
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 600, placeholder=" …")
        raise UserError(f"{kind.__name__} cannot load {name}: {reason} Download or export the model again.") from error


# --------------------------------------------------------------------------------------------------------- embedding


@torch.no_grad()
def embed_pictures(encoder: Encoder, pictures: Sequence[Image.Image], batch_size: int = BATCH_SIZE) -> Tensor:
    """Embed pictures, at least one: CLIP's projected image embedding, or DINO's class token after the last norm.

    Args:
        pictures: Of any size, as `decode_images.open_rgb` returns them.

    Returns:
        (N, D) float32, each row of length 1, on the CPU.
    """
    rows = []
    for start in range(0, len(pictures), batch_size):
        batch = [picture.convert("RGB") for picture in pictures[start : start + batch_size]]
        pixels = encoder.processor(batch, return_tensors="pt")["pixel_values"].to(encoder.network.device)
        if isinstance(encoder.network, CLIPModel):
            rows.append(encoder.network.get_image_features(pixel_values=pixels).pooler_output.cpu())
        else:
            rows.append(encoder.network(pixel_values=pixels).last_hidden_state[:, 0].cpu())
    return functional.normalize(torch.cat(rows), dim=-1)


@torch.no_grad()
def embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Tensor:
    """Embed texts, at least one, by CLIP; what is beyond its tokens, 77 as a rule, is cut off with one warning.

    Returns:
        (N, D) float32, each row of length 1, on the CPU.

    Raises:
        UserError: The encoder reads no text.
    """
    network, tokenizer = encoder.network, encoder.tokenizer
    if tokenizer is None:
        raise UserError(f"{encoder.name} reads no text: prompts are compared with pictures by a CLIP.")
    length = network.config.text_config.max_position_embeddings
    too_long = [text for text in texts if len(tokenizer(text, verbose=False)["input_ids"]) > length]
    if too_long:
        count = f"{len(too_long)} of {len(texts)} prompts"
        logger.warning("%s reads only the first %d tokens of %s, as of %r.", encoder.name, length, count, too_long[0])
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        rows.append(network.get_text_features(**tokens.to(network.device)).pooler_output.cpu())
    return functional.normalize(torch.cat(rows), dim=-1)


# --------------------------------------------------------------------------------------------------------- measuring


def measure(
    clip: Encoder,
    dino: Encoder,
    photos: Sequence[Image.Image],
    drawn: Sequence[tuple[str, Sequence[Image.Image]]],
    class_pictures: Sequence[Image.Image] = (),
    batch_size: int = BATCH_SIZE,
) -> dict[str, Estimate]:
    """Measure what a subject's pictures have of its photos and of their prompts, and what is left of the class.

    Args:
        photos: Of the subject.
        drawn: Each prompt without the rare word (drawn with "a sks dog in the snow": "a dog in the snow"), and its
            pictures, one for each seed, in the same order of seeds for every prompt.
        class_pictures: Drawn with the class prompt ("a dog"), each with a seed of its own; two or more, or none.

    Returns:
        CLIP-I, CLIP-T and DINO, higher is better. With class pictures also PRES, lower is better: how much the class
        has become the subject; and DIV-DINO, higher is better (see `estimate_diversity`). Errors are over seeds.

    Raises:
        UserError: There is nothing to measure, or prompts have unequal numbers of pictures.
    """
    check_counts(photos, drawn, class_pictures)
    prompts, pictures = [text for text, _ in drawn], [picture for _, group in drawn for picture in group]
    seeds = len(pictures) // len(prompts)
    by_clip, by_dino = (embed_pictures(encoder, pictures, batch_size) for encoder in (clip, dino))
    clip_photos, dino_photos = (embed_pictures(encoder, photos, batch_size) for encoder in (clip, dino))
    texts = embed_texts(clip, prompts, batch_size).repeat_interleave(seeds, dim=0)
    cosines = {
        "CLIP-I": compare(by_clip, clip_photos),
        "CLIP-T": (by_clip * texts).sum(-1),
        "DINO": compare(by_dino, dino_photos),
    }
    # Pictures of one seed share their noise: the error is that of the S means over prompts.
    means = {name: values.view(len(prompts), seeds).mean(0) for name, values in cosines.items()}
    found = {name: mean_of(per_seed.tolist()) for name, per_seed in means.items()}
    if class_pictures:
        of_class = embed_pictures(dino, class_pictures, batch_size)
        found |= {"PRES": mean_of(compare(of_class, dino_photos).tolist()), "DIV-DINO": estimate_diversity(of_class)}
    return found


def check_counts(photos: Sequence, drawn: Sequence[tuple[str, Sequence]], class_pictures: Sequence) -> None:
    """Raise UserError if there are too few pictures for a measure, or not as many for each prompt."""
    if not photos:
        raise UserError("There are no photos of the subject to compare with: give at least one.")
    if not drawn or not drawn[0][1]:
        raise UserError("There are no drawn pictures to measure: give at least one prompt with one picture.")
    expected = len(drawn[0][1])
    for prompt, pictures in drawn:
        if len(pictures) != expected:
            raise UserError(
                f"The prompt {prompt!r} has {len(pictures)} pictures, {drawn[0][0]!r} has {expected}: results are "
                "averaged seed by seed, so every prompt needs a picture of each seed. Draw those that are missing."
            )
    if len(class_pictures) == 1:
        raise UserError("One class picture has no diversity: draw at least two, or give none.")


def compare(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return each picture's mean cosine with all photos.

    Args:
        pictures: (N, D), rows of length 1.
        photos: (K, D), rows of length 1.

    Returns:
        (N,) in [-1, 1].
    """
    return (pictures @ photos.T).mean(-1)


def estimate_diversity(pictures: Tensor) -> Estimate:
    """Return 1 - (mean cosine of all pairs of pictures), and its standard error by the jackknife.

    It stands for the paper's DIV, which is a mean of LPIPS distances: neither its numbers nor its scale. Each picture
    is in N - 1 pairs, which are therefore not independent. Hence the jackknife: with d_i the diversity of all pictures
    but the i-th, the error is sqrt((N - 1) / N * sum((d_i - mean of d)^2)).

    Args:
        pictures: (N, D), rows of length 1, N at least 2.
    """
    cosines, count = (pictures @ pictures.T).double(), len(pictures)
    to_others = 1 - (cosines.sum(-1) - cosines.diagonal()) / (count - 1)  # (N,), each one's mean distance
    mean = to_others.mean()
    if count == 2:
        return Estimate(mean.item(), None)
    without_one = (count * mean - 2 * to_others) / (count - 2)
    error = (without_one.var(correction=0) * (count - 1)).sqrt()
    return Estimate(mean.item(), error.item())


# ----------------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Read lists of prompts, each with one {} for the subject: "sks dog" to draw with, "dog" to measure with.

    Args:
        path: prompts_and_classes.txt of the paper's data set (github.com/google/dreambooth), or a text file with a
            prompt on each line. Empty lines do not count.

    Returns:
        The data set's "object" and "live subject", or "prompts" alone.

    Raises:
        UserError: The file cannot be read, or one of its lines is no such prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read as text in UTF-8: {error}.") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    is_plain = not any(_START.fullmatch(line) for _, line in lines)
    lists = {PLAIN: lines} if is_plain else find_lists(lines, path)
    for name, entries in lists.items():
        if not entries:
            raise UserError(f"{path} has no prompts{'' if is_plain else f' for {name}'}: write one on each line.")
        for number, prompt in entries:
            check_prompt(prompt, f"{path}, line {number}")
    return {name: [prompt for _, prompt in entries] for name, entries in lists.items()}


def find_lists(lines: list[tuple[int, str]], path: str | Path) -> dict[str, list[tuple[int, str]]]:
    """Return the lists of the data set's file under their titles, each prompt with the number of its line.

    Args:
        lines: The file's, numbered, without empty ones.

    Raises:
        UserError: A list has no end, or a line that is no prompt.
    """
    lists, name, is_open = {}, PLAIN, False
    for number, line in lines:
        entry = _ENTRY.fullmatch(line)
        if is_open and entry:
            lists[name].append((number, entry["prompt"].replace("{0} {1}", "{}")))
        elif is_open and line != "]":
            expected = "'a {0} {1} ….'.format(unique_token, class_token), or the list's ]"
            raise UserError(f"{path}, line {number}: {line!r} is not {expected}. Download the file again.")
        elif _START.fullmatch(line):
            is_open = True
            lists.setdefault(name, [])
        else:
            is_open, name = False, line.removesuffix("Prompts").strip().lower()
    if is_open:
        raise UserError(f"{path} ends at line {lines[-1][0]} within a list: ] is missing. Download the file again.")
    return lists


def check_prompt(prompt: str, place: str) -> None:
    """Raise UserError unless a prompt has one {} and no other braces."""
    if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", "")):
        raise UserError(f"{place}: {prompt!r} needs one {{}} for the subject and no other braces: 'a {{}} at night'.")
