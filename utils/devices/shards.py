"""Networks that several processes hold in parts, under FSDP 2 or DeepSpeed: whole again for files and for drawing.

accelerate cuts the networks up and trains them. What is here are the places where a script needs them whole. What the
functions say of all processes is meant: each must call them, because each has a part.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.devices import zero_stages
from utils.flags.flag_checks import is_given
from utils.optim.optimizers import OPTIMIZERS, set_state

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
UNSUPPORTED = {  # flags, or flags and values, that accelerate or the optimizer cannot combine with sharded networks
    "train_text_encoder": "accelerate shares out one network, and the text encoder would be a second one",
    "use_8bit_adam": "bitsandbytes takes whole weights only",
    "use_bitfit": "the weights that do not train would be missing from the result",
    "fused_backward": "each process has a part of a gradient only once all have added up theirs",
    "compile": "it was never tried",
    "weight_dtype bf16": "each process would round its part by other draws",
    **{f"optimizer {name}": "only AdamW's state can be shared out" for name in OPTIMIZERS if name != "adamw"},
    **{f"base_model_precision {name}": "stored weights cannot be shared out" for name in ("bf16", "int8", "nf4")},
    # A process without class images would skip this forward pass, and the others would hang in the all-gather.
    "prior_target base_prediction": "not all processes would ask the base model in the same steps",
}


def is_asked_for(engine: str) -> bool:
    """Say whether accelerate is set to "FSDP" or "DEEPSPEED", before accelerate has read it."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true")


def find_unsupported(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag that does not go with networks in parts, if accelerate is set to these."""
    if not is_asked_for("FSDP") and not is_asked_for("DEEPSPEED"):
        return []
    unfit = {f"--{words}": why for words, why in UNSUPPORTED.items() if is_given(flags, words)}
    problems = [f"{flag} cannot be used under FSDP or DeepSpeed: {why}." for flag, why in unfit.items()]
    return problems + (zero_stages.find_unsupported(flags) if is_asked_for("DEEPSPEED") else [])


class Plugin(FullyShardedDataParallelPlugin):
    """What accelerate is told of FSDP: as its launcher has it, but for layers that a network does not have."""

    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Leave out names that accelerate would not find: Stable Diffusion and IF are built of different layers."""
        there = {type(module).__name__ for module in model.modules()}
        wanted = self.transformer_cls_names_to_wrap or []
        self.transformer_cls_names_to_wrap = [name for name in wanted if name in there]
        super().set_auto_wrap_policy(model)


def make_plugin(precision: str | None) -> Plugin | None:
    """Return what accelerate is to be told of FSDP, if it is set to that; gradients are added up in float32.

    Args:
        precision: Of arithmetic; None: as accelerate is set.
    """
    if not is_asked_for("FSDP"):
        return None
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    halves = MixedPrecisionPolicy(param_dtype=PRECISIONS.get(precision), reduce_dtype=torch.float32)
    return Plugin(mixed_precision_policy=halves if precision in PRECISIONS else None)


def enable_on_cpu(accelerator: Accelerator, plugin: Plugin | None) -> None:
    """Let accelerate use FSDP or DeepSpeed on CPUs, too, where it would pass over them without a word."""
    engine = DistributedType.DEEPSPEED if is_asked_for("DEEPSPEED") else DistributedType.FSDP if plugin else None
    if engine and accelerator.distributed_type is DistributedType.MULTI_CPU:
        # Whenever something asks for accelerate's state, that of PartialState is copied over it.
        for state in (PartialState(), accelerator.state):
            state.distributed_type = engine
        if plugin:
            accelerator.state.fsdp_plugin = plugin
        else:
            zero_stages.start_on_cpu(accelerator)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        zero_stages.complete_config(accelerator.state.deepspeed_plugin.deepspeed_config)


def are_used(accelerator: Accelerator) -> bool:
    """Say whether the networks are in parts."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def gather_weights(accelerator: Accelerator, trained: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return networks unwrapped; of those in parts, the main process gets copies on the CPU, and all must call this.

    A copy has those weights that train, and empty ones ("meta") for the others.
    """
    networks = {name: accelerator.unwrap_model(network) for name, network in trained.items()}
    if not are_used(accelerator):
        return networks
    return {name: _copy(accelerator, network) for name, network in networks.items()}


def _copy(accelerator: Accelerator, network: nn.Module) -> nn.Module | None:
    """Return a copy of a network in parts, with its adapters, in the main process."""
    trained = ((name, weight) for name, weight in network.named_parameters() if weight.requires_grad)
    weights = {name: _gather(accelerator, weight) for name, weight in trained}
    if not accelerator.is_main_process:
        return None
    kind = type(network).__mro__[2] if isinstance(network, FSDPModule) else type(network)  # behind FSDP's two
    with torch.device("meta"):
        copy = kind.from_config(network.config)
        for name, config in getattr(network, "peft_config", {}).items():
            copy.add_adapter(config, name)
    copy.load_state_dict(weights, strict=False, assign=True)
    return copy


def gather_optimizer_state(accelerator: Accelerator, optimizer: Any) -> dict:
    """Return an optimizer's state as it would be in one process, to the main process; all must call this."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return zero_stages.gather_optimizer_state(accelerator, optimizer)
    state = optimizer.state_dict()
    values = {
        index: {name: _gather(accelerator, value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return state | {"state": values}


def _gather(accelerator: Accelerator, value: Any) -> Any:
    """Return a tensor in parts whole, to the main process and there in main memory; other values as they are."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return zero_stages.whole_weight(accelerator, value)
    if not isinstance(value, DTensor):
        return value
    # Under offloading its parts lie in main memory, and only the devices can send them.
    tensor = value.detach().to(value.device_mesh.device_type).full_tensor()
    return tensor.cpu() if accelerator.is_main_process else None


def load_state(optimizer: Any, state: dict) -> None:
    """Load what `gather_optimizer_state` returned, or the part of it that belongs to this process."""
    if is_asked_for("DEEPSPEED") and zero_stages.load_state(optimizer, state):
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    values = {
        index: {name: _part(value, weights[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    set_state(optimizer, state | {"state": values})


def _part(value: Any, weight: Tensor) -> Any:
    """Return this process's part of a tensor that belongs to a weight in parts; other values as they are."""
    if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    # Every process has read the file: none needs to be sent anything.
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


@contextlib.contextmanager
def unsharded(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold networks whole in each process for a while: each may then use them as often as it likes, without gradients.

    That takes their whole size in memory. All processes must enter.
    """
    units = [unit for network in networks for unit in network.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
