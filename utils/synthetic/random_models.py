"""Pipelines with random weights, and the folders that hold them.

No download is needed: the tokenizers' vocabularies are built too.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, T5Config, T5EncoderModel, T5Tokenizer

from utils.core.errors import UserError
from utils.core.seeds import derive_seed
from utils.synthetic.model_sizes import IF_SCHEDULE, SHAPES, T5_THIN, T5_XXL, X4_SCHEDULE
from utils.synthetic.small_tokenizers import WORDS, build_t5_tokenizer, build_tokenizer, write_t5_tokenizer


def make_model(
    folder: Path,
    shape: str,
    prediction_type: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    full_text_encoder: bool = False,
    configs_only: bool = False,
) -> Path:
    """Write a pipeline folder with random weights, the same for the same arguments.

    Args:
        folder: where to; must not exist or be empty.
        shape: a key of `SHAPES`.
        prediction_type: "epsilon" or "v_prediction"; None takes the shape's own.
        seed: of the weights; the global random state is neither used nor changed.
        dtype: of all weights.
        variant: goes into the weights' file names, for example "fp16".
        full_text_encoder: write T5 v1.1 XXL in full, instead of one thin layer of its width; only for shapes that have
            it. It is 19 GB in float32.
        configs_only: write no weights, which takes seconds for any shape.

    Returns:
        The folder.

    Raises:
        UserError: The folder already holds files, or the shape has no large text encoder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not an empty folder. Name another one or remove it.")
    recipe = SHAPES[shape]
    has_large_text_encoder = recipe["text"] is T5_XXL
    if full_text_encoder and not has_large_text_encoder:
        raise UserError(f"--full_text_encoder is for if1-* and if2-*, not for --shape {shape}. Leave it out.")
    if has_large_text_encoder and not full_text_encoder:
        recipe = {**recipe, "text": T5_THIN}
    with torch.device("meta") if configs_only else contextlib.nullcontext():
        pipeline = BUILDERS[recipe["family"]](recipe, prediction_type, seed, dtype)
    if configs_only:
        save_configs(pipeline, folder)
    else:
        pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
    if isinstance(pipeline.tokenizer, T5Tokenizer):
        write_t5_tokenizer(folder / "tokenizer", recipe.get("words", WORDS))
    return folder


