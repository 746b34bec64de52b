"""The benchmark, from the command line to the tables, the JSON and the plot that it writes."""

import json
import math

import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.devices.launch import find_reason
from utils.lab import benchmark, compare_projects, measured_runs, plots, step_timing
from utils.lab.benchmark import Measurement
from utils.lab.compare_projects import OURS, OURS_AGAIN, OURS_BEST, THEIRS, Comparison
from utils.lab.step_timing import PARTS, Clock

PARSER = """
import argparse
import torch

parser = argparse.ArgumentParser()
for flag in ("--pretrained_model_name_or_path", "--instance_data_dir", "--output_dir", "--instance_prompt"):
    parser.add_argument(flag)
for flag in ("--resolution", "--max_train_steps", "--train_batch_size"):
    parser.add_argument(flag, type=int)
"""
# What another project's script is to the benchmark: flags, and an optimizer that steps.
STUB = f"""{PARSER}
args = parser.parse_args()
weight = torch.nn.Parameter(torch.ones(args.train_batch_size))
optimizer = torch.optim.AdamW([weight], lr=0.1)
for step in range(args.max_train_steps):
    weight.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_configuration_is_measured_in_parts(tmp_path, monkeypatch, capfd):
    """One run is measured, one lacks its flag; both are in the table and the JSON, and nothing big is left."""
    name = "LoRA, prior, precomputed text"
    runs = {name: benchmark.CONFIGURATIONS[name], "warp": ("full", "--train_batch_size=2 --warp=9")}
    monkeypatch.setattr(benchmark, "CONFIGURATIONS", runs)
    assert benchmark.main(["--shape", "tiny", "--steps", "5", "--output", str(tmp_path)]) == 1
    table, report = capfd.readouterr().out, json.loads((tmp_path / "benchmark.json").read_text())
    good, bad = report["measurements"]
    assert good["problem"] is None and good["start_seconds"] > 0
    assert good["memory_gb"] == pytest.approx(good["told_gb"], rel=0.25)  # of a small run, a tenth can be chance
    assert good["samples_per_second"] == pytest.approx(2 / good["seconds"])
    assert list(good["parts"]) == list(PARTS) and min(good["parts"].values()) >= 0
    assert all(good["parts"][part] > 0 for part in ("data", "encode", "forward", "backward", "optimizer"))
    assert good["flops"] > 1e6 and report["threads"] >= 1
    assert good["utilisation"] == pytest.approx(good["flops"] / good["seconds"] / report["peaks"]["fp32"])
    assert bad["problem"] == "train_dreambooth.py has no --warp" and bad["seconds"] is None
    assert f"| {name} |" in table and f"failed: {bad['problem']}" in table and "TFLOP/s in fp32" in table
    assert report["device"] and report["versions"]["torch"]
    assert Image.open(tmp_path / "benchmark.png").height > 2 * plots.ROW
    assert not list(tmp_path.glob("runs/*/")) and not list(tmp_path.glob("runs/*.found"))


def test_another_project_is_compared_in_turn(tmp_path, capfd):
    """Its script and ours do the same steps; a side that lacks a flag or fails is told of, and has no ratio."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/train_dreambooth_lora.py").write_text(STUB)
    words = ["--best=--warp=9", "--shape", "tiny", "--only", "LoRA", "--steps", "5", "--repeats", "1"]
    words += ["--output", str(tmp_path / "out")]
    assert benchmark.main([*words, "--against", str(tmp_path / "theirs")]) == 1
    table, report = capfd.readouterr().out, json.loads((tmp_path / "out/against.json").read_text())
    theirs, ours, again, best = report["measurements"]
    assert [one["side"] for one in report["measurements"]] == [THEIRS, OURS, OURS_AGAIN, OURS_BEST]
    assert best["problem"] == "train_dreambooth_lora.py has no --warp" and best["seconds"] is None
    for one in (theirs, ours, again):
        assert one["problem"] is None and len(one["runs"]) == 1 and one["memory_gb"] > 0
        assert one["samples_per_second"] == pytest.approx(1 / one["seconds"]) and one["start_seconds"] > 0
    assert report["threads"] >= 1 and report["steps"] == 5
    assert f"| LoRA, batch 1 | {THEIRS}" in table and f"failed: {best['problem']}" in table
    assert Image.open(tmp_path / "out/against.png").height > 3 * plots.ROW
    assert not list((tmp_path / "out/runs").glob("*/"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (STUB.replace("AdamW", "AdamX"), "exit status 1: AttributeError: .* no attribute 'AdamX'"),
        (PARSER, "took 0 steps"),
    ],
)
def test_another_projects_failure_is_told(script, reason, tmp_path):
    """By the last line that says why; also if it ends well, but has not trained."""
    (tmp_path / "train_dreambooth.py").write_text(script)
    (tmp_path / "runs").mkdir()
    run, folders = measured_runs.Run({"runs": tmp_path / "runs"}, "one"), dict.fromkeys(("model", "photos"), tmp_path)
    with pytest.raises(UserError, match=reason):
        compare_projects.time_from_outside(run, tmp_path / "train_dreambooth.py", ["--train_batch_size=1"], folders, 4)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one.log"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("usage: a.py\na.py: error: unrecognized arguments: --x\nsubprocess.CalledProcessError: 2", 1),
        ("a.py: error: these flags cannot be used:\n  - --rank 0 is too small.\nsubprocess.CalledProcessError: 2", 1),
        ("error: the folder is empty.\nsubprocess.CalledProcessError: 1", 0),
        ("Traceback\nValueError: no\n  more of it\n", 1),
        ("Killed", 0),
    ],
)
def test_the_reason_of_a_failure_is_found(lines, reason, tmp_path):
    """It is the script's last word, not the launcher's."""
    (tmp_path / "log").write_text(lines)
    assert find_reason(tmp_path / "log") == lines.split("\n")[reason].strip()


