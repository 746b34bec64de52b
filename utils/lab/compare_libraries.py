"""Compare two parts of our own with libraries that do the same: estimates of memory, and frozen weights in few bits.

    python -m utils.lab.compare_libraries --output compare-output

prints two tables, for the CPU. The first: what short runs of the scripts needed, what our `Rehearsal` foretells, and
what torch's `MemTracker` and `RuntimeEstimator` do under `FakeTensorMode`. The second: a U-Net with LoRA whose base is
in float32, in our int8 and NF4, or in SDNQ's int8 and uint4 (`pip install sdnq`, or its folder in PYTHONPATH).

Each line is measured in processes of its own. Seconds are those of the processor, so that a busy machine does not
change them much; with OMP_NUM_THREADS=1 they are those of a clock on an idle one. --only makes one table. The runs
themselves are those of `utils.lab.benchmark`; to add one, add its name to `ESTIMATED`, or a line to `QUANTIZED`.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
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
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from utils.core.errors import InputError
from utils.devices import device_memory, launch
from utils.lab import benchmark
from utils.lab.benchmark import CONFIGURATIONS, Run
from utils.make_model import SHAPES, make_model
from utils.memory import memory_estimate, memory_tracker
from utils.memory.memory_tracker import COPIES, HOLES, Rehearsal
from utils.models import adapters, model_files
from utils.models.quantize import quantise

aten, CPU = torch.ops.aten, torch.device("cpu")
FORKS = multiprocessing.get_context("forkserver")  # whose children have imported all this already
ESTIMATES, QUANTIZED_TABLE = "estimates", "quantized"
SIDES = {"ours": "ours", "tracker": "MemTracker", "ours_tensors": "ours without rules for CPUs"}
TIMES = {"ours_seconds": "ours", "estimator": "RuntimeEstimator"}
ESTIMATED = (  # those of the README's table of memory
    *("full, batch 1", "full, batch 4", "full, cached latents", "full, bf16", "full, 8-bit Adam"),
    *("full, fused backward", "full, bf16 weights", "full, gradient checkpointing", "full, text encoder"),
    *("LoRA, batch 1", "LoRA, batch 4", "LoRA, cached latents", "LoRA, bf16", "LoRA, base in nf4"),
    "LoRA, gradient checkpointing",
)
# What the table calls it: how the base is stored, with which options, in which environment. SDNQ's layers for
# inference compute without gradient unless its environment says otherwise; those for training are linear only.
OURS, INFERENCE, TRAINING = "ours", "SDNQ's layers for inference", "SDNQ's layers for training"
WITH_GRADIENT = {"SDNQ_INFERENCE_CONTEXT": "enable_grad"}
QUANTIZED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "float32": (OURS, {"precision": "no_change"}, {}),
    "ours, int8": (OURS, {"precision": "int8"}, {}),
    "ours, nf4": (OURS, {"precision": "nf4"}, {}),
    "SDNQ int8, as documented": (INFERENCE, {"weights_dtype": "int8"}, {}),
    "SDNQ int8, gradient on": (INFERENCE, {"weights_dtype": "int8"}, WITH_GRADIENT),
    "SDNQ int8, for training": (TRAINING, {"weights_dtype": "int8"}, {}),
    "SDNQ uint4, gradient on": (INFERENCE, {"weights_dtype": "uint4"}, WITH_GRADIENT),
    "SDNQ uint4, groups of 64": (INFERENCE, {"weights_dtype": "uint4", "group_size": 64}, WITH_GRADIENT),
    "SDNQ uint4, for training": (TRAINING, {"weights_dtype": "uint4"}, {}),
}
# A process that does what a dry run does before it rehearses; without this module, which imports more.
WEIGH = """
import importlib, sys, torch
from utils.memory import memory_estimate, memory_tracker
script = importlib.import_module(sys.argv[1])
given = script.parse_args(sys.argv[3:])
accelerator = script.start(given)
base = script.recognise_model(given)
script.make_plan(given, accelerator, base, script.list_examples(given, base))
memory_tracker.measure_rates(torch.device("cpu"), [torch.float32])
if sys.argv[2] == "True":
    importlib.import_module("bitsandbytes")
