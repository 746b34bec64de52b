#!/usr/bin/env python
"""Teach Stable Diffusion or DeepFloyd IF one subject from a few photos by low-rank adapters (LoRA DreamBooth).

    accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path MODEL --instance_data_dir photos/ \
        --instance_prompt "a photo of sks dog" --max_train_steps 800 --learning_rate 1e-4

A run from top to bottom is `main`. To change an experiment, edit one function:

    one training step .............. compute_loss             the data and its captions ...... list_examples
    which weights train ............ prepare_training         crops, flips, pixel values ..... DreamBoothDataset
    noise and timesteps ............ draw_noise               which example comes when ....... StepSampler
    what stage II is fed ........... stage_two_inputs         the optimizer .................. make_optimizer
    what is to be predicted ........ target                   the schedule ................... learning_rate
    the weight of each example ..... example_losses           previews and their sampler ..... make_preview_pipeline
    instance against class ......... combine                  what is kept ................... save_result

Letters in shapes: B batch, C channels, H W height and width in pixels, h w in latents, L tokens, D text width,
T train timesteps, N distinct prompts.

Papers: DreamBooth arXiv 2208.12242, LoRA 2106.09685, latent diffusion 2112.10752, velocity prediction 2202.00512,
Min-SNR 2303.09556, cascades 2205.11487, learned variance 2102.09672.
"""

import argparse
import dataclasses
import datetime
import enum
import functools
import json
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
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils import adapters, captions, checkpoints, devices, drawing, hub, images, model_card, model_files, schedules
from utils.caption_files import STRATEGIES, find_captions
from utils.config_file import parse_with_config
from utils.embedding_cache import open_cache
from utils.errors import InputError, exit_status
from utils.flag_checks import find_out_of_range, is_installed, problems_that_hold
from utils.folder_checks import find_folder_problems
from utils.geometry import CROP_STYLES, Size, crop_box, find_size_problems, parse_list, quarter
from utils.memory_use import explaining_running_out
from utils.metric_log import MetricLog, find_tracker_problems, start_trackers, track_images, tracker_names
from utils.processes import check_engine, on_main_process, set_up_logging
from utils.run_summary import describe_run
from utils.seeds import derive_seed, generator, shuffled
from utils.stop_request import StopRequest, ignore_signals

logger = get_logger(__name__)

METHOD = "LoRA DreamBooth"
METHOD_TAGS = ["lora"]
DEFAULT_OUTPUT_DIR = "lora-dreambooth-model"
DEFAULT_LEARNING_RATE = 5e-4
TRAINS_WHOLE_NETWORKS = False
UNET_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
IF_LAYERS = (*UNET_LAYERS, "add_k_proj", "add_v_proj")
TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Same in train_dreambooth.py
class ModelKind(enum.Enum):
    """The families of checkpoints that this script can train, by the words used in messages."""

    STABLE_DIFFUSION = "Stable Diffusion 1.x/2.x"
    IF_STAGE_1 = "DeepFloyd IF stage I"
    IF_STAGE_2 = "DeepFloyd IF stage II"


KINDS = {  # by the U-Net's input channels, the VAE, and the U-Net's class embedding
    (4, "AutoencoderKL", None): ModelKind.STABLE_DIFFUSION,
    (3, None, None): ModelKind.IF_STAGE_1,
    (6, None, "timestep"): ModelKind.IF_STAGE_2,
}
PIPELINES = {  # diffusers' classes that draw previews, by name, because importing them takes time
    ModelKind.STABLE_DIFFUSION: "StableDiffusionPipeline",
    ModelKind.IF_STAGE_1: "IFPipeline",
    ModelKind.IF_STAGE_2: "IFSuperResolutionPipeline",
}


# Same in train_dreambooth.py
@dataclasses.dataclass(frozen=True)
class BaseModel:
    """What the checkpoint's own config files say, and what follows from its kind; no weights."""

    kind: ModelKind
    index: dict  # model_index.json: the library and class of each component
    scheduler: dict  # its config, with the variance that results and previews are drawn with
    image_noising_scheduler: dict | None  # of stage II
    conditioning: str | None  # of stage II: noise_level or timesteps
    prediction_type: str  # epsilon or v_prediction
    size_factor: int  # width and height in pixels are multiples of it
    learns_variance: bool  # the U-Net puts out twice its image channels
    hides_padding: bool  # from the text encoder, as the model's pipeline will when it draws
    precomputes_text: bool  # the text encoder is freed before the U-Net is loaded
    vocabulary: int | None  # words that its text encoder knows
    tokens: int | None  # per prompt; None: the tokenizer's own limit
    own_size: Size  # in pixels, of what its pipeline draws unless told otherwise
    resolution: Size  # in pixels, to train at
    preview_sizes: list[Size]

    @property
    def is_if(self) -> bool:
        """Whether this is a pixel model with a T5 text encoder."""
        return self.kind is not ModelKind.STABLE_DIFFUSION

    @property
    def enlarges_from(self) -> Size | None:
        """The size in pixels of what stage II enlarges to the resolution; None for others."""
        return quarter(self.resolution) if self.kind is ModelKind.IF_STAGE_2 else None


# Same in train_dreambooth.py
class Example(NamedTuple):
    """One picture of the run: known before any pixel is read."""

    path: Path
    prompts: tuple[str, ...]  # one is drawn at each visit
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
    previews: list[drawing.Preview]  # the pictures of each round of validation
    output_dir: Path
    resume_from: Path | None
    prompt: str  # the instance prompt, or a photo's caption
    fits: dict  # what a checkpoint of this run and the run that resumes it must have in common


# Same in train_dreambooth.py
@dataclasses.dataclass
class PromptTable:
    """Every distinct prompt of the run, a row each."""

    texts: list[str]
    ids: Tensor  # (N, L) int64 tokens, on the training device
    mask: Tensor | None  # (N, L) int64 attention mask; None when the text encoder sees padding too
    embeds: Tensor | None = None  # (N, L, D); None when embeddings are computed in the loop

    def rows_of(self, *texts: str) -> Tensor:
        """Return the rows of some prompts, (number of texts,) int64."""
        return torch.tensor([self.texts.index(text) for text in texts])


# Same in train_dreambooth.py
@dataclasses.dataclass
class Models:
    """The networks of the run; `trained` names those that are optimized, as `accelerate` wraps them."""

    unet: nn.Module
    vae: nn.Module | None  # None for models that work on pixels
    text_encoder: nn.Module | None
    noise_scheduler: DDPMScheduler
    image_noising_scheduler: DDPMScheduler | None  # of stage II
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

    with StopRequest() as stop, explaining_running_out(accelerator, vars(args)) as networks:
        # 2. Words to tensors; a text encoder that the loop does not need is freed here.
        prompts = encode_prompts(args, accelerator, plan, examples)

        # 3. Draw missing class images, and what stage II previews enlarge; the pipelines that draw are freed.
        missing = {example.path for example in examples if example.is_missing}
        draw_class_images(args, accelerator, plan, prompts, missing, stop)
        write_small_images(args, accelerator, plan, prompts, examples)

        # 4. Networks, and which of their weights train.
        models = load_models(args, accelerator, plan, prompts)
        networks.update(filter(None, (models.unet, models.vae, models.text_encoder)))
        prepare_training(args, plan, models)
        optimizer = make_optimizer(args, plan, models)
        optimizer = wrap_for_devices(accelerator, models, optimizer)
        resume(accelerator, plan, models, optimizer)

        # 5. The loop.
        loader = make_loader(args, accelerator, plan, prompts, examples)
        summary = describe_run(vars(args), plan, method_fits(args, plan.base), examples, models, optimizer)
        accelerator.print(f"{METHOD} of {args.pretrained_model_name_or_path} to {plan.output_dir}")
        accelerator.print(*(f"  {name + ' ':.<15} {text}" for name, text in summary.items()), sep="\n", flush=True)
        finished = train(args, accelerator, plan, models, prompts, loader, optimizer, stop)

        # 6. The result. An upload may outlast the patience of waiting processes: they must be let go before it.
        if finished:
            instead = functools.partial(write_checkpoint, args, accelerator, plan, models, optimizer, plan.steps)
            with checkpoints.or_else(instead, plan.steps):
                save_result(args, accelerator, plan, models)
        accelerator.end_training()
        if finished and accelerator.is_main_process:
            share(args, plan, summary, repository, stop)
        return 0 if finished else stop.exit_code


