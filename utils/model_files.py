"""A base model's files before its weights are loaded: configs and the classes that they name."""

import importlib
import importlib.util
import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = "is a folder" if is_folder else "is no folder, and as a Hub id it gave nothing,"
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"The model {model}{at} {what} without a readable {filename}: {error}") from error


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
