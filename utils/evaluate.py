"""Measure what a training run taught: is the subject there, are prompts obeyed, what has become of the class.

In the world of shapes (`utils.synthetic.shapes`), where the truth is known and no network judges:

    python -m utils.evaluate dreambooth-model --subject "quartered circle" --word sks

For photos and models of real size, with the measures of the DreamBooth paper (arXiv 2208.12242, section 4.1):

    python -m utils.evaluate my-dog-lora --photos photos --word sks --class_word dog --prompts prompts.txt \
      --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16

Both compare the result with its base model, and write a table, evaluation.json and grid.png.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from utils.core import atomic_files, markdown
from utils.core.errors import UserError
from utils.data import decode_images, list_images
from utils.devices import accelerator_setup
from utils.evaluation import encoders, exam, prompt_files, similarity
from utils.evaluation.exam import Answer, Enlarged
from utils.evaluation.standard_errors import Estimate
from utils.flags.flag_checks import find_out_of_range
from utils.sampling import cascade, image_grid, results
from utils.sampling.cascade import STAGE_TWO, UPSCALER
from utils.sampling.results import SAVED, Origin
from utils.synthetic.shapes import RARE_WORDS, SUBJECTS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BASE, RESULT = "base", "result"
PUBLISHED = "published for Stable Diffusion: DINO 0.668, CLIP-I 0.803, CLIP-T 0.305 (arXiv 2208.12242, table 1)"
GRID_SEEDS = 4  # pictures of a prompt on the sheet
CLASS_PICTURES = 6  # a seed
CELL = 96  # pixels of a picture on the sheet

Scores = dict[str, dict[str, Estimate]]  # of each measure: of the base model and of the result


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the table, write it, and return the exit status."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    try:
        scores, grid = evaluate_shapes(args) if args.subject else evaluate_photos(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    output = args.output or Path("evaluations", results.default_name(args.result))
    output.mkdir(parents=True, exist_ok=True)
    report = {name: value for name, value in vars(args).items() if name != "output"}
    report["measures"] = {
        name: {of: dataclasses.asdict(value) for of, value in row.items()} for name, row in scores.items()
    }
    atomic_files.write_whole(output / "evaluation.json", json.dumps(report, indent=2, default=str) + "\n")
    atomic_files.save_png(grid, output / "grid.png")
    print(make_table(scores))
    if not args.subject:
        print(f"\n{PUBLISHED[0].upper()}{PUBLISHED[1:]}.")
    print(f"\nWrote evaluation.json and grid.png to {output}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluate", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("result", metavar="RESULT", help="a result or checkpoint-N folder, or a Hub id")
    add("--base_model", help="model to compare with, that RESULT was trained from; default: what args.json names")
    add("--word", default="sks", help="the rare word that stands for the subject; default: sks")
    add("--seeds", type=int, default=8, help="of each prompt, over which standard errors are taken; default: 8")
    add(
        "--batch_size", type=int, default=exam.BATCH_SIZE, help=f"pictures drawn at a time; default: {exam.BATCH_SIZE}"
    )
    add("--dtype", choices=DTYPES, default="fp32", help="precision; default: fp32")
    add("--device", help="for example cuda:1 or cpu; default: the best there is")
    add("--output", type=Path, metavar="DIR", help="where to write; default: evaluations/ and the name of RESULT")
    shapes = parser.add_argument_group("in the world of shapes")
    shapes.add_argument("--subject", choices=list(SUBJECTS), help="what the photos showed")
    photos = parser.add_argument_group("for photos")
    add = photos.add_argument
    add("--photos", type=Path, metavar="DIR", help="the subject's photos")
    add("--class_word", help="what the subject is: dog")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line with {} for the subject, or the paper's prompts_and_classes.txt",
    )
    add("--prompt_group", help="which of its lists, if it has several: 'object' or 'live subject'")
    add("--clip", metavar="MODEL", help="folder or Hub id of a CLIP, for CLIP-I and CLIP-T")
    add("--dino", metavar="MODEL", help="folder or Hub id of a DINO ViT")
    args = parser.parse_args(argv)
    if problems := find_problems(args):
        parser.error(" ".join(problems))
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    """Return a sentence for each mistake in the flags."""
    problems = find_out_of_range(vars(args), dict.fromkeys(("seeds", "batch_size"), "1 or more"))
    real = {name: getattr(args, name) for name in ("photos", "class_word", "prompts", "clip", "dino")}
    if args.subject:
        problems += [f"--{name} has no effect with --subject." for name, value in real.items() if value]
        if args.word not in RARE_WORDS:
            problems.append(f"--word {args.word} is unknown to the small models; they know {' '.join(RARE_WORDS)}.")
    elif missing := [f"--{name}" for name, value in real.items() if not value]:
        problems.append(f"Give --subject, or for photos also {' '.join(missing)}.")
    return problems


# -------------------------------------------------------------------------------------------------------------- shapes


def evaluate_shapes(args: argparse.Namespace) -> tuple[Scores, Image.Image]:
    """Ask result and base model the same questions; return the scores and a sheet of pictures."""
    origins = find_origins(args)
    kind = cascade.kind_of(origins[RESULT])
    if kind is UPSCALER:
        raise UserError(f"{args.result} is an upscaler, which the scripts do not train.")
    words = {BASE: "", RESULT: args.word}
    if kind is STAGE_TWO:
        drawn = {of: enlarge(origin, words[of], args) for of, origin in origins.items()}
        return join({of: exam.score_enlarged(rows) for of, rows in drawn.items()}), show_enlarged(drawn)
    answers = {}
    for of, origin in origins.items():
        questions = exam.ask(args.subject, words[of], range(args.seeds))
        answers[of] = exam.answer(load(origin, args), questions, args.subject, args.batch_size)
    return join({of: exam.score(rows) for of, rows in answers.items()}), show_answers(answers)


def find_origins(args: argparse.Namespace) -> dict[str, Origin]:
    """Find the base model and the result.

    Raises:
        UserError: One of them is missing.
    """
    found = results.recognise(args.result)
    is_whole = found.kind == results.PIPELINE
    base = args.base_model or found.settings.get("pretrained_model_name_or_path")
    if not base:
        raise UserError(f"No args.json says what {args.result} was trained from. Name it by --base_model.")
    of_base = {} if args.base_model else {name: found.settings.get(name) for name in ("revision", "variant")}
    return {
        BASE: results.locate(base, **of_base),
        RESULT: results.locate(args.result, None if is_whole else args.base_model),
    }


def load(origin: Origin, args: argparse.Namespace):
    """Load a pipeline with the sampler that was saved."""
    dtype = DTYPES[args.dtype]
    return results.load(origin, SAVED, 1.0, dtype, results.choose_device(args.device, dtype))


def enlarge(origin: Origin, word: str, args: argparse.Namespace) -> list[Enlarged]:
    """Enlarge held-out pictures by a stage II."""
    size = results.read_part_config(origin, "unet")["sample_size"]
    return exam.enlarge(load(origin, args), args.subject, word, range(args.seeds), size)


def join(scores: dict[str, dict[str, Estimate]]) -> Scores:
    """Turn the scores of models into those of measures."""
    return {name: {of: row[name] for of, row in scores.items()} for name in scores[RESULT]}


def show_answers(answers: dict[str, list[Answer]]) -> Image.Image:
    """Put pictures of some prompts on a sheet, the base model's at the left, the result's at the right."""
    seeds = sorted({answer.seed for answer in answers[RESULT]})[:GRID_SEEDS]
    by_seed = {of: [[one for one in rows if one.seed == seed] for seed in seeds] for of, rows in answers.items()}
    topics = [answer.question.topic for answer in by_seed[RESULT][0]]
    numbers = [number for number, topic in enumerate(topics) if topics.index(topic) > number - 2]
    cells, labels = [], []
    for number in numbers:
        for column in (*by_seed[BASE], *by_seed[RESULT]):
            answer = column[number]
            cells.append(answer.picture)
            told = [f"{answer.match:.2f}"] if answer.question.topic in exam.SUBJECT_TOPICS else []
            labels.append(", ".join(told if answer.is_right else [*told, "wrong"]))
    prompts = [list(dict.fromkeys(rows[number].question.prompt for rows in by_seed[RESULT])) for number in numbers]
    rows = [
        first if not others else f"{topics[number]}, a prompt a seed"
        for number, (first, *others) in zip(numbers, prompts, strict=True)
    ]
    title = "Left: the base model, without the word. Right: the result. Numbers: the match with the subject."
    return make_sheet(cells, 2 * len(seeds), labels, rows, title)


def show_enlarged(drawn: dict[str, list[Enlarged]]) -> Image.Image:
    """Put what was enlarged, the truth, and what both models made of it on a sheet."""
    first = [number for number, row in enumerate(drawn[RESULT]) if row.seed == drawn[RESULT][0].seed]
    cells, labels = [], []
    for number in first:
        base, result = drawn[BASE][number], drawn[RESULT][number]
        for label, picture in {
            "input": base.small,
            "truth": base.truth,
            "bilinear": base.bilinear,
            BASE: base.picture,
            RESULT: result.picture,
        }.items():
            cells.append(picture)
            told = "" if label in ("input", "truth") else f" {exam.psnr(picture, base.truth):.1f} dB"
            labels.append(label + told)
    return make_sheet(cells, 5, labels, [drawn[RESULT][number].topic for number in first], None)


def make_sheet(
    cells: Sequence[Image.Image], columns: int, labels: list[str], rows: list[str] | None, title: str | None
) -> Image.Image:
    """Put small pictures on a sheet, enlarged so that their pixels are seen."""
    enlarged = [
        cell if min(cell.size) >= CELL else cell.resize((CELL, CELL), Image.Resampling.NEAREST) for cell in cells
    ]
    return image_grid.make_grid(enlarged, columns, labels, title, rows)


# -------------------------------------------------------------------------------------------------------------- photos


def evaluate_photos(args: argparse.Namespace) -> tuple[Scores, Image.Image]:
    """Draw the protocol's prompts with result and base model, and measure how like the photos and prompts they are."""
    prompts = choose_prompts(args)
    paths = list_images.inspect_folder(args.photos, "--photos", False).sizes
    photos = [decode_images.open_rgb(path) for path in paths]
    device = results.choose_device(args.device, DTYPES[args.dtype])
    clip, dino = encoders.load_clip(args.clip, device), encoders.load_dino(args.dino, device)
    words = {BASE: args.class_word, RESULT: f"{args.word} {args.class_word}"}
    plain = [prompt.format(args.class_word) for prompt in prompts]
    scores, drawn = {}, {}
    for of, origin in find_origins(args).items():
        pipeline, kind = load(origin, args), cascade.kind_of(origin)
        if kind not in (cascade.STABLE_DIFFUSION, cascade.STAGE_ONE):
            raise UserError(
                f"{origin.result.name} enlarges pictures; with photos, what draws from words is evaluated."
            )
        asked = [prompt.format(words[of]) for prompt in prompts]
        rows = [draw(pipeline, kind, [text] * args.seeds, range(args.seeds), args) for text in asked]
        count = max(2, CLASS_PICTURES * args.seeds)
        of_class = draw(pipeline, kind, [f"a {args.class_word}"] * count, range(count), args)
        scores[of] = similarity.measure(clip, dino, photos, list(zip(plain, rows, strict=True)), of_class)
        drawn[of] = rows
    return join(scores), show_photos(photos, drawn, prompts)


