"""Train a small model once plainly and once with each option that saves time or memory, and compare the losses.

    python -m utils.lab.compare_losses --output losses-output

All runs of a script share the seed, so pictures, noise and timesteps of a step are the same in each, and what differs
is the option alone. How much another seed changes is in the table as well. To add an option, add a line to `OPTIONS`.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.demo import CLASS, MODEL, SUBJECT, WORD
from utils.devices import launch
from utils.synthetic import shapes

ROOT = Path(__file__).parents[2]
SCRIPTS = {"full": "train_dreambooth.py", "LoRA": "train_dreambooth_lora.py"}
COMMON = (
    "--resolution=16 --train_batch_size=4 --snr_gamma=5 --lr_scheduler=cosine --lr_warmup_steps=0 --seed=0 "
    "--report_to=none --checkpointing_steps=100000"
)
FLAGS = {
    "full": "--learning_rate=2e-4",
    "LoRA": "--learning_rate=1e-3 --rank=16 --lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2",
}
PLAIN, SEED = "plain", "another seed"
OPTIONS = {  # of both scripts, then of one
    PLAIN: "",
    SEED: "--seed=1",
    "no caches": "--cache_latents=off --no-pre_compute_text_embeddings",
    "gradient checkpointing": "--gradient_checkpointing",
    "compiled": "--compile",
    "bf16 arithmetic": "--mixed_precision=bf16",
    "updates in the backward pass": "--fused_backward --max_grad_norm=0",
    "bf16 weights": "--weight_dtype=bf16 --mixed_precision=bf16",
    "8-bit AdamW": "--optimizer=adamw8bit",
    "Adafactor": "--optimizer=adafactor",
    "Prodigy": "--optimizer=prodigy --learning_rate=1 --lr_scheduler=constant",
}
OWN_OPTIONS = {
    "full": {"biases only": "--use_bitfit --learning_rate=3e-3"},
    "LoRA": {f"base in {name}": f"--base_model_precision={name}" for name in ("bf16", "int8", "nf4")},
}
WINDOW = 25  # steps that a point of the plot is the mean of
SIZE, MARGIN = (900, 420), 60  # of the plot, in pixels
COLOURS = (
    "#202124",
    "#9aa0a6",
    "#1a73e8",
    "#d93025",
    "#188038",
    "#f9ab00",
    "#9334e6",
    "#12b5cb",
    "#e8710a",
    "#c2185b",
)


def main(argv: list[str] | None = None) -> int:
    """Train, print a table for each script, draw its plot, and return 1 if a run failed."""
    args = parse_args(argv)
    shutil.rmtree(args.output / "runs", ignore_errors=True)
    shapes.write_photos(args.output / "photos", SUBJECT)
    failed = False
    for script in args.scripts:
        options = {
            name: flags for name, flags in (OPTIONS | OWN_OPTIONS[script]).items() if is_chosen(name, args.only)
        }
        losses = {}
        for name, flags in options.items():
            print(f"{script}, {name} …", file=sys.stderr, flush=True)
            try:
                losses[name] = train(script, name, flags, args)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
        if PLAIN in losses:
            print(f"\n{make_table(script, losses)}\n")
            atomic_files.save_png(
                draw_plot(f"{script}: loss, means of {WINDOW} steps", losses), args.output / f"{script}.png"
            )
            report = json.dumps({"script": script, "options": options, "losses": losses}, indent=1)
            (args.output / f"{script}.json").write_text(report + "\n", encoding="utf-8")
    return int(failed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_losses", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--scripts", nargs="+", choices=[*SCRIPTS], default=[*SCRIPTS], help="which scripts; default: both")
    add("--only", nargs="+", metavar="TEXT", default=[], help="options with one of these in their name; default: all")
    add("--steps", type=int, default=200, help="optimizer steps of each run; default: 200")
    add("--output", type=Path, default=Path("losses-output"), metavar="DIR", help="where to; default: losses-output")
    args = parser.parse_args(argv)
    if args.steps < 4:
        parser.error(f"--steps {args.steps} must be 4 or more: the last quarter is compared.")
    names = [*OPTIONS, *(name for options in OWN_OPTIONS.values() for name in options)]
    if args.only and not any(is_chosen(name, args.only) for name in names if name not in (PLAIN, SEED)):
        parser.error(f"--only {' '.join(args.only)} is in no name. There are: {'; '.join(names)}.")
    return args


def is_chosen(name: str, texts: list[str]) -> bool:
    """Say whether an option is to be tried: by a part of its name; the plain runs always are."""
    return not texts or name in (PLAIN, SEED) or any(text.lower() in name.lower() for text in texts)


def train(script: str, name: str, flags: str, args: argparse.Namespace) -> list[float]:
    """Train with an option and return the loss of each step.

    Raises:
        UserError: The run failed.
    """
    run = args.output / "runs" / f"{script}-{'-'.join(name.split())}"
    words = [
        f"--pretrained_model_name_or_path={MODEL}",
        f"--instance_data_dir={args.output / 'photos'}",
        f"--instance_prompt={shapes.phrase(CLASS, WORD)}",
        f"--output_dir={run}",
        f"--max_train_steps={args.steps}",
        *f"{COMMON} {FLAGS[script]} {flags}".split(),
    ]
    program, log = ROOT / SCRIPTS[script], run.with_suffix(".log")
    launch.run_script(f"{script}, {name}", program, words, log, OMP_NUM_THREADS="1")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def make_table(script: str, losses: dict[str, list[float]]) -> str:
    """Return how each option's losses compare with the plain run's, as a Markdown table."""
    plain = losses[PLAIN]
    rows = [f"| {script} | last quarter's loss | of the plain run's | apart, step by step |", "|---|---:|---:|---:|"]
    for name, values in losses.items():
        quarter = len(plain) // 4
        end, reference = statistics.fmean(values[-quarter:]), statistics.fmean(plain[-quarter:])
        gaps = [abs(one - other) for one, other in zip(values, plain, strict=True)]
        apart = statistics.fmean(gaps) / statistics.fmean(plain)
        rows.append(f"| {name} | {end:.4f} | {end / reference:.1%} | {apart:.2%} |")
    return "\n".join(rows)


def draw_plot(title: str, losses: dict[str, list[float]]) -> Image.Image:
    """Draw the losses over the steps, smoothed, each with its name at the right."""
    smooth = {name: smoothed(values) for name, values in losses.items()}
    top = max(max(values) for values in smooth.values())
    low = min(min(values) for values in smooth.values())
    sheet = Image.new("RGB", (SIZE[0] + 260, SIZE[1] + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN / 3), title, COLOURS[0], ImageFont.load_default(18))
    for number in range(5):
        value = low + (top - low) * number / 4
        y = MARGIN + SIZE[1] * (top - value) / (top - low or 1)
        draw.line((MARGIN, y, SIZE[0], y), "#dadce0")
        draw.text((MARGIN - 8, y), f"{value:.3f}", COLOURS[1], font, anchor="rm")
    for number, (name, values) in enumerate(smooth.items()):
        colour, across = COLOURS[number % len(COLOURS)], (SIZE[0] - MARGIN) / max(1, len(values) - 1)
        points = [
            (MARGIN + across * index, MARGIN + SIZE[1] * (top - value) / (top - low or 1))
            for index, value in enumerate(values)
        ]
        draw.line(points, colour, 2)
        draw.line((SIZE[0] + 16, MARGIN + 22 * number + 8, SIZE[0] + 40, MARGIN + 22 * number + 8), colour, 3)
        draw.text((SIZE[0] + 48, MARGIN + 22 * number), name, COLOURS[0], font)
    draw.text((SIZE[0] / 2, MARGIN * 1.3 + SIZE[1]), f"steps {WINDOW} to {len(losses[PLAIN])}", COLOURS[1], font)
    return sheet


def smoothed(values: list[float]) -> list[float]:
    """Return the means of windows that move by one step."""
    window = min(WINDOW, len(values))
    return [statistics.fmean(values[end - window : end]) for end in range(window, len(values) + 1)]


if __name__ == "__main__":
    sys.exit(main())
