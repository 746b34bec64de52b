"""Find image files, check that they can be read, and choose those that are large enough."""

import functools
import hashlib
import logging
import unicodedata
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from utils.core.errors import UserError
from utils.data import decode_images
from utils.data.geometry import Size, measure

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif"),
)
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS archives and Synology disks add

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a folder holds, each part sorted by path."""

    images: tuple[Path, ...]
    skipped: tuple[Path, ...]


@dataclass(frozen=True)
class Inspection:
    """What a look into every file found."""

    sizes: dict[Path, tuple[int, int]]  # readable images only: upright (width, height) in pixels
    unreadable: dict[Path, str]  # path -> reason
    transparent: tuple[Path, ...]  # images with at least one pixel that is not opaque
    notes: tuple[str, ...] = ()  # what a person should know, a sentence each


def find_images(folder: Path) -> Listing:
    """List a folder's images recursively, in an order that is the same on every machine.

    The suffix alone decides what is an image, in upper or lower case. Links are followed. A folder that is hidden,
    already listed or above `folder` is skipped as one entry, so link loops end.

    Args:
        folder: where to look; hidden names count only below it.

    Returns:
        Paths that begin with `folder`: the images and everything that was skipped.

    Raises:
        UserError: `folder` or a folder below it cannot be read.
    """
    folder = Path(folder)
    images, skipped = [], []
    seen, pending = set(folder.resolve().parents), deque([folder])
    while pending:
        current = pending.pop()
        if current.resolve() in seen:
            skipped.append(current)
            continue
        seen.add(current.resolve())
        for path in _entries(current):
            if path.name.startswith(".") or path.name in _SYSTEM_FOLDERS:
                skipped.append(path)
            elif path.is_symlink() and path.is_dir():
                pending.appendleft(path)  # after all real folders, whose own paths go first
            elif path.is_dir():
                pending.append(path)
            else:
                (images if path.suffix.lower() in IMAGE_SUFFIXES else skipped).append(path)
    in_order = functools.partial(sorted, key=functools.partial(_sort_key, folder))
    return Listing(tuple(in_order(images)), tuple(in_order(skipped)))


def inspect_images(paths: Iterable[Path]) -> Inspection:
    """Decode every image once to learn its size, whether it is readable, and whether it is transparent.

    Returns:
        The findings; a bad file becomes an entry of `unreadable`, never an exception.
    """
    sizes, unreadable, transparent = {}, {}, []
    for path in paths:
        try:
            sizes[path], is_transparent = decode_images.look(path)
        except Exception as error:  # decoders raise nearly every type on corrupt data
            unreadable[path] = decode_images.reason_of(error)
            continue
        if is_transparent:
            transparent.append(path)
    return Inspection(sizes, unreadable, tuple(transparent))


def inspect_folder(folder: Path, flag: str, skip_bad: bool) -> Inspection:
    """Look at every image of a folder that must hold some, and log what a person should know of them.

    Args:
        flag: What the folder is called in messages.
        skip_bad: Go on without unreadable images instead of raising.

    Raises:
        UserError: The folder holds no images, or unreadable ones (all are listed).
    """
    listing = find_images(folder)
    left_out = ", ".join(str(path.relative_to(folder)) for path in listing.skipped[:10])
    left_out += f" and {len(listing.skipped) - 10} more" if len(listing.skipped) > 10 else ""
    if not listing.images:
        found = f"Found: {left_out}." if left_out else "It is empty."
        raise UserError(f"{flag} {folder} holds no images (looked for {' '.join(IMAGE_SUFFIXES)}). {found}")
    inspection = inspect_images(listing.images)
    notes = [f"Not read as images in {folder}: {left_out}."] if left_out else []
    if inspection.unreadable:
        lines = [f"  {path}: {reason}" for path, reason in inspection.unreadable.items()]
        head = f"{len(lines)} of {len(listing.images)} images in {flag} {folder} cannot be read:"
        if not skip_bad or not inspection.sizes:
            advice = "Mend or remove them" + ("." if skip_bad else ", or go on without them by --skip_bad_images.")
            raise UserError("\n".join([head, *lines, advice]))
        notes.append("\n".join([head, *lines]))
    if inspection.transparent:
        notes.append(f"{len(inspection.transparent)} images in {folder} are transparent in parts: put on white.")
    for note in notes:
        logger.info(note)
    return replace(inspection, notes=tuple(notes))


def find_unreadable(flag: str, paths: Iterable[str]) -> list[str]:
    """Return a sentence for each of a flag's files that is no picture."""
    return [f"{flag} {path}: {reason}" for path, reason in inspect_images(map(Path, paths)).unreadable.items()]


def leave_out_small(sizes: dict[Path, tuple[int, int]], minimum: int | None, unit: str) -> dict[Path, tuple[int, int]]:
    """Return the images that measure at least a minimum, in pixels, and log how many others there are.

    Args:
        unit: What `geometry.measure` goes by.

    Raises:
        UserError: None is that large.
    """
    kept = {path: size for path, size in sizes.items() if measure(size, unit) >= (minimum or 0)}
    left_out = [f"{path} ({size[0]}x{size[1]})" for path, size in sizes.items() if path not in kept]
    if not kept:
        raise UserError(f"All {len(sizes)} photos are smaller than --minimum_image_size {minimum}: {left_out[0]} …")
    if left_out:
        logger.warning("%d of %d photos are too small, left out: %s", len(left_out), len(sizes), ", ".join(left_out))
    return kept


def warn_of_enlarging(found: dict[Path, tuple[int, int]], sizes: dict[Path, Size], target: Size) -> None:
    """Warn if photos are smaller than what they are cropped to; `target` is the size that was asked for."""
    if small := sum(
        any(edge < wanted for edge, wanted in zip(found[path], sizes[path], strict=True)) for path in found
    ):
        logger.warning("%d of %d photos are smaller than %s px: enlarged.", small, len(found), target)


def fingerprint(pictures: Iterable[tuple[Path, bool]]) -> str:
    """Return what changes when pictures do: a hash of the content of files, and of the names of class images.

    Args:
        pictures: Paths, and whether each is a class image, which may still be drawn.
    """
    found = hashlib.blake2b(digest_size=8)
    for path, is_prior in pictures:
        found.update(path.name.encode("utf-8", "surrogateescape") + b"/" + (b"" if is_prior else path.read_bytes()))
    return found.hexdigest()


def _entries(folder: Path) -> list[Path]:
    """List a folder's direct entries by name, or raise an `UserError`."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        reason = decode_images.reason_of(error)
        raise UserError(
            f"The image folder {folder} cannot be listed: {reason}. Name a folder that you may read."
        ) from error


def _sort_key(folder: Path, path: Path) -> tuple[str, str]:
    """Make a sort key from the path below `folder`; composed, because macOS may store "é" as two characters."""
    name = path.relative_to(folder).as_posix()
    return unicodedata.normalize("NFC", name), name
