"""Draw a mask for every photo of a folder, white where the subject is, and a sheet that shows them all.

    python -m utils.make_masks photos/ masks/

The mask of photos/a/x.jpg is masks/a/x.png, of the same size, upright. Masks that are there are kept, so one that was
mended by hand stays. Look at the sheet, masks-sheet.png: the subject is guessed from its colours and from lying near
the middle, and what it stands on may count as a part of it. With --model and --prompt a network looks for what the
prompt says instead.

Shapes: H, W are the height and width in pixels of a photo, or of the smaller version of it that is looked at.

GrabCut: Rother et al., SIGGRAPH 2004. Where it starts: Zhang and Sclaroff, "Saliency Detection: A Boolean Map
Approach", ICCV 2013, and Zhu et al., "Saliency Optimization from Robust Background Detection", CVPR 2014. CLIPSeg:
arXiv:2112.10003.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from utils.core import atomic_files
from utils.core.errors import UserError, exit_status, explain_write_errors
from utils.data import decode_images, list_images
from utils.devices.accelerator_setup import silence_libraries
from utils.flags.flag_checks import find_out_of_range, messages_if
from utils.models import model_files
from utils.sampling import image_grid

try:
    import cv2
except ImportError:  # it is optional; `main` says so
    cv2 = None

NOTHING, EVERYTHING = 0.005, 0.95  # shares of a picture beyond which no subject was told from the rest
LITTLE, MUCH = 0.05, 0.8  # beyond these it may be a part of the subject, or hold more than that

WORK_EDGE, SMALLEST_EDGE = 256, 32  # of what GrabCut sees, in pixels; a photo takes two seconds of one core
ROUNDS = 4  # of GrabCut
# Its result hangs on where it starts, so it starts from several ellipses, and what two of them find is taken.
ELLIPSES = ((0.43, 0.36), (0.5, 0.45))  # half height and half width, in fractions of the picture's
VOTES = 2
RIM = 4  # pixels at the left, right and top that are no subject to start with; it often goes on below the picture

SALIENCE_EDGE, LEVELS = 128, 16  # pixels; thresholds of each colour channel
SEED = 0  # of OpenCV's random numbers
CENTRAL = 0.35  # standard deviation of the weight that falls off from the middle, in fractions of the edges
MINOR = 0.15  # of the main part's weight, from which on another part counts as the subject's

PREPROCESSING = "preprocessor_config.json"
KNOWN_MODEL = "CIDAS/clipseg-rd64-refined"  # of the Hub

CELL_EDGE, COLUMNS = 288, 5  # of the sheet
TINT = (0, 0, 70)

Finder = Callable[[Image.Image], np.ndarray]


class Job(NamedTuple):
    """A photo and its mask."""

    name: str  # the photo's path below its folder
    photo: Path
    mask: Path
    is_there: bool  # the mask, before anything is drawn


class Segmenter(NamedTuple):
    """A network that finds what a text says, and what it is given."""

    network: transformers.CLIPSegForImageSegmentation
    text: dict[str, torch.Tensor]  # the tokenized prompt
    size: tuple[int, int]  # (width, height) in pixels of what the network sees
    resample: int
    mean: list[float]  # of each colour channel in [0, 1]
    std: list[float]


def main(argv: list[str] | None = None) -> int:
    """Draw the masks and the sheet, say where they are, and return the exit status."""
    args = parse_args(argv)
    if cv2 is None:
        raise ImportError("Masks are drawn with OpenCV, which is not installed: pip install opencv-python-headless")
    check_folders(args.photos, args.masks, args.sheet)
    jobs = list_jobs(args.photos, args.masks, args.overwrite)
    find = find_subject
    if args.model:
        silence_libraries()
        find = functools.partial(find_words, load_segmenter(args.model, args.prompt), args.threshold)
    written, kept, unfound, cells = [], [], [], []
    for job in tqdm(jobs, desc="masks", disable=None):
        photo = decode_images.open_rgb(job.photo)
        if job.is_there and not args.overwrite:
            kept.append(job)
        elif mask := draw_mask(photo, find, args.padding, args.feather):
            write(mask, job.mask)
            written.append(job)
        else:
            unfound.append(job)
        cells.append(draw_cell(job, photo))
    write(draw_sheet(cells), args.sheet)
    report_doubtful(jobs)
    report_unfound(unfound, len(jobs))
    print(f"Masks in {args.masks}: {len(written)} written, {len(kept)} kept.")
    print(f"Sheet: {args.sheet}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.make_masks", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("photos", type=Path, metavar="IN", help="folder of photos; those in folders below it count")
    add("masks", type=Path, metavar="OUT", help="folder for the masks, outside of IN")
    add("--overwrite", action="store_true", help="draw masks anew that are there; default: keep them")
    unit = "in fractions of the photo's shorter edge, from 0 to below 1"
    add("--padding", type=float, default=0.02, help=f"how far a mask goes beyond the subject, {unit}; default: 0.02")
    add("--feather", type=float, default=0.02, help=f"width of its soft edge, outside of that, {unit}; default: 0.02")
    add("--model", metavar="PATH", help=f"folder of a CLIPSeg model, such as a copy of {KNOWN_MODEL}")
    add("--prompt", help='what --model looks for, such as "a dog"')
    threshold = "how sure --model must be of a pixel, from 0 to below 1; lower covers more; default: 0.4"
    add("--threshold", type=float, default=0.4, help=threshold)
    add("--sheet", type=Path, metavar="PNG", help="picture of all photos and masks; default: OUT-sheet.png beside OUT")
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), dict.fromkeys(("padding", "feather", "threshold"), "in [0, 1)"))
    problems += messages_if(
        (args.model and not (args.prompt or "").strip(), "--model needs --prompt, the words for what it looks for."),
        (args.prompt and not args.model, "--prompt needs --model, the network that reads it."),
    )
    if problems:
        parser.error(" ".join(problems))
    if args.sheet is None:
        named = args.masks if args.masks.name not in ("", "..") else args.masks.resolve()
        args.sheet = named.with_name(f"{named.name}-sheet.png")
    return args


def report_doubtful(jobs: list[Job]) -> None:
    """Print which masks cover so little or so much that they are probably wrong."""
    shares = {job.name: share_of(decode_images.open_light(job.mask)) for job in jobs if job.mask.exists()}
    if doubtful := {name: share for name, share in shares.items() if not LITTLE <= share <= MUCH}:
        print(f"Look at these first, whose masks cover less than {LITTLE:.0%} or more than {MUCH:.0%}:")
        for name, share in doubtful.items():
            print(f"  {name} ({share:.1%})")


def report_unfound(unfound: list[Job], count: int) -> None:
    """Print for which of so many photos no mask was written, and what that means."""
    if unfound:
        print(f"No subject was found in {len(unfound)} of {count} photos, and no mask was written for:")
        for job in unfound:
            print(f"  {job.name}" + (" (its earlier mask stays)" if job.is_there else ""))
        print("Training counts a photo without a mask wholly. Paint one by hand, or use --model and --prompt.")


# --------------------------------------------------------------------------------------------------------------- files


def check_folders(photos: Path, masks: Path, sheet: Path) -> None:
    """Raise UserError if masks or their sheet would be taken for photos, or the sheet for a mask."""
    source, target, drawn = photos.resolve(), masks.resolve(), sheet.resolve()
    below = "all pictures below the folder of photos count as photos"
    problems = messages_if(
        (target.is_relative_to(source), f"OUT {masks} lies in IN {photos}: {below}. Use a folder beside it."),
        (
            source != target and source.is_relative_to(target),
            f"IN {photos} lies in OUT {masks}: photos would count as masks. Use a folder beside it.",
        ),
        (masks.exists() and not masks.is_dir(), f"OUT {masks} is a file. Use another name."),
        (drawn.is_relative_to(source), f"--sheet {sheet} lies in IN {photos}: {below}. Use another folder."),
        (
            drawn.is_relative_to(target),
            f"--sheet {sheet} lies in OUT {masks}: it would count as a mask. Use another folder.",
        ),
        (sheet.is_dir(), f"--sheet {sheet} is a folder. Name a file."),
    )
    if problems:
        raise UserError("\n".join(problems))


def list_jobs(photos: Path, masks: Path, overwrite: bool) -> list[Job]:
    """List the photos of a folder, each with the path of its mask.

    Raises:
        UserError: There are no photos, some cannot be read, two would have the same mask, or a mask that is there
            cannot be read or is in the way.
    """
    inspection = list_images.inspect_folder(photos, "IN", skip_bad=True)
    if inspection.unreadable:
        lines = [f"  {path}: {reason}" for path, reason in inspection.unreadable.items()]
        raise UserError("\n".join([f"{len(lines)} photos cannot be read:", *lines, "Mend or remove them."]))
    there, jobs, clashes = list_masks(masks), {}, []
    for path in inspection.sizes:
        name = path.relative_to(photos)
        stem = name.with_suffix("")
        if stem in jobs:
            clashes.append(f"  {jobs[stem].name} and {name.as_posix()}")
        mask = there.get(stem, masks / stem.with_name(f"{stem.name}.png"))
        jobs[stem] = Job(name.as_posix(), path, mask, stem in there)
    if clashes:
        raise UserError("\n".join(["These photos would have the same mask:", *clashes, "Rename one of each pair."]))
    others = [f"  {job.mask}" for job in jobs.values() if job.mask.suffix.lower() != ".png"]
    if overwrite and others:
        raise UserError("\n".join(["--overwrite writes PNG files; these masks are others:", *others, "Remove them."]))
    return list(jobs.values())


def list_masks(folder: Path) -> dict[Path, Path]:
    """Return the masks that are there, each under its path below the folder without the suffix.

    Raises:
        UserError: One cannot be read, or two have the same name.
    """
    paths = list_images.find_images(folder).images if folder.is_dir() else ()
    problems = [f"  {path}: {reason}" for path, reason in list_images.inspect_images(paths).unreadable.items()]
    masks = {}
    for path in paths:
        if (first := masks.setdefault(path.relative_to(folder).with_suffix(""), path)) != path:
            problems.append(f"  {path}: {first.name} has the same name")
    if problems:
        raise UserError("\n".join([f"Masks in OUT {folder} cannot be kept:", *problems, "Remove them."]))
    return masks


def write(image: Image.Image, path: Path) -> None:
    """Write a PNG file, and the folders that it lies in."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.save_png(image, path)


