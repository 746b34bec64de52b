"""Train an adapter on five pictures drawn by code, offline, and show on one sheet what training changed.

    python -m utils.demo --output demo-output

The model is small and has random weights: the sheet shows that every part works, not a learned subject.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from utils import images, previews
from utils.errors import InputError
from utils.make_model import SHAPES, make_model

ROOT = Path(__file__).parents[1]
SCRIPT = "train_dreambooth_lora.py"
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
PROMPT, SEED, COUNT, SAMPLING_STEPS = "a photo of sks teapot", 0, 5, 25
SCENES = (  # of each photo: colour above, colour below, and the teapot's place, size and turn in degrees
    ((196, 224, 240), (226, 202, 150), (0.50, 0.60), 0.34, 0),
    ((58, 66, 92), (96, 72, 60), (0.46, 0.62), 0.30, -8),
    ((232, 214, 196), (150, 92, 60), (0.56, 0.58), 0.36, 6),
    ((120, 178, 132), (70, 128, 74), (0.48, 0.64), 0.28, 10),
    ((240, 240, 238), (206, 210, 214), (0.52, 0.60), 0.38, -4),
)
BODY, SHADE, LIGHT, ACCENT = (202, 58, 46), (150, 34, 34), (240, 146, 128), (246, 196, 84)


def main(argv: list[str] | None = None) -> int:
    """Make the model and the photos, train, put the sheet together, and return the exit status."""
    args = parse_args(argv)
    try:
        model, photos, result = prepare(args.output, args.shape)
        train(model, photos, result, args)
        sheet = compose(photos, result, args.steps)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = args.output / "before-after.png"
    images.save_png(sheet, path)
    print(
        f"\nLook at {path}: the photos, and what the model drew before and after training, from the same noise.\n"
        "Its weights were random, so the pictures changed and show nothing. With a real model and your own photos:\n\n"
        f"  accelerate launch {SCRIPT} --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\\n"
        '    --instance_data_dir photos --instance_prompt "a photo of sks dog" --train_batch_size 1 \\\n'
        "    --max_train_steps 500 --learning_rate 1e-4 --mixed_precision fp16 --output_dir my-dog-lora\n\n"
        f'To draw with the adapter of this demo: python -m utils.sample {result} --prompt "{PROMPT}" --seed 0 1 2 3'
    )
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.demo", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where to; default: demo-output")
    add("--steps", type=int, default=100, help="training steps; default: 100")
    add("--size", type=int, default=128, help="height and width of the pictures in pixels; default: 128")
    add("--shape", choices=SHAPES, default="tiny", help="sizes of the networks; default: tiny")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.size < 1 or args.size % 8:
        parser.error(f"--steps {args.steps} must be 1 or more, and --size {args.size} a multiple of 8.")
    return args


def prepare(output: Path, shape: str) -> tuple[Path, Path, Path]:
    """Write the model and the photos that are missing, and return their folders and that of the result."""
    model, photos = output / "cache" / shape, output / "photos"
    if not (model / "model_index.json").is_file():
        make_model(model, shape)
    photos.mkdir(exist_ok=True)
    for number in range(COUNT):
        images.save_png(draw_photo(number), photos / f"teapot-{number}.png")
    return model, photos, output / "lora"


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
        "seed": SEED,
        "validation_prompt": PROMPT,
        "num_validation_images": COUNT,
        "validation_steps": args.steps,
        "validation_num_inference_steps": SAMPLING_STEPS,
        "report_to": "none",
    }
    command = [sys.executable, *LAUNCH.split(), str(ROOT / SCRIPT), *(f"--{key}={flags[key]}" for key in flags)]
    if status := subprocess.run(command).returncode:
        raise InputError(f"{SCRIPT} ended with exit status {status}; its own message is above.")


def compose(photos: Path, result: Path, steps: int) -> Image.Image:
    """Put the photos and the previews before and after training on one sheet."""
    rows = {
        "photos": photos,
        "before training": result / "samples" / "step-000000",
        f"after {steps} steps": result / "samples" / f"step-{steps:06d}",
    }
    pictures = [images.open_rgb(path) for folder in rows.values() for path in sorted(folder.glob("*[0-9].png"))]
    return previews.make_grid(
        [picture.resize((192, 192), Image.Resampling.LANCZOS) for picture in pictures],
        columns=COUNT,
        labels=[""] * COUNT + [f"seed {SEED + number}" for number in range(COUNT)] * 2,
        title=f'A LoRA trained on five pictures of "{PROMPT}". The base model has random weights: this shows that the '
        "parts work together, not a subject that was learned.",
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
    picture = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(picture)
    unit = size / 100
    scale = lambda *numbers: tuple(number * unit for number in numbers)
    draw.ellipse(scale(2, 38, 36, 68), outline=SHADE, width=int(6 * unit))  # handle
    spout = [(70, 62), (84, 50), (90, 36), (97, 36), (93, 54), (76, 72)]
    draw.polygon([scale(*point) for point in spout], fill=SHADE)
    draw.ellipse(scale(20, 32, 80, 78), fill=BODY)
    draw.rectangle(scale(36, 74, 64, 79), fill=SHADE)
    draw.ellipse(scale(32, 28, 68, 40), fill=ACCENT)  # lid
    draw.ellipse(scale(46, 20, 54, 30), fill=ACCENT)
    draw.ellipse(scale(30, 40, 44, 56), fill=LIGHT)
    angles = [math.pi * step / 5 for step in range(10)]
    star = [
        (58 + (9 if step % 2 else 4) * math.sin(a), 58 + (9 if step % 2 else 4) * math.cos(a))
        for step, a in enumerate(angles)
    ]
    draw.polygon([scale(*point) for point in star], fill=ACCENT)
    return picture


if __name__ == "__main__":
    sys.exit(main())
