"""DeepSpeed's ZeRO: what accelerate leaves open in its settings, and weights and optimizer state whole.

DeepSpeed itself (`pip install deepspeed`) is imported by those functions alone that run under it.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from utils.flags.flag_checks import is_installed

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, a tensor for each weight


def find_unsupported(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag that does not go with DeepSpeed as accelerate is set."""
    limit = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    problems = [] if is_installed("deepspeed") else ["accelerate is set to DeepSpeed: pip install deepspeed."]
    if limit in ("none", "auto") or float(limit) != flags["max_grad_norm"]:
        problems.append(f"--max_grad_norm {flags['max_grad_norm']}: give gradient_clipping, {limit}, the same value.")
    if flags["validation_prompt"] and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        problems.append("--validation_prompt cannot be used under ZeRO-3, which would gather each layer anew.")
    return problems


def start_on_cpu(accelerator: Accelerator) -> None:
    """Do what accelerate does for DeepSpeed at its own start, but not on CPUs."""
    from deepspeed import comm

    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(accelerator.state._mixed_precision)
    accelerator.state.deepspeed_plugins = plugin
    plugin.select(_from_accelerator_state=True)
    accelerator.state._mixed_precision = "no"


def complete_config(config: dict[str, Any]) -> None:
    """Fill in what accelerate takes from a loader, and use autocast, as without DeepSpeed, for half precision.

    DeepSpeed's own way would cast all weights: those of a checkpoint too, when they are loaded again.
    """
    # Otherwise transformers loads text encoders in parts under ZeRO-3, also those that do not train.
    unset_hf_deepspeed_config()
    config["train_micro_batch_size_per_gpu"] = 1  # it scales nothing; gradients are means over micro-steps
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded too, torch's AdamW, whose state checkpoints have
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if config.get(name, {}).get("enabled"):
            config[name] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}


def whole_weight(accelerator: Accelerator, weight: Tensor) -> Tensor | None:
    """Return a weight that trains whole and in float32, to the main process; all must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(weight).detach()
    return whole.cpu() if accelerator.is_main_process else None


def gather_optimizer_state(accelerator: Accelerator, optimizer: Any) -> dict:
    """Return the state of AdamW as it would be in one process, to the main process; all must call this."""
    from deepspeed.utils import safe_get_full_optimizer_state

    base, values = optimizer.optimizer.optimizer, {}
    weights = _trained(accelerator.deepspeed_engine_wrapped.engine)
    step = float(next(iter(base.state.values()))["step"]) if base.state else None
    for index, weight in enumerate(weights if base.state else ()):
        found = {name: safe_get_full_optimizer_state(weight, name) for name in MOMENTS}
        if accelerator.is_main_process:
            values[index] = {"step": torch.tensor(step)} | {name: value.cpu() for name, value in found.items()}
    group = {name: value for name, value in base.param_groups[0].items() if name != "params"}
    return {"state": values, "param_groups": [group | {"params": list(range(len(weights)))}]}


def load_state(optimizer: Any, state: dict) -> bool:
    """Give AdamW the state that `gather_optimizer_state` returned; return False if it does not run under DeepSpeed."""
    engine_optimizer = optimizer.optimizer
    if not hasattr(engine_optimizer, "optimizer"):
        return False
    from deepspeed.utils import safe_set_full_optimizer_state

    base, entries = engine_optimizer.optimizer, state["state"]
    # AdamW makes its state at the first step: it must be there to be filled.
    for part in _flat_parts(engine_optimizer) if entries else ():
        base.state[part] = {"step": entries[0]["step"].clone()} | {name: torch.zeros_like(part) for name in MOMENTS}
    if entries and hasattr(engine_optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine_optimizer._lazy_init_hp_params_optimizer_state()
    weights = [weight for group in _groups(engine_optimizer) for weight in group]
    for index, entry in entries.items():
        for name in MOMENTS:
            safe_set_full_optimizer_state(weights[index], entry[name].to(weights[index].device), name)
    return True


def _trained(engine: Any) -> list[Tensor]:
    """Return the weights that train, in the order of the optimizer that accelerate was given."""
    return [weight for weight in engine.module.parameters() if weight.requires_grad]


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """Return this process's parts of all weights, as AdamW is given them by ZeRO-3, or by ZeRO-1 and 2."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _groups(optimizer: Any) -> list[list[Tensor]]:
    """Return the weights of each group."""
    return next(getattr(optimizer, name) for name in ("fp16_groups", "bit16_groups") if hasattr(optimizer, name))
