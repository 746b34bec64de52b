#!/usr/bin/env python
"""Fine-tune a text-to-image diffusion model (Stable Diffusion, DeepFloyd IF) on one subject: DreamBooth.

    accelerate launch train_dreambooth.py --pretrained_model_name_or_path MODEL --instance_data_dir photos/ \
        --instance_prompt "a photo of sks dog" --max_train_steps 800 --learning_rate 5e-6

`main` is the table of contents. It does this, in this order, and the file has a section for each:

    check everything ......... parse_args, detect_model, list_examples, make_plan
    class images, prompts .... draw_class_images, encode_prompts; then the text encoder is freed
    networks ................. load_models, prepare_training
    data ..................... DreamBoothDataset, StepSampler, collate; cache_latents
    optimizer ................ make_optimizer, learning_rate, wrap_and_resume
    loss ..................... compute_loss: sample_noise, stage_two_inputs, prediction_target, example_losses
    loop ..................... train: compute_loss, update_weights, save_checkpoint, validate
    result ................... save_result, share

To change an experiment, edit one function:

    one training step ........ compute_loss          photos and captions ...... list_photos
    which weights train ...... prepare_training      crops, flips, pixels ..... DreamBoothDataset
    noise and timesteps ...... sample_noise          order of the photos ...... StepSampler
    stage II's input ......... stage_two_inputs      the optimizer ............ make_optimizer
    the target ............... prediction_target     the schedule ............. learning_rate
    the loss of an example ... example_losses        the previews' sampler .... make_sampler
    instance + class loss .... combine_losses        what is saved ............ save_result

Tools such as `python -m utils.preview_data SCRIPT` call functions of this file by name; docs/changing.md lists them.

Letters in shapes: B batch, C channels, H W height and width in pixels, h w in latents, L tokens, D text width,
T train timesteps, N distinct prompts.

Papers: DreamBooth arXiv 2208.12242, latent diffusion 2112.10752, velocity prediction 2202.00512, Min-SNR 2303.09556,
cascades 2205.11487, learned variance 2102.09672.
"""

import sys

try:  # before all else, because quick_imports nearly halves the seconds that the other imports take
    import utils.core.quick_imports  # noqa: F401
    from utils.core import version_check
    from utils.core.errors import UserError, exit_status
    from utils.core.seeds import derive_seed, generator
    from utils.data import (
        batch_order,
        cache,
        captions,
        class_images,
        concepts,
        decode_images,
        geometry,
        list_images,
        masks,
        prompt_cleaning,
    )
    from utils.data.geometry import Crop, Size
    from utils.devices import accelerator_setup, device_memory, graceful_stop, network_speed, shards
    from utils.flags import command_line, flag_checks, precision
    from utils.hub import hub_datasets, model_card, publish
    from utils.memory import memory_estimate, out_of_memory
    from utils.models import layer_names, model_files
    from utils.optim import optimizers, schedules, stochastic_rounding
    from utils.run import (
        atomic_folders,
        checkpoints,
        flag_conflicts,
        folder_checks,
        metric_log,
        resume_checks,
        run_summary,
    )
    from utils.sampling import preview_pipeline

    version_check.check_names_used(__file__)
except ImportError as error:
    found = getattr(sys.modules.get("utils"), "__file__", "none")
    sys.exit(
        f"error: {error}; this script needs its repository's utils/ (found: {found}) and the packages of "
        "requirements.txt: git clone REPOSITORY_URL, and run it in that folder, or `pip install -e` that folder."
    )

import argparse
import copy
import dataclasses
import enum
import functools
import itertools
import json
import math
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

logger = get_logger(__name__)

METHOD = "DreamBooth"
METHOD_TAGS = []
DEFAULT_OUTPUT_DIR = "dreambooth-model"
DEFAULT_LEARNING_RATE = 5e-6
TRAINS_WHOLE_NETWORKS = True
SCHEDULES = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial one_cycle".split()
# Allowed values of flags that are numbers. Unless named here: whole numbers 1 or more, fractions 0 or more.
FLAG_RANGES = {
    "local_rank": "any",
    "repeats": "from 1 to 10,000",
    **dict.fromkeys(("seed", "dataloader_num_workers", "lr_warmup_steps"), "0 or more"),
    **dict.fromkeys(("adam_epsilon", "snr_gamma"), "above 0"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "caption_dropout", "lora_dropout"), "in [0, 1)"),
}
# A resumed run must have the same values of these flags, and others of `make_plan` and `resume_checks`.
RESUME_FLAGS = (
    *("revision", "instance_prompt", "class_prompt", "repeats", "prior_target", "tokenizer_name"),
    *("train_text_encoder", "optimizer", "use_8bit_adam", "weight_dtype", "train_batch_size"),
    *("gradient_accumulation_steps", "train_variance"),
)
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
# diffusers' classes that draw previews, by name, because importing them takes time.
PIPELINES = {
    ModelKind.STABLE_DIFFUSION: "StableDiffusionPipeline",
    ModelKind.IF_STAGE_1: "IFPipeline",
    ModelKind.IF_STAGE_2: "IFSuperResolutionPipeline",
}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the base model's config files say, and what follows from its kind. No weights."""

    kind: ModelKind
    index: dict  # model_index.json: the library and class of each component
    scheduler: dict  # its config, with the variance type that results and previews use
    image_noising_scheduler: dict | None  # of stage II
    conditioning: str | None  # of stage II: noise_level or timesteps
    prediction_type: str  # epsilon or v_prediction
    size_multiple: int  # width and height in pixels are multiples of this
    vae_scale_factor: int  # pixels along the edge of a latent; 1 for models that work on pixels
    scaling_factor: float  # of latents, as the U-Net is given them
    learns_variance: bool  # the U-Net has twice as many output channels as image channels
    uses_attention_mask: bool  # padding tokens are masked, as the model's own pipeline does
    precomputes_text: bool  # the text encoder is freed before the U-Net is loaded
    vocabulary: int | None  # number of tokens that its text encoder knows
    tokens: int | None  # per prompt; None: the tokenizer's own limit
    native_size: Size  # in pixels, the size that its pipeline draws by default
    resolution: Size  # of training, in pixels
    preview_sizes: list[Size]

    @property
    def is_if(self) -> bool:
        """Whether this is a pixel model with a T5 text encoder."""
        return self.kind is not ModelKind.STABLE_DIFFUSION

    @property
    def low_res_size(self) -> Size | None:
        """The size in pixels of stage II's input image; None for other kinds."""
        return geometry.quarter(self.resolution) if self.kind is ModelKind.IF_STAGE_2 else None


class Example(NamedTuple):
    """One image of the run: known before any pixel is read."""

    path: Path
    prompts: tuple[str, ...]  # each visit takes one of them at random
    concept: concepts.Concept
    size: Size  # of its crop, in pixels; in a batch, a class image takes the size of the photo it belongs to
    is_prior: bool = False
    is_missing: bool = False  # a class image that the base model has not drawn yet
    mask: Path | None = None


