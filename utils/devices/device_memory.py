"""The memory of devices: how much was used, giving it back, and what running out of it looks like."""

import contextlib
import ctypes
import gc
import logging
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that was in use so far, in 10^9 bytes: the device's, or on a CPU the process's."""
    found = most_resident_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    return found / 1e9


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


def free_memory() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        # It keeps what was freed between other pieces, often a third of what a VAE needed, unless it is told.
        ctypes.CDLL(None).malloc_trim(0)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


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
