"""Measure speed and memory of both scripts in several configurations, on this machine and a model with random weights.

    python -m utils.lab.benchmark --shape small --steps 6 --output bench-output

Every configuration is run three times, each time in a new process: as it is, for seconds, memory and samples a second;
with --dry_run, for the memory that it foretells; and by `utils/lab/step_timing.py`, which waits for the device around
each part of a step. The first steps do not count: kernels are chosen and memory is taken there. Model-FLOP utilisation
is the operations of a step over its seconds, and over the highest speed of matrix products measured here, in the same
precision.

    python -m utils.lab.benchmark --against DIR --shape small

compares with two scripts of the same names and flags in another folder, such as those of diffusers' examples: both
sides do the same work in turn, and are measured from outside in the same way.

To add a configuration, add a line to `CONFIGURATIONS`.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.devices import accelerator_setup, launch
from utils.flags.precision import has_accelerator
from utils.lab.step_timing import PARTS
from utils.make_model import SHAPES, make_model
from utils.synthetic import shapes

ROOT = Path(__file__).parents[2]
TIMING = ROOT / "utils" / "lab" / "step_timing.py"
SCRIPTS = {"full": "train_dreambooth.py", "LoRA": "train_dreambooth_lora.py"}
PHOTOS = 8
COMMON = "--train_batch_size=1 --cache_latents=off --report_to=none --seed=0"
PRIOR = f"--with_prior_preservation --class_prompt=teapot --num_class_images={PHOTOS}"
CACHED = "--center_crop --cache_latents=on"
BEST = "--mixed_precision=bf16 --compile"
CONFIGURATIONS = {  # what the table calls it: script, flags
    "full, batch 1": ("full", ""),
    "full, batch 4": ("full", "--train_batch_size=4"),
    "full, cached latents": ("full", CACHED),
    "full, bf16": ("full", "--mixed_precision=bf16"),
    "full, compiled": ("full", "--compile"),
    "full, 8-bit Adam": ("full", "--optimizer=adamw8bit"),
    "full, Adafactor": ("full", "--optimizer=adafactor"),
    "full, fused backward": ("full", "--fused_backward --max_grad_norm=0"),
    "full, bf16 weights": ("full", "--mixed_precision=bf16 --weight_dtype=bf16"),
    "full, BitFit": ("full", "--use_bitfit"),
    "full, gradient checkpointing": ("full", "--gradient_checkpointing"),
    "full, text encoder": ("full", "--train_text_encoder"),
    "full, batch 4, all for speed": ("full", f"--train_batch_size=4 {CACHED} {BEST}"),
    "LoRA, batch 1": ("LoRA", ""),
    "LoRA, batch 4": ("LoRA", "--train_batch_size=4"),
    "LoRA, cached latents": ("LoRA", CACHED),
    "LoRA, bf16": ("LoRA", "--mixed_precision=bf16"),
    "LoRA, compiled": ("LoRA", "--compile"),
    "LoRA, base in bf16": ("LoRA", "--base_model_precision=bf16"),
    "LoRA, base in int8": ("LoRA", "--base_model_precision=int8"),
    "LoRA, base in nf4": ("LoRA", "--base_model_precision=nf4"),
    "LoRA, gradient checkpointing": ("LoRA", "--gradient_checkpointing"),
    "LoRA, prior, precomputed text": ("LoRA", f"{PRIOR} --pre_compute_text_embeddings"),
    "LoRA, batch 4, all for speed": ("LoRA", f"--train_batch_size=4 {CACHED} {BEST}"),
}
NOT_FOR_IF = ("--train_text_encoder", "--cache_latents=on")
# They change how a step is computed, not what: its operations are counted without them, so that what gradient
# checkpointing computes again does not count as useful work.
SAME_WORK = (
    *("--mixed_precision", "--compile", "--optimizer", "--fused_backward", "--weight_dtype"),
    *("--base_model_precision", "--gradient_checkpointing", "--max_grad_norm"),
)
COMPARED = {  # work that is done by another project's scripts as well
    "full, batch 1": ("full", "--train_batch_size=1"),
    "full, batch 4": ("full", "--train_batch_size=4"),
    "LoRA, batch 1": ("LoRA", "--train_batch_size=1"),
}
THEIRS, OURS, OURS_AGAIN, OURS_BEST = "theirs", "ours", "ours, once more", "ours, best flags"
# Both sides cut the middle out of each photo, and save nothing on the way; all else is each side's default.
COMPARED_FLAGS = "--center_crop --seed=0 --checkpointing_steps=1000000 --mixed_precision=no"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
WARM_UP = 2  # steps that do not count
STEPS, COMPARED_STEPS = 6, 20  # in the latter, each photo comes twice, so that our scripts cache its latents
LETTERS, ROW, HEAD, BAR, ROOM = 20, 36, 136, 560, 120  # of the plot, in pixels; ROOM is for the number behind a bar
INK, FAINT_INK, PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
# By Okabe and Ito: told apart by the colour-blind, too.
PART_COLOURS = dict(zip(PARTS, ("#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#BBBBBB"), strict=True))
WHOLE, SPEED = "#7F8A99", "#D55E00"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table; None where the run failed."""

    name: str
    seconds: float | None = None  # median step
    samples_per_second: float | None = None  # pictures, class images among them
    memory_gb: float | None = None  # peak of the GPU's memory, or on a CPU of the process's, in 10^9 bytes
    start_seconds: float | None = None  # from the start of the process to that of the first step
    parts: dict[str, float] | None = None  # mean seconds of `PARTS` in the run that stops around them
    precision: str = "fp32"  # of arithmetic
    flops: float | None = None  # operations of a step
    utilisation: float | None = None  # of the device's measured peak, in [0, 1]
    told_gb: float | None = None  # the memory that --dry_run foretells
    problem: str | None = None  # why there is no measurement, or why there are no parts or operations

    @property
    def label(self) -> str:
        """What the plot calls it."""
        return self.name


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Medians of one side's runs of the same work; None where one failed."""

    work: str
    side: str
    seconds: float | None = None  # median step
    samples_per_second: float | None = None
    start_seconds: float | None = None  # from the start of the process to the end of the first step
    memory_gb: float | None = None
    runs: tuple[dict, ...] = ()  # each run's own numbers
    problem: str | None = None

    @property
    def label(self) -> str:
        """What the plot calls it."""
        return f"{self.work}: {self.side}"

    @property
    def parts(self) -> None:
        """What the steps of another project consist of is not known."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write it as JSON and draw it; return 1 if anything failed."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    try:
        folders = prepare(args.output, args.shape)
        measured, table, more = compare(args, folders) if args.against else survey(args, folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    machine = describe_machine(more["threads"])
    title = f"shape {args.shape}, {args.size} px, {args.steps} steps, on {machine['device']}"
    print(f"\n{title}\n\n{table}")
    if machine["kind"] == "cpu":
        print("\nMemory on a CPU is that of the whole process, its libraries included.")
    report = {"shape": args.shape, "size": args.size, "steps": args.steps, "warm_up": WARM_UP, **machine, **more}
    report["measurements"] = [dataclasses.asdict(one) for one in measured]
    path = args.output / ("against.json" if args.against else "benchmark.json")
    atomic_files.write_whole(path, json.dumps(report, indent=2) + "\n")
    atomic_files.save_png(draw_plot(title, measured), path.with_suffix(".png"))
    print(f"Wrote {path} and {path.with_suffix('.png')}")
    return int(any(one.problem for one in measured))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.benchmark", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] != "x4"]
    add("--shape", choices=known, default="small", help="sizes of the networks; default: small")
    add("--size", type=int, help="height and width in pixels; default: what the shape is made for")
    counts = f"default: {STEPS}, with --against {COMPARED_STEPS}"
    add("--steps", type=int, help=f"steps of each run, the first {WARM_UP} not counted; {counts}")
    add("--only", metavar="TEXT", default="", help="only the configurations with this in their name; default: all")
    add("--against", type=Path, metavar="DIR", help=f"another project's {' and '.join(SCRIPTS.values())}")
    # On CPUs without matrix units, bf16 is slower than float32, and compiling takes longer than it saves.
    best = BEST if has_accelerator() else ""
    add(
        "--best",
        default=best,
        metavar="FLAGS",
        help=f"of a third side, as --best='--compile'; default: {best or 'none'}",
    )
    add("--repeats", type=int, default=2, help="of --against: runs of each side, in turn; default: 2")
    add("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="where to; default: bench-output")
    args = parser.parse_args(argv)
    args.size, args.steps = args.size or size_of(args.shape), args.steps or (COMPARED_STEPS if args.against else STEPS)
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves none to count: it must be more than {WARM_UP}.")
    if not chosen(args):
        parser.error(f"--only {args.only!r} is in no name. There are: {'; '.join(offered(args))}.")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be 1 or more.")
    if args.against and is_if(args.shape):
        parser.error(f"--against compares shapes of Stable Diffusion, not {args.shape}.")
    missing = [SCRIPTS[script] for script, _ in chosen(args).values()] if args.against else []
    if missing := [name for name in dict.fromkeys(missing) if not (args.against / name).is_file()]:
        parser.error(f"--against {args.against} has no {' and no '.join(missing)}.")
    return args


def is_if(shape: str) -> bool:
    """Say whether a shape is one of DeepFloyd IF: it has neither latents nor a text encoder that trains."""
    return SHAPES[shape]["family"] != "sd"


def size_of(shape: str) -> int:
    """Return the height and width in pixels that a shape's networks are made for."""
    recipe = SHAPES[shape]
    return recipe["unet"]["sample_size"] * 2 ** (len(recipe["vae"]["widths"]) - 1 if "vae" in recipe else 0)


