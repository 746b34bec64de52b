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
import functools
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

from utils.core import atomic_files, markdown
from utils.core.errors import UserError
from utils.devices import accelerator_setup, launch
from utils.flags.command_line import convert_flag
from utils.flags.precision import has_accelerator
from utils.lab import plots
from utils.lab.compare_projects import COMPARED, Comparison, Settings, compare
from utils.lab.measured_runs import (
    PHOTOS,
    TIMING,
    WARM_UP,
    Run,
    describe_machine,
    find_unknown,
    is_if,
    number,
    paths_of,
    prepare,
    read_lines,
    size_of,
)
from utils.lab.step_timing import PARTS
from utils.run import scripts
from utils.run.scripts import SCRIPTS
from utils.synthetic.model_sizes import SHAPES

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
STEPS, COMPARED_STEPS = 6, 20  # in the latter, each photo comes twice, so that our scripts cache its latents


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


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write it as JSON and draw it; return 1 if anything failed."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    try:
        folders = prepare(args.output, args.shape)
        measured, table, more = compare_sides(args, folders) if args.against else survey(args, folders)
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
    atomic_files.save_png(plots.draw_bars(title, measured), path.with_suffix(".png"))
    print(f"Wrote {path} and {path.with_suffix('.png')}")
    return int(any(one.problem for one in measured))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.benchmark", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add, names = parser.add_argument, [path.name for path in SCRIPTS.values()]
    known = [name for name, shape in SHAPES.items() if shape["family"] != "x4"]
    add("--shape", choices=known, default="small", help="sizes of the networks; default: small")
    add("--size", type=int, help="height and width in pixels; default: what the shape is made for")
    counts = f"default: {STEPS}, with --against {COMPARED_STEPS}"
    add("--steps", type=int, help=f"steps of each run, the first {WARM_UP} not counted; {counts}")
    add("--only", metavar="TEXT", default="", help="only the configurations with this in their name; default: all")
    add("--against", type=Path, metavar="DIR", help=f"another project's {' and '.join(names)}")
    add(
        "--script",
        type=to_script,
        metavar="PATH",
        help="measure this copy of a script, and only what its method is measured in",
    )
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
    args.paths = {scripts.method_of(args.script): args.script} if args.script else SCRIPTS
    args.size, args.steps = args.size or size_of(args.shape), args.steps or (COMPARED_STEPS if args.against else STEPS)
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves none to count: it must be more than {WARM_UP}.")
    if not chosen(args):
        parser.error(f"--only {args.only!r} is in no name. There are: {'; '.join(offered(args))}.")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be 1 or more.")
    if args.against and is_if(args.shape):
        parser.error(f"--against compares shapes of Stable Diffusion, not {args.shape}.")
    missing = [SCRIPTS[script].name for script, _ in chosen(args).values()] if args.against else []
    if missing := [name for name in dict.fromkeys(missing) if not (args.against / name).is_file()]:
        parser.error(f"--against {args.against} has no {' and no '.join(missing)}.")
    return args


def offered(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return what could be measured, by name: script and flags."""
    excluded = NOT_FOR_IF if is_if(args.shape) else ()
    known = COMPARED if args.against else CONFIGURATIONS
    return {
        name: (script, flags)
        for name, (script, flags) in known.items()
        if script in args.paths and not any(flag in flags.split() for flag in excluded)
    }


def chosen(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return those whose name holds the text of --only, in any case."""
    return {name: one for name, one in offered(args).items() if args.only.lower() in name.lower()}


def compare_sides(args: argparse.Namespace, folders: dict[str, Path]) -> tuple[list[Comparison], str, dict]:
    """Measure another project's scripts and ours; return medians, their table, and what else the report holds."""
    settings = Settings(args.paths, args.against, args.size, args.steps, args.repeats, args.best)
    return compare(chosen(args), settings, folders)


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
    path, precision = args.paths[script], precision_of(" ".join(own))
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
        run.finish(run.start(args.paths[script], flags_of(args, folders, run, own), "flops"))
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
    return "\n\n".join([markdown.make_table(heads, [cells(measurement) for measurement in measured]), *missing])


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


if __name__ == "__main__":
    sys.exit(main())
