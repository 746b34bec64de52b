"""The training scripts as the tools know them: the two of this project, and any copy of one by its path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError

ROOT = Path(__file__).parents[2]
FULL, LORA = ROOT / "train_dreambooth.py", ROOT / "train_dreambooth_lora.py"
SCRIPTS = {"full": FULL, "LoRA": LORA}  # by the names that tables call them


def find_script(text: str | Path) -> Path:
    """Return the path of a script, given a path or the name of one of this project's.

    Raises:
        UserError: There is no such file.
    """
    path = Path(text)
    choices = [path, ROOT / path.name] if path == Path(path.name) else [path]
    for choice in choices:
        if choice.suffix == ".py" and choice.is_file():
            return choice
    raise UserError(f"{text} is not a training script. Give the path of a .py file, for example {LORA.name}.")


def load_script(text: str | Path) -> ModuleType:
    """Import a script from its path, with the modules beside it, as running it would.

    Raises:
        UserError: There is no such file.
    """
    path = find_script(text).resolve()
    known = sys.modules.get(path.stem)
    if known and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickles and dataclasses look for its classes
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module
