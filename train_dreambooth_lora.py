#!/usr/bin/env python
"""Teach a Stable Diffusion model one subject from a few photos by training low-rank adapters (LoRA DreamBooth).

    accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path MODEL --instance_data_dir photos/ \
        --instance_prompt "a photo of sks dog" --max_train_steps 800 --learning_rate 1e-4

A run from top to bottom is `main`. To change an experiment, edit one function:

    one training step .............. compute_loss             the data and its captions ...... list_examples
    which weights train ............ prepare_training         crops, flips, pixel values ..... DreamBoothDataset
    noise and timesteps ............ draw_noise               which example comes when ....... StepSampler
    what the U-Net is fed .......... unet_inputs              the optimizer .................. make_optimizer
    what it is to predict .......... target                   the schedule ................... learning_rate
    the weight of each example ..... example_losses           previews and their sampler ..... make_preview_pipeline
    instance against class ......... combine                  what is kept ................... save_result

Letters in shapes: B batch, C channels, H W height and width in pixels, h w in latents, L tokens, D text width,
T train timesteps, N distinct prompts.

Papers: DreamBooth arXiv 2208.12242, LoRA 2106.09685, latent diffusion 2112.10752, velocity prediction 2202.00512,
Min-SNR 2303.09556.
"""

import argparse
import dataclasses
import datetime
import enum
import functools
import json
import logging
import math
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import diffusers
import numpy as np
import peft
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils import checkpoints, config_file, devices, hub, images, model_card, model_files, previews
from utils.errors import InputError, show_input_errors_without_traceback
from utils.flag_checks import find_out_of_range, is_installed, problems_that_hold
from utils.metric_log import MetricLog, find_tracker_problems, simple_settings, track_images, tracker_names
from utils.processes import on_main_process
from utils.seeds import derive_seed, generator
from utils.stop_request import StopRequest, ignore_signals

logger = get_logger(__name__)

METHOD = "LoRA DreamBooth"
METHOD_TAGS = ["lora"]
DEFAULT_OUTPUT_DIR = "lora-dreambooth-model"
DEFAULT_LEARNING_RATE = 5e-4
UNET_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
TRAINS_WHOLE_NETWORKS = False
# Same in train_dreambooth.py
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Same in train_dreambooth.py
class ModelKind(enum.Enum):
    """The families of checkpoints that this script can train, by the words used in messages."""

    STABLE_DIFFUSION = "Stable Diffusion 1.x/2.x"


# Same in train_dreambooth.py
@dataclasses.dataclass(frozen=True)
class BaseModel:
    """What the checkpoint's own config files say, and the resolution that follows; no weights."""

    kind: ModelKind
    index: dict  # model_index.json: the library and class of each component
    scheduler: dict  # its config
    prediction_type: str  # epsilon or v_prediction
    latent_factor: int  # pixels per latent, along height and along width
    hides_padding: bool  # from the text encoder, as the model's pipeline will when it draws
    native_size: int  # height and width in pixels that the checkpoint draws at
    resolution: int  # height and width in pixels to train at


# Same in train_dreambooth.py
class Example(NamedTuple):
    """One picture of the run: known before any pixel is read."""

    path: Path
    prompt: str
    is_prior: bool
    is_missing: bool = False  # a class image that is still to be drawn


# Same in train_dreambooth.py
class Draw(NamedTuple):
    """One visit to an example: its index, how often it was visited before, and the seed of its noise."""

    example: int
    visit: int
    seed: int


# Same in train_dreambooth.py
@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers that follow from the flags, the data and the number of processes; fixed before anything is loaded."""

    base: BaseModel
    seed: int
    processes: int
    global_batch: int  # photos per micro-step over all processes; as many class images come on top
    examples_per_step: int  # of both kinds, over all processes and micro-steps
    epoch_length: int  # micro-steps until every example has been seen
    first_step: int  # optimizer steps done by the run that this one continues
    steps: int  # optimizer steps at the end of the run
    steps_per_epoch: int
    learning_rates: tuple[float, ...]  # of the U-Net and, if it is trained, of the text encoder
    noise_offset: float
    frozen_dtype: torch.dtype
    output_dir: Path
    resume_from: Path | None
    fits: dict  # what a checkpoint of this run and the run that resumes it must have in common


# Same in train_dreambooth.py
@dataclasses.dataclass
class PromptTable:
    """Every distinct prompt of the run, a row each."""

    texts: list[str]
    ids: Tensor  # (N, L) int64 tokens, on the training device
    mask: Tensor | None  # (N, L) int64 attention mask; None when the text encoder sees padding too
    embeds: Tensor | None = None  # (N, L, D); None when embeddings are computed in the loop


# Same in train_dreambooth.py
@dataclasses.dataclass
class Models:
    """The networks of the run; `trained` names those that are optimized, as `accelerate` wraps them."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module | None
    noise_scheduler: diffusers.DDPMScheduler
    trained: dict[str, nn.Module]  # "unet" and perhaps "text_encoder"