# ------------------------------------------------------------------------------------------------------------- flags

AT_LEAST_ONE = (
    "num_class_images sample_batch_size tokenizer_max_length train_batch_size gradient_accumulation_steps "
    "num_train_epochs max_train_steps lr_num_cycles checkpointing_steps checkpoints_total_limit num_validation_images "
    "validation_steps validation_epochs validation_num_inference_steps num_eval_images"
).split()
NOT_NEGATIVE = (
    "seed dataloader_num_workers prior_loss_weight lr_warmup_steps learning_rate text_encoder_lr lr_end lr_power "
    "adam_weight_decay max_grad_norm noise_offset validation_guidance_scale class_guidance_scale"
).split()
# A run and the checkpoint that it goes on from must agree in these; what else is changed holds from there on.
FITS = (
    "revision instance_prompt class_prompt tokenizer_name train_text_encoder use_8bit_adam train_batch_size "
    "gradient_accumulation_steps train_variance"
).split()


# Same in train_dreambooth.py
def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags, over those of --config if it is given, and exit with status 2 naming every mistake in them."""
    parser = make_parser()
    args = parse_with_config(parser, sys.argv[1:] if argv is None else list(argv))
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
    learned, trained = (add_model_args, add_data_args), (add_training_args, add_optimizer_args, add_method_args)
    for add_flags in (*learned, *trained, add_validation_args, add_result_args):
        group = parser.add_argument_group(add_flags.__doc__.removeprefix("Add the flags of ").rstrip("."))
        # `--flag` switches on, `--no-flag` off: so that the command line can undo a switch of --config.
        action = argparse.BooleanOptionalAction
        add, switch = group.add_argument, functools.partial(group.add_argument, action=action, default=False)
        add_flags(add, switch)
    return parser


# Same in train_dreambooth.py
def add_model_args(add, switch) -> None:
    """Add the flags of the model and its prompts."""
    kind_decides, precisions = functools.partial(switch, default=None), ["fp32", "fp16", "bf16", "int8"]
    add("--pretrained_model_name_or_path", metavar="MODEL", help="Hub id or folder of the base model (required).")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the weight files, for example fp16.")
    add("--stage_one_model_name_or_path", metavar="MODEL", help="IF's stage I, to draw what stage II then enlarges.")
    labels = ["noise_level", "timesteps"]
    add("--class_labels_conditioning", choices=labels, help="Of stage II: timesteps as published; unset: noise_level.")
    add("--tokenizer_name", help="Hub id or folder of another tokenizer than the model's own.")
    add("--tokenizer_max_length", type=int, metavar="L", help="Tokens per prompt; unset: the model's own limit.")
    switch("--train_text_encoder", help="Train the text encoder as well; not T5.")
    kind_decides("--text_encoder_use_attention_mask", help="Hide padding from it; samplers must, too. IF: always.")
    kind_decides("--pre_compute_text_embeddings", help="Encode all prompts first, free the text encoder. IF: always.")
    add("--text_encoder_precision", choices=precisions, help="For precomputing; unset: as --mixed_precision.")
    add("--cache_dir", metavar="DIR", help="Keeps precomputed embeddings for later runs; unset: ~/.cache/dreambooth.")


# Same in train_dreambooth.py
def add_data_args(add, switch) -> None:
    """Add the flags of the photos and class images."""
    modes, precisions = [mode.name.lower() for mode in Image.Resampling], ["no", "fp32", "fp16", "bf16"]
    add("--instance_data_dir", metavar="DIR", help="Folder with photos of the subject, read recursively (required).")
    add("--instance_prompt", help="What every photo shows, with an identifier: 'a photo of sks dog'.")
    where = "textfile: the lines of photo.txt beside photo.jpg, one a visit; metadata: metadata.jsonl."
    add("--caption_strategy", default="instanceprompt", choices=STRATEGIES, help=f"Where captions are. {where}")
    switch("--prepend_instance_prompt", help="Begin each of those captions with the instance prompt.")
    add("--resolution", metavar="SIZE", help="Pixels, as 512 or 512x640 (width x height); unset: the model's own.")
    add("--crop_style", choices=CROP_STYLES, help="shifted_center: up to a tenth off, as IF had it. Unset: random.")
    switch("--center_crop", help="The same as --crop_style center.")
    switch("--random_flip", help="Mirror a picture left to right in half of its visits.")
    add("--image_interpolation_mode", choices=modes, help="How pictures are resized; unset: lanczos, for IF bicubic.")
    switch("--skip_bad_images", help="Go on without unreadable photos; off: an error that lists them.")
    add("--caption_dropout", type=float, default=0.0, help="Share of captions replaced by the empty one, in [0, 1).")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that load pictures; 0: the trainer itself.")
    switch("--with_prior_preservation", help="Train on class images beside the photos.")
    add("--class_data_dir", metavar="DIR", help="Folder of class images; unset: class_images in --output_dir.")
    add("--class_prompt", help="What the class images show, without the identifier: 'a photo of dog'.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class images' loss; 0: none.")
    add("--num_class_images", type=int, default=100, help="Class images used; missing ones are drawn by the model.")
    add("--class_guidance_scale", type=float, help="For drawing class images; 1: none; unset: the pipeline's own.")
    add("--sample_batch_size", type=int, default=4, help="Class images drawn at a time, per process.")
    add("--prior_generation_precision", choices=precisions, help="For drawing; unset: fp16 on a GPU, else fp32.")


# Same in train_dreambooth.py
def add_training_args(add, switch) -> None:
    """Add the flags of the run, its precision and devices."""
    add("--output_dir", default=DEFAULT_OUTPUT_DIR, metavar="DIR", help="Where everything is written.")
    add("--seed", type=int, help="Batches and previews follow from it; unset: drawn, printed and kept in args.json.")
    add("--train_batch_size", type=int, default=4, metavar="B", help="Photos per micro-step and process.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per optimizer step.")
    add("--num_train_epochs", type=int, default=1, help="Length of the run when --max_train_steps is unset.")
    add("--max_train_steps", type=int, help="Length of the run in optimizer steps; wins over --num_train_epochs.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints kept, newest first; unset: all.")
    add("--resume_from_checkpoint", metavar="NAME", help="'latest', checkpoint-N in --output_dir, or a path.")
    precisions = ["no", "fp16", "bf16"]
    add("--mixed_precision", choices=precisions, help="Of arithmetic and frozen weights; unset: accelerate's setting.")
    switch("--gradient_checkpointing", help="Less memory for more time: activations are computed twice.")
    switch("--allow_tf32", help="Faster float32 products on NVIDIA GPUs since Ampere.")
    switch("--enable_xformers_memory_efficient_attention", help="Use xformers if installed; else torch's attention.")
    switch("--deterministic", help="Exact repetition on GPUs too, with slower kernels; a CPU needs no flag for it.")
    switch("--set_grads_to_none", help="Has no work left to do: torch always does it.")
    add("--local_rank", type=int, default=-1, help="Has no work left to do: the launcher's environment says it.")


# Same in train_dreambooth.py
def add_optimizer_args(add, switch) -> None:
    """Add the flags of the loss, the optimizer and the learning rate."""
    add("--learning_rate", type=float, default=DEFAULT_LEARNING_RATE, help="After the warm-up.")
    add("--text_encoder_lr", type=float, help="Learning rate of the text encoder; unset: --learning_rate.")
    switch("--scale_lr", help="Multiply the rates by accumulation steps x batch size x processes.")
    add("--lr_scheduler", default="constant", choices=schedules.NAMES, help="How the learning rate changes.")
    add("--lr_warmup_steps", type=int, default=500, help="Steps of warm-up; 'constant' has none.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    add("--lr_end", type=float, help="Last rate of polynomial, unset: 1e-7, or one_cycle, unset: highest / 250,000.")
    switch("--use_8bit_adam", help="Keep AdamW's state in 8 bits (bitsandbytes).")
    add("--adam_beta1", type=float, default=0.9, help="Decay of AdamW's first moment, in [0, 1).")
    add("--adam_beta2", type=float, default=0.999, help="Decay of AdamW's second moment, in [0, 1).")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay; 0: none.")
    add("--adam_epsilon", type=float, default=1e-8, help="Added to AdamW's denominator.")
    add("--max_grad_norm", type=float, default=1.0, help="Longest gradient; a longer one is scaled down. 0: no limit.")
    add("--snr_gamma", type=float, metavar="GAMMA", help="Min-SNR weighting, usually 5; unset: all timesteps alike.")
    switch("--offset_noise", help="The same as --noise_offset 0.1, unless that is given too.")
    add("--noise_offset", type=float, help="Strength of noise that is constant over each channel; unset: none.")
    switch("--train_variance", help="Train IF's variance as well; off: what is trained draws with a fixed one.")


def add_method_args(add, switch) -> None:
    """Add the flags of LoRA."""
    add("--rank", type=int, default=4, help="Rank of each adapter.")
    add("--lora_alpha", type=int, help="Adapters count alpha / rank times; unset: the rank, so once.")
    add("--lora_dropout", type=float, default=0.0, help="Share of an adapter's inputs that are dropped, in [0, 1).")
    add("--lora_layers", help="Ends of the names of U-Net layers that get one; unset: all attention projections.")


# Same in train_dreambooth.py
def add_validation_args(add, switch) -> None:
    """Add the flags of the pictures that are drawn during training."""
    samplers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    add("--validation_prompt", help="Draw this before the first step, while training, and at the end; unset: nothing.")
    add("--validation_negative_prompt", default="", help="What the pictures are steered away from.")
    add("--num_validation_images", type=int, default=4, help="Pictures per round, with the same seeds in each.")
    add("--validation_steps", type=int, default=100, help="Optimizer steps between rounds.")
    add("--validation_epochs", type=int, help="Epochs between rounds; wins over --validation_steps.")
    add("--validation_scheduler", default=samplers[0], choices=samplers, help="Sampler of the pictures.")
    add("--validation_num_inference_steps", type=int, default=25, help="Sampling steps per picture.")
    add("--validation_guidance_scale", type=float, default=7.5, help="Classifier-free guidance; 1: none.")
    add("--validation_resolution", metavar="SIZES", help="All pictures at each, as 64,64x96; unset: --resolution.")
    add("--validation_images", nargs="+", metavar="FILE", help="What stage II enlarges, made a quarter of the size.")
    add("--num_eval_images", type=int, help="Photos that stage II enlarges, made small, when no other is given.")


# Same in train_dreambooth.py
def add_result_args(add, switch) -> None:
    """Add the flags of logs and of sharing."""
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
    ranges |= dict.fromkeys(("adam_beta1", "adam_beta2", "caption_dropout"), "in [0, 1)")
    ranges |= dict.fromkeys(NOT_NEGATIVE, "0 or more") | dict.fromkeys(AT_LEAST_ONE, "1 or more")
    wants_prompt = args.caption_strategy == "instanceprompt" or args.prepend_instance_prompt
    needed = ["pretrained_model_name_or_path", "instance_data_dir", *["instance_prompt"] * wants_prompt]
    photos, output = args.instance_data_dir and Path(args.instance_data_dir), Path(args.output_dir)
    classes = class_folder(args) if args.with_prior_preservation else None
    return [
        *(f"--{name} is required." for name in needed if not (getattr(args, name) or "").strip()),
        *captions.find_undecodable(vars(args)),
        *find_out_of_range(vars(args), ranges),
        *find_size_problems("--resolution", args.resolution),
        *find_size_problems("--validation_resolution", args.validation_resolution, many=True),
        *find_contradictions(args),
        *find_folder_problems(photos, output, classes, args.resume_from_checkpoint),
        *images.find_unreadable("--validation_images", args.validation_images or []),
        *find_tracker_problems(tracker_names(args.report_to)),
    ]


# Same in train_dreambooth.py
def find_contradictions(args: Namespace) -> list[str]:
    """Return a sentence for each flag that lacks or excludes another, a package or a device."""
    prior, text = args.with_prior_preservation, args.train_text_encoder
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precisions = {name: getattr(args, name) for name in ("prior_generation_precision", "text_encoder_precision")}
    int8 = {"use_8bit_adam": args.use_8bit_adam, "text_encoder_precision int8": "int8" in precisions.values()}
    stale = "--pre_compute_text_embeddings excludes --train_text_encoder, which changes the embeddings at each step."
    rises = 0 <= args.learning_rate < (args.lr_end or 0) < math.inf
    has_no_end = args.lr_end is not None and args.lr_scheduler not in ("one_cycle", "polynomial")
    crops = args.center_crop and args.crop_style not in (None, "center")
    return devices.find_precision_problems({"mixed_precision": precision, **precisions}, int8) + problems_that_hold(
        (prior and not args.class_prompt, "--with_prior_preservation needs --class_prompt, such as 'a photo of dog'."),
        (text and args.pre_compute_text_embeddings, stale),
        (args.text_encoder_lr is not None and not text, "--text_encoder_lr needs --train_text_encoder."),
        (precision not in PRECISIONS, f"accelerate is set to {precision}: give --mixed_precision no, fp16 or bf16."),
        (has_no_end, f"--lr_end needs --lr_scheduler one_cycle or polynomial, not {args.lr_scheduler}."),
        (rises, f"--lr_end {args.lr_end} is above --learning_rate {args.learning_rate}, the highest."),
        (crops, f"--center_crop excludes --crop_style {args.crop_style}."),
        (args.validation_images and args.num_eval_images, "--validation_images excludes --num_eval_images."),
    )


def find_method_problems(args: Namespace) -> list[str]:
    """Return every mistake in the flags that only LoRA has."""
    ranges = {"rank": "1 or more", "lora_alpha": "1 or more", "lora_dropout": "in [0, 1)"}
    empty = args.lora_layers is not None and "" in map(str.strip, args.lora_layers.split(","))
    message = f"--lora_layers {args.lora_layers!r} holds an empty name. Example: {','.join(UNET_LAYERS)}."
    return find_out_of_range(vars(args), ranges) + problems_that_hold((empty, message))


# Same in train_dreambooth.py
def class_folder(args: Namespace) -> Path:
    """Return the folder of the class images."""
    return Path(args.class_data_dir or Path(args.output_dir, "class_images"))


# ---------------------------------------------------------------------------------------------------------- start-up


# Same in train_dreambooth.py
def start(args: Namespace) -> Accelerator:
    """Connect the processes, set up logging and arithmetic, and say once which flags have no work to do."""
    check_engine()
    devices.set_arithmetic(args.deterministic, args.allow_tf32)
    logging_dir = str(Path(args.output_dir, args.logging_dir))
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker_names(args.report_to) or None,
        project_config=accelerate.utils.ProjectConfiguration(args.output_dir, logging_dir),
        # One process may load or write gigabytes, or draw a picture more, while the others wait.
        kwargs_handlers=[accelerate.utils.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
    )
    set_up_logging(accelerator)
    for note in idle_flags(args):
        logger.warning(note)
    return accelerator


# Same in train_dreambooth.py
def idle_flags(args: Namespace) -> list[str]:
    """Return a sentence for each flag that changes nothing in this run, or not what one might think."""
    xformers = args.enable_xformers_memory_efficient_attention and not is_installed("xformers")
    published = "--class_labels_conditioning timesteps never shows stage II what it is to enlarge; noise_level does."
    needs = dict.fromkeys(("class_prompt", "class_data_dir", "class_guidance_scale"), "with_prior_preservation")
    needs |= dict.fromkeys(("validation_images", "num_eval_images", "validation_resolution"), "validation_prompt")
    has_small = not args.validation_prompt or args.validation_images or args.num_eval_images
    unused = args.stage_one_model_name_or_path and has_small and not args.with_prior_preservation
    lacking = {name: need for name, need in needs.items() if getattr(args, name) and not getattr(args, need)}
    prepends = args.prepend_instance_prompt and args.caption_strategy == "instanceprompt"
    return problems_that_hold(
        (args.set_grads_to_none, "--set_grads_to_none has no work left to do: gradients are always set to None."),
        (args.local_rank != -1, "--local_rank has no work left to do: the launcher's environment says it."),
        (args.hub_token, "--hub_token is visible in the process list; HF_TOKEN or `hf auth login` is not."),
        (xformers, "xformers is not installed: torch's own attention serves instead."),
        *((True, f"--{name} has no effect without --{need}.") for name, need in lacking.items()),
        (prepends, "--prepend_instance_prompt has no effect with --caption_strategy instanceprompt."),
        (unused, "--stage_one_model_name_or_path has neither class images nor previews to draw."),
        (args.class_labels_conditioning == "timesteps", published),
    )


# Same in train_dreambooth.py
def recognise_model(args: Namespace) -> BaseModel:
    """Tell from the checkpoint's config files what it is.

    Raises:
        InputError: The checkpoint is none that this script trains, or flags contradict it.
    """
    name = args.pretrained_model_name_or_path
    configs = model_files.read_configs(name, args.revision, args.hub_token)
    unet, vae, scheduler = configs.unet, configs.vae, configs.scheduler
    kind = KINDS.get((unet.get("in_channels"), vae.get("_class_name"), unet.get("class_embed_type")))
    is_if, enlarges = kind is not ModelKind.STABLE_DIFFUSION, kind is ModelKind.IF_STAGE_2
    predictions = ("epsilon",) if is_if else ("epsilon", "v_prediction")
    if reason := model_files.why_unsupported(configs, kind is not None, predictions):
        supported = ", ".join(kind.value for kind in ModelKind)
        raise InputError(f"--pretrained_model_name_or_path {name} is {reason}: not supported. Supported: {supported}.")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    learns_variance = unet.get("out_channels") == 2 * (3 if is_if else 4)
    if learns_variance:
        # Untrained, the variance that the U-Net predicts belongs to other predictions than it will make.
        scheduler |= {"variance_type": "learned_range" if args.train_variance else "fixed_small"}
    factor = 2 ** (len((unet if is_if else vae)["block_out_channels"]) - 1)
    own = Size.of_config(unet.get("sample_size") or 64)
    usual = str(own) if is_if else "768" if prediction_type == "v_prediction" else "512"
    hides_padding = is_if or args.text_encoder_use_attention_mask or configs.text_encoder.get("use_attention_mask")
    base = BaseModel(
        kind=kind,
        index=configs.index,
        scheduler=scheduler,
        image_noising_scheduler=configs.image_noising_scheduler or None,
        conditioning=(args.class_labels_conditioning or "noise_level") if enlarges else None,
        prediction_type=prediction_type,
        size_factor=math.lcm(factor, 4) if enlarges else factor,
        learns_variance=learns_variance,
        hides_padding=bool(hides_padding),
        precomputes_text=is_if or bool(args.pre_compute_text_embeddings),
        vocabulary=configs.text_encoder.get("vocab_size"),
        tokens=args.tokenizer_max_length or (77 if is_if else None),
        own_size=own if is_if else Size(own.width * factor, own.height * factor),
        resolution=Size.parse(args.resolution or usual),
        preview_sizes=list(dict.fromkeys(parse_list(args.validation_resolution or args.resolution or usual))),
    )
    problems = find_misfits(args, base, configs.text_encoder.get("max_position_embeddings", 77))
    small = [quarter(size) for size in base.preview_sizes if not (args.validation_images or args.num_eval_images)]
    stage_one = (args.stage_one_model_name_or_path, args.hub_token)
    if problems := problems + model_files.find_stage_one_problems(*stage_one, configs, small):
        raise InputError("\n".join([f"the flags do not fit {name} ({kind.value}):", *problems]))
    return base


# Same in train_dreambooth.py
def find_misfits(args: Namespace, base: BaseModel, longest: int) -> list[str]:
    """Return a sentence for each flag that contradicts the model; `longest` is what its text encoder takes."""
    is_if, enlarges, factor = base.is_if, base.kind is ModelKind.IF_STAGE_2, base.size_factor
    sizes = dict.fromkeys([base.resolution, *base.preview_sizes])
    uneven = ", ".join(str(size) for size in sizes if any(edge % factor for edge in size))
    sources = ("validation_images", "num_eval_images", "stage_one_model_name_or_path")
    given = [name for name in sources if getattr(args, name)]
    unfit = [] if enlarges else given + ["class_labels_conditioning"] * bool(args.class_labels_conditioning)
    blind = f"--validation_prompt needs one of --{', --'.join(sources)}: stage II enlarges pictures."
    precision = args.text_encoder_precision and not base.precomputes_text
    unmasked = base.hides_padding and args.text_encoder_use_attention_mask is False
    lost = captions.find_prompt_problems("--instance_prompt", args.instance_prompt or "") if is_if else []
    return problems_that_hold(
        *((True, f"--{name} is for DeepFloyd IF's stage II.") for name in unfit),
        (uneven, f"--resolution or --validation_resolution {uneven}: the model needs multiples of {factor}."),
        ((base.tokens or 0) > longest, f"--tokenizer_max_length {base.tokens}: the text encoder takes {longest}."),
        (precision, "--text_encoder_precision needs --pre_compute_text_embeddings."),
        (args.train_variance and not base.learns_variance, "--train_variance: this U-Net predicts no variance."),
        (enlarges and args.validation_prompt and not given, blind),
        (is_if and base.tokens != 77, f"--tokenizer_max_length {base.tokens}: IF's pipelines always give 77 tokens."),
        (is_if and args.train_text_encoder, "--train_text_encoder: T5 is never trained, but encoded once and freed."),
        (is_if and args.pre_compute_text_embeddings is False, "--no-pre_compute_text_embeddings: T5 is always freed."),
        (unmasked, "--no-text_encoder_use_attention_mask: the model's own pipeline hides the padding."),
        *((True, sentence) for sentence in lost),
    )


# Same in train_dreambooth.py
def list_examples(args: Namespace, base: BaseModel) -> list[Example]:
    """List the photos and the class images with their captions; class images still to be drawn are among them.

    Raises:
        InputError: No photos, unreadable ones without --skip_bad_images, or class images that nothing can draw.
    """
    photos = images.inspect_folder(Path(args.instance_data_dir), "--instance_data_dir", args.skip_bad_images)
    width, height = base.resolution
    if not args.resolution and width > 2 * base.own_size.width:
        logger.warning(f"the model draws {base.own_size} px, but trains at {width}: --resolution sets another size.")
    if small := sum(size[0] < width or size[1] < height for size in photos.sizes.values()):
        logger.warning(f"{small} of {len(photos.sizes)} photos are smaller than {base.resolution} px: enlarged.")
    options = (args.instance_prompt, args.prepend_instance_prompt)
    prompts = find_captions(args.caption_strategy, Path(args.instance_data_dir), list(photos.sizes), *options)
    examples = [Example(path, prompts[path], is_prior=False) for path in photos.sizes]
    if not args.with_prior_preservation:
        return examples
    folder = class_folder(args)
    paths, missing = images.find_drawn(folder, args.class_prompt, args.class_guidance_scale, args.num_class_images)
    if missing and base.kind is ModelKind.IF_STAGE_2 and not args.stage_one_model_name_or_path:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(paths)} class images, and stage II cannot draw from words alone. "
            "Give --class_data_dir with enough of them, or --stage_one_model_name_or_path."
        )
    return examples + [Example(path, (args.class_prompt,), True, is_missing=path in missing) for path in paths]


# Same in train_dreambooth.py
def make_plan(args: Namespace, accelerator: Accelerator, base: BaseModel, examples: list[Example]) -> Plan:
    """Work out the numbers of the run.

    Raises:
        InputError: The checkpoint to go on from is missing, or was written by a run that does not fit this one.
    """
    resume_from, state = checkpoints.find_state(Path(args.output_dir), args.resume_from_checkpoint)
    seed = args.seed if args.seed is not None else state["fits"].get("seed")
    if seed is None:
        seed = on_main_process(accelerator, random.SystemRandom().randrange, 2**32)
    photos = [example.path.name for example in examples if not example.is_prior]
    priors, processes = len(examples) - len(photos), accelerator.num_processes
    accumulation, global_batch = args.gradient_accumulation_steps, args.train_batch_size * processes
    epoch_length = math.ceil(max(priors, len(photos)) / global_batch)
    steps_per_epoch = math.ceil(epoch_length / accumulation)
    scale = global_batch * accumulation if args.scale_lr else 1
    rates = [args.learning_rate * scale]
    if args.train_text_encoder:
        rates.append(rates[0] if args.text_encoder_lr is None else args.text_encoder_lr * scale)
    fits = {"script": METHOD, "base model": model_files.public_name(args.pretrained_model_name_or_path), "seed": seed}
    fits |= {"resolution": str(base.resolution), "precision": accelerator.mixed_precision}
    fits |= {"processes": processes, "photos": photos, "class images": priors, "fed by": base.conditioning}
    fits |= {name: getattr(args, name) for name in FITS} | method_fits(args, base)
    prompts = [list(example.prompts) for example in examples if not example.is_prior]
    fits["captions"] = None if args.caption_strategy == "instanceprompt" else prompts
    source = (args.pretrained_model_name_or_path, args.revision, args.hub_token)
    fits["content of the base model"] = model_files.fingerprint(*source)
    fits["content of the pictures"] = images.fingerprint([(example.path, example.is_prior) for example in examples])
    if resume_from is not None:
        checkpoints.check_fits(resume_from, state["fits"], fits)
    count = len(args.validation_images or []) or min(args.num_eval_images or 0, len(photos))
    plan = Plan(
        base=base,
        seed=seed,
        processes=processes,
        global_batch=global_batch,
        examples_per_step=global_batch * accumulation * (2 if priors else 1),
        epoch_length=epoch_length,
        first_step=state["step"],
        steps=args.max_train_steps or args.num_train_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        learning_rates=tuple(rates),
        noise_offset=(0.1 if args.offset_noise else 0.0) if args.noise_offset is None else args.noise_offset,
        frozen_dtype=PRECISIONS[accelerator.mixed_precision],
        previews=drawing.list_previews(base.preview_sizes, count or args.num_validation_images, seed),
        output_dir=Path(args.output_dir),
        resume_from=resume_from,
        prompt=args.instance_prompt or examples[0].prompts[0],
        fits=fits,
    )
    schedules.check_warmup(args.lr_scheduler, args.lr_warmup_steps, plan.steps)
    if args.max_train_steps is None and plan.steps < 50:
        logger.warning(f"{plan.steps} steps will teach little; --max_train_steps of some hundreds is usual.")
    return plan


def method_fits(args: Namespace, base: BaseModel) -> dict:
    """Return what only a LoRA run and its checkpoint must have in common."""
    layers = args.lora_layers or ",".join(IF_LAYERS if base.is_if else UNET_LAYERS)
    layers = ",".join(map(str.strip, layers.split(",")))
    return {"rank": args.rank, "alpha": args.lora_alpha or args.rank, "layers": layers}


# Same in train_dreambooth.py
def open_output(args: Namespace, accelerator: Accelerator, plan: Plan) -> str | None:
    """Create the Hub repository, if one is asked for and can be written, and the output folder; start the trackers."""
    options = (args.hub_model_id, plan.output_dir, args.hub_token, args.hub_private_repo)
    repository = on_main_process(accelerator, hub.prepare_repository, *options) if args.push_to_hub else None
    used = vars(args) | {"seed": plan.seed, "resolution": str(plan.base.resolution)}
    used["mixed_precision"] = accelerator.mixed_precision
    # --config with these would not repeat the run but continue it; the token is a secret.
    used = {key: used[key] for key in used if key not in ("config", "resume_from_checkpoint", "hub_token")}
    if accelerator.is_main_process:
        checkpoints.announce_changes(plan.resume_from, plan.first_step, used)
        checkpoints.open_folder(plan.output_dir, json.dumps(used, indent=2) + "\n", plan.first_step)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, used, plan.output_dir)
    return repository


# Same in train_dreambooth.py
def draw_class_images(
    args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable, missing: set[Path], stop: StopRequest
) -> None:
    """Draw the class images that are missing with the base model, all processes sharing the work.

    Image i depends on i and the batch size alone: it is drawn in the batch that i falls in, from a seed of i. For
    stage II, stage I draws it small first.
    """
    if not missing:
        return
    size, folder, base_model = args.sample_batch_size, class_folder(args), args.pretrained_model_name_or_path
    numbers = sorted({int(path.stem) // size for path in missing})[accelerator.process_index :: plan.processes]
    batches = [range(number * size, min((number + 1) * size, args.num_class_images)) for number in numbers]
    logger.info(f"Drawing {len(missing)} class images of {args.class_prompt!r}.")
    images.remember_source(folder, args.class_prompt, args.class_guidance_scale)
    drawn = dict.fromkeys(batches)
    options = {} if args.class_guidance_scale is None else {"guidance_scale": args.class_guidance_scale}
    stages = [args.stage_one_model_name_or_path, base_model]
    for model in stages if plan.base.kind is ModelKind.IF_STAGE_2 else [base_model]:
        pipeline = load_pipeline(args, accelerator, plan.base, model)
        for batch in stop.until_asked(
            tqdm(batches, desc="class images", disable=not accelerator.is_local_main_process)
        ):
            drawn[batch] = draw_class_batch(pipeline, args.class_prompt, prompts, batch, drawn[batch], options)
            paths = [folder / f"{index:05d}.png" for index in batch] if model == base_model else []
            for path, image in [pair for pair in zip(paths, drawn[batch]) if pair[0] in missing]:
                images.save_png(image, path)
        del pipeline
        devices.free_memory()
        stop.leave_if_asked()
    accelerator.wait_for_everyone()
    if elsewhere := [path for path in missing if not path.exists()]:
        raise InputError(f"{len(elsewhere)} class images are on another machine: {folder} must be shared by all.")


# Same in train_dreambooth.py
def draw_class_batch(
    pipeline: DiffusionPipeline, prompt: str, prompts: PromptTable, batch: range, small: list | None, options: dict
) -> list[Image.Image]:
    """Draw the class images of some indices with the pipeline's `options`, or enlarge them if they are given small."""
    seeds = [generator("enlarged class image" if small else "class image", index) for index in batch]
    if pipeline.text_encoder is None:
        embeds = [prompts.embeds[prompts.rows_of(text)].expand(len(batch), -1, -1) for text in (prompt, "")]
        words = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    else:
        words = {"prompt": [prompt] * len(batch)}
    return pipeline(**words, **({"image": small} if small else options), generator=seeds).images


