"""Class images: which there are, in which batches the others are generated, and what they were generated from."""

import logging
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from utils.core.atomic_files import save_png, write_whole
from utils.core.errors import UserError
from utils.data.list_images import find_images, inspect_images

PROMPT_FILE = ".prompt"

logger = logging.getLogger(__name__)


def find(folder: Path, prompt: str, guidance: float | None, wanted: int) -> tuple[list[Path], set[Path]]:
    """Return the paths of as many class images as are wanted, and those of them that must still be generated.

    Images that exist and can be decoded come first. The others are named `00000.png`, `00001.png`, …

    Raises:
        UserError: What is there was drawn from another prompt, or with another guidance (None: the pipeline's own).
    """
    check_source(folder, prompt, guidance)
    inspection = inspect_images(find_images(folder).images if folder.is_dir() else [])
    present = sorted(inspection.sizes)
    for path, reason in inspection.unreadable.items():
        logger.warning("Class image %s does not count: %s", path, reason)
    if len(present) > wanted:
        logger.warning(
            "%s holds %d class images; --num_class_images takes the first %d.", folder, len(present), wanted
        )
    names = sorted({folder / f"{index:05d}.png" for index in range(wanted)} - set(present))
    missing = set(names[: max(0, wanted - len(present))])
    return sorted({*present[:wanted], *missing}), missing


def raise_if_missing(folder: Path, missing: int, wanted: int) -> None:
    """Raise UserError if class images are missing that nothing can draw, as stage II has nothing to enlarge."""
    if missing:
        raise UserError(
            f"{folder} lacks {missing} of {wanted} class images, and stage II cannot draw from words alone. "
            "Give --class_data_dir with enough of them, or --stage_one_model_name_or_path."
        )


def list_batches(missing: dict[Path, Any], size: int) -> list[tuple[Any, range]]:
    """Return the batches in which missing class images are generated: a `Concept`, and the numbers of its images.

    A batch begins at a multiple of its size, whatever is there already, so that each image has always the same
    neighbours, which decide its last bits.
    """
    starts = {(concept.class_data_dir, int(path.stem) // size * size): concept for path, concept in missing.items()}
    return [
        (starts[folder, first], range(first, min(first + size, starts[folder, first].num_class_images)))
        for folder, first in sorted(starts)
    ]


def save(concept: Any, numbers: Iterable[int], pictures: list[Image.Image], missing: Container) -> None:
    """Write the class images whose paths are missing, and note in their folder what they were generated from."""
    folder = Path(concept.class_data_dir)
    remember_source(folder, concept.class_prompt, concept.class_guidance_scale)
    for number, picture in zip(numbers, pictures, strict=True):
        path = folder / f"{number:05d}.png"
        if path in missing:
            save_png(picture, path)


def raise_if_elsewhere(paths: Iterable[Path]) -> None:
    """Raise UserError if class images that other processes generated are not on this machine."""
    if elsewhere := [str(path) for path in paths if not path.exists()]:
        raise UserError(
            f"{len(elsewhere)} class images are on another machine, as {elsewhere[0]}: share their folder."
        )


def check_source(folder: Path, prompt: str, guidance: float | None) -> None:
    """Raise UserError if a folder's images were drawn from another prompt or with another guidance."""
    path, source = folder / PROMPT_FILE, describe_source(prompt, guidance)
    try:
        drawn_from = path.read_text(encoding="utf-8") if path.is_file() else source
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Use another folder.") from error
    if drawn_from != source:
        raise UserError(f"The images in {folder} were drawn from {drawn_from!r}, not {source!r}. Use another folder.")


def remember_source(folder: Path, prompt: str, guidance: float | None) -> None:
    """Note beside generated images what they were generated from; a kill leaves no half-written file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PROMPT_FILE, describe_source(prompt, guidance))


def describe_source(prompt: str, guidance: float | None) -> str:
    """Return in words what class images are generated from."""
    return prompt if guidance is None else f"{prompt} (guidance {guidance:g})"
