"""Watch the steps of a training script on tensors without content: memory by what it is for, operations, time.

The networks are on the meta device, so their tensors have shapes but no content. A `MemoryTracker` sees every
operation, follows each tensor from its creation to its end, and counts multiplications.

Some memory exists only on real devices. Rules add it, and each rule was measured by itself (torch 2.13):

- autocast casts, fused attention needs no matrix of all pairs, AdamW steps on all weights together on some GPUs;
- on CPUs, oneDNN computes convolutions on copies, and the C library keeps holes between freed tensors.

What cuDNN and cuBLAS take for themselves, previews and class images are not counted.
"""

import contextlib
import dataclasses
import functools
import platform
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from utils.memory.speed_model import Rates, count_flops
from utils.optim.optimizers import FUSED_ON

aten, META = torch.ops.aten, torch.device("meta")
WEIGHTS, FROZEN, GRADIENTS, STATE, REST, COPIES = (
    "weights that train", "frozen weights", "gradients", "optimizer", "activations", "copies for oneDNN"
)  # fmt: skip
# What autocast computes in half precision, and in float32 though it is given half precision.
HALF = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.baddbmm, torch.addmm}
HALF |= {getattr(place, name) for place in (torch, Tensor) for name in ("matmul", "bmm", "mm")}
HALF |= {Tensor.__matmul__, Tensor.__rmatmul__, Tensor.baddbmm, torch.conv2d}
FLOAT_ON_CPU = {F.mse_loss}
FLOAT_ON_GPU = {F.mse_loss, F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp}
FLOAT_ON_GPU |= {torch.cumsum, Tensor.pow, torch.pow, torch.sum, Tensor.sum, F.softplus, torch.group_norm}
HOLES = "freed, but kept by the C library"
# glibc gives larger pieces pages of their own, returned at once. The smaller ones leave holes: twice what passes
# through a step at most stays in memory, or half of it on top of all else (15 configurations of three networks).
LARGEST_IN_HEAP = 32 * 2**20
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)


@dataclasses.dataclass
class Costs:
    """What was tracked, memory in bytes."""

    memory: dict[str, int]  # at the peak, by what it is for
    phase: str  # in which the peak was
    flops: int  # of a micro-step
    seconds: tuple[float, float]  # of a micro-step, and of the optimizer

    @property
    def peak(self) -> int:
        """The most that all tensors take together."""
        return sum(self.memory.values())


