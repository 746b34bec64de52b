"""Checks of what a model's config files say, before anything is done by them."""

import json
from pathlib import Path

import diffusers
import transformers
from torch import nn

from utils.core.errors import UserError

PARTS = {  # of a model that runs read, and what their classes must be
    "unet": nn.Module,
    "vae": nn.Module,
    "text_encoder": nn.Module,
    "tokenizer": transformers.PreTrainedTokenizerBase,
    "scheduler": diffusers.SchedulerMixin,
    "image_noising_scheduler": diffusers.SchedulerMixin,
}

# Kinds of values, by the words that messages have for them. True is an int, too, so types are compared.
_KINDS = {
    "a name": lambda value: isinstance(value, str) and value != "",
    "a whole number": lambda value: type(value) is int,
    "a list of whole numbers": lambda value: _are_whole(value),
    "one whole number or two": lambda value: type(value) is int or (_are_whole(value) and len(value) == 2),
    "one of diffusers' schedulers": lambda value: str(value).endswith("Scheduler") and value in dir(diffusers),
}
_SCHEDULER = {
    "_class_name": "one of diffusers' schedulers",
    "num_train_timesteps": "a whole number",
    "prediction_type": "a name",
}
_EXPECTED = {  # kinds of the values that runs read; each may be missing
    "index": {"_class_name": "a name"},
    "unet": {
        "_class_name": "a name",
        "in_channels": "a whole number",
        "out_channels": "a whole number",
        "block_out_channels": "a list of whole numbers",
        "sample_size": "one whole number or two",
        "class_embed_type": "a name",
    },
    "vae": {"_class_name": "a name", "block_out_channels": "a list of whole numbers"},
    "text_encoder": {"max_position_embeddings": "a whole number"},
    "scheduler": _SCHEDULER,
    "image_noising_scheduler": _SCHEDULER,
}
_NEEDED = {  # by class; without them diffusers would assume the sizes of Stable Diffusion 1
    "UNet2DConditionModel": ("in_channels", "block_out_channels"),
    "AutoencoderKL": ("block_out_channels",),
}


def check_index(path: str, index: dict) -> None:
    """Check the content of a model_index.json.

    Args:
        path: Of the file, for messages.

    Raises:
        UserError: A component is no pair of library and class, is no folder's name, or does not come with diffusers
            or transformers; or see `check_config`.
    """
    check_config(path, "index", index)
    for name, value in index.items():
        is_pair = isinstance(value, list) and len(value) == 2
        if value is None or (is_pair and value[0] is None):
            continue
        is_component = is_pair and all(isinstance(text, str) for text in value)
        if name in PARTS and not is_component:
            raise UserError(f'{path} has "{name}": {json.dumps(value)}; it must be a library and a class.')
        if is_component and not name.isidentifier():
            raise UserError(f"{path} has a component {name!r}; it must be the name of a folder of the model.")
        if is_component and not _comes_installed(value[0]):
            raise UserError(
                f'{path} has "{name}": {json.dumps(value)}; only classes of diffusers and transformers are loaded, '
                "and no code that comes with a model."
            )


def check_config(path: str, part: str, config: dict) -> None:
    """Check the content of a part's config.

    Args:
        path: Of the file, for messages.
        part: Its folder, or "index" for model_index.json.

    Raises:
        UserError: It names code of the model's own, lacks a value or has one of the wrong type.
    """
    if "auto_map" in config:
        raise UserError(f"{path} has an auto_map, so it needs code that comes with the model: none is ever run.")
    for key, kind in _EXPECTED[part].items():
        if config.get(key) is not None and not _KINDS[kind](config[key]):
            raise UserError(f'{path} has "{key}": {json.dumps(config[key])}; it must be {kind}.')
    lacking = [key for key in _NEEDED.get(config.get("_class_name"), ()) if config.get(key) is None]
    if lacking:
        raise UserError(f"{path} has no {' and no '.join(lacking)}. Download the model again, or use another.")


def has_part(index: dict, part: str) -> bool:
    """Say whether a checked model_index.json names a class for a part."""
    return bool((index.get(part) or [None])[0])


def _comes_installed(library: str) -> bool:
    """Say whether a library is one of the two, or the folder of one of diffusers' pipelines."""
    pipelines = Path(diffusers.__file__).parent / "pipelines"
    folders = [pipelines / library, pipelines / "deprecated" / library] if library.isidentifier() else []
    return library in ("diffusers", "transformers") or any(folder.is_dir() for folder in folders)


def _are_whole(value: object) -> bool:
    """Say whether a value is a list of whole numbers that is not empty."""
    return isinstance(value, list) and value != [] and all(type(number) is int for number in value)
