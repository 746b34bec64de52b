"""List, open, check and write image files, so that one picture gives the same pixels whatever its format.

An opened image is always mode "RGB": 8 bits, upright, sRGB, on white where it was transparent.
"""

import functools
import hashlib
import io
import logging
import stat
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from utils.core.atomic_files import write_whole
from utils.core.errors import UserError, explain_write_errors
from utils.data.geometry import Crop, Size, measure

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif"),
)

logger = logging.getLogger(__name__)

PROMPT_FILE = ".prompt"
READING = 1  # to be raised when a change here gives other pixels: caches go by it

# What Pillow may take a file for. A closed list, because the suffix says nothing about the content: Pillow would also
# run Ghostscript on PostScript that is named photo.jpg.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_LARGEST_RATIO = 100  # beyond it, a picture whose short edge is made the resolution takes gigabytes
_LARGEST_STEP = 0.75  # of an edge, that is left by one step of shrinking stepwise
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS archives and Synology disks add

_EXIF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC = 262  # its value 0 means that white is stored as zero
_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

_MODES_8BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
_GREY_MODES = ("1", "L", "LA", "La")
_PROFILE_MODES = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # an ICC header's colour space -> Pillow's mode


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


def list_images(folder: Path) -> Listing:
    """List a folder's images recursively, in an order that is the same on every machine.

    The suffix alone decides what is an image, in any case; `open_rgb` then goes by the content. Links are followed. A
    folder that is hidden, already listed or above `folder` is skipped as one entry, so link loops end.

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


def open_rgb(path: Path) -> Image.Image:
    """Open an image as 8-bit sRGB, upright and opaque.

    Grey of 16 bits keeps its high byte, as Pillow does for 16-bit colours, so that v * 257 becomes v. Transparency is
    composited on white, an animation gives its first frame, and a broken or unfitting colour profile is ignored.

    Returns:
        A mode "RGB" image that holds no metadata and no open file.

    Raises:
        UserError: the file is missing, cut off, corrupt, suspiciously large, or of a kind that cannot become RGB.
    """
    rgb, alpha = _open_parts(path)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def open_light(path: Path) -> Image.Image:
    """Open an image as mode "L", upright: how light it is or, if parts are transparent, how opaque.

    Raises:
        UserError: as of `open_rgb`.
    """
    rgb, alpha = _open_parts(path)
    return alpha if alpha is not None and alpha.getextrema()[0] < 255 else rgb.convert("L")


def _open_parts(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Open an image as its upright sRGB colours and, if it has some, its transparency; see `open_rgb`."""
    try:
        with warnings.catch_warnings(action="ignore"), _open(path) as image:
            raw_mode = _raw_mode(image)
            image.load()
            turn, profile = _turn(image), image.info.get("icc_profile")
            colours, alpha = _split_alpha(image, raw_mode)
    except Exception as error:  # decoders raise nearly every type on corrupt data
        raise _unreadable(path, error) from error
    rgb = _to_srgb(colours, profile)
    if turn is not None:
        rgb, alpha = rgb.transpose(turn), alpha and alpha.transpose(turn)
    rgb.info = {}  # a profile that stays here would be written, and applied again, with the converted pixels
    return rgb, alpha


