"""Several processes: one that fails ends the others, with the first error shown; engines that are not supported."""

import inspect
import re
import shutil
import signal

import accelerate
import psutil
import pytest

from tests.runs import SCRIPTS, Job, wait_until
from utils.core.errors import UserError
from utils.devices import accelerator_setup

ENDLESS = "--max_train_steps 100000 --train_batch_size 1"


def ranks(job: Job) -> dict[str, psutil.Process]:
    """Return a launched run's trainers by their rank."""
    children = psutil.Process(job.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


@pytest.fixture(scope="module")
def failing(trainer, tmp_path_factory) -> dict[str, Job]:
    """Start the launched runs of this module at once, because most of their time is that of importing."""
    folder = tmp_path_factory.mktemp("failing")
    runs = {"killed": ("lora", ENDLESS), "full disk": ("full", f"{ENDLESS} --checkpointing_steps 20")}
    return {
        name: trainer.start(script, folder / name, flags, "two processes") for name, (script, flags) in runs.items()
    }


def test_a_process_that_is_killed_ends_the_others(failing):
    """As by the system when memory runs out: none waits for it for ever, and none stays behind."""
    job = failing["killed"]
    wait_until(lambda: job.steps_logged() > 1, "a step")
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    trainers = ranks(job)
    assert sorted(trainers) == ["0", "1"]
    trainers["1"].send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family[1:], timeout=60)[1] == []
    run = job.finish()
    assert run.code != 0 and "Signal 9 (SIGKILL)" in run.stderr


def test_a_process_that_fails_ends_the_others_and_says_why(failing):
    """The first error is there in words; the other process, which waits for this one, does not for ever."""
    job = failing["full disk"]
    wait_until(lambda: job.steps_logged() > 1, "a step")
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    ranks(job)["0"].rlimit(psutil.RLIMIT_FSIZE, (20_000, psutil.RLIM_INFINITY))
    assert psutil.wait_procs(family[1:], timeout=60)[1] == []
    run = job.finish()
    assert run.code != 0 and re.search(rf"error: {job.out}/\S+ could not be written: .* GB are free", run.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
def test_photos_that_vanish_are_named_also_by_a_data_worker(trainer, photos, tmp_path, script):
    """The message has no traceback, not even the worker's."""
    shutil.copytree(photos, tmp_path / "photos")
    flags = f"--instance_data_dir {tmp_path / 'photos'} --max_train_steps 100000 --dataloader_num_workers 1"
    job = trainer.start(script, tmp_path / "out", flags)
    wait_until((job.out / "args.json").exists, "the start")
    shutil.rmtree(tmp_path / "photos")
    run = job.finish()
    assert run.code == 1 and "Traceback" not in run.text
    assert f"error: {tmp_path}/photos/" in run.stderr and "cannot be read as an image: No such file" in run.stderr


# Engines.


@pytest.mark.parametrize("engine", accelerator_setup.ENGINES)
def test_an_engine_that_is_not_supported_is_refused_by_name(trainer, tmp_path, engine):
    """Before anything is loaded or written, with or without its packages."""
    run = trainer.run("lora", tmp_path / "out", code=1, **{engine: "true"})
    name = accelerator_setup.ENGINES[engine]
    assert f"accelerate is set to {name}, which this script does not support" in run.stderr
    assert run.stderr.startswith("error: ") and "Traceback" not in run.text and not (tmp_path / "out").exists()


def test_engines_and_compilers_are_named_together(monkeypatch):
    """All that is asked for is in one message; what is switched off is not."""
    for name, value in {
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
        "ACCELERATE_DYNAMO_BACKEND": "inductor",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^accelerate is set to Megatron-LM with torch\.compile by INDUCTOR, which"):
        accelerator_setup.check_engine()
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "false")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    accelerator_setup.check_engine()


def test_the_variables_are_those_that_the_launcher_sets():
    """A launcher that renamed them would be believed to ask for nothing."""
    source = inspect.getsource(accelerate.utils.launch)
    assert [name for name in accelerator_setup.ENGINES if f'"{name}"' not in source] == []
