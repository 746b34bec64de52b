"""Compare our estimate of memory and time with torch's own `MemTracker` and `RuntimeEstimator`."""

import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.runtime_estimator import RuntimeEstimator
from torch.utils._python_dispatch import TorchDispatchMode

from utils.core import markdown
from utils.core.errors import UserError
from utils.lab import benchmark
from utils.lab.benchmark import CONFIGURATIONS
from utils.lab.forked_cases import Settings, run_case
from utils.lab.measured_runs import WARM_UP, Run, prepare, read_lines
from utils.memory import memory_estimate, speed_model
from utils.memory.memory_tracker import COPIES, HOLES, MemoryTracker
from utils.models import model_files
from utils.run.scripts import SCRIPTS

aten, CPU = torch.ops.aten, torch.device("cpu")
ESTIMATES = "estimates"
SIDES = {"ours": "ours", "tracker": "MemTracker", "ours_tensors": "ours without rules for CPUs"}
TIMES = {"ours_seconds": "ours", "estimator": "RuntimeEstimator"}
ESTIMATED = (  # those of the README's table of memory
    *("full, batch 1", "full, batch 4", "full, cached latents", "full, bf16", "full, 8-bit Adam"),
    *("full, fused backward", "full, bf16 weights", "full, gradient checkpointing", "full, text encoder"),
    *("LoRA, batch 1", "LoRA, batch 4", "LoRA, cached latents", "LoRA, bf16", "LoRA, base in nf4"),
    "LoRA, gradient checkpointing",
)
# A process that does what a dry run does before it tracks memory; without this module, which imports more.
WEIGH = """
import importlib, sys, torch
from utils.memory import memory_estimate, speed_model
script = importlib.import_module(sys.argv[1])
given = script.parse_args(sys.argv[3:])
accelerator = script.make_accelerator(given)
base = script.detect_model(given)
script.make_plan(given, accelerator, base, script.list_examples(given, base))
speed_model.measure_rates(torch.device("cpu"), [torch.float32])
if sys.argv[2] == "True":
    importlib.import_module("bitsandbytes")
print(memory_estimate.resident_bytes())
"""


def collect_estimates(settings: Settings) -> dict[str, dict]:
    """Run each configuration for real, then let both sides foretell it; return what was found, by name."""
    folders, found, processes = prepare(settings.output, settings.shape), {}, {}
    for name in (one for one in ESTIMATED if settings.names.lower() in one.lower()):
        script, flags = CONFIGURATIONS[name]
        run = Run(folders, name)
        words = benchmark.flags_of(settings, folders, run, flags.split())
        kind = (SCRIPTS[script].stem, str("adamw8bit" in flags or "nf4" in flags))
        try:
            found[name] = time_run(run, SCRIPTS[script], words)
            run.clean()
            if kind not in processes:
                command = [sys.executable, "-c", WEIGH, *kind, *words]
                told = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                )
                processes[kind] = int(told.stdout.split()[-1])
            found[name] |= {"process": processes[kind]} | run_case(settings, estimate, ESTIMATES, name, {})
        except (UserError, subprocess.CalledProcessError) as error:
            found[name] = {"problem": str(error)}
        finally:
            run.clean()
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def time_run(run: Run, script: Path, flags: list[str]) -> dict[str, float]:
    """Run a configuration; return the peak of its memory and the processor's seconds of a step.

    Raises:
        UserError: It failed.
    """
    process, metrics, stamps = run.start(script, flags), run.output / "metrics.jsonl", {}
    while process.poll() is None:
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has not begun, or ended meanwhile
            seconds = processor_seconds(process.pid)
            stamps.setdefault(steps, seconds)
        time.sleep(0.05)
    run.finish(process)
    lines, last = read_lines(metrics), max(stamps)
    # The line of a step is written at the end of the next one, and the last line right after the one before.
    seconds = (stamps[last] - stamps[WARM_UP - 1]) / (len(lines) - WARM_UP)
    return {"memory": 1e9 * max(line["memory_gb"] for line in lines), "seconds": seconds}