def upright_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) that `open_rgb` gives an image, or raise UserError as it does."""
    try:
        return _look(path)[0]
    except Exception as error:  # see open_rgb
        raise _unreadable(path, error) from error


class ByteLimitedCache:
    """A function that returns a picture, and its last results, as many as take `BUDGET` bytes at most.

    A number of pictures would be no limit: 256 of 2,000 px take 4 GB, in each process that loads pictures.
    """

    BUDGET = 256 * 2**20

    def __init__(self, make: Callable[..., Image.Image]):
        """Take the function; its arguments are positional, and decide the picture."""
        self.make, self.kept, self.size = make, {}, 0
        functools.update_wrapper(self, make)

    def __call__(self, *key) -> Image.Image:
        """Return the picture of these arguments, made or remembered."""
        if key not in self.kept:
            self.kept[key] = self.make(*key)
            self.size += _count_bytes(self.kept[key])
        self.kept[key] = self.kept.pop(key)  # the last one to go, from here on
        while self.size > self.BUDGET and len(self.kept) > 1:
            self.size -= _count_bytes(self.kept.pop(next(iter(self.kept))))
        return self.kept[key]


def _count_bytes(image: Image.Image) -> int:
    """Return how much memory the pixels of a picture of mode "L" or "RGB" take; Pillow fills up the latter to four."""
    return image.width * image.height * (1 if image.mode == "L" else 4)


@ByteLimitedCache
def open_scaled(path: Path, size: tuple[int, int], resample: Image.Resampling, stepwise: bool = False) -> Image.Image:
    """Open a picture and resize it by antialiased filters; the last ones are remembered.

    Args:
        stepwise: Take off at most a quarter of the edges at a time; else it is one step, which is sharper.
    """
    image = open_rgb(path)
    while stepwise and any(_LARGEST_STEP * edge > wanted for edge, wanted in zip(image.size, size)):
        smaller = [max(int(_LARGEST_STEP * edge), wanted) for edge, wanted in zip(image.size, size)]
        image = image.resize(tuple(smaller), resample)
    return image.resize(size, resample)


def inspect_images(paths: Iterable[Path]) -> Inspection:
    """Decode every image once to learn its size, whether it is readable, and whether it is transparent.

    Returns:
        The findings; a bad file becomes an entry of `unreadable`, never an exception.
    """
    sizes, unreadable, transparent = {}, {}, []
    for path in paths:
        try:
            sizes[path], is_transparent = _look(path)
        except Exception as error:  # see open_rgb
            unreadable[path] = _reason(error)
            continue
        if is_transparent:
            transparent.append(path)
    return Inspection(sizes, unreadable, tuple(transparent))


def crop_image(image: Image.Image, crop: Crop) -> Image.Image:
    """Return what is left of a picture that was scaled."""
    image = image.crop(crop.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.is_flipped else image


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
    """Warn if pictures are smaller than what they are cut to; `target` is the size that was asked for."""
    if small := sum(any(edge < wanted for edge, wanted in zip(found[path], sizes[path])) for path in found):
        logger.warning("%d of %d photos are smaller than %s px: enlarged.", small, len(found), target)


def check_presence(paths: Iterable[Path]) -> None:
    """Raise UserError if class images that other processes have drawn are not here."""
    if elsewhere := [str(path) for path in paths if not path.exists()]:
        raise UserError(
            f"{len(elsewhere)} class images are on another machine, as {elsewhere[0]}: share their folder."
        )


def find_unreadable(flag: str, paths: Iterable[str]) -> list[str]:
    """Return a sentence for each of a flag's files that is no picture."""
    return [f"{flag} {path}: {reason}" for path, reason in inspect_images(map(Path, paths)).unreadable.items()]


def inspect_folder(folder: Path, flag: str, skip_bad: bool) -> Inspection:
    """Look at every image of a folder that must hold some, and log what a person should know of them.

    Args:
        flag: What the folder is called in messages.
        skip_bad: Go on without unreadable images instead of raising.

    Raises:
        UserError: The folder holds no images, or unreadable ones (all are listed).
    """
    listing = list_images(folder)
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


