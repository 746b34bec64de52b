"""Draw pictures with what a training run wrote: a result, any checkpoint-N of it, or a base model to compare with.

    python -m utils.sample dreambooth-model/checkpoint-500 --prompt "a photo of sks dog in the snow" --seed 0 1 2

The picture of a prompt and a seed is the preview that training drew of them (preview i has the run's seed + i): in
float32 and with --batch_size 1, to the bit. An adapter and a checkpoint need the base model, which args.json names.
"""

import argparse
import dataclasses
import json
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import peft
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tqdm.auto import tqdm

from utils import checkpoints, images, model_files, previews
from utils.errors import InputError
from utils.flag_checks import find_out_of_range
from utils.hub import ADAPTER, PIPELINE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVED = "saved"
SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
RANGES = {
    **dict.fromkeys(("num_inference_steps", "batch_size", "height", "width"), "1 or more"),
    **dict.fromkeys(("guidance_scale", "lora_scale"), "0 or more"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """A folder or Hub repository to draw from, and the flags of the run that wrote it."""

    name: str
    kind: str  # PIPELINE, ADAPTER or "unet", after the file or folder that it is recognised by
    settings: dict  # of args.json; empty if there is none


def main(argv: list[str] | None = None) -> int:
    """Draw every prompt from every seed, say where the pictures are, and return the exit status."""
    args = parse_args(argv)
    try:
        folder = draw_to_folder(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {len(args.prompt) * len(args.seed)} pictures and grid.png to {folder}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.sample", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("result", metavar="RESULT", help="a result or checkpoint-N folder, a base model's folder, or a Hub id")
    add("--prompt", nargs="+", required=True, help="what to draw: one text or several")
    add("--seed", nargs="+", type=int, default=[0], help="draw each prompt from each of these; default: 0")
    add("--negative_prompt", default="", help="what the pictures are steered away from")
    add("--base_model", help="model that RESULT was trained from, if args.json does not name it or it has moved")
    add("--revision", help="branch, tag or commit of the base model, or of RESULT if that is a whole pipeline")
    add("--variant", help="variant of the same model's weight files, for example fp16")
    add("--lora_scale", type=float, default=1.0, help="strength of an adapter; 0: none, default: 1, as trained")
    add("--scheduler", choices=(SAVED, *SCHEDULERS), default=SCHEDULERS[0], help=f"sampler; default: {SCHEDULERS[0]}")
    add("--num_inference_steps", type=int, default=25, help="sampling steps per picture; default: 25")
    add("--guidance_scale", type=float, default=7.5, help="classifier-free guidance; 1: none, default: 7.5")
    add("--height", type=int, help="pixels; default: the resolution of the training, else the model's own")
    add("--width", type=int, help="pixels; default: as for --height")
    add("--batch_size", type=int, default=1, help="pictures drawn at a time: faster, and not the same in every bit")
    add("--dtype", choices=DTYPES, default="fp32", help="precision; default: fp32")
    add("--device", help="for example cuda:1 or cpu; default: the best there is")
    add("--output", type=Path, metavar="DIR", help="where to write; default: samples/ and the name of RESULT")
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), RANGES)
    if problems := problems + [f"--seed {seed} is negative." for seed in args.seed if seed < 0]:
        parser.error(" ".join(problems))
    return args


def draw_to_folder(args: argparse.Namespace) -> Path:
    """Load, draw and write, a prompt at a time, and return the folder of the pictures."""
    silence_loading()
    where = {"base_model": args.base_model, "revision": args.revision, "variant": args.variant}
    how = {"scheduler": args.scheduler, "lora_scale": args.lora_scale, "dtype": DTYPES[args.dtype]}
    pipeline = load_pipeline(args.result, **where, **how, device=args.device)
    diffusers.utils.logging.set_verbosity_warning()  # says which words of a prompt are too many
    default = recognise(args.result, args.revision).settings.get("resolution")
    folder = args.output or Path("samples", default_name(args.result))
    folder.mkdir(parents=True, exist_ok=True)
    drawn, options = [], (args.negative_prompt, args.num_inference_steps, args.guidance_scale)
    size = (args.height or default, args.width or default)
    for number, prompt in enumerate(args.prompt):
        pictures = draw(pipeline, [prompt], args.seed, *options, size, args.batch_size)
        for seed, picture in zip(args.seed, pictures):
            images.save_png(picture, folder / file_name(number, prompt, seed))
        drawn += pictures
    one = len(args.prompt) == 1
    grid = previews.make_grid(
        drawn,
        columns=len(args.seed),
        labels=[f"seed {seed}" for seed in args.seed] * len(args.prompt),
        title=args.prompt[0] if one else None,
        row_labels=None if one else args.prompt,
    )
    images.save_png(grid, folder / "grid.png")
    return folder


def silence_loading() -> None:
    """Turn off the libraries' progress bars and their warnings of parts that a file need not have."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def default_name(result: str) -> str:
    """Name pictures after a result; a checkpoint after its run as well."""
    folder = Path(result).resolve()
    if not folder.is_dir():
        return result.replace("/", "-")
    return folder.name if checkpoints.step_of(folder) is None else f"{folder.parent.name}-{folder.name}"


def file_name(number: int, prompt: str, seed: int) -> str:
    """Return a picture's file name: the prompt's number keeps those apart whose letters and digits are the same."""
    words = re.sub("[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return "-".join(filter(None, (f"{number:02d}", words, f"seed{seed}"))) + ".png"


# ----------------------------------------------------------------------------------------------------------- drawing


def draw(
    pipeline: diffusers.DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    negative_prompt: str = "",
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    size: tuple[int | None, int | None] = (None, None),
    batch_size: int = 1,
) -> list[Image.Image]:
    """Draw each prompt from each seed; the noise of a picture depends on its seed alone.

    Args:
        size: Height and width in pixels; None takes the model's own.
        batch_size: Pictures drawn at a time.

    Returns:
        One picture for each pair, those of the first prompt first.

    Raises:
        InputError: The model cannot draw that size.
    """
    factor = getattr(pipeline, "vae_scale_factor", 1)
    for flag, pixels in zip(("height", "width"), size):
        if pixels is not None and pixels % factor:
            raise InputError(f"--{flag} {pixels} is no multiple of {factor}, the VAE's factor.")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn = []
    for start in tqdm(range(0, len(pairs), batch_size), desc="pictures", disable=len(pairs) == 1):
        batch = pairs[start : start + batch_size]
        drawn += pipeline(
            prompt=[prompt for prompt, _ in batch],
            negative_prompt=[negative_prompt] * len(batch),
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
            height=size[0],
            width=size[1],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).images
    return drawn


# ----------------------------------------------------------------------------------------------------------- loading


def load_pipeline(
    result: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    scheduler: str = SCHEDULERS[0],
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> diffusers.DiffusionPipeline:
    """Load a result, or a base model with what a result changes of it, ready to draw and without a safety checker.

    Args:
        result: Folder or Hub id of a pipeline or an adapter, or the folder of a checkpoint.
        base_model: What an adapter or a checkpoint was trained from; None: what args.json says.
        revision: Of the base model, or of `result` if that is a pipeline; None: what args.json says.
        variant: Of the same.
        scheduler: One of `SCHEDULERS` with the saved settings, or "saved" for the one that they are of.

    Raises:
        InputError: There is nothing to draw from in `result`, no base model, or the two do not fit together.
    """
    device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    if dtype is torch.float16 and device.type == "cpu":
        raise InputError("--dtype fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16 or fp32.")
    found = recognise(str(result), revision)
    source, places = find_sources(found, base_model, {"revision": revision, "variant": variant})
    parts = load_parts(found, source, places, dtype)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(**source, **parts, dtype=dtype)
    if found.kind == ADAPTER:
        load_adapter(pipeline, found, lora_scale)
    elif lora_scale != 1:
        raise InputError(f"--lora_scale {lora_scale:g}: {found.name} is no adapter.")
    set_scheduler(pipeline, found, scheduler)
    # Otherwise prompts would not be read in the way that was trained.
    if length := found.settings.get("tokenizer_max_length"):
        pipeline.tokenizer.model_max_length = length
    if found.settings.get("text_encoder_use_attention_mask"):
        pipeline.text_encoder.config.use_attention_mask = True
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def recognise(result: str, revision: str | None = None) -> Result:
    """Tell what a folder or Hub repository holds.

    Raises:
        InputError: It is nothing that this tool draws from.
    """
    if find_file(result, PIPELINE, revision):
        return Result(result, PIPELINE, read_settings([Path(result)]))
    kind = next((name for name in (ADAPTER, "unet/config.json") if find_file(result, name)), None)
    if kind is None:
        there = [path.name for path in checkpoints.list_checkpoints(Path(result))]
        hint = f" It has {', '.join(there)}: name one of them, as {Path(result, there[-1])}." if there else ""
        what = "holds" if Path(result).is_dir() else "is no folder, and as a Hub id it gave"
        raise InputError(f"{result} {what} neither {PIPELINE} nor {ADAPTER} nor a unet folder.{hint}")
    return Result(result, kind.partition("/")[0], read_settings([Path(result), Path(result).resolve().parent]))


def find_file(model: str, filename: str, revision: str | None = None) -> Path | None:
    """Return the path of a folder's or a Hub repository's file, None if there is none."""
    if Path(model).exists():
        return Path(model, filename) if Path(model, filename).is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, filename, revision=revision))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def read_settings(folders: list[Path]) -> dict:
    """Return the content of the first args.json in the folders, nothing if none has one."""
    path = next((folder / "args.json" for folder in folders if (folder / "args.json").is_file()), None)
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def find_sources(found: Result, base_model: str | None, given: dict[str, str | None]) -> tuple[dict, dict[str, dict]]:
    """Return where the pipeline is loaded from, and those of its parts that are elsewhere, for `from_pretrained`.

    Args:
        given: `revision` and `variant`.

    Raises:
        InputError: A base model is needed and unknown, or given and not needed.
    """
    own = {"pretrained_model_name_or_path": found.name}
    if found.kind != PIPELINE:
        trained = [name for name in ("unet", "text_encoder") if Path(found.name, name).is_dir()]
        return find_base(found, base_model, given), dict.fromkeys(trained if found.kind != ADAPTER else [], own)
    index = model_files.read_config(found.name, PIPELINE, given["revision"])
    if index.get("text_encoder") == [None, None]:  # written with --skip_save_text_encoder
        return own | given, {"text_encoder": find_base(found, base_model, {})}
    if base_model:
        raise InputError(f"{found.name} is a whole pipeline: --base_model {base_model} would have no effect.")
    return own | given, {}


def find_base(found: Result, base_model: str | None, given: dict[str, str | None]) -> dict[str, str | None]:
    """Return the base model of a result as arguments of `from_pretrained`.

    Raises:
        InputError: Neither the caller nor args.json names it, or it is not there.
    """
    known = {"pretrained_model_name_or_path": str(base_model)} if base_model else found.settings
    source = {key: known.get(key) for key in ("pretrained_model_name_or_path", "revision", "variant")}
    source |= {key: value for key, value in given.items() if value is not None}
    name = source["pretrained_model_name_or_path"]
    if not name:
        raise InputError(f"{found.name} needs its base model, and no args.json names it. Give it by --base_model.")
    if not find_file(name, PIPELINE, source["revision"]):
        whose = "--base_model" if base_model else "its args.json: if it has moved, use --base_model"
        raise InputError(f"{found.name} needs its base model, and {name} has no {PIPELINE} (from {whose}).")
    return source


def load_parts(found: Result, source: dict, places: dict[str, dict], dtype: torch.dtype) -> dict[str, Any]:
    """Load what the pipeline shall not take from its own source, and leave out the safety checker."""
    parts = {}
    for name, place in places.items():
        # Only a model_index.json names the class of a text encoder; a checkpoint has none.
        owner = place if "revision" in place else source
        index = model_files.read_config(owner["pretrained_model_name_or_path"], PIPELINE, owner["revision"])
        kind = model_files.component_class(index, name)
        parts[name] = kind.from_pretrained(**place, subfolder=name, dtype=dtype).eval()
    index = model_files.read_config(source["pretrained_model_name_or_path"], PIPELINE, source["revision"])
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if tokenizer := found.settings.get("tokenizer_name"):
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(tokenizer)
    return parts


def load_adapter(pipeline: diffusers.DiffusionPipeline, found: Result, scale: float) -> None:
    """Load an adapter, and make sure that all of it arrived: diffusers only warns of layers that it does not find.

    Raises:
        InputError: The base model lacks layers of the adapter, or has others in their place.
    """
    path = find_file(found.name, ADAPTER)
    misfit = f"{path} does not fit the base model {pipeline.config._name_or_path}"
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="result")
    except (RuntimeError, ValueError, KeyError) as error:
        # The whole of it has a line for each layer.
        raise InputError(f"{misfit}: {textwrap.shorten(str(error), 300, placeholder=' …')}") from error
    in_file = count_layers(safetensors.torch.load_file(path))
    arrived = Counter()
    for name in ("unet", "text_encoder"):
        network = getattr(pipeline, name)
        if "result" in getattr(network, "peft_config", {}):
            state = peft.get_peft_model_state_dict(network, adapter_name="result", save_embedding_layers=False)
            arrived += count_layers(f"{name}.{key}" for key in state)
    if lost := sorted(in_file - arrived):
        raise InputError(f"{misfit}: it lacks {len(lost)} of {len(in_file)} layers, the first being {lost[0]}.")
    if scale != 1:
        pipeline.set_adapters("result", scale)


def count_layers(keys) -> Counter:
    """Count the tensors of each layer that has an adapter, under the layers' names in the present transformers."""
    layers = (key.partition(".lora")[0] for key in keys if not key.endswith(".alpha"))
    return Counter(layer.replace("text_encoder.text_model.", "text_encoder.") for layer in layers)


def set_scheduler(pipeline: diffusers.DiffusionPipeline, found: Result, name: str) -> None:
    """Give the pipeline a sampler with the settings that were saved with the result, if any, else the base model's."""
    path = find_file(found.name, "scheduler/scheduler_config.json") if found.kind == ADAPTER else None
    config = json.loads(path.read_text(encoding="utf-8")) if path else pipeline.scheduler.config
    kind = getattr(diffusers, name if name != SAVED else config["_class_name"], type(pipeline.scheduler))
    pipeline.scheduler = kind.from_config(config)


if __name__ == "__main__":
    sys.exit(main())
