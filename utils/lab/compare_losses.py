"""Train a small model once plainly and once with each option that saves time or memory, and compare the losses.

    python -m utils.lab.compare_losses --output losses-output

All runs of a script share the seed, so pictures, noise and timesteps of a step are the same in each, and what differs
is the option alone. How much another seed changes is in the table as well. To add an option, add a line to `OPTIONS`.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
from pathlib import Path

from utils.core import atomic_files, markdown
from utils.core.errors import UserError
from utils.devices import launch
from utils.flags.command_line import convert_flag
from utils.lab import plots
from utils.run import scripts
from utils.run.scripts import FULL, LORA, SCRIPTS
from utils.synthetic import shapes
from utils.synthetic.shapes import SUBJECT, SUBJECTS, WORD

MODEL, CLASS = shapes.MODELS / "shapes-sd", SUBJECTS[SUBJECT].shape
COMMON = (
    "--resolution=16 --train_batch_size=4 --snr_gamma=5 --lr_scheduler=cosine --lr_warmup_steps=0 --seed=0 "
    "--report_to=none --checkpointing_steps=100000"
)
FLAGS = {
    FULL: "--learning_rate=2e-4",
    LORA: "--learning_rate=1e-3 --rank=16 --lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2",
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
    FULL: {"biases only": "--use_bitfit --learning_rate=3e-3"},
    LORA: {f"base in {name}": f"--base_model_precision={name}" for name in ("bf16", "int8", "nf4")},
}


def main(argv: list[str] | None = None) -> int:
    """Train, print a table for each script, draw its plot, and return 1 if a run failed."""
    args = parse_args(argv)
    shutil.rmtree(args.output / "runs", ignore_errors=True)
    shapes.write_photos(args.output / "photos", SUBJECT)
    failed = False
    for script in args.scripts:
        label, known = scripts.label_of(script), OPTIONS | OWN_OPTIONS[scripts.method_of(script)]
        options = {name: flags for name, flags in known.items() if is_chosen(name, args.only)}
        losses = {}
        for name, flags in options.items():
            print(f"{label}, {name} …", file=sys.stderr, flush=True)
            try:
                losses[name] = train(script, name, flags, args)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
        if PLAIN in losses:
            print(f"\n{make_table(label, losses)}\n")
            plot = plots.draw_lines(f"{label}: loss, means of {plots.WINDOW} steps", losses)
            atomic_files.save_png(plot, args.output / f"{label}.png")
            report = json.dumps({"script": label, "options": options, "losses": losses}, indent=1)
            (args.output / f"{label}.json").write_text(report + "\n", encoding="utf-8")
    return int(failed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_losses", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    both = [*SCRIPTS.values()]
    add(
        "--scripts",
        nargs="+",
        type=to_script,
        default=both,
        metavar="SCRIPT",
        help="full, lora or paths; default: both",
    )
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


def train(script: Path, name: str, flags: str, args: argparse.Namespace) -> list[float]:
    """Train with an option and return the loss of each step.

    Raises:
        UserError: The run failed.
    """
    run = args.output / "runs" / f"{scripts.label_of(script)}-{'-'.join(name.split())}"
    words = [
        f"--pretrained_model_name_or_path={MODEL}",
        f"--instance_data_dir={args.output / 'photos'}",
        f"--instance_prompt={shapes.phrase(CLASS, WORD)}",
        f"--output_dir={run}",
        f"--max_train_steps={args.steps}",
        *f"{COMMON} {FLAGS[scripts.method_of(script)]} {flags}".split(),
    ]
    log = run.with_suffix(".log")
    launch.run_script(f"{scripts.label_of(script)}, {name}", script, words, log, OMP_NUM_THREADS="1")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def make_table(label: str, losses: dict[str, list[float]]) -> str:
    """Return how each option's losses compare with the plain run's, as a Markdown table."""
    plain, rows = losses[PLAIN], []
    quarter = len(plain) // 4
    for name, values in losses.items():
        end, reference = statistics.fmean(values[-quarter:]), statistics.fmean(plain[-quarter:])
        apart = statistics.fmean(
            abs(one - other) for one, other in zip(values, plain, strict=True)
        ) / statistics.fmean(plain)
        rows.append((name, f"{end:.4f}", f"{end / reference:.1%}", f"{apart:.2%}"))
    heads = (label, "loss of the last quarter", "of the plain run's", "difference, step by step")
    return markdown.make_table(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
