"""The training scripts as the tools know them: the two of this project, and any copy of one by its path."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FULL, LORA = "full", "LoRA"  # what a script trains: whole networks, or adapters
SCRIPTS = {FULL: ROOT / "train_dreambooth.py", LORA: ROOT / "train_dreambooth_lora.py"}


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