# --------------------------------------------------------------------------------------------------------------- masks


def draw_mask(photo: Image.Image, find: Finder, padding: float, feather: float) -> Image.Image | None:
    """Return a mask of a photo's size, mode "L", white where its subject is; None if none was told from the rest.

    Args:
        find: Takes the photo and returns where its subject is, (H, W) bool, of any size.
        padding: How far the mask goes beyond the subject, in fractions of the shorter edge.
        feather: Width of the soft edge outside of that.
    """
    found = clean(find(photo)).astype(np.float32)
    blurred = cv2.GaussianBlur(found, (0, 0), 1)  # else pixels of the smaller version stand out
    is_subject = cv2.resize(blurred, photo.size, interpolation=cv2.INTER_LINEAR) > 0.5
    if not NOTHING <= is_subject.mean() <= EVERYTHING:
        return None
    return Image.fromarray(soften(is_subject, padding * min(photo.size), feather * min(photo.size)))


def soften(is_subject: np.ndarray, padding: float, feather: float) -> np.ndarray:
    """Return a mask that is 255 up to a distance from the subject and falls to 0 over a further one.

    Args:
        is_subject: (H, W) bool.
        padding: The distance in pixels.
        feather: The further one in pixels; 0 is a hard edge.

    Returns:
        (H, W) uint8.
    """
    distance = cv2.distanceTransform((~is_subject).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if not feather:
        return np.where(distance <= padding, 255, 0).astype(np.uint8)
    return np.rint(255 * np.clip((padding + feather - distance) / feather, 0, 1)).astype(np.uint8)


def clean(found: np.ndarray) -> np.ndarray:
    """Return (H, W) bool without specks, far-off parts, cracks and holes."""
    opened = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_OPEN, disc(3))
    count, parts = cv2.connectedComponents(opened, connectivity=8)
    weights = np.bincount(parts.ravel(), weights=central_weight(*found.shape).ravel(), minlength=count)
    weights[0] = 0  # what was not found
    kept = weights >= MINOR * weights.max()
    kept[0] = False
    closed = cv2.morphologyEx(kept[parts].astype(np.uint8), cv2.MORPH_CLOSE, disc(9))
    outside = np.pad(closed, 1)
    cv2.floodFill(outside, None, (0, 0), 2)
    return outside[1:-1, 1:-1] != 2


