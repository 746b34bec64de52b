"""Compare our frozen layers in few bits with those of SDNQ: memory, seconds, and how exact they are."""

import importlib
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from utils.core import markdown
from utils.devices import device_memory
from utils.lab.forked_cases import Settings, case_file, run_case
from utils.lab.measured_runs import WARM_UP, number
from utils.memory import memory_estimate
from utils.models import adapters
from utils.models.quantize import quantize_layers
from utils.synthetic.random_models import make_model

CPU, QUANTIZED_TABLE = torch.device("cpu"), "quantized"
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
LAYERS, RANK, SCALE, TOKENS = ["to_k", "to_q", "to_v", "to_out.0"], 4, 0.02, 77


def collect_quantized(settings: Settings) -> dict[str, dict]:
    """Train with each way to store the base; return what was found, and how far it is from float32, by name."""
    make_unet(settings)
    found = {}
    for name, (*_, environment) in QUANTIZED.items():
        if settings.names.lower() not in name.lower() and name != "float32":
            continue
        # SDNQ compiles its unpacking if it can; here it runs as it is, as ours does.
        found[name] = run_case(
            settings, train_quantized, QUANTIZED_TABLE, name, {"SDNQ_USE_TORCH_COMPILE": "0"} | environment
        )
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        if "problem" not in found[name] and "problem" not in found["float32"]:
            true, own = (torch.load(tensors_file(settings, one)) for one in ("float32", name))
            found[name]["output_error"] = distance(own["output"], true["output"])
            if len(own["gradients"]) == len(true["gradients"]):
                found[name]["gradient_error"] = distance(own["gradients"], true["gradients"])
    return found


def make_unet(settings: Settings) -> None:
    """Write a U-Net, if it is missing, whose weights have normal distributions, as trained ones nearly have."""
    folder = unet_folder(settings)
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as configs:
        make_model(Path(configs, "model"), settings.unet_shape, configs_only=True)
        kind = diffusers.UNet2DConditionModel
        unet = kind.from_config(kind.load_config(Path(configs, "model"), subfolder="unet"))
    random = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, weight.std().item(), generator=random)
    unet.save_pretrained(folder)


def unet_folder(settings: Settings) -> Path:
    """Return where the U-Net lies that is quantized."""
    return settings.output / "cache" / f"{settings.unet_shape}-normal-unet"


def tensors_file(settings: Settings, name: str) -> Path:
    """Return where a line's output and gradients are kept."""
    return case_file(settings, QUANTIZED_TABLE, name).with_suffix(".pt")


def distance(found: Tensor, true: Tensor) -> float:
    """Return the length of the difference of two tensors over that of the true one."""
    return ((found - true).norm() / true.norm()).item()


def train_quantized(name: str, settings: Settings) -> dict:
    """Train adapters of one base for a few steps; return what that took, and keep the first output and gradients."""
    process, unet = load_quantized(*QUANTIZED[name][:2], unet_folder(settings))
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
    random, edge = torch.Generator().manual_seed(0), settings.unet_size // 8
    inputs = {
        "sample": torch.randn(1, unet.config.in_channels, edge, edge, generator=random),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TOKENS, unet.config.cross_attention_dim, generator=random),
    }
    wanted = torch.randn(1, unet.config.out_channels, edge, edge, generator=random)
    for step in range(settings.steps):
        began = time.process_time()
        output = unet(**inputs).sample
        nn.functional.mse_loss(output, wanted).backward()
        seconds.append(time.process_time() - began)
        if not step:
            gradients = [weight.grad.flatten() for weight in trained.values() if weight.grad is not None]
            first = {"output": output.detach(), "gradients": torch.cat(gradients or [torch.zeros(0)])}
            torch.save(first, tensors_file(settings, name))
            found["weights"], found["with_gradient"] = len(trained), len(gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found["steps_peak_gb"] = device_memory.most_resident_bytes() / 1e9
    found["seconds"] = statistics.median(seconds[WARM_UP:])
    found["saved_gb"] = count_saved(unet, inputs) / 1e9
    return found


def load_quantized(how: str, options: dict[str, Any], folder: Path) -> tuple[int, nn.Module]:
    """Load a U-Net with adapters on a base that is stored in some way; return what the process held before, and it."""
    if how == OURS and options["precision"] != "no_change":
        importlib.import_module("bitsandbytes")
    elif how != OURS:
        importlib.import_module("sdnq.training")
    process, load = memory_estimate.resident_bytes(), diffusers.UNet2DConditionModel.from_pretrained
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
        quantize_layers(unet, options["precision"], CPU)
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
        errors = [number(one.get(key), ".2%") for key in ("output_error", "gradient_error")]
        rows.append((name, *memory, f"{one['seconds']:.2f}", *errors, f"{one['with_gradient']} of {one['weights']}"))
    return markdown.make_table(heads, rows)
