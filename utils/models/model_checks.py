"""Checks of a model: what its config files say, before anything is done by them, and its weights and tokenizer."""

import functools
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import SafetensorError
from torch import nn

from utils.core.errors import UserError

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".bin")
PARTS = {  # of a model that runs read, and what their classes must be
    "unet": nn.Module,
    "vae": nn.Module,
    "text_encoder": nn.Module,
    "tokenizer": transformers.PreTrainedTokenizerBase,
    "scheduler": diffusers.SchedulerMixin,
    "image_noising_scheduler": diffusers.SchedulerMixin,
}
_TYPES = {  # of the config values that runs read, by the words that messages have for them; each may be missing
    "a name": (str, ("_class_name", "class_embed_type", "prediction_type")),
    "a whole number": (int, ("in_channels", "out_channels", "max_position_embeddings", "num_train_timesteps")),
    "a list of whole numbers": (list, ("block_out_channels",)),
    "one whole number or two": ((int, list), ("sample_size",)),
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
    wrong = {
        key: words
        for words, (kind, keys) in _TYPES.items()
        for key in keys
        if config.get(key) is not None and not isinstance(config[key], kind)
    }
    if part.endswith("scheduler") and not hasattr(diffusers, str(config.get("_class_name", "DDPMScheduler"))):
        wrong["_class_name"] = "one of diffusers' schedulers"
    if wrong:
        key, words = next(iter(wrong.items()))
        raise UserError(f'{path} has "{key}": {json.dumps(config[key])}; it must be {words}.')
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


def check_presence(name: str, folder: Path, variant: str | None) -> None:
    """Raise UserError if a folder holds no weights of a variant, or with None no weights of none."""
    if _list_weights(folder, variant):
        return
    others = ", ".join(path.name for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES)
    held = f"{others}: see --variant" if others else f"neither {' nor '.join(WEIGHT_SUFFIXES)} files"
    of_variant = f" of variant {variant}" if variant else ""
    raise UserError(f"{name} has no weights{of_variant}: {folder} holds {held}.")


def are_pickles(name: str, folder: Path, variant: str | None) -> bool:
    """Say whether a folder's weights are pickles alone, with a warning; safetensors beside them are read instead."""
    names = _list_weights(folder, variant)
    if not names or not all(name.endswith(".bin") for name in names):
        return False
    _warn_of_pickles(name)
    return True


def check_completeness(name: str, info: dict) -> None:
    """Raise UserError if weights lack layers of the network, which would be random, or have them in other shapes.

    Args:
        info: What `from_pretrained` returns of a network for `output_loading_info`.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks weights of {_first_of(missing)}. Download the model again, or use another.")
    if mismatched := sorted(f"{key} {tuple(found)}, not {tuple(own)}" for key, found, own in info["mismatched_keys"]):
        raise UserError(f"{name} has weights of other shapes than its config says: {_first_of(mismatched)}.")


def check_loaded(name: str, loaded: Any) -> None:
    """Raise UserError if a loaded network, one of a loaded pipeline, or a tokenizer is of no use."""
    parts = loaded.components if isinstance(loaded, diffusers.DiffusionPipeline) else {"": loaded}
    for key, part in parts.items():
        named = f"{name}, {key}," if key else name
        if isinstance(part, nn.Module):
            _check_numbers(named, part)
        if isinstance(part, transformers.PreTrainedTokenizerBase):
            _check_tokenizer(named, part)


def explain(error: Exception) -> str:
    """Say why something cannot be loaded, in one line."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    if "git-lfs" not in str(error):
        # diffusers says of every other broken file of weights that it cannot be loaded, and not why.
        error = next((one for one in chain if isinstance(one, (SafetensorError, pickle.UnpicklingError))), error)
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        what = text.partition("WeightsUnpickler error: ")[2].partition(". ")[0] or "it is damaged"
        return f"its pickle holds more than weights, perhaps code, so it is not read ({what})."
    if "trust_remote_code" in text:
        return "it needs code that comes with the model, and none is ever run."
    says_what = isinstance(error, (OSError, ValueError, SafetensorError))
    return f"{text}." if says_what else f"{type(error).__name__}: {text}."


def _list_weights(folder: Path, variant: str | None) -> list[str]:
    """Return the names of a folder's files of weights that are of a variant, or with None of none."""
    names = [path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    return [name for name in names if (f".{variant}" in name if variant else name.count(".") == 1)]


@functools.cache
def _warn_of_pickles(name: str) -> None:
    """Say once what is read from pickles."""
    logger.warning("%s is read from a pickle, by weights_only=True: numbers, no code. Safetensors are safer.", name)


def _check_numbers(name: str, network: nn.Module) -> None:
    """Raise UserError if a network's weights are not all finite: nothing could be learned or drawn with them."""
    named = [(layer, weights.detach()) for layer, weights in network.named_parameters() if weights.is_floating_point()]
    # The sum takes one pass and no memory, and is finite only if all are; it may overflow where all are.
    if bad := [layer for layer, weights in named if not weights.sum().isfinite() and not weights.isfinite().all()]:
        why = "it is damaged, was saved by a run that diverged, or is too large for this precision"
        raise UserError(f"{name} holds numbers that are not finite in {_first_of(bad)}: {why}. Use another model.")


def _check_tokenizer(name: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer needs code of the model's own, or knows no words."""
    if "auto_map" in tokenizer.init_kwargs:
        raise UserError(f"{name} needs code that comes with the model (auto_map), and none is ever run.")
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        files = ", ".join(sorted(tokenizer.vocab_files_names.values()))
        raise UserError(f"{name} knows no words: it lacks its files ({files}). Download the model again.")


def _first_of(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