def offered(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return what could be measured, by name: script and flags."""
    excluded = NOT_FOR_IF if is_if(args.shape) else ()
    known = COMPARED if args.against else CONFIGURATIONS
    return {name: one for name, one in known.items() if not any(flag in one[1].split() for flag in excluded)}


def chosen(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return those whose name holds the text of --only, in any case."""
    return {name: one for name, one in offered(args).items() if args.only.lower() in name.lower()}


def prepare(output: Path, shape: str) -> dict[str, Path]:
    """Write the model, if it is missing, photos and class images; return their folders and that of the runs."""
    folders = {name: output / name for name in ("photos", "class-images", "runs")}
    folders["model"] = output / "cache" / shape
    if not (folders["model"] / "model_index.json").is_file():
        make_model(folders["model"], shape)
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    subject, pictures = next(iter(shapes.SUBJECTS)), np.random.default_rng(0)
    for number, picture in enumerate(shapes.draw_photos(subject, PHOTOS, 512, pictures, list(shapes.COLOURS))):
        atomic_files.save_png(picture, folders["photos"] / f"{number}.png")
        atomic_files.save_png(picture, folders["class-images"] / f"{number:05d}.png")
    return folders


# ---------------------------------------------------------------------------------------------------------------- runs


class Run:
    """A folder for one run of a script, a log beside it, and caches that only runs of the same name have filled."""

    def __init__(self, folders: dict[str, Path], name: str, has_caches: bool = False):
        """Remove what an earlier run of the name has left, unless it shall have the caches of that one."""
        self.output = folders["runs"] / "-".join(name.lower().replace(",", "").split())
        self.log, self.found = self.output.with_suffix(".log"), self.output.with_suffix(".found")
        self.caches = self.output.with_suffix(".caches")
        self.clean(keep_caches=has_caches)

    def clean(self, keep_caches: bool = False) -> None:
        """Remove all but the log, and perhaps the caches."""
        for folder in [self.output] if keep_caches else [self.output, self.caches]:
            shutil.rmtree(folder, ignore_errors=True)
        self.found.unlink(missing_ok=True)

    def start(self, script: Path, flags: list[str], mode: str | None = None) -> subprocess.Popen:
        """Start a script, in a mode of `step_timing.py` or as it is."""
        self.found.unlink(missing_ok=True)
        program, words = (TIMING, [mode, str(self.found), str(script), *flags]) if mode else (script, flags)
        # What one run has compiled would let the next one start sooner.
        compiled = str(self.caches.absolute() / "compiled")
        return launch.start_script(program, words, self.log, TORCHINDUCTOR_CACHE_DIR=compiled)

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for the end; raise UserError if it is not a good one."""
        if status := process.wait():
            raise UserError(f"exit status {status}: {launch.find_reason(self.log)}")


def read_lines(path: Path) -> list[Any]:
    """Read the JSON of each line of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paths_of(folders: dict[str, Path], run: Run) -> list[str]:
    """Return the flags that name the files and the prompt, which any such script has."""
    return [
        f"--pretrained_model_name_or_path={folders['model']}",
        f"--instance_data_dir={folders['photos']}",
        f"--output_dir={run.output}",
        "--instance_prompt=sks teapot",
    ]


def knows(script: Path, flag: str) -> bool:
    """Say whether a script has a flag, as `--name` or `--name=value`, by its text."""
    return re.search(f"""["']{flag.partition("=")[0]}["']""", script.read_text(encoding="utf-8")) is not None


def find_unknown(script: Path, flags: list[str]) -> str | None:
    """Return a sentence about the flags that a script lacks; None if it has them all."""
    unknown = [flag.partition("=")[0] for flag in flags if not knows(script, flag)]
    return f"{script.name} has no {', '.join(unknown)}" if unknown else None


# -------------------------------------------------------------------------------------------------------------- survey


def survey(args: argparse.Namespace, folders: dict[str, Path]) -> tuple[list[Measurement], str, dict]:
    """Measure our scripts' configurations; return them, their table, and what else the report holds."""
    runs = chosen(args)
    device = measure_device(folders, {precision_of(flags) for _, flags in runs.values()})
    counted, measured = {}, []
    for name, (script, flags) in runs.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        measured.append(measure(name, script, flags.split(), folders, args))
        if measured[-1].parts:
            measured[-1] = utilise(measured[-1], script, flags.split(), folders, args, counted, device["peaks"])
        print(f"    {' | '.join(cells(measured[-1])[1:])}", file=sys.stderr, flush=True)
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {name}" for name, peak in sorted(device["peaks"].items()))
    notes = [
        f"MFU is of the peak measured by matrix products: {peaks}. TFLOP: forward and backward of a step, with the "
        "VAE and the text encoder if they run; what gradient checkpointing computes again is not counted.",
        "Parts are seconds of another run that waits for the device around them; other is noise, loss and logs. A "
        "fused backward pass updates weights within it: that is optimizer, and stops the device for each weight.",
    ]
    if "fp32" in device["peaks"] and has_accelerator():
        notes.append("In fp32, cuDNN's convolutions may use TF32, which is faster than the matrix products' fp32.")
    return measured, "\n\n".join([make_table(measured), *notes]), device


def measure_device(folders: dict[str, Path], precisions: set[str]) -> dict:
    """Return the device's peak in some precisions, and the number of threads, in a process like those of the runs."""
    run = Run(folders, "peak")
    launch.run_script("measuring the device", TIMING, ["peak", str(run.found), *sorted(precisions)], run.log)
    found = json.loads(run.found.read_text(encoding="utf-8"))
    run.clean()
    return found


def precision_of(flags: str) -> str:
    """Return in which precision a configuration multiplies matrices."""
    return "bf16" if "--mixed_precision=bf16" in flags.split() else "fp32"


def flags_of(args: argparse.Namespace, folders: dict[str, Path], run: Run, own: list[str]) -> list[str]:
    """Return the whole command line of a configuration."""
    caches = [f"--class_data_dir={folders['class-images']}", f"--cache_dir={run.caches / 'tensors'}"]
    length = [f"--resolution={args.size}", f"--max_train_steps={args.steps}"]
    return [*paths_of(folders, run), *caches, *length, *COMMON.split(), *own]


def measure(name: str, script: str, own: list[str], folders: dict[str, Path], args: argparse.Namespace) -> Measurement:
    """Run one configuration as it is, then in parts; what it writes is removed again, but for its log."""
    path, precision = ROOT / SCRIPTS[script], precision_of(" ".join(own))
    if unknown := find_unknown(path, own):
        return Measurement(name, problem=unknown)
    run = Run(folders, name)
    measurement = Measurement(name, precision=precision)
    try:
        measurement = time_run(measurement, run, path, flags_of(args, folders, run, own))
        shutil.rmtree(run.output)
        run.finish(run.start(path, [*flags_of(args, folders, run, own), "--dry_run"]))
        measurement = dataclasses.replace(measurement, told_gb=find_told(run.log))
        run.finish(run.start(path, flags_of(args, folders, run, own), "split"))
        steps = json.loads(run.found.read_text(encoding="utf-8"))[WARM_UP:]
        parts = {part: statistics.mean(step[part] for step in steps) for part in PARTS}
        return dataclasses.replace(measurement, parts=parts)
    except UserError as error:
        what = "its parts: " if measurement.seconds else ""
        return dataclasses.replace(measurement, problem=f"{what}{error}")
    finally:
        run.clean()


def time_run(measurement: Measurement, run: Run, script: Path, flags: list[str]) -> Measurement:
    """Run a configuration as it is.

    Raises:
        UserError: It failed.
    """
    began = time.perf_counter()
    process, metrics = run.start(script, flags), run.output / "metrics.jsonl"
    # The file is opened right before the first step.
    while process.poll() is None and not metrics.exists():
        time.sleep(0.02)
    start_seconds = time.perf_counter() - began
    run.finish(process)
    lines = read_lines(metrics)
    seconds, samples = (
        statistics.median(line[key] for line in lines[WARM_UP:]) for key in ("seconds", "samples_per_second")
    )
    memory = max(line["memory_gb"] for line in lines)
    return dataclasses.replace(
        measurement, seconds=seconds, samples_per_second=samples, memory_gb=memory, start_seconds=start_seconds
    )


def find_told(log: Path) -> float | None:
    """Return the peak of memory that a dry run foretold, in 10^9 bytes, or None if it knew none."""
    found = re.search(r"^ *peak memory \.* about ([\d.]+) GB", log.read_text(encoding="utf-8"), re.MULTILINE)
    return found and float(found[1])


def utilise(
    measurement: Measurement,
    script: str,
    own: list[str],
    folders: dict[str, Path],
    args: argparse.Namespace,
    counted: dict[tuple, float | str],
    peaks: dict[str, float],
) -> Measurement:
    """Add the operations of a step and what share of the peak that is.

    Args:
        counted: What was counted before, or why it was not, by the work; it is added to.
    """
    work = (script, *(flag for flag in own if flag.partition("=")[0] not in SAME_WORK))
    if work not in counted:
        counted[work] = count_flops(script, [*work[1:], "--max_train_steps=1"], folders, args)
    if isinstance(found := counted[work], str):
        return dataclasses.replace(measurement, problem=f"its operations: {found}")
    share = found / measurement.seconds / peaks[measurement.precision]
    return dataclasses.replace(measurement, flops=found, utilisation=share)


def count_flops(script: str, own: list[str], folders: dict[str, Path], args: argparse.Namespace) -> float | str:
    """Return the operations of one step in a process of its own, or why they could not be counted."""
    run = Run(folders, "operations")
    try:
        run.finish(run.start(ROOT / SCRIPTS[script], flags_of(args, folders, run, own), "flops"))
        return json.loads(run.found.read_text(encoding="utf-8"))
    except UserError as error:
        return str(error)
    finally:
        run.clean()


def make_table(measured: list[Measurement]) -> str:
    """Return the measurements as a Markdown table, and below it what is missing in its lines."""
    heads = (
        "configuration",
        "s a step",
        *PARTS,
        "samples/s",
        "memory GB",
        "foretold",
        "TFLOP",
        "MFU %",
        "s to first step",
    )
    missing = [f"{one.name}: {one.problem}" for one in measured if one.problem and one.seconds]
    return "\n\n".join([align(heads, [cells(measurement) for measurement in measured]), *missing])


def cells(measurement: Measurement) -> tuple[str, ...]:
    """Return a line of the table."""
    if measurement.seconds is None:
        return (measurement.name, f"failed: {measurement.problem}")
    parts = measurement.parts or dict.fromkeys(PARTS)
    return (
        measurement.name,
        f"{measurement.seconds:.3f}",
        *(number(seconds, ".3f") for seconds in parts.values()),
        f"{measurement.samples_per_second:.2f}",
        f"{measurement.memory_gb:.2f}",
        number(measurement.told_gb, ".2f"),
        number(measurement.flops and measurement.flops / 1e12, ".3g"),
        number(measurement.utilisation and 100 * measurement.utilisation, ".1f"),
        f"{measurement.start_seconds:.1f}",
    )


def number(value: float | None, digits: str) -> str:
    """Return a number as text, a dash if there is none."""
    return "–" if value is None else format(value, digits)


def align(heads: tuple[str, ...], rows: list[tuple[str, ...]], texts: int = 1) -> str:
    """Return a Markdown table with the columns aligned, the first ones as texts; a short row ends in a sentence."""
    whole = [row for row in (heads, *rows) if len(row) == len(heads)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(heads))]
    widths[:texts] = [max(len(row[column]) for row in (heads, *rows)) for column in range(texts)]
    marks = ["<"] * texts + [">"] * (len(heads) - texts)
    rule = ["-" * width if mark == "<" else "-" * (width - 1) + ":" for width, mark in zip(widths, marks, strict=True)]
    lines = [heads, rule, *rows]
    return "\n".join(
        f"| {' | '.join(f'{cell:{mark}{width}}' for cell, width, mark in zip(line, widths, marks, strict=True))} |"
        if len(line) == len(heads)
        else f"| {' | '.join(f'{line[column]:<{widths[column]}}' for column in range(texts))} | {line[-1]} |"
        for line in lines
    )