def save_configs(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write what `save_pretrained` writes of a pipeline, but for the weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            part.config.architectures = [type(part).__name__]
            part.config.save_pretrained(folder / name)
        elif isinstance(part, ModelMixin):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def build_pipeline(
    shape: dict, prediction_type: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Build a Stable Diffusion pipeline of an entry of `SHAPES`, on the CPU, without safety checker."""
    tokenizer = build_tokenizer(shape["pad_token"], shape.get("words", WORDS))
    scheduler_class, schedule = shape["scheduler"]
    recipes = {
        "unet": (build_unet, {**shape["unet"], "cross_attention_dim": shape["text"]["hidden_size"]}),
        "vae": (build_vae, shape["vae"]),
        "text_encoder": (build_text_encoder, {"vocab_size": len(tokenizer), **shape["text"]}),
    }
    networks = build_networks(recipes, seed, dtype)
    return StableDiffusionPipeline(
        **networks,
        tokenizer=tokenizer,
        scheduler=scheduler_class.from_config(
            {**schedule, "prediction_type": prediction_type or shape["prediction_type"]}
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_if_pipeline(
    shape: dict, prediction_type: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> IFPipeline | IFSuperResolutionPipeline:
    """Build a DeepFloyd IF pipeline of an entry of `SHAPES`, on the CPU, without safety checker and watermark."""
    tokenizer = build_t5_tokenizer(shape.get("words", WORDS))
    upscales = shape["family"] == "if2"
    recipes = {
        "unet": (
            build_if2_unet if upscales else build_if1_unet,
            {**shape["unet"], "encoder_hid_dim": shape["text"]["d_model"]},
        ),
        "text_encoder": (build_t5_encoder, {"vocab_size": len(tokenizer), **shape["text"]}),
    }
    with default_dtype(dtype):  # the largest U-Net takes 17 GB in float32, so it is never built in that first
        networks = build_networks(recipes, seed, dtype)
    parts = {
        **networks,
        "tokenizer": tokenizer,
        "scheduler": DDPMScheduler(
            **IF_SCHEDULE, sample_max_value=1.0 if upscales else 1.5, prediction_type=prediction_type or "epsilon"
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if upscales:
        noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        return IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)
    return IFPipeline(**parts)


def build_x4_pipeline(
    shape: dict, prediction_type: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionUpscalePipeline:
    """Build a Stable Diffusion x4 upscaler of an entry of `SHAPES`, on the CPU, without safety checker."""
    tokenizer = build_tokenizer("!")
    recipes = {
        "unet": (build_x4_unet, {**shape["unet"], "cross_attention_dim": shape["text"]["hidden_size"]}),
        "vae": (build_vae, {**shape["vae"], "scaling_factor": 0.08333}),
        "text_encoder": (build_text_encoder, {"vocab_size": len(tokenizer), **shape["text"]}),
    }
    return StableDiffusionUpscalePipeline(
        **build_networks(recipes, seed, dtype),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**X4_SCHEDULE, prediction_type=prediction_type or "v_prediction"),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        max_noise_level=350,
    )


BUILDERS: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd": build_pipeline,
    "if1": build_if_pipeline,
    "if2": build_if_pipeline,
    "x4": build_x4_pipeline,
}


def build_networks(
    recipes: dict[str, tuple[Callable[[dict], torch.nn.Module], dict]], seed: int, dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """Build each network from its builder and configuration, with a random seed that depends on its name."""
    networks = {}
    for name, (build, config) in recipes.items():
        # Only the CPU's generator is seeded, because that is the only one which fork_rng(devices=[]) restores.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(derive_seed(seed, "make_model", name))
            networks[name] = torch.nn.Module.to(build(config), dtype).eval()  # diffusers' own `to` warns about nothing
    return networks


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this dtype, and of the previous one again afterwards."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_unet(config: dict) -> UNet2DConditionModel:
    """Build a U-Net whose levels attend to the text, all but the lowest."""
    config = dict(config)
    widths = config.pop("widths")
    attending = len(widths) - 1
    return UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        **config,
    )


def build_x4_unet(config: dict) -> UNet2DConditionModel:
    """Build the upscaler's U-Net, which takes 4 latent and 3 image channels and a noise level as a class."""
    config = dict(config)
    widths = config.pop("widths")
    attending = len(widths) - 1
    return UNet2DConditionModel(
        in_channels=7,
        out_channels=4,
        num_class_embeds=1000,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",),
        only_cross_attention=(True,) * attending + (False,),
        use_linear_projection=True,
        **config,
    )


def build_if1_unet(config: dict) -> UNet2DConditionModel:
    """Build a U-Net of IF's stage I, whose lowest levels attend to the text."""
    config = dict(config)
    widths, attending = config.pop("widths"), config.pop("attending")
    plain = len(widths) - attending
    return UNet2DConditionModel(
        **{
            "in_channels": 3,
            "out_channels": 6,  # noise, and how much of the variance's range
            "block_out_channels": widths,
            "down_block_types": ("ResnetDownsampleBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",) * attending,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D",) * attending + ("ResnetUpsampleBlock2D",) * plain,
            "cross_attention_dim": widths[-1],
            "cross_attention_norm": "group_norm",
            "attention_head_dim": 64,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            **config,
        }
    )


def build_if2_unet(config: dict) -> UNet2DConditionModel:
    """Build a U-Net of IF's stage II, which also takes an upscaled image and the level of the noise added to it."""
    return build_if1_unet(
        {
            "in_channels": 6,
            "class_embed_type": "timestep",
            "time_embedding_dim": config["widths"][-1],
            "time_embedding_act_fn": "gelu",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1 / 0.7071,  # the published digits, not quite the square root of 2
            "mid_block_scale_factor": 1 / 0.7071,
            **config,
        }
    )


def build_vae(config: dict) -> AutoencoderKL:
    """Build an autoencoder that shrinks images by 2 between levels, so by 8 with four widths."""
    config = {"scaling_factor": 0.18215, **config}
    widths = config.pop("widths")
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        **config,
    )


def build_text_encoder(config: dict) -> CLIPTextModel:
    """Build a CLIP text encoder for 77 tokens."""
    # With id 2, transformers takes the highest id of a prompt for its end token, as the published files have it; the
    # tokenizer below gives the end token the highest id.
    token_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**{"hidden_act": "quick_gelu", **token_ids, **config}))


def build_t5_encoder(config: dict) -> T5EncoderModel:
    """Build the encoder of a T5 v1.1."""
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **config))
