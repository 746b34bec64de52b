"""Write a Stable Diffusion pipeline folder with random weights: small ones for tests, real sizes for measurements.

    python -m utils.make_model /tmp/tiny --shape tiny

No download is needed: the tokenizer's vocabulary is built here too. To add a shape, add an entry to `SHAPES`; to add a
model family, add a builder beside `build_pipeline`.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from utils.errors import InputError
from utils.seeds import derive_seed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (  # one token each; other words become one token a letter
    "an the of in on with and photo picture painting dog cat person man woman toy teapot backpack sks red green blue "
    "black white sitting running beach snow forest house table grass"
)

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,  # unused by PNDM, but a DDPM scheduler read from the same file needs it
}
PNDM = (PNDMScheduler, {**NOISE_SCHEDULE, "skip_prk_steps": True})
DDIM = (DDIMScheduler, NOISE_SCHEDULE)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}

# Widths count from the highest resolution down. In a U-Net, all levels but the lowest attend to the text. A text
# encoder without `vocab_size` takes the tokenizer's.
SHAPES = {
    "tiny": {  # for tests: a step takes milliseconds, the folder less than 3 MB
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {
            "widths": (24, 48),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 3,
            "sample_size": 8,
        },
        "vae": {"widths": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "small": {  # for benchmarks: at 256 pixels, encoding costs about as much as the U-Net's step
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {"widths": (64, 128, 256, 256), "layers_per_block": 2, "attention_head_dim": 8, "sample_size": 32},
        "vae": {"widths": (64, 128, 256, 256), "layers_per_block": 2, "sample_size": 256},
        "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "sd15": {  # the published configuration of Stable Diffusion 1.5
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {"widths": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8, "sample_size": 64},
        "vae": {"widths": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text": {**CLIP_L, "vocab_size": 49408, "projection_dim": 768},
    },
    "sd21": {  # the published configuration of Stable Diffusion 2.1 for 768 pixels
        "scheduler": DDIM,
        "prediction_type": "v_prediction",
        "pad_token": "!",
        "unet": {
            "widths": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20, 20),
            "sample_size": 96,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "vae": {"widths": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
        "text": {**OPEN_CLIP_H, "vocab_size": 49408, "projection_dim": 512, "hidden_act": "gelu"},
    },
}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, write the folder, say what it holds."""
    parser = argparse.ArgumentParser(prog="python -m utils.make_model", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="sizes of the networks")
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help="default: the shape's own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights; default: 0")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights; default: fp32")
    parser.add_argument("--variant", help="put this into the weights' file names, as in model.fp16.safetensors")
    args = parser.parse_args(argv)
    try:
        make_model(args.out, args.shape, args.prediction_type, args.seed, DTYPES[args.dtype], args.variant)
    except InputError as error:
        parser.error(str(error))
    megabytes = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file()) / 1e6
    print(f"Wrote {args.out}: shape {args.shape}, random weights, {megabytes:.1f} MB.")


def make_model(
    folder: Path,
    shape: str,
    prediction_type: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Path:
    """Write a Stable Diffusion pipeline folder with random weights, the same for the same arguments.

    Args:
        folder: where to; must not exist or be empty.
        shape: a key of `SHAPES`.
        prediction_type: "epsilon" or "v_prediction"; None takes the shape's own.
        seed: of the weights; the global random state is neither used nor changed.
        dtype: of all weights.
        variant: goes into the weights' file names, for example "fp16".

    Returns:
        The folder.

    Raises:
        InputError: The folder already holds files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists and is not an empty folder. Name another one or remove it.")
    pipeline = build_pipeline(SHAPES[shape], prediction_type, seed, dtype)
    pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
    return folder


def build_pipeline(
    shape: dict, prediction_type: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Build a Stable Diffusion pipeline of an entry of `SHAPES`, on the CPU, without safety checker."""
    tokenizer = build_tokenizer(shape["pad_token"])
    scheduler_class, schedule = shape["scheduler"]
    networks = {}
    for name, build, config in (
        ("unet", build_unet, {**shape["unet"], "cross_attention_dim": shape["text"]["hidden_size"]}),
        ("vae", build_vae, shape["vae"]),
        ("text_encoder", build_text_encoder, {"vocab_size": len(tokenizer), **shape["text"]}),
    ):
        # Only the CPU's generator is seeded, because that is the only one which fork_rng(devices=[]) restores.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(derive_seed(seed, "make_model", name))
            networks[name] = torch.nn.Module.to(build(config), dtype).eval()  # diffusers' own `to` warns about nothing
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


def build_vae(config: dict) -> AutoencoderKL:
    """Build an autoencoder that shrinks images by 2 between levels, so by 8 with four widths."""
    config = dict(config)
    widths = config.pop("widths")
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        scaling_factor=0.18215,
        **config,
    )


def build_text_encoder(config: dict) -> CLIPTextModel:
    """Build a CLIP text encoder for 77 tokens."""
    # With id 2, transformers takes the highest id of a prompt for its end token, as the published files have it; the
    # tokenizer below gives the end token the highest id.
    token_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**{"hidden_act": "quick_gelu", **token_ids, **config}))


def build_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """Build a byte-level CLIP tokenizer that knows `WORDS`, and everything else letter by letter."""
    merges = find_merges(WORDS.split())
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def byte_letters() -> list[str]:
    """Return the 256 characters for which byte-level tokenizers let the bytes stand, printable ASCII first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def find_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, in order of use, that make each word one token.

    A word is first split by the merges of the words before it and then joined from the left. So no earlier merge can
    ever tear a later word apart: it was already applied when the later word's own merges were chosen.
    """
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            parts = apply_merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = apply_merge(parts, merges[-1])
    return merges


def apply_merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each adjacent occurrence of the pair, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


if __name__ == "__main__":
    sys.exit(main())
