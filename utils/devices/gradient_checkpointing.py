"""Gradient checkpointing that computes everything a second time but attention."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What torch's scaled_dot_product_attention comes down to, on one device or another. Its output is as small as its
# input, and it takes the most time of all that has no weights.
ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_all_but_attention(module: nn.Module, *inputs: Any) -> Any:
    """Run a module of a network of diffusers, of which backward will compute all but attention again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, ATTENTION)
    return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=contexts)
