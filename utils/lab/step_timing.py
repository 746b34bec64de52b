"""Run a training script and note how long its steps take and what they consist of; the script stays as it is.

    python utils/lab/step_timing.py stamps OUT.jsonl SCRIPT [FLAG …]    when each optimizer step ended: of any script
    python utils/lab/step_timing.py split OUT.json SCRIPT [FLAG …]      seconds of the parts of each step: of our two
    python utils/lab/step_timing.py flops OUT.json SCRIPT [FLAG …]      operations of one step: of our two
    python utils/lab/step_timing.py peak OUT.json [DTYPE …]             operations a second of large matrix products

`utils.lab.benchmark` starts it. It imports nothing else of this repository, because the script that it runs may belong
to another project whose modules have the same names. That is why `peak_memory_gb` repeats some of `device_memory`.
"""

import functools
import importlib.util
import inspect
import json
import re
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("data", "encode", "forward", "backward", "optimizer", "other")
# Functions of the scripts, and methods of the accelerator and the optimizer, by the part that they are.
ENCODING = ("latents_or_pixels", "embed_prompts")
METHODS = {
    "accelerator": {"backward": "backward", "clip_grad_norm_": "optimizer"},
    "optimizer": {"step": "optimizer", "zero_grad": "optimizer"},
}
ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")  # kernels
PAUSE = 0.05  # seconds between two looks at the memory
LONG = 0.1  # seconds; a product that takes as long is large enough to measure
LARGEST, SMALLEST = 16384, 1024  # rows and columns of what is multiplied


def main(argv: list[str] | None = None) -> None:
    """Do what the first word asks for."""
    mode, out, *words = sys.argv[1:] if argv is None else argv
    if mode == "peak":
        return write(Path(out), {"threads": torch.get_num_threads(), "peaks": measure_peaks(words)})
    script = Path(words[0]).absolute()
    sys.argv = [str(script), *words[1:]]
    sys.path[0] = str(script.parent)
    if mode == "stamps":
        return run_with_stamps(Path(out), script)
    module = load_script(script)
    from utils.run import tool_names  # only here: a script of another project may have modules of this name

    if sentence := tool_names.describe_missing_names(module, f"utils.lab.step_timing {mode}"):
        sys.exit(f"error: {sentence}")
    prepare = {"split": split_steps, "flops": count_flops}[mode]
    prepare(module, Path(out))
    sys.exit(module.exit_status(module.main))


