"""LoRA on a base in fewer bits: what is saved and counted, what resumes, and what is equal."""

import json

import pytest
import torch

from tests.if_models import flags_of, write_models
from tests.runs import differing, read_metrics, read_tensors
from tests.test_equalities import RANDOM, assert_resumed, continue_from

STORED = ("bf16", "int8", "nf4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write the tiny models of both IF stages."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("stored", STORED)
def test_a_run_trains_adapters_alone_and_says_what_is_stored(trainer, tmp_path, stored):
    """The result is float32 adapters, of the same layers as on a plain base; the screen counts the same weights."""
    flags = "--max_train_steps 3 --learning_rate 1e-3"
    plain = trainer.run("lora", tmp_path / "plain", flags)
    run = trainer.run("lora", tmp_path / "stored", f"{flags} --base_model_precision {stored}")
    ours, theirs = read_tensors(run.out), read_tensors(plain.out)
    assert ours.keys() == theirs.keys() and {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert differing(ours, theirs) != []
    said = next(line for line in plain.stdout.splitlines() if "weights" in line)
    assert f"{said}, the U-Net's in {stored}" in run.stdout
    assert [line["loss"] for line in read_metrics(run.out)] == pytest.approx(
        [line["loss"] for line in read_metrics(plain.out)], rel={"bf16": 0.01, "int8": 0.01, "nf4": 0.1}[stored]
    )


def test_a_base_in_bf16_is_the_base_of_bf16_arithmetic(trainer, tmp_path):
    """With bf16 arithmetic, it is stored in bf16 anyway: no bit changes, and a note says so."""
    flags = f"{RANDOM} --max_train_steps 3 --mixed_precision bf16"
    plain = trainer.run("lora", tmp_path / "plain", flags)
    run = trainer.run("lora", tmp_path / "stored", f"{flags} --base_model_precision bf16")
    assert differing(read_tensors(plain.out), read_tensors(run.out)) == []
    assert "--base_model_precision bf16 changes nothing" in run.stderr and "changes nothing" not in plain.stderr


@pytest.mark.parametrize("flags", ["", "--gradient_checkpointing --train_text_encoder", "--mixed_precision bf16"])
def test_resumed_equals_uninterrupted(trainer, tmp_path, flags):
    """A base that is quantized again at resume is the same base."""
    flags = f"{RANDOM} --max_train_steps 5 --checkpointing_steps 2 --base_model_precision nf4 {flags}"
    whole = trainer.run("lora", tmp_path / "whole", flags).out
    part = continue_from(whole, 2, tmp_path / "part")
    assert_resumed(whole, trainer.run("lora", part, f"{flags} --resume_from_checkpoint latest"))


def test_a_checkpoint_of_another_base_precision_is_refused(trainer, tmp_path):
    """Adapters of one base are not those of another."""
    out = trainer.run("lora", tmp_path / "out", "--checkpointing_steps 2 --base_model_precision int8").out
    run = trainer.run("lora", out, "--max_train_steps 9 --resume_from_checkpoint latest", code=1)
    assert "base precision: int8 there, no_change here" in run.stderr


@pytest.mark.parametrize("stage", ["if1", "if2"])
def test_deepfloyd_if_trains_on_a_base_in_four_bits(trainer, tmp_path, models, stage):
    """Its prediction is about that of the plain base, class images and the base's prediction included."""
    prior = "--with_prior_preservation --class_prompt dog --prior_target base_prediction --base_model_precision nf4"
    flags = f"{flags_of(models, stage)} --max_train_steps 3 --gradient_checkpointing"
    plain = trainer.run("lora", tmp_path / "plain", f"{flags} {prior.removesuffix('nf4')}no_change")
    run = trainer.run("lora", tmp_path / "stored", f"{flags} {prior}")
    first = [read_metrics(one.out)[0] for one in (plain, run)]
    assert first[1]["loss_prior"] < 1e-6 and first[0]["loss_prior"] < 1e-6
    assert first[1]["loss_instance"] == pytest.approx(first[0]["loss_instance"], rel=0.2)


def test_previews_are_drawn_by_the_stored_base(trainer, tmp_path):
    """The pipeline takes the network as it is; args.json repeats the run."""
    flags = "--max_train_steps 2 --base_model_precision nf4 --validation_prompt dog --num_validation_images 1"
    run = trainer.run("lora", tmp_path / "out", f"{flags} --validation_num_inference_steps 2")
    assert (run.out / "samples" / "step-000002" / "grid.png").is_file()
    assert json.loads((run.out / "args.json").read_text())["base_model_precision"] == "nf4"