def list_class_batches(missing: dict[Path, Any], size: int) -> list[tuple[Any, range]]:
    """Return the batches in which missing class images are drawn: their `Concept`, and the numbers of its images.

    A batch begins at a multiple of its size, whatever is there already, so that each image has always the same
    neighbours, which decide its last bits.
    """
    starts = {(concept.class_data_dir, int(path.stem) // size * size): concept for path, concept in missing.items()}
    return [
        (starts[folder, first], range(first, min(first + size, starts[folder, first].num_class_images)))
        for folder, first in sorted(starts)
    ]


def save_class_images(concept: Any, numbers: Iterable[int], pictures: list[Image.Image], missing: Container) -> None:
    """Write those of a concept's class images whose paths are missing, and remember in their folder what drew them."""
    folder = Path(concept.class_data_dir)
    remember_source(folder, concept.class_prompt, concept.class_guidance_scale)
    for number, picture in zip(numbers, pictures):
        path = folder / f"{number:05d}.png"
        if path in missing:
            save_png(picture, path)


def find_class_images(folder: Path, prompt: str, guidance: float | None, wanted: int) -> tuple[list[Path], set[Path]]:
    """Return the paths of as many images as are wanted, and those among them that are still to be drawn.

    Pictures that are there and can be decoded come first; `00000.png`, `00001.png`, … fill up.

    Raises:
        UserError: What is there was drawn from another prompt, or with another guidance (None: the pipeline's own).
    """
    check_source(folder, prompt, guidance)
    inspection = inspect_images(list_images(folder).images if folder.is_dir() else [])
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


def fingerprint(pictures: Iterable[tuple[Path, bool]]) -> str:
    """Return what changes when pictures do: a hash of the content of files, and of the names of class images.

    Args:
        pictures: Paths, and whether each is a class image, which may still be drawn.
    """
    found = hashlib.blake2b(digest_size=8)
    for path, is_prior in pictures:
        found.update(path.name.encode("utf-8", "surrogateescape") + b"/" + (b"" if is_prior else path.read_bytes()))
    return found.hexdigest()


def remember_source(folder: Path, prompt: str, guidance: float | None) -> None:
    """Write down, beside drawn images, what they were drawn from; no kill may leave half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PROMPT_FILE, describe_source(prompt, guidance))


def check_source(folder: Path, prompt: str, guidance: float | None) -> None:
    """Raise UserError if a folder's images were drawn from another prompt or with another guidance."""
    path, source = folder / PROMPT_FILE, describe_source(prompt, guidance)
    try:
        drawn_from = path.read_text(encoding="utf-8") if path.is_file() else source
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Use another folder.") from error
    if drawn_from != source:
        raise UserError(f"The images in {folder} were drawn from {drawn_from!r}, not {source!r}. Use another folder.")


def describe_source(prompt: str, guidance: float | None) -> str:
    """Return in words what class images are drawn from."""
    return prompt if guidance is None else f"{prompt} (guidance {guidance:g})"


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that other processes see either whole or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    with explain_write_errors(path):
        write_whole(path, content.getbuffer())


def _entries(folder: Path) -> list[Path]:
    """List a folder's direct entries by name, or raise an `UserError`."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        message = f"The image folder {folder} cannot be listed: {_reason(error)}. Name a folder that you may read."
        raise UserError(message) from error


def _sort_key(folder: Path, path: Path) -> tuple[str, str]:
    """Make a sort key from the path below `folder`; composed, because macOS may store "é" as two characters."""
    name = path.relative_to(folder).as_posix()
    return unicodedata.normalize("NFC", name), name


def _open(path: Path) -> Image.Image:
    """Open an image file by its content without decoding it."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for
        raise UserError("it is no file")
    with Path(path).open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError("the file is empty")
    if head[4:8] != b"ftyp" or b"avif" in head or not any(brand in head for brand in _HEIC_BRANDS):
        return Image.open(path, formats=_FORMATS)
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError("it is a HEIC photo, which needs `pip install pillow-heif`") from error
    pillow_heif.register_heif_opener()
    return Image.open(path, formats=("HEIF",))


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error of a file that cannot be read as an image."""
    return UserError(f"{path} cannot be read as an image: {_reason(error)}. Export it again, or remove it.")


def _reason(error: Exception) -> str:
    """Say in a few words why a file could not be read."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "it is damaged, or in no format that is read here (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, HEIC)"
    if isinstance(error, (UserError, Image.DecompressionBombError, MemoryError)):
        return text
    return getattr(error, "strerror", None) or f"it is cut off or damaged ({text})"


def _raw_mode(image: Image.Image) -> str:
    """Name how the file stores a pixel ("L;2", "RGB;16B"), which Pillow forgets once the image is loaded."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    return arguments if isinstance(arguments, str) else str(next(iter(arguments or ("",))))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Find what makes a loaded image upright; None where it is, or where its EXIF data is broken."""
    try:
        return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION))
    except Exception:  # broken metadata raises nearly every type, and the pixels are good
        return None