class MemoryTracker(TorchDispatchMode):
    """Watches steps that compute nothing; stands where accelerate's `Accelerator` stands in a real run.

    Attributes:
        device: Where tensors are put, the meta device.
    """

    def __init__(self, kind: str, precision: str, processes: int = 1, rates: Rates | None = None):
        """Track for a kind of device ("cpu", "cuda", …) and a mixed precision ("no", "bf16", "fp16")."""
        super().__init__()
        self.kind, self.mixed_precision, self.device = kind, precision, META
        self.is_main_process = self.is_local_main_process = True
        self.process_index, self.num_processes = 0, processes
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.functions, self.cast_depth, self.casts = _Functions(self), 0, {}
        self.followed, self.live, self.true_counts = {}, Counter(), {}
        self.mapped, self.passing, self.most_passing = 0, 0, 0
        self.phase, self.peak, self.at_peak, self.peak_phase = "", 0, {}, ""
        self.heap = 0  # of the peak, what is in no mapped file
        self.in_optimizer, self.flops, self.seconds, self.optimizer_seconds = False, 0, 0.0, 0.0
        self.rates, self.micro_steps = rates, 0

    # Standing in for the accelerator.

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in mixed precision, as autocast would."""
        self.cast_depth += 1
        try:
            yield
        finally:
            self.cast_depth -= 1
            if not self.cast_depth:
                self.casts.clear()

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return a network itself."""
        return model

    def clip_grad_norm_(self, weights: Iterable[Tensor], longest: float) -> Tensor:
        """Return the length of the gradient, and shorten it."""
        return nn.utils.clip_grad_norm_(weights, longest)

    def wrap(self, networks: Iterable[nn.Module]) -> None:
        """Let networks run under autocast and put out float32, as `Accelerator.prepare` does."""
        for network in networks if self.half else ():
            network.forward = convert_outputs_to_fp32(functools.partial(self._forward, network.forward))

    def _forward(self, forward: Callable, *given, **kwargs) -> Any:
        """Run a network's forward under autocast."""
        with self.autocast():
            return forward(*given, **kwargs)

    # Watching.

    @contextlib.contextmanager
    def watching(self, phase: str, networks: Iterable[nn.Module | None] = ()) -> Iterator[None]:
        """Watch a phase of the run that begins with these networks in memory."""
        self.phase, self.flops, self.seconds, self.micro_steps = phase, 0, 0.0, 0
        hooks = [register_optimizer_step_pre_hook(self._before_step)]
        hooks.append(register_optimizer_step_post_hook(self._after_step))
        for network in filter(None, networks):
            self._add(network)
        try:
            with self.functions, self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, network: nn.Module) -> None:
        """Count the weights of a network, and from here on their gradients."""
        for weight in network.parameters():
            self._follow(weight, WEIGHTS if weight.requires_grad else FROZEN)
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._after_gradient)
        for buffer in network.buffers():
            self._follow(buffer, FROZEN)
        # A file is mapped into memory while its weights are converted.
        numbers = sum(weight.numel() for weight in network.parameters() if weight.dtype is not torch.float32)
        self._note_peak(4 * numbers if self.kind == "cpu" else 0)

    def _after_gradient(self, weight: Tensor) -> None:
        """Count a gradient as a gradient."""
        if weight.grad is not None:
            self._rename(weight.grad, GRADIENTS)

    def count_as_weight(self, _group: dict, weight: Tensor) -> None:
        """Count as a weight what took the place of a weight."""
        self._rename(weight, WEIGHTS)

    def _before_step(self, optimizer: Any, *_) -> None:
        """Count the time of the optimizer apart."""
        self.in_optimizer, self.optimizer_seconds = True, 0.0
        for group in optimizer.param_groups:
            # Without a fused kernel, torch takes all weights together on GPUs and one by one on CPUs.
            if (
                self.kind not in FUSED_ON
                and "foreach" in group
                and group["foreach"] is None
                and not group.get("fused")
            ):
                group["foreach"] = True

    def _after_step(self, optimizer: Any, *_) -> None:
        """Count what the optimizer keeps as its state."""
        self.in_optimizer = False
        # Of a fused backward pass, each step is one weight's: to look through all states each time takes much longer.
        stepped = [state for weight, state in optimizer.state.items() if weight.grad is not None]
        for tensor in tree_leaves(stepped):
            if isinstance(tensor, Tensor):
                self._rename(tensor, STATE)

    def __torch_dispatch__(self, func, types, given=(), kwargs=None):
        """Do one operation and count what it costs."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense and given[0].is_meta:
            return torch.zeros((), dtype=given[0].dtype).item()  # an unknown value counts as 0 or false
        if packet is aten.index and (found := self._true_places(*given)) is not None:
            given = (given[0], found)
        out = func(*given, **kwargs)
        if packet is aten._to_copy and given[0].dtype is torch.bool and not given[0].is_meta:
            self.true_counts[id(out.untyped_storage())] = int(given[0].sum())
        outputs = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if not any(tensor.is_meta for tensor in outputs):
            return out
        if not func.is_view and packet is not aten.detach:
            for tensor in outputs:
                self._follow(tensor, REST)
            self._note_peak(self._copies(packet, given, outputs))
            self._time(packet, given, kwargs, out)
        return out

    def _true_places(self, tensor: Tensor, indices: list) -> list | None:
        """Return indices in place of a mask without content, if the number of its true values is known."""
        if len(indices) != 1 or indices[0].dtype is not torch.bool or not indices[0].is_meta:
            return None
        count = self.true_counts.get(id(indices[0].untyped_storage()), len(indices[0]))
        return [torch.zeros(count, dtype=torch.int64, device=META)]

    def _follow(self, tensor: Tensor, what: str) -> None:
        """Follow a tensor's memory until it is freed; do nothing if it is followed already."""
        storage = tensor.untyped_storage()
        if id(storage) in self.followed or not storage.nbytes():
            return
        key, size = id(storage), self._rounded(storage.nbytes())
        is_mapped = what in (WEIGHTS, FROZEN) and tensor.dtype is torch.float32  # from the file
        passes = what is REST and size <= LARGEST_IN_HEAP and not self.in_optimizer  # whose state stays
        self.mapped += size if is_mapped else 0
        self.passing += size if passes else 0
        reference = weakref.ref(storage, functools.partial(self._forget, key))
        self.followed[key] = [reference, size, what, passes, is_mapped]
        self.live[what] += size

    def _forget(self, key: int, _reference: weakref.ref) -> None:
        """Count memory as free."""
        _, size, what, passes, is_mapped = self.followed.pop(key)
        self.true_counts.pop(key, None)
        self.live[what] -= size
        self.mapped -= size if is_mapped else 0
        self.passing -= size if passes else 0

    def _rename(self, tensor: Tensor, what: str) -> None:
        """Change what a tensor is for."""
        entry = self.followed.get(id(tensor.untyped_storage()))
        if entry and entry[2] != what:
            self.live[entry[2]] -= entry[1]
            self.live[what] += entry[1]
            entry[2] = what

    def _rounded(self, size: int) -> int:
        """Return the bytes that a device allocates for a size."""
        return size if self.kind == "cpu" else -(-size // 512) * 512

    def _note_peak(self, more: int = 0) -> None:
        """Remember what is in use, plus so many bytes, if it is the peak."""
        self.most_passing = max(self.most_passing, self.passing + (more if more <= LARGEST_IN_HEAP else 0))
        total = sum(self.live.values()) + more
        if total >= self.peak:  # also if a later step, in which the optimizer has its state, needs as much
            self.peak, self.peak_phase, self.heap = total, self.phase, total - self.mapped
            self.at_peak = {**self.live, COPIES: more}

    def _holes(self) -> int:
        """Return the freed bytes that the C library does not give back, by a rule (see above)."""
        if self.kind != "cpu" or platform.libc_ver()[0] != "glibc":
            return 0
        return max(self.most_passing // 2, 2 * self.most_passing - self.heap)

    def _copies(self, packet: Any, given: tuple, outputs: list[Tensor]) -> int:
        """Return the bytes of a convolution's copies in the layout of oneDNN, on CPUs.

        A forward convolution copies its input, frees that copy, then copies its output. The gradient of the weights
        needs copies of both inputs at once.
        """
        if self.kind != "cpu" or packet not in CONVOLUTIONS:
            return 0
        first, second, weight = given[:3] if packet is aten.convolution_backward else (given[0], outputs[0], given[1])
        if packet is aten.convolution:  # those of one pixel are plain products
            return max(first.nbytes, second.nbytes) if weight.shape[2:].numel() > 1 else 0
        return first.nbytes + second.nbytes if given[-1][1] else max(first.nbytes, second.nbytes)

    def _time(self, packet: Any, given: tuple, kwargs: dict, out: Any) -> None:
        """Count the multiplications of an operation, and its seconds if the speeds are known."""
        kind, flops = count_flops(packet, given, kwargs, out)
        self.flops += flops
        if self.rates is None:
            return
        tensors = {id(one): one for one in tree_leaves((given, out)) if isinstance(one, Tensor)}.values()
        moved = sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in tensors)
        dtype = next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)
        seconds = self.rates.seconds(kind, dtype, flops, moved)
        if self.in_optimizer:
            self.optimizer_seconds += seconds
        else:
            self.seconds += seconds

    def costs(self) -> Costs:
        """Return what was counted."""
        memory = {what: size for what, size in (self.at_peak | {HOLES: self._holes()}).items() if size > 0}
        micro_steps = max(self.micro_steps, 1)
        seconds = (self.seconds / micro_steps, self.optimizer_seconds)
        return Costs(memory, self.peak_phase, self.flops // micro_steps, seconds)


class _Functions(DeviceContext):
    """Does what happens above the level of operations: the casts of autocast, and fused attention.

    It is a `DeviceContext` because gradient checkpointing enters those again when it repeats the forward pass.
    """

    __enter__, __exit__ = TorchFunctionMode.__enter__, TorchFunctionMode.__exit__

    def __init__(self, tracker: MemoryTracker):
        """Serve a tracker."""
        super().__init__(META)
        self.tracker = tracker
        self.floats = FLOAT_ON_CPU if tracker.kind == "cpu" else FLOAT_ON_GPU

    def __torch_function__(self, func, types, given=(), kwargs=None):
        """Call a function as it runs on the device."""
        kwargs, tracker = kwargs or {}, self.tracker
        if func is Tensor.backward:
            tracker.micro_steps += 1
            with tracker.autocast():  # under which gradient checkpointing computes forward again
                return func(*given, **kwargs)
        if tracker.cast_depth and tracker.half and func in HALF:
            given, kwargs = tree_map(functools.partial(self.cast, tracker.half), (given, kwargs))
        elif tracker.cast_depth and tracker.half and func in self.floats and not is_kept_in_bf16(func, kwargs):
            given, kwargs = tree_map(functools.partial(self.cast, torch.float32), (given, kwargs))
        if func is F.scaled_dot_product_attention and given[0].is_meta:
            return attend(*given, **kwargs)
        return func(*given, **kwargs)

    def cast(self, dtype: torch.dtype, value: Any) -> Any:
        """Return a float tensor in a dtype. Cast each weight that trains only once."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        is_weight = value.is_leaf and value.requires_grad and dtype is self.tracker.half
        if not is_weight or not torch.is_grad_enabled():
            return value.to(dtype)
        casts = self.tracker.casts
        if id(value) not in casts:
            casts[id(value)] = value.to(dtype)
        return casts[id(value)]


def is_kept_in_bf16(func: Callable, kwargs: dict) -> bool:
    """Tell whether a function is a norm that the scripts compute in bf16, by `keep_norms_in_bf16`."""
    weight = kwargs.get("weight") if func in (F.group_norm, F.layer_norm) else None
    return weight is not None and weight.dtype is torch.bfloat16


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as fused kernels do, without the matrix of all pairs in memory. The arguments are those of torch."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    options = {"attn_mask": attn_mask, "scale": scale}
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, **options)[0]
