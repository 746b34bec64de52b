"""Copy a training script to edit it. The copy runs at once, and works with every tool that takes a script.

    python -m utils.new_experiment my_experiment.py --from lora      # or full, or the path of any script
    python -m utils.new_experiment ../elsewhere/my_experiment.py     # needs: pip install -e REPOSITORY

The copy has no `# Same in …` lines, so nothing compares it with the original. Its docstring names its commit.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from utils.core.errors import UserError, exit_status, explain_write_errors
from utils.run import scripts

MARK = re.compile(r"^# Same in \w+\.py\r?\n", re.MULTILINE)
FLAGS = '--pretrained_model_name_or_path MODEL --instance_data_dir photos/ --instance_prompt "a photo of sks dog"'


def main(argv: list[str] | None = None) -> int:
    """Write the copy, say what to do next, and return the exit status."""
    args = parse_args(argv)
    source, target = scripts.find_script(args.source), args.target
    check_target(target)
    origin = describe_origin(source)
    text = make_copy(source.read_bytes().decode(), source.name, target.name, origin)
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8", newline="") as file:  # "x" never overwrites
            file.write(text)
        shutil.copymode(source, target)
    print("\n".join([f"{target} is a {origin[0].lower()}{origin[1:]}", *describe_next_steps(target)]))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.new_experiment", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("target", type=Path, metavar="COPY.py", help="the new file; an existing one is never changed")
    parser.add_argument(
        "--from", dest="source", default="lora", metavar="SCRIPT", help="lora, full, or a path; default: lora"
    )
    return parser.parse_args(argv)


def check_target(target: Path) -> None:
    """Check the name of the new file.

    Raises:
        UserError: It exists, is no Python file, or would hide a module that the script imports.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists, and is left as it is. Choose another name.")
    if target.suffix != ".py":
        raise UserError(f"{target} must end in .py.")
    # A script's own folder comes first when Python looks for modules.
    installed = PathFinder.find_spec(target.stem, [sysconfig.get_path("purelib")])
    if installed or target.stem in (*sys.stdlib_module_names, "utils"):
        raise UserError(f"{target} would hide the module {target.stem} from the script. Choose another name.")


def make_copy(text: str, old_name: str, new_name: str, origin: str) -> str:
    """Return a script's text without marks of synchronisation, and with its origin in the docstring.

    Args:
        old_name, new_name: Of the files; the docstring's run line names the new one.
        origin: A sentence.
    """
    text = MARK.sub("", text)
    tree = ast.parse(text)
    if ast.get_docstring(tree) is None:
        return f'"""{origin}"""\n\n{text}'
    first, lines = tree.body[0], text.split("\n")  # as Python counts them
    docstring = "\n".join(lines[first.lineno - 1 : first.end_lineno]).rstrip()
    quotes = docstring[-3:] if docstring.endswith(('"""', "'''")) else docstring[-1]
    body = docstring.removesuffix(quotes).rstrip().replace(old_name, new_name)
    lines[first.lineno - 1 : first.end_lineno] = [f"{body}\n\n{origin}\n{quotes}"]
    return "\n".join(lines)


def describe_origin(source: Path) -> str:
    """Return a sentence on where a copy comes from: the file, its commit, and whether the tree had changes."""
    try:
        commit = ask_git(source.resolve().parent, "log", "-1", "--format=%H of %cs")
        changes = ask_git(source.resolve().parent, "status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return f"Copy of {source.name}; the commit is unknown because git is not installed."
    except subprocess.CalledProcessError:
        return f"Copy of {source.name}; the commit is unknown because git finds no repository there."
    return f"Copy of {source.name} at commit {commit}" + (
        ", with uncommitted changes in its tree." if changes else "."
    )


def ask_git(folder: Path, *words: str) -> str:
    """Return what a git command prints."""
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_next_steps(target: Path) -> list[str]:
    """Return what to do with a copy, a line each."""
    notes, folder = [], target.resolve().parent
    if folder != scripts.ROOT:
        notes = [f"To find utils/ from there, once: pip install -e {scripts.ROOT}"]
        if found := [name for name in ("utils/__init__.py", "utils.py") if (folder / name).exists()]:
            notes += [f"But {folder / found[0]} hides the utils/ that the script needs: rename it, or move the copy."]
    return [
        *notes,
        f"Run it:      accelerate launch {target} {FLAGS}",
        f"See batches: python -m utils.preview_data {target} {FLAGS}",
        f"Memory:      python -m utils.estimate_memory {target} {FLAGS}",
    ]


if __name__ == "__main__":
    sys.exit(exit_status(main))
