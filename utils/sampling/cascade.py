"""The stages that draw a picture: one of Stable Diffusion, or up to three of DeepFloyd IF, one after another.

IF draws 64 pixels; its stage II makes them four times as large, and so does Stable Diffusion's x4 upscaler after it. A
stage is loaded, draws all pictures and is freed before the next one; T5 comes first and reads the prompts of all.

Pictures go from stage to stage with 8 bits a colour, and not, as in the published code, as unrounded tensors. Rounding
moves a colour by half a grey level at most, and noise level 250 by 50 of them. In return a stage's PNG is all that the
next one saw: from the same seed, a stage alone draws from it what the cascade draws, to the bit.

Letters: B pictures, L tokens, D text width.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from utils.core.errors import UserError
from utils.data import prompt_cleaning
from utils.data.geometry import Size
from utils.devices import device_memory
from utils.sampling import results
from utils.sampling.results import SAVED, SCHEDULERS, Origin

SCALE = 4  # that stage II and the upscaler enlarge by
TOKENS = 77  # a prompt of IF
# The pipelines of stage II scale the enlarged picture as well where such a sampler asks for scaled noise.
SCALING_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model, its place in the cascade, and how it draws unless told otherwise: for IF as published."""

    name: str
    number: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str = SAVED
    noise_level: int | None = None  # of what it enlarges; None: it draws from noise alone
    lora_scale: float = 1.0


STABLE_DIFFUSION = Kind("Stable Diffusion", 1, num_inference_steps=25, guidance_scale=7.5, scheduler=SCHEDULERS[0])
STAGE_ONE = Kind("DeepFloyd IF stage I", 1, num_inference_steps=100, guidance_scale=7.0)
STAGE_TWO = Kind("DeepFloyd IF stage II", 2, num_inference_steps=50, guidance_scale=4.0, noise_level=250)
UPSCALER = Kind("the x4 upscaler", 3, num_inference_steps=75, guidance_scale=9.0, noise_level=100)
IF = (STAGE_ONE, STAGE_TWO)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One model and how it draws."""

    origin: Origin
    kind: Kind
    prompts: list[str]  # one for each row of pictures
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    noise_level: int | None
    lora_scale: float

    @property
    def name(self) -> str:
        """The model's folder or Hub id."""
        return self.origin.result.name

    @property
    def tokens(self) -> int:
        """Tokens per prompt of an IF model."""
        return self.origin.result.settings.get("tokenizer_max_length") or TOKENS


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What all stages share."""

    seeds: list[int]  # one for each picture of a row
    negative_prompt: str
    batch_size: int
    dtype: torch.dtype
    device: torch.device


# -------------------------------------------------------------------------------------- what is known from the configs


def kind_of(origin: Origin) -> Kind:
    """Tell a model's kind by its parts and its U-Net's channels.

    Raises:
        UserError: It is none of the four.
    """
    if "low_res_scheduler" in origin.index:
        return UPSCALER
    if origin.index.get("vae"):
        return STABLE_DIFFUSION
    channels = results.read_part_config(origin, "unet").get("in_channels")
    if channels not in (3, 6):
        raise UserError(f"{origin.result.name} has no VAE and {channels} input channels; IF's stages have 3 or 6.")
    return STAGE_ONE if channels == 3 else STAGE_TWO


def size_multiple(origin: Origin, kind: Kind) -> tuple[int, str]:
    """Return what width and height are multiples of, for the upscaler those of its input, and why."""
    part = "vae" if kind is STABLE_DIFFUSION else "unet"
    levels = len(results.read_part_config(origin, part)["block_out_channels"])
    return 2 ** (levels - 1), "the VAE's factor" if part == "vae" else "the U-Net's factor"


def native_size(stage: Stage) -> Size:
    """Return the size in pixels that a model draws unless told otherwise."""
    width, height = Size.of_config(results.read_part_config(stage.origin, "unet")["sample_size"])
    factor = size_multiple(stage.origin, stage.kind)[0] if stage.kind is STABLE_DIFFUSION else 1
    return Size(width * factor, height * factor)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise UserError if stages cannot draw as they are told to, before anything large is read."""
    for stage in stages:
        if stage.kind is STAGE_TWO and stage.scheduler in SCALING_SCHEDULERS:
            raise UserError(
                f"{stage.scheduler} does not fit {stage.name}: diffusers' pipeline of {stage.kind.name} would scale "
                "the picture that it enlarges. Take another scheduler."
            )
        if stage.noise_level is not None and stage.noise_level > (highest := highest_noise_level(stage)):
            raise UserError(f"Noise level {stage.noise_level} is beyond {highest}, the highest of {stage.name}.")
    readers = [stage for stage in stages if stage.kind in IF]
    if readers and (missing := prompt_cleaning.find_missing_packages()):
        raise UserError(f"Prompts of DeepFloyd IF are cleaned by packages: run `pip install {' '.join(missing)}`.")
    width = text_width(find_text_origin(readers)) if readers else None
    for stage in readers:
        config = results.read_part_config(stage.origin, "unet")
        if (expected := config.get("encoder_hid_dim") or config["cross_attention_dim"]) != width:
            raise UserError(
                f"{stage.name} reads text of width {expected}; the text encoder of {readers[0].name} gives {width}. "
                "Take stages that were trained with one text encoder."
            )


