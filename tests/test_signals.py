"""Signals, and the launcher's death, in every phase of a run: what is saved, what is said, and that nothing stays.

Signals to a training loop in one process are in test_faults.py.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.hub_server import USER, WRITE_TOKEN, HubServer
from tests.runs import CLASS_PROMPT, SCRIPTS, Job, names, read_metrics, wait_until
from utils.devices.graceful_stop import BEFORE, IN_LOOP
from utils.hub import publish

ENDLESS = "--max_train_steps 100000"
PRIOR = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --sample_batch_size 1"
STOPPING = f"Stopping: {IN_LOOP}"


def checkpoint_steps(out: Path) -> list[int]:
    """Return the steps of the checkpoints that lie in a folder."""
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


def check_begun(out: Path, job: Job, code: int) -> None:
    """Check that a run ended with a code before its loop, without a word too many or anything that looks trained."""
    run = job.finish()
    assert run.code == code, run.text
    assert run.stderr.count(f"Stopping: {BEFORE}") == 1 and "Traceback" not in run.text
    assert not {"metrics.jsonl", "unet", "pytorch_lora_weights.safetensors"} & set(names(out))
    assert checkpoint_steps(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_while_class_images_are_drawn(trainer, tmp_path, script, number):
    """Those that are drawn are whole and stay; the next run draws the others."""
    out, drawn = tmp_path / "out", tmp_path / "drawn"
    flags = f"{PRIOR} --class_data_dir {drawn}"
    job = trainer.start(script, out, f"{flags} --num_class_images 5000")
    wait_until(lambda: len(list(drawn.glob("[0-9]*.png"))) > 1, "two class images")
    os.kill(job.pid, number)
    check_begun(out, job, 128 + number)
    count = len([Image.open(path).load() for path in drawn.iterdir() if path.suffix == ".png"])
    assert sorted(set(names(drawn)) - {".prompt"}) == [f"{index:05d}.png" for index in range(count)]
    run = trainer.run(script, out, f"{flags} --num_class_images {count + 1} --max_train_steps 1")
    assert f"Drawing 1 class images of {CLASS_PROMPT!r}" in run.stderr


def test_while_prompts_are_encoded(trainer, tiny, tmp_path):
    """A slow text encoder is not waited for; what it has encoded is kept."""
    model, cache = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "cache"
    config = CLIPTextConfig.from_pretrained(tiny / "text_encoder")
    config.num_hidden_layers = 400
    shutil.rmtree(model / "text_encoder")
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    flags = f"--pretrained_model_name_or_path {model} --pre_compute_text_embeddings --cache_dir {cache}"
    job = trainer.start("lora", tmp_path / "out", f"{flags} --validation_prompt dog --validation_negative_prompt cat")
    wait_until(lambda: cache.exists() and any(cache.glob("*.safetensors")), "an embedding")
    os.kill(job.pid, signal.SIGTERM)
    check_begun(tmp_path / "out", job, 143)
    assert 0 < len(list(cache.iterdir())) < 3 and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_while_previews_are_drawn(trainer, tmp_path, script):
    """The picture that is begun is drawn, the others are not, and the step that comes next is saved."""
    flags = "--validation_prompt dog --validation_num_inference_steps 3 --validation_steps 2"
    job = trainer.start(script, tmp_path / "out", f"{flags} --num_validation_images 400 --max_train_steps 3")
    previews = job.out / "samples" / "step-000002"
    wait_until((job.out / "samples" / "step-000000" / "01.png").exists, "a preview of the untrained model")
    os.kill(job.pid, signal.SIGINT)
    run = job.finish()
    assert (run.code, run.stderr.count(STOPPING)) == (130, 1) and "Traceback" not in run.text
    assert checkpoint_steps(job.out) == [1] and len(read_metrics(job.out)) == 1
    assert 1 < len(names(job.out / "samples" / "step-000000")) < 400 and not previews.exists()
    job = trainer.start(
        script, job.out, f"{flags} --num_validation_images 400 --max_train_steps 3 --resume_from_checkpoint latest"
    )
    wait_until((previews / "01.png").exists, "a preview")
    os.kill(job.pid, signal.SIGINT)
    run = job.finish()
    assert run.code == 130 and "--resume_from_checkpoint checkpoint-3" in run.stderr
    assert checkpoint_steps(job.out) == [1, 3] and len(read_metrics(job.out)) == 3
    drawn = names(previews)
    assert "grid.png" in drawn and 2 < len(drawn) < 400


@pytest.mark.parametrize("script", SCRIPTS)
def test_while_a_checkpoint_is_saved(trainer, tmp_path, script):
    """It is saved in full, and so is the step after it."""
    job = trainer.start(script, tmp_path / "out", f"{ENDLESS} --checkpointing_steps 3")
    wait_until(lambda: any(job.out.glob(".saving-[0-9]*")), "a save")
    os.kill(job.pid, signal.SIGTERM)
    assert job.finish().code == 143
    steps = checkpoint_steps(job.out)
    assert steps[-1] == len(read_metrics(job.out)) and not list(job.out.glob(".saving-*"))
    states = [json.loads((job.out / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in steps]
    assert [state["step"] for state in states] == steps


def test_a_second_signal_does_not_wait_for_the_step(trainer, tmp_path):
    """It ends a step of many micro-steps at once, with the number of that signal, and nothing is saved."""
    job = trainer.start("lora", tmp_path / "out", "--gradient_accumulation_steps 100000")
    wait_until((tmp_path / "out" / "metrics.jsonl").exists, "the loop")
    os.kill(job.pid, signal.SIGINT)
    wait_until(lambda: STOPPING in job.printed("stderr"), "the first signal's answer")
    time.sleep(1.1)
    os.kill(job.pid, signal.SIGTERM)
    assert job.finish().code == 143
    assert checkpoint_steps(job.out) == [] and read_metrics(job.out) == []


def test_slurms_warning_saves_a_checkpoint(trainer, tmp_path):
    """`--signal=USR1` comes before the time limit."""
    job = trainer.start("full", tmp_path / "out", ENDLESS)
    wait_until(lambda: job.steps_logged() >= 2, "two steps")
    os.kill(job.pid, signal.SIGUSR1)
    assert job.finish().code == 128 + signal.SIGUSR1
    assert checkpoint_steps(job.out) == [len(read_metrics(job.out))]


def test_while_the_result_is_uploaded(trainer, tmp_path):
    """The run ends at once though the Hub keeps it waiting; the result is there, and the command that uploads it."""
    with HubServer() as server:
        server.fail("/commit/", status="hang")
        variables = server.environment(tmp_path / "home", WRITE_TOKEN) | {"HF_HUB_OFFLINE": "0"}
        job = trainer.start("lora", tmp_path / "out", "--push_to_hub", "python", **variables)
        wait_until(lambda: any("/commit/" in request.path for request in server.requests), "the upload")
        os.kill(job.pid, signal.SIGTERM)
        run = job.finish()
    words = publish.say_how_to_upload(job.out, f"{USER}/out")
    assert (run.code, run.stderr.count(f"Stopping: {words}")) == (143, 1) and "Traceback" not in run.text
    assert (job.out / "pytorch_lora_weights.safetensors").exists() and (job.out / "README.md").exists()


# Launched processes.


def family(job: Job) -> list[psutil.Process]:
    """Return the launcher and all that it has started."""
    return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def launched(trainer, tmp_path_factory) -> dict[str, Job]:
    """Start the launched runs of this module at once, because most of their time is that of importing."""
    folder = tmp_path_factory.mktemp("launched")
    drawing = f"{PRIOR} --num_class_images 5000"
    runs = {
        "in the loop": ("full", "accelerate", ENDLESS),
        "while drawing": ("lora", "accelerate", drawing),
        "two processes": ("lora", "two processes", f"{ENDLESS} --train_batch_size 1"),
    }
    return {name: trainer.start(script, folder / name, flags, how) for name, (script, how, flags) in runs.items()}


def test_the_launcher_is_killed_in_the_loop(launched):
    """The trainer notices within a step, saves a checkpoint, and ends."""
    job = launched["in the loop"]
    wait_until(lambda: job.steps_logged() > 1, "a step")
    processes = family(job)
    os.kill(job.pid, signal.SIGKILL)
    assert len(processes) == 2 and psutil.wait_procs(processes[1:], timeout=30)[1] == []
    assert f"The launcher has ended. Stopping: {IN_LOOP}" in job.printed("stderr")
    assert checkpoint_steps(job.out) == [len(read_metrics(job.out))]


def test_the_launcher_is_killed_while_class_images_are_drawn(launched):
    """The trainer ends after the picture that it draws."""
    job = launched["while drawing"]
    wait_until(lambda: len(list((job.out / "class_images").glob("[0-9]*.png"))) > 1, "two class images")
    processes = family(job)
    os.kill(job.pid, signal.SIGKILL)
    assert len(processes) == 2 and psutil.wait_procs(processes[1:], timeout=30)[1] == []
    assert f"The launcher has ended. Stopping: {BEFORE}" in job.printed("stderr")
    assert len(list((job.out / "class_images").glob("[0-9]*.png"))) < 5000 and checkpoint_steps(job.out) == []


def test_all_processes_stop_at_the_same_step(launched):
    """Both end after the same step and save one checkpoint; the wish and the way on are said once."""
    job = launched["two processes"]
    wait_until(lambda: job.steps_logged() > 1, "a step")
    processes = family(job)
    assert len(processes) >= 3
    os.kill(job.pid, signal.SIGTERM)
    assert job.finish().code != 0 and psutil.wait_procs(processes, timeout=30)[1] == []
    (step,), printed = checkpoint_steps(job.out), job.printed("stderr")
    assert [line["step"] for line in read_metrics(job.out)] == list(range(1, step + 1))
    assert printed.count(STOPPING) == 1
    assert re.findall(r"Go on by the same command with --resume_from_checkpoint (\S+)\.", printed) == [
        f"checkpoint-{step}"
    ]
