"""Compare frozen weights in few bits, ours and SDNQ's: a U-Net with LoRA on each, beside one in float32, on a CPU.

    pip install sdnq
    OMP_NUM_THREADS=1 python -m utils.lab.compare_quantized_layers --output compare-output

Each line of the table trains for a few steps in a process of its own. Seconds are those of the processor. SDNQ may
also lie in a folder of PYTHONPATH. To add a way to store the base, add a line to `BASES`.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from utils.core import atomic_files, markdown
from utils.core.errors import exit_status
from utils.devices import accelerator_setup, device_memory
from utils.lab.measured_runs import WARM_UP, describe_machine, number
from utils.models import adapters
from utils.models.quantize import quantize_layers
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import make_model

FORKS = multiprocessing.get_context("forkserver")  # its children need not import the libraries again
# What the table calls it: how the base is stored, with which options, in which environment. SDNQ's layers for
# inference compute without gradient unless its environment says otherwise. Its layers for training are linear only.
OURS, INFERENCE, TRAINING = "ours", "SDNQ's layers for inference", "SDNQ's layers for training"
WITH_GRADIENT = {"SDNQ_INFERENCE_CONTEXT": "enable_grad"}
FLOAT = "float32"
BASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    FLOAT: (OURS, {"precision": "no_change"}, {}),
    "ours, int8": (OURS, {"precision": "int8"}, {}),
    "ours, nf4": (OURS, {"precision": "nf4"}, {}),
    "SDNQ int8, as documented": (INFERENCE, {"weights_dtype": "int8"}, {}),
    "SDNQ int8, gradient on": (INFERENCE, {"weights_dtype": "int8"}, WITH_GRADIENT),
    "SDNQ int8, for training": (TRAINING, {"weights_dtype": "int8"}, {}),
    "SDNQ uint4, gradient on": (INFERENCE, {"weights_dtype": "uint4"}, WITH_GRADIENT),
    "SDNQ uint4, groups of 64": (INFERENCE, {"weights_dtype": "uint4", "group_size": 64}, WITH_GRADIENT),
    "SDNQ uint4, for training": (TRAINING, {"weights_dtype": "uint4"}, {}),
}
LAYERS, RANK, SCALE, TOKENS = ["to_k", "to_q", "to_v", "to_out.0"], 4, 0.02, 77


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write what was measured as JSON; return 1 if anything failed."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    FORKS.set_forkserver_preload(["utils.models.adapters", "utils.synthetic.random_models"])
    args.output.mkdir(parents=True, exist_ok=True)
    make_unet(args)
    found, first = {}, {}
    for name in (name for name in BASES if args.only.lower() in name.lower() or name == FLOAT):
        try:
            with ProcessPoolExecutor(1, FORKS) as pool:
                found[name] = pool.submit(train, name, args).result()
            first[name] = torch.load(tensors_file(args, name))
            found[name]["output_error"] = distance(first[name]["output"], first[FLOAT]["output"])
            if found[name]["with_gradient"] == found[name]["weights"]:
                found[name]["gradient_error"] = distance(first[name]["gradients"], first[FLOAT]["gradients"])
        except Exception as error:  # whatever the library cannot do, the table says
            found[name] = {"problem": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    report = {"shape": args.shape, "size": args.size, **describe_machine(None), "measurements": found}
    path = args.output / "quantized-layers.json"
    atomic_files.write_whole(path, json.dumps(report, indent=2) + "\n")
    print(f"\n{make_table(found)}\nWrote {path}")
    return int(any("problem" in one for one in found.values()))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_quantized_layers",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] == "sd"]
    add("--only", default="", metavar="TEXT", help=f"only lines with this in their name, and {FLOAT}; default: all")
    add("--shape", choices=known, default="sd15", help="sizes of the U-Net; default: sd15")
    add("--size", type=int, default=128, metavar="PIXELS", help="of its pictures; default: 128")
    add("--steps", type=int, default=5, help=f"of each line, the first {WARM_UP} not timed; default: 5")
    add("--output", type=Path, default=Path("compare-output"), metavar="DIR", help="default: compare-output")
    return parser.parse_args(argv)


def make_unet(args: argparse.Namespace) -> None:
    """Write a U-Net, if it is missing, whose weights have normal distributions, as trained ones nearly have."""
    if unet_folder(args).is_dir():
        return
    with tempfile.TemporaryDirectory() as configs:
        make_model(Path(configs, "model"), args.shape, configs_only=True)
        kind = diffusers.UNet2DConditionModel
        unet = kind.from_config(kind.load_config(Path(configs, "model"), subfolder="unet"))
    random = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, weight.std().item(), generator=random)
    unet.save_pretrained(unet_folder(args))


def unet_folder(args: argparse.Namespace) -> Path:
    """Return where the U-Net lies that is quantized."""
    return args.output / "cache" / f"{args.shape}-normal-unet"


def tensors_file(args: argparse.Namespace, name: str) -> Path:
    """Return where a line's first output and gradients are kept."""
    return args.output / f"quantized-{'-'.join(name.lower().replace(',', '').split())}.pt"


