"""Checks of a model's weights and tokenizer as they are loaded, and what is said of those that cannot be."""

import functools
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
