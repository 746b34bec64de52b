"""Optimizers by name: what they need and cannot do, updating one weight at a time, and loading their state."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from utils.flags.flag_checks import is_installed, messages_if
from utils.flags.precision import precision_of

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy")
NAMES = dict(zip(OPTIMIZERS, ("AdamW", "AdamW8bit", "Adafactor", "Prodigy"), strict=True))
# For each weight that trains, about. Adafactor keeps means over a weight's last two edges, which for a convolution of
# 3 x 3 are two thirds of its size: on these U-Nets it needs what AdamW does in 8 bits.
STATE_BYTES = dict(zip(OPTIMIZERS, (8, 2, 2, 16), strict=True))
FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def optimizer_of(flags: dict[str, Any]) -> str:
    """Return the optimizer's name among `OPTIMIZERS`."""
    return "adamw8bit" if flags["use_8bit_adam"] else flags["optimizer"]


def class_name(optimizer: Any) -> str:
    """Return the name of an optimizer's class, whatever accelerate and DeepSpeed have wrapped around it."""
    while inner := getattr(optimizer, "optimizer", None):
        optimizer = inner
    return type(optimizer).__name__


def find_optimizer_problems(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag of the optimizer that contradicts another or needs what is not there."""
    fused, name, rate = flags["fused_backward"], flags["optimizer"], flags["learning_rate"]
    is_prodigy, is_bf16, precision = name == "prodigy", flags["weight_dtype"] == "bf16", precision_of(flags)
    steps, longest, start = flags["gradient_accumulation_steps"], flags["max_grad_norm"], "--fused_backward"
    waits = f"{start} excludes --gradient_accumulation_steps {steps}: gradients are freed before the next micro-step."
    clips = f"{start} updates weights before the whole gradient is known: it needs --max_grad_norm 0, not {longest:g}."
    scales = f"{start} excludes fp16, whose scaler must see all gradients first. Use bf16."
    shares = f"{start} runs in one process: several add up their gradients before weights are updated."
    alone = "estimates one rate from all weights together, which excludes"
    low = f"--optimizer prodigy multiplies the rate that it finds by --learning_rate: give 1, not {rate:g}."
    own_rate = flags["text_encoder_lr"] not in (None, rate)
    missing = "--optimizer prodigy needs prodigyopt: pip install prodigyopt."
    return messages_if(
        (fused and steps > 1, waits),
        (fused and longest > 0, clips),
        (fused and precision == "fp16", scales),
        (fused and int(os.environ.get("WORLD_SIZE", 1)) > 1, shares),
        (
            is_bf16 and precision != "bf16",
            "--weight_dtype bf16 needs --mixed_precision bf16.",
        ),
        (flags["use_8bit_adam"] and name not in OPTIMIZERS[:2], f"--use_8bit_adam excludes --optimizer {name}."),
        (is_prodigy and fused, f"--optimizer prodigy {alone} --fused_backward."),
        (is_prodigy and is_bf16, f"--optimizer prodigy {alone} --weight_dtype bf16."),
        (is_prodigy and own_rate, f"--optimizer prodigy {alone} a --text_encoder_lr of its own."),
        (is_prodigy and rate < 0.01, low),
        (is_prodigy and not is_installed("prodigyopt"), missing),
    )


def has_fused_kernel(groups: list[dict]) -> bool:
    """Say whether torch can update the weights of these groups by one kernel."""
    weights = [weight for group in groups for weight in group["params"]]
    return all(weight.device.type in FUSED_ON and weight.is_floating_point() for weight in weights)


@contextlib.contextmanager
def narrowed_to(optimizer: Any, group: dict, weight: nn.Parameter) -> Iterator[None]:
    """Let an optimizer see one weight only, with the settings of its group as they are by then."""
    groups, optimizer.param_groups = optimizer.param_groups, [group | {"params": [weight]}]
    yield
    optimizer.param_groups = groups


def on_each_gradient(optimizer: Any, function: Callable[[dict, nn.Parameter], None]) -> None:
    """Have a function called with the group and the weight as soon as backward has a weight's gradient."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.register_post_accumulate_grad_hook(functools.partial(function, group))


def set_state(optimizer: Any, saved: dict) -> None:
    """Load an optimizer's state as it was saved.

    torch would round it to the precision of the weights, which is lower where they are kept in bf16.
    """
    optimizer.load_state_dict(saved)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                there = optimizer.state[weights[index]][name]
                if there.dtype != value.dtype:
                    optimizer.state[weights[index]][name] = value.to(there.device)
