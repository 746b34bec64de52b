"""What makes networks faster, or smaller, and changes no weight: compiled blocks, checkpointing, norms in bf16."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

logger = logging.getLogger(__name__)

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")  # of diffusers, the outermost first
VARIANTS = 256  # of one block's code: by width, picture size, and whether gradients are recorded
# What torch's scaled_dot_product_attention comes down to, on one device or another. Its output is as small as its
# input, and it takes the most time of all that has no weights.
ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


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


def checkpoint_all_but_attention(module: nn.Module, *inputs: Any) -> Any:
    """Run a module of a network of diffusers, of which backward will compute all but attention again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, ATTENTION)
    return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=contexts)


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
