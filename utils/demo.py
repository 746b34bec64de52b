"""Teach a small model a subject from five pictures, offline, and show on one sheet what it learned.

    python -m utils.demo --output demo-output

The model is models/shapes-sd, a Stable Diffusion for a world of shapes (`utils.synthetic.shapes`). The subject is a
circle of four colours that it has never seen. The LoRA script trains it, as it would for a dog and a real model.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.data import decode_images
from utils.devices import accelerator_setup, launch
from utils.evaluation import exam, shape_reader
from utils.flags.command_line import convert_flag
from utils.run import scripts
from utils.run.scripts import FULL, LORA, SCRIPTS
from utils.sampling import cascade, image_grid, results
from utils.sampling.results import SAVED
from utils.synthetic import shapes
from utils.synthetic.shapes import SUBJECT, SUBJECTS, WORD

RESULTS = {FULL: "model", LORA: "lora"}  # the folder of the result, by what is trained
MODEL = shapes.MODELS / "shapes-sd"
CLASS = SUBJECTS[SUBJECT].shape
SEEDS = 2  # pictures of a prompt on the sheet
SEEN, UNSEEN = shapes.split_backgrounds(SUBJECT)
PROMPTS = (
    shapes.phrase(CLASS, WORD),
    shapes.phrase(CLASS, WORD, SEEN[0]),
    shapes.phrase(CLASS, WORD, UNSEEN[0]),
    shapes.phrase(CLASS, WORD, UNSEEN[-1], "small", "left"),
)
CLASS_PROMPT = shapes.phrase(CLASS)
FLAGS_OF = {
    FULL: "--adam_epsilon=1e-4 --max_train_steps=600",
    LORA: "--rank=16 --lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2 --max_train_steps=500",
}
FLAGS = (
    "--resolution=16 --train_batch_size=4 --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=0 "
    "--snr_gamma=5 --with_prior_preservation --num_class_images=96 --class_guidance_scale=1.5 --sample_batch_size=32 "
    "--seed=0 --checkpointing_steps=100000 --report_to=none"
)
CELL = 128  # pixels of a picture on the sheet


def main(argv: list[str] | None = None) -> int:
    """Write the photos, train, put the sheet together, and return the exit status."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    photos = args.output / "photos"
    try:
        result = args.output / RESULTS[scripts.method_of(args.script)]
        prepare(photos, result)
        train(args.script, photos, result, args.steps)
        torch.set_num_threads(1)
        before, after = (draw(model) for model in (MODEL, result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = args.output / "before-after.png"
    opened = [decode_images.open_rgb(photo) for photo in sorted(photos.glob("*.png"))]
    atomic_files.save_png(compose(opened, before, after), path)
    print(tell(path, result, before, after))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.demo", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where to; default: demo-output"
    )
    add = parser.add_argument
    add(
        "--script",
        type=to_script,
        default=SCRIPTS[LORA],
        metavar="PATH",
        help="to train with; default: the LoRA script",
    )
    parser.add_argument("--steps", type=int, help="training steps; default: as many as it takes")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} must be 1 or more.")
    return args


def prepare(photos: Path, result: Path) -> None:
    """Write the photos and remove the result of an earlier demo, which the script would not overwrite.

    Raises:
        UserError: The result would replace something that is not of this demo.
    """
    if result.exists() and not photos.is_dir():
        raise UserError(
            f"{result.parent} holds a folder {result.name} that this demo did not write. Use another --output."
        )
    shutil.rmtree(result, ignore_errors=True)
    shapes.write_photos(photos, SUBJECT)


def train(script: Path, photos: Path, result: Path, steps: int | None) -> None:
    """Run the script as a person would.

    Raises:
        UserError: It failed; it has said why.
    """
    flags = [
        f"--pretrained_model_name_or_path={MODEL}",
        f"--instance_data_dir={photos}",
        f"--instance_prompt={PROMPTS[0]}",
        f"--class_prompt={CLASS_PROMPT}",
        f"--output_dir={result}",
        *f"{FLAGS} {FLAGS_OF[scripts.method_of(script)]}".split(),
        *([f"--max_train_steps={steps}"] if steps else []),
    ]
    # On networks this small, one thread is quickest.
    launch.run_script(script.name, script, flags, OMP_NUM_THREADS="1")


def draw(model: Path) -> list[list[Image.Image]]:
    """Draw each prompt from the same seeds, the class prompt last; a list for each seed."""
    pipeline = results.load_pipeline(model, scheduler=SAVED)
    prompts = [*PROMPTS, CLASS_PROMPT]
    drawn = cascade.draw_batches(
        pipeline,
        [seed for seed in range(SEEDS) for _ in prompts],
        len(prompts),
        {"prompt": prompts * SEEDS},
        num_inference_steps=exam.STEPS,
        guidance_scale=exam.GUIDANCE,
    )
    return [drawn[start : start + len(prompts)] for start in range(0, len(drawn), len(prompts))]


def compose(photos: list[Image.Image], before: list[list[Image.Image]], after: list[list[Image.Image]]) -> Image.Image:
    """Put the photos and the models' pictures on one sheet, a prompt a column."""
    rows = {"photos": photos}
    rows |= {f"base model, seed {seed}": row for seed, row in enumerate(before)}
    rows |= {f"fine-tuned, seed {seed}": row for seed, row in enumerate(after)}
    prompts = [*PROMPTS, f"{CLASS_PROMPT} (its class)"]
    return image_grid.make_grid(
        [picture.resize((CELL, CELL), Image.Resampling.NEAREST) for row in rows.values() for picture in row],
        columns=len(prompts),
        labels=[""] * len(photos) + prompts * (2 * SEEDS),
        title=f"Five photos of a subject, called {WORD}, and what a small Stable Diffusion draws before and after "
        "training on them",
        row_labels=list(rows),
    )


def tell(path: Path, result: Path, before: list[list[Image.Image]], after: list[list[Image.Image]]) -> str:
    """Say what to look at, what was counted, and what to try next."""
    earlier = count_subjects(row[:-1] for row in before)
    named, leaked = count_subjects(row[:-1] for row in after), count_subjects(row[-1:] for row in after)
    return (
        f"\nLook at {path}: the subject is in {named} of {len(PROMPTS) * SEEDS} pictures that name {WORD} (before "
        f"training in {earlier}),\non backgrounds that no photo has as well, and in {leaked} of {SEEDS} of "
        f"{CLASS_PROMPT!r}, which should still be any {CLASS}.\n\n"
        "Try next: other prompts, the whole measurement, and a model and photos of your own, on a GPU.\n\n"
        f"  python -m utils.sample {result} --scheduler saved --guidance_scale 3 --seed 0 1 2 3 \\\n"
        f'    --prompt "{PROMPTS[3]}"\n'
        f'  python -m utils.evaluate {result} --subject "{SUBJECT}"\n\n'
        f"  accelerate launch {SCRIPTS[LORA].name} \\\n"
        "    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16 \\\n"
        '    --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir my-dog-lora \\\n'
        "    --train_batch_size 1 --max_train_steps 500 --learning_rate 1e-4"
    )


def count_subjects(rows: Iterable[list[Image.Image]]) -> int:
    """Count the pictures in which the subject is."""
    return sum(shape_reader.match(picture, SUBJECT) >= shape_reader.PRESENT for row in rows for picture in row)


if __name__ == "__main__":
    sys.exit(main())
