"""Weights in bf16 that learn at small rates: updated in float32, and rounded up or down by chance."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DROPPED_BITS = 16  # of a float32 that bfloat16 lacks
AT_ONCE = 2**22  # values, so that little memory is needed beside them


def round_stochastically(values: Tensor) -> Tensor:
    """Return float32 values in bfloat16, each one of its two neighbours, so that their mean is the value.

    Rounding to the nearest loses every step that is smaller than half the distance between neighbours, 2^-9 of a
    weight; here such steps add up on average (arXiv 1502.02551, section 3.1). Draws from torch's default generator of
    the device.
    """
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    for place, part in zip(rounded.view(-1).split(AT_ONCE), values.reshape(-1).split(AT_ONCE), strict=True):
        noise = torch.randint(1 << DROPPED_BITS, part.shape, dtype=torch.int32, device=part.device)
        # The sign is a bit of its own, so noise adds to the magnitude; to infinity nothing may be added.
        noise = noise.masked_fill_(~part.isfinite(), 0).add_(part.view(torch.int32))
        place.copy_(noise.bitwise_right_shift_(DROPPED_BITS).bitwise_left_shift_(DROPPED_BITS).view(torch.float32))
    return rounded


@contextlib.contextmanager
def in_float32(optimizer: Any, weight: nn.Parameter) -> Iterator[nn.Parameter]:
    """Give a float32 stand-in of a weight, with its gradient and state, to be updated and then rounded stochastically.

    The weight itself must not change its dtype, not even for a while: torch would forget that data parallelism
    waits for its gradients, and each process would go on with its own. A weight that is float32 stands for itself.
    """
    if weight.dtype == torch.float32:
        yield weight
        return
    wide = nn.Parameter(weight.detach().float())
    wide.grad, weight.grad = weight.grad.float(), None
    if weight in optimizer.state:
        optimizer.state[wide] = optimizer.state.pop(weight)
    yield wide
    optimizer.state[weight] = optimizer.state.pop(wide, {})  # some optimizers keep none
    weight.data.copy_(round_stochastically(wide.detach()))