def processor_seconds(launcher: int) -> float:
    """Return what the process that a launcher has started took of the processor so far."""
    child = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()[0]
    times = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def estimate(name: str, settings: Settings) -> dict:
    """Return what both sides foretell of a configuration: bytes beside those of the process, and seconds of a step."""
    script_name, flags = CONFIGURATIONS[name]
    folders = prepare(settings.output, settings.shape)
    script = importlib.import_module(SCRIPTS[script_name].stem)
    given = script.parse_args(benchmark.flags_of(settings, folders, Run(folders, f"{name} foretold"), flags.split()))
    accelerator = script.make_accelerator(given)
    base = script.detect_model(given)
    plan = script.make_plan(given, accelerator, base, script.list_examples(given, base))
    half = {"bf16": [torch.bfloat16]}.get(accelerator.mixed_precision, [])
    with mock.patch("time.perf_counter", time.process_time):
        rates = speed_model.measure_rates(CPU, [torch.float32, *half])
    flags_given = vars(given) | {"mixed_precision": accelerator.mixed_precision}
    tracker = MemoryTracker("cpu", accelerator.mixed_precision, 1, rates)
    began = time.process_time()
    costs = memory_estimate.run_two_steps(script, flags_given, plan, {}, tracker)
    spent = time.process_time() - began
    rules = sum(costs.memory.get(what, 0) for what in (HOLES, COPIES))
    sums = sum(costs.memory.values())
    found = {"ours": sums, "ours_tensors": sums - rules, "ours_seconds": sum(costs.seconds), "ours_spent": spent}
    for is_timed in (True, False):  # if the estimator fails, the tracker goes alone
        began = time.process_time()
        try:
            memory, seconds = track(script, flags_given, plan, accelerator, rates if is_timed else None)
        except Exception as error:  # whatever the library cannot do, the table says
            traceback.print_exc()
            part = "estimator" if is_timed else "tracker"
            found[f"{part}_problem"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            continue
        found |= {"tracker": memory, "estimator": seconds, "tracker_spent": time.process_time() - began}
        break
    return found


class FakeRun:
    """Stands where `MemoryTracker` stands, on a CPU of fake tensors, and opens a library's watch for each phase."""

    def __init__(self, accelerator: Accelerator, watch: Callable):
        """Take over the precision of an accelerator; `watch` gets a phase and its networks and returns a context."""
        self.device, self.watch, self.num_processes = CPU, watch, 1
        self.mixed_precision, self.process_index = accelerator.mixed_precision, 0
        self.is_main_process = self.is_local_main_process = True

    def watching(self, phase: str, networks: Iterable[nn.Module | None] = ()) -> contextlib.AbstractContextManager:
        """Watch a phase of the run with the networks that were loaded for it."""
        return self.watch(phase, [network for network in networks if network is not None])

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in mixed precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            yield

    def wrap(self, networks: Iterable[nn.Module]) -> None:
        """Let networks run under autocast and put out float32, as `Accelerator.prepare` does."""
        for network in networks if self.mixed_precision == "bf16" else ():
            network.forward = convert_outputs_to_fp32(self.autocast()(network.forward))

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return a network itself."""
        return model

    def clip_grad_norm_(self, weights: Iterable[Tensor], longest: float) -> Tensor:
        """Return the length of the gradient, and shorten it."""
        return nn.utils.clip_grad_norm_(weights, longest)

    def count_as_weight(self, _group: dict, _weight: Tensor) -> None:
        """Ignore which tensor is a weight: only the sum is compared."""

    def costs(self) -> None:
        """Count nothing: the library does."""


class Contents(TorchDispatchMode):
    """Answers for fake tensors where a script asks for numbers: true ones if they are known, else 1 or false."""

    def __torch_dispatch__(self, func, types, given=(), kwargs=None):
        """Do one operation, or answer for it."""
        kwargs, packet = kwargs or {}, func._overloadpacket
        if not isinstance(given[0] if given else None, FakeTensor):
            return func(*given, **kwargs)
        if packet is aten._local_scalar_dense:
            dtype = given[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is not torch.bool and 0
        if packet is aten._unique2:  # all of a batch have one prompt
            return given[0].new_zeros(1), torch.zeros_like(given[0]), given[0].new_zeros(0)
        return func(*given, **kwargs)


def run_on_fakes(script: ModuleType, flags: dict, plan: Any, fake_run: FakeRun) -> None:
    """Go through a run as our estimate does, with networks of fake tensors."""

    def build(kind: type, model: str, part: str | None, device: torch.device | None = None, **options) -> Any:
        """Build a network as its config says; load all else."""
        if not issubclass(kind, nn.Module):
            return load(kind, model, part, device, **options)
        options |= {"subfolder": part}
        places = {key: options[key] for key in ("subfolder", "revision", "token") if options.get(key)}
        if issubclass(kind, diffusers.ModelMixin):
            network = kind.from_config(kind.load_config(model, **places))
        else:
            network = kind(kind.config_class.from_pretrained(model, **places))
        return network.to(options.get("dtype") or torch.float32)

    load = model_files.load
    with mock.patch.object(model_files, "load", build), mock.patch.object(nn.Module, "_apply", apply_to_fakes):
        memory_estimate.run_two_steps(script, flags, plan, {}, fake_run)


def apply_to_fakes(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Change a module's tensors, in the place of torch's own way, which swaps fake ones and fails (torch 2.13)."""
    for child in module.children() if recurse else ():
        apply_to_fakes(child, function)
    for key, weight in module._parameters.items():
        changed = weight if weight is None else function(weight.detach())
        if changed is not None:
            module._parameters[key] = nn.Parameter(changed, requires_grad=weight.requires_grad)
    for key, buffer in module._buffers.items():
        module._buffers[key] = buffer if buffer is None else function(buffer)
    return module


class SumTracker(MemTracker):
    """Tracks the sum of memory without attribution to modules, which fails on frozen weights and on second calls."""

    def _ignore(self, *_) -> None:
        """Do nothing at a module's start or end."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore


def track(
    script: ModuleType, flags: dict, plan: Any, accelerator: Accelerator, rates: speed_model.Rates | None
) -> tuple[int, float | None]:
    """Return the peak that `MemTracker` foretells, in bytes, and the seconds of a step that `RuntimeEstimator` does.

    Args:
        rates: Of this CPU, put where the estimator asks CUDA for its GPU's; None: do without the estimator.
    """
    peaks, seconds = [], {}

    @contextlib.contextmanager
    def watch(phase: str, networks: list[nn.Module]) -> Iterator[None]:
        """Track a phase."""
        tracker, estimator = SumTracker(), RuntimeEstimator()(estimate_mode_type="operator-level-cost-model")
        tracker.track_external(*networks)
        with tracker, estimator if rates else contextlib.nullcontext():
            yield
        peaks.append(sum(one["Total"] for one in tracker.get_tracker_snapshot("peak").values()))
        seconds[phase] = estimator.total_runtime / 1e3

    def speed_of(dtype: torch.dtype) -> float:
        """Return how many 10^12 operations a second matrix products do."""
        return (rates.flops.get(("product", dtype)) or rates.flops["product", torch.float32]) / 1e12

    own = "torch.utils._runtime_estimation"
    with FakeTensorMode(allow_non_fake_inputs=True), Contents(), contextlib.ExitStack() as patches:
        if rates:
            patches.enter_context(mock.patch(f"{own}.get_device_tflops", speed_of))
            patches.enter_context(mock.patch(f"{own}.get_gpu_dram_gbps", lambda: rates.traffic / 1e9))
            patches.enter_context(mock.patch("torch.cuda.is_available", lambda: True))
        run_on_fakes(script, flags, plan, FakeRun(accelerator, watch))
    return max(peaks), seconds["training"] / 2 if rates else None


def show_estimates(found: dict[str, dict]) -> str:
    """Return the table of estimates, and below it what could not run."""
    heads = ("configuration", "GB", *SIDES.values(), "s a step", *TIMES.values())
    rows, errors, factors = [], {key: [] for key in SIDES}, {key: [] for key in TIMES}
    for name, one in found.items():
        if "problem" in one:
            rows.append((name, f"failed: {one['problem']}"))
            continue
        memory, seconds = {}, {}
        for key in (key for key in SIDES if one.get(key)):
            told = one["process"] + one[key]
            errors[key].append(told / one["memory"] - 1)
            memory[key] = f"{told / 1e9:.2f} ({errors[key][-1]:+.0%})"
        for key in (key for key in TIMES if one.get(key)):
            factors[key].append(one[key] / one["seconds"])
            seconds[key] = f"{one[key]:.2f} (x {factors[key][-1]:.1f})"
        cells = (
            [memory.get(key, "–") for key in SIDES]
            + [f"{one['seconds']:.2f}"]
            + [seconds.get(key, "–") for key in TIMES]
        )
        rows.append((name, f"{one['memory'] / 1e9:.2f}", *cells))
    for words, choose in (("median error", statistics.median), ("worst", max)):
        shares = [f"{choose(map(abs, values)):.0%}" if values else "–" for values in errors.values()]
        times = [
            f"x {choose(max(one, 1 / one) for one in values):.1f}" if values else "–" for values in factors.values()
        ]
        rows.append((words, "", *shares, "", *times))
    problems = defaultdict(list)
    for name, one in found.items():
        for key in (key for key in one if key.endswith("_problem")):
            problems[f"{key.removesuffix('_problem')}: {one[key]}"].append(name)
    missing = [f"{problem} ({'; '.join(names)})" for problem, names in problems.items()]
    return "\n\n".join([markdown.make_table(heads, rows), *missing])
