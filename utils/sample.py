"""Draw pictures with what a training run wrote: a result, any checkpoint-N of it, or a base model to compare with.

    python -m utils.sample dreambooth-model/checkpoint-500 --prompt "a photo of sks dog in the snow" --seed 0 1 2

The picture of a prompt and a seed is the preview that training drew of them (preview i has the run's seed + i): in
float32, with --batch_size 1 and the preview's sampler, steps and guidance, to the bit. An adapter and a checkpoint
need the base model, which args.json names.

DeepFloyd IF draws in up to three stages, each a base model or a result, loaded and freed in turn:

    python -m utils.sample my-dog-if --prompt "a photo of sks dog" --stage_two DeepFloyd/IF-II-L-v1.0 \
      --stage_two_prompt "a photo of a dog" --upscaler stabilityai/stable-diffusion-x4-upscaler --dtype fp16

The last stage's pictures lie in the output folder, those of earlier ones in stage-1/ and stage-2/ below it. A stage II
or the upscaler as RESULT enlarges --images, for example those.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import torch
from PIL import Image

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.data import decode_images
from utils.data.geometry import Size
from utils.devices.accelerator_setup import silence_libraries
from utils.flags.flag_checks import find_out_of_range
from utils.sampling import cascade, image_grid, results
from utils.sampling.cascade import STAGE_ONE, STAGE_TWO, UPSCALER, Drawing, Stage
from utils.sampling.results import SAVED, SCHEDULERS, load_pipeline

__all__ = ["draw", "load_pipeline", "main"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Which flag names a stage's model, by the prefix of the stage's other flags.
MODEL_FLAGS = {"": "result", "stage_two_": "stage_two", "upscaler_": "upscaler"}
KINDS = {"stage_two_": STAGE_TWO, "upscaler_": UPSCALER}
NOISE_LEVELS = {STAGE_TWO: "stage_two_noise_level", UPSCALER: "upscaler_noise_level"}
RANGES = {
    **dict.fromkeys(("batch_size", "height", "width"), "1 or more"),
    **dict.fromkeys((f"{prefix}num_inference_steps" for prefix in MODEL_FLAGS), "1 or more"),
    **dict.fromkeys((f"{prefix}guidance_scale" for prefix in MODEL_FLAGS), "0 or more"),
    **dict.fromkeys(("lora_scale", "stage_two_lora_scale", *NOISE_LEVELS.values()), "0 or more"),
}
SHEET_PIXELS = 256  # smaller pictures are shown enlarged on the sheet


def main(argv: list[str] | None = None) -> int:
    """Draw every prompt from every seed, say where the pictures are, and return the exit status."""
    args = parse_args(argv)
    try:
        folders, count = draw_to_folder(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    *earlier, last = folders
    rest = f", and those of earlier stages to {' and '.join(map(str, earlier))}" if earlier else ""
    print(f"Wrote {count} pictures and grid.png to {last}{rest}")
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
    add("--negative_prompt", default="", help="what the pictures are steered away from, in every stage")
    add(
        "--images", nargs="+", type=Path, metavar="FILE", help="what RESULT enlarges: one for all prompts, or one each"
    )
    add("--base_model", help="model that RESULT was trained from, if args.json does not name it or it has moved")
    add("--revision", help="branch, tag or commit of the base model, or of RESULT if that is a whole pipeline")
    add("--variant", help="variant of the same model's weight files, for example fp16")
    add("--lora_scale", type=float, help="strength of an adapter; 0: none, default: 1, as trained")
    add("--scheduler", choices=(SAVED, *SCHEDULERS), help=f"sampler; default: {SCHEDULERS[0]}, for IF the saved one")
    add("--num_inference_steps", type=int, help="steps per picture; default: 25, IF: 100, stage II: 50, upscaler: 75")
    add("--guidance_scale", type=float, help="1: none; default: 7.5, IF: 7, stage II: 4, upscaler: 9")
    add("--height", type=int, help="pixels; default: the resolution of the training, else the model's own")
    add("--width", type=int, help="pixels; default: as for --height")
    add("--batch_size", type=int, default=1, help="pictures drawn at a time: faster, and not the same in every bit")
    add("--dtype", choices=DTYPES, default="fp32", help="precision; default: fp32")
    add("--device", help="for example cuda:1 or cpu; default: the best there is")
    add("--output", type=Path, metavar="DIR", help="where to write; default: samples/ and the name of RESULT")
    add_cascade_args(parser.add_argument_group("further stages of DeepFloyd IF"))
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), RANGES)
    problems += [f"--seed {seed} is negative." for seed in args.seed if seed < 0]
    if problems := problems + find_unused_flags(vars(args)):
        parser.error(" ".join(problems))
    return args


def add_cascade_args(group) -> None:
    """Add the flags of the stages after RESULT."""
    add = group.add_argument
    add("--stage_two", metavar="RESULT", help="IF's stage II for a stage I as RESULT: a base model or a result")
    add(
        "--stage_two_prompt",
        nargs="+",
        help="one for all or one each; leave out the subject's word if stage II was not trained; default: the prompt",
    )
    add("--stage_two_base_model", help="as --base_model")
    add("--stage_two_variant", help="as --variant")
    add("--stage_two_lora_scale", type=float, help="as --lora_scale")
    add("--stage_two_scheduler", choices=(SAVED, *SCHEDULERS), help="default: the saved one")
    add("--stage_two_num_inference_steps", type=int, help="default: 50")
    add("--stage_two_guidance_scale", type=float, help="default: 4")
    add(
        "--stage_two_noise_level",
        type=int,
        help="noise added to what stage II enlarges, here or as RESULT; default: 250 of 999",
    )
    add("--upscaler", metavar="MODEL", help="Stable Diffusion's x4 upscaler, for the pictures of the stage before it")
    add("--upscaler_prompt", nargs="+", help="default: that of the stage before")
    add("--upscaler_variant", help="as --variant")
    add("--upscaler_scheduler", choices=(SAVED, *SCHEDULERS), help="default: the saved one")
    add("--upscaler_num_inference_steps", type=int, help="default: 75")
    add("--upscaler_guidance_scale", type=float, help="default: 9")
    add(
        "--upscaler_noise_level",
        type=int,
        help="noise added to what it enlarges, here or as RESULT; default: 100 of 350",
    )


def find_unused_flags(values: dict) -> list[str]:
    """Return a sentence for each flag of a stage that the command does not have."""
    return [
        f"--{name} has no effect without --{model}."
        for prefix, model in MODEL_FLAGS.items()
        for name, value in values.items()
        if prefix and name.startswith(prefix) and name not in NOISE_LEVELS.values()
        if value is not None and values[model] is None
    ]


def draw_to_folder(args: argparse.Namespace) -> tuple[list[Path], int]:
    """Check everything, then draw and write a stage at a time; return the stages' folders and pictures per stage."""
    silence_libraries()
    dtype = DTYPES[args.dtype]
    device = results.choose_device(args.device, dtype)
    drawing = Drawing(args.seed, args.negative_prompt, args.batch_size, dtype, device)
    rows = max(len(args.prompt), len(args.images or []))
    chain = list_stages(args, rows)
    cascade.check_stages(chain)
    paths = spread(args.images, rows, "--images") if args.images else []
    pictures = [decode_images.open_rgb(path) for path in paths]
    sizes = cascade.plan_sizes(chain, args.width, args.height, pictures)
    output = args.output or Path("samples", results.default_name(args.result))
    folders = [*(output / f"stage-{stage.kind.number}" for stage in chain[:-1]), output]
    small = [make_small(*row) for row in zip(paths, pictures, sizes[0], strict=False)]
    diffusers.utils.logging.set_verbosity_warning()  # says which words of a prompt are too many
    embeds = cascade.embed_prompts(chain, drawing)
    drawn = [[picture] * len(args.seed) for picture in small] or None
    for stage, own_sizes, folder in zip(chain, sizes, folders, strict=True):
        drawn = write_rows(args, cascade.draw_rows(stage, own_sizes, drawing, embeds, drawn), folder)
    return folders, rows * len(args.seed)