# ----------------------------------------------------------------------------------------------------- another project


def compare(args: argparse.Namespace, folders: dict[str, Path]) -> tuple[list[Comparison], str, dict]:
    """Measure another project's scripts and ours; return medians, their table, and what else the report holds."""
    measured = [one for work in chosen(args) for one in compare_work(work, args, folders)]
    threads = next((run["threads"] for one in measured for run in one.runs), None)
    note = (
        f"Medians of {args.repeats} runs of each side in turn. Right of each number: by how much it is that of "
        f"theirs. {OURS_AGAIN.capitalize()}: with the embeddings and latents that the run before has cached."
    )
    told = {"threads": threads, "against": str(args.against), "repeats": args.repeats}
    return measured, f"{make_comparison(measured)}\n\n{note}", told


def compare_work(work: str, args: argparse.Namespace, folders: dict[str, Path]) -> list[Comparison]:
    """Let all sides do the same work in turn, so that what changes on the machine meanwhile changes all of them."""
    script, flags = COMPARED[work]
    ours, theirs = ROOT / SCRIPTS[script], args.against / SCRIPTS[script]
    needed = [flags, f"--resolution={args.size}", f"--max_train_steps={args.steps}"]
    common = needed + [flag for flag in COMPARED_FLAGS.split() if knows(ours, flag) and knows(theirs, flag)]
    sides = {THEIRS: (theirs, common), OURS: (ours, common), OURS_AGAIN: (ours, common)}
    if args.best:
        sides[OURS_BEST] = (ours, [*common, *args.best.split()])
    runs, problems = {side: [] for side in sides}, {side: find_unknown(*one) for side, one in sides.items()}
    for turn, side in itertools.product(range(args.repeats), sides):
        if problems[side]:
            continue
        print(f"{work}, {side}, run {turn + 1} …", file=sys.stderr, flush=True)
        run = Run(folders, f"{work} {OURS if side == OURS_AGAIN else side}", has_caches=side == OURS_AGAIN)
        try:
            runs[side].append(time_from_outside(run, *sides[side], folders, args.steps, keep_caches=side == OURS))
        except UserError as error:
            problems[side] = str(error)
    batch = int(flags.partition("=")[2])
    return [summarise(Comparison(work, side), batch, runs[side], problems[side]) for side in sides]