class ExampleVisit(NamedTuple):
    """One visit to an example: a run shows each photo many times, each time cropped and noised anew."""

    example: int  # index of the example
    earlier_visits: int  # how often the run visited it before
    size: Size  # of the crop, in pixels
    mean_weight: float  # weight in this process's mean over instance images, or over class images
    seed: int  # of the noise and the timestep


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers that follow from the flags, the data and the number of processes; fixed before anything is loaded."""

    base: ModelInfo
    examples: list[Example]
    seed: int
    processes: int
    first_step: int  # optimizer steps that the resumed run has done; 0 for a new run
    steps: int  # optimizer steps when the run ends, with those of the resumed run
    steps_per_epoch: int
    epoch_length: int  # micro-steps until every photo and every class image was visited
    learning_rates: dict[str, float]  # the peak, by the name of the network that trains
    noise_offset: float
    frozen_dtype: torch.dtype
    previews: list[preview_pipeline.Preview]  # the images of each round of validation
    output_dir: Path
    resume_from: Path | None
    resume_keys: dict  # what a run that resumes a checkpoint of this one must have in common with it


@dataclasses.dataclass
class PromptTable:
    """Every distinct prompt of the run, one per row."""

    texts: list[str]
    ids: Tensor  # (N, L) int64 tokens, on the training device
    mask: Tensor | None  # (N, L) int64 attention mask; None when the text encoder sees padding too
    embeds: Tensor | None = None  # (N, L, D); None when embeddings are computed in the loop

    def rows_of(self, *texts: str) -> Tensor:
        """Return the rows of some prompts, (number of texts,) int64."""
        return torch.tensor([self.texts.index(text) for text in texts])


@dataclasses.dataclass
class Models:
    """The networks of the run and their optimizer, wrapped by `accelerate` from `wrap_and_resume` on."""

    prompts: PromptTable
    unet: nn.Module
    vae: nn.Module | None  # None for pixel models, and if latents are cached; on the CPU if only previews need it
    text_encoder: nn.Module | None
    noise_scheduler: DDPMScheduler
    image_noising_scheduler: DDPMScheduler | None  # of stage II
    trained: dict[str, nn.Module]  # those that are optimized: "unet" and perhaps "text_encoder"
    copies: dict[str, nn.Module]  # the trained networks as they were before, if --prior_target needs them
    optimizer: Optimizer | None = None


def main(argv: list[str] | None = None) -> int:
    """Run the training and return the exit status: 0, or 128 + the signal that stopped it."""
    # 1. Check everything that can be checked before anything is loaded or written.
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    base = detect_model(args)
    examples = list_examples(args, base)
    plan = make_plan(args, accelerator, base, examples)
    if args.dry_run:
        return print_dry_run(args, accelerator, plan)
    repository = prepare_output_folder(args, accelerator, plan)

    with graceful_stop.StopRequest() as stop, out_of_memory.explain_out_of_memory(accelerator, vars(args)) as networks:
        # 2. Prompts to tensors. A text encoder that the loop does not need is freed here.
        prompts = encode_prompts(args, accelerator, plan)

        # 3. Draw missing class images, and the small images for stage II's previews. Then free these pipelines.
        draw_class_images(args, accelerator, plan, prompts, stop)
        write_start_images(args, accelerator, plan, prompts)

        # 4. Images to latents, if the same crops repeat. Then free the VAE.
        dataset = DreamBoothDataset(args, plan, prompts)
        dataset.latents = cache_latents(args, accelerator, plan, dataset)

        # 5. Networks, and which of their weights train.
        models = load_models(args, plan, prompts, accelerator.device, dataset.latents)
        networks.update(filter(None, (models.unet, models.vae, models.text_encoder)))
        prepare_training(args, plan, models, accelerator.device)
        models.optimizer = make_optimizer(args, plan, models)
        wrap_and_resume(args, accelerator, plan, models)

        # 6. The loop.
        summary = describe_run(args, accelerator, plan, dataset.order, models)
        title = f"{METHOD} of {args.pretrained_model_name_or_path} to {plan.output_dir}"
        run_summary.show_run(accelerator, title, summary)
        finished = train(args, accelerator, plan, models, dataset, stop)

        # 7. The result. Distributed training ends before the upload: waiting processes would time out.
        if finished:
            instead = functools.partial(save_checkpoint, args, accelerator, plan, models, plan.steps)
            with atomic_folders.checkpoint_if_saving_fails(instead, plan.steps, at_once=shards.are_used(accelerator)):
                save_result(args, accelerator, plan, models)
        accelerator.end_training()
        if finished and accelerator.is_main_process:
            share(args, plan, summary, repository, stop)
        return 0 if finished else stop.exit_code


# ------------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags, those of --config first, or exit with status 2 and name every mistake."""
    parser = make_parser()
    args = command_line.parse_with_config(parser, sys.argv[1:] if argv is None else list(argv))
    if problems := find_problems(args) + find_method_problems(args):
        parser.error("\n".join(["these flags cannot be used:", *(f"  - {problem}" for problem in problems)]))
    return args


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags, in groups."""
    learned, trained = (add_model_args, add_data_args), (add_training_args, add_optimizer_args, add_method_args)
    return command_line.make_grouped_parser(__doc__, (*learned, *trained, add_validation_args, add_result_args))


def add_model_args(add, switch) -> None:
    """Add the flags of the model and its prompts."""
    kind_decides, precisions = functools.partial(switch, default=None), ["fp32", "fp16", "bf16", "int8"]
    add("--pretrained_model_name_or_path", metavar="MODEL", help="Hub id or folder of the base model (required).")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the weight files, for example fp16.")
    add("--stage_one_model_name_or_path", metavar="MODEL", help="IF's stage I, to draw the small images for stage II.")
    labels = ["noise_level", "timesteps"]
    add("--class_labels_conditioning", choices=labels, help="Class label of stage II. Unset: noise_level.")
    add("--tokenizer_name", help="Hub id or folder of another tokenizer than the model's own.")
    add("--tokenizer_max_length", type=int, metavar="L", help="Tokens per prompt. Unset: the model's own limit.")
    switch("--train_text_encoder", help="Train the text encoder as well; not T5.")
    kind_decides("--text_encoder_use_attention_mask", help="Mask padding tokens. IF: always on.")
    kind_decides("--pre_compute_text_embeddings", help="Encode prompts once. Unset: on, unless the encoder trains.")
    add("--text_encoder_precision", choices=precisions, help="Of precomputed embeddings. Unset: as --mixed_precision.")
    add("--cache_dir", metavar="DIR", help="Cache of embeddings and latents. Unset: ~/.cache/dreambooth.")


def add_data_args(add, switch) -> None:
    """Add the flags of the photos and class images."""
    modes, precisions = [mode.name.lower() for mode in Image.Resampling], ["no", "fp32", "fp16", "bf16"]
    targets, caching, styles = ["images", "base_prediction"], ["auto", "on", "off"], geometry.CROP_STYLES
    sources, units = captions.STRATEGIES, geometry.UNITS
    add("--instance_data_dir", metavar="DIR", help="Folder with photos of the subject, read recursively (required).")
    add("--dataset_name", metavar="NAME", help="Hub dataset with the photos, or its local copy (needs datasets).")
    add("--image_column", default="image", help="Column with images, of --dataset_name.")
    add("--caption_column", help="Column with captions. Unset: --caption_strategy.")
    add("--concepts_list", metavar="JSON", help="Several subjects: objects with these flags as keys; see README.")
    add("--repeats", type=int, default=1, help="How often each photo comes per epoch. Balances concepts.")
    add("--mask_data_dir", metavar="DIR", help="Masks with the photos' names. White counts in the loss.")
    add("--instance_prompt", help="What every photo shows, with an identifier: 'a photo of sks dog'.")
    add("--caption_strategy", default=sources[0], choices=sources, help="textfile: a .txt file beside each photo.")
    switch("--prepend_instance_prompt", help="Put the instance prompt before each of those captions.")
    add("--resolution", metavar="SIZE", help="Pixels: 512, or 512x640 (width x height). Unset: the model's own.")
    add("--crop_style", choices=styles, help="shifted_center: up to a tenth off, as IF was trained. Unset: random.")
    switch("--center_crop", help="The same as --crop_style center.")
    add("--crop_aspect", default="square", choices=["square", "preserve"], help="preserve: aspect-ratio buckets.")
    add("--resolution_type", default=units[0], choices=units, help="preserve keeps the area, or the shorter edge.")
    add("--bucket_step", type=int, help="Bucket sizes are multiples of this, in pixels. Unset: 64 from 512 px.")
    add("--minimum_image_size", type=int, metavar="PX", help="Leave out smaller photos. Unset: none.")
    add("--maximum_image_size", type=int, metavar="PX", help="Shrink larger photos before cropping.")
    add("--target_downsample_size", type=int, metavar="PX", help="Size that such photos are shrunk to.")
    switch("--stepwise_downsampling", help="Shrink by at most a quarter at a time. Slightly softer.")
    switch("--random_flip", help="Mirror each image left to right half of the time.")
    add("--image_interpolation_mode", choices=modes, help="How images are resized. Unset: lanczos, for IF bicubic.")
    switch("--skip_bad_images", help="Go on without unreadable photos. Off: an error lists them.")
    add("--caption_dropout", type=float, default=0.0, help='Share of captions replaced by "", in [0, 1).')
    add("--cache_latents", nargs="?", const="on", default="auto", choices=caching, help="auto: if crops repeat.")
    add("--latent_variants", type=int, metavar="K", help="Crops and flips per image. Unset: a new one each time.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that load images. 0: the trainer itself.")
    switch("--with_prior_preservation", help="Also train on class images, so that the class is not forgotten.")
    add("--class_data_dir", metavar="DIR", help="Folder of class images; unset: class_images in --output_dir.")
    add("--class_prompt", help="What class images show, without the identifier: 'a photo of dog'.")
    add("--prior_target", default="images", choices=targets, help="base_prediction: needs no class images.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class images' loss. 0: none.")
    add("--num_class_images", type=int, default=100, help="Class images to use. Missing ones are drawn.")
    add("--class_guidance_scale", type=float, help="To draw class images. 1: none. Unset: the pipeline's own.")
    add("--sample_batch_size", type=int, default=4, help="Class images drawn at a time, per process.")
    add("--prior_generation_precision", choices=precisions, help="Of class images. Unset: fp16 on GPUs, else fp32.")


def add_training_args(add, switch) -> None:
    """Add the flags of the run, its precision and devices."""
    add("--output_dir", default=DEFAULT_OUTPUT_DIR, metavar="DIR", help="Folder for the result and all else.")
    add("--seed", type=int, help="Seed of all random choices. Unset: a random one, printed and kept in args.json.")
    add("--train_batch_size", type=int, default=4, metavar="B", help="Photos per micro-step and process.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per optimizer step.")
    add("--num_train_epochs", type=int, default=1, help="Length of the run in epochs, if --max_train_steps is unset.")
    add("--max_train_steps", type=int, help="Length of the run in optimizer steps. Overrides --num_train_epochs.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="How many checkpoints to keep, the newest ones. Unset: all.")
    add("--resume_from_checkpoint", metavar="NAME", help="'latest', checkpoint-N in --output_dir, or a path.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of the arithmetic. Unset: accelerate's setting.")
    switch("--gradient_checkpointing", help="Save memory: compute activations again in the backward pass. Slower.")
    switch("--compile", help="Compile the U-Net's blocks: faster steps after minutes of compiling.")
    switch("--allow_tf32", help="Faster float32 products on NVIDIA GPUs since Ampere.")
    switch("--enable_xformers_memory_efficient_attention", help="Use xformers if installed; else torch's attention.")
    switch("--dry_run", help="Check everything, estimate memory and time, and stop before anything is written.")
    switch("--deterministic", help="Repeat runs exactly on GPUs too, with slower kernels. CPUs always do.")
    switch("--set_grads_to_none", help="Has no effect: torch always does it.")
    add("--local_rank", type=int, default=-1, help="Has no effect: the launcher sets it.")


def add_optimizer_args(add, switch) -> None:
    """Add the flags of the loss, the optimizer and the learning rate."""
    add("--learning_rate", type=float, default=DEFAULT_LEARNING_RATE, help="Learning rate after the warm-up.")
    add("--text_encoder_lr", type=float, help="Learning rate of the text encoder. Unset: --learning_rate.")
    switch("--scale_lr", help="Multiply learning rates by accumulation steps x batch size x processes.")
    add("--lr_scheduler", default="constant", choices=SCHEDULES, help="How the learning rate changes.")
    add("--lr_warmup_steps", type=int, default=500, help="Warm-up in optimizer steps. The constant schedule has none.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    add("--lr_end", type=float, help="Last learning rate. Unset: polynomial 1e-7, one_cycle peak / 250,000.")
    names = optimizers.OPTIMIZERS
    add("--optimizer", default=names[0], choices=names, help="adamw8bit: less memory. prodigy: finds its rate.")
    switch("--use_8bit_adam", help="The same as --optimizer adamw8bit: AdamW's state in 8 bits (bitsandbytes).")
    switch("--fused_backward", help="Update each weight in the backward pass and free its gradient at once.")
    add("--weight_dtype", default="fp32", choices=["fp32", "bf16"], help="Of trained weights. bf16: half the memory.")
    add("--adam_beta1", type=float, default=0.9, help="Decay of AdamW's first moment, in [0, 1).")
    add("--adam_beta2", type=float, default=0.999, help="Decay of AdamW's second moment, in [0, 1).")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay; 0: none.")
    add("--adam_epsilon", type=float, default=1e-8, help="Added to AdamW's denominator.")
    add("--max_grad_norm", type=float, default=1.0, help="Clip the gradient to this L2 norm. 0: no clipping.")
    add("--snr_gamma", type=float, metavar="GAMMA", help="Min-SNR weighting, usually 5. Unset: none.")
    switch("--offset_noise", help="The same as --noise_offset 0.1, unless that flag is given.")
    add("--noise_offset", type=float, help="Strength of noise that is constant over each channel. Unset: none.")
    switch("--train_variance", help="Also train IF's variance. Off: the result samples with a fixed variance.")


def add_method_args(add, switch) -> None:
    """Add the flags of full fine-tuning."""
    switch("--use_bitfit", help="Train biases only (arXiv 2106.10199). Little memory. Needs a larger --learning_rate.")
    switch("--skip_save_text_encoder", help="Leave the text encoder out of the result. Users take the base model's.")


def add_validation_args(add, switch) -> None:
    """Add the flags of the pictures that are drawn during training."""
    add("--validation_prompt", help="Draw previews of this before, during and after training. Unset: none.")
    add("--validation_negative_prompt", default="", help="Negative prompt of the previews.")
    add("--num_validation_images", type=int, default=4, help="Previews per round. Each round uses the same seeds.")
    add("--validation_steps", type=int, default=100, help="Optimizer steps between rounds of previews.")
    add("--validation_epochs", type=int, help="Epochs between rounds. Overrides --validation_steps.")
    sampler = "DPMSolverMultistepScheduler"
    add("--validation_scheduler", default=sampler, metavar="CLASS", help="Scheduler class of diffusers for previews.")
    add("--validation_num_inference_steps", type=int, default=25, help="Sampling steps per preview.")
    add("--validation_guidance_scale", type=float, default=7.5, help="Guidance scale of the previews. 1: none.")
    add("--validation_resolution", metavar="SIZES", help="Sizes of the previews: 64,64x96. Unset: --resolution.")
    add("--validation_images", nargs="+", metavar="FILE", help="Images that stage II's previews shrink and enlarge.")
    add("--num_eval_images", type=int, help="Training photos for stage II's previews, if no images are given.")


def add_result_args(add, switch) -> None:
    """Add the flags of logs and of sharing."""
    add("--report_to", default="tensorboard", help="Trackers: tensorboard, wandb, comet_ml, …, 'a,b', all or none.")
    add("--logging_dir", default="logs", help="Where trackers write, below --output_dir.")
    switch("--push_to_hub", help="Upload the result, its card and the previews.")
    add("--hub_model_id", help="Repository, 'name' or 'owner/name'; unset: the name of --output_dir.")
    switch("--hub_private_repo", help="Create the repository as a private one.")
    add("--hub_token", help="Access token. Others can read it in the process list: prefer `hf auth login`.")


def find_problems(args: Namespace) -> list[str]:
    """Return every mistake in the flags that both scripts share, a sentence each."""
    lacks_model, text = not (args.pretrained_model_name_or_path or "").strip(), args.train_text_encoder
    stale = "--pre_compute_text_embeddings excludes --train_text_encoder, which changes the embeddings at each step."
    crops = args.center_crop and args.crop_style not in (None, "center")
    return [
        *["--pretrained_model_name_or_path is required."] * lacks_model,
        *concepts.find_concept_problems(vars(args)),
        *prompt_cleaning.find_undecodable(vars(args)),
        *flag_checks.find_out_of_range(vars(args), flag_checks.usual_ranges(vars(args)) | FLAG_RANGES),
        *geometry.find_size_problems("--resolution", args.resolution),
        *geometry.find_size_problems("--validation_resolution", args.validation_resolution, many=True),
        *geometry.find_shrinking_problems(args.maximum_image_size, args.target_downsample_size),
        *precision.find_precision_problems(vars(args)),
        *schedules.find_rate_problems(vars(args)),
        *optimizers.find_optimizer_problems(vars(args)),
        *shards.find_unsupported(vars(args)),
        *flag_checks.messages_if(
            (text and args.pre_compute_text_embeddings, stale),
            (crops, f"--center_crop excludes --crop_style {args.crop_style}."),
            (args.validation_images and args.num_eval_images, "--validation_images excludes --num_eval_images."),
        ),
        *folder_checks.find_folder_problems(vars(args)),
        *list_images.find_unreadable("--validation_images", args.validation_images or []),
        *preview_pipeline.find_sampler_problems(args.validation_scheduler),
        *metric_log.find_tracker_problems(metric_log.tracker_names(args.report_to)),
    ]


def find_method_problems(args: Namespace) -> list[str]:
    """Return every mistake in the flags that only full fine-tuning has."""
    if args.skip_save_text_encoder and args.train_text_encoder:
        return ["--skip_save_text_encoder would lose what --train_text_encoder has trained. Leave one of them out."]
    return []


# ---------------------------------------------------------------------------------------------------------- start-up


def make_accelerator(args: Namespace) -> Accelerator:
    """Connect the processes, set up logging and arithmetic, and warn of flags that have no effect."""
    precision.set_determinism_and_tf32(args.deterministic, args.allow_tf32)
    trackers, logs = metric_log.tracker_names(args.report_to), Path(args.output_dir, args.logging_dir)
    folders = (args.output_dir, logs)
    accelerator = accelerator_setup.connect(args.mixed_precision, args.gradient_accumulation_steps, trackers, *folders)
    for note in flag_conflicts.find_unused_flags(vars(args)) + precision.find_slow_arithmetic(vars(args)):
        logger.warning(note)
    return accelerator


def detect_model(args: Namespace) -> ModelInfo:
    """Read the base model's config files and decide what kind of model it is.

    Raises:
        UserError: This script cannot train the model, or flags contradict it.
    """
    name = args.pretrained_model_name_or_path
    configs = model_files.read_configs(name, args.revision, args.hub_token)
    unet, vae, scheduler = configs.unet, configs.vae, configs.scheduler
    kind = KINDS.get((unet.get("in_channels"), vae.get("_class_name"), unet.get("class_embed_type")))
    is_if, enlarges = kind is not ModelKind.STABLE_DIFFUSION, kind is ModelKind.IF_STAGE_2
    predictions = ("epsilon",) if is_if else ("epsilon", "v_prediction")
    model_files.check_supported(name, configs, kind is not None, predictions, [kind.value for kind in ModelKind])
    prediction_type = scheduler.get("prediction_type", "epsilon")
    learns_variance = unet.get("out_channels") == 2 * (3 if is_if else 4)
    if learns_variance:
        # Fine-tuning changes the prediction. An untrained variance no longer fits it: sample with a fixed one.
        scheduler |= {"variance_type": "learned_range" if args.train_variance else "fixed_small"}
    factor = 2 ** (len((unet if is_if else vae)["block_out_channels"]) - 1)
    own = Size.of_config(unet.get("sample_size") or 64)
    usual = str(own) if is_if else "768" if prediction_type == "v_prediction" else "512"
    masks_padding = configs.text_encoder.get("use_attention_mask") or args.text_encoder_use_attention_mask
    base = ModelInfo(
        kind=kind,
        index=configs.index,
        scheduler=scheduler,
        image_noising_scheduler=configs.image_noising_scheduler or None,
        conditioning=(args.class_labels_conditioning or "noise_level") if enlarges else None,
        prediction_type=prediction_type,
        size_multiple=math.lcm(factor, 4) if enlarges else factor,
        vae_scale_factor=1 if is_if else factor,
        scaling_factor=1.0 if is_if else vae.get("scaling_factor", 0.18215),
        learns_variance=learns_variance,
        uses_attention_mask=bool(is_if or masks_padding),
        precomputes_text=is_if or (not args.train_text_encoder and args.pre_compute_text_embeddings is not False),
        vocabulary=configs.text_encoder.get("vocab_size"),
        tokens=args.tokenizer_max_length or (77 if is_if else None),
        native_size=own if is_if else Size(own.width * factor, own.height * factor),
        resolution=Size.parse(args.resolution or usual),
        preview_sizes=list(dict.fromkeys(geometry.parse_list(args.validation_resolution or args.resolution or usual))),
    )
    longest = configs.text_encoder.get("max_position_embeddings", 77)
    problems = flag_conflicts.find_model_conflicts(vars(args), base, longest)
    problems += layer_names.find_unknown_layers(unet, vars(args).get("lora_layers"))
    has_images = args.validation_images or args.num_eval_images
    small = [] if has_images else list(map(geometry.quarter, base.preview_sizes))
    stage_one = (args.stage_one_model_name_or_path, args.hub_token)
    if problems := problems + model_files.find_stage_one_problems(*stage_one, configs, small):
        raise UserError("\n".join([f"these flags cannot be used with {name} ({kind.value}):", *problems]))
    return base


def list_examples(args: Namespace, base: ModelInfo) -> list[Example]:
    """List the photos and class images of all concepts with their captions, also class images not drawn yet.

    Raises:
        UserError: No photos, unreadable ones without --skip_bad_images, or class images that nothing can draw.
    """
    width = base.resolution.width
    if not args.resolution and width > 2 * base.native_size.width:
        logger.warning(f"The model draws {base.native_size} px, but trains at {width}. See --resolution.")
    examples = []
    for concept in concepts.read_concepts(vars(args)):
        photos = list_photos(args, base, concept)
        examples += photos
        examples += list_class_images(args, base, concept, photos) if concept.class_data_dir else []
    return examples


def list_photos(args: Namespace, base: ModelInfo, concept: concepts.Concept) -> list[Example]:
    """List the photos of a concept, each with its captions, its mask and the size of its crop."""
    folder = hub_datasets.open_source(concept, args.cache_dir, args.hub_token)
    call, unit = concept.flag_name, args.resolution_type
    found = list_images.inspect_folder(folder, call("instance_data_dir"), args.skip_bad_images).sizes
    found = list_images.leave_out_small(found, args.minimum_image_size, unit)
    target = Size.parse(concept.resolution) if concept.resolution else base.resolution
    step = args.bucket_step or geometry.bucket_step(target, base.size_multiple)
    buckets = geometry.list_buckets(target, step, unit) if args.crop_aspect == "preserve" else [target]
    sizes = {path: geometry.choose_bucket(size, buckets, target) for path, size in found.items()}
    list_images.warn_of_enlarging(found, sizes, target)
    strategy = "metadata" if concept.caption_column else concept.caption_strategy
    words = (concept.instance_prompt, concept.prepend_instance_prompt)
    prompts = captions.find_captions(strategy, folder, list(found), *words)
    lights = masks.find_masks(folder, found, concept.mask_data_dir, call("mask_data_dir"))
    options = {"concept": concept, "is_prior": concept.is_regularisation_data}
    return [Example(path, prompts[path], size=sizes[path], mask=lights.get(path), **options) for path in found]


def list_class_images(
    args: Namespace, base: ModelInfo, concept: concepts.Concept, photos: list[Example]
) -> list[Example]:
    """List the class images of a concept. With --prior_target base_prediction, none has to be drawn."""
    folder, prompt, wanted = Path(concept.class_data_dir), concept.class_prompt, concept.num_class_images
    paths, missing = class_images.find(folder, prompt, concept.class_guidance_scale, wanted)
    if missing and args.prior_target == "base_prediction":
        paths, missing = [path for path in paths if path not in missing], set()
        if not paths:
            logger.info(f"{folder} holds no class images: the photos stand in for them, as {prompt!r}.")
            return [one._replace(prompts=(prompt,), is_prior=True, mask=None) for one in photos]
    if base.kind is ModelKind.IF_STAGE_2 and not args.stage_one_model_name_or_path:
        class_images.raise_if_missing(folder, len(missing), len(paths))
    return [Example(path, (prompt,), concept, photos[0].size, True, path in missing) for path in paths]


def make_plan(args: Namespace, accelerator: Accelerator, base: ModelInfo, examples: list[Example]) -> Plan:
    """Work out the numbers of the run.

    Raises:
        UserError: The checkpoint to resume is missing, or a different run wrote it.
    """
    resume_from, state = checkpoints.find_state(Path(args.output_dir), args.resume_from_checkpoint)
    seed = args.seed if args.seed is not None else state["fits"].get("seed")
    if seed is None:
        seed = accelerator_setup.on_main_process(accelerator, random.SystemRandom().randrange, 2**32)
    photos, processes = sum(not example.is_prior for example in examples), accelerator.num_processes
    accumulation, global_batch = args.gradient_accumulation_steps, args.train_batch_size * processes
    epoch_length = batch_order.BatchOrder(examples, global_batch, seed).epoch_length
    steps_per_epoch = math.ceil(epoch_length / accumulation)
    scale = global_batch * accumulation if args.scale_lr else 1
    rates = {"unet": args.learning_rate * scale}
    if args.train_text_encoder:
        text_rate = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
        rates["text_encoder"] = text_rate * scale
    resume_keys = {"script": METHOD, "seed": seed, "processes": processes, "precision": accelerator.mixed_precision}
    resume_keys |= resume_checks.resume_keys_of_run(vars(args), RESUME_FLAGS, base, examples)
    resume_keys |= method_resume_keys(args, base)
    if resume_from is not None:
        resume_checks.check_resume_keys(resume_from, state["fits"], resume_keys)
    count = len(args.validation_images or []) or min(args.num_eval_images or 0, photos)
    plan = Plan(
        base=base,
        examples=examples,
        seed=seed,
        processes=processes,
        first_step=state["step"],
        steps=args.max_train_steps or args.num_train_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        epoch_length=epoch_length,
        learning_rates=rates,
        noise_offset=(0.1 if args.offset_noise else 0.0) if args.noise_offset is None else args.noise_offset,
        frozen_dtype=PRECISIONS[accelerator.mixed_precision],
        previews=preview_pipeline.list_previews(base.preview_sizes, count or args.num_validation_images, seed),
        output_dir=Path(args.output_dir),
        resume_from=resume_from,
        resume_keys=resume_keys,
    )
    schedules.check_warmup(args.lr_scheduler, args.lr_warmup_steps, plan.steps)
    if args.max_train_steps is None and plan.steps < 50:
        logger.warning(f"{plan.steps} steps will teach little; --max_train_steps of some hundreds is usual.")
    return plan


def method_resume_keys(args: Namespace, base: ModelInfo) -> dict:
    """Return what a resumed full run must have in common with its checkpoint, beyond what all runs must."""
    return {"trained weights": "biases" if args.use_bitfit else "all"}


def print_dry_run(args: Namespace, accelerator: Accelerator, plan: Plan) -> int:
    """Print what the run would do, from configs and tokens alone; no weights are loaded and nothing is written."""
    empty = torch.device("meta")
    prompts = tokenize_prompts(args, plan, empty)
    prompts.embeds = prompts.ids if plan.base.precomputes_text else None
    models = load_models(args, plan, prompts, empty)
    prepare_training(args, plan, models, empty)
    models.optimizer = make_optimizer(args, plan, models)
    summary = describe_run(args, accelerator, plan, DreamBoothDataset(args, plan, prompts).order, models)
    title = f"{METHOD} of {args.pretrained_model_name_or_path}, not begun (--dry_run)"
    run_summary.show_run(accelerator, title, summary)
    memory_estimate.show_costs(sys.modules[__name__], vars(args), plan, accelerator)
    return 0


def describe_run(
    args: Namespace, accelerator: Accelerator, plan: Plan, order: batch_order.BatchOrder, models: Models
) -> dict[str, str]:
    """Return the lines of the start-up screen by name; the model card lists them as well.

    Args:
        order: The order of the run's examples.
        models: On the meta device if they are not loaded.
    """
    base, flags = plan.base, vars(args)
    trained, frozen = run_summary.count_parameters(models.unet, models.vae, models.text_encoder)
    kept = "float32" if args.weight_dtype == "fp32" else "bfloat16, rounded stochastically"
    frozen_words = f"{frozen:.2f} M are frozen in {run_summary.describe_frozen(flags, plan)}"
    variance = "trained" if args.train_variance else "not trained: results draw with fixed_small"
    rates = " and ".join(f"{rate:g}" for rate in plan.learning_rates.values())
    optimizer = optimizers.class_name(models.optimizer) + (" in the backward pass" if args.fused_backward else "")
    sampler = f"{type(make_sampler(args, plan)).__name__}, {args.validation_num_inference_steps} steps"
    return {
        "model": base.kind.value + (f", fed by {base.conditioning}" if base.conditioning else ""),
        "resolution": f"{base.resolution} px" + ("" if args.resolution else ", the default for this model"),
        "weights": f"{trained:.2f} M train in {kept}, {frozen_words}",
        **{name: str(value) for name, value in method_resume_keys(args, base).items()},
        "text encoder": run_summary.describe_text_encoder(flags, base),
        **({"variance": variance} if base.learns_variance else {}),
        **run_summary.describe_pictures(flags, plan, order, models),
        "batch": run_summary.describe_batch(flags, plan.processes, order),
        "steps": f"{plan.steps}, {plan.steps_per_epoch} an epoch; {plan.first_step} are done",
        "loss": f"{base.prediction_type}, min-SNR {args.snr_gamma or 'off'}, noise offset {plan.noise_offset:g}",
        "learning rate": f"{rates}, {args.lr_scheduler}, {optimizer}",
        **({"previews": f"{len(plan.previews)} by {sampler}"} if args.validation_prompt else {}),
        "arithmetic": f"{accelerator.mixed_precision} mixed precision on {accelerator.device.type}, seed {plan.seed}",
    }


def prepare_output_folder(args: Namespace, accelerator: Accelerator, plan: Plan) -> str | None:
    """Create the Hub repository, if asked for, and the output folder; start the trackers."""
    options = (args.hub_model_id, plan.output_dir, args.hub_token, args.hub_private_repo)
    prepare = functools.partial(accelerator_setup.on_main_process, accelerator, publish.prepare_repository)
    repository = prepare(*options) if args.push_to_hub else None
    decided = {"seed": plan.seed, "mixed_precision": accelerator.mixed_precision}
    used = command_line.flags_to_repeat(vars(args) | {"resolution": str(plan.base.resolution)} | decided)
    if accelerator.is_main_process:
        atomic_folders.open_folder(plan.output_dir, used, plan.first_step, plan.resume_from)
    accelerator.wait_for_everyone()
    metric_log.start_trackers(accelerator, used, plan.output_dir)
    return repository


def draw_class_images(
    args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable, stop: graceful_stop.StopRequest
) -> None:
    """Draw missing class images with the base model. All processes share the work.

    Image i depends only on i, the prompt and the batch size. Its seed is i, and it always shares a batch with the same
    neighbours. For stage II, stage I draws it small first.
    """
    missing = {example.path: example.concept for example in plan.examples if example.is_missing}
    if not missing:
        return
    base_model, hidden = args.pretrained_model_name_or_path, not accelerator.is_local_main_process
    batches = class_images.list_batches(missing, args.sample_batch_size)[accelerator.process_index :: plan.processes]
    words = dict.fromkeys(repr(concept.class_prompt) for concept in missing.values())
    logger.info(f"Drawing {len(missing)} class images of {' and '.join(words)}.")
    drawn = dict.fromkeys(batches)
    stages = [args.stage_one_model_name_or_path, base_model]
    for model in stages if plan.base.kind is ModelKind.IF_STAGE_2 else [base_model]:
        pipeline = load_pipeline(args, accelerator, plan.base, model)
        for batch in stop.until_asked(tqdm(batches, desc="class images", disable=hidden)):
            drawn[batch] = draw_class_batch(pipeline, prompts, *batch, drawn[batch])
            if model == base_model:
                class_images.save(*batch, drawn[batch], missing)
        del pipeline
        device_memory.free_memory()
        stop.leave_if_asked()
    accelerator.wait_for_everyone()
    class_images.raise_if_elsewhere(missing)


def draw_class_batch(
    pipeline: DiffusionPipeline, prompts: PromptTable, concept: concepts.Concept, batch: range, small: list | None
) -> list[Image.Image]:
    """Draw a batch of a concept's class images, or enlarge it if small images are given."""
    prompt, guidance = concept.class_prompt, concept.class_guidance_scale
    seeds = [generator("enlarged class image" if small else "class image", index) for index in batch]
    if pipeline.text_encoder is None:
        embeds = [prompts.embeds[prompts.rows_of(text)].expand(len(batch), -1, -1) for text in (prompt, "")]
        words = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    else:
        words = {"prompt": [prompt] * len(batch)}
    options = {"image": small} if small else {} if guidance is None else {"guidance_scale": guidance}
    return pipeline(**words, **options, generator=seeds).images