def write_rows(args: argparse.Namespace, rows: Iterable[list[Image.Image]], folder: Path) -> list[list[Image.Image]]:
    """Write rows of pictures as they come, then all of them on one sheet, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    several = len(args.images or []) > 1
    texts = [path.stem for path in args.images] if several else args.prompt
    written = []
    for number, row in enumerate(rows):
        for seed, picture in zip(args.seed, row, strict=True):
            atomic_files.save_png(picture, folder / file_name(number, texts[number], seed))
        written.append(row)
    one = len(written) == 1
    grid = image_grid.make_grid(
        [enlarge_for_sheet(picture) for row in written for picture in row],
        columns=len(args.seed),
        labels=[f"seed {seed}" for seed in args.seed] * len(written),
        title=texts[0] if one else None,
        row_labels=None if one else texts,
    )
    atomic_files.save_png(grid, folder / "grid.png")
    return written


def enlarge_for_sheet(picture: Image.Image) -> Image.Image:
    """Enlarge a picture of few pixels by a whole number, so that it can be seen beside its labels."""
    times = max(1, SHEET_PIXELS // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def file_name(number: int, text: str, seed: int) -> str:
    """Return a picture's file name: the row's number keeps those apart whose letters and digits are the same."""
    words = re.sub("[^a-z0-9]+", "-", text.lower())[:60].strip("-")
    return "-".join(filter(None, (f"{number:02d}", words, f"seed{seed}"))) + ".png"


# ---------------------------------------------------------------------------------------------------- rows and stages


def list_stages(args: argparse.Namespace, rows: int) -> list[Stage]:
    """Recognise RESULT and the stages after it.

    Raises:
        UserError: They do not follow each other, or a flag is not for them.
    """
    chain = [make_stage(args, "", spread(args.prompt, rows, "--prompt"))]
    for prefix, flag in list(MODEL_FLAGS.items())[1:]:
        if vars(args)[flag] is not None:
            prompts = vars(args)[f"{prefix}prompt"]
            own = spread(prompts, rows, f"--{prefix}prompt") if prompts else chain[-1].prompts
            chain.append(make_stage(args, prefix, own))
    check_order(args, chain)
    return chain


def make_stage(args: argparse.Namespace, prefix: str, prompts: list[str]) -> Stage:
    """Gather the flags of a stage, which start with its prefix, and what is usual for its kind.

    Raises:
        UserError: It is of another kind than its flag is for.
    """
    own = {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}
    flag, wanted = MODEL_FLAGS[prefix], KINDS.get(prefix)
    where = {name: own.get(name) for name in ("base_model", "revision", "variant")}
    try:
        # Stage I has the text encoder for stage II.
        origin = results.locate(vars(args)[flag], **where, reads_text=wanted is not STAGE_TWO)
        results.check_strength(origin.result, 1.0 if own.get("lora_scale") is None else own["lora_scale"])
    except UserError as error:
        raise UserError(re.sub("--(base_model|lora_scale)", rf"--{prefix}\1", str(error))) from error
    kind = cascade.kind_of(origin)
    if wanted not in (None, kind):
        raise UserError(f"--{flag} {origin.result.name} is {kind.name}, not {wanted.name}.")
    given = {name: own.get(name) for name in ("num_inference_steps", "guidance_scale", "scheduler", "lora_scale")}
    given["noise_level"] = vars(args).get(NOISE_LEVELS.get(kind))
    chosen = {name: getattr(kind, name) if value is None else value for name, value in given.items()}
    return Stage(origin, kind, prompts, **chosen)


def check_order(args: argparse.Namespace, chain: Sequence[Stage]) -> None:
    """Raise UserError if RESULT is of the wrong kind for what comes before or after it, or a flag has no stage."""
    name, kind = chain[0].name, chain[0].kind
    if args.stage_two and kind is not STAGE_ONE:
        raise UserError(f"--stage_two enlarges what {STAGE_ONE.name} draws, and {name} is {kind.name}.")
    if args.upscaler and kind is UPSCALER:
        raise UserError(f"{name} is {kind.name} itself: leave out --upscaler.")
    if kind.noise_level is None and args.images:
        raise UserError(f"--images are for models that enlarge: {name} is {kind.name}, which draws from noise.")
    if kind.noise_level is not None and not args.images:
        hint = f", or draw by a stage I as RESULT with --stage_two {name}" if kind is STAGE_TWO else ""
        raise UserError(f"{name} is {kind.name}, which enlarges pictures: give them by --images{hint}.")
    for enlarger, flag in NOISE_LEVELS.items():
        if vars(args)[flag] is not None and enlarger not in [stage.kind for stage in chain]:
            raise UserError(f"--{flag} has no effect without {enlarger.name}.")


def spread(values: Sequence, rows: int, flag: str) -> list:
    """Return a value for each row of pictures: the values themselves, or the only one again and again."""
    if len(values) not in (1, rows):
        raise UserError(f"{flag} has {len(values)} values for {rows} rows of pictures: give one, or one for each row.")
    return list(values) * (rows // len(values))


def make_small(path: Path, picture: Image.Image, size: Size) -> Image.Image:
    """Make a picture a quarter of what it is enlarged to, and say so."""
    small = cascade.make_small(picture, size)
    if picture.size != small.size:
        cut = "" if picture.width * small.height == picture.height * small.width else "its middle "
        print(f"{path}, {picture.width} x {picture.height} pixels: {cut}resized to {small.width} x {small.height}")
    return small


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
    """Draw each prompt from each seed with a pipeline that draws from noise.

    Args:
        size: Height and width in pixels; None takes the model's own.
        batch_size: Pictures drawn at a time.

    Returns:
        One picture for each pair, those of the first prompt first.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    own = {"prompt": [prompt for prompt, _ in pairs], "negative_prompt": [negative_prompt] * len(pairs)}
    common = {"height": size[0], "width": size[1], "guidance_scale": guidance_scale}
    pair_seeds = [seed for _, seed in pairs]
    return cascade.draw_batches(
        pipeline, pair_seeds, batch_size, own, **common, num_inference_steps=num_inference_steps
    )


if __name__ == "__main__":
    sys.exit(main())
