"""List what the cache of embeddings and latents holds, check every file's checksum, and prune it.

    python -m utils.inspect_cache                                         # what there is, by kind and model
    python -m utils.inspect_cache --older_than 30 --kind latents          # what --prune would delete
    python -m utils.inspect_cache --older_than 30 --kind latents --prune
    python -m utils.inspect_cache --larger_than 20 --prune                # GB; the longest unused go first

Nothing is deleted without --prune, and never what has not a name of this cache: foreign files, links and folders stay.
A run may use the folder meanwhile: what it misses, it makes anew, and what it used or wrote since the look stays.
Photos of --dataset_name, in the subfolder datasets, are counted; who needs them no longer deletes them by hand.
"""

import argparse
import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.core.errors import UserError, exit_status
from utils.data.tensor_cache import ENTRY, KINDS, LEFTOVER, WRITING, DamagedEntry, default_folder, read_entry
from utils.flags.flag_checks import find_out_of_range

CONDITIONS = ("older_than", "kind", "model", "damaged", "all", "larger_than")
LEFT, DAMAGED, CLOSED = "left half written", "damaged", "unreadable"
SHAPES = 4  # of a group, that are listed
DAY = 24 * 60 * 60  # seconds


@dataclass(frozen=True)
class CacheFile:
    """A file of the cache: an entry or, if it has a problem, one that no run can use."""

    path: Path
    state: os.stat_result
    kind: str = ""
    model: str = ""
    words: str = ""  # label, shape and dtype; of a problem, the reason
    shape: str = ""
    dtype: str = ""
    problem: str = ""  # LEFT, DAMAGED, CLOSED or none

    @property
    def group(self) -> str:
        """Return what it is listed under."""
        return self.problem or f"{self.kind} of {self.model}"

    @property
    def is_dead(self) -> bool:
        """Say whether no run can use it now or later."""
        return self.problem == DAMAGED or (self.problem == LEFT and self.state.st_mtime < time.time() - WRITING)


def main(argv: list[str] | None = None) -> int:
    """Show or prune the cache, and return the exit status."""
    args = parse_args(argv)
    if args.cache_dir and not args.cache_dir.is_dir():  # an empty list would hide the slip
        raise UserError(f"--cache_dir {args.cache_dir} is no folder. Give the one that the training command names.")
    folder = args.cache_dir or default_folder()
    narrows = bool(conditions(args))
    # Whoever prunes by time or size alone need not wait until every file is read.
    reads = not args.prune or args.list or not {"--kind", "--model", "--damaged"}.isdisjoint(conditions(args))
    found = find_files(folder, reads)
    chosen = choose(found, args) if narrows else found
    if args.list:
        print(*[describe(file) for file in sorted(chosen, key=lambda file: file.state.st_mtime)], sep="\n")
    if args.prune:
        return prune(chosen)
    print(summarise(folder, chosen))
    if not narrows and (note := describe_datasets(folder / "datasets")):
        print(note)
    if narrows:
        print(f"With --prune, {count(file for file in chosen if may_go(file))} would be deleted.")
    elif any(file.is_dead for file in found):
        print("--prune --damaged deletes what no run can use.")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.inspect_cache", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--cache_dir", type=Path, metavar="DIR", help="default: dreambooth in $XDG_CACHE_HOME or ~/.cache")
    add("--list", action="store_true", help="list each file, the longest unused first")
    add("--prune", action="store_true", help="delete the files to which all of the flags below apply; one is needed")
    add("--older_than", type=float, metavar="DAYS", help="files unused for so long")
    add("--kind", choices=list(KINDS), help="entries of this kind")
    add("--model", metavar="NAME", help="entries of this model: its name as it is listed, or its folder")
    add("--damaged", action="store_true", help="files that no run can use: damaged, of another version, half written")
    add("--all", action="store_true", help="all files")
    add("--larger_than", type=float, metavar="GB", help="the longest unused, until all files are no larger in total")
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), {"older_than": "0 or more", "larger_than": "0 or more"})
    given = conditions(args)
    if args.prune and not given:
        problems.append("--prune does not say what to delete: add --all, or one of the flags that choose.")
    if args.all and len(given) > 1:
        others = " ".join(name for name in given if name != "--all")
        problems.append(f"--all leaves {others} without effect: drop one.")
    if args.damaged and not {"--kind", "--model"}.isdisjoint(given):
        problems.append("--damaged goes with neither --kind nor --model: a damaged file does not tell them.")
    if problems:
        parser.error(" ".join(problems))
    return args


def conditions(args: argparse.Namespace) -> list[str]:
    """Return the given flags that choose files."""
    values = {name: vars(args)[name] for name in CONDITIONS}  # a number may be 0
    return [f"--{name}" for name, value in values.items() if value is not None and value is not False]


def find_files(folder: Path, reads: bool) -> list[CacheFile]:
    """Return the files in a folder that have a name of this cache, without links and folders.

    Args:
        reads: Whether to read them, check them and tell whose they are.
    """
    found = []
    for name in filter(is_ours, list_names(folder)):
        with contextlib.suppress(FileNotFoundError):  # a run or another prune was faster
            state = (folder / name).lstat()
            if stat.S_ISREG(state.st_mode):
                found.append(look_at(folder / name, state, reads))
    return found


