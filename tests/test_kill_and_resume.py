"""Runs that are killed and resumed, and the tool that does it and compares."""

import argparse
import json
import random
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment
from utils.lab import kill_and_resume

# A training that takes a moment for a step and that remembers what a good one would, or not.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
out = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--output_dir=")))
out.mkdir(exist_ok=True)
(out / "args.json").write_text(json.dumps({"output_dir": str(out)}))
log = out / "metrics.jsonl"
done = len(log.read_text().splitlines()) if log.exists() and REMEMBERS else 0
with log.open("a") as file:
    for step in range(done, 20):
        time.sleep(0.02)
        (out / f".saving-{step}-0").mkdir(exist_ok=True)
        file.write(json.dumps({"step": step, "seconds": time.time()}) + "\\n")
        file.flush()
        (out / f".saving-{step}-0").rmdir()
sys.exit(STATUS)
"""


def run_tool(tmp_path, remembers: bool, status: int = 0) -> int:
    """Let the tool kill a script of this module five times."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("REMEMBERS", str(remembers)).replace("STATUS", str(status)))
    return kill_and_resume.main(["--output", str(tmp_path / "out"), "--scripts", str(script), "--kills", "5"])


def test_both_scripts_survive_kills(tmp_path):
    """Forty kills, most of them aimed at a save, and each run ends in the bits of an uninterrupted one."""
    command = [sys.executable, "-m", "utils.lab.kill_and_resume", "--output", tmp_path / "out", "--kills", "20"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for script in ("full", "lora"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{script}: 20 kills")]
        assert line.endswith("each ended in the bits of the run that was left alone.") and "in a save" in line


def test_a_script_that_remembers_passes(tmp_path, capfd):
    """What differs by time alone does not count, and runs that are equal are removed."""
    assert run_tool(tmp_path, remembers=True) == 0
    assert "script: 5 kills" in (told := capfd.readouterr().out) and "each ended in the bits" in told
    assert not list((tmp_path / "out").glob("script-[0-9]"))


def test_a_script_that_forgets_is_caught(tmp_path, capfd):
    """Its metrics have steps twice: the tool says where, fails, and keeps the run."""
    assert run_tool(tmp_path, remembers=False) == 1
    assert "BUT THESE DIFFER:" in (told := capfd.readouterr().out) and "script-0: metrics.jsonl" in told
    assert (tmp_path / "out" / "script-0").is_dir()


def test_a_script_that_fails_is_an_error(tmp_path, capfd):
    """Its log is named."""
    assert run_tool(tmp_path, remembers=True, status=3) == 1
    assert "ended with exit status 3: see" in (told := capfd.readouterr().err) and "script-calm.log" in told


def test_nothing_that_was_there_is_removed(tmp_path, capfd):
    """A folder that holds anything is refused."""
    (tmp_path / "mine").touch()
    assert kill_and_resume.main(["--output", str(tmp_path)]) == 1
    assert capfd.readouterr().err == f"error: --output {tmp_path} is not empty. Remove it, or use another folder.\n"
    assert (tmp_path / "mine").exists()


def test_a_run_can_be_killed_in_its_first_moment(tmp_path, monkeypatch):
    """Before it has got as far as to have a process group of its own."""
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(kill_and_resume, "AIMS", {"any time": (None, 1)})
    args = argparse.Namespace(output=tmp_path, steps=2)
    for _ in range(20):
        assert kill_and_resume.strike(
            kill_and_resume.start(args, tmp_path / "script.py", tmp_path / "run"),
            tmp_path / "run",
            random.Random(0),
            0.0,
        )


def test_what_a_kill_interrupted_is_told_by_what_it_left(tmp_path):
    """From the most particular to the least."""
    found = [kill_and_resume.find_half_done(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("")
    found.append(kill_and_resume.find_half_done(tmp_path))
    for name in (".saving-12-00ff", ".removing-10-00ff", ".saving-result-00ff"):
        (tmp_path / name).mkdir()
        found.append(kill_and_resume.find_half_done(tmp_path))
    assert found == ["the start", "a step", *list(kill_and_resume.AIMS)[1:]]


def test_a_line_that_is_cut_off_is_found(tmp_path):
    """As it would be if it were written in two parts."""
    assert kill_and_resume.find_torn_lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert kill_and_resume.find_torn_lines(tmp_path) == ['{"st']


def test_every_file_and_every_number_of_a_step_counts(tmp_path):
    """But not the folder's name and the timings."""
    for name, loss in (("one", 0.5), ("two", 0.5), ("three", 0.25)):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "args.json").write_text(json.dumps({"output_dir": name, "seed": 0}))
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds": loss}) + "\n")
        (tmp_path / name / "unet" / "weights").write_bytes(b"0" if name != "three" else b"1")
    (tmp_path / "three" / "left").write_text("")
    assert kill_and_resume.compare(tmp_path / "one", tmp_path / "two") == []
    assert kill_and_resume.compare(tmp_path / "one", tmp_path / "three") == ["left", "metrics.jsonl", "unet/weights"]


@pytest.mark.parametrize("words", [["--kills", "0"], ["--steps", "3"], ["--scripts", "both"]])
def test_flags_that_make_no_sense_are_refused(words, capsys):
    """Before anything is written."""
    with pytest.raises(SystemExit, match="2"):
        kill_and_resume.main(words)
    assert words[1] in capsys.readouterr().err
