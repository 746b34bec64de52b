"""Check that the functions which the two scripts share are the same, and repair the copies.

A definition that stands directly under the comment line `# Same in train_dreambooth.py` is a copy: from its first
decorator to its last line it must be, byte for byte, the definition of that name in train_dreambooth.py. Deleting the
marker lets a copy go its own way.

    python -m utils.check_sync          # exit status 1 and a diff for every copy that differs
    python -m utils.check_sync --fix    # overwrite these copies with the canonical text
"""

import argparse
import ast
import difflib
import functools
import io
import re
import shutil
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

from utils.core.atomic_files import write_whole

# What an experiment edits stands in the script itself: these are defined in both, never imported.
OWNED = (
    "main",
    "parse_args",
    "find_problems",
    "detect_model",
    "list_examples",
    "make_plan",
    "draw_class_images",
    "encode_prompts",
    "load_models",
    "DreamBoothDataset",
    "StepSampler",
    "collate",
    "make_loader",
    "make_optimizer",
    "learning_rate",
    "wrap_and_resume",
    "compute_loss",
    "train",
    "validate",
    "save_checkpoint",
    "save_result",
    "share",
)
CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Definition:
    """A function, class or assignment at the top level of a script."""

    name: str
    is_code: bool  # a function or class
    start: int  # index of its first line, decorators included
    lines: list[str]


NOTHING = Definition(name="", is_code=False, start=0, lines=[])


@dataclass(frozen=True)
class Script:
    """The text of a script and what it defines."""

    path: Path
    lines: list[str]
    definitions: list[Definition]


def main(argv: list[str] | None = None) -> int:
    """Check the scripts, repair the copies on request, print what is wrong and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils.check_sync", description=__doc__.split("\n")[0])
    parser.add_argument("--fix", action="store_true", help="Overwrite copies that differ with the canonical text.")
    parser.add_argument("--canonical", type=Path, default=Path("train_dreambooth.py"), help="What copies must equal.")
    parser.add_argument("--copy", type=Path, default=Path("train_dreambooth_lora.py"), help="Script with the copies.")
    args = parser.parse_args(argv)
    for path in (args.canonical, args.copy):
        if not path.is_file():
            parser.error(f"{path} is not a file. Run this in the repository's folder, or say where the script is.")

    canonical, copy = read_script(args.canonical), read_script(args.copy)
    if args.fix and repair(canonical, copy):
        print(f"repaired {copy.path}")
        copy = read_script(args.copy)
    if problems := find_problems(canonical, copy):
        print("\n".join(problems))
        return 1
    shared, _ = find_copies(copy, canonical.path.name)
    print(f"{len(shared)} shared definitions are the same in {canonical.path} and {copy.path}")
    return 0


def find_problems(canonical: Script, copy: Script) -> list[str]:
    """Return one message for everything that is not as it should be."""
    copies, problems = find_copies(copy, canonical.path.name)
    problems += [
        f"{place(canonical, line)}: this script is what copies are compared with and holds none. Delete the marker."
        for line in find_markers(canonical, canonical.path.name)
    ]
    originals = by_name(canonical)
    for definition in copies:
        problems += compare(canonical, copy, originals.get(definition.name), definition)
    return problems + find_unmarked(canonical, copy, copies) + find_undefined(canonical) + find_undefined(copy)


def find_unmarked(canonical: Script, copy: Script, copies: list[Definition]) -> list[str]:
    """Return a message for every function or class that is the same in both scripts without being a marked copy."""
    originals = by_name(canonical)
    return [
        f"{place(copy, definition.start)}: {definition.name} is the same in {canonical.path}, but the two could "
        f"silently drift apart. Put '{marker(canonical.path.name)}' on the line above, or make them differ."
        for definition in copy.definitions
        if definition.is_code and definition not in copies
        if definition.lines == originals.get(definition.name, NOTHING).lines
    ]


def find_undefined(script: Script) -> list[str]:
    """Return a message for every function or class that a script has to define and does not."""
    definitions = by_name(script)
    return [
        f"{script.path}: {name} is not defined here. Both scripts define it themselves, because experiments edit it."
        for name in OWNED
        if not definitions.get(name, NOTHING).is_code
    ]


def compare(canonical: Script, copy: Script, original: Definition | None, definition: Definition) -> list[str]:
    """Return a diff from a copy to its original, or that there is no original, or nothing."""
    if original is None:
        problem = f"{definition.name} is marked as a copy, but {canonical.path} does not define it."
        return [f"{place(copy, definition.start)}: {problem} Delete the marker, or correct the name."]
    names = f"{copy.path}:{definition.name}", f"{canonical.path}:{original.name}"
    diff = list(difflib.unified_diff(definition.lines, original.lines, *names, lineterm=""))
    return ["\n".join(diff)] if diff else []


def repair(canonical: Script, copy: Script) -> bool:
    """Overwrite every copy that differs from its original, in one replacement of the file; return whether any did."""
    originals = by_name(canonical)
    lines = list(copy.lines)
    copies, _ = find_copies(copy, canonical.path.name)
    for definition in reversed(copies):  # from the bottom, so that the indices above stay valid
        original = originals.get(definition.name, definition)
        lines[definition.start : definition.start + len(definition.lines)] = original.lines
    if lines == copy.lines:
        return False
    write_whole(copy.path, "\n".join(lines), prepare=functools.partial(shutil.copymode, copy.path))
    return True


def by_name(script: Script) -> dict[str, Definition]:
    """Return a script's definitions by name; of several with one name the last counts, as in Python."""
    return {definition.name: definition for definition in script.definitions}


