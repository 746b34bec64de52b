"""Starting scripts in processes of their own, and saying why one failed."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError

LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


def launch_command(script: Path, flags: Sequence[str]) -> list[str]:
    """Return the command that runs a training script in one process, whatever `accelerate config` says."""
    return [sys.executable, *LAUNCH.split(), str(script), *flags]


def start_script(script: Path, flags: Sequence[str], log: Path | None = None, **variables: str) -> subprocess.Popen:
    """Start a training script in one process.

    Args:
        log: Takes what the script prints; missing parents are made. Without it, that is printed here.
        variables: Of the environment, beside or instead of those of this process.
    """
    command, environment = launch_command(script, flags), os.environ | variables
    if log is None:
        return subprocess.Popen(command, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def run_script(what: str, script: Path, flags: Sequence[str], log: Path | None = None, **variables: str) -> None:
    """Run a training script to its end; arguments as of `start_script`.

    Args:
        what: Names the run in the error.

    Raises:
        UserError: It failed.
    """
    process = start_script(script, flags, log, **variables)
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    if status:
        why = f"{find_reason(log)} (see {log})" if log else "its own message is above"
        raise UserError(f"{what}: exit status {status}: {why}.")


def find_reason(log: Path) -> str:
    """Return the last line of a log that says why a run failed."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line.partition(" ")[0] or re.match(r"- |\S+\.py: error: ", line)]
    own = [line for line in told if "CalledProcessError" not in line]  # the launcher's, about the script's status
    return (own or lines or ["it printed nothing"])[-1]
