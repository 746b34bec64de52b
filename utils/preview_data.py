"""Draw a sheet of what a training command gives the model: crops, flips, masks, captions, batch by batch.

    python -m utils.preview_data train_dreambooth_lora.py --pretrained_model_name_or_path MODEL \
        --instance_data_dir photos/ --instance_prompt "a photo of sks dog"

The flags are those of the training command; nothing is trained, and nothing but the sheet is written. Its title says
how many pictures there are; under each picture stand its file, its caption as the text encoder reads it, and how often
it was seen before.
"""

import argparse
import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from utils.core import atomic_files
from utils.core.errors import exit_status
from utils.data import prompt_cleaning
from utils.flags.command_line import convert_flag
from utils.flags.flag_checks import find_out_of_range
from utils.run import run_summary, scripts, tool_names
from utils.sampling import image_grid

TINT = (40, 0, 120)  # of what a mask hides
NARROWEST = 224  # pixels of a cell; the pictures of IF's stage I leave no room for words
LINES = 12  # of a caption; as many words as a text encoder takes, or nearly


def main(argv: list[str] | None = None) -> int:
    """Draw the sheet, say where it is, and return the exit status."""
    args = parse_args(argv)
    script = scripts.load_script(args.script)
    tool_names.check_names(script, "utils.preview_data")
    sheet = draw_sheet(script, script.parse_args(args.flags), args.count)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.save_png(sheet, args.output)
    print(args.output)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.preview_data", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("data-preview.png"), metavar="PNG", help="default: data-preview.png")
    add("--count", type=int, default=16, help="pictures, the first ones of the run; default: 16")
    add("script", type=to_script, help="path of the training script")
    add("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags, after its name")
    args = parser.parse_args(argv)
    if problems := find_out_of_range(vars(args), {"count": "1 or more"}):
        parser.error(" ".join(problems))
    return args


def draw_sheet(script: ModuleType, args: argparse.Namespace, count: int) -> Image.Image:
    """Return a sheet of the first pictures of a run, as its data set makes them.

    Args:
        script: The module of a training script.
        args: Its flags.
        count: Pictures; a batch is drawn whole.
    """
    accelerator = script.make_accelerator(args)
    base = script.detect_model(args)
    plan = script.make_plan(args, accelerator, base, script.list_examples(args, base))
    prompts = script.tokenize_prompts(args, plan, torch.device("cpu"))
    dataset = script.DreamBoothDataset(args, plan, prompts)
    begun = plan.first_step * args.gradient_accumulation_steps
    pictures, labels = [], []
    for draws in script.StepSampler(plan, dataset.order, range(begun, begun + count), rank=0):
        for draw in draws:
            picture, label = describe(dataset, prompts.texts, draw, base.is_if)
            pictures.append(widen(picture))
            labels.append(label)
        if len(pictures) >= count:
            break
    summary = run_summary.describe_pictures(vars(args), plan, dataset.order, None)
    words = "; ".join(f"{name}: {text}" for name, text in summary.items() if name in ("masks", "sizes"))
    photos = sum(not example.is_prior for example in plan.examples)
    title = f"{photos} photos, {len(plan.examples) - photos} class images, {base.resolution} px"
    title += "; in the order of the batches" + (f"; {words}" if words else "")
    return image_grid.make_grid(pictures, columns=4, labels=labels, title=title, lines=LINES)


def widen(picture: Image.Image) -> Image.Image:
    """Return a picture as it is, on white if it is narrower than the words under it need."""
    cell = Image.new("RGB", (max(picture.width, NARROWEST), picture.height), "white")
    cell.paste(picture, ((cell.width - picture.width) // 2, 0))
    return cell


def describe(dataset: Any, texts: list[str], draw: Any, cleans: bool) -> tuple[Image.Image, str]:
    """Return a picture as the model is given it, and what stands under it; grey for one that is yet to be drawn.

    What a mask hides from the loss is tinted.

    Args:
        texts: The distinct prompts of the run.
        cleans: Whether the model's text is cleaned first, as IF's is.
    """
    example = dataset.examples[draw.example]
    if example.is_missing:
        grey = Image.new("RGB", tuple(draw.size), "grey")
        return grey, f"{example.path.name}: to be drawn from {example.prompts[0]!r}"
    item = dataset[draw]
    pixels = ((item["pixel_values"] + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if example.mask:
        light = Image.fromarray((item["weight_map"][0] * 255).round().to(torch.uint8).numpy())
        hidden = Image.blend(picture, Image.new("RGB", picture.size, TINT), 0.75)
        picture = Image.composite(picture, hidden, light.resize(picture.size, Image.Resampling.NEAREST))
    caption = texts[item["prompt_rows"]]
    caption = prompt_cleaning.clean(caption) if cleans else caption
    seen = f", seen {draw.earlier_visits}x" if draw.earlier_visits else ""
    return picture, f"{example.path.name}, {draw.size} px{seen}: {caption or '(no caption)'}"


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)
