"""What training will cost, before any weight is read: memory by what it is for, and seconds a step.

A `MemoryTracker` goes through a script's own steps with networks on the meta device: their tensors have shapes, but no
content. It watches every operation, follows each tensor from its making to its end, and counts products.

What real devices do and tensors without content do not is added by rules, each measured by itself (torch 2.13):
autocast's casts, fused attention, AdamW's way of stepping on GPUs, and on CPUs the copies in which oneDNN computes
convolutions, and the holes that the C library leaves between freed tensors. Not counted are what cuDNN and cuBLAS take
for themselves, previews and class images.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import math
import os
import platform
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from utils.core.errors import UserError
from utils.devices.device_memory import peak_memory_gb
from utils.flags.flag_checks import is_given, is_installed
from utils.flags.precision import EIGHT_BIT
from utils.memory.savings import WORTHWHILE, list_changes
from utils.optim.optimizers import FUSED_ON

logger = logging.getLogger(__name__)

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
ATTENTION, ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
HOLES, PROCESS = "freed, but kept by the C library", "Python and its libraries"
# glibc gives larger pieces pages of their own, returned at once. The smaller ones leave holes: twice what passes
# through a step at most stays in memory, or half of it on top of all else (15 configurations of three networks).
LARGEST_IN_HEAP = 32 * 2**20
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)


@dataclasses.dataclass
class Costs:
    """What a rehearsal found, memory in bytes."""

    memory: dict[str, int]  # at the peak, by what it is for
    phase: str  # in which the peak was
    phases: dict[str, int]  # the peak of each
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

    def __init__(self, kind: str, precision: str, processes: int = 1, rates: "Rates | None" = None):
        """Rehearse for a kind of device ("cpu", "cuda", …) and a mixed precision ("no", "bf16", "fp16")."""
        super().__init__()
        self.kind, self.mixed_precision, self.num_processes, self.device = kind, precision, processes, META
        self.is_main_process = self.is_local_main_process = True
        self.process_index, self.num_processes = 0, processes
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.functions, self.cast_depth, self.casts = _Functions(self), 0, {}
        self.held, self.live, self.true_counts = {}, Counter(), {}
        self.mapped, self.passing, self.most_passing = 0, 0, 0
        self.phase, self.phases, self.peak, self.at_peak, self.peak_phase = "", {}, 0, {}, ""
        self.heap = 0  # of the peak, what is in no mapped file
        self.in_optimizer, self.flops, self.seconds, self.optimizer_seconds = False, 0, 0.0, 0.0
        self.rates, self.micro_steps, self.packets = rates, 0, Counter()

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
        """Watch a phase of the run, from the moment on at which some networks have been loaded for it."""
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
            self._hold(weight, WEIGHTS if weight.requires_grad else FROZEN)
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._after_gradient)
        for buffer in network.buffers():
            self._hold(buffer, FROZEN)
        # A file is mapped into memory while its weights are converted.
        numbers = sum(weight.numel() for weight in network.parameters() if weight.dtype is not torch.float32)
        self._look(4 * numbers if self.kind == "cpu" else 0)

    def _after_gradient(self, weight: Tensor) -> None:
        """Call a gradient one."""
        if weight.grad is not None:
            self._rename(weight.grad, GRADIENTS)

    def recognise(self, _group: dict, weight: Tensor) -> None:
        """Call a weight one that was put in another's place."""
        self._rename(weight, WEIGHTS)

    def _before_step(self, optimizer: Any, *_) -> None:
        """Count what the optimizer does apart."""
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
        """Call what the optimizer keeps its state."""
        self.in_optimizer = False
        # Of a fused backward pass, each step is one weight's: to look through all states each time takes much longer.
        stepped = [state for weight, state in optimizer.state.items() if weight.grad is not None]
        for tensor in tree_leaves(stepped):
            if isinstance(tensor, Tensor):
                self._rename(tensor, STATE)

    def __torch_dispatch__(self, func, types, given=(), kwargs=None):
        """Do one operation, and write down what it costs."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense and given[0].is_meta:
            return torch.zeros((), dtype=given[0].dtype).item()  # what is not known counts as 0 and as false
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
                self._hold(tensor, REST)
            self._look(self._copies(packet, given, outputs))
            self._time(packet, given, kwargs, out)
        return out

    def _true_places(self, tensor: Tensor, indices: list) -> list | None:
        """Return places in the stead of a mask without content, if it is known how many are true."""
        if len(indices) != 1 or indices[0].dtype is not torch.bool or not indices[0].is_meta:
            return None
        count = self.true_counts.get(id(indices[0].untyped_storage()), len(indices[0]))
        return [torch.zeros(count, dtype=torch.int64, device=META)]

    def _hold(self, tensor: Tensor, what: str) -> None:
        """Follow a tensor's memory until its end, unless it is followed."""
        storage = tensor.untyped_storage()
        if id(storage) in self.held or not storage.nbytes():
            return
        key, size = id(storage), self._rounded(storage.nbytes())
        is_mapped = what in (WEIGHTS, FROZEN) and tensor.dtype is torch.float32  # from the file
        passes = what is REST and size <= LARGEST_IN_HEAP and not self.in_optimizer  # whose state stays
        self.mapped += size if is_mapped else 0
        self.passing += size if passes else 0
        self.held[key] = [weakref.ref(storage, functools.partial(self._let_go, key)), size, what, passes, is_mapped]
        self.live[what] += size

    def _let_go(self, key: int, _reference: weakref.ref) -> None:
        """Count memory as free."""
        _, size, what, passes, is_mapped = self.held.pop(key)
        self.true_counts.pop(key, None)
        self.live[what] -= size
        self.mapped -= size if is_mapped else 0
        self.passing -= size if passes else 0

    def _rename(self, tensor: Tensor, what: str) -> None:
        """Say what a tensor is for, now that it is known."""
        entry = self.held.get(id(tensor.untyped_storage()))
        if entry and entry[2] != what:
            self.live[entry[2]] -= entry[1]
            self.live[what] += entry[1]
            entry[2] = what

    def _rounded(self, size: int) -> int:
        """Return what a device takes for a size."""
        return size if self.kind == "cpu" else -(-size // 512) * 512

    def _look(self, more: int = 0) -> None:
        """Remember the state, with so many bytes more, if more is in use than ever."""
        self.most_passing = max(self.most_passing, self.passing + (more if more <= LARGEST_IN_HEAP else 0))
        total = sum(self.live.values()) + more
        self.phases[self.phase] = max(total, self.phases.get(self.phase, 0))
        if total >= self.peak:  # also if a later step, in which the optimizer has its state, needs as much
            self.peak, self.peak_phase, self.heap = total, self.phase, total - self.mapped
            self.at_peak = {**self.live, COPIES: more}

    def _holes(self) -> int:
        """Return the bytes that the C library keeps from the system between what is in use, by a rule (see above)."""
        if self.kind != "cpu" or platform.libc_ver()[0] != "glibc":
            return 0
        return max(self.most_passing // 2, 2 * self.most_passing - self.heap)

    def _copies(self, packet: Any, given: tuple, outputs: list[Tensor]) -> int:
        """Return the bytes of the copies, in oneDNN's own layout, that a CPU computes a convolution with.

        Beside what it makes, a convolution has copies of what it is given and of what it makes, first the one, then
        the other; for the gradient of its weights, copies of both of its inputs.
        """
        if self.kind != "cpu" or packet not in CONVOLUTIONS:
            return 0
        first, second, weight = given[:3] if packet is aten.convolution_backward else (given[0], outputs[0], given[1])
        if packet is aten.convolution:  # those of one pixel are plain products
            return max(first.nbytes, second.nbytes) if weight.shape[2:].numel() > 1 else 0
        return first.nbytes + second.nbytes if given[-1][1] else max(first.nbytes, second.nbytes)

    def _time(self, packet: Any, given: tuple, kwargs: dict, out: Any) -> None:
        """Add how long an operation will take: as long as its products need or as its memory does."""
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
        """Return what was found."""
        memory = {what: size for what, size in (self.at_peak | {HOLES: self._holes()}).items() if size > 0}
        micro_steps = max(self.micro_steps, 1)
        seconds = (self.seconds / micro_steps, self.optimizer_seconds)
        return Costs(memory, self.peak_phase, self.phases, self.flops // micro_steps, seconds)


class _Functions(DeviceContext):
    """Does what devices do above the level of operations: autocast's casts, and fused attention.

    It is a `DeviceContext` in name only: gradient checkpointing takes those along to where it computes forward again.
    """

    __enter__, __exit__ = TorchFunctionMode.__enter__, TorchFunctionMode.__exit__

    def __init__(self, rehearsal: MemoryTracker):
        """Serve a rehearsal."""
        super().__init__(META)
        self.rehearsal = rehearsal
        self.floats = FLOAT_ON_CPU if rehearsal.kind == "cpu" else FLOAT_ON_GPU

    def __torch_function__(self, func, types, given=(), kwargs=None):
        """Call a function as a device would."""
        kwargs, rehearsal = kwargs or {}, self.rehearsal
        if func is Tensor.backward:
            rehearsal.micro_steps += 1
            with rehearsal.autocast():  # under which gradient checkpointing computes forward again
                return func(*given, **kwargs)
        if rehearsal.cast_depth and rehearsal.half and func in HALF:
            given, kwargs = tree_map(functools.partial(self.cast, rehearsal.half), (given, kwargs))
        elif rehearsal.cast_depth and rehearsal.half and func in self.floats and not is_kept_in_bf16(func, kwargs):
            given, kwargs = tree_map(functools.partial(self.cast, torch.float32), (given, kwargs))
        if func is F.scaled_dot_product_attention and given[0].is_meta:
            return attend(*given, **kwargs)
        return func(*given, **kwargs)

    def cast(self, dtype: torch.dtype, value: Any) -> Any:
        """Return a tensor of floats in a dtype; weights that train are cast once."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        is_weight = value.is_leaf and value.requires_grad and dtype is self.rehearsal.half
        if not is_weight or not torch.is_grad_enabled():
            return value.to(dtype)
        casts = self.rehearsal.casts
        if id(value) not in casts:
            casts[id(value)] = value.to(dtype)
        return casts[id(value)]


def is_kept_in_bf16(func: Callable, kwargs: dict) -> bool:
    """Say whether a function is a norm that the scripts keep from float32, by `devices.keep_norms_in_bf16`."""
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
    """Attend as fused kernels do: the matrix of all pairs is never in memory. Arguments as torch's function has."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    options = {"attn_mask": attn_mask, "scale": scale}
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, **options)[0]


# -------------------------------------------------------------------------------------------------------------- report


def describe_costs(
    go: Callable[[dict, MemoryTracker], None],
    flags: dict[str, Any],
    device: torch.device,
    processes: int,
    steps: int,
    is_here: bool = True,
) -> dict[str, str]:
    """Return what a run will need, by name, and which flags would save how much.

    Args:
        go: Goes through a run with some flags changed, for a rehearsal to watch.
        flags: As given, by name, with the mixed precision that holds.
        device: To train on.
        steps: Of the run.
        is_here: Whether this machine has such a device; if not, nothing is said of seconds.
    """
    precision = flags["mixed_precision"]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    rates = measure_rates(device, [torch.float32, *([half] if half else [])]) if is_here else None
    # After the measurement, because libraries load their code when it is first used; one is imported then.
    if device.type == "cpu" and any(is_given(flags, words) for words in EIGHT_BIT) and is_installed("bitsandbytes"):
        importlib.import_module("bitsandbytes")
    process = int(resident_bytes()) if device.type == "cpu" else 0
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # all has been said of the run itself
    try:
        costs = rehearse({}, go, MemoryTracker(device.type, precision, processes, rates))
        savings = []
        for change, changed in list_changes(flags):
            rehearsal = MemoryTracker(device.type, changed.get("mixed_precision", precision), processes)
            with contextlib.suppress(
                UserError, RuntimeError, TypeError, ValueError
            ):  # what does not go cannot be advised
                savings.append((costs.peak - rehearse(changed, go, rehearsal).peak, change))
    finally:
        logging.disable(level)
    memory = {**costs.memory, PROCESS: process}
    total, accumulated = sum(memory.values()), flags["gradient_accumulation_steps"]
    seconds = accumulated * costs.seconds[0] + costs.seconds[1]
    parts = sorted(((size, what) for what, size in memory.items() if size >= 0.005 * total), reverse=True)
    worthwhile = [(gain, change) for gain, change in sorted(savings, reverse=True) if gain > WORTHWHILE * total]
    time = {"time": f"very roughly {seconds:.2g} s a step, {seconds * steps / 3600:.2g} h for {steps} steps"}
    return {
        "peak memory": f"about {total / 1e9:.2f} GB on {device.type}, while {costs.phase}",
        "made up of": ", ".join(f"{size / 1e9:.2f} GB {what}" for size, what in parts),
        **(time if is_here else {}),
        "less with": "; ".join(f"{change} (-{gain / 1e9:.2f} GB)" for gain, change in worthwhile) or "no other flag",
    }


def rehearse(changes: dict, go: Callable[[dict, MemoryTracker], None], rehearsal: MemoryTracker) -> Costs:
    """Go through a run with some flags changed and return what it costs."""
    go(changes, rehearsal)
    return rehearsal.costs()


def resident_bytes() -> float:
    """Return how much memory this process has now, where Linux tells it, or had at most."""
    try:
        status = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return peak_memory_gb(torch.device("cpu")) * 1e9
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------------- time


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
