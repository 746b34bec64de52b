"""Setting up accelerate in a script: its engine, messages, and work that one of several processes does for all."""

import contextlib
import datetime
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from PIL import Image
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.core.errors import UserError
from utils.devices import shards

# The launcher's variables, which come before accelerate's own state: of that, some ask for packages.
ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
UNTIL_THE_END = contextlib.ExitStack()  # holds what is set up for the life of the process


def on_main_process(accelerator: Accelerator, function: Callable, *arguments) -> Any:
    """Call a function in the main process and return its answer, or raise its UserError, in every process.

    So that a refusal ends all of them, and none waits for the others for ever.
    """
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function(*arguments)
        except UserError as error:
            answer[1] = str(error)
    value, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise UserError(refusal)
    return value


def connect(precision: str | None, accumulation: int, trackers: list[str], output_dir: str, logs: Path) -> Accelerator:
    """Return accelerate's connection of the processes, with messages set up.

    Args:
        precision: Of autocast; None: as accelerate is set.
        accumulation: Micro-steps per optimizer step.
    """
    check_engine()
    plugin = shards.make_plugin(precision)
    accelerator = Accelerator(
        fsdp_plugin=plugin,
        gradient_accumulation_steps=accumulation,
        mixed_precision=precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(output_dir, str(logs)),
        kwargs_handlers=[
            # One process may load or write gigabytes, or draw a picture more, while the others wait.
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
            # Gradients lie in the buckets of the all-reduce, not beside them: 4 bytes a weight less.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    shards.enable_on_cpu(accelerator, plugin)
    set_up_logging(accelerator)
    return accelerator


def set_up_logging(accelerator: Accelerator) -> None:
    """Write messages to stderr, those of utils from the main process only, and none of the libraries' own."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    UNTIL_THE_END.enter_context(logging_redirect_tqdm())  # else a message would stand in a progress bar's line
    for library in ("httpx", "httpx2"):  # they list requests, some with addresses that let anybody send a file
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each product in 8 bits
    if not accelerator.is_main_process:
        logging.getLogger("utils").setLevel(logging.ERROR)
    silence_libraries()


def silence_libraries() -> None:
    """Turn off the libraries' progress bars and their warnings of parts that a file need not have."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def check_engine() -> None:
    """Raise UserError if accelerate is set to an engine that was not tried here, or to compile."""
    asked = [name for variable, name in ENGINES.items() if os.environ.get(variable, "").lower() in ("true", "1")]
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if uses_fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        asked.append("FSDP 1, instead of fsdp_version 2,")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").upper()
    if compiler != "NO":
        asked.append(f"torch.compile by {compiler}")
    if asked:
        raise UserError(
            f"accelerate is set to {' with '.join(asked)}, which this script does not support: it runs in one "
            "process, in plain data parallelism, under FSDP 2 or DeepSpeed, not compiled. Launch with a file of "
            "configs/, as by `accelerate launch --config_file configs/ddp.yaml`."
        )


def import_what_is_imported_late() -> None:
    """Import what runs of the scripts import when they need it, so that a fork of this process finds it there."""
    for module in ("bitsandbytes", "diffusers.loaders", "torch.utils.tensorboard"):
        importlib.import_module(module)
    late = "AutoencoderKL DDPMScheduler DPMSolverMultistepScheduler PNDMScheduler UniPCMultistepScheduler"
    late += " IFPipeline IFSuperResolutionPipeline StableDiffusionPipeline UNet2DConditionModel"
    for library, names in ((diffusers, late), (transformers, "CLIPTextModel CLIPTokenizer T5EncoderModel")):
        for name in names.split():
            getattr(library, name)
    Image.init()
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("clip_text_model")
