"""The training scripts as the tools know them: the two of this project, and any copy of one by its path."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError
from utils.devices import launch

ROOT = Path(__file__).resolve().parents[2]
FULL, LORA = "full", "LoRA"  # what a script trains: whole networks, or adapters
SCRIPTS = {FULL: ROOT / "train_dreambooth.py", LORA: ROOT / "train_dreambooth_lora.py"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # quickest for small networks


def find_script(text: str | Path) -> Path:
    """Return the path of a script, from a path or from "full" or "lora".

    Raises:
        UserError: There is no such file.
    """
    names = {name.lower(): path for name, path in SCRIPTS.items()}
    path = names.get(str(text).lower(), Path(text))
    beside = [ROOT / path] if path.name == str(text) else []  # a tool may be started from another folder
    for choice in (path, *beside):
        if choice.suffix == ".py" and choice.is_file():
            return choice.resolve()
    raise UserError(f"{text} is not a training script. Give the path of a .py file, such as {SCRIPTS[LORA].name}.")


def load_script(text: str | Path) -> ModuleType:
    """Import a script by its path. It finds the modules in its own folder, as when it is run.

    Raises:
        UserError: There is no such file.
    """
    path = find_script(text)
    loaded = sys.modules.get(path.stem)
    if loaded and Path(getattr(loaded, "__file__", None) or "").resolve() == path:
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickle looks for its classes
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def has_flag(script: Path, flag: str) -> bool:
    """Tell whether a script has a flag, given as `--name` or `--name=value`, by its text."""
    return re.search(f"""["']{flag.partition("=")[0]}["']""", script.read_text(encoding="utf-8")) is not None


def method_of(script: Path) -> str:
    """Return what a script trains, a key of `SCRIPTS`: a script with --rank trains adapters."""
    return LORA if has_flag(script, "--rank") else FULL


def label_of(script: Path) -> str:
    """Return the name of a script in tables: "full", "LoRA", or the file name of a copy."""
    return {path: name for name, path in SCRIPTS.items()}.get(script, script.stem)


def start(
    script: Path, flags: Sequence[str], log: Path | None = None, variables: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start a script in one process.

    Args:
        log: A file for all that it prints; None: it prints to this terminal.
        variables: Of the environment, beside those of this process.
    """
    command, environment = launch.launch_command(script, flags), os.environ | (variables or {})
    if log is None:
        return subprocess.Popen(command, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen, log: Path | None = None) -> None:
    """Wait for a script to end.

    Raises:
        UserError: It failed. The message has the reason from its log.
    """
    if status := process.wait():
        raise UserError(f"exit status {status}: {find_reason(log)} (see {log})" if log else f"exit status {status}")


def find_reason(log: Path) -> str:
    """Return the last line of a log that says why a run failed."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line.partition(" ")[0] or re.match(r"- |\S+\.py: error: ", line)]
    own = [line for line in told if "CalledProcessError" not in line]  # the launcher's, about the script's status
    return (own or lines or ["it printed nothing"])[-1]