def place(script: Script, index: int) -> str:
    """Return a line's place as editors understand it."""
    return f"{script.path}:{index + 1}"


def marker(canonical_name: str) -> str:
    """Return the comment line that stands above a copy."""
    return f"# Same in {canonical_name}"


def find_copies(copy: Script, canonical_name: str) -> tuple[list[Definition], list[str]]:
    """Return the definitions under a marker, from top to bottom, and a message for every marker out of place."""
    by_start = {definition.start: definition for definition in copy.definitions}
    copies, problems = [], []
    for line in find_markers(copy, canonical_name):
        if copy.lines[line].rstrip("\r") != marker(canonical_name):
            problems.append(
                f"{place(copy, line)}: the marker must be exactly '{marker(canonical_name)}', alone on its line."
            )
        elif line + 1 not in by_start:
            problems.append(f"{place(copy, line)}: no definition stands directly below the marker. Move or delete it.")
        else:
            copies.append(by_start[line + 1])
    return copies, problems


def find_markers(script: Script, canonical_name: str) -> list[int]:
    """Return the line indices of comments that are the marker or are meant to be; text in strings does not count."""
    pattern = re.compile(rf"#+\s*same\s+in\s+{re.escape(canonical_name)}", re.IGNORECASE)
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(script.lines)).readline)
    return [token.start[0] - 1 for token in tokens if token.type == tokenize.COMMENT and pattern.match(token.string)]


def read_script(path: Path) -> Script:
    """Read a script's lines and find its top-level definitions."""
    text = path.read_bytes().decode()
    lines = text.split("\n")  # as Python counts them; splitlines() also breaks at form feeds and the like
    found = [read_definition(node, lines) for node in ast.parse(text, str(path)).body]
    return Script(path, lines, [definition for definition in found if definition])


def read_definition(node: ast.stmt, lines: list[str]) -> Definition | None:
    """Return the definition that a top-level statement makes, if it makes one."""
    is_code = isinstance(node, CODE)
    if is_code:
        name = node.name
    elif isinstance(node, ast.Assign):
        name = ", ".join(ast.unparse(target) for target in node.targets)
    elif isinstance(node, ast.AnnAssign):
        name = ast.unparse(node.target)
    else:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    end = node.end_lineno
    for index in range(node.end_lineno, len(lines)):  # comments below the last statement, which ast leaves out
        if lines[index].strip() and not lines[index][0].isspace():
            break
        end = index + 1 if lines[index].strip() else end
    return Definition(name, is_code, start, lines[start:end])


if __name__ == "__main__":
    sys.exit(main())