def list_names(folder: Path) -> list[str]:
    """Return the names in a folder, none if there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The cache {folder} cannot be listed: {error.strerror}. Give --cache_dir.") from error


def is_ours(name: str) -> bool:
    """Say whether the cache gives such names."""
    return bool(ENTRY.fullmatch(name) or LEFTOVER.fullmatch(name))


def look_at(path: Path, state: os.stat_result, reads: bool) -> CacheFile:
    """Return what a file is; FileNotFoundError if it has gone."""
    if LEFTOVER.fullmatch(path.name):
        return CacheFile(path, state, problem=LEFT)
    if not reads:
        return CacheFile(path, state)
    try:
        entry = read_entry(path)
    except FileNotFoundError:
        raise
    except DamagedEntry as error:
        return CacheFile(path, state, words=str(error), problem=DAMAGED)
    except OSError as error:
        return CacheFile(path, state, words=str(error), problem=CLOSED)
    kind, model = entry.source
    dtype, shape = str(entry.tensor.dtype).removeprefix("torch."), "x".join(map(str, entry.tensor.shape))
    return CacheFile(path, state, kind, model, f"{entry.label!r}, {shape} {dtype}", shape, dtype)


def choose(found: list[CacheFile], args: argparse.Namespace) -> list[CacheFile]:
    """Return the files to which all flags apply."""
    chosen = found
    if args.older_than is not None:
        chosen = [file for file in chosen if file.state.st_mtime < time.time() - args.older_than * DAY]
    if args.kind is not None:
        chosen = [file for file in chosen if file.kind == args.kind]
    if args.model is not None:
        model = args.model if any(file.model == args.model for file in found) else str(Path(args.model).resolve())
        chosen = [file for file in chosen if file.model == model]
    if args.damaged:
        chosen = [file for file in chosen if file.is_dead]
    if args.larger_than is not None:
        excess = sum(file.state.st_size for file in found) - args.larger_than * 1e9
        chosen = longest_unused([file for file in chosen if may_go(file)], excess)
    return chosen


def may_go(file: CacheFile) -> bool:
    """Say whether a file may be deleted: what another process may be writing just now may not."""
    return file.problem != LEFT or file.is_dead


def longest_unused(files: list[CacheFile], excess: float) -> list[CacheFile]:
    """Return as many files as hold so many bytes or, if they hold less, all."""
    chosen = []
    for file in sorted(files, key=lambda file: file.state.st_mtime_ns):
        if excess <= 0:
            break
        excess -= file.state.st_size
        chosen.append(file)
    return chosen


def summarise(folder: Path, files: list[CacheFile]) -> str:
    """Return a text: how many files there are, and for each group how large, of what shapes and when it was used."""
    lines = [f"{folder}: {count(files)}"]
    for group in sorted({file.group for file in files}, key=lambda group: (group in (LEFT, DAMAGED, CLOSED), group)):
        members = [file for file in files if file.group == group]
        shapes = sorted({f"{file.shape} {file.dtype}" for file in members if not file.problem})
        more = [f"{len(shapes) - SHAPES} other shapes"] if len(shapes) > SHAPES else []
        days = sorted(file.state.st_mtime for file in members)
        used = " to ".join(dict.fromkeys((date(days[0]), date(days[-1]))))
        lines += [group, f"    {', '.join([count(members), *shapes[:SHAPES], *more, f'last used {used}'])}"]
    return "\n".join(lines)


def describe_datasets(folder: Path) -> str:
    """Return how large the copies of datasets are, and what to do about them; nothing if there are none."""
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a run is writing there
                sizes.append(os.lstat(os.path.join(place, name)).st_size)
    if not sizes:
        return ""
    return f"Beside them, {folder} holds photos of datasets: {sum(sizes) / 1e6:.2f} MB. Delete what you do not need."


def describe(file: CacheFile) -> str:
    """Return a line on a file."""
    size = f"{file.state.st_size / 1e6:.2f} MB"
    return ", ".join(filter(None, [f"{file.path.name}: {file.group}", file.words, size, date(file.state.st_mtime)]))


def date(seconds: float) -> str:
    """Return a time as a person reads it, in the local time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def count(files: Iterable[CacheFile]) -> str:
    """Return how many files these are and how large."""
    sizes = [file.state.st_size for file in files]
    return f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}, {sum(sizes) / 1e6:.2f} MB"


def prune(chosen: list[CacheFile]) -> int:
    """Delete files, say how many, and return the exit status: 1 if one could not be deleted."""
    gone, used, failures = [], 0, []
    for file in filter(may_go, chosen):
        try:
            if is_same(file.path.lstat(), file.state):
                file.path.unlink()
                gone.append(file)
            else:
                used += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(error)
    print(f"Deleted {count(gone)}." + (f" Used or written meanwhile, and kept: {used}." if used else ""))
    if failures:
        print(f"error: {len(failures)} could not be deleted: {failures[0]}", file=sys.stderr)
    return int(bool(failures))


def is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Say whether a file is the same and unused since."""
    names = ("st_mode", "st_ino", "st_size", "st_mtime_ns")
    return all(getattr(one, name) == getattr(other, name) for name in names)


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)
