"""What differs between devices: whether there is a GPU, how much memory was used, what running out looks like."""

import contextlib
import ctypes
import functools
import gc
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.flags.flag_checks import is_given, is_installed, messages_if
from utils.models.quantize import count_frozen

logger = logging.getLogger(__name__)

EIGHT_BIT = (
    *("use_8bit_adam", "optimizer adamw8bit", "text_encoder_precision int8"),
    *("base_model_precision int8", "base_model_precision nf4"),
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


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


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that was in use so far, in 10^9 bytes: the device's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return most_resident_bytes() / 1e9


def most_resident_bytes() -> int:
    """Return the most memory that this process had so far; 0 where no system call tells it."""
    status = Path("/proc/self/status")
    # Linux's `ru_maxrss` begins with what the process had that started this one, often a notebook with much in memory.
    if found := status.exists() and re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_parameters(*networks: nn.Module | None) -> tuple[float, float]:
    """Return how many million parameters train, and how many are frozen."""
    there = [network for network in networks if network is not None]
    trained = sum(weight.numel() for network in there for weight in network.parameters() if weight.requires_grad)
    return trained / 1e6, sum(map(count_frozen, there)) / 1e6


def free_memory() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        # It keeps what was freed between other pieces, often a third of what a VAE needed, unless it is told.
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


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


def keep_norms_in_bf16(network: nn.Module) -> None:
    """Let norms give bf16 if their weights are in bf16, so where the whole network is.

    Autocast would have GPUs give float32, of twice the size, to layers that go on in bf16. Kernels take means and
    deviations in float32 in any case. On CPUs, where autocast leaves norms alone, nothing changes.
    """
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and weight is not None and weight.dtype is torch.bfloat16:
            module.forward = functools.partial(call_without_autocast, module.forward)


def call_without_autocast(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Call a layer that has all its weights in bf16."""
    hidden = hidden.to(torch.bfloat16)
    if hidden.is_meta:  # for which there is no autocast
        return forward(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden)


@contextlib.contextmanager
def moved_to(device: torch.device, network: nn.Module | None) -> Iterator[None]:
    """Have a network on a device for as long as the context lasts, and then where it was."""
    place = None if network is None else next(network.parameters()).device
    if place in (None, device):
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to(place)


@contextlib.contextmanager
def skip_if_out_of_memory(what: str) -> Iterator[None]:
    """Make running out of memory a warning that `what` did so, and give back what memory is not used."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("%s ran out of memory; the run goes on. %s", what, error)
    finally:
        free_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on any device."""
    text = str(error).strip()
    # oneDNN says the last of these where it has no memory, and more words than that where something else is wrong.
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or any(sign in text for sign in OUT_OF_MEMORY)
        or text == "could not create a primitive"
    )