def write(out: Path, found: Any) -> None:
    """Write what was found as JSON."""
    out.write_text(json.dumps(found), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- any script


def run_with_stamps(out: Path, script: Path) -> None:
    """Run a script; write the threads first, then a line after each step of an optimizer."""
    with out.open("w", encoding="utf-8", buffering=1) as file:
        file.write(json.dumps({"threads": torch.get_num_threads()}) + "\n")
        register_optimizer_step_post_hook(Stamps(file).add)
        runpy.run_path(str(script), run_name="__main__")


class Stamps:
    """Writes when steps ended. Nothing waits for the device: so the run is as it would be."""

    def __init__(self, file: Any):
        """Begin with no memory, never looked at."""
        self.file, self.memory_gb, self.looked = file, 0.0, -PAUSE

    def add(self, *_) -> None:
        """Write the time and the most memory used so far, or until shortly before: to look takes time itself."""
        now = time.time()
        if now - self.looked > PAUSE:
            self.memory_gb, self.looked = peak_memory_gb(), now
        self.file.write(json.dumps({"at": now, "memory_gb": self.memory_gb}) + "\n")


def peak_memory_gb() -> float:
    """Return the most memory that was in use, in 10^9 bytes: the GPU's, or without one the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # Linux's `ru_maxrss` begins with what the parent process had
    if found := status.exists() and re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE):
        return int(found[1]) * 1024 / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------------------------------------------- our scripts


def load_script(script: Path) -> ModuleType:
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return module


class Clock:
    """Seconds of each part of each step. A part within another is not counted twice, so the parts add up."""

    def __init__(self):
        """Begin with what is no part."""
        self.device = torch.device("cpu")
        self.steps: list[Counter] = []
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.seconds, self.running, self.since = Counter(dict.fromkeys(PARTS, 0.0)), ["other"], time.perf_counter()

    def count(self) -> None:
        """Wait for the device, and give the time since the last call to the part that runs."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def call(self, part: str, function: Callable, *arguments, **options) -> Any:
        """Call a function as a part of the step."""
        self.count()
        self.running.append(part)
        try:
            return function(*arguments, **options)
        finally:
            self.count()
            self.running.pop()

    def end_step(self, function: Callable, *arguments, **options) -> None:
        """Call what is done last in a step, and end the step."""
        function(*arguments, **options)
        self.count()
        self.steps.append(self.seconds)
        self.start()

    def wrap(self, part: str, function: Callable) -> Callable:
        """Return the function with the clock around it."""
        return functools.partial(self.call, part, function)


class TimedNetwork:
    """A network whose calls are timed, however it is compiled or wrapped; in all else it is the network."""

    def __init__(self, clock: Clock, network: Any):
        """Stand before a network."""
        self._clock, self._network = clock, network

    def __call__(self, *arguments, **options) -> Any:
        """Call the network as the forward part."""
        return self._clock.call("forward", self._network, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Be the network."""
        return getattr(self._network, name)


class TimedLoader:
    """A loader of batches whose waiting times are the data part."""

    def __init__(self, clock: Clock, loader: Any):
        """Stand before a loader."""
        self._clock, self._loader = clock, loader

    def __iter__(self) -> Iterator[Any]:
        """Yield its batches."""
        batches = self._clock.call("data", iter, self._loader)
        end = object()
        while (batch := self._clock.call("data", next, batches, end)) is not end:
            yield batch


def split_steps(module: ModuleType, out: Path) -> None:
    """Put the clock around what a step consists of; a step ends when its numbers are handed to the log."""
    clock = Clock()
    for name in ENCODING:
        setattr(module, name, clock.wrap("encode", getattr(module, name)))
    module.metric_log.MetricLog = functools.partial(open_log, clock, module.metric_log.MetricLog)
    module.make_loader = functools.partial(make_timed_loader, clock, module.make_loader)
    module.train = functools.partial(train_on_the_clock, clock, out, module.train)


def open_log(clock: Clock, kind: type, *arguments, **options) -> Any:
    """Return a log of metrics that ends the clock's step with each entry."""
    log = kind(*arguments, **options)
    log.add = functools.partial(clock.end_step, log.add)
    return log


def make_timed_loader(clock: Clock, make_loader: Callable, *arguments) -> TimedLoader:
    """Return a loader of a script, on the clock."""
    return TimedLoader(clock, make_loader(*arguments))


def train_on_the_clock(clock: Clock, out: Path, train: Callable, *arguments) -> None:
    """Train, write the parts of all steps, and end the run: its result has nothing to be measured."""
    given = inspect.signature(train).bind(*arguments).arguments
    clock.device, models = given["accelerator"].device, given["models"]
    models.unet = TimedNetwork(clock, models.unet)
    owners = given | vars(models)  # the optimizer is among either
    for owner, methods in METHODS.items():
        for name, part in methods.items():
            setattr(owners[owner], name, clock.wrap(part, getattr(owners[owner], name)))
    clock.start()
    train(**given)
    write(out, clock.steps)
    sys.exit()


def count_flops(module: ModuleType, out: Path) -> None:
    """Count the operations of training."""
    module.train = functools.partial(train_and_count, out, module.train)


def train_and_count(out: Path, train: Callable, *arguments) -> None:
    """Train, write how many floating-point operations it took, and end the run.

    Counted are matrix products, convolutions and attention, a multiplication and an addition as two.
    """
    names = [f"_scaled_dot_product_{kernel}" for kernel in ATTENTION]
    formulas = {getattr(torch.ops.aten, name): attention_flops for name in names}
    formulas |= {getattr(torch.ops.aten, f"{name}_backward"): attention_backward_flops for name in names}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        train(*arguments)
    write(out, counter.get_total_flops())
    sys.exit()


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Return the operations of attention; torch's own table lacks the CPU's kernel."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__, **___) -> int:
    """Return twice those of attention; torch's own formula adds the weights that the kernel computes again."""
    return 2 * sdpa_flop_count(query, key, value)


# -------------------------------------------------------------------------------------------------------- the device


def measure_peaks(dtypes: list[str]) -> dict[str, float]:
    """Return the operations a second of matrix products in each precision, on the device that training would use."""
    device = PartialState().device
    return {name: measure_peak(DTYPES[name], device) for name in dtypes}


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply ever larger matrices until that takes long; return the highest speed."""
    best, seconds, size = 0.0, 0.0, SMALLEST
    while seconds < LONG and size <= LARGEST:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(time_product(one, other) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def time_product(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the seconds of one matrix product."""
    wait = torch.accelerator.synchronize if one.device.type != "cpu" else int
    wait()
    began = time.perf_counter()
    torch.matmul(one, other)
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
