"""Predict the seconds of an operation, from the speed of multiplications and of memory measured on this device.

An operation takes as long as its multiplications or as its memory traffic, whichever is longer.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
ATTENTION, ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def count_flops(packet: Any, given: tuple, kwargs: dict, out: Any) -> tuple[str | None, int]:
    """Return of what kind an operation is, and how many products and sums it does; (None, 0) if it is neither."""
    if packet is ATTENTION:
        return "attention", sdpa_flop_count(*(one.shape for one in given[:3]))
    if packet is ATTENTION_BACKWARD:
        return "attention", sdpa_backward_flop_count(*(one.shape for one in given[:4]))
    if packet not in flop_registry:
        return None, 0
    kind = {aten.convolution: "convolution", aten.convolution_backward: "convolution backward"}.get(packet, "product")
    return kind, flop_registry[packet](*given, **kwargs, out_val=out)


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a device is, as measured."""

    flops: dict[tuple[str, torch.dtype], float]  # a second, by kind and dtype
    traffic: float  # bytes a second
    overhead: float  # seconds of an operation that does nothing

    def seconds(self, kind: str | None, dtype: torch.dtype, flops: int, moved: int) -> float:
        """Return how long an operation takes that does so much and reads and writes so many bytes."""
        rate = self.flops.get((kind, dtype)) or self.flops.get((kind, torch.float32), math.inf)
        return max(flops / rate, moved / self.traffic, self.overhead)


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> Rates:
    """Measure in about a second how fast a device is."""
    side, channels, edge = (1024, 256, 32) if device.type == "cpu" else (4096, 512, 64)
    found = {}
    for dtype in dict.fromkeys(dtypes):
        square = torch.ones(side, side, device=device, dtype=dtype)
        picture = torch.ones(1, channels, edge, edge, device=device, dtype=dtype)
        filters = torch.ones(channels, channels, 3, 3, device=device, dtype=dtype)
        heads = torch.ones(1, 8, side, 64, device=device, dtype=dtype)
        options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        calls = {
            "product": (torch.mm, (square, square), 2 * side**3),
            "convolution": (F.conv2d, (picture, filters, None, 1, 1), 18 * channels**2 * edge**2),
            "convolution backward": (
                aten.convolution_backward,
                (picture, picture, filters, None, *options, [True, True, False]),
                36 * channels**2 * edge**2,
            ),
            "attention": (F.scaled_dot_product_attention, (heads, heads, heads), 4 * 8 * 64 * side**2),
        }
        found |= {(kind, dtype): count / time_of(*call, device) for kind, (*call, count) in calls.items()}
    long, short = (torch.ones(count, device=device) for count in (2**24, 1))
    return Rates(
        found, 2 * long.nbytes / time_of(torch.add, (long, 1), device), time_of(torch.add, (short, 1), device)
    )


def time_of(function: Callable, arguments: tuple, device: torch.device, budget: float = 0.1) -> float:
    """Return the seconds of a call, the best of as many as fit into a budget of seconds, but of two at least."""
    best, began = math.inf, time.perf_counter()
    with torch.no_grad():
        function(*arguments)
        for count in range(1000):
            start = time.perf_counter()
            function(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
            if count and time.perf_counter() - began > budget:
                break
    return best