def _look(path: Path) -> tuple[tuple[int, int], bool]:
    """Return what `_inspect` finds in a file, which is read anew only if it changes."""
    state = Path(path).stat()
    return _inspect(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _inspect(path: Path, _size: int, _time: int) -> tuple[tuple[int, int], bool]:
    """Decode an image; return its upright (width, height) and whether any pixel is not opaque."""
    with warnings.catch_warnings(action="ignore"), _open(path) as image:  # of size and EXIF data: the pixels are good
        width, height = image.size
        raw_mode = _raw_mode(image)
        image.draft(None, (max(1, width // 8), max(1, height // 8)))  # JPEG only: all bytes are read, few pixels made
        image.load()
        if _turn(image) in _QUARTER_TURNS:
            width, height = height, width
        if max(width, height) > _LARGEST_RATIO * min(width, height):
            raise UserError(f"it is {width} x {height} pixels, more than {_LARGEST_RATIO} times as long as wide")
        alpha = _split_alpha(image, raw_mode)[1]
        return (width, height), alpha is not None and alpha.getextrema()[0] < 255


def _split_alpha(image: Image.Image, raw_mode: str) -> tuple[Image.Image, Image.Image | None]:
    """Separate a loaded image into its 8-bit colours (mode "L", "RGB" or "CMYK") and its alpha (mode "L"), if any."""
    if image.mode.startswith("I"):
        return _split_alpha_of_deep_grey(image, raw_mode)
    if image.mode not in _MODES_8BIT:
        raise UserError(f"its pixels are of mode {image.mode}, without a fixed range; save it with 8 bits per colour")
    if not image.has_transparency_data:
        grey_or_rgb = "L" if image.mode in _GREY_MODES else "RGB"
        return image.convert("CMYK" if image.mode == "CMYK" else grey_or_rgb), None
    key = image.info.get("transparency")  # the one transparent colour, which Pillow leaves at the file's bit depth
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    *colours, alpha = image.convert("LA" if image.mode in _GREY_MODES else "RGBA").split()
    return Image.merge("L" if len(colours) == 1 else "RGB", colours), alpha


def _split_alpha_of_deep_grey(image: Image.Image, raw_mode: str) -> tuple[Image.Image, Image.Image | None]:
    """Bring a loaded grey image of 12, 16 or 32 bits (values up to 65535) to 8 bits; see `_split_alpha`."""
    values = np.asarray(image).astype(np.int32)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise UserError(f"its grey values run from {low} to {high}, not from 0 to 65535; save it with 8 or 16 bits")
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    bits = 12 if raw_mode == "I;12" else 16
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:
        values = 2**bits - 1 - values
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)), alpha


def _to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert mode "L", "RGB" or "CMYK" to sRGB, by an ICC profile if one fits the mode, else by Pillow's rules."""
    mode = _PROFILE_MODES.get((profile or b"")[16:20])
    if (colours.mode, mode) == ("L", "RGB"):  # a colour photo that was made grey and kept its profile
        colours = colours.convert("RGB")
    transform = _transform_to_srgb(profile, mode) if mode == colours.mode else None
    return colours.convert("RGB") if transform is None else ImageCms.applyTransform(colours, transform)


@functools.lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the colour transform from an ICC profile to sRGB; None if it is broken or already describes sRGB.

    Profiles that are sRGB differ in name, size and rounding, so a lattice of colours decides: one that moves none of
    them by more than one level of 255 is sRGB.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # the faster table is up to ten levels wrong in dark greys
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    colours = Image.fromarray(lattice) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    moved = np.asarray(ImageCms.applyTransform(colours, transform), int) - np.asarray(colours.convert("RGB"), int)
    return None if np.abs(moved).max() <= 1 else transform
