"""Draw a mask for every photo of a folder, white where the subject is, and a sheet that shows them all.

    python -m utils.make_masks photos/ masks/ --rembg isnet-general-use

The mask of photos/a/x.jpg is masks/a/x.png, of the same size, upright. Masks that are there are kept, so one that was
mended by hand stays. Look at the sheet, masks-sheet.png, before you train.

Three ways find the subject:

- --rembg MODEL: a network that cuts out the main subject. It is the best way (pip install "rembg[cpu]").
- --model FOLDER --prompt TEXT: a CLIPSeg, which finds what the text says.
- neither: GrabCut, which needs no network. It guesses from colours, and is often wrong where what lies around the
  subject has several colours.
"""

import argparse
import functools
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from utils.core import atomic_files
from utils.core.errors import UserError, exit_status, explain_write_errors
from utils.data import decode_images, grabcut, list_images, make_mask
from utils.devices.accelerator_setup import silence_libraries
from utils.flags.flag_checks import find_out_of_range, messages_if
from utils.models import segmentation
from utils.sampling import image_grid

LITTLE, MUCH = 0.05, 0.8  # beyond these it may be a part of the subject, or hold more than that

CELL_EDGE, COLUMNS = 288, 5  # of the sheet
TINT = (0, 0, 70)


class Job(NamedTuple):
    """A photo and its mask."""

    name: str  # the photo's path below its folder
    photo: Path
    mask: Path
    is_there: bool  # the mask, before anything is drawn


def main(argv: list[str] | None = None) -> int:
    """Draw the masks and the sheet, say where they are, and return the exit status."""
    args = parse_args(argv)
    if make_mask.cv2 is None:
        raise ImportError("Masks are drawn with OpenCV, which is not installed: pip install opencv-python-headless")
    check_folders(args.photos, args.masks, args.sheet)
    jobs = list_jobs(args.photos, args.masks, args.overwrite)
    find = choose_finder(args)
    written, kept, unfound, cells = [], [], [], []
    for job in tqdm(jobs, desc="masks", disable=None):
        photo = decode_images.open_rgb(job.photo)
        if job.is_there and not args.overwrite:
            kept.append(job)
        elif mask := make_mask.draw_mask(photo, find, args.padding, args.feather):
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
    add(
        "--rembg",
        metavar="MODEL",
        help=f"network of rembg that finds the subject, such as {segmentation.KNOWN_MATTING}",
    )
    add("--model", metavar="PATH", help=f"folder of a CLIPSeg model, such as a copy of {segmentation.KNOWN_MODEL}")
    add("--prompt", help='what --model looks for, such as "a dog"')
    threshold = "how sure --model must be of a pixel, from 0 to below 1; lower covers more; default: 0.4"
    add("--threshold", type=float, default=0.4, help=threshold)
    add("--sheet", type=Path, metavar="PNG", help="picture of all photos and masks; default: OUT-sheet.png beside OUT")
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), dict.fromkeys(("padding", "feather", "threshold"), "in [0, 1)"))
    problems += messages_if(
        (args.model and not (args.prompt or "").strip(), "--model needs --prompt, the words for what it looks for."),
        (args.rembg and args.model, "--rembg and --model are two ways to find the subject: give one of them."),
        (args.prompt and not args.model, "--prompt needs --model, the network that reads it."),
    )
    if problems:
        parser.error(" ".join(problems))
    if args.sheet is None:
        named = args.masks if args.masks.name not in ("", "..") else args.masks.resolve()
        args.sheet = named.with_name(f"{named.name}-sheet.png")
    return args


def choose_finder(args: argparse.Namespace) -> make_mask.Finder:
    """Return what finds the subject of a photo, loaded."""
    silence_libraries()
    if args.rembg:
        return functools.partial(segmentation.find_main_subject, segmentation.open_rembg(args.rembg))
    if args.model:
        segmenter = segmentation.load_segmenter(args.model, args.prompt)
        return functools.partial(segmentation.find_words, segmenter, args.threshold)
    return grabcut.find_subject


def report_doubtful(jobs: list[Job]) -> None:
    """Print which masks cover so little, so much, or so much else than the others that they are probably wrong."""
    shares = {job.name: share_of(decode_images.open_light(job.mask)) for job in jobs if job.mask.exists()}
    usual = statistics.median(shares.values()) if len(shares) > 2 else None  # of two, nobody knows which is wrong
    doubtful = {name: share for name, share in shares.items() if is_doubtful(share, usual)}
    if not doubtful:
        return
    than_others = f", or less than half or more than twice as much as the median of {usual:.1%}" if usual else ""
    print(f"Look at these first, whose masks cover less than {LITTLE:.0%} or more than {MUCH:.0%}{than_others}:")
    for name, share in doubtful.items():
        print(f"  {name} ({share:.1%})")


def is_doubtful(share: float, usual: float | None) -> bool:
    """Tell whether a mask's share of its photo is far from all sense, or from that of the other masks."""
    return not LITTLE <= share <= MUCH or (usual is not None and not usual / 2 <= share <= 2 * usual)


def report_unfound(unfound: list[Job], count: int) -> None:
    """Print for which of so many photos no mask was written, and what that means."""
    if unfound:
        print(f"No subject was found in {len(unfound)} of {count} photos, and no mask was written for:")
        for job in unfound:
            print(f"  {job.name}" + (" (its earlier mask stays)" if job.is_there else ""))
        print(
            "All pixels of a photo without a mask count in the loss. "
            "Paint a mask by hand, or use --rembg, or --model and --prompt."
        )


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
