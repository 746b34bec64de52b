"""Measure speed and memory of both scripts in a few configurations, on this machine and a model with random weights.

    python -m utils.benchmark --shape small --steps 6 --output bench-output

Every configuration is a run of its own in a new process; the first steps, in which kernels are chosen and memory is
taken, do not count. To add a configuration, add a line to `CONFIGURATIONS`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from utils import checkpoints, images, processes, shapes
from utils.errors import InputError
from utils.make_model import SHAPES, make_model

ROOT = Path(__file__).parents[1]
SCRIPTS = {"full": "train_dreambooth.py", "LoRA": "train_dreambooth_lora.py"}
PRIOR = "--with_prior_preservation --class_prompt=teapot --num_class_images=5"
CONFIGURATIONS = {  # what the table calls it: script, flags
    "full, batch 1": ("full", ""),
    "full, batch 4": ("full", "--train_batch_size=4"),
    "full, 8-bit Adam": ("full", "--use_8bit_adam"),
    "full, gradient checkpointing": ("full", "--gradient_checkpointing"),
    "full, text encoder": ("full", "--train_text_encoder"),
    "LoRA, batch 1": ("LoRA", ""),
    "LoRA, batch 4": ("LoRA", "--train_batch_size=4"),
    "LoRA, prior, precomputed text": ("LoRA", f"{PRIOR} --pre_compute_text_embeddings"),
    "LoRA, gradient checkpointing": ("LoRA", "--gradient_checkpointing"),
    "LoRA, bf16": ("LoRA", "--mixed_precision=bf16"),
}
SIZES = {"tiny": 64, "shapes-sd": 16, "small": 256, "sd15": 512, "sd21": 768}  # pixels at which a shape is trained
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
PHOTOS = 5
WARM_UP = 2  # steps that do not count


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table; None where the run failed."""

    name: str
    seconds: float | None = None  # median step
    samples_per_second: float | None = None  # pictures, class images among them
    memory_gb: float | None = None  # peak of the GPU's memory, or on a CPU of the process's, in 10^9 bytes
    start_seconds: float | None = None  # from the start of the process to that of the first step
    problem: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write it as JSON; return 1 if a configuration failed."""
    args = parse_args(argv)
    size = args.size or SIZES[args.shape]
    processes.silence_libraries()
    try:
        folders = prepare(args.output, args.shape)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    measured = []
    for name in chosen(args.only):
        print(f"{name} …", file=sys.stderr, flush=True)
        measured.append(measure(name, folders, size, args))
    machine = describe_machine()
    print(f"\nshape {args.shape}, {size} px, {args.steps} steps, on {machine['device']}\n\n{make_table(measured)}")
    if machine["kind"] == "cpu":
        print("\nMemory on a CPU is that of the whole process, its libraries included.")
    report = {"shape": args.shape, "size": size, "steps": args.steps, "warm_up": WARM_UP, **machine}
    report["measurements"] = [dataclasses.asdict(measurement) for measurement in measured]
    path = args.output / "benchmark.json"
    checkpoints.atomic_write_text(path, json.dumps(report, indent=2) + "\n")
    print(f"Wrote {path}")
    return int(any(measurement.problem for measurement in measured))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.benchmark", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--shape",
        choices=[name for name, shape in SHAPES.items() if shape["family"] == "sd"],
        default="small",
        help="sizes of the networks; default: small",
    )
    add("--size", type=int, help="height and width in pixels; default: what the shape is made for")
    add("--steps", type=int, default=6, help=f"steps of each run, the first {WARM_UP} not counted; default: 6")
    add("--only", metavar="TEXT", default="", help="only the configurations with this in their name; default: all")
    add("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="where to; default: bench-output")
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves none to count: it must be more than {WARM_UP}.")
    if not chosen(args.only):
        parser.error(f"--only {args.only!r} is in no name. There are: {'; '.join(CONFIGURATIONS)}.")
    return args


def chosen(text: str) -> list[str]:
    """Return the names of the configurations that hold a text, in any case."""
    return [name for name in CONFIGURATIONS if text.lower() in name.lower()]


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
        images.save_png(picture, folders["photos"] / f"{number}.png")
        images.save_png(picture, folders["class-images"] / f"{number:05d}.png")
    return folders


def measure(name: str, folders: dict[str, Path], size: int, args: argparse.Namespace) -> Measurement:
    """Run one configuration; what it writes is removed again, but for its log."""
    script, flags = CONFIGURATIONS[name]
    run = folders["runs"] / "-".join(name.lower().replace(",", "").split())
    shutil.rmtree(run, ignore_errors=True)
    words = [
        f"--pretrained_model_name_or_path={folders['model']}",
        f"--instance_data_dir={folders['photos']}",
        f"--class_data_dir={folders['class-images']}",
        f"--output_dir={run}",
        "--instance_prompt=sks teapot",
        *f"--resolution={size} --max_train_steps={args.steps} --seed=0".split(),
        *"--train_batch_size=1 --report_to=none".split(),
        *flags.split(),
    ]
    log = run.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        began = time.perf_counter()
        command = processes.launch_command(ROOT / SCRIPTS[script], words)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        # The file is opened right before the first step.
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.02)
        start_seconds = time.perf_counter() - began
        status = process.wait()
    if status:
        return Measurement(name, problem=f"exit status {status}: {find_reason(log)}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(run)
    steps = lines[WARM_UP:]
    seconds, samples = (statistics.median(step[key] for step in steps) for key in ("seconds", "samples_per_second"))
    return Measurement(name, seconds, samples, max(line["memory_gb"] for line in lines), start_seconds)


def find_reason(log: Path) -> str:
    """Return the last line of a log that says why a run failed."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line.partition(" ")[0] or line.startswith("- ")]
    own = [line for line in told if "CalledProcessError" not in line]  # the launcher's, about the script's status
    return (own or lines or ["it printed nothing"])[-1]


def make_table(measured: list[Measurement]) -> str:
    """Return the measurements as a Markdown table, the columns aligned."""
    heads = ("configuration", "s a step", "samples/s", "memory GB", "s to first step")
    rows = [heads, *(cells(measurement) for measurement in measured)]
    widths = [max(len(row[column]) for row in rows if len(row) == len(heads)) for column in range(len(heads))]
    widths[0] = max(len(row[0]) for row in rows)
    rows.insert(1, (f"{'':-<{widths[0]}}", *(f"{'':->{width - 1}}:" for width in widths[1:])))
    return "\n".join(
        f"| {first:<{widths[0]}} | {' | '.join(f'{cell:>{width}}' for cell, width in zip(rest, widths[1:]))} |"
        for first, *rest in rows
    )


def cells(measurement: Measurement) -> tuple[str, ...]:
    """Return a line of the table."""
    if measurement.problem:
        return (measurement.name, f"failed: {measurement.problem}")
    return (
        measurement.name,
        f"{measurement.seconds:.3f}",
        f"{measurement.samples_per_second:.2f}",
        f"{measurement.memory_gb:.2f}",
        f"{measurement.start_seconds:.1f}",
    )


def describe_machine() -> dict:
    """Return what a measurement depends on: the device, threads and versions."""
    device = torch.accelerator.current_accelerator()
    versions = {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}
    threads = os.environ.get("OMP_NUM_THREADS")
    cpu = f"{cpu_name()}, {os.cpu_count()} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    name = torch.cuda.get_device_name() if device and device.type == "cuda" else str(device) if device else cpu
    return {"kind": device.type if device else "cpu", "device": name, "system": platform.platform()} | {
        "versions": versions
    }


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