def write_start_images(args: Namespace, accelerator: Accelerator, plan: Plan, prompts: PromptTable) -> None:
    """Write the small images that stage II's previews start from: given images, photos, or what stage I draws."""
    # On each machine, because its folder may be its own.
    if args.validation_prompt and plan.base.kind is ModelKind.IF_STAGE_2 and accelerator.is_local_main_process:
        small = [preview._replace(size=geometry.quarter(preview.size)) for preview in plan.previews]
        photos = [example.path for example in plan.examples if args.num_eval_images and not example.is_prior]
        folder = plan.output_dir / "samples" / "small"
        if paths := args.validation_images or photos:
            preview_pipeline.shrink(small, paths, folder)
        else:
            model, options = args.stage_one_model_name_or_path, preview_options(args, prompts, None)
            with device_memory.skip_if_out_of_memory("Stage I"):
                preview_pipeline.draw(load_pipeline(args, accelerator, plan.base, model), small, folder, **options)
    accelerator.wait_for_everyone()


def load_pipeline(args: Namespace, accelerator: Accelerator, base: ModelInfo, model: str) -> DiffusionPipeline:
    """Load a whole model for drawing, in the precision asked for, without safety checker, and T5 if it is IF."""
    default = "fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32"
    left_out = ("safety_checker", *(("text_encoder", "tokenizer", "watermarker") if base.is_if else ()))
    options = dict.fromkeys(left_out) | {"dtype": PRECISIONS[args.prior_generation_precision or default]}
    pipeline = load(args, DiffusionPipeline, None, model, **options, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


def encode_prompts(args: Namespace, accelerator: Accelerator, plan: Plan) -> PromptTable:
    """Tokenize every prompt of the run and, if the text encoder is not needed later, embed them.

    Embeddings come from the cache. Missing ones are computed and added to it.
    """
    prompts = tokenize_prompts(args, plan, accelerator.device)
    if not plan.base.precomputes_text:
        return prompts
    precision = args.text_encoder_precision or accelerator.mixed_precision
    source = (args.pretrained_model_name_or_path, args.revision, args.hub_token)
    dtype = str(PRECISIONS.get(precision, precision))
    # The first process of a machine fills the cache, the others then find it full.
    with accelerator.local_main_process_first(), torch.no_grad():
        known = cache.open_cache("embeddings", args.cache_dir, source, args.variant, dtype, accelerator.device.type)
        make = functools.partial(embed_rows, args, plan, precision, prompts)
        embeds = known.fill(cache.prompt_keys(prompts.ids, prompts.mask), make)
    prompts.embeds = torch.stack(embeds).to(accelerator.device, plan.frozen_dtype)
    return prompts


def embed_rows(args: Namespace, plan: Plan, precision: str, prompts: PromptTable, rows: list[int]) -> Iterator[Tensor]:
    """Yield the embeddings, (L, D), of the prompts in some rows, from a text encoder that is then freed."""
    text_encoder = load_text_encoder(args, plan, precision, prompts.ids.device)
    for row in rows:
        yield embed_prompts(prompts, text_encoder, torch.tensor([row]), together=False)[0]
    del text_encoder
    device_memory.free_memory()


def cache_latents(args: Namespace, accelerator: Accelerator, plan: Plan, dataset: Dataset) -> dict | None:
    """Encode repeated crops once with the VAE, then free it; return None if latents are not cached.

    The value for (path, `Crop`) is the mean and deviation of its posterior, (2, C, h, w). Each visit samples from it.
    """
    if not (crops := list(count_crops(args, plan, dataset))):
        return None
    source, dtype = (args.pretrained_model_name_or_path, args.revision, args.hub_token), str(plan.frozen_dtype)
    known = cache.open_cache("latents", args.cache_dir, source, args.variant, dtype, accelerator.device.type)
    # The first process of a machine fills the cache, the others then find it full.
    with accelerator.local_main_process_first():
        keys = [[cache.content_hash(path), *crop, *map(str, dataset.resampling)] for path, crop in crops]
        latents = known.fill(keys, functools.partial(encode_crops, args, accelerator, plan, dataset, crops))
    logger.info(f"Cached the latents of {len(crops)} crops.")
    return dict(zip(crops, latents, strict=True))


def encode_crops(
    args: Namespace, accelerator: Accelerator, plan: Plan, dataset: Dataset, crops: list, places: list[int]
) -> Iterator[Tensor]:
    """Yield mean and deviation, (2, C, h, w), of the crops at some places, from a VAE that is then freed."""
    vae = load_vae(args, plan, accelerator.device)
    for place in tqdm(places, desc="latents", disable=not accelerator.is_local_main_process):
        path, crop = crops[place]
        moments = encode_images(vae, dataset.pixels(path, crop)[None].to(accelerator.device))[0]
        yield cache.check_moments(moments, path.name)
    del vae
    device_memory.free_memory()


def tokenize_prompts(args: Namespace, plan: Plan, device: torch.device) -> PromptTable:
    """Tokenize every prompt of the run, and warn of words that the model will not see."""
    base, texts = plan.base, [prompt for example in plan.examples for prompt in example.prompts]
    if args.validation_prompt:
        texts += [args.validation_prompt, args.validation_negative_prompt]
    texts = list(dict.fromkeys(texts + [""] * bool(args.caption_dropout or base.is_if)))
    tokenizer = load_tokenizer(args, base)
    length = base.tokens or tokenizer.model_max_length
    prompt_cleaning.check_tokenizer(tokenizer, length, base.vocabulary)
    ids, mask = prompt_cleaning.tokenize_texts(tokenizer, texts, length, cleans=base.is_if)
    return PromptTable(texts, ids.to(device), mask.to(device) if base.uses_attention_mask else None)


def embed_prompts(prompts: PromptTable, text_encoder: nn.Module | None, rows: Tensor, together: bool) -> Tensor:
    """Return the embeddings of the prompts in the given rows, each distinct row encoded once.

    Args:
        rows: (B,) int64 rows of the table, on the CPU.
        together: Encode all prompts in one call. Data parallelism needs this for a network that trains. If False,
            encode one prompt per call, so that the result is bit-identical to the precomputed embedding.

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


def load(args: Namespace, kind: type, part: str | None = None, model: str | None = None, **options) -> Any:
    """Load one part of the base model or of another model. Without a part: the whole model."""
    name = model or args.pretrained_model_name_or_path
    # Another model's branches have other names, but its weight files the same variants.
    revision = args.revision if name == args.pretrained_model_name_or_path else None
    where = {"revision": revision, "token": args.hub_token} | ({"variant": args.variant} if args.variant else {})
    return model_files.load(kind, name, part, **where, **options)


def load_tokenizer(args: Namespace, base: ModelInfo) -> Any:
    """Load the base model's tokenizer, or the one of --tokenizer_name."""
    if args.tokenizer_name:
        return model_files.load(transformers.AutoTokenizer, args.tokenizer_name, None, token=args.hub_token)
    return load(args, model_files.component_class(base.index, "tokenizer"), "tokenizer")


def load_text_encoder(args: Namespace, plan: Plan, precision: str, device: torch.device) -> nn.Module:
    """Load the base model's text encoder, frozen, on the device: in a precision, or in int8."""
    options = {"dtype": PRECISIONS.get(precision), "device": device}
    if precision == "int8":
        quantized = transformers.BitsAndBytesConfig(load_in_8bit=True)
        options = {"quantization_config": quantized, "device_map": {"": device}}
    kind = model_files.component_class(plan.base.index, "text_encoder")
    return load(args, kind, "text_encoder", **options).requires_grad_(False).eval()


def load_vae(args: Namespace, plan: Plan, device: torch.device) -> nn.Module:
    """Load the base model's VAE, frozen, on the device."""
    options = {"dtype": plan.frozen_dtype, "device": device}
    return load(args, diffusers.AutoencoderKL, "vae", **options).requires_grad_(False).eval()


def load_models(
    args: Namespace, plan: Plan, prompts: PromptTable, device: torch.device, latents: dict | None = None
) -> Models:
    """Load the frozen networks on the device. On "meta": without weights."""
    base = plan.base
    needs_vae = not base.is_if and (latents is None or args.validation_prompt)
    vae = load_vae(args, plan, device if latents is None else torch.device("cpu")) if needs_vae else None
    unet = load_unet(args, plan, device).requires_grad_(False)
    schedulers = [c and DDPMScheduler.from_config(c) for c in (base.scheduler, base.image_noising_scheduler)]
    models = Models(prompts, unet, vae, None, *schedulers, {"unet": unet}, {})
    if prompts.embeds is None:
        trains_whole = args.train_text_encoder and TRAINS_WHOLE_NETWORKS
        precision = args.weight_dtype if trains_whole else plan.resume_keys["precision"]
        models.text_encoder = load_text_encoder(args, plan, precision, device)
    if args.train_text_encoder:
        models.trained["text_encoder"] = models.text_encoder
    network_speed.keep_norms_in_bf16(unet)
    if args.enable_xformers_memory_efficient_attention and flag_checks.is_installed("xformers"):
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        selective = network_speed.checkpoint_all_but_attention
        unet.enable_gradient_checkpointing(None if args.compile else selective)
    if args.gradient_checkpointing and args.train_text_encoder:
        models.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    return models


def load_unet(args: Namespace, plan: Plan, device: torch.device) -> nn.Module:
    """Load the base model's U-Net in the precision in which it will train."""
    return load(args, UNet2DConditionModel, "unet", dtype=PRECISIONS[args.weight_dtype], device=device)


def prepare_training(args: Namespace, plan: Plan, models: Models, device: torch.device) -> None:
    """Make the weights of the networks that train trainable: all, or the biases alone."""
    if args.prior_target == "base_prediction":
        models.copies = {name: copy.deepcopy(model).to(plan.frozen_dtype) for name, model in models.trained.items()}
    for model in models.trained.values():
        for name, weight in model.train().named_parameters():
            weight.requires_grad_(not args.use_bitfit or name.endswith("bias"))


def wrap_for_devices(args: Namespace, accelerator: Accelerator, models: Models) -> None:
    """Wrap the trained networks for data parallelism and mixed precision (autocast)."""
    if args.compile:
        network_speed.compile_blocks(models.unet)
    *wrapped, models.optimizer = accelerator.prepare(*models.trained.values(), models.optimizer)
    models.trained = dict(zip(models.trained, wrapped, strict=True))
    models.unet, models.text_encoder = models.trained["unet"], models.trained.get("text_encoder", models.text_encoder)


# -------------------------------------------------------------------------------------------------------------- data


class DreamBoothDataset(Dataset):
    """The images of the run, scaled and cropped anew at each visit, or their cached latents."""

    def __init__(self, args: Namespace, plan: Plan, prompts: PromptTable, latents: dict | None = None):
        """Keep what is needed to crop images; `latents` is what `cache_latents` returns. Reads no image."""
        self.args, self.examples, self.seed, self.latents = args, plan.examples, plan.seed, latents
        self.order = batch_order.BatchOrder(self.examples, args.train_batch_size * plan.processes, plan.seed)
        rows = {text: row for row, text in enumerate(prompts.texts)}
        self.prompt_rows = [[rows[text] for text in one.prompts] for one in plan.examples]
        self.empty_row = rows.get("")
        limits = (args.maximum_image_size, args.target_downsample_size, args.resolution_type)
        self.shrinking, self.vae_scale_factor = geometry.Shrinking(*limits), plan.base.vae_scale_factor
        mode = args.image_interpolation_mode or ("bicubic" if plan.base.is_if else "lanczos")
        self.resampling = (Image.Resampling[mode.upper()], args.stepwise_downsampling)

    def crop(self, visit: ExampleVisit) -> Crop:
        """Return the crop of a visit: a function of seed, example and number of the visit alone."""
        example, variants = self.examples[visit.example], self.args.latent_variants
        turn = visit.earlier_visits % variants if variants else visit.earlier_visits
        chance = random.Random(derive_seed(self.seed, "crop and flip", visit.example, turn))
        scaled = geometry.scaled_size(decode_images.upright_size(example.path), visit.size, self.shrinking)
        box = geometry.crop_box(scaled, visit.size, example.concept.crop_style, chance)
        box = masks.move_crop_onto_mask(example.mask, scaled, box)
        return Crop(scaled, box, example.concept.random_flip and chance.random() < 0.5)

    def pixels(self, path: Path, crop: Crop) -> Tensor:
        """Return a cropped image, (3, H, W) float32 in [-1, 1]."""
        image = decode_images.crop(decode_images.open_scaled(path, crop.scaled, *self.resampling), crop)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def __getitems__(self, visits: list[ExampleVisit]) -> list[dict]:
        """Return the examples of a batch: with cached latents if all of its crops are cached, else with pixels."""
        places = [(self.examples[visit.example].path, self.crop(visit)) for visit in visits]
        is_cached = self.latents is not None and all(place in self.latents for place in places)
        return [self.load(visit, crop, is_cached) for visit, (_, crop) in zip(visits, places, strict=True)]

    def __getitem__(self, visit: ExampleVisit) -> dict:
        """Return one example: a function of seed, example and number of the visit alone."""
        return self.__getitems__([visit])[0]

    def load(self, visit: ExampleVisit, crop: Crop, is_cached: bool) -> dict:
        """Return what `collate` stacks, for one visit."""
        example = self.examples[visit.example]
        captions = random.Random(derive_seed(self.seed, "caption", visit.example, visit.earlier_visits))
        is_nameless = random.Random(derive_seed(visit.seed, "caption dropout")).random() < self.args.caption_dropout
        cached = is_cached and {"moments": self.latents[example.path, crop]}
        return (cached or {"pixel_values": self.pixels(example.path, crop)}) | {
            "weight_map": masks.weight_map(example.mask, crop, visit.size, self.vae_scale_factor),
            "prompt_rows": self.empty_row if is_nameless else captions.choice(self.prompt_rows[visit.example]),
            "is_prior": example.is_prior,
            "mean_weights": visit.mean_weight,
            "loss_weights": example.concept.loss_weight_of(example.is_prior),
            "seeds": visit.seed,
            "names": str(example.path),
        }


class StepSampler:
    """Choose the examples of each micro-step of a process: a function of the micro-step alone.

    `BatchOrder` has the order. Nothing is remembered from step to step, so a resumed run needs no replay.
    """

    def __init__(self, plan: Plan, order: batch_order.BatchOrder, micro_steps: range, rank: int):
        """Cover some micro-steps of an order, for process `rank`."""
        self.plan, self.order, self.micro_steps, self.rank = plan, order, micro_steps, rank

    def __iter__(self) -> Iterator[list[ExampleVisit]]:
        """Yield the visits of each micro-step, instance images before the class images that belong to them."""
        for micro_step in self.micro_steps:
            pairs = self.order[micro_step]
            places, mean_weight = batch_order.split_batch(len(pairs), self.rank, self.plan.processes)
            photos = [("instance", place, pairs[place].photo) for place in places]
            priors = [("class", place, pairs[place].class_image) for place in places if pairs[place].class_image]
            yield [
                ExampleVisit(*visit, pairs[0].size, mean_weight, derive_seed(self.plan.seed, "example", *where))
                for *where, visit in [(kind, micro_step, place, visit) for kind, place, visit in photos + priors]
            ]


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack examples into a batch.

    Returns:
        `pixel_values` (B, 3, H, W) float32 in [-1, 1] or, if latents are cached, `moments` (B, 2, C, h, w), the mean
        and deviation of their posterior; `weight_map` (B, 1, h, w) float32 in [0, 1]; `prompt_rows` (B,) int64, rows
        of the prompt table; `is_prior` (B,) bool; `mean_weights` (B,), which turn sums into means, and `loss_weights`
        (B,); `seeds` (B,) int64, from which each example's noise is drawn; `names`, B paths.
    """
    return torch.utils.data.default_collate(items)


def make_loader(args: Namespace, accelerator: Accelerator, dataset: Dataset, sampler: StepSampler) -> DataLoader:
    """Return the batches that a sampler names, of the training set or of another one."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=graceful_stop.ignore_signals,
    )