def disc(diameter: int) -> np.ndarray:
    """Return a disc for OpenCV's morphology."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how far down and to the right each pixel lies, (H, 1) and (1, W) in (0, 1)."""
    return (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def central_weight(height: int, width: int) -> np.ndarray:
    """Return (H, W) weights that fall off from 1 in the middle."""
    y, x = grid(height, width)
    return np.exp(-((y - 0.5) ** 2 + (x - 0.5) ** 2) / (2 * CENTRAL**2))


# ------------------------------------------------------------------------------------------------------- from colours


def find_subject(photo: Image.Image) -> np.ndarray:
    """Return where GrabCut finds a subject, (H, W) bool; it is to differ from the rim and to lie near the middle."""
    small = shrink(photo, WORK_EDGE)
    y, x = grid(*small.shape[:2])
    votes = np.zeros(small.shape[:2], int)
    for middle_y, middle_x in ((0.5, 0.5), salient_point(shrink(photo, SALIENCE_EDGE))):
        for half_height, half_width in ELLIPSES:
            is_inside = ((y - middle_y) / half_height) ** 2 + ((x - middle_x) / half_width) ** 2 < 1
            votes += cut(small, is_inside)
    return votes >= VOTES


def shrink(photo: Image.Image, edge: int) -> np.ndarray:
    """Return a photo as (H, W, 3) uint8 whose longer edge has so many pixels; its shape is kept unless very long."""
    factor = edge / max(photo.size)
    size = tuple(max(SMALLEST_EDGE, round(length * factor)) for length in photo.size)
    return np.asarray(photo.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC))