# Same in train_dreambooth.py
class Loss(NamedTuple):
    """The loss that is minimised and its two parts, scalars each; `prior` is None without class images."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


# Same in train_dreambooth.py
def main(argv: list[str] | None = None) -> int:
    """Run the training and return the exit status: 0, or 128 + the signal that stopped it."""
    # 1. Check everything that can be checked before anything is loaded or written.
    args = parse_args(argv)
    accelerator = start(args)
    base = recognise_model(args)
    examples = list_examples(args, base)
    plan = make_plan(args, accelerator, base, examples)
    repository = open_output(args, accelerator, plan)

    with StopRequest() as stop:
        # 2. Draw missing class images; the pipeline that draws them is freed before training models are loaded.
        draw_class_images(args, accelerator, plan, examples, stop)

        # 3. Words to tensors; with --pre_compute_text_embeddings the text encoder is freed here.
        prompts = encode_prompts(args, accelerator, plan, examples)

        # 4. Networks, and which of their weights train.
        models = load_models(args, accelerator, plan, prompts)
        prepare_training(args, plan, models)
        optimizer = make_optimizer(args, plan, models)
        optimizer = wrap_for_devices(accelerator, models, optimizer)
        resume(accelerator, plan, models, optimizer)

        # 5. The loop.
        loader = make_loader(args, accelerator, plan, prompts, examples)
        summary = describe_run(args, plan, examples, models, optimizer)
        accelerator.print(f"{METHOD} of {args.pretrained_model_name_or_path} to {plan.output_dir}")
        accelerator.print(*(f"  {name + ' ':.<15} {text}" for name, text in summary.items()), sep="\n", flush=True)
        finished = train(args, accelerator, plan, models, prompts, loader, optimizer, stop)

        # 6. The result. An upload may outlast the patience of waiting processes: they must be let go before it.
        if finished:
            optimizer, loader = accelerator.free_memory(optimizer, loader)
            save_result(args, accelerator, plan, models)
        accelerator.end_training()
        if finished and accelerator.is_main_process:
            share(args, plan, summary, repository)
        return 0 if finished else stop.exit_code


# ------------------------------------------------------------------------------------------------------------- flags

# `--flag` switches on, `--no-flag` off: so that the command line can undo a switch of --config.
# Same in train_dreambooth.py
SWITCH = argparse.BooleanOptionalAction
# Same in train_dreambooth.py
AT_LEAST_ONE = (
    "resolution num_class_images sample_batch_size tokenizer_max_length train_batch_size gradient_accumulation_steps "
    "num_train_epochs max_train_steps lr_num_cycles checkpointing_steps checkpoints_total_limit num_validation_images "
    "validation_steps validation_epochs validation_num_inference_steps"
).split()
# Same in train_dreambooth.py
NOT_NEGATIVE = (
    "seed dataloader_num_workers prior_loss_weight lr_warmup_steps learning_rate text_encoder_lr lr_power "
    "adam_weight_decay max_grad_norm noise_offset validation_guidance_scale"
).split()
# A run and the checkpoint that it goes on from must agree in these, or weights or batches would differ.
# Same in train_dreambooth.py
FITS = (
    "revision instance_prompt class_prompt tokenizer_name train_text_encoder use_8bit_adam train_batch_size "
    "gradient_accumulation_steps"
).split()


# Same in train_dreambooth.py
def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags, over those of --config if it is given, and exit with status 2 naming every mistake in them."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if args.config:
        known = [action for action in parser._actions if action.dest not in ("help", "config")]
        switches = {action.dest: isinstance(action, SWITCH) for action in known}
        try:
            args = parser.parse_args([*config_file.read_flags(args.config, switches), *argv])
        except InputError as error:
            parser.error(str(error))
    if args.hub_token:
        # Trackers copy the command line into their run files.
        sys.argv[:] = [word.replace(args.hub_token, "<token>") for word in sys.argv]
    if problems := find_problems(args) + find_method_problems(args):
        parser.error("\n".join(["the flags do not fit:", *(f"  - {problem}" for problem in problems)]))
    return args


# Same in train_dreambooth.py
def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags, in groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir DIR --instance_prompt PROMPT [...]",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="ARGS_JSON", help="Repeat the run of this args.json; other flags win.")
    add_model_args(parser.add_argument_group("model"))
    add_data_args(parser.add_argument_group("data"))
    add_prior_args(parser.add_argument_group("prior preservation"))
    add_text_args(parser.add_argument_group("text"))
    add_training_args(parser.add_argument_group("training"))
    add_optimizer_args(parser.add_argument_group("loss and optimizer"))
    add_method_args(parser.add_argument_group(METHOD))
    add_device_args(parser.add_argument_group("precision and devices"))
    add_validation_args(parser.add_argument_group("validation"))
    add_result_args(parser.add_argument_group("result and sharing"))
    return parser


# Same in train_dreambooth.py
def add_model_args(group) -> None:
    """Add the flags that say which model is trained."""
    add = group.add_argument
    add("--pretrained_model_name_or_path", metavar="MODEL", help="Hub id or folder of the base model (required).")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the weight files, for example fp16.")
    add("--tokenizer_name", help="Hub id or folder of another tokenizer than the model's own.")


# Same in train_dreambooth.py
def add_data_args(group) -> None:
    """Add the flags that say which pictures are learned, and how they are cut."""
    modes = [mode.name.lower() for mode in Image.Resampling]
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    add("--instance_data_dir", metavar="DIR", help="Folder with photos of the subject, read recursively (required).")
    add("--instance_prompt", help="What every photo shows, with an identifier: 'a photo of sks dog' (required).")
    add("--resolution", type=int, help="Height and width in pixels to train at; unset: 512, for v-prediction 768.")
    switch("--center_crop", help="Cut out the centre instead of a random part.")
    switch("--random_flip", help="Mirror a picture left to right in half of its visits.")
    add("--image_interpolation_mode", default="lanczos", choices=modes, help="How pictures are resized.")
    switch("--skip_bad_images", help="Go on without unreadable photos; off: an error that lists them.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that load pictures; 0: the trainer itself.")


# Same in train_dreambooth.py
def add_prior_args(group) -> None:
    """Add the flags of prior preservation."""
    precisions = ["no", "fp32", "fp16", "bf16"]
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    switch("--with_prior_preservation", help="Train on class images beside the photos.")
    add("--class_data_dir", metavar="DIR", help="Folder of class images; unset: class_images in --output_dir.")
    add("--class_prompt", help="What the class images show, without the identifier: 'a photo of dog'.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class images' loss; 0: none.")
    add("--num_class_images", type=int, default=100, help="Class images used; missing ones are drawn by the model.")
    add("--sample_batch_size", type=int, default=4, help="Class images drawn at a time, per process.")
    add("--prior_generation_precision", choices=precisions, help="For drawing; unset: fp16 on a GPU, else fp32.")


# Same in train_dreambooth.py
def add_text_args(group) -> None:
    """Add the flags that say how prompts become embeddings."""
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    switch("--train_text_encoder", help="Train the text encoder as well.")
    switch("--pre_compute_text_embeddings", help="Encode all prompts first and free the text encoder.")
    add("--tokenizer_max_length", type=int, metavar="L", help="Tokens per prompt; unset: the tokenizer's own limit.")
    switch("--text_encoder_use_attention_mask", help="Hide the padding from the text encoder; samplers must, too.")
    add("--class_labels_conditioning", choices=["timesteps"], help="For super-resolution U-Nets only.")


# Same in train_dreambooth.py
def add_training_args(group) -> None:
    """Add the flags that set the length, the randomness and the checkpoints of the run."""
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    add("--output_dir", default=DEFAULT_OUTPUT_DIR, metavar="DIR", help="Where everything is written.")
    add(
        "--seed",
        type=int,
        help="Every batch and preview follows from it; unset: drawn, printed and kept in args.json.",
    )
    add("--train_batch_size", type=int, default=4, metavar="B", help="Photos per micro-step and process.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per optimizer step.")
    add("--num_train_epochs", type=int, default=1, help="Length of the run when --max_train_steps is unset.")
    add("--max_train_steps", type=int, help="Length of the run in optimizer steps; wins over --num_train_epochs.")
    switch("--gradient_checkpointing", help="Less memory for more time: activations are computed twice.")
    switch("--set_grads_to_none", help="Has no work left to do: torch always does it.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints kept, newest first; unset: all.")
    add("--resume_from_checkpoint", metavar="NAME", help="'latest', checkpoint-N in --output_dir, or a path.")


# Same in train_dreambooth.py
def add_optimizer_args(group) -> None:
    """Add the flags of the loss, the optimizer and the learning rate."""
    schedules = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    add("--learning_rate", type=float, default=DEFAULT_LEARNING_RATE, help="After the warm-up.")
    add("--text_encoder_lr", type=float, help="Learning rate of the text encoder; unset: --learning_rate.")
    switch("--scale_lr", help="Multiply the rates by accumulation steps x batch size x processes.")
    add("--lr_scheduler", default="constant", choices=schedules, help="How the learning rate changes.")
    add("--lr_warmup_steps", type=int, default=500, help="Steps of linear warm-up; 'constant' has none.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    switch("--use_8bit_adam", help="Keep AdamW's state in 8 bits (bitsandbytes).")
    add("--adam_beta1", type=float, default=0.9, help="Decay of AdamW's first moment, in [0, 1).")
    add("--adam_beta2", type=float, default=0.999, help="Decay of AdamW's second moment, in [0, 1).")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay; 0: none.")
    add("--adam_epsilon", type=float, default=1e-8, help="Added to AdamW's denominator.")
    add("--max_grad_norm", type=float, default=1.0, help="Longest gradient; a longer one is scaled down. 0: no limit.")
    add("--snr_gamma", type=float, metavar="GAMMA", help="Min-SNR weighting, usually 5; unset: all timesteps alike.")
    switch("--offset_noise", help="The same as --noise_offset 0.1, unless that is given too.")
    add("--noise_offset", type=float, help="Strength of noise that is constant over each channel; unset: none.")


def add_method_args(group) -> None:
    """Add the flags that only LoRA has."""
    add = group.add_argument
    add("--rank", type=int, default=4, help="Rank of each adapter.")
    add("--lora_alpha", type=int, help="Adapters count alpha / rank times; unset: the rank, so once.")
    add("--lora_dropout", type=float, default=0.0, help="Share of an adapter's inputs that are dropped, in [0, 1).")
    add("--lora_layers", help=f"Ends of the names of U-Net layers that get one; unset: {','.join(UNET_LAYERS)}.")


# Same in train_dreambooth.py
def add_device_args(group) -> None:
    """Add the flags of precision and devices."""
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    precisions = ["no", "fp16", "bf16"]
    add("--mixed_precision", choices=precisions, help="Of arithmetic and frozen weights; unset: accelerate's setting.")
    switch("--allow_tf32", help="Faster float32 products on NVIDIA GPUs since Ampere.")
    switch("--enable_xformers_memory_efficient_attention", help="Use xformers if installed; else torch's attention.")
    switch("--deterministic", help="Exact repetition on GPUs too, with slower kernels; a CPU needs no flag for it.")
    add("--local_rank", type=int, default=-1, help="Has no work left to do: the launcher's environment says it.")


# Same in train_dreambooth.py
def add_validation_args(group) -> None:
    """Add the flags of the pictures that are drawn during training."""
    samplers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    add = group.add_argument
    add("--validation_prompt", help="Draw this before the first step, while training, and at the end; unset: nothing.")
    add("--validation_negative_prompt", default="", help="What the pictures are steered away from.")
    add("--num_validation_images", type=int, default=4, help="Pictures per round, with the same seeds in each.")
    add("--validation_steps", type=int, default=100, help="Optimizer steps between rounds.")
    add("--validation_epochs", type=int, help="Epochs between rounds; wins over --validation_steps.")
    add("--validation_scheduler", default=samplers[0], choices=samplers, help="Sampler of the pictures.")
    add("--validation_num_inference_steps", type=int, default=25, help="Sampling steps per picture.")
    add("--validation_guidance_scale", type=float, default=7.5, help="Classifier-free guidance; 1: none.")
    add("--validation_images", nargs="+", metavar="FILE", help="For super-resolution models only.")


# Same in train_dreambooth.py
def add_result_args(group) -> None:
    """Add the flags of logs and of sharing."""
    add, switch = group.add_argument, functools.partial(group.add_argument, action=SWITCH, default=False)
    add("--report_to", default="tensorboard", help="Trackers: tensorboard, wandb, comet_ml, …, 'a,b', all or none.")
    add("--logging_dir", default="logs", help="Where trackers write, below --output_dir.")
    switch("--push_to_hub", help="Upload the result, its card and the previews.")
    add("--hub_model_id", help="Repository, 'name' or 'owner/name'; unset: the name of --output_dir.")
    switch("--hub_private_repo", help="Create the repository as a private one.")
    add("--hub_token", help="Access token. Others can read it in the process list: prefer `hf auth login`.")


# Same in train_dreambooth.py
def find_problems(args: Namespace) -> list[str]:
    """Return every mistake in the flags that both scripts share, a sentence each."""
    ranges = dict.fromkeys(("adam_epsilon", "snr_gamma"), "above 0")
    ranges |= dict.fromkeys(("adam_beta1", "adam_beta2"), "in [0, 1)")
    ranges |= dict.fromkeys(NOT_NEGATIVE, "0 or more") | dict.fromkeys(AT_LEAST_ONE, "1 or more")
    needed = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt")
    return [
        *(f"--{name} is required." for name in needed if not getattr(args, name)),
        *find_out_of_range(vars(args), ranges),
        *find_contradictions(args),
        *find_bad_folders(args),
        *find_tracker_problems(tracker_names(args.report_to)),
    ]


# Same in train_dreambooth.py
def find_contradictions(args: Namespace) -> list[str]:
    """Return a sentence for each flag that lacks or excludes another, a package or a device."""
    prior, text, no_gpu = args.with_prior_preservation, args.train_text_encoder, not devices.has_accelerator()
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    fp16 = no_gpu and precision == "fp16"
    fp16_prior = no_gpu and args.prior_generation_precision == "fp16"
    no_bitsandbytes = args.use_8bit_adam and not is_installed("bitsandbytes")
    stale = "--pre_compute_text_embeddings excludes --train_text_encoder, which changes the embeddings at each step."
    return problems_that_hold(
        (prior and not args.class_prompt, "--with_prior_preservation needs --class_prompt, such as 'a photo of dog'."),
        (text and args.pre_compute_text_embeddings, stale),
        (args.text_encoder_lr is not None and not text, "--text_encoder_lr needs --train_text_encoder."),
        (precision not in PRECISIONS, f"accelerate is set to {precision}: give --mixed_precision no, fp16 or bf16."),
        (fp16, "--mixed_precision fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16 or no."),
        (fp16_prior, "--prior_generation_precision fp16 needs a GPU. Use fp32 or bf16."),
        (no_bitsandbytes, "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes."),
    )


# Same in train_dreambooth.py
def find_bad_folders(args: Namespace) -> list[str]:
    """Return a sentence for each folder that is not there or lies where it would be mistaken for another."""
    photos, output = Path(args.instance_data_dir or os.devnull), Path(args.output_dir)
    classes = [class_folder(args)] if args.with_prior_preservation else []
    ours = [("--output_dir", output), *(("--class_data_dir", folder) for folder in classes)]
    inside = [flag for flag, folder in ours if folder.resolve().is_relative_to(photos.resolve())]
    others = [("--instance_data_dir", photos), ("--output_dir", output)]
    swallowed = [flag for flag, path in others for above in classes if path.resolve().is_relative_to(above.resolve())]
    resumes = checkpoints.is_of(output, args.resume_from_checkpoint)
    left = [] if resumes else [*checkpoints.list_checkpoints(output), *hub.result_files(output)[:1]]
    held = f"{output} holds {', '.join(path.name for path in left)} of an earlier run. Use another"
    held += ", or --resume_from_checkpoint latest" if checkpoints.list_checkpoints(output) else ""
    nested = args.instance_data_dir and inside
    return problems_that_hold(
        (photos.is_file(), f"--instance_data_dir {photos} is not a folder."),
        (not photos.exists(), f"--instance_data_dir {photos} does not exist."),
        (nested, f"{' and '.join(inside)} in --instance_data_dir {photos}: all pictures below it count as photos."),
        (swallowed, f"{' and '.join(swallowed)} in --class_data_dir: all pictures below it count as class images."),
        (output.is_file(), f"--output_dir {output} is a file. Use another name."),
        (left, f"--output_dir {held}."),
    )


def find_method_problems(args: Namespace) -> list[str]:
    """Return every mistake in the flags that only LoRA has."""
    ranges = {"rank": "1 or more", "lora_alpha": "1 or more", "lora_dropout": "in [0, 1)"}
    empty = "" in method_fits(args)["layers"].split(",")
    message = f"--lora_layers {args.lora_layers!r} holds an empty name. Example: {','.join(UNET_LAYERS)}."
    return find_out_of_range(vars(args), ranges) + problems_that_hold((empty, message))


# Same in train_dreambooth.py
def class_folder(args: Namespace) -> Path:
    """Return the folder of the class images."""
    return Path(args.class_data_dir) if args.class_data_dir else Path(args.output_dir) / "class_images"


# ---------------------------------------------------------------------------------------------------------- start-up


# Same in train_dreambooth.py
def start(args: Namespace) -> Accelerator:
    """Connect the processes, set up logging and arithmetic, and say once which flags have no work to do."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.deterministic:
        # cuBLAS reads this once, when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    logging_dir = str(Path(args.output_dir, args.logging_dir))
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker_names(args.report_to) or None,
        project_config=accelerate.utils.ProjectConfiguration(args.output_dir, logging_dir),
        # One process may load or write gigabytes, or draw a picture more, while the others wait.
        kwargs_handlers=[accelerate.utils.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
    )
    engine, compiler = accelerator.distributed_type, accelerator.state.dynamo_plugin.backend
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP") or compiler != "NO":
        raise InputError(
            f"accelerate is set to {engine} with torch.compile by {compiler}. Supported are one process or plain data "
            "parallelism, not compiled: see `accelerate config`, or run `accelerate launch --multi_gpu`."
        )
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    for note in idle_flags(args):
        logger.warning(note)
    return accelerator


