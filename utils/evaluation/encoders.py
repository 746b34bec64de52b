"""CLIP and DINO: loading them, and embeddings of pictures and texts.

N counts pictures or texts, D is an encoder's width. Embeddings are float32, of length 1.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, PreTrainedModel, ViTModel

from utils.core.errors import UserError
from utils.models import model_files

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # of pictures or prompts that are encoded at a time
CLIP = {"clip": (CLIPModel, {})}  # kinds of model by their config.json, and how each is loaded
# The ViT of DINO has no pooler: it would be made at random.
DINO = {"vit": (ViTModel, {"add_pooling_layer": False}), "dinov2": (Dinov2Model, {})}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network that embeds pictures, CLIP's also prompts, and what its own files say of preparing them."""

    name: str
    network: PreTrainedModel
    processor: Any  # of pictures
    tokenizer: Any = None  # None: it reads no text


def load_clip(name: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """Load a CLIP in float32, from a folder or the Hub, such as openai/clip-vit-base-patch32.

    Raises:
        UserError: It is no CLIP, or not all of one.
    """
    name = str(name)
    network = load_network(name, CLIP, "CLIP, such as openai/clip-vit-base-patch32", device)
    tokenizer = model_files.load(AutoTokenizer, name, None)
    known, expected = len(tokenizer), network.config.text_config.vocab_size
    if known != expected:
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
    network = load_network(name, DINO, "DINO, such as facebook/dino-vits16", device)
    return Encoder(name, network, load_processor(name))


def load_network(name: str, kinds: dict[str, tuple], wanted: str, device: torch.device | str) -> PreTrainedModel:
    """Load a network in float32, for evaluation, by the class that its own config.json asks for.

    Args:
        kinds: The class and its options, by the `model_type` of the config.
        wanted: Says in the error what to name instead.

    Raises:
        UserError: There is no such model, it is of another kind, or files or weights are missing or broken.
    """
    kind = model_files.read_config(name, "config.json").get("model_type")
    if kind not in kinds:  # transformers would fill it with random weights
        raise UserError(f"{name} is a model of type {kind}, but {' or '.join(kinds)} is needed here. Name a {wanted}.")
    network_class, options = kinds[kind]
    network = model_files.load(network_class, name, None, torch.device(device), dtype=torch.float32, **options)
    return network.eval().requires_grad_(False)


def load_processor(name: str) -> Any:
    """Load what a model's preprocessor_config.json describes, for Pillow, so that torchvision makes no difference.

    Some of these files, those of the first DINO among them, have a picture stretched into a square, not cropped.
    """
    return model_files.load(AutoImageProcessor, name, None, backend="pil")


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