def make_samplers(args: Namespace, plan: Plan, dataset: DreamBoothDataset) -> list[StepSampler]:
    """Return the samplers of the training steps that are left, for each process."""
    micro_steps = range(*(steps * args.gradient_accumulation_steps for steps in (plan.first_step, plan.steps)))
    return [StepSampler(plan, dataset.order, micro_steps, rank) for rank in range(plan.processes)]


def count_crops(args: Namespace, plan: Plan, dataset: DreamBoothDataset) -> Counter:
    """Count how often each (path, `Crop`) will be used, or return nothing if their latents are not to be cached.

    By --cache_latents auto, they are cached if crops repeat and are at most 20,000: 2.6 GB of memory at 512 px.
    """
    if plan.base.is_if or args.cache_latents == "off":
        return Counter()
    visits = itertools.chain.from_iterable(itertools.chain.from_iterable(make_samplers(args, plan, dataset)))
    crops = Counter((dataset.examples[visit.example].path, dataset.crop(visit)) for visit in visits)
    if args.cache_latents == "auto" and 2 * len(crops) > min(crops.total(), 40_000):
        logger.info(f"Latents are not cached: {len(crops)} crops in {crops.total()} visits. See --latent_variants.")
        return Counter()
    return crops


def make_optimizer(args: Namespace, plan: Plan, models: Models) -> Optimizer:
    """Return the optimizer, with one group of parameters for each network that trains."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": plan.learning_rates[name]}
        for name, model in models.trained.items()
    ]
    decay = {"weight_decay": args.adam_weight_decay}
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon} | decay
    if args.use_8bit_adam or args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # takes seconds, as the others do

        return AdamW8bit(groups, **adam)
    if args.optimizer == "adafactor":
        from transformers import Adafactor

        # The rate is that of the run, not one of Adafactor's own (arXiv 1804.04235, sections 8 and 9).
        return Adafactor(groups, scale_parameter=False, relative_step=False, **decay)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, **adam, safeguard_warmup=True, use_bias_correction=True)
    return torch.optim.AdamW(groups, **adam, fused=optimizers.has_fused_kernel(groups))


def learning_rate(args: Namespace, step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a function of the step alone, so a resumed run needs no history.

    The curves are those of diffusers' schedules and, for one_cycle, of torch's OneCycleLR (cosine).

    Args:
        step: Counted from 0.
        steps: Steps of the whole run.
        peak: The highest learning rate.
    """
    name, warmup = args.lr_scheduler, args.lr_warmup_steps
    if name == "constant":
        return peak
    if name == "one_cycle":
        return one_cycle_rate(step, steps, peak, warmup, peak / 25e4 if args.lr_end is None else args.lr_end)
    if step < warmup:
        return peak * step / warmup
    if name == "constant_with_warmup":
        return peak
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if name == "linear":
        return peak * (1 - done)
    if name == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if name == "cosine_with_restarts":
        return 0.0 if done == 1 else peak * 0.5 * (1 + math.cos(math.pi * (args.lr_num_cycles * done % 1)))
    end = min(1e-7 if args.lr_end is None else args.lr_end, peak)
    return end + (peak - end) * (1 - done) ** args.lr_power


