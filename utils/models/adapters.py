"""LoRA adapters: putting them on a network, and the file that diffusers' `load_lora_weights` reads, whole."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.core.errors import UserError
from utils.models.layer_names import describe_unknown_layers


def add(model: nn.Module, layers: list[str], flag: str, dtype: torch.dtype = torch.float32, **config) -> None:
    """Put adapters on a network's layers; at first they change nothing.

    Args:
        layers: Ends of the layers' names.
        flag: That the layers come from, for messages.
        dtype: Of the adapters.
        config: Of `peft.LoraConfig`.

    Raises:
        UserError: A name occurs in none of the network's layers, or in some that take no adapter.
    """
    if sentence := describe_unknown_layers(model, layers, flag):
        raise UserError(sentence)
    try:
        with _not_looking_for_bitsandbytes():
            model.add_adapter(peft.LoraConfig(init_lora_weights="gaussian", target_modules=list(layers), **config))
    except ValueError as error:
        raise UserError(f"{flag} {','.join(layers)}: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # whatever precision the frozen layers are in


@contextlib.contextmanager
def _not_looking_for_bitsandbytes() -> Iterator[None]:
    """Keep peft from importing bitsandbytes, for a second, to look for its layers where there can be none yet."""
    module, names = peft.tuners.lora.model, ("is_bnb_available", "is_bnb_4bit_available")
    kept = {} if "bitsandbytes" in sys.modules else {name: getattr(module, name) for name in names}
    for name in kept:
        setattr(module, name, bool)  # which says no
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


@contextlib.contextmanager
def switched_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let networks be what they were without their adapters, while the context lasts."""
    models = list(models)
    for model in models:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in models:
            model.enable_adapters()


def save(path: Path, models: dict[str, nn.Module]) -> None:
    """Write the adapters of unwrapped models, by name, under peft's own keys, with rank and alpha in the metadata."""
    weights, metadata = {}, {}
    for name, model in models.items():
        config = model.peft_config["default"].to_dict()
        # A set's order differs from run to run, and so does that of several entries of metadata: equal weights shall
        # give equal files.
        config["target_modules"] = sorted(config["target_modules"])
        # Loaders switch dropout on when they put adapters on a network: it would be at work when pictures are drawn.
        config["lora_dropout"] = 0.0
        metadata |= {f"{name}.{key}": value for key, value in config.items()}
        # transformers 5 dropped this level of CLIP's names; with it, older versions find the layers as well.
        level = "text_model." if name == "text_encoder" and not hasattr(model, "text_model") else ""
        weights |= {f"{name}.{level}{key}": value.float().contiguous() for key, value in tensors(model).items()}
    header = {"lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}
    safetensors.torch.save_file(weights, path, header)


def load(path: Path, models: dict[str, nn.Module]) -> None:
    """Read what `save` wrote into the adapters of the same models.

    Raises:
        UserError: The file's tensors are not those of the adapters.
    """
    state = safetensors.torch.load_file(path)
    for name, model in models.items():
        weights = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not hasattr(model, "text_model"):
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        if weights.keys() != tensors(model).keys():
            raise UserError(f"{path} holds other layers of the {name} than this run adapts.")
        peft.set_peft_model_state_dict(model, weights)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return an adapter's tensors under peft's own keys."""
    # Otherwise peft looks for the base model's files, to find out whether its vocabulary was changed.
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)
