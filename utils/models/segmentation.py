"""Find the subject of a photo by a network: what a text says (CLIPSeg), or the main thing (the package rembg).

CLIPSeg: arXiv:2112.10003. H, W are a height and width in pixels.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from utils.core.errors import UserError
from utils.flags.flag_checks import is_installed
from utils.models import model_files

PREPROCESSING = "preprocessor_config.json"
KNOWN_MODEL = "CIDAS/clipseg-rd64-refined"  # of the Hub
KNOWN_MATTING = "isnet-general-use"  # of rembg


class Segmenter(NamedTuple):
    """A network that finds what a text says, and what it is given."""

    network: transformers.CLIPSegForImageSegmentation
    text: dict[str, torch.Tensor]  # the tokenized prompt
    size: tuple[int, int]  # (width, height) in pixels of what the network sees
    resample: int
    mean: list[float]  # of each colour channel in [0, 1]
    std: list[float]


def load_segmenter(model: str, prompt: str) -> Segmenter:
    """Load a CLIPSeg model and prepare its prompt.

    Raises:
        UserError: There is no such folder, or it holds another model, or a part of it is broken or missing.
    """
    if not Path(model).is_dir():
        raise UserError(f"--model {model} is no folder. Download a model of CLIPSeg, such as {KNOWN_MODEL}, into one.")
    kind = model_files.read_config(model, "config.json").get("model_type")
    if kind != "clipseg":
        raise UserError(f"--model {model} is of type {kind!r}, not 'clipseg'. Use a model such as {KNOWN_MODEL}.")
    pixels, name = model_files.read_config(model, PREPROCESSING), f"{model}/{PREPROCESSING}"
    try:
        size = pixels["size"]  # one number in older files
        width, height = (size["width"], size["height"]) if isinstance(size, dict) else (size, size)
        mean, std = pixels["image_mean"], pixels["image_std"]
    except KeyError as error:
        raise UserError(f"{name} lacks {error}. Download the model again, or use another.") from error
    if width != height:
        raise UserError(f"{name} gives a size of {width}x{height}, and CLIPSeg takes squares. Use another model.")
    network = model_files.load(transformers.CLIPSegForImageSegmentation, model, None).eval()
    tokenizer = model_files.load(transformers.AutoTokenizer, model, None)
    text = tokenizer([prompt], truncation=True, return_tensors="pt")
    resample = pixels.get("resample", Image.Resampling.BILINEAR)
    return Segmenter(network, dict(text), (width, height), resample, mean, std)


@torch.no_grad()
def find_words(segmenter: Segmenter, threshold: float, photo: Image.Image) -> np.ndarray:
    """Return where a network finds what its prompt says, (H, W) bool, of the size that it works at.

    Args:
        threshold: How sure it must be of a pixel, in [0, 1).
    """
    logits = segmenter.network(**segmenter.text, pixel_values=prepare_pixels(segmenter, photo)).logits
    return (logits[0].sigmoid() > threshold).numpy()


def prepare_pixels(segmenter: Segmenter, photo: Image.Image) -> torch.Tensor:
    """Return a photo as a network sees it, (1, 3, H, W) float32; CLIPSegProcessor does the same by torchvision."""
    values = np.asarray(photo.resize(segmenter.size, segmenter.resample), np.float32) / 255
    values = (values - np.float32(segmenter.mean)) / np.float32(segmenter.std)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def open_rembg(name: str) -> Callable[[Image.Image], Image.Image]:
    """Return what finds the main subject of a photo: a network of rembg, whose answer is light where that is.

    The network is downloaded, unless its file lies in the folder that the variable U2NET_HOME names.

    Raises:
        ImportError: rembg is not installed.
        UserError: There is no such network, or it cannot be downloaded.
    """
    if not is_installed("rembg"):
        raise ImportError('--rembg needs the package rembg, which is not installed: pip install "rembg[cpu]"')
    rembg = importlib.import_module("rembg")  # imports numba, which takes seconds
    try:
        session = rembg.new_session(name)
    except Exception as error:  # the classes of several libraries
        why = str(error).rstrip(".")
        raise UserError(
            f"--rembg {name} cannot be opened: {why}. Use a name that rembg lists, such as {KNOWN_MATTING}. Without a "
            f"connection, download {name}.onnx elsewhere and set U2NET_HOME to its folder."
        ) from error
    return functools.partial(rembg.remove, session=session, only_mask=True)


def find_main_subject(remove: Callable[[Image.Image], Image.Image], photo: Image.Image) -> np.ndarray:
    """Return where rembg finds the main subject, (H, W) bool, of the photo's size."""
    return np.asarray(remove(photo).convert("L")) > 127