print(memory_tracker.resident_bytes())
"""
LAYERS, RANK, SCALE, TOKENS = ["to_k", "to_q", "to_v", "to_out.0"], 4, 0.02, 77


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write what was measured as JSON; return 1 if anything failed."""
    args = parse_args(argv)
    launch.silence_libraries()
    args.output.mkdir(parents=True, exist_ok=True)
    FORKS.set_forkserver_preload(["utils.lab.compare_libraries"])
    report, failed = benchmark.describe_machine(None), False
    for table, (collect, show) in TABLES.items():
        if args.only in (None, table):
            report[table] = collect(args)
            failed |= any("problem" in one for one in report[table].values())
            print(f"\n{show(report[table])}\n", flush=True)
    path = args.output / "libraries.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {path}")
    return int(failed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_libraries", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] == "sd"]
    add("--only", choices=(ESTIMATES, QUANTIZED_TABLE), help="one of the tables; default: both")
    add("--names", default="", metavar="TEXT", help="only lines with this in their name; default: all")
    add("--shape", choices=known, default="small", help="of the estimates' networks; default: small")
    add("--unet_shape", choices=known, default="sd15", help="of the U-Net that is quantized; default: sd15")
    add("--unet_size", type=int, default=128, metavar="PIXELS", help="of its pictures; default: 128")
    add("--steps", type=int, default=5, help=f"of each run, the first {benchmark.WARM_UP} not counted; default: 5")
    add("--output", type=Path, default=Path("compare-output"), metavar="DIR", help="default: compare-output")
    args = parser.parse_args(argv)
    args.size = benchmark.size_of(args.shape)
    return args


def run_case(
    args: argparse.Namespace, measure: Callable[..., dict], table: str, name: str, environment: dict[str, str]
) -> dict:
    """Measure one line in a process of its own and return what was found; its messages are kept in a file."""
    file = case_file(args, table, name)
    file.unlink(missing_ok=True)
    process = FORKS.Process(target=measure_case, args=(args, measure, name, file, environment))
    process.start()
    process.join()
    if not file.exists():
        return {"problem": f"exit status {process.exitcode}: {benchmark.find_reason(file.with_suffix('.log'))}"}
    return json.loads(file.read_text(encoding="utf-8"))


def measure_case(
    args: argparse.Namespace, measure: Callable[..., dict], name: str, file: Path, environment: dict[str, str]
) -> None:
    """Measure one line in this process, and write it down."""
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(environment)
    launch.silence_libraries()
    file.write_text(json.dumps(measure(name, args)), encoding="utf-8")


def case_file(args: argparse.Namespace, table: str, name: str) -> Path:
    """Return where a line is written down."""
    return args.output / f"{table}-{'-'.join(re.findall(r'[a-z0-9]+', name.lower()))}.json"


# ----------------------------------------------------------------------------------------------------------- estimates


def collect_estimates(args: argparse.Namespace) -> dict[str, dict]:
    """Run each configuration for real, then let both sides foretell it; return what was found, by name."""
    folders, found, processes = benchmark.prepare(args.output, args.shape), {}, {}
    for name in (one for one in ESTIMATED if args.names.lower() in one.lower()):
        script, flags = CONFIGURATIONS[name]
        run = Run(folders, name)
        words = benchmark.flags_of(args, folders, run, flags.split())
        kind = (Path(benchmark.SCRIPTS[script]).stem, str("adamw8bit" in flags or "nf4" in flags))
        try:
            found[name] = time_run(run, benchmark.ROOT / benchmark.SCRIPTS[script], words)
            run.clean()
            if kind not in processes:
                command = [sys.executable, "-c", WEIGH, *kind, *words]
                told = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                )
                processes[kind] = int(told.stdout.split()[-1])
            found[name] |= {"process": processes[kind]} | run_case(args, estimate, ESTIMATES, name, {})
        except (InputError, subprocess.CalledProcessError) as error:
            found[name] = {"problem": str(error)}
        finally:
            run.clean()
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def time_run(run: Run, script: Path, flags: list[str]) -> dict[str, float]:
    """Run a configuration; return the peak of its memory and the processor's seconds of a step.

    Raises:
        InputError: It failed.
    """
    process, metrics, stamps = run.start(script, flags), run.output / "metrics.jsonl", {}
    while process.poll() is None:
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has not begun, or ended meanwhile
            seconds = processor_seconds(process.pid)
            stamps.setdefault(steps, seconds)
        time.sleep(0.05)
    run.finish(process)
    lines, last = benchmark.read_lines(metrics), max(stamps)
    # The line of a step is written at the end of the next one, and the last line right after the one before.
    seconds = (stamps[last] - stamps[benchmark.WARM_UP - 1]) / (len(lines) - benchmark.WARM_UP)
    return {"memory": 1e9 * max(line["memory_gb"] for line in lines), "seconds": seconds}