# Same in train_dreambooth.py
def idle_flags(args: Namespace) -> list[str]:
    """Return a sentence for each flag that is given and changes nothing in this run."""
    alone = not args.with_prior_preservation
    xformers = args.enable_xformers_memory_efficient_attention and not is_installed("xformers")
    return problems_that_hold(
        (args.set_grads_to_none, "--set_grads_to_none has no work left to do: gradients are always set to None."),
        (args.local_rank != -1, "--local_rank has no work left to do: the launcher's environment says it."),
        (args.hub_token, "--hub_token is visible in the process list; HF_TOKEN or `hf auth login` is not."),
        (xformers, "xformers is not installed: torch's own attention serves instead."),
        (alone and args.class_prompt, "--class_prompt has no effect without --with_prior_preservation."),
        (alone and args.class_data_dir, "--class_data_dir has no effect without --with_prior_preservation."),
    )


# Same in train_dreambooth.py
def recognise_model(args: Namespace) -> BaseModel:
    """Tell from the checkpoint's config files what it is.

    Raises:
        InputError: The checkpoint is none that this script trains, or flags contradict it.
    """
    name = args.pretrained_model_name_or_path
    read = functools.partial(model_files.read_config, name, revision=args.revision, token=args.hub_token)
    index = read("model_index.json")
    unet, vae = (read(f"{part}/config.json") if index.get(part, [None])[0] else {} for part in ("unet", "vae"))
    scheduler = read("scheduler/scheduler_config.json") if unet else {}
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if reason := why_unsupported(index, unet, vae, prediction_type):
        supported = ", ".join(kind.value for kind in ModelKind)
        raise InputError(f"--pretrained_model_name_or_path {name} is {reason}: not supported. Supported: {supported}.")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = args.resolution or (768 if prediction_type == "v_prediction" else 512)
    text, tokens = read("text_encoder/config.json"), args.tokenizer_max_length or 0
    longest = text.get("max_position_embeddings", 77)
    hides_padding = args.text_encoder_use_attention_mask or bool(text.get("use_attention_mask"))
    kind, native_size = ModelKind.STABLE_DIFFUSION, unet["sample_size"] * factor
    if misfits := problems_that_hold(
        (resolution % factor, f"--resolution {resolution} is no multiple of {factor}, the VAE's factor."),
        (tokens > longest, f"--tokenizer_max_length {tokens}: the text encoder takes at most {longest} tokens."),
        (args.class_labels_conditioning, "--class_labels_conditioning: this model's U-Net has no class labels."),
        (args.validation_images, "--validation_images: this model draws from --validation_prompt alone."),
    ):
        raise InputError("\n".join([f"the flags do not fit {name} ({kind.value}):", *misfits]))
    return BaseModel(kind, index, scheduler, prediction_type, factor, hides_padding, native_size, resolution)