def cut(rgb: np.ndarray, is_inside: np.ndarray) -> np.ndarray:
    """Return the subject that GrabCut finds, (H, W) bool, if it takes what is inside for the subject to start with.

    Args:
        rgb: (H, W, 3) uint8.
        is_inside: (H, W) bool.
    """
    labels = np.where(is_inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[:RIM] = labels[:, :RIM] = labels[:, -RIM:] = cv2.GC_BGD
    colours = [np.zeros((1, 65)) for _ in range(2)]  # of the rest and the subject; GrabCut writes into them
    cv2.setRNGSeed(SEED)
    cv2.grabCut(rgb, labels, None, *colours, ROUNDS, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def salient_point(rgb: np.ndarray) -> tuple[float, float]:
    """Return how far down and to the right the most conspicuous things of a picture lie on average, each in (0, 1).

    Args:
        rgb: (H, W, 3) uint8.
    """
    weights = (measure_salience(rgb) * central_weight(*rgb.shape[:2])) ** 2
    if not weights.any():
        return 0.5, 0.5
    y, x = grid(*weights.shape)
    return float((weights * y).sum() / weights.sum()), float((weights * x).sum() / weights.sum())


def measure_salience(rgb: np.ndarray) -> np.ndarray:
    """Return how conspicuous each pixel is, (H, W) from 0: how often it lies in an area that the rim hardly touches.

    The areas are those above, and those below, thresholds of each channel of Lab (boolean maps). How much of the rim
    one touches is measured against its size (Zhu et al., CVPR 2014, eq. 3).
    """
    lab = cv2.cvtColor(cv2.GaussianBlur(rgb, (0, 0), 1), cv2.COLOR_RGB2LAB)
    total = np.zeros(lab.shape[:2])
    for channel in np.moveaxis(lab, -1, 0):
        low, high = np.percentile(channel, (1, 99))
        for level in np.linspace(low, high, LEVELS + 2)[1:-1]:
            total += math.sqrt(high - low) * (enclosed(channel > level) + enclosed(channel <= level))
    return total


def enclosed(is_set: np.ndarray) -> np.ndarray:
    """Return for each pixel of a boolean map (H, W) how little of the rim its area touches, from 0 to 1."""
    count, areas = cv2.connectedComponents(is_set.astype(np.uint8), connectivity=4)
    sides = np.concatenate([areas[0], areas[:, 0], areas[:, -1]])
    touched = np.bincount(sides, minlength=count) + 0.3 * np.bincount(areas[-1], minlength=count)  # as for RIM
    share = touched / np.sqrt(np.maximum(np.bincount(areas.ravel(), minlength=count), 1))
    weights = np.exp(-(share**2) / (2 * 0.6**2))
    weights[0] = 0  # the pixels that are not set
    return weights[areas]


# --------------------------------------------------------------------------------------------------------- from words


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


# --------------------------------------------------------------------------------------------------------------- sheet


def draw_cell(job: Job, photo: Image.Image) -> tuple[Image.Image, str]:
    """Return a small photo, dark and blue outside of its mask on disk, and what stands under it."""
    photo = photo.copy()
    photo.thumbnail((CELL_EDGE, CELL_EDGE))
    if not job.mask.exists():
        return photo, f"{job.name}: no mask"
    mask = decode_images.open_light(job.mask)  # as training does
    dark = Image.blend(photo, Image.new("RGB", photo.size, TINT), 0.75)
    return Image.composite(photo, dark, mask.resize(photo.size)), f"{job.name}: {share_of(mask):.0%}"


def share_of(mask: Image.Image) -> float:
    """Return the part of its picture that a mask of mode "L" covers, in [0, 1]."""
    return float(np.asarray(mask).mean()) / 255


def draw_sheet(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    """Return all cells on one sheet, about as wide as high if they are many."""
    pictures, labels = zip(*cells, strict=True)
    columns = max(COLUMNS, math.ceil(math.sqrt(len(cells))))
    return image_grid.make_grid(pictures, columns, labels, title="Dark and blue: outside of the mask, does not count")


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)