def processor_seconds(launcher: int) -> float:
    """Return what the process that a launcher has started took of the processor so far."""
    child = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()[0]
    times = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def estimate(name: str, args: argparse.Namespace) -> dict:
    """Return what both sides foretell of a configuration: bytes beside those of the process, and seconds of a step."""
    script_name, flags = CONFIGURATIONS[name]
    folders = benchmark.prepare(args.output, args.shape)
    script = importlib.import_module(Path(benchmark.SCRIPTS[script_name]).stem)
    given = script.parse_args(benchmark.flags_of(args, folders, Run(folders, f"{name} foretold"), flags.split()))
    accelerator = script.start(given)
    base = script.recognise_model(given)
    plan = script.make_plan(given, accelerator, base, script.list_examples(given, base))
    half = {"bf16": [torch.bfloat16]}.get(accelerator.mixed_precision, [])
    with mock.patch("time.perf_counter", time.process_time):
        rates = memory_tracker.measure_rates(CPU, [torch.float32, *half])
    flags_given = vars(given) | {"mixed_precision": accelerator.mixed_precision}
    rehearsal = Rehearsal("cpu", accelerator.mixed_precision, 1, rates)
    began = time.process_time()
    memory_estimate.go_through(script, flags_given, plan, {}, rehearsal)
    spent, costs = time.process_time() - began, rehearsal.costs()
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
    """Stands where `Rehearsal` stands, on a CPU of fake tensors, and opens a library's watch for each phase."""

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

    def recognise(self, _group: dict, _weight: Tensor) -> None:
        """Ignore which tensor is a weight: only the sum is compared."""


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


def go_through(script: ModuleType, flags: dict, plan: Any, fake_run: FakeRun) -> None:
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
        memory_estimate.go_through(script, flags, plan, {}, fake_run)


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
    script: ModuleType, flags: dict, plan: Any, accelerator: Accelerator, rates: memory_tracker.Rates | None
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
        go_through(script, flags, plan, FakeRun(accelerator, watch))
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
    return "\n\n".join([benchmark.align(heads, rows), *missing])


# ----------------------------------------------------------------------------------------------------------- quantized


def collect_quantized(args: argparse.Namespace) -> dict[str, dict]:
    """Train with each way to store the base; return what was found, and how far it is from float32, by name."""
    make_unet(args)
    found = {}
    for name, (*_, environment) in QUANTIZED.items():
        if args.names.lower() not in name.lower() and name != "float32":
            continue
        # SDNQ compiles its unpacking if it can; here it runs as it is, as ours does.
        found[name] = run_case(
            args, train_quantized, QUANTIZED_TABLE, name, {"SDNQ_USE_TORCH_COMPILE": "0"} | environment
        )
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        if "problem" not in found[name] and "problem" not in found["float32"]:
            true, own = (torch.load(tensors_file(args, one)) for one in ("float32", name))
            found[name]["output_error"] = distance(own["output"], true["output"])
            if len(own["gradients"]) == len(true["gradients"]):
                found[name]["gradient_error"] = distance(own["gradients"], true["gradients"])
    return found


def make_unet(args: argparse.Namespace) -> None:
    """Write a U-Net, if it is missing, whose weights have normal distributions, as trained ones nearly have."""
    folder = unet_folder(args)
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as configs:
        make_model(Path(configs, "model"), args.unet_shape, configs_only=True)
        kind = diffusers.UNet2DConditionModel
        unet = kind.from_config(kind.load_config(Path(configs, "model"), subfolder="unet"))
    random = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, weight.std().item(), generator=random)
    unet.save_pretrained(folder)


def unet_folder(args: argparse.Namespace) -> Path:
    """Return where the U-Net lies that is quantized."""
    return args.output / "cache" / f"{args.unet_shape}-normal-unet"


def tensors_file(args: argparse.Namespace, name: str) -> Path:
    """Return where a line's output and gradients are kept."""
    return case_file(args, QUANTIZED_TABLE, name).with_suffix(".pt")


def distance(found: Tensor, true: Tensor) -> float:
    """Return the length of the difference of two tensors over that of the true one."""
    return ((found - true).norm() / true.norm()).item()


