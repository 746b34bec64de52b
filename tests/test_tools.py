"""The demo and the benchmark, from the command line to what they write."""

import json
import re
import shlex

import pytest
from PIL import Image

from tests.test_readme import TEXT
from utils import benchmark, demo, evaluate, shapes
from utils.benchmark import Measurement


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


def test_the_benchmark_measures_and_tells_of_failures(tmp_path, monkeypatch, capfd):
    """One run is measured, one fails; both are in the table and in the JSON, and nothing big is left."""
    runs = {"LoRA, prior, precomputed text": benchmark.CONFIGURATIONS["LoRA, prior, precomputed text"]}
    monkeypatch.setattr(benchmark, "CONFIGURATIONS", runs | {"no rank": ("LoRA", "--rank=0")})
    assert benchmark.main(["--shape", "tiny", "--steps", "4", "--output", str(tmp_path)]) == 1
    table, report = capfd.readouterr().out, json.loads((tmp_path / "benchmark.json").read_text())
    good, bad = report["measurements"]
    assert 0 < good["seconds"] < good["start_seconds"] and good["memory_gb"] > 0 and good["problem"] is None
    assert good["samples_per_second"] == pytest.approx(2 / good["seconds"], rel=0.5)
    assert "exit status" in bad["problem"] and "--rank 0 is out of range" in bad["problem"]
    assert "| LoRA, prior, precomputed text |" in table and f"failed: {bad['problem']}" in table
    assert report["device"] and report["versions"]["torch"]
    assert not list(tmp_path.glob("runs/*/"))


def test_the_benchmarks_table_is_aligned():
    """Numbers stand below each other, whatever their length."""
    lines = benchmark.make_table([Measurement("a", 0.5, 2, 1.25, 9), Measurement("longer", 10, 0.1, 16, 30)]).split(
        "\n"
    )
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[2].split() == "| a | 0.500 | 2.00 | 1.25 | 9.0 |".split()


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        (demo, ["--steps", "0"], "--steps 0 must be 1 or more"),
        (benchmark, ["--steps", "2"], "--steps 2 leaves none to count"),
        (benchmark, ["--only", "fast"], "--only 'fast' is in no name. There are: full, batch 1;"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tool, words, message, capsys):
    """Before anything is written."""
    with pytest.raises(SystemExit, match="2"):
        tool.main(words)
    assert message in " ".join(capsys.readouterr().err.split())
