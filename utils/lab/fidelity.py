"""Train the small models in models/ on subjects of the world of shapes, in several ways, and measure what was learned.

    python -m utils.lab.fidelity --output fidelity-output

Every run is one of the two scripts, started as a person would start it, on five photos of a subject. Then
`utils.evaluation.exam` asks its questions. A line of the table is the mean over all subjects and seeds, with its
standard error over them. What is measured is kept in the output folder, and a run is not repeated unless its flags,
its model, the exam or the code has changed since.

To add a line, add a recipe to `utils.lab.fidelity_recipes.RECIPES`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from utils.core import atomic_files, markdown
from utils.core.errors import UserError
from utils.devices import accelerator_setup, launch
from utils.evaluation import exam
from utils.evaluation.standard_errors import mean_of
from utils.flags.command_line import convert_flag
from utils.flags.flag_checks import find_out_of_range
from utils.lab.fidelity_recipes import (
    BASE_COLUMNS,
    CHOSEN,
    COLUMNS,
    IF2,
    IF2_BASE_COLUMNS,
    IF2_COLUMNS,
    PIXELS,
    QUICK,
    RECIPES,
    Column,
    Recipe,
)
from utils.run import scripts
from utils.run.scripts import ROOT, SCRIPTS
from utils.sampling import cascade, results
from utils.sampling.results import SAVED
from utils.synthetic import shapes
from utils.synthetic.shapes import SUBJECTS, WORD

# Of each run: one thread, offline.
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of one run, or of a base model."""

    recipe: str | None  # None: the base model
    model: str
    subject: str
    seed: int
    seconds: float  # of training, with the start of the process and its class images
    scores: dict[str, float]
    fingerprint: str = ""  # of all that it depends on


def main(argv: list[str] | None = None) -> int:
    """Run what was not run yet, print the tables and write them; return 1 if a run failed or is out of its range."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        check_models(args)
        records = run_all(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tables = "\n\n".join(make_tables(records))
    atomic_files.write_whole(args.output / "fidelity.md", tables + "\n")
    minutes = (time.monotonic() - began) / 60
    print(f"\n{tables}\n\n{len(records)} measurements in {minutes:.0f} minutes, kept in {args.output}")
    surprises = find_surprises(records) if args.quick else []
    for surprise in surprises:
        print(f"error: {surprise}", file=sys.stderr)
    return int(bool(surprises))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.fidelity", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("fidelity-output"), metavar="DIR", help="default: fidelity-output")
    add("--models", type=Path, default=ROOT / "models", metavar="DIR", help="what utils.lab.train_models wrote")
    add(
        "--script",
        type=to_script,
        metavar="PATH",
        help="a copy of a script, which runs the recipes of its method in its place",
    )
    add("--only", metavar="TEXT", default="", help="only the recipes with this in their name; default: all")
    add("--subjects", nargs="+", choices=list(SUBJECTS), default=CHOSEN, help=f"default: {', '.join(CHOSEN)}")
    add("--seeds", type=int, help="runs of each recipe and subject; default: 2, or 1 of what is only compared with")
    add("--exam_seeds", type=int, default=2, help="of each prompt; default: 2")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each; default: one a core")
    add("--quick", action="store_true", help="some recipes on one subject, and an error if a measure is out of range")
    args = parser.parse_args(argv)
    args.paths = {scripts.method_of(args.script): args.script} if args.script else SCRIPTS
    if problems := find_out_of_range(vars(args), dict.fromkeys(("seeds", "exam_seeds", "jobs"), "1 or more")):
        parser.error(" ".join(problems))
    if args.quick:
        args.subjects, args.seeds = CHOSEN[:1], 1
    if not chosen(args):
        names = "; ".join(QUICK if args.quick else RECIPES)
        parser.error(f"--only {args.only!r} is in no name. There are: {names}.")
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the names of the recipes that hold the text of --only, in any case, and that the scripts can run."""
    names = [name for name in (QUICK if args.quick else RECIPES) if args.only.lower() in name.lower()]
    return [name for name in names if RECIPES[name].method in args.paths]


