"""Masks beside photos: pictures that are light where the loss counts, found by name and cut like their photos."""

import functools
import logging
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.core.errors import UserError, list_first
from utils.data import decode_images, list_images
from utils.data.geometry import Crop, Size
from utils.flags.flag_checks import messages_if

logger = logging.getLogger(__name__)

LEAST_LIGHT = 0.001  # of a mask's area; less may be lost when it is scaled
FAINT = 16  # of 255; a mask whose lightest place is darker was not meant so
LEAST_SHARE = 0.1  # of the light that a crop could hold; with less, its loss would be that of a few places at the rim


def find_masks(folder: Path, sizes: dict[Path, tuple[int, int]], masks: str | None, flag: str) -> dict[Path, Path]:
    """Return the mask of each photo that has one: dog/1.png in the folder of masks for dog/1.jpg among the photos.

    Args:
        folder: Of the photos.
        sizes: (width, height) of each photo, upright.
        masks: The folder of masks; None: no photo has one.
        flag: What that is called in messages.

    Raises:
        UserError: No photo has a mask, two masks have one name, or masks are unreadable, wholly black or of another
            shape than their photo; all are listed.
    """
    if masks is None:
        return {}
    masks, by_name = Path(masks), {}
    for path in list_images.find_images(masks).images:
        by_name.setdefault(_name(masks, path), []).append(path)
    pairs = {photo: by_name[_name(folder, photo)][0] for photo in sizes if _name(folder, photo) in by_name}
    if not pairs:
        raise UserError(f"{flag} {masks} has no mask for any of the {len(sizes)} photos; dog.png is that of dog.jpg.")
    problems = [f"{list_first(paths)} have the same name." for paths in by_name.values() if len(paths) > 1]
    found = list_images.inspect_images(pairs.values())
    problems += [f"{path} cannot be read: {reason}." for path, reason in found.unreadable.items()]
    for photo, path in pairs.items():
        problems += _find_misfit(photo, sizes[photo], path, found.sizes[path]) if path in found.sizes else []
    if problems:
        raise UserError("\n".join([f"The masks in {flag} {masks} cannot be used:", *problems]))
    if lacking := [photo for photo in sizes if photo not in pairs]:
        logger.warning(
            "%d of %d photos have no mask, so all their pixels count in the loss: %s",
            len(lacking),
            len(sizes),
            list_first(lacking),
        )
    known = {path for paths in by_name.values() for path in paths}
    if unused := sorted(known - set(pairs.values())):
        logger.warning("%d masks in %s belong to no photo: %s", len(unused), masks, list_first(unused))
    return pairs


def _find_misfit(photo: Path, size: tuple[int, int], path: Path, mask_size: tuple[int, int]) -> list[str]:
    """Return a sentence for each reason why a mask cannot be that of a photo."""
    (width, height), (mask_width, mask_height) = size, mask_size
    mask = decode_images.open_light(path)
    light, most = float(np.asarray(mask).mean()) / 255, mask.getextrema()[1]
    shape = f"{path} is {mask_width}x{mask_height}, but {photo} is {width}x{height}: another shape."
    dark = f"{path} is almost black ({light:.2%} white), so almost no pixel of its photo would be trained."
    # What a segmenter writes as its number of a thing looks black.
    dark += f" Its lightest place is {most} of 255, which should be white." if 0 < most < FAINT else ""
    differs = abs(width * mask_height - height * mask_width) > max(width, height, mask_width, mask_height)
    return messages_if((differs, shape), (light < LEAST_LIGHT, dark))


@decode_images.ByteLimitedCache
def open_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """Open a mask as mode "L", upright, white where the loss counts, scaled to a size; the last are remembered."""
    return decode_images.open_light(path).resize(size, Image.Resampling.BILINEAR)


def move_crop_onto_mask(
    path: Path | None, scaled: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """Return a crop's (left, top, right, bottom), moved if it all but misses what is light.

    A crop that holds less than a tenth of the light that one of its size can hold is moved to where that is.

    Args:
        path: Of the mask; None: there is none.
        scaled: (width, height) of the picture that the crop is cut out of.
    """
    if path is None:
        return box
    brightest, most = _find_brightest(path, scaled, (box[2] - box[0], box[3] - box[1]))
    light = np.asarray(open_mask(path, scaled).crop(box), np.int64).sum()
    return box if light >= LEAST_SHARE * most else brightest


@functools.lru_cache(maxsize=4096)
def _find_brightest(
    path: Path, scaled: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[int, int, int, int], int]:
    """Return the crop of a size that holds most light, of equal ones the middle one, and how much it holds."""
    width, height = size
    sums = np.pad(np.asarray(open_mask(path, scaled), np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    light = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    places = np.argwhere(light == light.max())
    top, left = (int(place) for place in places[len(places) // 2])
    return (left, top, left + width, top + height), int(light.max())


def weight_map(mask: Path | None, cut: Crop, size: Size, factor: int) -> Tensor:
    """Return how much each place of a cut counts in the loss: its part of the mask, or 1 without one.

    Args:
        size: Of the cut.
        factor: Pixels along the edge of a place.

    Returns:
        (1, size.height // factor, size.width // factor) float32 in [0, 1].
    """
    if mask is None:
        return torch.ones(1, size.height // factor, size.width // factor)
    light = decode_images.crop(open_mask(mask, cut.scaled), cut)
    return F.avg_pool2d(torch.from_numpy(np.array(light))[None].float() / 255, factor)


def _name(folder: Path, path: Path) -> str:
    """Return what a photo and its mask have in common: their path without the suffix.

    Composed, because macOS may store "é" as two characters.
    """
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
