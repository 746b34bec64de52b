"""The benchmark of what is learned: it runs the scripts, keeps what it measured, and puts it into tables."""

import dataclasses
import json
import re

import pytest

from utils.evaluation import exam
from utils.lab import fidelity
from utils.lab.fidelity import Record
from utils.lab.fidelity_recipes import IF1, IF2, SD, SD_V, Column, Recipe
from utils.run.scripts import LORA, SCRIPTS
from utils.synthetic import shapes
from utils.synthetic.random_models import make_model

SUBJECT = "quartered circle"


def test_a_recipe_is_run_measured_and_not_run_again(tmp_path, monkeypatch, capfd):
    """From photos to tables, with a model of random weights; the second call only reads."""
    make_model(tmp_path / "models" / IF1, IF1)
    monkeypatch.setattr(exam, "STEPS", 2)
    flags = "--max_train_steps=1 --train_batch_size=1"
    monkeypatch.setattr(
        fidelity, "RECIPES", {"quick": Recipe(IF1, LORA, flags), "worse": Recipe(IF1, LORA, "--rank=0")}
    )
    words = ["--models", tmp_path / "models", "--output", tmp_path / "out", "--subjects", SUBJECT]
    words = [*map(str, words), *"--jobs 1 --seeds 1 --exam_seeds 1".split()]
    assert fidelity.main([*words, "--only", "quick"]) == 0
    first = capfd.readouterr().out
    assert re.search(r"^\| quick +\|", first, re.MULTILINE) and f"| {IF1} |" in first and "2 measurements" in first
    assert len(list((tmp_path / "out" / "photos" / "quartered-circle").glob("*.png"))) == shapes.PHOTOS
    assert not any((tmp_path / "out" / "runs").glob("*/")) and (tmp_path / "out" / "fidelity.md").is_file()
    assert fidelity.main([*words, "--only", "quick"]) == 0
    second = capfd.readouterr().out
    assert second.partition("| base model |")[2].partition(" measurements")[0] in first and "seed 0" not in second
    assert fidelity.main([*words, "--models", str(tmp_path)]) == 1
    assert (
        f"{tmp_path} lacks {IF1}. Train them (python -m utils.lab.train_models --only {IF1})" in capfd.readouterr().err
    )
    assert fidelity.main(words) == 1
    assert "worse on the quartered circle: exit status" in (told := capfd.readouterr().err) and "--rank 0" in told


def test_the_table_compares_with_the_base_of_the_same_subject():
    """Ratios and gains are taken run by run, then the mean and its standard error."""
    scores = {"prompts obeyed": 0.8, "PSNR, subject": 20.0}
    bases = {
        ("m", name): Record(None, "m", name, 0, 0, {**scores, "prompts obeyed": base})
        for name, base in (("a", 1), ("b", 0.5))
    }
    group = [Record("r", "m", name, 0, 9.0, {"prompts obeyed": 0.5, "PSNR, subject": 22.5}) for name in ("a", "b")]
    assert fidelity.tell(group, Column("prompts obeyed", "ratio"), bases) == "75 ± 25 %"
    assert fidelity.tell(group, Column("PSNR, subject", "gain", percent=False, digits=2), bases) == "2.50 ± 0.00"
    assert fidelity.tell(group[:1], Column("seconds", percent=False), bases) == "9"


def test_quick_runs_have_ranges_and_say_what_is_out_of_them():
    """A run at the bottom of every range is no surprise, one below is."""
    for name, ranges in fidelity.QUICK.items():
        columns = {column: (fidelity.COLUMNS | fidelity.IF2_COLUMNS)[column] for column in ranges}
        model = fidelity.RECIPES[name].model
        base = Record(None, model, SUBJECT, 0, 0, {column.measure: 1.0 for column in columns.values()})
        lowest = {key: low + (columns[key].against == "gain") for key, (low, _) in ranges.items()}
        good = Record(name, model, SUBJECT, 0, 0, {columns[key].measure: lowest[key] for key in ranges})
        assert fidelity.find_surprises([base, good]) == []
        first, (low, high) = next(iter(ranges.items()))
        worse = good.scores | {columns[first].measure: lowest[first] - 1}
        (told,) = fidelity.find_surprises([base, dataclasses.replace(good, scores=worse)])
        assert told == f"{name}: {first} is {low - 1:.2f}, not from {low:g} to {high:g}."


def test_both_scripts_teach_what_they_should(tmp_path, capfd):
    """Three runs on one subject, each measure within its range: `make fidelity QUICK=1`."""
    assert fidelity.main(["--quick", "--output", str(tmp_path)]) == 0, capfd.readouterr().err


def test_what_has_changed_is_measured_again(tmp_path):
    """A record counts only for the flags, the exam and the model that it was made with."""
    (tmp_path / "model").mkdir()
    recipe, weights = Recipe(IF1, LORA, "--rank=4"), tmp_path / "model" / "weights"
    weights.write_text("0.1")
    prints = [fidelity.take_fingerprint(recipe, weights.parent, seeds) for seeds in (2, 4, 2)]
    assert prints[0] == prints[2] != prints[1]
    other = fidelity.take_fingerprint(dataclasses.replace(recipe, flags="--rank=8"), weights.parent, 2)
    weights.write_text("0.2")
    assert len({*prints, other, fidelity.take_fingerprint(recipe, weights.parent, 2)}) == 4
    record = Record("r", "m", SUBJECT, 0, 1.0, {}, prints[0])
    (tmp_path / "record.json").write_text(json.dumps(dataclasses.asdict(record)))
    assert fidelity.load_record(tmp_path / "record.json", prints[0]) == record
    assert fidelity.load_record(tmp_path / "record.json", other) is None


def test_every_recipe_and_column_is_of_things_that_exist():
    """Scripts, models and measures have the names that are used here."""
    for recipe in fidelity.RECIPES.values():
        assert SCRIPTS[recipe.method].is_file() and recipe.model in (SD, SD_V, IF1, IF2)
    for column in (*fidelity.COLUMNS.values(), *fidelity.BASE_COLUMNS.values()):
        assert column.measure in (*exam.MEASURES, "seconds")
    assert {dataclasses.astuple(column)[0].split(",")[0] for column in fidelity.IF2_COLUMNS.values()} == {
        "PSNR",
        "SSIM",
        "seconds",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fast"], "--only 'fast' is in no name. There are: SD, full;"),
        (["--subjects", "dog"], "invalid choice"),
        (["--exam_seeds", "0"], "--exam_seeds 0 is out of range"),
        (["--jobs", "0"], "--jobs 0 is out of range"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, message, capsys):
    """Before anything is run."""
    with pytest.raises(SystemExit, match="2"):
        fidelity.main(words)
    assert message in " ".join(capsys.readouterr().err.split())
