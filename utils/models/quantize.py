"""Frozen weights in fewer bits: linear layers and convolutions, which bitsandbytes' own modules leave as they are.

A layer's weights are stored as bfloat16, int8 or NF4 (arXiv 2305.14314), unpacked for the forward pass, and once more
for the backward pass: in between, autograd keeps the stored form alone. Weights never get a gradient; inputs do.

What is stored are parameters without gradient, so that networks are moved, copied and counted as ever, and since
`DistributedDataParallel` would send buffers around in each step. All but bfloat16's are integers, the bits of float32
numbers included: `network.to(torch.float16)` changes biases and norms, and leaves what cannot bear it.

Letters: B batch, C channels, H and W height and width.
"""

import importlib
import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BASE_PRECISIONS = ("no_change", "bf16", "int8", "nf4")

# Smaller layers stay as they are, and those between pictures and features: they hold little, and what is wrong in the
# last one is wrong in the prediction.
FEWEST_WEIGHTS, FEWEST_CHANNELS = 4096, 16
BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales of NF4 that share one themselves
LEVELS = 256  # values of a byte
COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16)


def quantize_layers(network: nn.Module, precision: str, device: torch.device) -> None:
    """Store the frozen weights of the layers inside a network in fewer bits, and move all of it to a device.

    Layers are moved one by one, quantized there, and let go, so the device never holds the network as it was. Adapters
    must be there already; they, trainable weights, norms, embeddings, biases and small layers stay as they are.

    Args:
        network: Best on the CPU; or on "meta", without weights, if the device is that as well.
        precision: One of `BASE_PRECISIONS`.

    Raises:
        ImportError: int8 and nf4 need bitsandbytes.
        ValueError: There is no such precision.
    """
    if precision not in BASE_PRECISIONS:
        raise ValueError(f"{precision!r} is none of the precisions {', '.join(BASE_PRECISIONS)}.")
    if precision in ("int8", "nf4"):
        _register_kernels(precision)
    layers = {} if precision == "no_change" else _find_layers(network)
    leaves_a_file = bool(layers) and device.type == "cpu"
    while layers:
        layer, paths = layers.popitem()
        quantized = KINDS[type(layer)](layer, precision, device)
        for path in paths:
            network.set_submodule(path, quantized)
        del layer  # the last that holds it
    network.to(device)
    for tensor in [*network.parameters(), *network.buffers()] if leaves_a_file else ():
        # One weight that still lies in the file from which it was read would keep all of that file in memory.
        tensor.data = tensor.data.clone()