def check_models(args: argparse.Namespace) -> None:
    """Raise UserError if a model of a chosen recipe is missing."""
    needed = dict.fromkeys(RECIPES[name].model for name in chosen(args))
    if missing := [model for model in needed if not (args.models / model / "model_index.json").is_file()]:
        raise UserError(
            f"{args.models} lacks {', '.join(missing)}. Train them (python -m utils.lab.train_models --only "
            f"{' '.join(missing)}), or choose other recipes by --only."
        )


def find_surprises(records: list[Record]) -> list[str]:
    """Return a sentence for each measure of a quick run that is not where it was on other machines."""
    bases = {(record.model, record.subject): record for record in records if record.recipe is None}
    surprises = []
    for record in records:
        for name, (low, high) in QUICK.get(record.recipe, {}).items():
            if not low <= (value := value_of(record, (COLUMNS | IF2_COLUMNS)[name], bases)) <= high:
                surprises.append(f"{record.recipe}: {name} is {value:.2f}, not from {low:g} to {high:g}.")
    return surprises


# ---------------------------------------------------------------------------------------------------------------- runs


def run_all(args: argparse.Namespace) -> list[Record]:
    """Run all recipes, those of one subject and model one after another, because they share class images.

    Networks this small are quickest on one thread, so several processes run at a time.

    Raises:
        UserError: A run failed.
    """
    models = dict.fromkeys(RECIPES[name].model for name in chosen(args))
    lanes = [(subject, model, args) for subject in args.subjects for model in models]
    if args.jobs == 1:
        return [record for lane in lanes for record in run_lane(*lane)]
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain.from_iterable(pool.map(run_lane, *zip(*lanes, strict=True))))


def run_lane(subject: str, model: str, args: argparse.Namespace) -> list[Record]:
    """Train a model on a subject by every recipe and from every seed; return what was measured, the base model first.

    Raises:
        UserError: A run failed.
    """
    accelerator_setup.silence_libraries()
    torch.set_num_threads(1)
    names = [name for name in chosen(args) if RECIPES[name].model == model]
    records = []
    runs = [(name, seed) for name in names for seed in range(args.seeds or RECIPES[name].seeds)]
    for name, seed in [(None, 0), *runs]:
        path = args.output / "measured" / f"{slug(subject)}-{slug(name or model)}-{seed}.json"
        fingerprint = take_fingerprint(RECIPES.get(name), args.models / model, args.exam_seeds, args.script)
        records.append(load_record(path, fingerprint) or measure(path, args, name, model, subject, seed, fingerprint))
    return records


def take_fingerprint(recipe: Recipe | None, model: Path, exam_seeds: int, script: Path | None = None) -> str:
    """Return a hash of what decides a measurement: the recipe, the model's files, the exam and all code."""
    code = [*([Path(script)] if script else []), *sorted(ROOT.glob("*.py")), *sorted((ROOT / "utils").rglob("*.py"))]
    state = hashlib.sha256(repr((recipe, exam_seeds)).encode())
    for path in [*code, *sorted(model.rglob("*"))]:
        state.update(path.read_bytes() if path.is_file() else b"")
    return state.hexdigest()[:16]


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "-".join(name.lower().replace(",", "").replace("+", "").split())


def load_record(path: Path, fingerprint: str) -> Record | None:
    """Read what was measured before; None if nothing was, or with something else."""
    record = Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return record if record and record.fingerprint == fingerprint else None