def highest_noise_level(stage: Stage) -> int:
    """Return the most noise that a model can add to what it enlarges."""
    if stage.kind is UPSCALER:
        return stage.origin.index.get("max_noise_level", 350)
    noising = results.read_part_config(stage.origin, "image_noising_scheduler", "scheduler_config.json")
    return noising.get("num_train_timesteps", 1000) - 1


def find_text_origin(stages: Sequence[Stage]) -> Origin:
    """Return the first of IF's stages that has a text encoder.

    Raises:
        UserError: None has.
    """
    for stage in stages:
        if any(results.place_of(stage.origin, "text_encoder")[1].get("text_encoder") or ()):
            return stage.origin
    names = " nor ".join(stage.name for stage in stages)
    raise UserError(f"Neither {names} has a text encoder." if len(stages) > 1 else f"{names} has no text encoder.")


def text_width(origin: Origin) -> int:
    """Return the width D of what T5 makes of a prompt."""
    return results.read_part_config(origin, "text_encoder")["d_model"]


# --------------------------------------------------------------------------------------------------------------- sizes


def plan_sizes(
    stages: Sequence[Stage], width: int | None, height: int | None, pictures: Sequence[Image.Image]
) -> list[list[Size]]:
    """Return the size of each row's pictures for each stage.

    Args:
        width: Of what the first stage draws, in pixels; None takes the training's, else the model's own, or for the
            upscaler that of its picture.
        height: The same.
        pictures: What the first stage enlarges, one a row; empty if it draws from noise.

    Raises:
        UserError: A model cannot draw such a size.
    """
    first, rows = stages[0], len(stages[0].prompts)
    factor, why = size_multiple(first.origin, first.kind)
    step = math.lcm(factor, SCALE) if first.kind is STAGE_TWO else factor * (SCALE if first.kind is UPSCALER else 1)
    for flag, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels % step:
            raise UserError(f"--{flag} {pixels} is no multiple of {step}, {why}{' times 4' * (step != factor)}.")
    usual = [usual_size(first, factor, picture) for picture in pictures] or [usual_size(first, factor)] * rows
    sizes = [[Size(width or size.width, height or size.height) for size in usual]]
    for before, stage in itertools.pairwise(stages):
        factor, _ = size_multiple(stage.origin, stage.kind)
        source = sizes[-1]
        sizes.append([Size(size.width * SCALE, size.height * SCALE) for size in source])
        checked = source if stage.kind is UPSCALER else sizes[-1]
        pairs = zip(source, checked, strict=True)
        if wrong := next((size for size, edges in pairs if any(edge % factor for edge in edges)), None):
            raise UserError(
                f"{stage.name} cannot enlarge the {wrong.width} x {wrong.height} pixels of {before.name}: its U-Net "
                f"needs multiples of {factor}. Choose --width and --height accordingly."
            )
    return sizes