def distance(found: Tensor, true: Tensor) -> float:
    """Return the length of the difference of two tensors over that of the true one."""
    return ((found - true).norm() / true.norm()).item()


def train(name: str, args: argparse.Namespace) -> dict:
    """Train adapters of one base for a few steps; return what that took, and keep the first output and gradients."""
    how, options, environment = BASES[name]
    # SDNQ compiles its unpacking if it can. Here it runs as it is, as ours does.
    os.environ.update({"SDNQ_USE_TORCH_COMPILE": "0"} | environment)
    unet = load_unet(how, options, unet_folder(args)).train()
    trained = {key: weight for key, weight in unet.named_parameters() if weight.requires_grad}
    for key, weight in trained.items():  # alike on all bases, and none of them zero
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        weight.data = SCALE * torch.randn(weight.shape, generator=random)
    stored = sum(part.nbytes for part in list_parts(unet) if not part.requires_grad)
    found = {"stored_gb": stored / 1e9, "load_peak_gb": device_memory.most_resident_bytes() / 1e9}
    device_memory.free_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    optimizer, seconds = torch.optim.AdamW(trained.values(), lr=1e-6), []
    random, edge = torch.Generator().manual_seed(0), args.size // 8
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
            found |= {"weights": len(trained), "with_gradient": len(gradients)}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found |= {"steps_peak_gb": device_memory.most_resident_bytes() / 1e9}
    return found | {"seconds": statistics.median(seconds[WARM_UP:]), "saved_gb": count_saved(unet, inputs) / 1e9}


def load_unet(how: str, options: dict[str, Any], folder: Path) -> nn.Module:
    """Load a U-Net with adapters on a base that is stored in some way."""
    if how != OURS:
        importlib.import_module("sdnq.training")
    load = diffusers.UNet2DConditionModel.from_pretrained
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
        quantize_layers(unet, options["precision"], torch.device("cpu"))
    return unet


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


class Kept:
    """Counts the bytes that autograd keeps for the backward pass."""

    def __init__(self):
        """Begin with nothing."""
        self.sizes = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        storages = [part.untyped_storage() for part in unwrap(tensor)]
        self.sizes |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        return tensor


def count_saved(unet: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return how many bytes autograd keeps for the backward pass, beside weights as they are stored."""
    stored, kept = {part.untyped_storage().data_ptr() for part in list_parts(unet)}, Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        _output = unet(**inputs).sample  # named, so that nothing kept is freed and its place used again
    return sum(size for place, size in kept.sizes.items() if place not in stored)


def make_table(found: dict[str, dict]) -> str:
    """Return the measurements as a Markdown table."""
    heads = [
        *("base", "stored GB", "peak GB of the steps", "of loading", "kept by autograd GB", "s a step"),
        *("output's error", "gradients' error", "adapters with gradient"),
    ]
    rows = []
    for name, one in found.items():
        if "problem" in one:
            rows.append([name, one["problem"]])
            continue
        memory = [f"{one[key]:.3g}" for key in ("stored_gb", "steps_peak_gb", "load_peak_gb", "saved_gb")]
        errors = [number(one.get(key), ".1%") for key in ("output_error", "gradient_error")]
        rows.append([name, *memory, f"{one['seconds']:.2f}", *errors, f"{one['with_gradient']} of {one['weights']}"])
    return markdown.make_table(heads, rows)


if __name__ == "__main__":
    sys.exit(exit_status(main))