# Same in train_dreambooth.py
def why_unsupported(index: dict, unet: dict, vae: dict, prediction_type: str) -> str | None:
    """Return what a checkpoint is if it is none of the supported kinds, else None."""
    channels, pipeline = unet.get("in_channels"), f"a {index.get('_class_name', 'pipeline')}"
    is_xl = "text_encoder_2" in index or unet.get("addition_embed_type") == "text_time"
    no_text = not all(index.get(part, [None])[0] for part in ("text_encoder", "tokenizer"))
    classes = unet.get("_class_name"), unet.get("class_embed_type"), vae.get("_class_name")
    other = classes != ("UNet2DConditionModel", None, "AutoencoderKL")
    reasons = problems_that_hold(
        (not unet, f"{pipeline} without a U-Net"),
        (is_xl, "a Stable Diffusion XL checkpoint"),
        (not vae, f"a DeepFloyd IF or other pixel model ({channels} input channels and no VAE)"),
        (channels == 9, "an inpainting checkpoint (9 input channels)"),
        (channels != 4, f"{pipeline} with {channels} input channels"),
        (no_text, f"{pipeline} without a text encoder and a tokenizer"),
        (prediction_type not in ("epsilon", "v_prediction"), f"{pipeline} that predicts {prediction_type!r}"),
        (other, f"{pipeline} with a {classes[0]}, class embedding {classes[1]}, and a {classes[2]}"),
    )
    return reasons[0] if reasons else None


# Same in train_dreambooth.py
def list_examples(args: Namespace, base: BaseModel) -> list[Example]:
    """List the photos and the class images with their captions; class images still to be drawn are among them.

    Raises:
        InputError: No photos, or unreadable ones without --skip_bad_images.
    """
    photos = images.inspect_folder(Path(args.instance_data_dir), "--instance_data_dir", args.skip_bad_images)
    for note in photos.notes:
        logger.info(note)
    if small := sum(min(size) < base.resolution for size in photos.sizes.values()):
        logger.warning(f"{small} of {len(photos.sizes)} photos are smaller than {base.resolution} px: enlarged.")
    examples = [Example(path, args.instance_prompt, is_prior=False) for path in photos.sizes]
    if args.with_prior_preservation:
        examples += list_class_images(args)
    return examples


# Same in train_dreambooth.py
def list_class_images(args: Namespace) -> list[Example]:
    """Return --num_class_images examples: pictures that are there and can be decoded, and those still to be drawn."""
    folder, wanted = class_folder(args), args.num_class_images
    present = []
    if folder.is_dir():
        inspection = images.inspect_images(images.list_images(folder).images)
        present = sorted(inspection.sizes)
        for path, reason in inspection.unreadable.items():
            logger.warning(f"Class image {path} does not count: {reason}")
    if len(present) > wanted:
        logger.warning(f"{folder} holds {len(present)} class images; --num_class_images takes the first {wanted}.")
    images.check_prompt(folder, args.class_prompt)
    missing = sorted({folder / f"{index:05d}.png" for index in range(wanted)} - set(present))
    missing = set(missing[: max(0, wanted - len(present))])
    paths = sorted({*present[:wanted], *missing})
    return [Example(path, args.class_prompt, is_prior=True, is_missing=path in missing) for path in paths]


# Same in train_dreambooth.py
def make_plan(args: Namespace, accelerator: Accelerator, base: BaseModel, examples: list[Example]) -> Plan:
    """Work out the numbers of the run.

    Raises:
        InputError: The checkpoint to go on from is missing, or was written by a run that does not fit this one.
    """
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    resume_from = checkpoints.find_checkpoint(output_dir, wanted) if wanted else None
    state = checkpoints.read_state(resume_from) if resume_from else {"step": 0, "fits": {}}
    seed = args.seed if args.seed is not None else state["fits"].get("seed")
    if seed is None:
        seed = on_main_process(accelerator, random.SystemRandom().randrange, 2**32)
    priors = sum(example.is_prior for example in examples)
    photos, accumulation = len(examples) - priors, args.gradient_accumulation_steps
    global_batch = args.train_batch_size * accelerator.num_processes
    epoch_length = math.ceil(max(priors, photos) / global_batch)
    steps_per_epoch = math.ceil(epoch_length / accumulation)
    scale = global_batch * accumulation if args.scale_lr else 1
    rates = [args.learning_rate * scale]
    if args.train_text_encoder:
        rates.append(rates[0] if args.text_encoder_lr is None else args.text_encoder_lr * scale)
    fits = {"script": METHOD, "seed": seed, "resolution": base.resolution, "processes": accelerator.num_processes}
    names = [example.path.name for example in examples if not example.is_prior]
    fits |= {"photos": names, "class images": priors, "precision": accelerator.mixed_precision}
    fits |= {"base model": model_files.public_name(args.pretrained_model_name_or_path)}
    fits |= {name: getattr(args, name) for name in FITS}
    plan = Plan(
        base=base,
        seed=seed,
        processes=accelerator.num_processes,
        global_batch=global_batch,
        examples_per_step=global_batch * accumulation * (2 if priors else 1),
        epoch_length=epoch_length,
        first_step=state["step"],
        steps=args.max_train_steps or args.num_train_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        learning_rates=tuple(rates),
        noise_offset=(0.1 if args.offset_noise else 0.0) if args.noise_offset is None else args.noise_offset,
        frozen_dtype=PRECISIONS[accelerator.mixed_precision],
        output_dir=output_dir,
        resume_from=resume_from,
        fits=fits | method_fits(args),
    )
    if args.max_train_steps is None and plan.steps < 50:
        logger.warning(f"{plan.steps} steps will teach little; --max_train_steps of some hundreds is usual.")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= plan.steps:
        logger.warning(f"The warm-up of {args.lr_warmup_steps} steps is as long as the run: see --lr_warmup_steps.")
    if wanted and resume_from is None:
        logger.warning(f"{output_dir} holds no complete checkpoint: starting at step 0.")
    if resume_from is not None:
        checkpoints.check_fits(resume_from, state["fits"], plan.fits)
        checkpoints.warn_of_newer(output_dir, plan.first_step)
    return plan


def method_fits(args: Namespace) -> dict:
    """Return what only a LoRA run and its checkpoint must have in common."""
    layers = args.lora_layers.split(",") if args.lora_layers is not None else UNET_LAYERS
    layers = ",".join(layer.strip() for layer in layers)
    return {"rank": args.rank, "alpha": args.lora_alpha or args.rank, "layers": layers}


