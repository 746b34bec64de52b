"""A base model's files before its weights are loaded: configs and the classes that they name."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from utils.errors import InputError


def read_config(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict:
    """Read one JSON file of a model, of a folder's or a Hub repository's.

    Raises:
        InputError: There is no such model or file, or it is no JSON.
    """
    is_folder = Path(model).is_dir()
    try:
        path = Path(model, filename)
        if not is_folder:
            path = Path(huggingface_hub.hf_hub_download(model, filename, revision=revision, token=token))
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = "is a folder without" if is_folder else "is no folder here, and the Hub gave no such model with"
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"The model {model}{at} {what} a readable {filename}: {error}") from error


def component_class(index: dict, component: str) -> type:
    """Return the class that model_index.json names for a component.

    Args:
        index: The content of model_index.json.

    Raises:
        InputError: The installed packages have no such class.
    """
    library, name = index[component]
    for module in (library, f"diffusers.pipelines.{library}", f"diffusers.pipelines.deprecated.{library}"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise InputError(f"model_index.json names {library}.{name} as its {component}; no installed package has it.")


def load(kind: type, model: str, part: str | None, **options) -> Any:
    """Load a part of a model, or with part None the whole of it.

    Args:
        kind: The class that loads it.
        options: Of its `from_pretrained`.

    Raises:
        InputError: Files are missing or broken.
    """
    folder = {"subfolder": part} if part else {}
    try:
        return kind.from_pretrained(model, **folder, **options)
    except (OSError, HfHubHTTPError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        advice = "Weight files may have a variant's name, such as fp16: then give it by --variant"
        raise InputError(f"The {part or 'model'} of {model} cannot be loaded: {reason} {advice}.") from error


def write_scheduler_config(folder: Path, config: dict) -> None:
    """Write the base model's scheduler config, as it was read, into a result.

    A scheduler's own `save_pretrained` would write defaults out. Then another sampler that is made from the config
    takes them over, which it does not from the base model, and draws other pictures.
    """
    (folder / "scheduler").mkdir(exist_ok=True)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def public_name(model: str) -> str:
    """Return a model's Hub id, or the last part of its folder's path."""
    return Path(model).resolve().name if Path(model).is_dir() else model
