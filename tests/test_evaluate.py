"""The evaluation from the command line: tables, files and messages."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.test_similarity import DATA_SET, write_encoders
from utils import evaluate
from utils.evaluation import exam
from utils.sampling import cascade
from utils.synthetic.random_models import make_model

SUBJECT = "quartered circle"


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    """Draw with two steps, which is enough for models with random weights."""
    monkeypatch.setattr(exam, "STEPS", 2)


def run(capsys, *words) -> str:
    """Evaluate and return what was printed."""
    assert evaluate.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_a_model_is_compared_with_its_base(tiny, tmp_path, capsys):
    """The table has a line for each measure, the JSON all of them with their errors, the sheet the pictures."""
    words = [tiny, "--base_model", tiny, "--subject", SUBJECT, "--seeds", 2, "--output", tmp_path]
    out = run(capsys, *words)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(report["measures"]) == set(exam.MEASURES)
    assert report["subject"] == SUBJECT and report["word"] == "sks" and report["seeds"] == 2
    for name, row in report["measures"].items():
        assert name in out and all(found["error"] >= 0 for found in row.values())
    # The same model twice: what does not name the subject is drawn alike.
    assert report["measures"]["other prompts obeyed"]["base"] == report["measures"]["other prompts obeyed"]["result"]
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.width > 4 * evaluate.CELL and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(exam.MEASURES)


def test_a_stage_two_is_measured_by_what_it_enlarges(tmp_path, capsys):
    """PSNR and SSIM of both models and of bilinear resizing, for each topic."""
    model = make_model(tmp_path / "if2", "tiny-if2")
    out = run(capsys, model, "--base_model", model, "--subject", SUBJECT, "--seeds", 1, "--output", tmp_path / "out")
    measures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["measures"]
    assert {f"{name}, {topic}" for name in ("PSNR", "SSIM") for topic in ("subject", "class", "others")} <= set(
        measures
    )
    for name, row in measures.items():
        assert name in out and row["base"]["error"] is None
        if "bilinear" in name:
            assert row["base"] == row["result"] and row["base"]["value"] > (15 if "PSNR" in name else 0.3)
    assert Image.open(tmp_path / "out" / "grid.png").height > 10 * 64


def test_photos_are_compared_by_the_papers_measures(tiny, photos, tmp_path, monkeypatch, capsys):
    """The result draws each prompt with the word, the base model without it; the table has all measures."""
    kind = dataclasses.replace(cascade.STABLE_DIFFUSION, num_inference_steps=1)
    monkeypatch.setattr(cascade, "STABLE_DIFFUSION", kind)
    encoders = write_encoders(tmp_path)
    (tmp_path / "prompts.txt").write_text("a {} on the beach\na red {}\n")
    words = [tiny, "--base_model", tiny, "--photos", photos, "--class_word", "dog", "--seeds", 2]
    words += ["--clip", encoders["clip"], "--dino", encoders["vit"], "--output", tmp_path / "out"]
    out = run(capsys, *words, "--prompts", tmp_path / "prompts.txt")
    measures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["measures"]
    assert list(measures) == ["CLIP-I", "CLIP-T", "DINO", "PRES", "DIV-DINO"]
    assert all(name in out for name in measures) and "Published for Stable Diffusion: DINO 0.668" in out
    assert all(abs(row["result"]["value"]) <= 1 and row["result"]["error"] >= 0 for row in measures.values())
    # Class pictures are the same model's from the same seeds, and the subject's are not.
    assert measures["PRES"]["base"] == measures["PRES"]["result"]
    assert measures["CLIP-I"]["base"] != measures["CLIP-I"]["result"]
    assert Image.open(tmp_path / "out" / "grid.png").height > 3 * evaluate.CELL
    if DATA_SET.exists():
        assert evaluate.main([*map(str, words), "--prompts", str(DATA_SET)]) == 1
        assert "has lists for object, live subject: choose one by --prompt_group." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --subject, or for photos also --photos --class_word --prompts --clip --dino."),
        (["--photos", "photos", "--clip", "clip"], "also --class_word --prompts --dino."),
        (["--subject", SUBJECT, "--clip", "clip"], "--clip has no effect with --subject."),
        (["--subject", SUBJECT, "--word", "dog"], "--word dog is unknown to the small models; they know sks ohwx"),
        (["--subject", SUBJECT, "--seeds", "0"], "--seeds 0 is out of range"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, message, capsys):
    """Before anything is loaded."""
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["nowhere", *words])
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_compared_is_refused(tiny, tmp_path, capsys):
    """A result whose base model nothing names, and one that is no result."""
    assert evaluate.main([str(tiny), "--subject", SUBJECT]) == 1
    assert f"No args.json says what {tiny} was trained from. Name it by --base_model." in capsys.readouterr().err
    assert evaluate.main([str(tmp_path), "--subject", SUBJECT]) == 1
    assert "holds neither" in capsys.readouterr().err
