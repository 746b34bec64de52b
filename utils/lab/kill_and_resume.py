"""Kill runs of both scripts at any moment, resume them, and compare the end with that of a run that was left alone.

    python -m utils.lab.kill_and_resume --kills 100

Each run trains a tiny model and saves a checkpoint every other step, keeping one. It is killed by SIGKILL, with all
that it has started, resumed by `--resume_from_checkpoint latest`, and killed again, until it ends. Then its result,
its last checkpoint and its metrics must be those of the run that was left alone, to the bit. After each kill, every
line of its metrics must be whole.

Random moments would hardly hit a save, which is short: most kills wait for the hidden folder of one and strike within.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from utils.core.errors import UserError
from utils.devices import accelerator_setup
from utils.flags.command_line import convert_flag
from utils.flags.flag_checks import find_out_of_range
from utils.run import scripts
from utils.run.scripts import SCRIPTS
from utils.synthetic import shapes
from utils.synthetic.random_models import make_model

FLAGS = (
    "--resolution=32 --train_batch_size=1 --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=2 --seed=0 "
    "--checkpointing_steps=2 --checkpoints_total_limit=1 --report_to=none --resume_from_checkpoint=latest"
)
TIMINGS = ("seconds", "samples_per_second", "memory_gb")
PATIENCE = 300  # seconds without an end, after which a run hangs
AIMS = {  # what a kill waits for, by the names in the output folder; and how often it is chosen
    "any time": (None, 3),
    "a save": (".saving-[0-9]*", 4),
    "the removal of an old checkpoint": (".removing-*", 2),
    "the saving of the result": (".saving-result-*", 1),
}


@dataclasses.dataclass
class Tally:
    """What happened to the runs of one script."""

    rounds: int = 0  # runs that were brought to their end
    kills: Counter = dataclasses.field(default_factory=Counter)  # by what was found half done
    differences: list[str] = dataclasses.field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Torture the scripts and say how it went; return 1 if a run failed or ended in other bits."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    failed = False
    try:
        prepare(args.output)
        for script in args.scripts:
            label = scripts.label_of(script).lower()
            tally = torture(args, script, random.Random(f"{label} {args.seed}"))
            print(tell(label, tally), flush=True)
            failed |= bool(tally.differences)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(failed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.kill_and_resume", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("torture-output"), metavar="DIR", help="where to; default: torture-output")
    both = [*SCRIPTS.values()]
    add(
        "--scripts",
        nargs="+",
        type=to_script,
        default=both,
        metavar="SCRIPT",
        help="full, lora or paths; default: both",
    )
    add("--kills", type=int, default=20, help="of each script; default: 20")
    add("--steps", type=int, default=24, help="of a run, an even number; default: 24")
    add("--seed", type=int, default=0, help="of the moments; default: 0")
    args = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        parser.error("this system has no fork, by which the runs are started.")
    if problems := find_out_of_range(vars(args), dict.fromkeys(("kills", "steps"), "1 or more")):
        parser.error(" ".join(problems))
    if args.steps % 2:
        parser.error(f"--steps {args.steps} is odd: a checkpoint is saved every other step, and must be at the last.")
    return args


def prepare(output: Path) -> None:
    """Write the model and the photos, and import what the runs need, so that each of them starts quickly.

    Raises:
        UserError: The folder holds something already.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty. Remove it, or use another folder.")
    accelerator_setup.import_what_is_imported_late()
    make_model(output / "model", "tiny")
    shapes.write_photos(output / "photos", shapes.SUBJECT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def torture(args: argparse.Namespace, script: Path, chance: random.Random) -> Tally:
    """Kill runs of a script as often as asked for, and compare each that comes to its end.

    Raises:
        UserError: A run ended by itself, but not well.
    """
    label = scripts.label_of(script).lower()
    calm, tally = args.output / f"{label}-calm", Tally()
    began = time.monotonic()
    finish(start(args, script, calm), calm)
    seconds = time.monotonic() - began
    while tally.kills.total() < args.kills:
        out = args.output / f"{label}-{tally.rounds}"
        while tally.kills.total() < args.kills and strike(start(args, script, out), out, chance, seconds):
            tally.kills[find_half_done(out)] += 1
            tally.differences += [f"{out}: a kill left {line!r} in its metrics" for line in find_torn_lines(out)]
            print(f"\r{label}: {tally.kills.total()} of {args.kills} kills", end="", file=sys.stderr, flush=True)
        finish(start(args, script, out), out)
        tally.rounds += 1
        found = compare(calm, out)
        tally.differences += [f"{out}: {difference}" for difference in found]
        if not found:
            shutil.rmtree(out)
    print(file=sys.stderr)
    return tally


def start(args: argparse.Namespace, script: Path, out: Path) -> int:
    """Start a run in a process group of its own; return its number, which is the process's as well."""
    words = [
        f"--pretrained_model_name_or_path={args.output / 'model'}",
        f"--instance_data_dir={args.output / 'photos'}",
        f"--output_dir={out}",
        "--instance_prompt=a sks circle",
        *f"{FLAGS} --max_train_steps={args.steps}".split(),
    ]
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(run(script, words, out.with_suffix(".log")))
    os.setpgid(child, child)  # by both, because either may come first, and a kill before both would find no group
    return child


def run(script: Path, words: list[str], log: Path) -> int:
    """Run a script in this process, as the interpreter would; return the exit status."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = [str(script), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def strike(child: int, out: Path, chance: random.Random, seconds: float) -> bool:
    """Kill a run and all it has started at a moment that chance chooses; return False if it had ended before.

    Args:
        seconds: How long a run takes that is left alone.

    Raises:
        UserError: It had ended, but not well.
    """
    pattern, _ = chance.choices(list(AIMS.values()), weights=[weight for _, weight in AIMS.values()])[0]
    if pattern is None:
        moment = time.monotonic() + chance.uniform(0, seconds)
    else:
        wait_for_sight(child, out, pattern, 1 if "result" in pattern else chance.randint(1, 4))
        moment = time.monotonic() + chance.uniform(0, 0.04)
    while not has_ended(child) and time.monotonic() < moment:
        time.sleep(0.0005)
    os.killpg(child, signal.SIGKILL)  # a number is kept until it is waited for, so this is no other's
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise UserError(f"A run ended with exit status {status}: see {out.with_suffix('.log')}.")
    return status != 0


def wait_for_sight(child: int, out: Path, pattern: str, count: int) -> None:
    """Wait until so many different entries of this pattern were seen in the output folder, or the run has ended."""
    seen, end = set(), time.monotonic() + PATIENCE
    while len(seen) < count and not has_ended(child) and time.monotonic() < end:
        seen |= {path.name for path in out.glob(pattern)}
        time.sleep(0.0005)


def has_ended(child: int) -> bool:
    """Say whether a run has ended, without waiting for it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(child: int, out: Path) -> None:
    """Let a run come to its end.

    Raises:
        UserError: It does not, or not well.
    """
    end = time.monotonic() + PATIENCE
    while not has_ended(child) and time.monotonic() < end:
        time.sleep(0.01)
    if not has_ended(child):
        os.killpg(child, signal.SIGKILL)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise UserError(f"A run that was left alone ended with exit status {status}: see {out.with_suffix('.log')}.")


def find_half_done(out: Path) -> str:
    """Say what a kill interrupted, by what it left behind."""
    for name, (pattern, _) in reversed(AIMS.items()):
        if pattern and any(out.glob(pattern)):
            return name
    return "a step" if (out / "metrics.jsonl").exists() else "the start"


def find_torn_lines(out: Path) -> list[str]:
    """Return the lines of a run's metrics that are no JSON."""
    path, torn = out / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            json.loads(line)
        except ValueError:
            torn.append(line)
    return torn


def compare(calm: Path, out: Path) -> list[str]:
    """Return in what a run's end differs from that of the one that was left alone."""
    one, other = (read_end(folder) for folder in (calm, out))
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def read_end(folder: Path) -> dict[str, object]:
    """Return all that a run has left and that has to be the same again, by its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".jsonl", ".md"))]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    # What a resumed run was asked for is the same, but not where it writes.
    found["args.json"] = json.loads(found["args.json"]) | {"output_dir": ""}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]
    return found | {"metrics.jsonl": steps}


def tell(label: str, tally: Tally) -> str:
    """Say how it went."""
    kills = ", ".join(f"{count} in {name}" for name, count in tally.kills.most_common())
    end = "each ended in the bits of the run that was left alone" if not tally.differences else "BUT THESE DIFFER:"
    head = f"{label}: {tally.kills.total()} kills ({kills}); {tally.rounds} runs brought to their end; {end}."
    return "\n  ".join([head, *tally.differences])


if __name__ == "__main__":
    sys.exit(main())
