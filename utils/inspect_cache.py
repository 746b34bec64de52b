"""List the cache of prompt embeddings and latents by kind and model, and delete what was not used for long.

    python -m utils.inspect_cache                            # what there is
    python -m utils.inspect_cache --older_than 30            # what was not used for 30 days
    python -m utils.inspect_cache --older_than 30 --prune    # delete it
    python -m utils.inspect_cache --larger_than 20 --prune   # delete the longest unused, until 20 GB are left

Only files with a name of this cache are deleted: other files, links and folders stay. Runs may use the cache at the
same time: they make again what they miss.
"""

import argparse
import contextlib
import json
import os
import stat
import sys
import time
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from utils.core.errors import UserError, exit_status
from utils.data.cache import ENTRY, LEFTOVER, WRITING, default_folder
from utils.flags.flag_checks import find_out_of_range

DAY = 24 * 60 * 60  # seconds
Files = dict[Path, os.stat_result]


def main(argv: list[str] | None = None) -> int:
    """List or prune the cache, and return the exit status."""
    args = parse_args(argv)
    if args.cache_dir and not args.cache_dir.is_dir():  # an empty list would hide the slip
        raise UserError(f"--cache_dir {args.cache_dir} is no folder. Give the one that the training command names.")
    folder = args.cache_dir or default_folder()
    files = choose(find_files(folder), args.older_than, args.larger_than)
    if args.prune:
        return prune(files)
    print("\n".join([f"{folder}: {count(files.values())}", *describe_groups(files)]))
    if args.older_than is not None or args.larger_than is not None:
        print("--prune deletes these files.")
    elif photos := [path for path in (folder / "datasets").rglob("*") if path.is_file()]:
        size = sum(path.stat().st_size for path in photos) / 1e6
        print(f"{folder / 'datasets'} also holds {size:.2f} MB of datasets. Delete what you do not need.")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.inspect_cache", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--cache_dir", type=Path, metavar="DIR", help="default: dreambooth in $XDG_CACHE_HOME or ~/.cache")
    add("--older_than", type=float, metavar="DAYS", help="choose files that were not used for so many days")
    add("--larger_than", type=float, metavar="GB", help="choose the longest unused files above this total size")
    add("--prune", action="store_true", help="delete the chosen files")
    args = parser.parse_args(argv)
    problems = find_out_of_range(vars(args), {"older_than": "0 or more", "larger_than": "0 or more"})
    if args.prune and args.older_than is None and args.larger_than is None:
        problems.append("--prune needs --older_than or --larger_than. To delete all, use --older_than 0.")
    if problems:
        parser.error(" ".join(problems))
    return args


def find_files(folder: Path) -> Files:
    """Return the files of the cache, the longest unused first; not those that a run may be writing at the moment."""
    found = {}
    try:
        names = os.listdir(folder) if folder.exists() else []
    except OSError as error:
        raise UserError(f"The cache {folder} cannot be listed: {error.strerror}. Give --cache_dir.") from error
    for name in (name for name in names if ENTRY.fullmatch(name) or LEFTOVER.fullmatch(name)):
        with contextlib.suppress(FileNotFoundError):  # a run or another prune was faster
            state = (folder / name).lstat()
            is_written = LEFTOVER.fullmatch(name) and state.st_mtime > time.time() - WRITING
            if stat.S_ISREG(state.st_mode) and not is_written:
                found[folder / name] = state
    return dict(sorted(found.items(), key=lambda item: item[1].st_mtime_ns))


def choose(files: Files, older_than: float | None, larger_than: float | None) -> Files:
    """Return the files to which all given flags apply."""
    end, chosen = time.time() - (older_than or 0) * DAY, {}
    excess = sum(state.st_size for state in files.values()) - (larger_than or 0) * 1e9
    for path, state in files.items():
        if (older_than is None or state.st_mtime < end) and (larger_than is None or excess > 0):
            chosen[path] = state
            excess -= state.st_size
    return chosen


def describe_groups(files: Files) -> list[str]:
    """Return two lines for each kind and model: which it is; how many files, how large, and when they were used."""
    groups = {}
    for path in files:
        groups.setdefault(read_group(path), []).append(files[path])
    lines = []
    for group, states in sorted(groups.items()):
        first, last = (time.strftime("%Y-%m-%d", time.localtime(states[end].st_mtime)) for end in (0, -1))
        lines += [group, f"    {count(states)}, last used {first} to {last}"]
    return lines


def read_group(path: Path) -> str:
    """Return the kind and model of an entry, from the head of its file."""
    try:
        with safe_open(path, "pt") as file:
            identity = json.loads(file.metadata()["identity"])
        return f"{identity['kind']} of {identity.get('model', '?')}"
    except Exception:  # damaged bytes raise nearly every type
        return "unreadable"


def count(states: Collection[os.stat_result]) -> str:
    """Return how many files these are and how large."""
    return f"{len(states)} file{'' if len(states) == 1 else 's'}, {sum(one.st_size for one in states) / 1e6:.2f} MB"


def prune(files: Files) -> int:
    """Delete files unless they were used meanwhile, and return the exit status: 1 if one could not be deleted."""
    gone, failures = [], []
    for path, state in files.items():
        try:
            if path.lstat().st_mtime_ns == state.st_mtime_ns:
                path.unlink()
                gone.append(state)
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(error)
    print(f"Deleted {count(gone)}.")
    if failures:
        print(f"error: {len(failures)} could not be deleted: {failures[0]}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    status = exit_status(main)
    sys.exit(status)