def usual_size(stage: Stage, factor: int, picture: Image.Image | None = None) -> Size:
    """Return the size in pixels that a first stage draws if nobody says otherwise.

    Args:
        picture: What it enlarges.
    """
    if stage.kind is UPSCALER:
        return Size(*(max(edge // factor, 1) * factor * SCALE for edge in picture.size))
    trained = stage.origin.result.settings.get("resolution")
    return Size.parse(trained) if trained else native_size(stage)


def make_small(picture: Image.Image, size: Size) -> Image.Image:
    """Cut the middle out of a picture and resize it, to a quarter of a stage's size; one that fits stays as it is."""
    small = (size.width // SCALE, size.height // SCALE)
    return picture if picture.size == small else ImageOps.fit(picture, small, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------------- drawing


@torch.no_grad()
def embed_prompts(stages: Sequence[Stage], drawing: Drawing) -> dict[tuple[str, int], Tensor]:
    """Load T5, encode the prompts of IF's stages, one at a time as its pipelines do, and free it.

    Returns:
        (1, L, D) on the CPU for each text and its L, empty if no stage is of IF.
    """
    readers = [stage for stage in stages if stage.kind in IF]
    wanted = {(text, stage.tokens): None for stage in readers for text in (*stage.prompts, drawing.negative_prompt)}
    if not readers:
        return {}
    origin = find_text_origin(readers)
    tokenizer = results.load_tokenizer(origin)
    text_encoder = results.load_part(origin, "text_encoder", drawing.dtype).to(drawing.device)
    embeds = {}
    for text, length in wanted:
        cleaned = prompt_cleaning.clean(text)
        prompt_cleaning.warn_of_losses([text], [cleaned], tokenizer, length)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(cleaned, **options).to(drawing.device)
        embeds[text, length] = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0].cpu()
    del text_encoder
    device_memory.free_memory()
    return embeds


def draw_rows(
    stage: Stage, sizes: list[Size], drawing: Drawing, embeds: dict, small: list[list[Image.Image]] | None
) -> Iterator[list[Image.Image]]:
    """Load a stage, draw a row of pictures at a time, and free the stage after the last one.

    Args:
        sizes: Of the pictures of each row.
        embeds: What `embed_prompts` returned.
        small: What is enlarged, in rows; None: nothing is.
    """
    absent = ("text_encoder", "tokenizer") if stage.kind in IF else ()
    pipeline = results.load(stage.origin, stage.scheduler, stage.lora_scale, drawing.dtype, drawing.device, absent)
    for row in range(len(stage.prompts)):
        own = prompt_arguments(stage, row, drawing, embeds)
        common = {"num_inference_steps": stage.num_inference_steps, "guidance_scale": stage.guidance_scale}
        if small:
            own |= {"image": small[row]}
            common |= {"noise_level": stage.noise_level}
        if stage.kind is not UPSCALER:
            common |= sizes[row]._asdict()
        yield draw_batches(pipeline, drawing.seeds, drawing.batch_size, own, stage.kind.name, **common)
    del pipeline
    device_memory.free_memory()


def prompt_arguments(stage: Stage, row: int, drawing: Drawing, embeds: dict) -> dict[str, Sequence]:
    """Return the prompts of a row's pictures, for IF as embeddings, as arguments of a pipeline's call."""
    texts, count = (stage.prompts[row], drawing.negative_prompt), len(drawing.seeds)
    if stage.kind in IF:
        encoded = [embeds[text, stage.tokens].to(drawing.device).expand(count, -1, -1) for text in texts]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), encoded, strict=True))
    return dict(zip(("prompt", "negative_prompt"), ([text] * count for text in texts), strict=True))


def draw_batches(
    pipeline: diffusers.DiffusionPipeline,
    seeds: Sequence[int],
    batch_size: int,
    own: dict[str, Sequence],
    title: str = "pictures",
    **common: Any,
) -> list[Image.Image]:
    """Draw a picture from each seed; its noise depends on the seed alone.

    Args:
        own: Arguments of the pipeline that have a value for each picture.
        title: Of the progress bar.
        common: Arguments that all pictures share.
    """
    drawn = []
    for start in tqdm(range(0, len(seeds), batch_size), desc=title, disable=len(seeds) == 1):
        batch = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
        values = {name: values[batch] for name, values in own.items()}
        drawn += pipeline(**values, **common, generator=generators).images
    return drawn