def choose_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the chosen list of the file.

    Raises:
        UserError: There are several lists, and none or an unknown one was chosen.
    """
    lists = prompt_files.read_prompts(args.prompts)
    if args.prompt_group is None and len(lists) == 1:
        return next(iter(lists.values()))
    if args.prompt_group not in lists:
        raise UserError(f"{args.prompts} has lists for {', '.join(lists)}: choose one by --prompt_group.")
    return lists[args.prompt_group]


def draw(pipeline, kind, prompts: list[str], seeds: Sequence[int], args: argparse.Namespace) -> list[Image.Image]:
    """Draw with the kind's usual settings, a seed for each prompt."""
    settings = {"num_inference_steps": kind.num_inference_steps, "guidance_scale": kind.guidance_scale}
    return cascade.draw_batches(pipeline, seeds, args.batch_size, {"prompt": prompts}, **settings)


def show_photos(
    photos: Sequence[Image.Image], drawn: dict[str, list[list[Image.Image]]], prompts: Sequence[str]
) -> Image.Image:
    """Put the photos, and each prompt's first picture by both models, on a sheet."""
    count = min(2, len(drawn[RESULT][0]))
    rows = [
        [picture for of in (BASE, RESULT) for picture in drawn[of][number][:count]] for number in range(len(prompts))
    ]
    cells = [picture for row in rows for picture in row] + list(photos[: 2 * count])
    labels = ([BASE] * count + [RESULT] * count) * len(prompts) + [""] * len(photos[: 2 * count])
    return make_sheet(cells, 2 * count, labels, [*prompts, "photos"], None)


# --------------------------------------------------------------------------------------------------------------- table


def make_table(scores: Scores) -> str:
    """Return the scores as a Markdown table with their standard errors."""
    rows = [(name, *(tell(row[of]) for of in (BASE, RESULT))) for name, row in scores.items()]
    return markdown.make_table(("measure", BASE, RESULT), rows)


def tell(estimate: Estimate) -> str:
    """Return a measure with its standard error."""
    return f"{estimate.value:.3f}" + ("" if estimate.error is None else f" ± {estimate.error:.3f}")


if __name__ == "__main__":
    sys.exit(main())
