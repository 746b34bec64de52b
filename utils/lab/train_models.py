"""Train the small models in models/ from scratch, on pictures of the world of shapes (`utils.synthetic.shapes`).

    python -m utils.lab.train_models --output models

Four pipelines, each loaded and drawn with like a real one: a Stable Diffusion that predicts noise (shapes-sd), its
sister that predicts velocity and starts from it (shapes-sd-v), and both stages of DeepFloyd IF (shapes-if1,
shapes-if2). The text encoder learns first, to tell what a caption says, and is then frozen: trained together with a
U-Net this small, it would not get there. That includes the rare words, which a real one tells apart as well.

To change a model's sizes, edit its entry in `utils.synthetic.model_sizes`. To change its training, edit its `Recipe`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import T5Tokenizer

from utils.core.errors import UserError
from utils.core.seeds import derive_seed
from utils.devices import accelerator_setup
from utils.lab.train_parts import (
    Recipe,
    cache_latents,
    encode_captions,
    teach_text_encoder,
    to_tensor,
    train_decoder,
    train_unet,
    train_vae,
)
from utils.synthetic import shapes
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import BUILDERS
from utils.synthetic.small_tokenizers import write_t5_tokenizer

ROOT = Path(__file__).parents[2]
PICTURES = 24_000


RECIPES = {
    "shapes-sd": Recipe("shapes-sd", pixels=16, steps=4000, batch_size=64, learning_rate=1.5e-3),
    "shapes-sd-v": Recipe(
        "shapes-sd",
        pixels=16,
        steps=1500,
        batch_size=64,
        learning_rate=1e-3,
        prediction_type="v_prediction",
        starts_from="shapes-sd",
    ),
    "shapes-if1": Recipe("shapes-if1", pixels=16, steps=2000, batch_size=64, learning_rate=1.5e-3),
    "shapes-if2": Recipe(
        "shapes-if2",
        pixels=64,
        steps=6000,
        batch_size=16,
        learning_rate=1.5e-3,
        starts_from="shapes-if1",
        noise_offset=0.15,
        crop=32,
        highest_weight=15.0,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Train what is asked for and return the exit status."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for name in args.only:
            train_model(name, args.output, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.train_models", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "models", metavar="DIR", help="where to; default: models")
    add("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="which models; default: all")
    add("--threads", type=int, help="of each process; one is quickest where several run; default: torch's own")
    add("--seed", type=int, default=0, help="of weights, pictures and noise; default: 0")
    return parser.parse_args(argv)


def train_model(name: str, output: Path, seed: int) -> None:
    """Train one model and write it as a pipeline folder.

    Raises:
        UserError: The folder exists, or the model that it starts from does not.
    """
    recipe, folder = RECIPES[name], output / name
    if folder.exists():
        raise UserError(f"{folder} exists. Remove it, or name another --output.")
    source = output / recipe.starts_from if recipe.starts_from else None
    if source and not (source / "model_index.json").is_file():
        raise UserError(f"{source} is missing, from which this model starts. Train it first.")
    began = time.monotonic()
    shape = SHAPES[recipe.shape]
    pipeline = BUILDERS[shape["family"]](shape, recipe.prediction_type, seed)
    rng = np.random.default_rng(derive_seed(seed, "corpus", recipe.shape))
    pictures, captions, _ = shapes.draw_corpus(PICTURES, recipe.pixels, rng)
    report(name, began, f"{PICTURES} pictures of {recipe.pixels} px")
    if source:
        take_over(pipeline, source)
    else:
        teach_text_encoder(pipeline, recipe.text_steps, seed)
        report(name, began, "text encoder")
    embeds = encode_captions(pipeline, captions)
    if is_latent := hasattr(pipeline, "vae"):
        if not source:
            train_vae(pipeline.vae, pictures, recipe, seed)
            report(name, began, "VAE")
            train_decoder(pipeline.vae, pictures, recipe, seed)
            report(name, began, "decoder")
        examples = cache_latents(pipeline.vae, pictures)
    else:
        examples = to_tensor(pictures)
    train_unet(pipeline, examples, is_latent, embeds, recipe, seed, lambda text: report(name, began, text))
    save(pipeline, folder)
    report(name, began, f"wrote {folder}")


def report(name: str, began: float, text: str) -> None:
    """Print what is done and how long it took since the start."""
    print(f"{name} {time.monotonic() - began:5.0f} s  {text}", flush=True)


def take_over(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Copy the weights of another model, of each network that is of the same shape."""
    source = DiffusionPipeline.from_pretrained(folder)
    for part in ("text_encoder", "vae", "unet"):
        if hasattr(pipeline, part) and shapes_of(getattr(pipeline, part)) == shapes_of(getattr(source, part)):
            getattr(pipeline, part).load_state_dict(getattr(source, part).state_dict())
    if hasattr(pipeline, "vae"):
        pipeline.vae.register_to_config(scaling_factor=source.vae.config.scaling_factor)


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of each of a network's tensors."""
    return {key: value.shape for key, value in network.state_dict().items()}


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder, the large networks in float16, which halves the files.

    diffusers reads them as float32 unless told otherwise; transformers would read its text encoder as float16.
    """
    for part in ("unet", "vae"):
        if hasattr(pipeline, part):
            nn.Module.to(getattr(pipeline, part), torch.float16)
    pipeline.save_pretrained(folder)
    if isinstance(pipeline.tokenizer, T5Tokenizer):
        write_t5_tokenizer(folder / "tokenizer", shapes.WORDS)


if __name__ == "__main__":
    sys.exit(main())
