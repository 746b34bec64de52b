"""Decode, scale and crop photos, so that one picture gives the same pixels whatever its format.

An opened image is always mode "RGB": 8 bits, upright, sRGB, on white where it was transparent.
"""

import functools
import io
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from utils.core.errors import UserError
from utils.data.geometry import Crop

READING = 1  # to be raised when a change here gives other pixels: caches go by it

# What Pillow may take a file for. A closed list, because the suffix says nothing about the content: Pillow would also
# run Ghostscript on PostScript that is named photo.jpg.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_LARGEST_RATIO = 100  # a longer picture would take gigabytes when its short edge is scaled to the resolution
_LARGEST_STEP = 0.75  # one step of stepwise shrinking leaves at least this part of an edge

_TIFF_PHOTOMETRIC = 262  # its value 0 means that white is stored as zero
_MODES_8BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
_GREY_MODES = ("1", "L", "LA", "La")
_PROFILE_MODES = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # an ICC header's colour space -> Pillow's mode


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


def upright_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) that `open_rgb` gives an image, or raise UserError as it does."""
    try:
        return look(path)[0]
    except Exception as error:  # see open_rgb
        raise _unreadable(path, error) from error


def look(path: Path) -> tuple[tuple[int, int], bool]:
    """Return the upright (width, height), and whether any pixel is not opaque; remembered until the file changes."""
    state = Path(path).stat()
    return _inspect(path, state.st_size, state.st_mtime_ns)


def reason_of(error: Exception) -> str:
    """Say in a few words why a file could not be read."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "it is damaged, or in no format that is read here (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, HEIC)"
    if isinstance(error, (UserError, Image.DecompressionBombError, MemoryError)):
        return text
    return getattr(error, "strerror", None) or f"it is cut off or damaged ({text})"


class ByteLimitedCache:
    """A function that returns a picture, and its last results: as many as fit into `BUDGET` bytes.

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
        self.kept[key] = self.kept.pop(key)  # to the end of the dict: the first one goes first
        while self.size > self.BUDGET and len(self.kept) > 1:
            self.size -= _count_bytes(self.kept.pop(next(iter(self.kept))))
        return self.kept[key]


def _count_bytes(image: Image.Image) -> int:
    """Return how much memory the pixels of a picture of mode "L" or "RGB" take; Pillow fills up the latter to four."""
    return image.width * image.height * (1 if image.mode == "L" else 4)


@ByteLimitedCache
def open_scaled(path: Path, size: tuple[int, int], resample: Image.Resampling, stepwise: bool = False) -> Image.Image:
    """Open a picture and resize it with an antialiasing filter; the last results are remembered.

    Args:
        stepwise: Shrink by at most a quarter at a time. One step is sharper.
    """
    image = open_rgb(path)
    while stepwise and any(_LARGEST_STEP * edge > wanted for edge, wanted in zip(image.size, size, strict=True)):
        smaller = [max(int(_LARGEST_STEP * edge), wanted) for edge, wanted in zip(image.size, size, strict=True)]
        image = image.resize(tuple(smaller), resample)
    return image.resize(size, resample)


def crop(image: Image.Image, place: Crop) -> Image.Image:
    """Crop a scaled picture, and mirror it if the crop says so."""
    image = image.crop(place.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place.is_flipped else image


def _open_parts(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Open an image as its upright sRGB colours and, if it has some, its transparency; see `open_rgb`."""
    try:
        with warnings.catch_warnings(action="ignore"), _open(path) as image:
            raw_mode = _raw_mode(image)
            image.load()
            orientation, profile = _orientation(image), image.info.get("icc_profile")
            colours, alpha = _split_alpha(image, raw_mode)
    except Exception as error:  # decoders raise nearly every type on corrupt data
        raise _unreadable(path, error) from error
    rgb = _to_srgb(colours, profile)
    rgb.info = {}  # a profile that stays here would be written, and applied again, with the converted pixels
    for part in filter(None, (rgb, alpha)):
        part.info = {}
        _turn_upright(part, orientation)
    return rgb, alpha


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
    return UserError(f"{path} cannot be read as an image: {reason_of(error)}. Export it again, or remove it.")


def _raw_mode(image: Image.Image) -> str:
    """Name how the file stores a pixel ("L;2", "RGB;16B"), which Pillow forgets once the image is loaded."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    return arguments if isinstance(arguments, str) else str(next(iter(arguments or ("",))))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 if it is upright or its EXIF data is broken."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in range(1, 9) else 1
    except Exception:  # broken metadata raises nearly every type, and the pixels are good
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> None:
    """Turn an image without metadata in place, as an EXIF orientation says."""
    # Alone in its metadata, because Pillow would also write the file's, and some cannot be written.
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)


@functools.lru_cache(maxsize=65536)
def _inspect(path: Path, _size: int, _time: int) -> tuple[tuple[int, int], bool]:
    """Decode an image; return its upright (width, height) and whether any pixel is not opaque."""
    with warnings.catch_warnings(action="ignore"), _open(path) as image:  # of size and EXIF data: the pixels are good
        width, height = image.size
        raw_mode = _raw_mode(image)
        image.draft(None, (max(1, width // 8), max(1, height // 8)))  # JPEG only: all bytes are read, few pixels made
        image.load()
        if _orientation(image) >= 5:  # turned by a quarter
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
