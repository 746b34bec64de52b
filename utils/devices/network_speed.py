"""Compiling a U-Net block by block, so that blocks alike share what was compiled."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")  # of diffusers, the outermost first
VARIANTS = 256  # of one block's code: by width, picture size, and whether gradients are recorded


def compile_blocks(unet: nn.Module) -> int:
    """Compile the blocks that a U-Net repeats when they are first run, and return how many there are.

    A whole U-Net takes several times as long to compile, and breaks where hooks or checkpointing come in. Names of
    weights stay what they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    found = list_blocks(unet)
    for block in found:
        block.forward = functools.partial(_call_with_contiguous, torch.compile(block.forward))
    logger.info("%d blocks are compiled as they are first used: the first steps take minutes.", len(found))
    return len(found)


def _call_with_contiguous(compiled: Callable, *inputs: Any, **options: Any) -> Any:
    """Call a compiled function with its inputs laid out row by row.

    A U-Net hands pictures to its transformers as transposed views. Of these, torch 2.13 compiles layer norms whose
    gradients are wrong by some percent for one picture at a time on a CPU: it handles 16 rows at once, and keeps an
    intermediate result of the last one only.
    """
    inputs = [value.contiguous() if isinstance(value, Tensor) else value for value in inputs]
    return compiled(*inputs, **options)


def seconds_so_far() -> float:
    """Return how long this process has waited for code to be compiled, 0 if it never did."""
    # Importing it would load the compiler.
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.calculate_time_spent()["total_wall_time"] if utils else 0.0


def list_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network that are not inside another one."""
    if type(network).__name__ in BLOCKS:
        return [network]
    return [block for child in network.children() for block in list_blocks(child)]
