"""Networks in parts: FSDP 2 with two processes on a CPU does what one process does, and its files are the same."""

import shutil

import pytest
import torch

from tests.if_models import flags_of, write_models
from tests.runs import HOWS, ROOT, SCRIPTS, differing, names, read_metrics, read_optimizer, read_tensors, untimed
from utils.core.errors import UserError
from utils.devices import accelerator_setup, zero_stages

HOWS["fsdp"] = (
    f"-m accelerate.commands.launch --config_file {ROOT}/configs/fsdp2.yaml --mixed_precision no --main_process_port 0"
)
STEPS = "--max_train_steps 3 --checkpointing_steps 2"
PREVIEWS = "--validation_prompt dog --num_validation_images 3 --validation_num_inference_steps 2"


PROBE = """
import torch
from diffusers import UNet2DConditionModel
from pathlib import Path
from utils.devices.accelerator_setup import connect

accelerator = connect(None, 1, [], ".", Path("logs"))
unet = UNet2DConditionModel.from_pretrained("MODEL", subfolder="unet")
unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters()))
held = sum(weight.to_local().numel() for weight in unet.parameters())
print("held %.2f" % (held / sum(weight.numel() for weight in unet.parameters())))
"""


@pytest.fixture(scope="module")
def runs(trainer, tmp_path_factory):
    """Run both scripts in two processes that each hold a part, one process beside each; LoRA on IF's stage I."""
    folder, monkeypatch = tmp_path_factory.mktemp("many"), pytest.MonkeyPatch()
    models = write_models(folder / "models")
    flags = {"full": f"{STEPS} {PREVIEWS}", "lora": flags_of(models, "if1", f"{STEPS} {PREVIEWS}")}
    parts = [
        trainer.start(script, folder / script / "two", f"{flags[script]} --train_batch_size 1", "fsdp")
        for script in SCRIPTS
    ]
    whole = [trainer.start(script, folder / script / "one", flags[script]) for script in SCRIPTS]
    (folder / "probe.py").write_text(PROBE.replace("MODEL", str(trainer.model)))
    monkeypatch.setitem(SCRIPTS, "probe", str(folder / "probe.py"))
    probe = trainer.start_words("probe", folder / "probe", [], "fsdp")
    monkeypatch.undo()
    for run in [job.finish() for job in [*parts, *whole, probe]]:
        assert run.code == 0, run.text
    (folder / "held").write_text(run.stdout)
    # What is left of a run that was killed after its checkpoint.
    for script in SCRIPTS:
        for name in ("checkpoint-2", "metrics.jsonl"):
            copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
            (folder / script / "resumed").mkdir(exist_ok=True)
            copy(folder / script / "two" / name, folder / script / "resumed" / name)
    flags = {script: f"{flags[script]} --train_batch_size 1 --resume_from_checkpoint latest" for script in SCRIPTS}
    again = [trainer.start(script, folder / script / "resumed", flags[script], "fsdp") for script in SCRIPTS]
    for run in [job.finish() for job in again]:
        assert run.code == 0 and "2 of 3 steps are done" in run.stderr, run.text
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_with_parts_do_what_one_does(runs, script):
    """The same losses, the same files with the same tensors, and all previews, whichever process draws them."""
    one, two = runs / script / "one", runs / script / "two"
    # Before the result is gathered, which one process alone could not make good, the last step is saved.
    assert sorted([*names(one), "checkpoint-3"]) == names(two)
    assert names(one / "checkpoint-2") == names(two / "checkpoint-2")
    assert names(one / "samples" / "step-000003") == names(two / "samples" / "step-000003")
    assert [line["step"] for line in read_metrics(two)] == [1, 2, 3]
    for line, other in zip(untimed(one), untimed(two), strict=True):
        assert line == pytest.approx(other, abs=1e-5, rel=1e-4)
    for mine, theirs in (
        (read_tensors(one), read_tensors(two)),
        (read_tensors(one / "checkpoint-2"), read_tensors(two / "checkpoint-2")),
        (read_optimizer(one / "checkpoint-2"), read_optimizer(two / "checkpoint-2")),
    ):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_with_parts_ends_like_one_that_never_stopped(runs, script):
    """To the bit: weights, losses and what the optimizer remembers."""
    two, resumed = runs / script / "two", runs / script / "resumed"
    assert differing(read_tensors(two), read_tensors(resumed)) == []
    assert untimed(two) == untimed(resumed)


def test_the_networks_are_in_parts(runs):
    """It is FSDP that has run, and not data parallelism, which accelerate takes on CPUs without a word."""
    assert (runs / "held").read_text().count("held 0.5") == 2


def test_what_does_not_go_with_parts_is_refused_by_name(trainer, tmp_path):
    """All at once, before anything is loaded."""
    flags = "--train_text_encoder --use_8bit_adam --prior_target base_prediction --with_prior_preservation"
    run = trainer.run("lora", tmp_path / "out", flags, code=2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    for flag in ("--train_text_encoder", "--use_8bit_adam", "--prior_target base_prediction"):
        assert f"{flag} cannot be used under FSDP" in run.stderr


def test_the_first_fsdp_is_refused(monkeypatch):
    """It is what accelerate takes unless it is told the second one."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(UserError, match=r"^accelerate is set to FSDP 1, instead of fsdp_version 2"):
        accelerator_setup.check_engine()
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator_setup.check_engine()


def test_what_does_not_go_with_deepspeed_is_refused_by_name(monkeypatch):
    """Its own settings must not contradict the flags, which it would pass over."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    problems = " ".join(zero_stages.find_unsupported({"max_grad_norm": 1.0, "validation_prompt": "a dog"}))
    assert "--max_grad_norm 1.0: give gradient_clipping, 0.5, the same" in problems
    assert "--validation_prompt cannot be used under ZeRO-3" in problems
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    flags = {"max_grad_norm": 0.5, "validation_prompt": "a dog"}
    assert [
        problem for problem in zero_stages.find_unsupported(flags) if not problem.endswith("pip install deepspeed.")
    ] == []