def train_quantized(name: str, args: argparse.Namespace) -> dict:
    """Train adapters of one base for a few steps; return what that took, and keep the first output and gradients."""
    process, unet = load_quantized(*QUANTIZED[name][:2], unet_folder(args))
    unet.train()
    trained = {key: weight for key, weight in unet.named_parameters() if weight.requires_grad}
    for key, weight in trained.items():  # alike on all bases, and none of them zero
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        weight.data = SCALE * torch.randn(weight.shape, generator=random)
    found = {
        "stored_gb": sum(part.nbytes for part in list_parts(unet) if not part.requires_grad) / 1e9,
        "load_peak_gb": device_memory.most_resident_bytes() / 1e9,
        "process_gb": process / 1e9,
    }
    device_memory.free_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    optimizer, seconds = torch.optim.AdamW(trained.values(), lr=1e-6), []
    random, edge = torch.Generator().manual_seed(0), args.unet_size // 8
    inputs = {
        "sample": torch.randn(1, unet.config.in_channels, edge, edge, generator=random),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TOKENS, unet.config.cross_attention_dim, generator=random),
    }
    wanted = torch.randn(1, unet.config.out_channels, edge, edge, generator=random)
    for step in range(args.steps):
        began = time.process_time()
        output = unet(**inputs).sample
        nn.functional.mse_loss(output, wanted).backward()
        seconds.append(time.process_time() - began)
        if not step:
            gradients = [weight.grad.flatten() for weight in trained.values() if weight.grad is not None]
            first = {"output": output.detach(), "gradients": torch.cat(gradients or [torch.zeros(0)])}
            torch.save(first, tensors_file(args, name))
            found["weights"], found["with_gradient"] = len(trained), len(gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found["steps_peak_gb"] = device_memory.most_resident_bytes() / 1e9
    found["seconds"] = statistics.median(seconds[benchmark.WARM_UP :])
    found["saved_gb"] = count_saved(unet, inputs) / 1e9
    return found


def load_quantized(how: str, options: dict[str, Any], folder: Path) -> tuple[int, nn.Module]:
    """Load a U-Net with adapters on a base that is stored in some way; return what the process held before, and it."""
    if how == OURS and options["precision"] != "no_change":
        importlib.import_module("bitsandbytes")
    elif how != OURS:
        importlib.import_module("sdnq.training")
    process, load = memory_tracker.resident_bytes(), diffusers.UNet2DConditionModel.from_pretrained
    if how == INFERENCE:
        unet = load(folder, quantization_config=diffusers.SDNQConfig(quant_conv=True, **options))
    else:
        unet = load(folder)
    if how == TRAINING:
        # Without `use_grad_ckpt=False`, which is about their memory, they keep what they unpack.
        quantize_for_training = importlib.import_module("sdnq.training").sdnq_training_post_load_quant
        unet = quantize_for_training(unet, use_grad_ckpt=False, use_stochastic_rounding=False, **options)
    unet.requires_grad_(False)
    adapters.add(unet, LAYERS, "LAYERS", r=RANK, lora_alpha=RANK)
    if how == OURS:
        quantise(unet, options["precision"], CPU)
    return process, unet


def list_parts(unet: nn.Module) -> Iterator[Tensor]:
    """List the tensors that a network consists of: of one that wraps others, those."""
    for tensor in (*unet.parameters(), *unet.buffers()):
        yield from unwrap(tensor)


def unwrap(tensor: Tensor) -> Iterator[Tensor]:
    """List the tensors that one wraps, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from unwrap(getattr(tensor, name))


def count_saved(unet: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return how many bytes autograd keeps for the backward pass, beside weights as they are stored."""
    stored = {part.untyped_storage().data_ptr() for part in list_parts(unet)}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        for part in unwrap(tensor):
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(**inputs).sample
    del output
    return sum(size for place, size in kept.items() if place not in stored)


def show_quantized(found: dict[str, dict]) -> str:
    """Return the table of ways to store a base."""
    heads = (
        *("base", "stored GB", "peak GB of the steps", "of loading", "kept by autograd GB", "s a step"),
        *("output's error", "gradients' error", "adapters with gradient"),
    )
    rows = []
    for name, one in found.items():
        if "problem" in one:
            rows.append((name, f"failed: {one['problem']}"))
            continue
        memory = [f"{one[key]:.2f}" for key in ("stored_gb", "steps_peak_gb", "load_peak_gb", "saved_gb")]
        errors = [benchmark.number(one.get(key), ".2%") for key in ("output_error", "gradient_error")]
        rows.append((name, *memory, f"{one['seconds']:.2f}", *errors, f"{one['with_gradient']} of {one['weights']}"))
    return benchmark.align(heads, rows)


TABLES = {ESTIMATES: (collect_estimates, show_estimates), QUANTIZED_TABLE: (collect_quantized, show_quantized)}


if __name__ == "__main__":
    sys.exit(main())
