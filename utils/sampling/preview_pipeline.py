"""Samplers of previews: which pictures a round draws, and how a pipeline of the networks in memory draws them."""

import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from utils.core import atomic_files
from utils.data import decode_images
from utils.data.geometry import Size
from utils.sampling import image_grid

logger = logging.getLogger(__name__)


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