def stored_bytes(network: nn.Module) -> int:
    """Return how many bytes a network's frozen weights take as they are stored, scales included."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)


def count_frozen(network: nn.Module) -> int:
    """Return how many frozen weights a network has, each counted once, however it is stored."""
    layers = [module for module in network.modules() if isinstance(module, _FrozenLayer)]
    packed = sum(part.numel() for layer in layers for part in layer.stored if part is not None)
    frozen = sum(weight.numel() for weight in network.parameters() if not weight.requires_grad)
    return frozen - packed + sum(math.prod(layer.form.shape) for layer in layers)


class _Form(NamedTuple):
    """How a weight is stored, and what its layer does with it."""

    precision: str
    shape: tuple[int, ...]
    convolution: tuple | None  # stride, padding, dilation and groups; None: a linear layer


class _Stored(NamedTuple):
    """A weight of n numbers, filled up to whole blocks: 2 n bytes (bf16), 1.06 n (int8) or 0.52 n (nf4), and a KB."""

    weight: Tensor  # bf16: as it was; int8: a byte for each number; nf4: a byte for two
    constants: Tensor | None = None  # bits of the levels and, of int8, the scales; of nf4, their mean and own scales
    scales: Tensor | None = None  # nf4: a byte for each


class _FrozenLayer(nn.Module):
    """A layer with a frozen weight in fewer bits."""

    def __init__(self, layer: nn.Module, precision: str, device: torch.device):
        """Take over a layer: its bias as it is, its weight packed on the device."""
        super().__init__()
        for name in layer.__constants__:  # in_features and the like, which peft and others read
            setattr(self, name, getattr(layer, name))
        self.form = _Form(precision, tuple(layer.weight.shape), self._convolution())
        self.register_parameter("bias", layer.bias)  # first, because diffusers takes a network's dtype from the first
        stored = _pack(layer.weight.detach().to(device), precision)
        for name, part in stored._asdict().items():
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
        self.train(layer.training)

    @property
    def stored(self) -> _Stored:
        """Return the weight as it is stored."""
        return _Stored(self.weight, self.constants, self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the layer computes with, in its original shape."""
        return _unpack(self.stored, self.form, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the layer makes of its inputs, in autocast's dtype where that is on, else in the inputs' own.

        Args:
            inputs: (…, in_features), or (B, C, H, W) for a convolution; float32, bfloat16 or float16.

        Raises:
            TypeError: The inputs are something else, as when they were cast to the stored weight's dtype.
        """
        if inputs.dtype not in COMPUTABLE:
            raise TypeError(f"A quantized layer computes in 16 or 32 bits; its inputs are {inputs.dtype}.")
        kind = inputs.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return _FrozenProduct.apply(inputs, bias, self.form, *self.stored)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"{self.form.precision}, weight={self.form.shape}, bias={self.bias is not None}"

    def _convolution(self) -> tuple | None:
        """Return the options of the layer's convolution, if it is one."""
        return None


class QuantizedLinear(_FrozenLayer):
    """What `nn.Linear` computes, with a frozen weight in fewer bits."""


class QuantizedConv2d(_FrozenLayer):
    """What `nn.Conv2d` computes, with a frozen weight in fewer bits."""

    def __init__(self, layer: nn.Conv2d, precision: str, device: torch.device):
        """Take over a layer, and how it pads where `conv2d` does not do that itself."""
        super().__init__(layer, precision, device)
        self.edges = tuple(layer._reversed_padding_repeated_twice)  # as pad wants them, "same" and "valid" resolved

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the layer makes of its inputs, (B, C, H, W)."""
        if self._pads_apart():
            inputs = F.pad(inputs, self.edges, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return super().forward(inputs)

    def _convolution(self) -> tuple:
        """Return stride, padding, dilation and groups."""
        return self.stride, (0, 0) if self._pads_apart() else self.padding, self.dilation, self.groups

    def _pads_apart(self) -> bool:
        """Tell whether the inputs are padded before the convolution."""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)


KINDS = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}  # exactly these: others may use their weight directly


class _FrozenProduct(torch.autograd.Function):
    """The product of inputs and a stored weight, of which nothing unpacked outlives a pass."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor | None,
        form: _Form,
        weight: Tensor,
        constants: Tensor | None,
        scales: Tensor | None,
    ) -> Tensor:
        """Return the product, in the inputs' dtype; the last three are what is stored."""
        ctx.save_for_backward(weight, constants, scales)  # one by one, or torch.compile would miscount them
        ctx.form, ctx.size = form, inputs.shape
        weight = _unpack(_Stored(weight, constants, scales), form, inputs.dtype)
        if form.convolution is None:
            return F.linear(inputs, weight, bias)
        return F.conv2d(inputs, weight, bias, *form.convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient for the inputs and, if it trains, for the bias."""
        form, is_linear, inputs, bias = ctx.form, ctx.form.convolution is None, None, None
        if ctx.needs_input_grad[0]:
            weight = _unpack(_Stored(*ctx.saved_tensors), form, gradient.dtype)
            if is_linear:
                inputs = gradient @ weight
            else:
                inputs = torch.nn.grad.conv2d_input(ctx.size, weight, gradient, *form.convolution)
        if ctx.needs_input_grad[1]:
            bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if is_linear else gradient.sum((0, 2, 3))
        return inputs, bias, None, None, None, None


def _find_layers(network: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the layers that `quantize_layers` replaces, with their paths: some have two."""
    found = defaultdict(list)
    for path, module in network.named_modules(remove_duplicate=False):
        if path and _is_worthwhile(path, module):
            found[module].append(path)
    return dict(found)


def _is_worthwhile(path: str, module: nn.Module) -> bool:
    """Tell whether a module is a frozen layer of the base network that holds much."""
    if type(module) not in KINDS or module.weight.requires_grad or module.weight.numel() < FEWEST_WEIGHTS:
        return False
    is_adapter = any(name.startswith("lora_") for name in path.split("."))  # a frozen or switched off one
    channels = [getattr(module, name) for name in module.__constants__ if name.startswith(("in_", "out_"))]
    return not is_adapter and min(channels) >= FEWEST_CHANNELS


def _pack(weight: Tensor, precision: str) -> _Stored:
    """Store a weight of any shape, float32, bfloat16 or float16, on its device."""
    if precision == "bf16":
        return _Stored(weight.bfloat16())
    kernels, levels = torch.ops.bitsandbytes, _levels(weight.device)
    numbers = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK))
    if precision == "int8":
        codes, scales = kernels.quantize_blockwise(numbers, levels, BLOCK)
        return _Stored(codes, torch.cat([levels, scales]).view(torch.int32))
    codes, scales = kernels.quantize_4bit(numbers, BLOCK, "nf4", torch.uint8)
    mean = scales.mean()
    scale_codes, scales = kernels.quantize_blockwise(scales - mean, levels, SCALES_BLOCK)
    return _Stored(codes, torch.cat([levels, mean[None], scales]).view(torch.int32), scale_codes)


def _unpack(stored: _Stored, form: _Form, dtype: torch.dtype) -> Tensor:
    """Return a stored weight in its own shape."""
    if form.precision == "bf16":
        return stored.weight.to(dtype)
    kernels, codes = torch.ops.bitsandbytes, stored.weight
    levels, scales = stored.constants.view(torch.float32).tensor_split([LEVELS])
    if form.precision == "int8":
        numbers = kernels.dequantize_blockwise(codes, scales, levels, BLOCK, dtype)
    else:
        offsets = kernels.dequantize_blockwise(stored.scales, scales[1:], levels, SCALES_BLOCK, torch.float32)
        # A row per block: on CPUs, odd rows as those of 3x3 take a slow path, and one axis would come back as two.
        shape = [len(stored.scales), BLOCK]
        numbers = kernels.dequantize_4bit(codes, scales[0] + offsets, BLOCK, "nf4", shape, dtype)
    count = torch.Size(form.shape).numel()
    return numbers.flatten()[:count].view(form.shape)


def _levels(device: torch.device) -> Tensor:
    """Return what the values of a byte stand for, times a block's scale: (256,) float32 in [-1, 1].

    Even steps, with 0 among them and the last one twice: on weights they are wrong by 0.6 %, where bitsandbytes' own
    levels for optimizer states, dense around 0, are by 1 %.
    """
    return (torch.arange(LEVELS, dtype=torch.float32, device=device).clamp(max=LEVELS - 2) - 127) / 127


def _register_kernels(precision: str) -> None:
    """Make bitsandbytes' kernels known to torch; takes seconds.

    Raises:
        ImportError: It is not installed.
    """
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(f"Weights in {precision} need bitsandbytes: pip install bitsandbytes.") from error
