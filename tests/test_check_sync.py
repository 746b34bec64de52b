"""The comparison of the two scripts, on small made-up scripts."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from utils import check_sync

CANONICAL = '''"""Canonical."""
import functools

SIZES = {
    "small": 1,
}


@functools.cache
def twice(number):
    """Return twice the number."""
    return 2 * number
    # Doubling never overflows.


class Box:
    """Hold a value."""

    value = 1


def main():
    """Run the canonical way."""
'''

COPY = '''"""Copy. Its copies stand under `# Same in canonical.py`."""
import functools

# Same in canonical.py
SIZES = {
    "small": 1,
}


# Same in canonical.py
@functools.cache
def twice(number):
    """Return twice the number."""
    return 2 * number
    # Doubling never overflows.


# Same in canonical.py
class Box:
    """Hold a value."""

    value = 1


def main():
    """Run the other way."""
'''


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return `check_texts` for this test's folder, with `main` as the only name that both scripts own."""
    monkeypatch.setattr(check_sync, "OWNED", ("main",))
    return partial(check_texts, tmp_path)


def check_texts(folder: Path, canonical: str, copy: str, *flags: str) -> int:
    """Write both texts into a folder and return the tool's exit status."""
    (folder / "canonical.py").write_bytes(canonical.encode())
    (folder / "copy.py").write_bytes(copy.encode())
    return check_sync.main(["--canonical", f"{folder}/canonical.py", "--copy", f"{folder}/copy.py", *flags])


def edit(text: str, old: str, new: str) -> str:
    """Replace a piece that the text holds exactly once."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_equal_copies_pass_with_one_line(check, capsys):
    """Decorators, comments, assignments, classes and a marker that is quoted in a docstring are all fine."""
    assert check(CANONICAL, COPY) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 shared definitions are the same") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    return 2 * number", "    return number + number"),
        ("@functools.cache", "@functools.lru_cache"),
        ('    "small": 1,', '    "small": 1,  # of two'),
        ("    # Doubling never overflows.\n", ""),
        ("    value = 1", "    value: int = 1"),
    ],
)
def test_drift_is_shown_and_repaired(check, capsys, tmp_path, old, new):
    """A copy that differs fails with a diff; --fix restores it and leaves every other byte alone."""
    drifted = edit(COPY, old, new)
    assert check(CANONICAL, drifted) == 1
    assert f"\n+{old}".rstrip("\n") in capsys.readouterr().out
    assert (tmp_path / "copy.py").read_bytes() == drifted.encode()

    assert check(CANONICAL, drifted, "--fix") == 0
    assert (tmp_path / "copy.py").read_bytes() == COPY.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canonical.py", "copy.py"]


def test_every_drifted_copy_gets_its_own_diff(check, capsys, tmp_path):
    """Two differences give two diffs, and one repair mends both, whatever the lengths."""
    drifted = edit(COPY, "    value = 1\n", "    value = 1\n    more = 2\n")
    drifted = edit(drifted, '    "small": 1,\n', "")
    assert check(CANONICAL, drifted) == 1
    printed = capsys.readouterr().out
    assert "copy.py:SIZES" in printed and "copy.py:Box" in printed and "copy.py:twice" not in printed
    assert check(CANONICAL, drifted, "--fix") == 0
    assert (tmp_path / "copy.py").read_bytes() == COPY.encode()


def test_repair_keeps_odd_bytes_and_the_mode(check, tmp_path):
    """Form feeds, wide characters, a missing last line break and the executable bit survive a repair."""
    tail = "\n\nNOTE = 'x\u2028y \u00e9'\n\f\nLAST = 1"
    drifted = edit(COPY, "2 * number", "number * 2") + tail
    (tmp_path / "copy.py").touch(mode=0o755)
    assert check(CANONICAL, drifted, "--fix") == 0
    assert (tmp_path / "copy.py").read_bytes() == (COPY + tail).encode()
    assert (tmp_path / "copy.py").stat().st_mode & 0o777 == 0o755


def test_repair_writes_nothing_when_nothing_differs(check, tmp_path):
    """--fix does not replace a file that is already right."""
    check(CANONICAL, COPY)
    before = (tmp_path / "copy.py").stat().st_ino
    assert check_sync.main(["--fix", "--canonical", f"{tmp_path}/canonical.py", "--copy", f"{tmp_path}/copy.py"]) == 0
    assert (tmp_path / "copy.py").stat().st_ino == before


MARKER = "# Same in canonical.py"
UNMARKED = edit(COPY, f"{MARKER}\nclass", "class")  # Box without its marker
PROBLEMS = {
    "no original": (edit(CANONICAL, "def twice", "def double"), COPY, "copy.py:11: twice is marked as a copy, but"),
    "blank line below": (CANONICAL, edit(COPY, "class", "\nclass"), "copy.py:18: no definition stands directly below"),
    "import below": (CANONICAL, edit(COPY, "import", f"{MARKER}\nimport"), "copy.py:2: no definition"),
    "last line": (CANONICAL, f"{COPY}\n\n{MARKER}\n", "copy.py:29: no definition"),
    "misspelt": (CANONICAL, edit(UNMARKED, "class", "# same in canonical.py.\nclass"), "copy.py:18: the marker must"),
    "indented": (CANONICAL, edit(COPY, "main():", f"main():\n    {MARKER}"), "copy.py:26: the marker must be exactly"),
    "behind code": (CANONICAL, edit(COPY, "main():", f"main():  {MARKER}"), "copy.py:25: the marker must be exactly"),
    "unmarked": (CANONICAL, UNMARKED, "copy.py:18: Box is the same in"),
    "in the canonical": (edit(CANONICAL, "class", f"{MARKER}\nclass"), COPY, "canonical.py:16: this script"),
    "imported": (CANONICAL, edit(COPY, "def main()", "from utils import main\ndef other()"), "copy.py: main is not"),
    "renamed": (edit(CANONICAL, "def main", "def start"), COPY, "canonical.py: main is not defined here"),
    "replaced": (CANONICAL, f"{COPY}\n\nmain = Box\n", "copy.py: main is not defined here"),
}


@pytest.mark.parametrize(("canonical", "copy", "message"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("flags", [(), ("--fix",)], ids=["check", "fix"])
def test_what_a_person_must_decide_fails_and_is_left_alone(check, capsys, tmp_path, canonical, copy, message, flags):
    """Each problem has its message, and --fix does not guess."""
    assert check(canonical, copy, *flags) == 1
    assert message in capsys.readouterr().out
    assert (tmp_path / "copy.py").read_bytes() == copy.encode()


def test_a_difference_without_marker_is_allowed(check):
    """Deleting the marker and changing the text is how a copy goes its own way."""
    assert check(CANONICAL, edit(UNMARKED, "value = 1", "value = 2")) == 0


def test_command_line(tmp_path):
    """The module runs as a program; a script that is not there is an error of the flags."""
    command = [sys.executable, "-m", "utils.check_sync", "--canonical", str(tmp_path / "absent.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert "absent.py is not a file." in done.stderr
