"""The log of a run: metrics.jsonl, the trackers, and the progress bar."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, tracking
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from utils.core.atomic_files import write_whole
from utils.core.errors import UserError, explain_write_errors
from utils.devices import device_memory, network_speed
from utils.run import checkpoints

logger = logging.getLogger(__name__)

ONE_BY_ONE = ("aim", "clearml")  # trackers whose accelerate class takes one picture a name, not a list


class MetricLog:
    """Write one line per optimizer step, one step late, so that reading the loss never makes the device wait.

    A run whose numbers are no longer finite is ended by an UserError, at the latest by the `flush` before a save.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, first_step: int, steps: int, weights: Sequence[torch.Tensor] = ()
    ):
        """Keep the lines up to `first_step` of an earlier run and drop the rest.

        Args:
            weights: What trains; must be finite whenever it is to be saved.
        """
        self.accelerator, self.device, self.weights = accelerator, accelerator.device, weights
        self.path = path
        self.waiting: tuple[int, dict, list[str]] | None = None
        self.compiling = 0.0  # seconds of it that were told
        self.progress = tqdm(
            total=steps, initial=first_step, desc="steps", disable=not accelerator.is_local_main_process
        )
        self.file = None
        if accelerator.is_main_process:
            truncate_metrics(path, first_step)
            self.file = path.open("a" if first_step else "w", encoding="utf-8")

    def add(
        self,
        step: int,
        began: float,
        examples: int,
        losses: list[dict[str, torch.Tensor]],
        values: dict[str, Any],
        names: Sequence[str] = (),
    ) -> None:
        """Take a step's values and write the step before.

        Args:
            names: The files of this process's examples, to be named if the step goes wrong.
            losses: For each micro-step what `compute_loss` returned. The mean of each key over micro-steps and
                processes is written; all processes must have the same keys in a step.
            began: `time.perf_counter()` at the start of the step.
            examples: How many examples all processes worked on in the step.
            values: Numbers, or tensors of one number that may still be on their way.
        """
        self._write()
        seconds = time.perf_counter() - began
        speed = {"seconds": seconds, "samples_per_second": examples / seconds}
        values = self._mean(losses) | values
        self.waiting = step, values | speed | {"memory_gb": device_memory.peak_memory_gb(self.device)}, list(names)
        self.progress.update()
        self._tell_compiling()

    def flush(self) -> None:
        """Write what waits, to the disk; raise UserError if it, or the weights, are not to be saved."""
        step, _, names = self.waiting or (None, {}, [])
        self._write()
        if not all(weight.isfinite().all() for weight in self.weights):
            raise self._divergence("weights that are not finite", step, names)
        if self.file:
            with explain_write_errors(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
                if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
                    raise FileNotFoundError(errno.ENOENT, "its folder was moved, removed or unmounted")

    def close(self) -> None:
        """Write what waits and end the progress bar."""
        self.flush()
        self.progress.close()
        if self.file:
            self.file.close()

    def _tell_compiling(self) -> None:
        """Say how long compiling took in the first step, and whenever another one took more than a second for it."""
        seconds = network_speed.seconds_so_far()
        if seconds > self.compiling + 1:
            logger.info("Compiling took %.0f s, %.0f s altogether.", seconds - self.compiling, seconds)
            self.compiling = seconds

    def _mean(self, losses: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the mean of each key over the micro-steps that have it, and over processes, still on the device."""
        names = dict.fromkeys(name for loss in losses for name in loss)
        values = {name: [loss[name] for loss in losses if name in loss] for name in names}
        means = {name: torch.stack(found).detach().mean() for name, found in values.items()}
        return self.accelerator.reduce(means, reduction="mean")

    def _write(self) -> None:
        """Write the step that waits; numbers that are not finite are left out, since JSON has no word for them."""
        if self.waiting is None:
            return
        step, values, names = self.waiting
        self.waiting = None
        numbers = {key: float(value) for key, value in values.items()}
        # With fp16, a gradient that overflows is normal: the scaler skips that step.
        watched = ("loss",) if self.accelerator.scaler else ("loss", "grad_norm")
        if bad := [f"{key} {numbers[key]}" for key in watched if not math.isfinite(numbers.get(key, 0))]:
            raise self._divergence(" and ".join(bad), step, names)
        shown = {key: f"{numbers[key]:.4g}" for key in ("loss", "lr", "seconds")}
        self.progress.set_postfix(shown, refresh=False)
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self.accelerator.log(finite, step=step)
        if self.file:
            with explain_write_errors(self.path):
                self.file.write(json.dumps({"step": step} | finite) + "\n")
                self.file.flush()

    def _divergence(self, what: str, step: int, names: list[str]) -> UserError:
        """Return the error of a step after which nothing may be saved; all processes must come here."""
        names = list(dict.fromkeys(gather_object(names)))
        files = f" (its pictures: {', '.join(names[:8])}{', …' * (len(names) > 8)})" if names else ""
        saved = checkpoints.list_checkpoints(self.path.parent)
        good = [path.name for path in saved if checkpoints.step_of(path) < step]
        way = f"Go on by --resume_from_checkpoint {good[-1]}, the last good one," if good else "Start anew"
        return UserError(
            f"Training has diverged: {what} at step {step}{files}. Nothing is saved from here on. {way} with a lower "
            "--learning_rate, in bf16 instead of fp16, or without these pictures."
        )


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of a JSON-lines file whose "step" is at most `step`; drop later, torn and other lines."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [line for line in before.splitlines() if _line_step(line) <= step]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        write_whole(path, after)


def _line_step(line: bytes) -> float:
    """Return the "step" of a line of JSON, infinity if there is none."""
    try:
        return float(json.loads(line.decode())["step"])  # bytes alone might be of another encoding
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")


def track_images(accelerator: Accelerator, name: str, pictures: list[Image.Image], step: int) -> None:
    """Send pictures to those trackers that take pictures, those of another size than the first under its name."""
    for tracker in [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]:
        for size in dict.fromkeys(picture.size for picture in pictures):
            title = name if size == pictures[0].size else f"{name} {size[0]}x{size[1]}"
            alike = [picture for picture in pictures if picture.size == size]
            if tracker.name == "tensorboard":
                stack = np.stack([np.array(picture) for picture in alike])
                tracker.log_images({title: stack}, step, dataformats="NHWC")
            elif tracker.name in ONE_BY_ONE:
                for number, picture in enumerate(alike):
                    tracker.log_images({f"{title} {number}": picture}, step)
            else:
                tracker.log_images({title: alike}, step)


def tracker_names(report_to: str) -> list[str]:
    """Return the trackers of a list such as "tensorboard,wandb"; none for "none"."""
    return [name for name in report_to.replace(",", " ").split() if name != "none"]


def find_tracker_problems(names: list[str]) -> list[str]:
    """Return a sentence for each tracker that is unknown or not installed."""
    known = {str(name) for name in tracking.LOGGER_TYPE_TO_CLASS}
    missing = set(names) - {"all"} - {str(name) for name in tracking.get_available_trackers()}
    problems = [f"--report_to {name} needs its package: pip install {name}." for name in sorted(missing & known)]
    listed = ", ".join(["all", "none", *sorted(known)])
    return problems + [f"--report_to {name} is unknown. Known are {listed}." for name in sorted(missing - known)]


def start_trackers(accelerator: Accelerator, settings: dict[str, Any], output_dir: Path) -> None:
    """Start the trackers of a run, if there are any, with those of its settings that every tracker can store."""
    if accelerator.log_with:
        simple = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("dreambooth", simple, {"wandb": {"dir": str(output_dir)}})
