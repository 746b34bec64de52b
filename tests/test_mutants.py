"""The tool that changes the code in one place at a time: on a small repository, and its list by text alone."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.core.errors import UserError
from utils.lab import mutants

ROOT = Path(__file__).parents[1]
CODE = "def double(number):\n    return 2 * number\n\n\ndef add(a, b):\n    return a + b\n"
TESTS = """
from pathlib import Path

import toy

def test_double():
    assert toy.double(3) == 6

def test_add():
    assert toy.add(2, 2) == 4

def test_is_red():
    assert False
"""
CHANGES = {  # words: old text, new text, test
    "double doubles nothing": ("2 * number", "1 * number", "test_double"),
    "sums are products": ("a + b", "a * b", "test_add"),
    "differences are wrong": ("a - b", "a + b", "test_add"),
    "the code is none": ("a + b", "a +", "test_add"),
}


def write_repository(folder: Path, *words: str, **texts: str) -> Path:
    """Write a repository with some of the changes in its list; texts replace those of a change."""
    (folder / "tests" / "mutants").mkdir(parents=True)
    (folder / "toy.py").write_text(CODE)
    (folder / "tests" / "test_toy.py").write_text(TESTS)
    entries = []
    for name in words:
        values = (
            dict(zip(("old", "new", "tests"), CHANGES[name], strict=True)) | {"breaks": name, "file": "toy.py"} | texts
        )
        values["tests"] = f"tests/test_toy.py::{values['tests']}"
        entries.append("\n".join(["[[mutant]]", *(f"{key} = {value!r}" for key, value in values.items())]))
    (folder / "tests" / "mutants" / "toy.toml").write_text("\n\n".join(["imports = ['json']", *entries]))
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the tool on a repository."""
    command = [sys.executable, "-m", "utils.lab.mutants", "--root", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


has_git = pytest.mark.skipif(not shutil.which("git") or not hasattr(os, "fork"), reason="needs git and fork")


@has_git
def test_what_survives_and_what_is_stale_is_told(tmp_path):
    """The killed one is told as well, the repository stays as it is, and the exit status is 1."""
    folder = write_repository(tmp_path / "toy", *CHANGES)
    done = run(folder)
    ends = {line.partition(": ")[2]: line[:12].strip() for line in done.stdout.splitlines() if "toy.py: " in line}
    assert ends == {
        "double doubles nothing": "killed",
        "sums are products": "survived",
        "differences are wrong": "stale",
        "the code is none": "did not run",
    }, done.stdout + done.stderr
    assert done.returncode == 1 and "3 changes, 1 killed, 2 not" in done.stdout
    assert (folder / "toy.py").read_text() == CODE
    assert sorted(path.name for path in folder.iterdir()) == [".git", "tests", "toy.py"]


@has_git
def test_nothing_is_said_unless_all_is_well_without_a_change(tmp_path):
    """A test that fails anyway notices nothing; with --keep_going the other changes are tried."""
    folder = write_repository(tmp_path / "toy", "double doubles nothing")
    done = run(folder)
    assert done.returncode == 0 and "1 changes, 1 killed, 0 not" in done.stdout, done.stdout + done.stderr
    folder = write_repository(tmp_path / "red", "double doubles nothing", tests="test_is_red")
    done = run(folder)
    assert done.returncode == 1 and "Without a change, these tests fail: tests/test_toy.py::test_is_red" in done.stdout
    assert "killed" not in done.stdout
    assert "0 changes, 0 killed" in run(folder, "--keep_going").stdout


@has_git
def test_a_part_of_the_list_is_chosen_by_a_word(tmp_path):
    """And listed without running anything; a stale one is an error here, too."""
    folder = write_repository(tmp_path / "toy", *CHANGES)
    assert run(folder, "--list", "--only", "products").stdout == (
        "ready       toy.py: sums are products\n1 changes, 0 stale\n"
    )
    done = run(folder, "--list", "--only", "differences")
    assert done.returncode == 1 and done.stdout.startswith("stale       toy.py: differences are wrong\n")


def test_an_old_text_must_be_there_once(tmp_path):
    """In each file of a pattern: nothing is changed in one of two scripts alone."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("x = 1\n")
    mutant = mutants.Mutant("", "*.py", "x = 1", "x = 2", "")
    assert mutant.apply(tmp_path) == {tmp_path / "one.py": "x = 2\n", tmp_path / "two.py": "x = 2\n"}
    (tmp_path / "two.py").write_text("x = 1\nx = 1\n")
    assert mutant.apply(tmp_path) == {}
    (tmp_path / "two.py").write_text("x = 3\n")
    assert mutant.apply(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("imports = []", "has no changes"),
        ("[[mutant]\n", "cannot be read"),
        ("[[mutant]]\nbreaks = 'x'", "must have the keys"),
        ("[[mutant]]\nbreaks='x'\nfile='a'\nold='b'\nnew='c'\ntests='d'\n" * 2, "the same words: x"),
    ],
)
def test_mistakes_in_the_list_are_told(tmp_path, content, message):
    """By the file, or by the words of the change."""
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "tests" / "mutants" / "a.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        mutants.read_lists(tmp_path)


@has_git
def test_tests_that_hang_are_ended(tmp_path, monkeypatch):
    """A change that makes them wait for ever is noticed by that."""
    monkeypatch.setattr(mutants, "PATIENCE", 0.2)

    def start(mutant, name):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        return mutants.Job(mutant, name, tmp_path, pid, time.monotonic())

    began = time.monotonic()
    (job,) = mutants.side_by_side(start, [(None, "a test")], 2)
    assert job.end == "killed" and time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(job.pid, 0)


# The list of this repository.


def test_no_change_is_stale():
    """Each old text is there once in each of its files."""
    _, listed = mutants.read_lists(ROOT)
    assert [f"{one.file}: {one.breaks}" for one in listed if not one.apply(ROOT)] == []


def test_every_test_that_is_meant_for_a_change_is_there():
    """A test that was renamed is renamed in the list."""
    _, listed = mutants.read_lists(ROOT)
    named = {name for one in listed for name in shlex.split(one.tests)}
    functions = {name.partition("[")[0].partition("::")[::2] for name in named}
    missing = [
        f"{path}::{function}"
        for path, function in sorted(functions)
        if not (ROOT / path).is_file()
        or (function and not re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE))
    ]
    assert missing == []
