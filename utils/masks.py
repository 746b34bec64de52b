"""Masks beside photos: pictures that are light where the loss counts, found by name and cut like their photos."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import images
from utils.errors import InputError
from utils.geometry import Cut, Size

logger = logging.getLogger(__name__)

SHOWN = 10  # paths in a message


def find_masks(folder: Path, sizes: dict[Path, tuple[int, int]], masks: str | None, flag: str) -> dict[Path, Path]:
    """Return the mask of each photo that has one: dog/1.png in the folder of masks for dog/1.jpg among the photos.

    Args:
        folder: Of the photos.
        sizes: (width, height) of each photo, upright.
        masks: The folder of masks; None: no photo has one.
        flag: What that is called in messages.

    Raises:
        InputError: No photo has a mask, two masks have one name, or masks are unreadable, wholly black or of another
            shape than their photo; all are listed.
    """
    if masks is None:
        return {}
    masks = Path(masks)
    found = images.inspect_folder(masks, flag, skip_bad=False)
    by_name = {}
    for path in found.sizes:
        by_name.setdefault(_name(masks, path), []).append(path)
    problems = [f"{_join(paths)} have the same name." for paths in by_name.values() if len(paths) > 1]
    pairs = {photo: by_name[_name(folder, photo)][0] for photo in sizes if _name(folder, photo) in by_name}
    for photo, path in pairs.items():
        (width, height), (mask_width, mask_height) = sizes[photo], found.sizes[path]
        if abs(width * mask_height - height * mask_width) > max(width, height, mask_width, mask_height):
            problems.append(f"{path} is {mask_width}x{mask_height}, but {photo} is {width}x{height}: another shape.")
        if open_mask(path).getextrema()[1] == 0:
            problems.append(f"{path} is black: nothing of its photo would count.")
    if not pairs:
        problems.append(f"{flag} {masks} has no mask for any of the {len(sizes)} photos; dog.png is that of dog.jpg.")
    if problems:
        raise InputError("\n".join([f"The masks in {flag} {masks} cannot be used:", *problems]))
    if lacking := [photo for photo in sizes if photo not in pairs]:
        logger.warning("%d of %d photos have no mask and count wholly: %s", len(lacking), len(sizes), _join(lacking))
    if unused := sorted(set(found.sizes) - set(pairs.values())):
        logger.warning("%d masks in %s belong to no photo: %s", len(unused), masks, _join(unused))
    return pairs


@functools.lru_cache(maxsize=256)
def open_mask(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Open a mask as mode "L", upright, white where the loss counts, scaled to a size if one is given."""
    mask = images.open_rgb(path).convert("L")
    return mask if size is None else mask.resize(size, Image.Resampling.BILINEAR)


def meet(path: Path | None, scaled: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return a crop's (left, top, right, bottom), moved to the middle of what is light if it holds none of that.

    Args:
        path: Of the mask; None: there is none.
        scaled: (width, height) of the picture that the crop is cut out of.
    """
    mask = path and open_mask(path, scaled)
    light = mask and mask.getbbox()
    if not light or mask.crop(box).getbbox():
        return box
    moved = []
    for edge, (start, end), (first, last) in zip(mask.size, zip(box[:2], box[2:]), zip(light[:2], light[2:])):
        length = end - start
        moved.append(min(max((first + last - length) // 2, 0), edge - length))
    return moved[0], moved[1], moved[0] + box[2] - box[0], moved[1] + box[3] - box[1]


def weight_map(mask: Path | None, cut: Cut, size: Size, factor: int) -> Tensor:
    """Return how much each place of a cut counts in the loss: its part of the mask, or 1 without one.

    Args:
        size: Of the cut.
        factor: Pixels along the edge of a place.

    Returns:
        (1, size.height // factor, size.width // factor) float32 in [0, 1].
    """
    if mask is None:
        return torch.ones(1, size.height // factor, size.width // factor)
    light = images.cut(open_mask(mask, cut.scaled), cut)
    return F.avg_pool2d(torch.from_numpy(np.array(light))[None].float() / 255, factor)


def _name(folder: Path, path: Path) -> str:
    """Return what a photo and its mask have in common: their path without the suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _join(paths: Sequence[Path]) -> str:
    """Return the first paths, and how many more there are."""
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(map(str, paths[:SHOWN])) + more