def measure(
    path: Path, args: argparse.Namespace, name: str | None, model: str, subject: str, seed: int, fingerprint: str
) -> Record:
    """Train, unless it is about the base model, ask the questions, and write what was found."""
    if name:
        result, seconds = train(args, name, subject, seed)
    else:
        result, seconds = args.models / model, 0.0
        shutil.rmtree(class_folder(args, subject, model), ignore_errors=True)  # drawn by this model as it was before
    scores = examine(result, subject, WORD if name else "", args.exam_seeds)
    record = Record(name, model, subject, seed, seconds, scores, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_whole(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    if name:
        shutil.rmtree(result)
    print(f"{seconds:5.0f} s  {name or model}, {subject}, seed {seed}", flush=True)
    return record


def train(args: argparse.Namespace, name: str, subject: str, seed: int) -> tuple[Path, float]:
    """Run a script; return its result and how many seconds it took.

    Raises:
        UserError: It failed.
    """
    recipe, shape = RECIPES[name], SUBJECTS[subject].shape
    photos = args.output / "photos" / slug(subject)
    result = args.output / "runs" / f"{slug(subject)}-{slug(name)}-{seed}"
    shapes.write_photos(photos, subject, WORD)
    if recipe.model == IF2:
        shapes.write_class_pictures(class_folder(args, subject, IF2), shape)
    shutil.rmtree(result, ignore_errors=True)
    words = [
        f"--pretrained_model_name_or_path={args.models / recipe.model}",
        f"--instance_data_dir={photos}",
        f"--class_data_dir={class_folder(args, subject, recipe.model)}",
        f"--output_dir={result}",
        f"--instance_prompt={shapes.phrase(shape, WORD)}",
        f"--class_prompt={shapes.phrase(shape)}",
        f"--resolution={PIXELS[recipe.model]}",
        *f"--seed={seed} --report_to=none --checkpointing_steps=100000 {recipe.flags}".split(),
    ]
    log, began = result.with_suffix(".log"), time.perf_counter()
    launch.run_script(f"{name} on the {subject}", args.paths[recipe.method], words, log, **VARIABLES)
    return result, time.perf_counter() - began


def class_folder(args: argparse.Namespace, subject: str, model: str) -> Path:
    """Return the folder of the class images that the runs of a subject and a model share."""
    return args.output / "class-images" / f"{slug(subject)}-{model}"


def examine(result: Path, subject: str, word: str, seeds: int) -> dict[str, float]:
    """Return the scores of a result or a base model."""
    origin = results.locate(str(result))
    pipeline = results.load(origin, SAVED, 1.0, torch.float32, torch.device("cpu"))
    if cascade.kind_of(origin) is cascade.STAGE_TWO:
        size = pipeline.unet.config.sample_size
        scores = exam.score_enlarged(exam.enlarge(pipeline, subject, word, range(seeds), size))
    else:
        scores = exam.score(exam.answer(pipeline, exam.ask(subject, word, range(seeds)), subject))
    return {name: found.value for name, found in scores.items()}


# -------------------------------------------------------------------------------------------------------------- tables


def make_tables(records: list[Record]) -> list[str]:
    """Return tables of base models and recipes: of those that draw from words, and of those that enlarge."""
    bases = {(record.model, record.subject): record for record in records if record.recipe is None}
    tables = []
    for enlarges, of_bases, of_recipes in ((False, BASE_COLUMNS, COLUMNS), (True, IF2_BASE_COLUMNS, IF2_COLUMNS)):
        chosen = [record for record in records if (record.model == IF2) == enlarges]
        for head, columns, is_base in (("base model", of_bases, True), ("recipe", of_recipes, False)):
            groups = {}
            for record in chosen:
                if (record.recipe is None) == is_base:
                    groups.setdefault(record.recipe or record.model, []).append(record)
            tables.append(tabulate(head, columns, groups, bases))
    return [table for table in tables if table]


def tabulate(head: str, columns: dict[str, Column], rows: dict[str, list[Record]], bases: dict) -> str:
    """Return a Markdown table, a row for each group of records and a column for each measure; empty without rows."""
    cells = [(name, *(tell(group, column, bases) for column in columns.values())) for name, group in rows.items()]
    return markdown.make_table((head, *columns), cells) if cells else ""


def tell(group: list[Record], column: Column, bases: dict) -> str:
    """Return a cell: the mean over subjects and seeds and its standard error."""
    found = mean_of([value_of(record, column, bases) for record in group])
    digits = column.digits
    error = "" if found.error is None else f" ± {100 * found.error if column.percent else found.error:.{digits}f}"
    return f"{100 * found.value if column.percent else found.value:.{digits}f}{error}{' %' * column.percent}"


def value_of(record: Record, column: Column, bases: dict[tuple[str, str], Record]) -> float:
    """Return a measure of one run, compared with its base model if the column says so."""
    if column.measure == "seconds":
        return record.seconds
    value = record.scores[column.measure]
    before = bases[record.model, record.subject].scores[column.measure] if column.against else 0.0
    return {"": value, "ratio": value / before if before else math.nan, "gain": value - before}[column.against]


if __name__ == "__main__":
    sys.exit(main())
