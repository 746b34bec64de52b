"""Train an adapter on five pictures drawn by code, offline, and show on one sheet what training changed.

    python -m utils.demo --output demo-output

The model is small and has random weights: the sheet shows that every part works, not a learned subject.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageDraw

from utils import images, previews, processes, sample
from utils.errors import InputError
from utils.make_model import SHAPES, make_model

ROOT = Path(__file__).parents[1]
SCRIPT = "train_dreambooth_lora.py"
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAYERS = "to_k,to_q,to_v,to_out.0,conv1,conv2,conv_in,conv_out,proj_in,proj_out"  # random ones have much to learn
THREADS = 1  # decides the last bits, and more are no faster on networks this small
PROMPT, SEED, COUNT = "a photo of sks teapot", 0, 5
SCENES = (  # of each photo: colour above, colour below, and the teapot's place, size and turn in degrees
    ((196, 224, 240), (226, 202, 150), (0.50, 0.58), 0.32, 0),
    ((58, 66, 92), (96, 72, 60), (0.44, 0.62), 0.27, -8),
    ((232, 214, 196), (150, 92, 60), (0.54, 0.56), 0.31, 6),
    ((120, 178, 132), (70, 128, 74), (0.40, 0.64), 0.22, 10),
    ((240, 240, 238), (206, 210, 214), (0.50, 0.56), 0.36, -4),
)
BODY, SHADE, LIGHT, ACCENT = (202, 58, 46), (150, 34, 34), (240, 146, 128), (246, 196, 84)


def main(argv: list[str] | None = None) -> int:
    """Make the model and the photos, train, put the sheet together, and return the exit status."""
    args = parse_args(argv)
    processes.silence_libraries()
    try:
        model, photos, result = prepare(args.output, args.shape)
        train(model, photos, result, args)
        images.save_png(compose(photos, result, args.steps), args.output / "before-after.png")
        findings = check(result, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"\n{findings}\n\n"
        f"Look at {args.output / 'before-after.png'}: the photos, and below them what the model drew before and after "
        "training\nfrom the same noise. Its weights were random, so what changed is no subject yet.\n\n"
        "Try next: draw with the adapter, then train on photos of your own from a real model, on a GPU.\n\n"
        f'  python -m utils.sample {result} --prompt "{PROMPT}" "a teapot" --seed 0 1 2 3\n\n'
        f"  accelerate launch {SCRIPT} \\\n"
        "    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16 \\\n"
        '    --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir my-dog-lora \\\n'
        "    --train_batch_size 1 --max_train_steps 500 --learning_rate 1e-4"
    )
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.demo", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where to; default: demo-output")
    add("--steps", type=int, default=300, help="training steps; default: 300")
    add("--size", type=int, default=128, help="height and width of the pictures in pixels; default: 128")
    add(
        "--shape",
        choices=[name for name, shape in SHAPES.items() if shape["family"] == "sd"],
        default="tiny",
        help="sizes of the networks; default: tiny",
    )
    args = parser.parse_args(argv)
    if args.steps < 1 or args.size < 1 or args.size % 8:
        parser.error(f"--steps {args.steps} must be 1 or more, and --size {args.size} a multiple of 8.")
    return args


def prepare(output: Path, shape: str) -> tuple[Path, Path, Path]:
    """Write the model, if it is missing, and the photos; return their folders and that of the result, which is empty.

    Raises:
        InputError: The result would replace something that is not of this demo.
    """
    model, photos, result = output / "cache" / shape, output / "photos", output / "lora"
    if result.exists() and not (output / "cache").is_dir():
        raise InputError(f"{output} holds a folder lora that this demo did not write. Use another --output.")
    shutil.rmtree(result, ignore_errors=True)
    if not (model / "model_index.json").is_file():
        make_model(model, shape)
    photos.mkdir(exist_ok=True)
    for number in range(COUNT):
        images.save_png(draw_photo(number), photos / f"teapot-{number}.png")
    # The scripts refuse to overwrite a result; this one is the demo's own.
    shutil.rmtree(output / "lora", ignore_errors=True)
    return model, photos, result


def train(model: Path, photos: Path, result: Path, args: argparse.Namespace) -> None:
    """Run the script as a person would.

    Raises:
        InputError: It failed; it has said why.
    """
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": photos,
        "instance_prompt": PROMPT,
        "output_dir": result,
        "resolution": args.size,
        "train_batch_size": 2,
        "max_train_steps": args.steps,
        "checkpointing_steps": args.steps + 1,  # the result is enough here
        "learning_rate": 1e-2,
        "rank": 16,
        "lora_layers": LAYERS,
        "seed": SEED,
        "validation_prompt": PROMPT,
        "num_validation_images": COUNT,
        "validation_steps": args.steps,
        "report_to": "none",
    }
    command = [sys.executable, *LAUNCH.split(), str(ROOT / SCRIPT), *(f"--{key}={flags[key]}" for key in flags)]
    if status := subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}).returncode:
        raise InputError(f"{SCRIPT} ended with exit status {status}; its own message is above.")


def check(result: Path, args: argparse.Namespace) -> str:
    """Say in two sentences how the loss went and whether the saved adapter draws what the live model drew."""
    lines = [json.loads(line) for line in (result / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses, tenth = [line["loss"] for line in lines], max(1, args.steps // 10)
    first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
    seeds, size = [SEED + number for number in range(COUNT)], (args.size, args.size)
    torch.set_num_threads(THREADS)
    redrawn = sample.draw(sample.load_pipeline(result), [PROMPT], seeds, size=size)
    live = [images.open_rgb(path) for path in preview_paths(result, args.steps)]
    extrema = [ImageChops.difference(*pair).getextrema() for pair in zip(redrawn, live)]
    difference = max(high for channels in extrema for _, high in channels)
    same = f"differing by up to {difference} of 255" if difference else "to the bit"
    return (
        f"The loss went from {first:.2f} to {last:.2f}, means of the first and the last tenth of the steps.\n"
        f"Loaded again from {result}, the adapter draws the pictures that were drawn while training, {same}."
    )


def preview_paths(result: Path, step: int) -> list[Path]:
    """Return the previews of a step."""
    return [result / "samples" / f"step-{step:06d}" / f"{number:02d}.png" for number in range(COUNT)]


def compose(photos: Path, result: Path, steps: int) -> Image.Image:
    """Put the photos and the previews before and after training on one sheet."""
    rows = {
        "photos": sorted(photos.glob("teapot-*.png")),
        "before training": preview_paths(result, 0),
        f"after {steps} steps": preview_paths(result, steps),
    }
    pictures = [images.open_rgb(path) for paths in rows.values() for path in paths]
    return previews.make_grid(
        [picture.resize((192, 192), Image.Resampling.LANCZOS) for picture in pictures],
        columns=COUNT,
        labels=[""] * COUNT + [f"seed {SEED + number}" for number in range(COUNT)] * 2,
        title="LoRA DreamBooth, from photos to previews. The base model has random weights: that the pictures change "
        "shows that training works. They show no teapot; for that it takes a real model.",
        row_labels=list(rows),
    )


def draw_photo(number: int, size: int = 256) -> Image.Image:
    """Draw a red teapot in one of the scenes."""
    above, below, (x, y), radius, turn = SCENES[number % len(SCENES)]
    large = 4 * size  # drawn large and shrunk, for smooth edges
    scene = Image.new("RGB", (large, large), above)
    draw = ImageDraw.Draw(scene)
    horizon = int(large * (y + radius * 0.5))
    draw.rectangle((0, horizon, large, large), below)
    shadow = tuple(int(channel * 0.72) for channel in below)
    foot = large * (y + radius * 0.72)
    draw.ellipse((large * (x - radius), foot - large * 0.05, large * (x + radius * 1.1), foot + large * 0.07), shadow)
    teapot = draw_teapot(int(large * radius * 2.6)).rotate(turn, Image.Resampling.BICUBIC)
    place = (int(large * x - teapot.width / 2), int(large * y - teapot.height / 2))
    scene.paste(teapot, place, teapot)
    return scene.resize((size, size), Image.Resampling.LANCZOS)


def draw_teapot(size: int) -> Image.Image:
    """Draw the subject, in a square of its own with a transparent ground."""
    picture = Image.new("RGBA", (1000, 1000))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 380, 360, 680), outline=SHADE, width=60)  # handle
    draw.polygon([(680, 620), (840, 500), (900, 360), (975, 360), (930, 550), (760, 720)], SHADE)  # spout
    draw.ellipse((200, 320, 800, 780), BODY)
    draw.rectangle((360, 735, 640, 790), SHADE)
    draw.ellipse((320, 280, 680, 400), ACCENT)  # lid
    draw.ellipse((455, 195, 545, 300), ACCENT)
    draw.ellipse((300, 410, 430, 560), LIGHT)
    points = [(40 if step % 2 else 90, math.pi * step / 5) for step in range(10)]
    draw.polygon([(590 + radius * math.sin(turn), 590 - radius * math.cos(turn)) for radius, turn in points], ACCENT)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
