"""The output folder is full, read-only or gone: the last checkpoint stays, and the message names the folder."""

import re
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from tests.runs import SCRIPTS, Job, Run, differing, names, read_metrics, read_tensors, wait_until

ENDLESS = "--max_train_steps 100000"
KEPT = "What was saved before is as it was: once that is mended, go on with --resume_from_checkpoint latest."


def steps_saved(out: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder."""
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


def limit_files(job: Job, size: int) -> None:
    """Let no file of a run grow beyond some bytes, as on a disk that is all but full; its log is one of them."""
    psutil.Process(job.pid).rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))


def check_refusal(run: Run, words: str) -> None:
    """Check that a run ended with a message that begins like this, names the room, and is no traceback."""
    assert run.code == 1 and "Traceback" not in run.text, run.text
    assert re.search(rf"error: {words} could not be written: .*\. \d+\.\d\d GB are free there\.", run.stderr), (
        run.stderr
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_full_for_the_result(trainer, tmp_path, script):
    """The old result and the checkpoint stay whole, and once there is room the new result is written."""
    flags = "--checkpointing_steps 1 --max_train_steps"
    out = trainer.run(script, tmp_path / "out", f"{flags} 1").out
    before = read_tensors(out)
    job = trainer.start(script, out, f"{flags} 2 --checkpointing_steps 9 --resume_from_checkpoint latest")
    limit_files(job, 20_000)
    run = job.finish()
    check_refusal(run, re.escape(str(out)))
    assert KEPT in run.stderr and not list(out.glob(".saving-*"))
    assert steps_saved(out) == [1] and differing(before, read_tensors(out)) == []
    trainer.run(script, out, f"{flags} 2 --resume_from_checkpoint latest")
    assert differing(before, read_tensors(out)) != []


def test_a_disk_that_is_full_for_the_metrics(trainer, tmp_path):
    """Every line but the last is whole, and the run can be gone on with."""
    out = trainer.run("lora", tmp_path / "out", "--checkpointing_steps 2").out
    job = trainer.start("lora", out, f"{ENDLESS} --resume_from_checkpoint latest")
    limit_files(job, 6_000)
    check_refusal(job.finish(), re.escape(str(out / "metrics.jsonl")))
    assert steps_saved(out) == [2] and len(read_metrics(out)) > 10
    run = trainer.run("lora", out, "--max_train_steps 4 --resume_from_checkpoint latest")
    assert [line["step"] for line in read_metrics(run.out)] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="rights are dropped by a call of Linux")
def test_a_folder_that_becomes_read_only(trainer, tmp_path):
    """The message is the system's, and the last checkpoint stays."""
    flags = f"{ENDLESS} --checkpointing_steps 2 --checkpoints_total_limit 1"
    job = trainer.start("lora", tmp_path / "out", flags, "unprivileged")
    wait_until(lambda: steps_saved(job.out), "a checkpoint")
    job.out.chmod(0o500)
    run, steps = job.finish(), steps_saved(job.out)
    job.out.chmod(0o700)
    check_refusal(run, rf"{job.out}/checkpoint-\d+")
    assert "Permission denied" in run.stderr and KEPT in run.stderr and len(steps) == 1
    more = f"--max_train_steps {steps[0] + 1} --resume_from_checkpoint latest"
    assert len(read_metrics(trainer.run("lora", job.out, more).out)) == steps[0] + 1


@pytest.mark.parametrize("way", ["moved", "replaced"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_vanishes(trainer, tmp_path, script, way):
    """Nothing is written into another folder of its name, and what was moved away can be gone on with."""
    flags = f"{ENDLESS} --checkpointing_steps 2 --validation_prompt dog --validation_steps 2"
    flags += " --num_validation_images 1 --validation_num_inference_steps 2"
    job, elsewhere = trainer.start(script, tmp_path / "out", flags), tmp_path / "elsewhere"
    wait_until(lambda: steps_saved(job.out), "a checkpoint")
    job.out.rename(elsewhere)
    if way == "replaced":
        job.out.mkdir()
    run = job.finish()
    check_refusal(run, rf"{job.out}/(metrics\.jsonl|samples/.*|checkpoint-\d+)")
    assert not job.out.exists() or not [path for path in job.out.rglob("*") if path.suffix == ".safetensors"]
    step = steps_saved(elsewhere)[-1]
    more = f"--max_train_steps {step + 1} --resume_from_checkpoint latest"
    assert len(read_metrics(trainer.run(script, elsewhere, more).out)) == step + 1


def test_a_base_model_that_is_gone_at_the_end(trainer, tiny, tmp_path):
    """The result needs its other parts; what was learned is in a checkpoint, and the result is saved later."""
    model = shutil.copytree(tiny, tmp_path / "model")
    flags = f"--pretrained_model_name_or_path {model} --max_train_steps 40"
    whole = trainer.run("full", tmp_path / "whole", flags).out
    job = trainer.start("full", tmp_path / "out", flags)
    wait_until(lambda: job.steps_logged() > 1, "a step")
    model.rename(tmp_path / "elsewhere")
    run = job.finish()
    assert run.code == 1 and "Traceback" not in run.text and steps_saved(job.out) == [40]
    assert (
        "Training is saved in checkpoint-40. Fix the problem, then resume from it to write the result." in run.stderr
    )
    (tmp_path / "elsewhere").rename(model)
    trainer.run("full", job.out, f"{flags} --resume_from_checkpoint latest")
    assert differing(read_tensors(whole), read_tensors(job.out)) == []


def test_without_a_checkpoint_none_is_promised(trainer, tmp_path):
    """The message does not send anybody to what is not there."""
    job = trainer.start("full", tmp_path / "out")
    limit_files(job, 20_000)
    run = job.finish()
    check_refusal(run, re.escape(str(job.out)))
    assert "What was saved before is as it was: there was no checkpoint yet." in run.stderr


@pytest.mark.parametrize("name", ["file/out", "file"])
def test_a_folder_that_cannot_be_made(trainer, tmp_path, name):
    """It is said before anything is loaded."""
    (tmp_path / "file").write_text("mine")
    run = trainer.start("lora", tmp_path / name).finish()
    assert run.code in (1, 2) and f"--output_dir {tmp_path / name}" in run.stderr and "Traceback" not in run.text
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