def one_cycle_rate(step: int, steps: int, peak: float, warmup: int, end: float) -> float:
    """Rise along half a cosine from peak / 25 to the peak, then fall along another one to `end`."""
    top = max(warmup - 1, 0)
    if step < top:
        start, done = peak / 25, step / top
        return peak + (start - peak) / 2 * (1 + math.cos(math.pi * done))
    done = min(1.0, (step - top) / max(1, steps - 1 - top))
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * done))


def wrap_and_resume(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> None:
    """Wrap the trained networks for devices and load the checkpoint, if any.

    There is no random state to restore: all seeds follow from the step.
    """
    if plan.resume_from is None:
        return wrap_for_devices(args, accelerator, models)
    with checkpoints.explaining_damage(plan.resume_from):
        load_weights(plan.resume_from, models)
    wrap_for_devices(args, accelerator, models)  # FSDP shards the weights here: the optimizer's state comes after
    checkpoints.load_optimizer(plan.resume_from, models.optimizer, accelerator.scaler)
    more = "" if plan.first_step < plan.steps else " Nothing is left to train: raise --max_train_steps to go on."
    logger.info(f"Resumed from {plan.resume_from}: {plan.first_step} of {plan.steps} steps are done.{more}")


# -------------------------------------------------------------------------------------------------------------- loss


def compute_loss(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, batch: dict
) -> dict[str, Tensor]:
    """Return the loss of one batch: add noise to the images, let the U-Net predict, compare with the known target.

    "loss" is minimized. Whatever else is returned is logged under its name, as a mean over micro-steps and processes.
    """
    device, seeds, scheduler = accelerator.device, batch["seeds"].tolist(), models.noise_scheduler
    clean = latents_or_pixels(batch, models.vae, plan.base.scaling_factor, device)
    noise, timesteps = sample_noise(clean.shape, seeds, scheduler.config.num_train_timesteps, plan.noise_offset)
    noise, timesteps = noise.to(device, non_blocking=True), timesteps.to(device, non_blocking=True)
    noisy = scheduler.add_noise(clean, noise, timesteps)

    trains_text, rows = "text_encoder" in models.trained, batch["prompt_rows"]
    with torch.set_grad_enabled(trains_text):
        embeds = embed_prompts(models.prompts, models.text_encoder, rows, together=trains_text)
    inputs = {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": embeds}
    if plan.base.kind is ModelKind.IF_STAGE_2:
        noising, conditioning = models.image_noising_scheduler, plan.base.conditioning
        inputs |= stage_two_inputs(noisy, timesteps, clean, seeds, noising, conditioning)
    # A U-Net with twice as many output channels returns the variance after the prediction.
    prediction, *variance = models.unet(**inputs).sample.float().split(clean.shape[1], dim=1)

    prediction_type, is_prior = plan.base.prediction_type, batch["is_prior"]
    wanted = prediction_target(scheduler, prediction_type, clean, noise, timesteps)
    if args.prior_target == "base_prediction" and is_prior.any():
        # Places, not a mask: indexing by a mask makes the device wait.
        places = is_prior.nonzero()[:, 0].to(device, non_blocking=True)
        chosen = {name: value.index_select(0, places) for name, value in inputs.items()}
        own = predict_as_base(accelerator, models, rows[is_prior], chosen)
        wanted = wanted.index_copy(0, places, own[:, : clean.shape[1]])
    alphas_cumprod, weight_map = scheduler.alphas_cumprod.to(device), batch["weight_map"].to(device, non_blocking=True)
    losses = example_losses(prediction, wanted, weight_map, timesteps, alphas_cumprod, prediction_type, args.snr_gamma)
    if args.train_variance:
        vlb = vlb_loss(prediction.detach(), variance[0], clean, noisy, timesteps, alphas_cumprod)
        losses = losses + len(alphas_cumprod) / 1000 * weighted_mean(vlb, weight_map)
    weights = [batch[name].float().to(device, non_blocking=True) for name in ("mean_weights", "loss_weights")]
    return combine_losses(losses, *weights, is_prior)


def predict_as_base(accelerator: Accelerator, models: Models, rows: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Return the base model's prediction, from copies of the networks as they were before training."""
    text_encoder = models.copies.get("text_encoder", models.text_encoder)
    with torch.no_grad(), accelerator.autocast():
        embeds = embed_prompts(models.prompts, text_encoder, rows, together=False)
        return models.copies["unet"](**inputs | {"encoder_hidden_states": embeds}).sample.float()


def latents_or_pixels(batch: dict, vae: nn.Module | None, scale: float, device: torch.device) -> Tensor:
    """Return the clean latents or, for pixel models, the pixels (arXiv 2112.10752, section 3.1).

    Args:
        batch: What `collate` returns. Each image's latents are sampled from its posterior with its own seed.
        vae: None for pixel models, and if the batch has moments.
        scale: The VAE's scaling factor, by which latents are multiplied.

    Returns:
        (B, C, h, w) float32 on the device.
    """
    if "moments" not in batch and vae is None:
        return batch["pixel_values"].to(device, non_blocking=True)
    if "moments" not in batch:
        # With cached latents the VAE waits on the CPU, and only crops that are not cached need it.
        place = next(vae.parameters()).device
        moments = encode_images(vae, batch["pixel_values"].to(place, non_blocking=True))
    else:
        moments = batch["moments"]
    mean, deviation = moments.to(device, non_blocking=True).float().unbind(1)
    draws = [torch.randn(mean.shape[1:], generator=generator(seed, "posterior")) for seed in batch["seeds"].tolist()]
    return (mean + deviation * torch.stack(draws).to(device, non_blocking=True)) * scale


def encode_images(vae: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return mean and deviation of the VAE's posteriors, (B, 2, C, h, w), of (B, 3, H, W) images in [-1, 1].

    Images are encoded one by one, so that the result is bit-identical in any batch.
    """
    with torch.no_grad():
        found = [vae.encode(pixels).latent_dist for pixels in pixel_values.to(vae.dtype).split(1)]
    return torch.cat([torch.stack([one.mean, one.std], dim=1) for one in found])


def sample_noise(
    shape: torch.Size, seeds: list[int], num_train_timesteps: int, offset: float, purpose: str = ""
) -> tuple[Tensor, Tensor]:
    """Sample each example's noise and timestep from its own seed, on the CPU, so that all devices get the same.

    Args:
        shape: (B, C, h, w).
        offset: Strength of offset noise, which is constant over each channel. 0: none.
        purpose: Separates this noise from another one of the same examples.

    Returns:
        (B, C, h, w) float32 noise and (B,) int64 timesteps in [0, T).
    """
    noise = torch.stack([torch.randn(shape[1:], generator=generator(seed, f"{purpose}noise")) for seed in seeds])
    if offset:
        constant = [torch.randn(shape[1], 1, 1, generator=generator(seed, "noise offset")) for seed in seeds]
        noise = noise + offset * torch.stack(constant)
    steps = [torch.randint(num_train_timesteps, (), generator=generator(seed, f"{purpose}timestep")) for seed in seeds]
    return noise, torch.stack(steps)


def stage_two_inputs(
    noisy: Tensor, timesteps: Tensor, clean: Tensor, seeds: list[int], scheduler: DDPMScheduler, conditioning: str
) -> dict[str, Tensor]:
    """Return the sample and class labels of a super-resolution U-Net (arXiv 2205.11487, section 2.4).

    As its pipeline does: shrink by 4, enlarge, add noise of a random level, and pass the level as class label. The
    published examples ("timesteps") feed the noisy image twice, with its timestep as class label.

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
    # Bicubic interpolation overshoots. A real input image never leaves [-1, 1].
    low = F.interpolate(clean, (height // 4, width // 4), mode="bicubic", antialias=True).clamp(-1, 1)
    enlarged = F.interpolate(low, (height, width), mode="bilinear", align_corners=True)
    drawn = sample_noise(clean.shape, seeds, scheduler.config.num_train_timesteps, 0.0, "low resolution ")
    noise, levels = (tensor.to(clean.device, non_blocking=True) for tensor in drawn)
    return {"sample": torch.cat([noisy, scheduler.add_noise(enlarged, noise, levels)], dim=1), "class_labels": levels}


def prediction_target(
    scheduler: DDPMScheduler, prediction_type: str, clean: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Return what the U-Net should predict: the noise, or the velocity (arXiv 2202.00512, appendix D)."""
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return noise


def example_losses(
    prediction: Tensor,
    wanted: Tensor,
    weight_map: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None,
) -> Tensor:
    """Return each example's mean squared error, weighted by min-SNR if asked (arXiv 2303.09556, section 3.4).

    Args:
        prediction, wanted: (B, C, h, w) float32.
        weight_map: (B, 1, h, w) float32 in [0, 1], the weight of each pixel or latent.
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) share of the signal in the variance at each timestep, in [0, 1].
        snr_gamma: Min-SNR gamma. Above this signal-to-noise ratio the weight falls. None: no weighting.

    Returns:
        (B,) float32.
    """
    losses = weighted_mean(F.mse_loss(prediction, wanted, reduction="none"), weight_map)
    if snr_gamma is None:
        return losses
    signal = alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    if prediction_type == "v_prediction":
        return losses * snr.clamp(max=snr_gamma) / (snr + 1)
    # min(SNR, γ) / SNR in a form that is 1 at SNR = 0, where a zero-terminal-SNR schedule ends.
    return losses * (snr_gamma / snr).clamp(max=1)


def weighted_mean(values: Tensor, weight_map: Tensor) -> Tensor:
    """Return each example's weighted mean, (B,), of (B, C, h, w) values and a (B, 1, h, w) map of weights."""
    weights = weight_map.expand_as(values)
    return (values * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def vlb_loss(
    noise: Tensor, variance: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Return each pixel's variational lower bound, which trains the variance (arXiv 2102.09672, section 3.1).

    Args:
        noise: (B, C, H, W) predicted and detached.
        variance: (B, C, H, W) in about [-1, 1]: -1 is the posterior's log variance, 1 the forward step's.
        clean, noisy: (B, C, H, W) float32, clean in [-1, 1].
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) share of the signal in the variance at each timestep, in [0, 1].

    Returns:
        (B, C, H, W) float32 in bits per dimension.
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
    # Checking arguments would make the device wait at every step.
    make_normal = functools.partial(Normal, validate_args=False)
    true, model = make_normal(true_mean, smallest.sqrt().expand_as(clean)), make_normal(mean, deviation)
    # The last step is scored by the probability of the picture's 256 levels (equation 13 there).
    above = model.cdf(clean + 1 / 255).where(clean < 0.999, 1.0)
    below = model.cdf(clean - 1 / 255).where(clean > -0.999, 0.0)
    surprise = -(above - below).clamp(min=1e-12).log()
    nats = torch.where((timesteps == 0)[:, None, None, None], surprise, kl_divergence(true, model))
    return nats / math.log(2)


def combine_losses(losses: Tensor, mean_weights: Tensor, loss_weights: Tensor, is_prior: Tensor) -> dict[str, Tensor]:
    """Return mean(instance) + weight × mean(class) as "loss", and both means (arXiv 2208.12242, equation 2).

    Args:
        losses: (B,) one per example.
        mean_weights: (B,) weights that turn the sum into a mean over instance images, or over class images.
        loss_weights: (B,) loss weight of the concept, or --prior_loss_weight for class images.
        is_prior: (B,) bool, on the CPU so that its content is known without waiting for the device.

    Returns:
        Scalars: "loss", and without gradient "loss_instance" and, if there are class images, "loss_prior".
    """
    parts = losses * mean_weights
    total, parts = (parts * loss_weights).sum(), parts.detach()
    if not is_prior.any():
        return {"loss": total, "loss_instance": parts.sum()}
    of_prior = is_prior.to(losses.device, losses.dtype, non_blocking=True)
    return {
        "loss": total,
        "loss_instance": (parts * (1 - of_prior)).sum(),
        "loss_prior": (parts * of_prior).sum(),
    }


# -------------------------------------------------------------------------------------------------------------- loop


def train(
    args: Namespace,
    accelerator: Accelerator,
    plan: Plan,
    models: Models,
    dataset: DreamBoothDataset,
    stop: graceful_stop.StopRequest,
) -> bool:
    """Train from the plan's first step to its last. Return False if a signal stopped the run, after a checkpoint."""
    sampler, optimizer = make_samplers(args, plan, dataset)[accelerator.process_index], models.optimizer
    batches = iter(make_loader(args, accelerator, dataset, sampler))
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    path = plan.output_dir / "metrics.jsonl"
    metrics = metric_log.MetricLog(accelerator, path, plan.first_step, plan.steps, parameters)
    every = args.validation_epochs * plan.steps_per_epoch if args.validation_epochs else args.validation_steps
    norms = []
    if args.fused_backward:
        optimizers.on_each_gradient(optimizer, functools.partial(update_weight, optimizer, norms))
    stop.begin_loop()
    if plan.first_step == 0 and args.validation_prompt:
        validate(args, accelerator, plan, models, 0, stop)
    accumulation = args.gradient_accumulation_steps
    for step in range(plan.first_step, plan.steps):
        began, done, losses, names = time.perf_counter(), step + 1, [], []
        rates = {name: learning_rate(args, step, plan.steps, peak) for name, peak in plan.learning_rates.items()}
        for group, name in zip(optimizer.param_groups, models.trained, strict=True):
            group["lr"] = rates[name]
        for micro_step in range(step * accumulation, done * accumulation):
            torch.manual_seed(derive_seed(plan.seed, "dropout", micro_step, accelerator.process_index))
            batch = next(batches)
            with accelerator.accumulate(*models.trained.values()):
                loss = compute_loss(args, accelerator, plan, models, batch)
                accelerator.backward(loss["loss"])
            losses.append(loss)
            names += batch["names"]
        # Outside of `accumulate`: its last micro-step has averaged the gradients of all processes.
        norm = update_weights(args, accelerator, models, derive_seed(plan.seed, "rounding", step), norms)

        values = {"epoch": done * accumulation / plan.epoch_length, "grad_norm": norm}
        values |= {"lr" if name == "unet" else f"lr_{name}": rate for name, rate in rates.items()}
        metrics.add(done, began, len(names) * plan.processes, losses, values, names)
        stopped = stop.agree() is not None
        if stopped or done % args.checkpointing_steps == 0:
            metrics.flush()
            save_checkpoint(args, accelerator, plan, models, done)
        if stopped:
            logger.info(f"Stopped. Go on by the same command with --resume_from_checkpoint checkpoint-{done}.")
            return False
        if args.validation_prompt and (done % every == 0 or done == plan.steps):
            metrics.flush()  # trackers take no numbers of a step once they have its pictures
            validate(args, accelerator, plan, models, done, stop)
    metrics.close()
    return True


def update_weights(
    args: Namespace, accelerator: Accelerator, models: Models, seed: int, norms: list[Tensor]
) -> Tensor:
    """Run one optimizer step and return the gradient norm.

    With --fused_backward the weights are already updated. Then only the norm is computed.
    """
    if args.fused_backward:
        norm = torch.stack(norms).norm()
        norms.clear()
        return norm
    optimizer = models.optimizer
    pairs = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = accelerator.clip_grad_norm_([weight for _, weight in pairs], args.max_grad_norm or math.inf)
    if args.weight_dtype == "fp32":
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
    torch.manual_seed(seed)  # the same in all processes, so that all round alike
    for group, weight in pairs:
        update_weight(optimizer, norms, group, weight)
    norms.clear()
    return norm


def update_weight(optimizer: Optimizer, norms: list[Tensor], group: dict, weight: nn.Parameter) -> None:
    """Update one weight, append its gradient norm to `norms`, free the gradient. bf16 is rounded stochastically."""
    with stochastic_rounding.in_float32(optimizer, weight) as wide, optimizers.narrowed_to(optimizer, group, wide):
        norms.append(wide.grad.norm())
        optimizer.step()
    weight.grad = None


def save_checkpoint(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, step: int) -> None:
    """Write checkpoint-N whole or not at all, then remove older ones above the limit. The main process writes."""
    networks, state = (
        shards.gather_weights(accelerator, models.trained),
        shards.gather_optimizer_state(accelerator, models.optimizer),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with atomic_folders.atomic_folder(plan.output_dir / f"checkpoint-{step}") as folder:
            save_weights(folder, networks)
            model_files.write_scheduler_config(folder, plan.base.scheduler)
            checkpoints.save_optimizer(folder, state, accelerator.scaler)
            checkpoints.write_state(folder, step, plan.resume_keys)
        atomic_folders.prune(plan.output_dir, args.checkpoints_total_limit, newest=step)
    accelerator.wait_for_everyone()


def save_weights(folder: Path, networks: dict[str, nn.Module]) -> None:
    """Write what trains as diffusers folders: `unet/` and, if it is trained, `text_encoder/`."""
    for name, network in networks.items():
        network.save_pretrained(folder / name)


def load_weights(folder: Path, models: Models) -> None:
    """Read what `save_weights` wrote into the models, before they are wrapped."""
    for name, model in models.trained.items():
        model.load_state_dict(type(model).from_pretrained(folder / name, dtype=torch.float32).state_dict())


def validate(
    args: Namespace, accelerator: Accelerator, plan: Plan, models: Models, step: int, stop: graceful_stop.StopRequest
) -> None:
    """Draw the previews with the live weights, with the same seeds each time, and leave training as it was.

    Training's randomness is not touched: the sampler has its own generators, and training seeds each micro-step. The
    processes share the images. Running out of memory is only a warning. A request to stop skips the remaining images.
    """
    samples = plan.output_dir / "samples"
    folder, small = samples / f"step-{step:06d}", samples / "small" if plan.base.low_res_size else None
    mine = stop.until_asked(plan.previews[accelerator.process_index :: plan.processes])
    text_encoder = models.text_encoder and accelerator.unwrap_model(models.text_encoder)
    for model in models.trained.values():
        model.eval()
    with shards.unsharded(models.trained.values()), device_memory.skip_if_out_of_memory(f"Validation at step {step}"):
        pipeline = make_preview_pipeline(args, accelerator, plan, models)
        options = preview_options(args, models.prompts, text_encoder)
        with torch.no_grad(), accelerator.autocast(), device_memory.moved_to(accelerator.device, models.vae):
            preview_pipeline.draw(pipeline, mine, folder, small, **options)
    for model in models.trained.values():
        model.train()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        names, title = [preview.name for preview in plan.previews], f"{args.validation_prompt} (step {step})"
        if pictures := preview_pipeline.write_grid(names, folder, title):
            metric_log.track_images(accelerator, "validation", pictures, step)


def preview_options(args: Namespace, prompts: PromptTable, text_encoder: nn.Module | None) -> dict[str, Any]:
    """Return the arguments that all previews pass to their pipeline."""
    rows = prompts.rows_of(args.validation_prompt, args.validation_negative_prompt)
    with torch.no_grad():
        prompt, negative = embed_prompts(prompts, text_encoder, rows, together=False).split(1)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
    }


def make_preview_pipeline(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> DiffusionPipeline:
    """Build the pipeline that draws previews from the networks in memory."""
    parts = {"vae": models.vae, "image_noising_scheduler": models.image_noising_scheduler}
    unet = accelerator.unwrap_model(models.unet)
    kind = getattr(diffusers, PIPELINES[plan.base.kind])
    return preview_pipeline.assemble(kind, unet=unet, scheduler=make_sampler(args, plan), **parts)


def make_sampler(args: Namespace, plan: Plan) -> diffusers.SchedulerMixin:
    """Return the sampler of the previews, with the noise that the model was trained with."""
    return getattr(diffusers, args.validation_scheduler).from_config(plan.base.scheduler)


# ------------------------------------------------------------------------------------------------------------ result


def save_result(args: Namespace, accelerator: Accelerator, plan: Plan, models: Models) -> None:
    """Write a pipeline folder in float32: the trained networks, the base's other parts, how prompts are read."""
    parts = {name: part and part.float() for name, part in shards.gather_weights(accelerator, models.trained).items()}
    models.vae = models.text_encoder = None
    if args.skip_save_text_encoder or plan.base.precomputes_text:
        parts["text_encoder"] = None
    if plan.base.is_if:
        # diffusers' safety checker of IF cannot be loaded with transformers 5, and nor could a pipeline that has it.
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if accelerator.is_main_process:
        pipeline = load(args, DiffusionPipeline, **parts, dtype=torch.float32)
        if args.tokenizer_name:
            pipeline.tokenizer = load_tokenizer(args, plan.base)
        if args.tokenizer_max_length:
            pipeline.tokenizer.model_max_length = args.tokenizer_max_length
        if pipeline.text_encoder is not None:
            set_masking(args, plan.base, pipeline.text_encoder)
        for part in (pipeline, *pipeline.components.values()):
            # A shared result should not tell in which folder the base model lay.
            if isinstance(part, DiffusionPipeline | diffusers.ModelMixin):
                part.register_to_config(_name_or_path=model_files.public_name(args.pretrained_model_name_or_path))
        with atomic_folders.atomic_result(plan.output_dir, last="model_index.json") as folder:
            pipeline.save_pretrained(folder)
            model_files.write_scheduler_config(folder, plan.base.scheduler)
        if plan.base.precomputes_text and not args.skip_save_text_encoder:
            del pipeline
            add_text_encoder(args, plan)
        logger.info(f"The trained pipeline is in {plan.output_dir}.")
    accelerator.wait_for_everyone()


def add_text_encoder(args: Namespace, plan: Plan) -> None:
    """Add the text encoder, which was freed before training. The result is already saved, should this fail."""
    kind = model_files.component_class(plan.base.index, "text_encoder")
    try:
        text_encoder = load(args, kind, "text_encoder", dtype=torch.float32)
    except (UserError, MemoryError) as error:
        logger.warning(f"The result has no text encoder, as with --skip_save_text_encoder. {error}")
        return
    set_masking(args, plan.base, text_encoder)
    index = json.loads((plan.output_dir / "model_index.json").read_text(encoding="utf-8"))
    index["text_encoder"] = plan.base.index["text_encoder"]
    with atomic_folders.atomic_result(plan.output_dir, last="model_index.json") as folder:
        text_encoder.save_pretrained(folder / "text_encoder")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def set_masking(args: Namespace, base: ModelInfo, text_encoder: nn.Module) -> None:
    """Write into the result's config that padding is masked, if a flag says so. IF's pipelines always mask."""
    if args.text_encoder_use_attention_mask and not base.is_if:
        text_encoder.config.use_attention_mask = True


def share(
    args: Namespace, plan: Plan, summary: dict[str, str], repository: str | None, stop: graceful_stop.StopRequest
) -> None:
    """Write the model card and, if asked, upload. A failed upload keeps the result and says how to try again."""
    model_card.write_card(vars(args), plan, METHOD_TAGS, summary, repository)
    if repository:
        stop.begin_upload(publish.say_how_to_upload(plan.output_dir, repository))
        logger.info(f"Uploaded to {publish.upload_result(plan.output_dir, repository, args.hub_token)}")


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)  # a tracker may have replaced sys.exit in the meantime, to learn the status
