"""The demo, from the command line to what it writes."""

import re
import shlex

import pytest
from PIL import Image

from tests.test_readme import TEXT
from utils import demo, evaluate
from utils.synthetic import shapes


def test_the_demo_trains_and_puts_the_sheet_together(tmp_path, capfd):
    """All of `make demo` in two steps: the photos, and below them both models' answers; it says what was counted."""
    (tmp_path / "lora").mkdir()
    words = ["--output", str(tmp_path), "--steps", "2"]
    assert demo.main(words) == 1
    assert "holds a folder lora that this demo did not write" in capfd.readouterr().err
    (tmp_path / "lora").rmdir()
    assert demo.main(words) == 0
    text, sheet = capfd.readouterr().out, Image.open(tmp_path / "before-after.png")
    assert sheet.width > 5 * demo.CELL and sheet.height > (1 + 2 * demo.SEEDS) * demo.CELL
    assert len(list((tmp_path / "photos").glob("*.png"))) == shapes.PHOTOS
    assert f"Look at {tmp_path / 'before-after.png'}" in text and "in 0 of 8 pictures that name sks" in text
    assert f"utils.sample {tmp_path / 'lora'}" in text and f"utils.evaluate {tmp_path / 'lora'}" in text
    command = re.search(r"^python -m utils.evaluate demo-output/(lora .*)$", TEXT, re.MULTILINE)[1]
    words = [*shlex.split(f"{tmp_path}/{command}"), "--seeds", "1", "--output", str(tmp_path / "evaluation")]
    assert evaluate.main(words) == 0
    assert "| subject, seen backgrounds" in capfd.readouterr().out and (tmp_path / "evaluation/grid.png").is_file()


def test_flags_that_make_no_sense_are_refused(capsys):
    """Before anything is written."""
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--steps", "0"])
    assert "--steps 0 must be 1 or more" in " ".join(capsys.readouterr().err.split())