# Same in train_dreambooth.py
def open_output(args: Namespace, accelerator: Accelerator, plan: Plan) -> str | None:
    """Create the Hub repository, if one is asked for and can be written, and the output folder; start the trackers."""
    options = (args.hub_model_id, plan.output_dir, args.hub_token, args.hub_private_repo)
    repository = on_main_process(accelerator, hub.prepare_repository, *options) if args.push_to_hub else None
    # --config with these would not repeat the run but continue it; the token is a secret.
    left_out = ("config", "resume_from_checkpoint", "hub_token")
    used = {key: value for key, value in vars(args).items() if key not in left_out}
    used |= {"seed": plan.seed, "resolution": plan.base.resolution, "mixed_precision": accelerator.mixed_precision}
    if accelerator.is_main_process:
        checkpoints.open_folder(plan.output_dir)
        checkpoints.atomic_write_text(plan.output_dir / "args.json", json.dumps(used, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        options = {"wandb": {"dir": args.output_dir}}
        accelerator.init_trackers("dreambooth", simple_settings(used), options)
    return repository


# ------------------------------------------------------------------------------------------------------ class images


# Same in train_dreambooth.py
def draw_class_images(
    args: Namespace, accelerator: Accelerator, plan: Plan, examples: list[Example], stop: StopRequest
) -> None:
    """Draw the class images that are missing with the base model, all processes sharing the work.

    Image i depends on i and the batch size alone: it is drawn in the batch that i falls in, from a seed of i.
    """
    missing = {example.path for example in examples if example.is_missing}
    if not missing:
        return
    size = args.sample_batch_size
    batches = sorted({int(path.stem) // size for path in missing})
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    logger.info(f"Drawing {len(missing)} class images of {args.class_prompt!r} at {plan.base.native_size} px.")
    pipeline = load_class_pipeline(args, accelerator)
    folder = class_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    images.remember_prompt(folder, args.class_prompt)
    for number in tqdm(mine, desc="class images", unit="batch", disable=not accelerator.is_local_main_process):
        indices = range(number * size, min((number + 1) * size, args.num_class_images))
        seeds = [generator("class image", index) for index in indices]
        drawn = pipeline([args.class_prompt] * len(indices), generator=seeds).images
        for index, image in zip(indices, drawn):
            if folder / f"{index:05d}.png" in missing:
                images.save_png(image, folder / f"{index:05d}.png")
        if stop.check() is not None:
            raise SystemExit(stop.exit_code)
    del pipeline
    devices.free_memory()
    accelerator.wait_for_everyone()
    if elsewhere := [path for path in missing if not path.exists()]:
        raise InputError(f"{len(elsewhere)} class images are on another machine: {folder} must be shared by all.")


# Same in train_dreambooth.py
def load_class_pipeline(args: Namespace, accelerator: Accelerator) -> diffusers.DiffusionPipeline:
    """Load the whole base model for drawing, in the precision asked for, without a safety checker."""
    default = "fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32"
    dtype = PRECISIONS[args.prior_generation_precision or default]
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = load(args, diffusers.DiffusionPipeline, **unchecked, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


# ----------------------------------------------------------------------------------------------------------- prompts


# Same in train_dreambooth.py
def encode_prompts(args: Namespace, accelerator: Accelerator, plan: Plan, examples: list[Example]) -> PromptTable:
    """Tokenise every prompt of the run and, with --pre_compute_text_embeddings, encode them and free the encoder."""
    texts = [example.prompt for example in examples]
    if args.validation_prompt:
        texts += [args.validation_prompt, args.validation_negative_prompt]
    texts = list(dict.fromkeys(texts))
    tokenizer = load_tokenizer(args, plan.base)
    length = args.tokenizer_max_length or tokenizer.model_max_length
    rows = tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    for text, whole in zip(texts, tokenizer(texts)["input_ids"]):
        if len(whole) > length:
            cut = tokenizer.decode(whole[length - 1 : -1])
            logger.warning(f"The prompt {text!r} is longer than {length} tokens; the model will not see {cut!r}.")
    ids = rows["input_ids"].to(accelerator.device)
    mask = rows["attention_mask"].to(accelerator.device) if plan.base.hides_padding else None
    prompts = PromptTable(texts, ids, mask)
    if args.pre_compute_text_embeddings:
        text_encoder = load_text_encoder(args, plan.base, plan.frozen_dtype).to(accelerator.device)
        prompts.embeds = embed_prompts(prompts, text_encoder, torch.arange(len(texts)), together=False)
        del text_encoder
        devices.free_memory()
    return prompts


# Same in train_dreambooth.py
def embed_prompts(prompts: PromptTable, text_encoder: nn.Module | None, rows: Tensor, together: bool) -> Tensor:
    """Return the embeddings of the prompts in the given rows, each distinct row encoded once.

    Args:
        rows: (B,) int64 rows of the table, on the CPU.
        together: Encode all in one call, as data parallelism needs for a network that trains. Otherwise one prompt a
            call: then an embedding does not depend on its neighbours, and equals the precomputed one to the bit.

    Returns:
        (B, L, D) embeddings in the text encoder's precision.
    """
    if prompts.embeds is not None:
        return prompts.embeds[rows.to(prompts.embeds.device, non_blocking=True)]
    distinct, inverse = rows.unique(return_inverse=True)
    chunks = [distinct] if together else distinct.split(1)
    encoded = []
    for chunk in chunks:
        chosen = chunk.to(prompts.ids.device, non_blocking=True)
        mask = None if prompts.mask is None else prompts.mask[chosen]
        encoded.append(text_encoder(prompts.ids[chosen], attention_mask=mask)[0])
    return torch.cat(encoded)[inverse.to(prompts.ids.device, non_blocking=True)]


# ------------------------------------------------------------------------------------------------------------ models


# Same in train_dreambooth.py
def load(args: Namespace, kind: type, part: str | None = None, **options) -> Any:
    """Load a part of the base model, or with part None the whole of it."""
    where = {"revision": args.revision, "token": args.hub_token} | ({"variant": args.variant} if args.variant else {})
    return model_files.load(kind, args.pretrained_model_name_or_path, part, **where, **options)


# Same in train_dreambooth.py
def load_tokenizer(args: Namespace, base: BaseModel) -> Any:
    """Load the base model's tokenizer, or the one of --tokenizer_name."""
    if args.tokenizer_name:
        return model_files.load(transformers.AutoTokenizer, args.tokenizer_name, None, token=args.hub_token)
    return load(args, model_files.component_class(base.index, "tokenizer"), "tokenizer")


# Same in train_dreambooth.py
def load_text_encoder(args: Namespace, base: BaseModel, dtype: torch.dtype) -> nn.Module:
    """Load the base model's text encoder, frozen, in the given precision."""
    kind = model_files.component_class(base.index, "text_encoder")
    return load(args, kind, "text_encoder", dtype=dtype).requires_grad_(False).eval()


# Same in train_dreambooth.py
def load_models(args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable) -> Models:
    """Load the networks, frozen, on the device: in float32 if all their weights will train."""
    trained_dtype = torch.float32 if TRAINS_WHOLE_NETWORKS else plan.frozen_dtype
    unet = load(args, diffusers.UNet2DConditionModel, "unet", dtype=trained_dtype)
    vae = load(args, diffusers.AutoencoderKL, "vae", dtype=plan.frozen_dtype).eval()
    for network in (unet, vae):
        network.requires_grad_(False).to(accelerator.device)
    noise_scheduler = diffusers.DDPMScheduler.from_config(plan.base.scheduler)
    models = Models(unet, vae, None, noise_scheduler, {"unet": unet})
    if prompts.embeds is None:
        dtype = trained_dtype if args.train_text_encoder else plan.frozen_dtype
        models.text_encoder = load_text_encoder(args, plan.base, dtype).to(accelerator.device)
    if args.train_text_encoder:
        models.trained["text_encoder"] = models.text_encoder
    if args.enable_xformers_memory_efficient_attention and is_installed("xformers"):
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.gradient_checkpointing and args.train_text_encoder:
        models.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    return models


def prepare_training(args: Namespace, plan: Plan, models: Models) -> None:
    """Add float32 adapters to the U-Net, and to the text encoder if it is trained; at first they change nothing.

    Raises:
        InputError: A layer to adapt occurs in none of the names of the network's layers.
    """
    layers = method_fits(args)["layers"].split(",")
    torch.manual_seed(derive_seed(plan.seed, "adapter"))
    for model, names in zip(models.trained.values(), (layers, TEXT_ENCODER_LAYERS)):
        there = [f".{name}" for name, _ in model.named_modules()]
        if missing := [name for name in names if not any(path.endswith(f".{name}") for path in there)]:
            raise InputError(f"{type(model).__name__} has no layers named {', '.join(missing)}. See --lora_layers.")
        config = peft.LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=list(names),
        )
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise InputError(f"--lora_layers {','.join(names)}: {error}") from error
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        model.train()


# Same in train_dreambooth.py
def wrap_for_devices(accelerator: Accelerator, models: Models, optimizer: Optimizer) -> Optimizer:
    """Wrap what trains for mixed precision and data parallelism.

    With mixed precision, a wrapped network's `forward` runs under autocast and returns float32.
    """
    *wrapped, optimizer = accelerator.prepare(*models.trained.values(), optimizer)
    models.trained = dict(zip(models.trained, wrapped))
    models.unet, models.text_encoder = models.trained["unet"], models.trained.get("text_encoder", models.text_encoder)
    return optimizer


# -------------------------------------------------------------------------------------------------------------- data


# Same in train_dreambooth.py
class DreamBoothDataset(Dataset):
    """The pictures of the run, read, cut and scaled anew at each visit."""

    def __init__(self, args: Namespace, plan: Plan, prompts: PromptTable, examples: list[Example]):
        """Remember what is needed to cut pictures; read none."""
        self.examples = examples
        rows = {text: row for row, text in enumerate(prompts.texts)}
        self.prompt_rows = [rows[example.prompt] for example in examples]
        self.seed = plan.seed
        self.resolution = plan.base.resolution
        self.center_crop = args.center_crop
        self.random_flip = args.random_flip
        self.resample = Image.Resampling[args.image_interpolation_mode.upper()]

    def __getitem__(self, draw: Draw) -> dict:
        """Return one example; its crop and flip depend on the seed, the example and the visit alone."""
        example = self.examples[draw.example]
        chance = random.Random(derive_seed(self.seed, "crop and flip", draw.example, draw.visit))
        image = self.cut(open_resized(example.path, self.resolution, self.resample), chance)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "pixel_values": pixels,
            "prompt_rows": self.prompt_rows[draw.example],
            "is_prior": example.is_prior,
            "seeds": draw.seed,
        }

    def cut(self, image: Image.Image, chance: random.Random) -> Image.Image:
        """Crop a picture whose shorter edge has the resolution to a square, and perhaps mirror it."""
        size, (width, height) = self.resolution, image.size
        left, top = (width - size) // 2, (height - size) // 2
        if not self.center_crop:
            left, top = chance.randint(0, width - size), chance.randint(0, height - size)
        image = image.crop((left, top, left + size, top + size))
        mirrored = self.random_flip and chance.random() < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


# Same in train_dreambooth.py
@functools.lru_cache(maxsize=256)
def open_resized(path: Path, size: int, resample: Image.Resampling) -> Image.Image:
    """Open a picture and resize its shorter edge in one antialiased step; the last ones are remembered."""
    image = images.open_rgb(path)
    scale = size / min(image.size)
    return image.resize(tuple(max(size, round(edge * scale)) for edge in image.size), resample)


# Same in train_dreambooth.py
class StepSampler:
    """Say which examples each micro-step of this process visits, as a function of the micro-step alone.

    Instance examples come in an endless sequence of shuffled passes, and so do class examples; micro-step m takes the
    next `global_batch` of either. So every photo is seen once before any is seen again, batches are always full, and
    a resumed run needs no replay.
    """

    def __init__(self, plan: Plan, examples: list[Example], first: int, last: int, rank: int):
        """Cover the micro-steps `first` up to, not including, `last` for process `rank`."""
        self.seed, self.global_batch, self.rank = plan.seed, plan.global_batch, rank
        self.batch = plan.global_batch // plan.processes
        self.first, self.last = first, last
        instances = [index for index, example in enumerate(examples) if not example.is_prior]
        priors = [index for index, example in enumerate(examples) if example.is_prior]
        self.kinds = {"instance": instances, "class": priors} if priors else {"instance": instances}

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield this process's draws for each micro-step, instance examples before class examples."""
        for micro_step in range(self.first, self.last):
            yield [
                self.draw(kind, micro_step, self.rank * self.batch + place)
                for kind in self.kinds
                for place in range(self.batch)
            ]

    def draw(self, kind: str, micro_step: int, place: int) -> Draw:
        """Return the draw at one place of the global batch."""
        indices = self.kinds[kind]
        visit, position = divmod(micro_step * self.global_batch + place, len(indices))
        example = indices[shuffled(len(indices), derive_seed(self.seed, "order", kind, visit))[position]]
        return Draw(example, visit, derive_seed(self.seed, "example", kind, micro_step, place))


# Same in train_dreambooth.py
@functools.lru_cache(maxsize=16)
def shuffled(count: int, seed: int) -> list[int]:
    """Return the numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


# Same in train_dreambooth.py
def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack examples into a batch.

    Returns:
        `pixel_values` (B, 3, H, W) float32 in [-1, 1]; `prompt_rows` (B,) int64, rows of the prompt table;
        `is_prior` (B,) bool; `seeds` (B,) int64, from which each example's noise is drawn.
    """
    return torch.utils.data.default_collate(items)


# Same in train_dreambooth.py
def make_loader(
    args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable, examples: list[Example]
) -> DataLoader:
    """Return the batches of the steps that are left, for this process."""
    first, last = (steps * args.gradient_accumulation_steps for steps in (plan.first_step, plan.steps))
    return DataLoader(
        DreamBoothDataset(args, plan, prompts, examples),
        batch_sampler=StepSampler(plan, examples, first, last, accelerator.process_index),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )


# --------------------------------------------------------------------------------------------------------- optimizer


# Same in train_dreambooth.py
def make_optimizer(args: Namespace, plan: Plan, models: Models) -> Optimizer:
    """Return AdamW over what trains, one group of parameters for the U-Net and one for the text encoder."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in zip(models.trained.values(), plan.learning_rates)
    ]
    options = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes  # takes seconds to import

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)


# Same in train_dreambooth.py
def learning_rate(args: Namespace, step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step, counted from 0, as diffusers' schedules of the same names have it."""
    if args.lr_scheduler == "constant":
        return peak
    warmup = args.lr_warmup_steps
    if step < warmup:
        return peak * step / warmup
    if args.lr_scheduler == "constant_with_warmup":
        return peak
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if args.lr_scheduler == "linear":
        return peak * (1 - done)
    if args.lr_scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if args.lr_scheduler == "cosine_with_restarts":
        return 0.0 if done == 1 else peak * 0.5 * (1 + math.cos(math.pi * (args.lr_num_cycles * done % 1)))
    end = min(1e-7, peak)
    return end + (peak - end) * (1 - done) ** args.lr_power


# Same in train_dreambooth.py
def resume(accelerator: Accelerator, plan: Plan, models: Models, optimizer: Optimizer) -> None:
    """Restore weights and optimizer from the checkpoint that the plan names; draws need nothing restored."""
    if plan.resume_from is None:
        return
    load_weights(accelerator, plan.resume_from, models)
    state = torch.load(plan.resume_from / "optimizer.pt", map_location="cpu", weights_only=True)
    flags = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, given in zip(optimizer.param_groups, flags):
        # The checkpoint's state, but the weight decay and the like of this command.
        group.update(given)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    logger.info(f"Resumed from {plan.resume_from}: {plan.first_step} of {plan.steps} steps are done.")
    if plan.first_step >= plan.steps:
        logger.info("Nothing is left to train: raise --max_train_steps to go on.")


# -------------------------------------------------------------------------------------------------------------- loss


# Same in train_dreambooth.py
def compute_loss(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, prompts: PromptTable, batch: dict
) -> Loss:
    """Return the loss of one batch: add noise to the pictures, let the U-Net predict, compare with what is known."""
    device, seeds, scheduler = accelerator.device, batch["seeds"].tolist(), models.noise_scheduler
    clean = to_model_space(models.vae, batch["pixel_values"].to(device, non_blocking=True), seeds)
    noise, timesteps = draw_noise(clean.shape, seeds, scheduler.config.num_train_timesteps, plan.noise_offset)
    noise, timesteps = noise.to(device, non_blocking=True), timesteps.to(device, non_blocking=True)
    noisy = scheduler.add_noise(clean, noise, timesteps)

    trains_text = "text_encoder" in models.trained
    with torch.set_grad_enabled(trains_text):
        embeds = embed_prompts(prompts, models.text_encoder, batch["prompt_rows"], together=trains_text)
    prediction = models.unet(**unet_inputs(plan.base.kind, noisy, timesteps, embeds)).sample.float()

    prediction_type = plan.base.prediction_type
    wanted = target(scheduler, prediction_type, clean, noise, timesteps)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    losses = example_losses(prediction, wanted, timesteps, alphas_cumprod, prediction_type, args.snr_gamma)
    return combine(losses, batch["is_prior"], args.prior_loss_weight)


# Same in train_dreambooth.py
def to_model_space(vae: nn.Module, pixel_values: Tensor, seeds: list[int]) -> Tensor:
    """Encode pictures to the scaled latents that the U-Net works on (arXiv 2112.10752, section 3.1).

    Args:
        pixel_values: (B, 3, H, W) float32 in [-1, 1].
        seeds: One per picture, for the draw from the VAE's posterior.

    Returns:
        (B, C, h, w) float32.
    """
    latents = []
    # One picture at a time: then its latents do not depend on its neighbours, not even in the last bit.
    for pixels, seed in zip(pixel_values.to(vae.dtype).split(1), seeds):
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        chance = torch.randn(posterior.mean.shape, generator=generator(seed, "posterior"))
        latents.append(posterior.mean.float() + posterior.std.float() * chance.to(pixels.device, non_blocking=True))
    return torch.cat(latents) * vae.config.scaling_factor


# Same in train_dreambooth.py
def draw_noise(shape: torch.Size, seeds: list[int], num_train_timesteps: int, offset: float) -> tuple[Tensor, Tensor]:
    """Draw each example's noise and timestep from its own seed, on the CPU, so that the device does not matter.

    Args:
        shape: (B, C, h, w).
        offset: Strength of a second noise that is constant over each channel; 0: none.

    Returns:
        (B, C, h, w) float32 noise and (B,) int64 timesteps in [0, T).
    """
    noise = torch.stack([torch.randn(shape[1:], generator=generator(seed, "noise")) for seed in seeds])
    if offset:
        constant = [torch.randn(shape[1], 1, 1, generator=generator(seed, "noise offset")) for seed in seeds]
        noise = noise + offset * torch.stack(constant)
    steps = [torch.randint(num_train_timesteps, (), generator=generator(seed, "timestep")) for seed in seeds]
    return noise, torch.stack(steps)


# Same in train_dreambooth.py
def unet_inputs(kind: ModelKind, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> dict:
    """Return the U-Net's arguments for a kind of model: what it will be given when it draws."""
    return {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": embeds}


# Same in train_dreambooth.py
def target(
    scheduler: diffusers.DDPMScheduler, prediction_type: str, clean: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Return what the U-Net is to predict: the noise, or the velocity (arXiv 2202.00512, appendix D)."""
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return noise


# Same in train_dreambooth.py
def example_losses(
    prediction: Tensor,
    wanted: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None,
) -> Tensor:
    """Return each example's mean squared error, weighted by min-SNR if asked (arXiv 2303.09556, section 3.4).

    Args:
        prediction, wanted: (B, C, h, w) float32.
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) share of the signal in the variance at each timestep, in [0, 1].
        snr_gamma: Signal-to-noise ratio from which on the weight falls; None: weight 1.

    Returns:
        (B,) float32.
    """
    losses = F.mse_loss(prediction, wanted, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses
    signal = alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    if prediction_type == "v_prediction":
        return losses * snr.clamp(max=snr_gamma) / (snr + 1)
    # min(SNR, γ) / SNR in a form that is 1 at SNR = 0, where a zero-terminal-SNR schedule ends.
    return losses * (snr_gamma / snr).clamp(max=1)


# Same in train_dreambooth.py
def combine(losses: Tensor, is_prior: Tensor, prior_loss_weight: float) -> Loss:
    """Return mean(instance) + weight × mean(class) (arXiv 2208.12242, equation 2).

    Args:
        losses: (B,) one per example.
        is_prior: (B,) bool, on the CPU so that its content is known without waiting for the device.
    """
    if not is_prior.any():
        return Loss(losses.mean(), losses.mean().detach(), None)
    weights = is_prior.to(losses.device, losses.dtype, non_blocking=True)
    prior = (losses * weights).sum() / int(is_prior.sum())
    instance = (losses * (1 - weights)).sum() / int((~is_prior).sum())
    return Loss(instance + prior_loss_weight * prior, instance.detach(), prior.detach())


# -------------------------------------------------------------------------------------------------------------- loop


# Same in train_dreambooth.py
def train(
    args: Namespace,
    accelerator: Accelerator,
    plan: Plan,
    models: Models,
    prompts: PromptTable,
    loader: DataLoader,
    optimizer: Optimizer,
    stop: StopRequest,
) -> bool:
    """Train from the plan's first step to its last; return False if a signal stopped it, with a checkpoint saved."""
    batches, parameters = iter(loader), [p for group in optimizer.param_groups for p in group["params"]]
    metrics = MetricLog(accelerator, plan.output_dir / "metrics.jsonl", plan.first_step, plan.steps)
    every = args.validation_epochs * plan.steps_per_epoch if args.validation_epochs else args.validation_steps
    if plan.first_step == 0 and args.validation_prompt:
        validate(args, accelerator, plan, models, prompts, 0)
    accumulation = args.gradient_accumulation_steps
    for step in range(plan.first_step, plan.steps):
        began, done, losses = time.perf_counter(), step + 1, []
        rates = [learning_rate(args, step, plan.steps, peak) for peak in plan.learning_rates]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        for micro_step in range(step * accumulation, done * accumulation):
            torch.manual_seed(derive_seed(plan.seed, "dropout", micro_step, accelerator.process_index))
            with accelerator.accumulate(*models.trained.values()):
                loss = compute_loss(args, accelerator, plan, models, prompts, next(batches))
                accelerator.backward(loss.total)
            losses.append(loss)
        # Outside of `accumulate`, whose last turn has added up the processes' gradients.
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        values = {"epoch": done * accumulation / plan.epoch_length, **mean_losses(accelerator, losses)}
        values |= dict(zip(("lr", "lr_text_encoder"), rates)) | {"grad_norm": norm}
        metrics.add(done, began, plan.examples_per_step, values)
        stopped = stop.agree() is not None
        if not stopped and args.validation_prompt and (done % every == 0 or done == plan.steps):
            metrics.flush()  # trackers take no numbers of a step once they have its pictures
            validate(args, accelerator, plan, models, prompts, done)
        if stopped or done % args.checkpointing_steps == 0:
            metrics.flush()
            save_checkpoint(args, accelerator, plan, models, optimizer, done)
        if stopped:
            logger.info(f"Stopped. Go on by the same command with --resume_from_checkpoint checkpoint-{done}.")
            return False
    metrics.close()
    return True


# Same in train_dreambooth.py
def mean_losses(accelerator: Accelerator, losses: list[Loss]) -> dict[str, Tensor]:
    """Return a step's losses by their names in the log: means over micro-steps and processes, still on the device."""
    parts = zip(("loss", "loss_instance", "loss_prior"), zip(*losses))
    means = {name: torch.stack(values).detach().mean() for name, values in parts if values[0] is not None}
    return accelerator.reduce(means, reduction="mean")


# Same in train_dreambooth.py
def save_checkpoint(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, optimizer: Optimizer, step: int
) -> None:
    """Write checkpoint-N whole or not at all, then remove older ones beyond the limit."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with checkpoints.atomic_folder(plan.output_dir / f"checkpoint-{step}") as folder:
            save_weights(accelerator, folder, models)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, folder / "optimizer.pt")
            state = {"step": step, "fits": plan.fits}
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        checkpoints.prune(plan.output_dir, args.checkpoints_total_limit, newest=step)
    accelerator.wait_for_everyone()


def save_weights(accelerator: Accelerator, folder: Path, models: Models) -> None:
    """Write the adapters as one file that `load_lora_weights` reads, with rank and alpha in its metadata."""
    weights, metadata = {}, {}
    for name, wrapped in models.trained.items():
        model = accelerator.unwrap_model(wrapped)
        config = model.peft_config["default"].to_dict()
        # A set's order differs from run to run, and so does that of several entries of metadata: equal weights
        # shall give equal files.
        config["target_modules"] = sorted(config["target_modules"])
        metadata |= {f"{name}.{key}": value for key, value in config.items()}
        # transformers 5 dropped this level of CLIP's names; with it, older versions find the layers as well.
        level = "text_model." if name == "text_encoder" and not hasattr(model, "text_model") else ""
        weights |= {f"{name}.{level}{key}": value.contiguous() for key, value in adapter_weights(model).items()}
    header = {"lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE, header)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's own names."""
    # Otherwise peft looks for the base model's files, to find out whether its vocabulary was changed.
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def load_weights(accelerator: Accelerator, folder: Path, models: Models) -> None:
    """Read what `save_weights` wrote into the adapters.

    Raises:
        InputError: The file's tensors are not those of the adapters.
    """
    state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    for name, wrapped in models.trained.items():
        model = accelerator.unwrap_model(wrapped)
        weights = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not hasattr(model, "text_model"):
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        if weights.keys() != adapter_weights(model).keys():
            raise InputError(f"{folder / WEIGHTS_FILE} holds other layers of the {name} than this run adapts.")
        peft.set_peft_model_state_dict(model, weights)


# -------------------------------------------------------------------------------------------------------- validation


# Same in train_dreambooth.py
def validate(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, prompts: PromptTable, step: int
) -> None:
    """Draw the validation prompt with the live weights, the same seeds each time, and leave training as it was.

    Nothing of the run's randomness is touched: the sampler has generators of its own, and training seeds each
    micro-step. The processes share the pictures. Running out of memory is a warning.
    """
    folder = plan.output_dir / "samples" / f"step-{step:06d}"
    try:
        draw_previews(args, accelerator, plan, models, prompts, folder)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        logger.warning(f"Validation at step {step} ran out of memory; training goes on. {error}")
    finally:
        for model in models.trained.values():
            model.train()
        devices.free_memory()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        paths = [folder / f"{index:02d}.png" for index in range(args.num_validation_images)]
        drawn = [images.open_rgb(path) for path in paths if path.exists()]
        if not drawn:
            return
        grid = previews.make_grid(drawn, columns=4, title=f"{args.validation_prompt} (step {step})")
        images.save_png(grid, folder / "grid.png")
        track_images(accelerator, "validation", drawn, step)


# Same in train_dreambooth.py
def draw_previews(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, prompts: PromptTable, folder: Path
) -> None:
    """Draw this process's share of the pictures; picture i comes from seed + i, as `utils.sample` draws it."""
    rows = torch.tensor([prompts.texts.index(t) for t in (args.validation_prompt, args.validation_negative_prompt)])
    for model in models.trained.values():
        model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        text_encoder = models.text_encoder and accelerator.unwrap_model(models.text_encoder)
        prompt, negative = embed_prompts(prompts, text_encoder, rows, together=False).split(1)
    with torch.no_grad(), accelerator.autocast():
        pipeline = make_preview_pipeline(args, accelerator, plan, models)
        for index in range(accelerator.process_index, args.num_validation_images, accelerator.num_processes):
            image = pipeline(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                generator=torch.Generator().manual_seed((plan.seed + index) % 2**32),
                height=plan.base.resolution,
                width=plan.base.resolution,
                guidance_scale=args.validation_guidance_scale,
                num_inference_steps=args.validation_num_inference_steps,
            ).images[0]
            images.save_png(image, folder / f"{index:02d}.png")


# Same in train_dreambooth.py
def make_preview_pipeline(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models
) -> diffusers.DiffusionPipeline:
    """Build the pipeline that draws previews from the networks in memory."""
    scheduler = getattr(diffusers, args.validation_scheduler).from_config(plan.base.scheduler)
    unused = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    unet = accelerator.unwrap_model(models.unet)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=models.vae, unet=unet, scheduler=scheduler, **unused, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------ result


# Same in train_dreambooth.py
def describe_run(
    args: Namespace, plan: Plan, examples: list[Example], models: Models, optimizer: Optimizer
) -> dict[str, str]:
    """Return the run in words, for the start-up screen and the model card."""
    networks = [model for model in (models.unet, models.vae, models.text_encoder) if model is not None]
    counts = [(p.numel() / 1e6, p.requires_grad) for model in networks for p in model.parameters()]
    trained, frozen = (sum(count for count, trains in counts if trains is which) for which in (True, False))
    photos = [example.prompt for example in examples if not example.is_prior]
    class_images = [example.prompt for example in examples if example.is_prior]
    rates = " and ".join(f"{rate:g}" for rate in plan.learning_rates)
    batch = f"{args.train_batch_size} x {plan.processes} processes x {args.gradient_accumulation_steps} accumulated"
    prior, weights = args.prior_loss_weight, f"min-SNR {args.snr_gamma or 'off'}, noise offset {plan.noise_offset:g}"
    return {
        "model": plan.base.kind.value,
        "resolution": f"{plan.base.resolution} px" + ("" if args.resolution else ", the default for this model"),
        "weights": f"{trained:.2f} M train in float32, {frozen:.2f} M are frozen in {plan.frozen_dtype}",
        **{name: str(value) for name, value in method_fits(args).items()},
        "text encoder": "trained" if args.train_text_encoder else "not trained",
        **({"tokens a prompt": str(args.tokenizer_max_length)} if args.tokenizer_max_length else {}),
        **({"padding": "hidden from the text encoder"} if plan.base.hides_padding else {}),
        "photos": f"{len(photos)} of {' or '.join(map(repr, sorted(set(photos))[:3]))}",
        "class images": f"{len(class_images)} of {args.class_prompt!r}" if class_images else "none",
        "batch": f"{batch} = {plan.examples_per_step} pictures a step",
        "steps": f"{plan.steps}, {plan.steps_per_epoch} an epoch; {plan.first_step} are done",
        "loss": f"{plan.base.prediction_type}, {weights}" + (f", prior weight {prior:g}" if class_images else ""),
        "learning rate": f"{rates}, {args.lr_scheduler}, {type(optimizer.optimizer).__name__}",
        "arithmetic": f"{plan.fits['precision']} mixed precision on {models.vae.device.type}, seed {plan.seed}",
    }


def save_result(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> None:
    """Write the adapter file and, beside it, the scheduler that the base model draws with."""
    if accelerator.is_main_process:
        with checkpoints.atomic_result(plan.output_dir, last=WEIGHTS_FILE) as folder:
            save_weights(accelerator, folder, models)
            model_files.write_scheduler_config(folder, plan.base.scheduler)
        logger.info(f"The adapter is {plan.output_dir / WEIGHTS_FILE}.")
    accelerator.wait_for_everyone()


def usage_snippet(args: Namespace, name: str) -> str:
    """Return Python code that draws a picture with the result, and runs as it stands."""
    prompt = args.validation_prompt or args.instance_prompt
    reading = model_card.reading_lines(args.tokenizer_max_length, args.text_encoder_use_attention_mask)
    base_model = args.pretrained_model_name_or_path
    return model_card.lora_snippet(name, prompt, base_model, args.revision, args.variant, reading)


# Same in train_dreambooth.py
def share(args: Namespace, plan: Plan, summary: dict[str, str], repository: str | None) -> None:
    """Write the model card and, if asked, upload; a failed upload leaves the result and says how to try again."""
    base_model = args.pretrained_model_name_or_path
    grid = f"samples/step-{max(plan.first_step, plan.steps):06d}/grid.png"
    card = model_card.Card(
        title=repository or plan.output_dir.resolve().name,
        base_model=base_model,
        tags=["text-to-image", "diffusers", "diffusers-training", "dreambooth", "stable-diffusion", *METHOD_TAGS],
        instance_prompt=args.instance_prompt,
        validation_prompt=args.validation_prompt,
        grid=grid if (plan.output_dir / grid).exists() else None,
        settings=summary,
        snippet=usage_snippet(args, repository or str(plan.output_dir)),
    )
    license = model_card.find_license(base_model, args.revision, args.hub_token)
    checkpoints.atomic_write_text(plan.output_dir / "README.md", model_card.render(card, license))
    if repository:
        logger.info(f"Uploaded to {hub.upload_result(plan.output_dir, repository, args.hub_token)}")


if __name__ == "__main__":
    show_input_errors_without_traceback()
    sys.exit(main())