def test_the_parts_of_a_step_add_up():
    """A part within a part counts once, whatever comes between is other, and an error ends its part."""
    clock = Clock()
    outer = clock.wrap("backward", clock.wrap("optimizer", sum))
    assert outer([1, 2]) == 3
    with pytest.raises(TypeError):
        clock.call("forward", sum, None)
    assert clock.running == ["other"]
    clock.end_step(len, ())
    (step,) = clock.steps
    assert list(step) == list(PARTS) and min(step.values()) >= 0 and step["data"] == 0
    assert all(step[part] > 0 for part in ("forward", "backward", "optimizer", "other"))
    assert clock.seconds.total() == 0


def test_what_is_timed_stays_what_it_is():
    """A network keeps its attributes and its answer, a loader its batches."""
    clock, network = Clock(), torch.nn.Linear(2, 3)
    timed, given = step_timing.TimedNetwork(clock, network), torch.ones(1, 2)
    assert timed.weight is network.weight and torch.equal(timed(given), network(given))
    assert list(step_timing.TimedLoader(clock, [1, 2])) == [1, 2]
    assert clock.seconds["forward"] > 0 and clock.seconds["data"] > 0


def test_operations_are_counted_by_hand(tmp_path):
    """A product and attention, forward and backward, as multiplications and additions; nothing twice."""
    with pytest.raises(SystemExit):
        step_timing.train_and_count(tmp_path / "found", work)
    product = 2 * 4 * 6 * 5  # (4, 6) by (6, 5); its backward pass needs the weight's gradient alone
    attention = 2 * 2 * (2 * 3) * 4 * 4 * 8  # two products of 2 × 3 heads, 4 tokens and 8 channels
    assert json.loads((tmp_path / "found").read_text()) == 2 * product + 3 * attention


def work() -> None:
    """Do what a step consists of."""
    weight, tokens = torch.ones(6, 5, requires_grad=True), torch.ones(2, 3, 4, 8, requires_grad=True)
    loss = (torch.ones(4, 6) @ weight).sum()
    loss = loss + torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum()
    torch.autograd.backward(loss)


def test_the_peak_is_a_speed():
    """Of each precision asked for."""
    peaks = step_timing.measure_peaks(["fp32", "bf16"])
    assert set(peaks) == {"fp32", "bf16"} and min(peaks.values()) > 1e6