def time_from_outside(
    run: Run, script: Path, own: list[str], folders: dict[str, Path], steps: int, keep_caches: bool = False
) -> dict:
    """Run a script of either side; return its numbers.

    Raises:
        UserError: It failed, or took other steps than it was told.
    """
    caches = [f"--cache_dir={run.caches / 'tensors'}"] if knows(script, "--cache_dir") else []
    try:
        began = time.time()
        run.finish(run.start(script, [*paths_of(folders, run), *caches, *own], "stamps"))
        first, *stamps = read_lines(run.found)
    finally:
        run.clean(keep_caches)
    # An optimizer that is called for each weight, as in a fused backward pass, leaves so many stamps in each step.
    calls, rest = divmod(len(stamps), steps)
    if calls == 0 or rest:
        raise UserError(f"{script.name} took {len(stamps)} steps instead of {steps}")
    stamps = stamps[calls - 1 :: calls]
    times = [one["at"] for one in stamps]
    return {
        "seconds": statistics.median(after - before for before, after in itertools.pairwise(times[WARM_UP - 1 :])),
        "start_seconds": times[0] - began,
        "memory_gb": stamps[-1]["memory_gb"],
        "threads": first["threads"],
    }


def summarise(comparison: Comparison, batch: int, runs: list[dict], problem: str | None) -> Comparison:
    """Return the medians of a side's runs."""
    if problem:
        return dataclasses.replace(comparison, runs=tuple(runs), problem=problem)
    names = ("seconds", "start_seconds", "memory_gb")
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    speed = batch / medians["seconds"]
    return dataclasses.replace(comparison, **medians, samples_per_second=speed, runs=tuple(runs))


