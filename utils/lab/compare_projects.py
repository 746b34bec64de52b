"""Compare the speed and memory of our scripts with those of another project, such as the examples of diffusers.

`python -m utils.lab.benchmark --against DIR` calls this. Both sides do the same work in turn, and both are measured
from outside in the same way.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from utils.core import markdown
from utils.core.errors import UserError
from utils.lab.measured_runs import WARM_UP, Run, find_unknown, number, paths_of, read_lines
from utils.run import scripts
from utils.run.scripts import FULL, LORA, SCRIPTS

COMPARED = {  # work that is done by another project's scripts as well
    "full, batch 1": (FULL, "--train_batch_size=1"),
    "full, batch 4": (FULL, "--train_batch_size=4"),
    "LoRA, batch 1": (LORA, "--train_batch_size=1"),
}
THEIRS, OURS, OURS_AGAIN, OURS_BEST = "theirs", "ours", "ours, once more", "ours, best flags"
# Both sides cut the middle out of each photo, and save nothing on the way; all else is each side's default.
COMPARED_FLAGS = "--center_crop --seed=0 --checkpointing_steps=1000000 --mixed_precision=no"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and how."""

    ours: dict[str, Path]  # scripts, by the keys of `SCRIPTS`
    theirs: Path  # the folder of their scripts
    size: int  # of the pictures, in pixels
    steps: int  # of each run
    repeats: int  # runs of each side
    best: str  # flags of a third side, "" for none


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Medians of one side's runs of the same work; None where one failed."""

    work: str
    side: str
    seconds: float | None = None  # median step
    samples_per_second: float | None = None
    start_seconds: float | None = None  # from the start of the process to the end of the first step
    memory_gb: float | None = None
    runs: tuple[dict, ...] = ()  # each run's own numbers
    problem: str | None = None

    @property
    def label(self) -> str:
        """What the plot calls it."""
        return f"{self.work}: {self.side}"

    @property
    def parts(self) -> None:
        """What the steps of another project consist of is not known."""


def compare(works: Iterable[str], settings: Settings, folders: dict[str, Path]) -> tuple[list[Comparison], str, dict]:
    """Measure another project's scripts and ours; return medians, their table, and what else the report holds.

    Args:
        works: Keys of `COMPARED`.
    """
    measured = [one for work in works for one in compare_work(work, settings, folders)]
    threads = next((run["threads"] for one in measured for run in one.runs), None)
    note = (
        f"Medians of {settings.repeats} runs of each side in turn. Right of each number: by how much it is that of "
        f"theirs. {OURS_AGAIN.capitalize()}: with the embeddings and latents that the run before has cached."
    )
    told = {"threads": threads, "against": str(settings.theirs), "repeats": settings.repeats}
    return measured, f"{make_comparison(measured)}\n\n{note}", told


def compare_work(work: str, settings: Settings, folders: dict[str, Path]) -> list[Comparison]:
    """Let all sides do the same work in turn, so that what changes on the machine meanwhile changes all of them."""
    script, flags = COMPARED[work]
    ours, theirs = settings.ours[script], settings.theirs / SCRIPTS[script].name
    needed = [flags, f"--resolution={settings.size}", f"--max_train_steps={settings.steps}"]
    shared = [flag for flag in COMPARED_FLAGS.split() if all(scripts.has_flag(one, flag) for one in (ours, theirs))]
    common = [*needed, *shared]
    sides = {THEIRS: (theirs, common), OURS: (ours, common), OURS_AGAIN: (ours, common)}
    if settings.best:
        sides[OURS_BEST] = (ours, [*common, *settings.best.split()])
    runs, problems = {side: [] for side in sides}, {side: find_unknown(*one) for side, one in sides.items()}
    for turn, side in itertools.product(range(settings.repeats), sides):
        if problems[side]:
            continue
        print(f"{work}, {side}, run {turn + 1} …", file=sys.stderr, flush=True)
        run = Run(folders, f"{work} {OURS if side == OURS_AGAIN else side}", has_caches=side == OURS_AGAIN)
        try:
            runs[side].append(time_from_outside(run, *sides[side], folders, settings.steps, keep_caches=side == OURS))
        except UserError as error:
            problems[side] = str(error)
    batch = int(flags.partition("=")[2])
    return [summarise(Comparison(work, side), batch, runs[side], problems[side]) for side in sides]


def time_from_outside(
    run: Run, script: Path, own: list[str], folders: dict[str, Path], steps: int, keep_caches: bool = False
) -> dict:
    """Run a script of either side; return its numbers.

    Raises:
        UserError: It failed, or took other steps than it was told.
    """
    caches = [f"--cache_dir={run.caches / 'tensors'}"] if scripts.has_flag(script, "--cache_dir") else []
    try:
        began = time.time()
        run.finish(run.start(script, [*paths_of(folders, run), *caches, *own], "stamps"))
        first, *stamps = read_lines(run.found)
    finally:
        run.clean(keep_caches)
    # An optimizer that is called for each weight, as in a fused backward pass, leaves so many stamps in each step.
    calls, rest = divmod(len(stamps), steps)
    if calls == 0 or rest:
        raise UserError(f"{script.name} took {len(stamps)} steps instead of {steps}")
    stamps = stamps[calls - 1 :: calls]
    times = [one["at"] for one in stamps]
    return {
        "seconds": statistics.median(after - before for before, after in itertools.pairwise(times[WARM_UP - 1 :])),
        "start_seconds": times[0] - began,
        "memory_gb": stamps[-1]["memory_gb"],
        "threads": first["threads"],
    }


def summarise(comparison: Comparison, batch: int, runs: list[dict], problem: str | None) -> Comparison:
    """Return the medians of a side's runs."""
    if problem:
        return dataclasses.replace(comparison, runs=tuple(runs), problem=problem)
    names = ("seconds", "start_seconds", "memory_gb")
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    speed = batch / medians["seconds"]
    return dataclasses.replace(comparison, **medians, samples_per_second=speed, runs=tuple(runs))


def make_comparison(measured: list[Comparison]) -> str:
    """Return the medians as a Markdown table, each beside its ratio to the other project's."""
    heads = ("work", "scripts", "samples/s", "×", "s to end of first step", "×", "memory GB", "×")
    theirs = {one.work: one for one in measured if one.side == THEIRS}
    return markdown.make_table(heads, [comparison_cells(one, theirs[one.work]) for one in measured], texts=2)


def comparison_cells(one: Comparison, base: Comparison) -> tuple[str, ...]:
    """Return a line of the table."""
    if one.problem:
        return (one.work, one.side, f"failed: {one.problem}")
    found = []
    for name, digits in (("samples_per_second", ".3f"), ("start_seconds", ".1f"), ("memory_gb", ".2f")):
        value, reference = getattr(one, name), getattr(base, name)
        found += [format(value, digits), number(reference and value / reference, ".2f")]
    return (one.work, one.side, *found)
