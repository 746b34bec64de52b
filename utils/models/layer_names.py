"""The names of layers that adapters are put on, checked before any weights are loaded."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

KINDS = {"linear layers": nn.Linear, "convolutions": nn.Conv2d}


def find_unknown_layers(config: dict[str, Any], layers: str | None) -> list[str]:
    """Return a sentence if a U-Net lacks some layers; it is built from its config alone, without weights.

    Args:
        layers: Ends of their names, separated by commas, as a person gave them. None: nothing is checked.
    """
    if layers is None:
        return []
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except Exception:  # loading the model says better what is wrong with its config
        return []
    names = [name.strip() for name in layers.split(",")]
    sentence = describe_unknown_layers(unet, names, "--lora_layers")
    return [sentence] if sentence else []


def keep_known(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those names that end the name of a layer.

    A U-Net whose self-attention is cross-attention only, as in IF's stage II, has no `to_k` and `to_v`, for example.
    """
    there = [f".{path}" for path, _ in model.named_modules()]
    return [name for name in names if any(path.endswith(f".{name}") for path in there)]


def describe_unknown_layers(model: nn.Module, names: list[str], flag: str) -> str:
    """Return a sentence with the names that end no layer's name, and those that do; "" if all are known.

    Args:
        flag: That the names come from.
    """
    known = keep_known(model, names)
    if not (missing := [name for name in names if name not in known]):
        return ""
    there = [f"{words} {', '.join(found)}" for words, kind in KINDS.items() if (found := list_ends(model, kind))]
    what = f"{type(model).__name__} has no layers named {', '.join(missing)}"
    return f"{what}. It has the {' and the '.join(there)}. See {flag}."


def list_ends(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the distinct ends of the names of a kind of layer, without the blocks that they lie in."""
    paths = [path.split(".") for path, layer in model.named_modules() if isinstance(layer, kind)]
    return sorted({".".join(path[-2:] if path[-1].isdigit() else path[-1:]) for path in paths})
