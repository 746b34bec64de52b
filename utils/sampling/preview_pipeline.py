"""Samplers of previews: which pictures a round draws, and how a pipeline of the networks in memory draws them."""

import difflib
import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from utils.core import atomic_files
from utils.data import decode_images
from utils.data.geometry import Size
from utils.sampling import image_grid

logger = logging.getLogger(__name__)

# What a scheduler must take to have the noise of these models; those of flow matching do not.
DDPM_NOISE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}


class Preview(NamedTuple):
    """One picture that each round draws anew."""

    name: str  # of its file, and of the small picture that it enlarges
    index: int
    seed: int
    size: Size  # in pixels


def list_previews(sizes: list[Size], count: int, seed: int) -> list[Preview]:
    """List the pictures of a round, `count` at each size; picture i comes from seed + i."""
    names = ["{:02d}.png" if len(sizes) == 1 else f"{{:02d}}-{size}.png" for size in sizes]
    return [
        Preview(name.format(index), index, (seed + index) % 2**32, size)
        for name, size in zip(names, sizes, strict=True)
        for index in range(count)
    ]


def find_sampler_problems(name: str) -> list[str]:
    """Return a sentence if no scheduler of diffusers has this name, or if it cannot draw with our models."""
    if is_sampler(name):
        return []
    word = name.lower().removesuffix("scheduler")
    known = [one for one in dir(diffusers) if one.endswith("Scheduler") and is_sampler(one)]
    near = [one for one in known if word and word in one.lower()] or difflib.get_close_matches(name, known, cutoff=0.5)
    kind = getattr(diffusers, name, None)
    why = "is not a scheduler of diffusers"
    if kind is not None:
        backends = kind.__dict__.get("_backends")  # of a stand-in for a class whose packages are missing
        why = (
            f"needs other packages: pip install {' '.join(backends)}" if backends else "cannot draw with these models"
        )
    return [f"--validation_scheduler {name} {why}. {'Near' if near else 'Known'}: {', '.join(near or known)}."]


def is_sampler(name: str) -> bool:
    """Say whether a scheduler of diffusers draws with a model that was trained with DDPM's noise."""
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or "Inverse" in name or not name.endswith("Scheduler") or "_backends" in vars(kind):
        return False
    taken = inspect.signature(kind).parameters
    step = inspect.signature(kind.step).parameters.values() if hasattr(kind, "step") else []
    needed = [slot.name for slot in step if slot.default is slot.empty]
    return taken.keys() >= DDPM_NOISE and needed == ["self", "model_output", "timestep", "sample"]


def assemble(kind: type[DiffusionPipeline], **parts) -> DiffusionPipeline:
    """Build a pipeline of a kind from those parts that it has, to draw from embeddings, without any other."""
    slots = inspect.signature(kind).parameters
    needed = {name for name, slot in slots.items() if slot.default is slot.empty}
    parts = {name: part for name, part in parts.items() if name in slots}
    pipeline = kind(**parts, **dict.fromkeys(needed - parts.keys()), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: DiffusionPipeline,
    previews: Iterable[Preview],
    folder: Path,
    small: Path | None = None,
    **options,
) -> None:
    """Draw previews one at a time, so that none depends on another, as PNG files of a folder.

    Args:
        small: Folder of the pictures to be enlarged, under the previews' names; None: pictures are drawn from words.
        options: Of the pipeline's call, the embeddings of one prompt among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for preview in previews:
        if small is not None and not (small / preview.name).exists():
            continue  # there was no memory to draw it
        if small is not None:
            options["image"] = decode_images.open_rgb(small / preview.name)
        picture = pipeline(
            generator=torch.Generator().manual_seed(preview.seed),
            height=preview.size.height,
            width=preview.size.width,
            **options,
        ).images[0]
        atomic_files.save_png(picture, folder / preview.name)


def shrink(previews: list[Preview], paths: list[Path], folder: Path) -> None:
    """Write for each preview the picture of its index, cut and shrunk to the preview's size."""
    folder.mkdir(parents=True, exist_ok=True)
    used = ", ".join(dict.fromkeys(str(paths[preview.index]) for preview in previews))
    sizes = ", ".join(dict.fromkeys(str(preview.size) for preview in previews))
    logger.info("Previews enlarge %s, cut and shrunk to %s px.", used, sizes)
    for preview in previews:
        picture = ImageOps.fit(decode_images.open_rgb(paths[preview.index]), preview.size, Image.Resampling.BICUBIC)
        atomic_files.save_png(picture, folder / preview.name)


def write_grid(names: Iterable[str], folder: Path, title: str) -> list[Image.Image]:
    """Draw those pictures of a folder that are there on one sheet, grid.png, and return them."""
    drawn = [decode_images.open_rgb(folder / name) for name in names if (folder / name).exists()]
    if drawn:
        atomic_files.save_png(image_grid.make_grid(drawn, columns=4, title=title), folder / "grid.png")
    return drawn