def test_flags_that_do_not_change_the_work_are_not_counted_again(tmp_path, monkeypatch):
    """One process counts for all of them; where it fails, the line says so and keeps its seconds."""
    asked = []
    monkeypatch.setattr(benchmark, "count_flops", lambda script, own, *_: asked.append(own) or 8e9)
    one, counted, peaks = Measurement("a", 0.5, 2, 1.25, 9, precision="bf16"), {}, {"fp32": 1e9, "bf16": 4e10}
    for flags in (["--compile"], ["--gradient_checkpointing", "--mixed_precision=bf16"], ["--train_batch_size=4"]):
        found = benchmark.utilise(one, "full", flags, {}, None, counted, peaks)
        assert found.flops == 8e9 and math.isclose(found.utilisation, 0.4)
    assert asked == [["--max_train_steps=1"], ["--train_batch_size=4", "--max_train_steps=1"]]
    counted["LoRA",] = "exit status 1: it broke"
    found = benchmark.utilise(one, "LoRA", [], {}, None, counted, peaks)
    assert found.problem == "its operations: exit status 1: it broke" and found.seconds == 0.5


def test_the_tables_are_aligned():
    """Numbers stand below each other, whatever their length; what failed takes the rest of its line."""
    parts = dict.fromkeys(PARTS, 0.25)
    whole = Measurement("a", 0.5, 2, 1.25, 9, parts, flops=8.5e11, utilisation=0.512, told_gb=1.2)
    lacking = Measurement("longer", 10, 0.1, 16, 30, problem="its parts: gone")
    lines = benchmark.make_table([whole, lacking, Measurement("b", problem="no")]).split("\n")
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[2].split() == "| a | 0.500 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250".split() + (
        "| 2.00 | 1.25 | 1.20 | 0.85 | 51.2 | 9.0 |".split()
    )
    assert lines[3].count("–") == len(PARTS) + 3 and lines[4] == "| b             | failed: no |"
    assert lines[5:] == ["", "longer: its parts: gone"]


def test_a_comparison_has_ratios():
    """To theirs, of the same work; a dash where theirs failed."""
    theirs, ours = Comparison("a", THEIRS, 0.5, 2, 40, 8), Comparison("a", OURS, 0.25, 4, 10, 6)
    failed, alone = Comparison("b", THEIRS, problem="no"), Comparison("b", OURS, 0.25, 4, 10, 6)
    lines = compare_projects.make_comparison([theirs, ours, failed, alone]).split("\n")
    assert len({len(line) for line in lines if "failed" not in line}) == 1
    assert lines[3].split() == "| a | ours | 4.000 | 2.00 | 10.0 | 0.25 | 6.00 | 0.75 |".split()
    assert lines[4] == "| b    | theirs  | failed: no |" and lines[5].count("–") == 3


def test_the_plot_draws_what_there_is():
    """Each part has its colour, what failed has none, and the longest bar fits."""
    parts = dict.fromkeys(PARTS, 0.1)
    good, bad = Measurement("a", 0.5, 2, 1.25, 9, parts), Measurement("b", problem="no")
    plot = plots.draw_bars("title", [good, bad])
    colours = {colour for _, colour in plot.getcolors(plot.width * plot.height)}
    wanted = [*plots.PART_COLOURS.values(), plots.SPEED]
    assert {tuple(bytes.fromhex(colour[1:])) for colour in wanted} <= colours
    row = plot.crop((0, plot.height - plots.LETTERS - plots.ROW, plot.width, plot.height - plots.LETTERS))
    assert len(row.getcolors(row.width * row.height)) < len(colours)
    assert plots.draw_bars("title", [bad]).height < plot.height


def test_every_shape_has_its_own_size_and_configurations():
    """IF trains on pixels, at the size of its networks, and without what it lacks."""
    assert [measured_runs.size_of(shape) for shape in ("tiny", "sd15", "sd21", "if1-xl", "if2-l")] == [
        64,
        512,
        768,
        64,
        256,
    ]
    sd, stage_two = (benchmark.offered(benchmark.parse_args(["--shape", shape])) for shape in ("sd15", "if2-l"))
    assert set(sd) - set(stage_two) >= {"full, text encoder", "LoRA, cached latents"}
    assert {"full, batch 1", "LoRA, prior, precomputed text"} <= set(stage_two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 2", "--steps 2 leaves none to count"),
        ("--only fast-as-light", "--only 'fast-as-light' is in no name. There are: full, batch 1;"),
        ("--against . --repeats 0", "--repeats 0 must be 1 or more."),
        ("--against . --shape if1-m", "--against compares shapes of Stable Diffusion, not if1-m."),
        ("--against utils", "--against utils has no train_dreambooth.py and no train_dreambooth_lora.py."),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, message, capsys):
    """Before anything is written."""
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(words.split())
    assert message in " ".join(capsys.readouterr().err.split())