# Same in train_dreambooth.py
def write_small_images(
    args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable, examples: list[Example]
) -> None:
    """Write what stage II's previews enlarge: given pictures or photos, made small, or what stage I draws."""
    # On each machine, because its folder may be its own.
    if args.validation_prompt and plan.base.kind is ModelKind.IF_STAGE_2 and accelerator.is_local_main_process:
        small = [preview._replace(size=quarter(preview.size)) for preview in plan.previews]
        photos = [example.path for example in examples if args.num_eval_images and not example.is_prior]
        folder = plan.output_dir / "samples" / "small"
        if paths := args.validation_images or photos:
            drawing.shrink(small, paths, folder)
        else:
            model, options = args.stage_one_model_name_or_path, preview_options(args, prompts, None)
            with devices.going_on_without_memory("Stage I"):
                drawing.draw(load_pipeline(args, accelerator, plan.base, model), small, folder, **options)
    accelerator.wait_for_everyone()


# Same in train_dreambooth.py
def load_pipeline(args: Namespace, accelerator: Accelerator, base: BaseModel, model: str) -> DiffusionPipeline:
    """Load a whole model for drawing, in the precision asked for, without safety checker, and T5 if it is IF."""
    default = "fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32"
    left_out = ("safety_checker", *(("text_encoder", "tokenizer", "watermarker") if base.is_if else ()))
    options = dict.fromkeys(left_out) | {"dtype": PRECISIONS[args.prior_generation_precision or default]}
    pipeline = load(args, DiffusionPipeline, None, model, **options, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


# Same in train_dreambooth.py
def encode_prompts(args: Namespace, accelerator: Accelerator, plan: Plan, examples: list[Example]) -> PromptTable:
    """Tokenise every prompt of the run, and encode them here and now if the text encoder is to be freed."""
    prompts = tokenise_prompts(args, plan.base, examples, accelerator.device)
    if plan.base.precomputes_text:
        # The first process of a machine fills the cache, the others then find it full.
        with accelerator.local_main_process_first():
            prompts.embeds = precompute_embeddings(args, accelerator, plan, prompts)
    return prompts


# Same in train_dreambooth.py
def tokenise_prompts(args: Namespace, base: BaseModel, examples: list[Example], device: torch.device) -> PromptTable:
    """Tokenise every prompt of the run, and say what the model will not see of it."""
    texts = [prompt for example in examples for prompt in example.prompts]
    if args.validation_prompt:
        texts += [args.validation_prompt, args.validation_negative_prompt]
    texts = list(dict.fromkeys(texts + [""] * bool(args.caption_dropout or base.is_if)))
    tokenizer = load_tokenizer(args, base)
    length = base.tokens or tokenizer.model_max_length
    captions.check_tokenizer(tokenizer, length, base.vocabulary)
    # Stable Diffusion's pipeline gives the words as they are, IF's cleans them first.
    words = [captions.clean(text) for text in texts] if base.is_if else texts
    rows = tokenizer(words, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    captions.warn_of_losses(texts, words, tokenizer, length)
    mask = rows["attention_mask"].to(device) if base.hides_padding else None
    return PromptTable(texts, rows["input_ids"].to(device), mask)


# Same in train_dreambooth.py
def precompute_embeddings(args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable) -> Tensor:
    """Return the embeddings of all prompts, (N, L, D), from the cache; what it lacks is encoded and added."""
    precision = args.text_encoder_precision or accelerator.mixed_precision
    source = (args.pretrained_model_name_or_path, args.revision, args.hub_token)
    options = (args.variant, str(PRECISIONS.get(precision, precision)), accelerator.device.type)
    cache = open_cache(args.cache_dir, source, *options)
    embeds = cache.load_all(prompts.ids, prompts.mask)
    if missing := [row for row, known in enumerate(embeds) if known is None]:
        logger.info(f"Encoding {len(missing)} of {len(embeds)} prompts; the others are in {cache.folder}.")
        text_encoder = load_text_encoder(args, accelerator, plan, precision)
        for row in missing:
            with torch.no_grad():
                embeds[row] = embed_prompts(prompts, text_encoder, torch.tensor([row]), together=False)[0].cpu()
            cache.save(prompts.ids[row], prompts.mask if prompts.mask is None else prompts.mask[row], embeds[row])
        del text_encoder
        devices.free_memory()
    return torch.stack(embeds).to(accelerator.device, plan.frozen_dtype)


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
def load(args: Namespace, kind: type, part: str | None = None, model: str | None = None, **options) -> Any:
    """Load a part of the base model or of another one, or with part None the whole of it."""
    name = model or args.pretrained_model_name_or_path
    # Another model's branches have other names, but its weight files the same variants.
    revision = args.revision if name == args.pretrained_model_name_or_path else None
    where = {"revision": revision, "token": args.hub_token} | ({"variant": args.variant} if args.variant else {})
    return model_files.load(kind, name, part, **where, **options)


# Same in train_dreambooth.py
def load_tokenizer(args: Namespace, base: BaseModel) -> Any:
    """Load the base model's tokenizer, or the one of --tokenizer_name."""
    if args.tokenizer_name:
        return model_files.load(transformers.AutoTokenizer, args.tokenizer_name, None, token=args.hub_token)
    return load(args, model_files.component_class(base.index, "tokenizer"), "tokenizer")


# Same in train_dreambooth.py
def load_text_encoder(args: Namespace, accelerator: Accelerator, plan: Plan, precision: str) -> nn.Module:
    """Load the base model's text encoder, frozen, on the device: in a precision, or in int8."""
    device, options = accelerator.device, {"dtype": PRECISIONS.get(precision)}
    if precision == "int8":
        quantised = transformers.BitsAndBytesConfig(load_in_8bit=True)
        options = {"quantization_config": quantised, "device_map": {"": device}}
    kind = model_files.component_class(plan.base.index, "text_encoder")
    text_encoder = load(args, kind, "text_encoder", **options).requires_grad_(False).eval()
    return text_encoder if precision == "int8" else text_encoder.to(device)


# Same in train_dreambooth.py
def load_models(args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable) -> Models:
    """Load the networks, frozen, on the device: in float32 if all their weights will train."""
    base = plan.base
    trained_dtype = torch.float32 if TRAINS_WHOLE_NETWORKS else plan.frozen_dtype
    unet = load(args, diffusers.UNet2DConditionModel, "unet", dtype=trained_dtype)
    vae = None if base.is_if else load(args, diffusers.AutoencoderKL, "vae", dtype=plan.frozen_dtype).eval()
    for network in filter(None, (unet, vae)):
        network.requires_grad_(False).to(accelerator.device)
    schedulers = [c and DDPMScheduler.from_config(c) for c in (base.scheduler, base.image_noising_scheduler)]
    models = Models(unet, vae, None, *schedulers, {"unet": unet})
    if prompts.embeds is None:
        precision = "fp32" if args.train_text_encoder and TRAINS_WHOLE_NETWORKS else accelerator.mixed_precision
        models.text_encoder = load_text_encoder(args, accelerator, plan, precision)
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
    """Add float32 adapters to the U-Net, and to the text encoder if it is trained; at first they change nothing."""
    layers = method_fits(args, plan.base)["layers"].split(",")
    options = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank, "lora_dropout": args.lora_dropout}
    torch.manual_seed(derive_seed(plan.seed, "adapter"))
    for model, names in zip(models.trained.values(), (layers, TEXT_ENCODER_LAYERS)):
        adapters.add(model, names, "--lora_layers", **options)
        model.train()


# Same in train_dreambooth.py
def wrap_for_devices(accelerator: Accelerator, models: Models, optimizer: Optimizer) -> Optimizer:
    """Wrap what trains for data parallelism and, so that `forward` runs under autocast, for mixed precision."""
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
        self.prompt_rows, self.empty_row = [[rows[text] for text in one.prompts] for one in examples], rows.get("")
        self.caption_dropout, self.random_flip = args.caption_dropout, args.random_flip
        self.seed, self.size = plan.seed, plan.base.resolution
        self.crop_style = "center" if args.center_crop else args.crop_style or "random"
        mode = args.image_interpolation_mode or ("bicubic" if plan.base.is_if else "lanczos")
        self.resample = Image.Resampling[mode.upper()]

    def __getitem__(self, draw: Draw) -> dict:
        """Return one example; its crop, flip and caption depend on the seed, the example and the visit alone."""
        example = self.examples[draw.example]
        chance = random.Random(derive_seed(self.seed, "crop and flip", draw.example, draw.visit))
        image = images.open_covering(example.path, self.size, self.resample)
        image = image.crop(crop_box(image.size, self.size, self.crop_style, chance))
        if self.random_flip and chance.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        is_nameless = random.Random(derive_seed(draw.seed, "caption dropout")).random() < self.caption_dropout
        return {
            "pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1,
            "prompt_rows": self.empty_row if is_nameless else chance.choice(self.prompt_rows[draw.example]),
            "is_prior": example.is_prior,
            "seeds": draw.seed,
            "names": str(example.path),
        }


# Same in train_dreambooth.py
class StepSampler:
    """Say which examples each micro-step of this process visits, as a function of the micro-step alone.

    Instance examples come in an endless sequence of shuffled passes, and so do class examples; micro-step m takes the
    next `global_batch` of either. So every photo is seen once before any is seen again, batches are always full, and
    a resumed run needs no replay.
    """

    def __init__(self, plan: Plan, examples: list[Example], first: int, last: int, rank: int):
        """Cover the micro-steps `first` up to, not including, `last` for process `rank`."""
        self.seed, self.global_batch, self.first, self.last = plan.seed, plan.global_batch, first, last
        batch = plan.global_batch // plan.processes
        self.places = range(rank * batch, (rank + 1) * batch)
        instances = [index for index, example in enumerate(examples) if not example.is_prior]
        priors = [index for index, example in enumerate(examples) if example.is_prior]
        self.kinds = {"instance": instances, "class": priors} if priors else {"instance": instances}

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield this process's draws for each micro-step, instance examples before class examples."""
        for micro_step in range(self.first, self.last):
            yield [self.draw(kind, micro_step, place) for kind in self.kinds for place in self.places]

    def draw(self, kind: str, micro_step: int, place: int) -> Draw:
        """Return the draw at one place of the global batch."""
        indices = self.kinds[kind]
        visit, position = divmod(micro_step * self.global_batch + place, len(indices))
        example = indices[shuffled(len(indices), derive_seed(self.seed, "order", kind, visit))[position]]
        return Draw(example, visit, derive_seed(self.seed, "example", kind, micro_step, place))


# Same in train_dreambooth.py
def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack examples into a batch.

    Returns:
        `pixel_values` (B, 3, H, W) float32 in [-1, 1]; `prompt_rows` (B,) int64, rows of the prompt table;
        `is_prior` (B,) bool; `seeds` (B,) int64, from which each example's noise is drawn; `names`, B paths.
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


# Same in train_dreambooth.py
def make_optimizer(args: Namespace, plan: Plan, models: Models) -> Optimizer:
    """Return AdamW over what trains, one group of parameters for the U-Net and one for the text encoder."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in zip(models.trained.values(), plan.learning_rates)
    ]
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options["weight_decay"] = args.adam_weight_decay
    if args.use_8bit_adam:
        import bitsandbytes  # takes seconds to import

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)


# Same in train_dreambooth.py
def learning_rate(args: Namespace, step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step, counted from 0: a function of the step alone."""
    options = (args.lr_warmup_steps, args.lr_num_cycles, args.lr_power, args.lr_end)
    return schedules.learning_rate(args.lr_scheduler, step, steps, peak, *options)


# Same in train_dreambooth.py
def resume(accelerator: Accelerator, plan: Plan, models: Models, optimizer: Optimizer) -> None:
    """Restore weights and optimizer from the checkpoint that the plan names; draws need nothing restored."""
    if plan.resume_from is None:
        return
    flags = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with checkpoints.explaining_damage(plan.resume_from):
        load_weights(accelerator, plan.resume_from, models)
        state = torch.load(plan.resume_from / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    for group, given in zip(optimizer.param_groups, flags):
        # The checkpoint's state, but the weight decay and the like of this command.
        group.update(given)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    more = "" if plan.first_step < plan.steps else " Nothing is left to train: raise --max_train_steps to go on."
    logger.info(f"Resumed from {plan.resume_from}: {plan.first_step} of {plan.steps} steps are done.{more}")


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
    inputs = {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": embeds}
    if plan.base.kind is ModelKind.IF_STAGE_2:
        noising, conditioning = models.image_noising_scheduler, plan.base.conditioning
        inputs |= stage_two_inputs(noisy, timesteps, clean, seeds, noising, conditioning)
    # A U-Net with twice as many channels puts out the variance behind the prediction.
    prediction, *variance = models.unet(**inputs).sample.float().split(clean.shape[1], dim=1)

    prediction_type = plan.base.prediction_type
    wanted = target(scheduler, prediction_type, clean, noise, timesteps)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    losses = example_losses(prediction, wanted, timesteps, alphas_cumprod, prediction_type, args.snr_gamma)
    if args.train_variance:
        bound = variational_bound(prediction.detach(), variance[0], clean, noisy, timesteps, alphas_cumprod)
        losses = losses + len(alphas_cumprod) / 1000 * bound
    return combine(losses, batch["is_prior"], args.prior_loss_weight)


# Same in train_dreambooth.py
def to_model_space(vae: nn.Module | None, pixel_values: Tensor, seeds: list[int]) -> Tensor:
    """Return what noise is added to: the pictures, or their scaled latents (arXiv 2112.10752, section 3.1).

    Args:
        vae: None for models that work on pixels.
        pixel_values: (B, 3, H, W) float32 in [-1, 1].
        seeds: One per picture, for the draw from the VAE's posterior.

    Returns:
        (B, C, h, w) float32.
    """
    if vae is None:
        return pixel_values
    latents = []
    # One picture at a time: then its latents do not depend on its neighbours, not even in the last bit.
    for pixels, seed in zip(pixel_values.to(vae.dtype).split(1), seeds):
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        chance = torch.randn(posterior.mean.shape, generator=generator(seed, "posterior"))
        latents.append(posterior.mean.float() + posterior.std.float() * chance.to(pixels.device, non_blocking=True))
    return torch.cat(latents) * vae.config.scaling_factor


# Same in train_dreambooth.py
def draw_noise(
    shape: torch.Size, seeds: list[int], num_train_timesteps: int, offset: float, purpose: str = ""
) -> tuple[Tensor, Tensor]:
    """Draw each example's noise and timestep from its own seed, on the CPU, so that the device does not matter.

    Args:
        shape: (B, C, h, w).
        offset: Strength of a second noise that is constant over each channel; 0: none.
        purpose: Sets this noise apart from another of the same examples.

    Returns:
        (B, C, h, w) float32 noise and (B,) int64 timesteps in [0, T).
    """
    noise = torch.stack([torch.randn(shape[1:], generator=generator(seed, f"{purpose}noise")) for seed in seeds])
    if offset:
        constant = [torch.randn(shape[1], 1, 1, generator=generator(seed, "noise offset")) for seed in seeds]
        noise = noise + offset * torch.stack(constant)
    steps = [torch.randint(num_train_timesteps, (), generator=generator(seed, f"{purpose}timestep")) for seed in seeds]
    return noise, torch.stack(steps)


# Same in train_dreambooth.py
def stage_two_inputs(
    noisy: Tensor, timesteps: Tensor, clean: Tensor, seeds: list[int], scheduler: DDPMScheduler, conditioning: str
) -> dict[str, Tensor]:
    """Return the sample and class labels of a super-resolution U-Net (arXiv 2205.11487, section 2.4).

    As when its pipeline draws, a picture of a quarter of the size is enlarged, noise of a random level is added, and
    the level is the class label. The published examples ("timesteps") feed the noisy picture twice, and its timestep.

    Args:
        noisy, clean: (B, 3, H, W) float32.
        timesteps: (B,) int64 in [0, T).
        scheduler: The image noising scheduler.
        conditioning: "noise_level" or "timesteps".

    Returns:
        `sample` (B, 6, H, W) float32; `class_labels` (B,) int64 in [0, T).
    """
    if conditioning == "timesteps":
        return {"sample": torch.cat([noisy, noisy], dim=1), "class_labels": timesteps}
    height, width = clean.shape[-2:]
    # Bicubic overshoots; a picture to be enlarged never leaves [-1, 1].
    low = F.interpolate(clean, (height // 4, width // 4), mode="bicubic", antialias=True).clamp(-1, 1)
    enlarged = F.interpolate(low, (height, width), mode="bilinear", align_corners=True)
    drawn = draw_noise(clean.shape, seeds, scheduler.config.num_train_timesteps, 0.0, "low resolution ")
    noise, levels = (tensor.to(clean.device, non_blocking=True) for tensor in drawn)
    return {"sample": torch.cat([noisy, scheduler.add_noise(enlarged, noise, levels)], dim=1), "class_labels": levels}


# Same in train_dreambooth.py
def target(scheduler: DDPMScheduler, prediction_type: str, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
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
def variational_bound(
    noise: Tensor, variance: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Return each example's term of the variational bound, which teaches the variance (arXiv 2102.09672, section 3.1).

    Args:
        noise: (B, C, H, W) predicted and detached.
        variance: (B, C, H, W) in about [-1, 1], from the log variance of the posterior to that of the forward step.
        clean, noisy: (B, C, H, W) float32, clean in [-1, 1].
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) share of the signal in the variance at each timestep, in [0, 1].

    Returns:
        (B,) float32 in bits per dimension.
    """
    before = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    beta = 1 - alphas_cumprod / before
    smallest = beta * (1 - before) / (1 - alphas_cumprod)
    smallest[0] = smallest[1]  # at t = 0 it is 0, which has no logarithm
    tables = (alphas_cumprod, before, beta, smallest)
    signal, before, beta, smallest = (table[timesteps][:, None, None, None] for table in tables)
    share = (variance + 1) / 2
    deviation = (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp()
    # The mean of x_{t-1} is a mix of x_t and the clean picture, true or predicted (arXiv 2006.11239, equation 7).
    predicted = (noisy - (1 - signal).sqrt() * noise) / signal.sqrt()
    of_clean, of_noisy = before.sqrt() * beta / (1 - signal), (1 - beta).sqrt() * (1 - before) / (1 - signal)
    true_mean, mean = (of_clean * picture + of_noisy * noisy for picture in (clean, predicted))
    true, model = Normal(true_mean, smallest.sqrt().expand_as(clean)), Normal(mean, deviation)
    # The last step is scored by the probability of the picture's 256 levels (equation 13 there).
    above = model.cdf(clean + 1 / 255).where(clean < 0.999, 1.0)
    below = model.cdf(clean - 1 / 255).where(clean > -0.999, 0.0)
    surprise = -(above - below).clamp(min=1e-12).log()
    nats = torch.where((timesteps == 0)[:, None, None, None], surprise, kl_divergence(true, model))
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


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
    metrics = MetricLog(accelerator, plan.output_dir / "metrics.jsonl", plan.first_step, plan.steps, parameters)
    every = args.validation_epochs * plan.steps_per_epoch if args.validation_epochs else args.validation_steps
    stop.begin_loop()
    if plan.first_step == 0 and args.validation_prompt:
        validate(args, accelerator, plan, models, prompts, 0, stop)
    accumulation = args.gradient_accumulation_steps
    for step in range(plan.first_step, plan.steps):
        began, done, losses, names = time.perf_counter(), step + 1, [], []
        rates = [learning_rate(args, step, plan.steps, peak) for peak in plan.learning_rates]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        for micro_step in range(step * accumulation, done * accumulation):
            torch.manual_seed(derive_seed(plan.seed, "dropout", micro_step, accelerator.process_index))
            batch = next(batches)
            with accelerator.accumulate(*models.trained.values()):
                loss = compute_loss(args, accelerator, plan, models, prompts, batch)
                accelerator.backward(loss.total)
            losses.append(loss)
            names += batch["names"]
        # Outside of `accumulate`, whose last turn has added up the processes' gradients.
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        values = {"epoch": done * accumulation / plan.epoch_length, "grad_norm": norm}
        values |= dict(zip(("lr", "lr_text_encoder"), rates))
        metrics.add(done, began, plan.examples_per_step, losses, values, names)
        stopped = stop.agree() is not None
        if stopped or done % args.checkpointing_steps == 0:
            metrics.flush()
            save_checkpoint(args, accelerator, plan, models, optimizer, done)
        if stopped:
            logger.info(f"Stopped. Go on by the same command with --resume_from_checkpoint checkpoint-{done}.")
            return False
        if args.validation_prompt and (done % every == 0 or done == plan.steps):
            metrics.flush()  # trackers take no numbers of a step once they have its pictures
            validate(args, accelerator, plan, models, prompts, done, stop)
    metrics.close()
    return True


# Same in train_dreambooth.py
def save_checkpoint(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, optimizer: Optimizer, step: int
) -> None:
    """Write checkpoint-N whole or not at all, then remove older ones beyond the limit."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_checkpoint(args, accelerator, plan, models, optimizer, step)
    accelerator.wait_for_everyone()


# Same in train_dreambooth.py
def write_checkpoint(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, optimizer: Optimizer, step: int
) -> None:
    """Write a checkpoint as this process has it, the main one."""
    with checkpoints.atomic_folder(plan.output_dir / f"checkpoint-{step}") as folder:
        save_weights(accelerator, folder, models)
        model_files.write_scheduler_config(folder, plan.base.scheduler)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, folder / "optimizer.pt")
        checkpoints.write_state(folder, step, plan.fits)
    checkpoints.prune(plan.output_dir, args.checkpoints_total_limit, newest=step)


def save_weights(accelerator: Accelerator, folder: Path, models: Models) -> None:
    """Write the adapters as one file that `load_lora_weights` reads, with rank and alpha in its metadata."""
    unwrapped = {name: accelerator.unwrap_model(model) for name, model in models.trained.items()}
    adapters.save(folder / WEIGHTS_FILE, unwrapped)


def load_weights(accelerator: Accelerator, folder: Path, models: Models) -> None:
    """Read what `save_weights` wrote into the adapters."""
    unwrapped = {name: accelerator.unwrap_model(model) for name, model in models.trained.items()}
    adapters.load(folder / WEIGHTS_FILE, unwrapped)


# Same in train_dreambooth.py
def validate(
    args: Namespace,
    accelerator: Accelerator,
    plan: Plan,
    models: Models,
    prompts: PromptTable,
    step: int,
    stop: StopRequest,
) -> None:
    """Draw the validation prompt with the live weights, the same seeds each time, and leave training as it was.

    Nothing of the run's randomness is touched: the sampler has generators of its own, and training seeds each
    micro-step. The processes share the pictures. Running out of memory is a warning, a wish to stop leaves some out.
    """
    samples = plan.output_dir / "samples"
    folder, small = samples / f"step-{step:06d}", samples / "small" if plan.base.enlarges_from else None
    mine = stop.until_asked(plan.previews[accelerator.process_index :: plan.processes])
    text_encoder = models.text_encoder and accelerator.unwrap_model(models.text_encoder)
    for model in models.trained.values():
        model.eval()
    with devices.going_on_without_memory(f"Validation at step {step}"):
        pipeline = make_preview_pipeline(args, accelerator, plan, models)
        options = preview_options(args, prompts, text_encoder)
        with torch.no_grad(), accelerator.autocast():
            drawing.draw(pipeline, mine, folder, small, **options)
    for model in models.trained.values():
        model.train()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        names, title = [preview.name for preview in plan.previews], f"{args.validation_prompt} (step {step})"
        if pictures := drawing.write_grid(names, folder, title):
            track_images(accelerator, "validation", pictures, step)


# Same in train_dreambooth.py
def preview_options(args: Namespace, prompts: PromptTable, text_encoder: nn.Module | None) -> dict[str, Any]:
    """Return what previews have in common, as a pipeline takes it."""
    rows = prompts.rows_of(args.validation_prompt, args.validation_negative_prompt)
    with torch.no_grad():
        prompt, negative = embed_prompts(prompts, text_encoder, rows, together=False).split(1)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
    }


# Same in train_dreambooth.py
def make_preview_pipeline(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> DiffusionPipeline:
    """Build the pipeline that draws previews from the networks in memory."""
    parts = {"vae": models.vae, "image_noising_scheduler": models.image_noising_scheduler}
    scheduler = getattr(diffusers, args.validation_scheduler).from_config(plan.base.scheduler)
    unet = accelerator.unwrap_model(models.unet)
    kind = getattr(diffusers, PIPELINES[plan.base.kind])
    return drawing.assemble(kind, unet=unet, scheduler=scheduler, **parts)


# ------------------------------------------------------------------------------------------------------------ result


def save_result(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> None:
    """Write the adapter file and, beside it, the scheduler that the result draws with."""
    if accelerator.is_main_process:
        with checkpoints.atomic_result(plan.output_dir, last=WEIGHTS_FILE) as folder:
            save_weights(accelerator, folder, models)
            model_files.write_scheduler_config(folder, plan.base.scheduler)
        logger.info(f"The adapter is {plan.output_dir / WEIGHTS_FILE}.")
    accelerator.wait_for_everyone()


def usage_snippet(args: Namespace, base: BaseModel, name: str, prompt: str) -> str:
    """Return Python code that draws a picture with the result; stage II's wants a small picture beside it."""
    prompt = args.validation_prompt or prompt
    max_length = args.tokenizer_max_length
    reading = () if base.is_if else model_card.reading_lines(max_length, args.text_encoder_use_attention_mask)
    places = (args.pretrained_model_name_or_path, args.revision, args.variant, reading)
    has_scheduler = base.learns_variance and not args.train_variance
    picture = model_card.Picture(base.resolution, base.enlarges_from, base.is_if)
    return model_card.lora_snippet(name, prompt, *places, has_scheduler, picture)


# Same in train_dreambooth.py
def share(args: Namespace, plan: Plan, summary: dict[str, str], repository: str | None, stop: StopRequest) -> None:
    """Write the model card and, if asked, upload; a failed upload leaves the result and says how to try again."""
    family = "deepfloyd-if" if plan.base.is_if else "stable-diffusion"
    card = model_card.Card(
        title=repository or plan.output_dir.resolve().name,
        base_model=args.pretrained_model_name_or_path,
        tags=["text-to-image", "diffusers", "diffusers-training", "dreambooth", family, *METHOD_TAGS],
        instance_prompt=plan.prompt,
        validation_prompt=args.validation_prompt,
        grid=f"samples/step-{max(plan.first_step, plan.steps):06d}/grid.png",
        settings=summary,
        snippet=usage_snippet(args, plan.base, repository or str(plan.output_dir), plan.prompt),
    )
    model_card.write(plan.output_dir, card, args.revision, args.hub_token)
    if repository:
        stop.begin_upload(hub.say_how_to_upload(plan.output_dir, repository))
        logger.info(f"Uploaded to {hub.upload_result(plan.output_dir, repository, args.hub_token)}")


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)  # a tracker may have replaced sys.exit in the meantime, to learn the status
