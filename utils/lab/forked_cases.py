"""Measure each case of a comparison in a process of its own."""

import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path

from utils.devices import accelerator_setup, launch

FORKS = multiprocessing.get_context("forkserver")  # whose children have imported all this already


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and where the results go."""

    output: Path
    names: str  # only cases with this in their name
    shape: str  # of the networks of the estimates
    size: int  # of their pictures, in pixels
    steps: int
    unet_shape: str  # of the U-Net that is quantized
    unet_size: int  # of its pictures, in pixels


def run_case(
    settings: Settings, measure: Callable[..., dict], table: str, name: str, environment: dict[str, str]
) -> dict:
    """Measure one line in a process of its own and return what was found; its messages are kept in a file."""
    file = case_file(settings, table, name)
    file.unlink(missing_ok=True)
    process = FORKS.Process(target=measure_case, args=(settings, measure, name, file, environment))
    process.start()
    process.join()
    if not file.exists():
        return {"problem": f"exit status {process.exitcode}: {launch.find_reason(file.with_suffix('.log'))}"}
    return json.loads(file.read_text(encoding="utf-8"))


def measure_case(
    settings: Settings, measure: Callable[..., dict], name: str, file: Path, environment: dict[str, str]
) -> None:
    """Measure one line in this process, and write it down."""
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(environment)
    accelerator_setup.silence_libraries()
    file.write_text(json.dumps(measure(name, settings)), encoding="utf-8")


def case_file(settings: Settings, table: str, name: str) -> Path:
    """Return where a line is written down."""
    return settings.output / f"{table}-{'-'.join(re.findall(r'[a-z0-9]+', name.lower()))}.json"
