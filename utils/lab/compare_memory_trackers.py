"""Compare the peak memory that our tracker foretells with that of torch's `MemTracker` and of a real run, on a CPU.

    OMP_NUM_THREADS=1 python -m utils.lab.compare_memory_trackers --shape small --output compare-output

Each configuration of the README's table of memory is run for a few steps. Then both trackers foretell its peak: each
watches the same two steps of the same script. Real runs and estimates are children of one process that has imported
the libraries, so library code that nothing touches is left out of both. --seconds adds the seconds of a step, from our
`Rates` and from torch's `RuntimeEstimator`, on an idle machine. It asks for a GPU's speed, and is given our rates.

Torch's tools run under `FakeTensorMode`. What they need of us to work here is in `FakeRun`, `Answers`, `build_fake`,
`apply_to_fakes` and `SumTracker`. To add a configuration, add its name to `COMPARED`.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.runtime_estimator import RuntimeEstimator
from torch.utils._python_dispatch import TorchDispatchMode

from utils.core import atomic_files, markdown
from utils.core.errors import UserError, exit_status
from utils.devices import accelerator_setup
from utils.lab import benchmark
from utils.lab.measured_runs import WARM_UP, Run, describe_machine, prepare, read_lines, size_of
from utils.memory import memory_estimate
from utils.memory.memory_tracker import COPIES, HOLES, MemoryTracker
from utils.memory.speed_model import Rates, measure_rates
from utils.models import model_files
from utils.run import scripts, tool_names
from utils.synthetic.model_sizes import SHAPES

aten, CPU = torch.ops.aten, torch.device("cpu")
FORKS = multiprocessing.get_context("forkserver")  # its children need not import the libraries again
COMPARED = (  # the README's table of memory
    *("full, batch 1", "full, batch 4", "full, cached latents", "full, bf16", "full, 8-bit Adam"),
    *("full, fused backward", "full, bf16 weights", "full, gradient checkpointing", "full, text encoder"),
    *("LoRA, batch 1", "LoRA, batch 4", "LoRA, cached latents", "LoRA, bf16", "LoRA, base in nf4"),
    "LoRA, gradient checkpointing",
)
LOAD = model_files.load
SPEEDS = "torch.utils._runtime_estimation"  # where `RuntimeEstimator` asks for a GPU's speed
GIVEN_UP = "failed"


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write what was measured as JSON; return 1 if a real run failed."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    FORKS.set_forkserver_preload(["utils.lab.benchmark", "utils.memory.memory_estimate"])
    folders, found = prepare(args.output, args.shape), {}
    path = args.output / f"memory-trackers-{args.shape}.json"
    for name in (name for name in COMPARED if args.only.lower() in name.lower()):
        found[name] = measure(name, args, folders)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        report = {"shape": args.shape, "size": args.size, **describe_machine(None), "measurements": found}
        atomic_files.write_whole(path, json.dumps(report, indent=2) + "\n")
    print(f"\n{make_table(found, args.seconds)}\nWrote {path}")
    return int(any("problem" in one for one in found.values()))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_memory_trackers",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] == "sd"]
    add("--only", default="", metavar="TEXT", help="only configurations with this in their name; default: all")
    add("--shape", choices=known, default="small", help="sizes of the networks; default: small")
    add("--steps", type=int, default=WARM_UP + 1, help=f"of each real run; default: {WARM_UP + 1}")
    add("--seconds", action="store_true", help="compare the seconds of a step, too")
    add("--output", type=Path, default=Path("compare-output"), metavar="DIR", help="default: compare-output")
    args = parser.parse_args(argv)
    args.size = size_of(args.shape)
    return args


def measure(name: str, args: argparse.Namespace, folders: dict[str, Path]) -> dict:
    """Run a configuration for real, and let both trackers foretell it; return bytes, and seconds of a step."""
    method, own = benchmark.CONFIGURATIONS[name]
    run = Run(folders, name)
    flags, found = benchmark.flags_of(args, folders, run, own.split()), {}
    try:
        for function, values in ((run_script, ()), (foretell, (args.seconds,))):
            with ProcessPoolExecutor(1, FORKS) as pool:
                found |= pool.submit(function, scripts.SCRIPTS[method], flags, *values).result()
            run.clean()
    except (UserError, RuntimeError, SystemExit) as error:
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def run_script(script: Path, flags: list[str]) -> dict:
    """Train for real in this process, and return its peak and the seconds of a step."""
    module = scripts.load_script(script)
    tool_names.check_names(module, "utils.lab.compare_memory_trackers")
    output = Path(module.parse_args(flags).output_dir)
    if module.main(flags):
        raise RuntimeError("the real run was stopped")
    lines = read_lines(output / "metrics.jsonl")
    seconds = statistics.median(line["seconds"] for line in lines[WARM_UP:])
    return {"measured": 1e9 * max(line["memory_gb"] for line in lines), "seconds": seconds}


def foretell(script: Path, flags: list[str], with_seconds: bool) -> dict:
    """Return what both sides foretell: bytes, beside those that the process has before, and seconds of a step."""
    accelerator_setup.silence_libraries()
    module = scripts.load_script(script)
    tool_names.check_names(module, "utils.lab.compare_memory_trackers")
    given = module.parse_args(flags)
    accelerator = module.make_accelerator(given)
    base = module.detect_model(given)
    plan = module.make_plan(given, accelerator, base, module.list_examples(given, base))
    precision = accelerator.mixed_precision
    rates = measure_rates(CPU, [torch.float32, *([torch.bfloat16] if precision == "bf16" else [])])
    process, rates = memory_estimate.resident_bytes(), rates if with_seconds else None
    values = vars(given) | {"mixed_precision": precision}
    costs = memory_estimate.run_two_steps(module, values, plan, {}, MemoryTracker("cpu", precision, 1, rates))
    rules = sum(costs.memory.get(what, 0) for what in (HOLES, COPIES))
    found = {"process": process, "ours": costs.peak, "rules": rules, "ours_seconds": sum(costs.seconds)}
    try:
        found["tracker"], found["estimator_seconds"] = track(module, values, plan, rates)
    except Exception as error:  # whatever the library cannot do, the table says
        found[GIVEN_UP] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return found


def track(script: ModuleType, flags: dict, plan: Any, rates: Rates | None) -> tuple[int, float]:
    """Return the peak that `MemTracker` foretells, in bytes, and the seconds of a step that `RuntimeEstimator` does.

    Args:
        rates: Of this CPU, given to the estimator in the place of a GPU's; None: do without the estimator.
    """
    run = FakeRun(flags["mixed_precision"], bool(rates))
    with FakeTensorMode(allow_non_fake_inputs=True), Answers(), contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(model_files, "load", build_fake))
        patches.enter_context(mock.patch.object(nn.Module, "_apply", apply_to_fakes))
        if rates:
            traffic, speed = rates.traffic / 1e9, functools.partial(speed_of, rates)
            patches.enter_context(mock.patch(f"{SPEEDS}.get_device_tflops", speed))
            patches.enter_context(mock.patch(f"{SPEEDS}.get_gpu_dram_gbps", return_value=traffic))
            patches.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        memory_estimate.run_two_steps(script, flags, plan, {}, run)
    return max(run.peaks), run.estimated / 2


def speed_of(rates: Rates, dtype: torch.dtype) -> float:
    """Return how many 10^12 operations a second matrix products do."""
    return (rates.flops.get(("product", dtype)) or rates.flops["product", torch.float32]) / 1e12


class SumTracker(MemTracker):
    """Tracks the sum of memory without attribution to modules, which fails on frozen weights and on second calls."""

    def _ignore(self, *_) -> None:
        """Do nothing at a module's start or end."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore


