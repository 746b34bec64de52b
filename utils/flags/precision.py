"""The precision of arithmetic: what is asked for, and what this machine can compute in."""

import os
from typing import Any

import torch

from utils.flags.flag_checks import is_given, is_installed, messages_if

EIGHT_BIT = (
    *("use_8bit_adam", "optimizer adamw8bit", "text_encoder_precision int8"),
    *("base_model_precision int8", "base_model_precision nf4"),
)


def has_accelerator() -> bool:
    """Say whether training will run on a GPU or the like, as `accelerate` will decide it."""
    told_to_use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return torch.accelerator.is_available() and not told_to_use_cpu


def set_determinism_and_tf32(deterministic: bool, allow_tf32: bool) -> None:
    """Choose between exact repetition and speed on GPUs; must come before CUDA starts."""
    if deterministic:
        # cuBLAS reads this once, when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True


def precision_of(flags: dict[str, Any]) -> str:
    """Return the precision of arithmetic, by --mixed_precision or as accelerate is set."""
    return flags["mixed_precision"] or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def find_precision_problems(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag whose precision this machine cannot compute in."""
    asked = {"mixed_precision": precision_of(flags)}
    asked |= {name: flags[name] for name in ("prior_generation_precision", "text_encoder_precision")}
    fp16 = [f"--{name} fp16" for name, precision in asked.items() if precision == "fp16" and not has_accelerator()]
    missing = [f"--{words}" for words in EIGHT_BIT if is_given(flags, words) and not is_installed("bitsandbytes")]
    sentences = [f"{flag} needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16." for flag in fp16]
    sentences += [f"{flag} needs bitsandbytes: pip install bitsandbytes." for flag in missing]
    if asked["mixed_precision"] not in ("no", "fp32", "fp16", "bf16"):
        precision = asked["mixed_precision"]
        sentences.append(f"accelerate is set to {precision}: give --mixed_precision no, fp16 or bf16.")
    return sentences


def find_slow_arithmetic(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag that would make this machine's GPU compute faster, or about as exactly."""
    if not has_accelerator() or not torch.cuda.is_available():
        return []
    card, precision = torch.cuda.get_device_name(), precision_of(flags)
    is_ampere = torch.cuda.get_device_capability() >= (8, 0)
    exact = precision == "no" and not flags["allow_tf32"]
    return messages_if(
        (is_ampere and exact, f"{card} computes faster with --mixed_precision bf16, or in float32 with --allow_tf32."),
        (is_ampere and precision == "fp16", f"{card} knows bf16: as fast as fp16, and it does not overflow."),
        (not is_ampere and precision == "bf16", f"{card} computes slowly in bf16: use --mixed_precision fp16."),
    )