def make_comparison(measured: list[Comparison]) -> str:
    """Return the medians as a Markdown table, each beside its ratio to the other project's."""
    heads = ("work", "scripts", "samples/s", "×", "s to end of first step", "×", "memory GB", "×")
    theirs = {one.work: one for one in measured if one.side == THEIRS}
    return align(heads, [comparison_cells(one, theirs[one.work]) for one in measured], texts=2)


def comparison_cells(one: Comparison, base: Comparison) -> tuple[str, ...]:
    """Return a line of the table."""
    if one.problem:
        return (one.work, one.side, f"failed: {one.problem}")
    found = []
    for name, digits in (("samples_per_second", ".3f"), ("start_seconds", ".1f"), ("memory_gb", ".2f")):
        value, reference = getattr(one, name), getattr(base, name)
        found += [format(value, digits), number(reference and value / reference, ".2f")]
    return (one.work, one.side, *found)


# ---------------------------------------------------------------------------------------------------------------- plot


def draw_plot(title: str, measured: list[Measurement] | list[Comparison]) -> Image.Image:
    """Draw a row for each measurement: the seconds of a step, in parts if they are known, and the samples a second."""
    font = ImageFont.load_default(LETTERS)
    left = round(max(font.getlength(one.label) for one in measured)) + 2 * LETTERS
    right = left + BAR + ROOM
    sheet = Image.new("RGB", (right + BAR + ROOM, HEAD + ROW * len(measured) + LETTERS), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((LETTERS, ROW), title, INK, font, anchor="lm")
    write_legend(draw, font, (LETTERS, 2 * ROW), any(one.parts for one in measured))
    longest = max((max(one.seconds, sum((one.parts or {}).values())) for one in measured if one.seconds), default=1)
    fastest = max((one.samples_per_second for one in measured if one.seconds), default=1)
    for place, head in ((left, "seconds a step"), (right, "samples a second")):
        draw.text((place, 3 * ROW), head, INK, font, anchor="lm")
        draw.line((place, HEAD, place, sheet.height - LETTERS), INK)
    for number, one in enumerate(measured):
        middle = HEAD + ROW * number + ROW // 2
        draw.text((LETTERS, middle), one.label, INK, font, anchor="lm")
        if one.seconds is None:
            draw.text((left + LETTERS // 2, middle), "failed", FAINT_INK, font, anchor="lm")
            continue
        end, tick = draw_bar(draw, (left, middle), stack_of(one), BAR / longest), left + one.seconds * BAR / longest
        if one.parts:
            draw.line((tick, middle - ROW // 2 + 2, tick, middle + ROW // 2 - 2), INK, 3)
        draw.text((max(end, tick) + LETTERS // 2, middle), f"{one.seconds:.3g}", INK, font, anchor="lm")
        end = draw_bar(draw, (right, middle), [(one.samples_per_second, SPEED)], BAR / fastest)
        draw.text((end + LETTERS // 2, middle), f"{one.samples_per_second:.3g}", INK, font, anchor="lm")
    return sheet


def stack_of(one: Measurement | Comparison) -> list[tuple[float, str]]:
    """Return seconds and colours, from left to right."""
    return [(one.parts[part], PART_COLOURS[part]) for part in PARTS] if one.parts else [(one.seconds, WHOLE)]


def draw_bar(draw: ImageDraw.ImageDraw, start: tuple[int, int], stack: list[tuple[float, str]], scale: float) -> float:
    """Draw values beside each other, from the middle of a bar's left edge; return where its right edge is."""
    place, middle = start
    for value, colour in stack:
        draw.rectangle((place, middle - ROW // 3, place + value * scale, middle + ROW // 3), colour)
        place += value * scale
    return place


def write_legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, start: tuple[int, int], has_parts: bool
) -> None:
    """Write what the colours of a step's parts mean, if there are any."""
    place, middle = start
    for part, colour in PART_COLOURS.items() if has_parts else ():
        draw.rectangle((place, middle - LETTERS // 2, place + LETTERS, middle + LETTERS // 2), colour)
        draw.text((place + 1.5 * LETTERS, middle), part, INK, font, anchor="lm")
        place += round(font.getlength(part)) + 3 * LETTERS
    if has_parts:
        draw.line((place, middle - LETTERS // 2, place, middle + LETTERS // 2), INK, 3)
        draw.text((place + LETTERS // 2, middle), "as it runs, without stops between parts", INK, font, anchor="lm")


def describe_machine(threads: int | None) -> dict:
    """Return what a measurement depends on: the device, the threads of each run, and versions."""
    device = torch.accelerator.current_accelerator() if has_accelerator() else None
    versions = {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}
    used = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    cpu = f"{cpu_name()}, {os.cpu_count()} cores{used}"
    name = torch.cuda.get_device_name() if device and device.type == "cuda" else str(device) if device else cpu
    told = {"kind": device.type if device else "cpu", "device": name, "system": platform.platform()}
    return told | {"omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "versions": versions}


def cpu_name() -> str:
    """Return the processor's name; Linux tells it in a file only."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
