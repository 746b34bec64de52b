"""One run of a script that is measured: its folders, its flags, and the machine it runs on."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.devices import launch
from utils.flags.precision import has_accelerator
from utils.run import scripts
from utils.synthetic import shapes
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import make_model

TIMING = Path(__file__).with_name("step_timing.py")
PHOTOS = 8
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
WARM_UP = 2  # steps that do not count


def is_if(shape: str) -> bool:
    """Say whether a shape is one of DeepFloyd IF: it has neither latents nor a text encoder that trains."""
    return SHAPES[shape]["family"] != "sd"


def size_of(shape: str) -> int:
    """Return the height and width in pixels that a shape's networks are made for."""
    recipe = SHAPES[shape]
    return recipe["unet"]["sample_size"] * 2 ** (len(recipe["vae"]["widths"]) - 1 if "vae" in recipe else 0)


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
        """Wait for the end; raise UserError if the run failed."""
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


def find_unknown(script: Path, flags: list[str]) -> str | None:
    """Return a sentence about the flags that a script lacks; None if it has them all."""
    unknown = [flag.partition("=")[0] for flag in flags if not scripts.has_flag(script, flag)]
    return f"{script.name} has no {', '.join(unknown)}" if unknown else None


def number(value: float | None, digits: str) -> str:
    """Return a number as text, a dash if there is none."""
    return "–" if value is None else format(value, digits)


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