class FakeRun(MemoryTracker):
    """Stands where `MemoryTracker` stands, on a CPU of fake tensors, and has torch's tools watch each phase."""

    def __init__(self, precision: str, with_seconds: bool):
        """Watch in a mixed precision."""
        super().__init__("cpu", precision)
        self.device, self.with_seconds, self.peaks, self.estimated = CPU, with_seconds, [], 0.0

    @contextlib.contextmanager
    def watching(self, _phase: str, networks: Iterable[nn.Module | None] = ()) -> Iterator[None]:
        """Watch a phase of the run with the networks that were loaded for it."""
        tracker, estimator = SumTracker(), RuntimeEstimator()(estimate_mode_type="operator-level-cost-model")
        tracker.track_external(*filter(None, networks))
        with tracker, estimator if self.with_seconds else contextlib.nullcontext():
            yield
        self.peaks.append(sum(one["Total"] for one in tracker.get_tracker_snapshot("peak").values()))
        self.estimated = estimator.total_runtime / 1e3  # training is the last phase

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute in mixed precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half is not None)


class Answers(TorchDispatchMode):
    """Answers for fake tensors where a script asks for numbers."""

    def __torch_dispatch__(self, func, types, given=(), kwargs=None):
        """Do one operation, or answer for it."""
        kwargs, packet = kwargs or {}, func._overloadpacket
        if not isinstance(given[0] if given else None, FakeTensor):
            return func(*given, **kwargs)
        if packet is aten._local_scalar_dense:
            dtype = given[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is not torch.bool and 0
        if packet is aten._unique2:  # all images of a batch have one prompt
            return given[0].new_zeros(1), torch.zeros_like(given[0]), given[0].new_zeros(0)
        return func(*given, **kwargs)


def build_fake(kind: type, model: str, part: str | None, device: torch.device | None = None, **options) -> Any:
    """Build a network as its config says; load all else."""
    if not issubclass(kind, nn.Module):
        return LOAD(kind, model, part, device, **options)
    if issubclass(kind, diffusers.ModelMixin):
        network = kind.from_config(kind.load_config(model, subfolder=part))
    else:
        network = kind(kind.config_class.from_pretrained(model, subfolder=part))
    return network.to(options.get("dtype") or torch.float32)


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


def make_table(found: dict[str, dict], with_seconds: bool) -> str:
    """Return the measurements as a Markdown table."""
    heads = ["configuration", "measured GB", "ours", "MemTracker", "ours, tensors", "its rules", "MemTracker, tensors"]
    heads += ["s a step", "ours", "RuntimeEstimator"] if with_seconds else []
    rows, errors = [], {"ours": [], "tracker": []}
    for name, one in found.items():
        if "problem" in one:
            rows.append((name, one["problem"]))
            continue
        for key in (key for key in errors if key in one):
            errors[key].append((one["process"] + one[key]) / one["measured"] - 1)
        told = [f"{(one['process'] + one[key]) / 1e9:.2f} ({errors[key][-1]:+.0%})" for key in errors if key in one]
        own = [f"{one[key] / 1e9:.3f}" for key in ("ours", "rules")]
        theirs = f"{one['tracker'] / 1e9:.3f}" if "tracker" in one else "–"
        cells = [name, f"{one['measured'] / 1e9:.2f}", told[0], told[1] if told[1:] else one[GIVEN_UP], *own, theirs]
        keys = ("seconds", "ours_seconds", "estimator_seconds") if with_seconds else ()
        rows.append([*cells, *(f"{one[key]:.2f}" if key in one else "–" for key in keys)])
    for words, choose in (("median error", statistics.median), ("worst error", max)):
        shares = [f"{choose(map(abs, values)):.0%}" if values else "–" for values in errors.values()]
        rows.append([words, "", *shares, *[""] * (len(heads) - 4)])
    return markdown.make_table(heads, rows)


if __name__ == "__main__":
    sys.exit(exit_status(main))
