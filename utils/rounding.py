"""Weights in bf16 that learn at small rates: updated in float32, and rounded up or down by chance."""

import contextlib
from collections.abc import Iterator

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
    for place, part in zip(rounded.view(-1).split(AT_ONCE), values.reshape(-1).split(AT_ONCE)):
        noise = torch.randint(1 << DROPPED_BITS, part.shape, dtype=torch.int32, device=part.device)
        # The sign is a bit of its own, so noise adds to the magnitude; to infinity nothing may be added.
        noise = noise.masked_fill_(~part.isfinite(), 0).add_(part.view(torch.int32))
        place.copy_(noise.bitwise_right_shift_(DROPPED_BITS).bitwise_left_shift_(DROPPED_BITS).view(torch.float32))
    return rounded


@contextlib.contextmanager
def in_float32(weight: nn.Parameter) -> Iterator[None]:
    """Let a weight and its gradient be float32, and round it stochastically when the context ends.

    A weight that is float32 anyway stays what it is.
    """
    if weight.dtype == torch.float32:
        yield
        return
    gradient, weight.grad = weight.grad.float(), None  # which must have the dtype of its weight
    weight.data = weight.data.float()
    weight.grad = gradient
    yield
    weight.grad = None
    weight.data = round_stochastically(weight.data)
