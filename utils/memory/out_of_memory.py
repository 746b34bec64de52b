"""Running out of memory: how much was in use at most, and which flags would lower that, those that save most first."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from utils.core.errors import UserError
from utils.devices.device_memory import is_out_of_memory, peak_memory_gb
from utils.memory.savings import WORTHWHILE, list_changes
from utils.optim.optimizers import STATE_BYTES, optimizer_of

# Shares of the activations' memory, measured on Stable Diffusion 1.5's U-Net with adapters, 256 px, batches of 1 to 4.
SAVED_BY_CHECKPOINTING = 0.7
SAVED_BY_HALF_PRECISION = 0.35
SAVED_BY_NF4 = 0.7  # of frozen weights in bf16, norms and small layers included


class Saving(NamedTuple):
    """A change of the command, and what it would save in 10^9 bytes; None if that is not known."""

    change: str
    gigabytes: float | None


@contextlib.contextmanager
def explain_out_of_memory(accelerator: Accelerator, flags: dict[str, Any]) -> Iterator[weakref.WeakSet]:
    """Turn running out of memory into an UserError with the peak and the flags that would lower it.

    Yields:
        A set for the networks of training, to be filled once they are loaded; it keeps none of them in memory.
    """
    networks, flags = weakref.WeakSet(), flags | {"mixed_precision": accelerator.mixed_precision}
    try:
        yield networks
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak, loaded = peak_memory_gb(accelerator.device), list(networks)
        savings = find_savings(flags, loaded, peak) if loaded else find_early_savings(flags)
        lines = [f"  {change}" + (f" (about {gain:.1f} GB)" if gain else "") for change, gain in savings]
        advice = ["To use less memory, try (largest saving first):", *lines] if lines else ["Use a larger device."]
        head = f"Memory ran out on {accelerator.device}: at most {peak:.1f} GB were in use."
        raise UserError("\n".join([head, *advice, f"Original error: {str(error).strip()}"])) from error


def find_savings(flags: dict[str, Any], networks: Iterable[nn.Module], peak: float) -> list[Saving]:
    """Return the changes of flags that would lower the memory of training, the largest saving first.

    What is not weights or gradients is taken for activations, which grow with the batch.

    Args:
        networks: Those on the device.
        peak: Memory in use at most, in 10^9 bytes.
    """
    weights = [parameter for network in networks for parameter in network.parameters()]
    held = [tensor for weight in weights for tensor in (weight, weight.grad) if tensor is not None]
    activations = max(peak - sum(tensor.nbytes for tensor in held) / 1e9, 0)
    encoders = [network for network in networks if isinstance(network, PreTrainedModel)]
    trained, encoder_trained = count_trained(networks), count_trained(encoders)
    adapted = [n for n in networks if n not in encoders and any(weight.requires_grad for weight in n.parameters())]
    state, small = STATE_BYTES[optimizer_of(flags)], STATE_BYTES["adamw8bit"]
    is_stored_whole = flags.get("base_model_precision") == "no_change"
    gains = {
        "--gradient_checkpointing": SAVED_BY_CHECKPOINTING * activations,
        "--train_batch_size": (1 - 1 / flags["train_batch_size"]) * activations,
        "--mixed_precision": SAVED_BY_HALF_PRECISION * activations + count_frozen_gb(networks) / 2,
        "--optimizer": (state - small) * trained,
        "--fused_backward": 4 * trained,
        "--base_model_precision": SAVED_BY_NF4 * count_frozen_gb(adapted) * is_stored_whole,
        "--no-train_text_encoder": (4 + state) * encoder_trained,
        "--pre_compute_text_embeddings": 0 if encoder_trained else count_frozen_gb(encoders),
    }
    found = [(change, gains.get(change.split()[0], 0)) for change, _ in list_changes(flags)]
    if any(all(weight.requires_grad for weight in network.parameters()) for network in networks):
        found.append(("train_dreambooth_lora.py", (4 + state) * trained))
    found.append(("a --resolution of half the edge", 0.75 * activations))
    savings = [Saving(change, gain) for change, gain in found if gain > WORTHWHILE * peak]
    return sorted(savings, key=lambda saving: -saving.gigabytes)


def count_frozen_gb(networks: Iterable[nn.Module]) -> float:
    """Return the size of the weights that do not train, in 10^9 bytes."""
    weights = [weight for network in networks for weight in network.parameters()]
    return sum(weight.nbytes for weight in weights if not weight.requires_grad) / 1e9


def count_trained(networks: Iterable[nn.Module]) -> float:
    """Return how many weights train, in 10^9."""
    weights = [weight for network in networks for weight in network.parameters()]
    return sum(weight.numel() for weight in weights if weight.requires_grad) / 1e9


def find_early_savings(flags: dict[str, Any]) -> list[Saving]:
    """Return the changes of flags that would lower the memory of what comes before training."""
    found = [
        ("--text_encoder_precision int8, if it is T5 that was loaded", flags["text_encoder_precision"] != "int8"),
        ("--sample_batch_size 1, if class images were drawn", flags["sample_batch_size"] > 1),
        (
            "--prior_generation_precision bf16, for the same",
            flags["prior_generation_precision"] in (None, "fp32", "no"),
        ),
        ("--mixed_precision bf16, if networks were loaded", flags["mixed_precision"] == "no"),
    ]
    return [Saving(change, None) for change, holds in found if holds]
