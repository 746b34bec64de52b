"""What other trainers do wrong, and these must not: one test a fault, which fails on the faulty behaviour.

Three of them are comparisons, in test_equalities.py: a run resumed within an epoch that differs from the uninterrupted
one, resuming a finished run that trains one more step, full training with precomputed embeddings that cannot resume.
Another is there because it takes two processes: class images that are the same in all of them.
"""

import errno
import functools
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import diffusers
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.conftest import draw_picture
from tests.runs import (
    CLASS_PROMPT,
    PRIOR_FLAGS,
    SCRIPTS,
    SIZE,
    differing,
    names,
    read_metrics,
    read_optimizer,
    read_tensors,
    untimed,
    wait_until,
)
from utils.core import errors

ENDLESS = "--max_train_steps 100000"


def fail(error: BaseException) -> None:
    """Raise what is given."""
    raise error


def checkpoint_names(out: Path) -> list[str]:
    """Return the entries of a folder that have the word in their name."""
    return [name for name in names(out) if "checkpoint" in name]


def written_steps(out: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")), default=0)


# The loss.


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_min_snr_with_prior_preservation_works_at_any_batch_size(trainer, class_images, tmp_path, batch):
    """A gamma above every ratio weighs nothing down, so it leaves both losses as they are."""
    flags = f"{PRIOR_FLAGS} --class_data_dir {class_images} --train_batch_size {batch}"
    texts = {"without": flags, "with": f"{flags} --snr_gamma 1e9", "low": f"{flags} --snr_gamma 1e-3"}
    outs = trainer.run_all({tmp_path / name: ("lora", text) for name, text in texts.items()})
    without, same, low = (read_metrics(out)[0] for out in outs)
    for key in ("loss", "loss_instance", "loss_prior"):
        assert same[key] == pytest.approx(without[key], abs=1e-5)
        assert 0 < low[key] < 0.5 * without[key]


# Precision.


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("way", ["flag", "launcher", "class images"])
def test_fp16_on_a_cpu_is_refused_with_the_reason(trainer, tmp_path, script, way):
    """It is a mistake in the flags, found before anything is written."""
    flags = {"flag": "--mixed_precision fp16", "launcher": ""}
    flags["class images"] = f"{PRIOR_FLAGS} --prior_generation_precision fp16"
    variables = {"ACCELERATE_MIXED_PRECISION": "fp16"} if way == "launcher" else {}
    run = trainer.run(script, tmp_path / "out", flags[way], code=2, **variables)
    assert "fp16 needs a GPU" in run.stderr
    assert "Traceback" not in run.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_bf16_training_saves_is_of_one_dtype_and_draws(trainer, tiny, tmp_path, script):
    """The result of mixed precision can be loaded and used without saying a dtype."""
    flags = "--mixed_precision bf16 --train_text_encoder --checkpointing_steps 2"
    out = trainer.run(script, tmp_path / "out", flags).out
    for folder in (out, out / "checkpoint-2"):
        assert {tensor.dtype for tensor in read_tensors(folder).values()} == {torch.float32}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out if script == "full" else tiny)
    if script == "lora":
        pipeline.load_lora_weights(out)
    drawn = pipeline("a photo of sks dog", num_inference_steps=2, height=SIZE, width=SIZE, output_type="np").images
    assert np.isfinite(drawn).all() and drawn.std() > 0.01


# The schedule.


@pytest.mark.parametrize("warmup", [2, 500])
def test_a_cycle_without_a_way_down_is_refused(trainer, tmp_path, warmup):
    """A warm-up as long as the run is a mistake for one_cycle, which says what would do, and a warning for others."""
    flags = f"--lr_scheduler one_cycle --lr_warmup_steps {warmup}"
    run = trainer.run("lora", tmp_path / "out", flags, code=1)
    words = f"The warm-up of {warmup} steps is as long as the run of 2: see --lr_warmup_steps."
    assert f"{words} For one_cycle, a third of the run is usual: 1." in run.stderr and "Traceback" not in run.text
    assert not (tmp_path / "out").exists()
    run = trainer.run("lora", tmp_path / "linear", f"--lr_scheduler linear --lr_warmup_steps {warmup}")
    assert run.stderr.count(words) == 1 and "one_cycle" not in run.stderr


# Checkpoints.


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_kill_leaves_is_never_taken_for_the_latest(trainer, tmp_path, script):
    """`latest` passes over a half-written folder and one without its state, and removes the hidden one."""
    flags = "--checkpointing_steps 2 --max_train_steps 4"
    whole = trainer.run(script, tmp_path / "whole", flags).out
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", part)
    shutil.copytree(whole / "checkpoint-4", part / ".saving-4-0123abcd")
    shutil.copytree(whole / "checkpoint-4", part / "checkpoint-3")
    (part / "checkpoint-3" / "trainer_state.json").unlink()
    run = trainer.run(script, part, f"{flags} --resume_from_checkpoint latest")
    assert "checkpoint-2: 2 of 4 steps are done" in run.stderr
    assert "Passed over" in run.stderr and "checkpoint-3" in run.stderr
    assert not (part / ".saving-4-0123abcd").exists()
    assert differing(read_tensors(whole), read_tensors(part)) == []
    assert untimed(whole) == untimed(part)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_during_a_save_loses_only_what_came_after_the_last_one(trainer, tmp_path, script):
    """A run that is killed while it saves can go on, also when only one checkpoint is kept."""
    out, flags = tmp_path / "out", "--checkpointing_steps 1 --checkpoints_total_limit 1"
    job = trainer.start(script, out, f"{flags} {ENDLESS}")
    wait_until(lambda: written_steps(out) >= 2 and any(out.glob(".saving-[0-9]*")), "a save")
    os.kill(job.pid, signal.SIGKILL)
    assert job.finish().code == -signal.SIGKILL
    step = written_steps(out)
    run = trainer.run(script, out, f"{flags} --max_train_steps {step + 1} --resume_from_checkpoint latest")
    assert f"checkpoint-{step}: {step} of {step + 1} steps are done" in run.stderr
    assert checkpoint_names(out) == [f"checkpoint-{step + 1}"]
    assert [line["step"] for line in read_metrics(out)] == list(range(1, step + 2))
    assert not list(out.glob(".saving-*")) and not list(out.glob(".re*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_leaves_the_last_checkpoint(trainer, tmp_path, script):
    """No file may grow any more: the run ends with the folder and the free space, and can be gone on with."""
    job = trainer.start(script, tmp_path / "out", f"{ENDLESS} --checkpointing_steps 2 --checkpoints_total_limit 1")
    wait_until(lambda: written_steps(job.out) >= 2, "a checkpoint")
    psutil.Process(job.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, psutil.RLIM_INFINITY))
    run, step = job.finish(), written_steps(job.out)
    assert run.code == 1 and "Traceback" not in run.text
    assert re.search(rf"error: {job.out}/checkpoint-{step + 2} could not be written: .* GB are free there", run.stderr)
    assert checkpoint_names(job.out) == [f"checkpoint-{step}"] and not list(job.out.glob(".saving-*"))
    more = f"--max_train_steps {step + 1} --resume_from_checkpoint latest"
    assert len(read_metrics(trainer.run(script, job.out, more).out)) == step + 1


def test_a_disk_that_is_full_for_another_file_is_a_message_too(capsys):
    """Pictures and metrics say so without a traceback; other errors of the system keep theirs."""
    full, broken = OSError(errno.ENOSPC, "No space left on device", "grid.png"), OSError(errno.EPIPE, "Broken pipe")
    words = r"error: grid\.png could not be written: No space left on device\. \d+\.\d\d GB are free there\.\n"
    assert errors.exit_status(functools.partial(fail, full)) == 1
    assert re.fullmatch(words, capsys.readouterr().err)
    assert errors.exit_status(functools.partial(fail, OSError(errno.ENOSPC, "No space left on device"))) == 1
    assert capsys.readouterr().err == "error: A file of the run could not be written: No space left on device.\n"
    with pytest.raises(BrokenPipeError):
        errors.exit_status(functools.partial(fail, broken))


def test_ctrl_c_while_nothing_is_begun_is_no_traceback(capsys):
    """Configs are read and photos looked at before there is anything to save."""
    assert errors.exit_status(functools.partial(fail, KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: stopped before anything was begun.\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_checkpoint_is_named(trainer, tmp_path, script):
    """Weights and a state that cannot be read, or would run code, are errors that name the other checkpoints."""
    out = trainer.run(script, tmp_path / "out", "--checkpointing_steps 1").out
    weights = next((out / "checkpoint-2").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    more = "--max_train_steps 3 --resume_from_checkpoint"
    assert "is damaged: its " in trainer.run(script, out, f"{more} checkpoint-2", code=1).stderr
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    (out / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state | {"files": {}}))
    for damage in ("weights", "state"):
        run = trainer.run(script, out, f"{more} checkpoint-2", code=1)
        assert "checkpoint-2 cannot be read" in run.stderr and "Traceback" not in run.text
        assert "Other checkpoints there: checkpoint-1." in run.stderr
        if damage == "weights":
            shutil.copytree(out / "checkpoint-1", out / "checkpoint-2", dirs_exist_ok=True)
            (out / "checkpoint-2" / "optimizer.pt").write_bytes(pickle.dumps(Path.cwd))
            (out / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state | {"files": {}}))
    assert "weights_only" in run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_folders_that_only_sound_like_checkpoints_are_left_alone(trainer, tmp_path, script):
    """`checkpoint-best` and `checkpoint-1-backup` neither stop a run nor fall to the limit."""
    out = tmp_path / "out"
    for name in ("checkpoint-best", "checkpoint-1-backup"):
        (out / name).mkdir(parents=True)
        (out / name / "trainer_state.json").write_text('{"step": 1}')
    flags = "--checkpointing_steps 1 --checkpoints_total_limit 1"
    trainer.run(script, out, f"{flags} --max_train_steps 3")
    assert checkpoint_names(out) == ["checkpoint-1-backup", "checkpoint-3", "checkpoint-best"]
    trainer.run(script, out, f"{flags} --max_train_steps 4 --resume_from_checkpoint latest")
    assert checkpoint_names(out) == ["checkpoint-1-backup", "checkpoint-4", "checkpoint-best"]
    for name in ("checkpoint-best", "checkpoint-1-backup"):
        assert (out / name / "trainer_state.json").read_text() == '{"step": 1}'


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_does_not_mix_with_an_old_one(trainer, tmp_path, script):
    """A run that goes on from nothing is refused a folder with checkpoints, and changes nothing in it."""
    out = trainer.run(script, tmp_path / "out", "--checkpointing_steps 1").out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run = trainer.run(script, out, "--checkpointing_steps 1 --seed 99", code=2)
    assert "checkpoint-1, checkpoint-2" in run.stderr and "--resume_from_checkpoint latest" in run.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_of_another_kind_of_run_is_refused(trainer, tmp_path, script):
    """What would change batches or weights is named, all of it, before training."""
    out = trainer.run(script, tmp_path / "out", "--checkpointing_steps 2").out
    flags = "--seed 5 --train_batch_size 1 --train_text_encoder --max_train_steps 4 --resume_from_checkpoint latest"
    run = trainer.run(script, out, flags, code=1)
    for words in ("seed: 51 there, 5 here", "train_batch_size: 2 there, 1 here", "train_text_encoder: False there"):
        assert words in run.stderr
    assert "Traceback" not in run.text
    assert len(read_metrics(out)) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_optimizers_state_is_in_checkpoints_only(trainer, tmp_path, script):
    """What the result's own files hold is no larger than the weights, and none of them is the optimizer's."""
    out = trainer.run(script, tmp_path / "out", "--checkpointing_steps 2").out
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.pt" for path in files)
    own = [path for path in files if not path.parts[0].startswith("checkpoint-")]
    assert {path.suffix for path in own} <= {".json", ".jsonl", ".md", ".safetensors", ".txt"}
    assert not [path for path in own if "optim" in path.name or "state" in path.name]
    tensors = read_tensors(out)
    assert not [name for name in tensors if "exp_avg" in name or "moment" in name]
    base, *saved = (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        for folder in (trainer.model, out, out / "checkpoint-2")
    )
    assert saved == [base, base], "both are drawn with the base model's scheduler"


# Stopping.


def check_stopped(trainer, script: str, out: Path, printed: str) -> None:
    """Check that a stopped run has saved its last step, says how to go on, and can."""
    wait_until(lambda: written_steps(out) > 0, "the checkpoint")
    step = written_steps(out)
    assert checkpoint_names(out) == [f"checkpoint-{step}"]
    assert f"Go on by the same command with --resume_from_checkpoint checkpoint-{step}" in printed
    assert "Traceback" not in printed
    assert [line["step"] for line in read_metrics(out)] == list(range(1, step + 1))
    again = f"--max_train_steps {step + 1} --resume_from_checkpoint latest"
    trainer.run(script, out, again)
    assert [line["step"] for line in read_metrics(out)] == list(range(1, step + 2))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_saves_a_checkpoint(trainer, tmp_path, script, group, number, code):
    """Ctrl-C and SIGTERM, to the trainer alone or with its data workers, end it with a checkpoint and their code."""
    job = trainer.start(script, tmp_path / "out", f"{ENDLESS} --dataloader_num_workers 2")
    wait_until(lambda: job.steps_logged() > 1, "a step")
    (os.killpg if group else os.kill)(job.pid, number)
    run = job.finish()
    assert run.code == code, run.text
    check_stopped(trainer, script, run.out, run.stderr)


@pytest.mark.parametrize(
    ("how", "script", "send", "number", "code"),
    [
        ("python", "full", os.kill, signal.SIGINT, 130),
        ("accelerate", "lora", os.killpg, signal.SIGINT, None),
        ("accelerate", "full", os.kill, signal.SIGTERM, None),
    ],
    ids=["python", "launcher and trainer", "launcher alone"],
)
def test_a_signal_to_what_was_launched_saves_a_checkpoint(trainer, tmp_path, how, script, send, number, code):
    """Whatever a signal reaches, the trainer saves and ends; nothing is left running."""
    job = trainer.start(script, tmp_path / "out", ENDLESS, how)
    wait_until(lambda: job.steps_logged() > 1, "a step")
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    assert len(processes) == (1 if how == "python" else 2)
    send(job.pid, number)
    run = job.finish()
    assert code in (None, run.code), run.text
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    printed = job.printed("stderr")
    own = re.findall("INFO: .*", printed)  # perhaps behind the progress bar
    check_stopped(trainer, script, run.out, printed if code else "\n".join(own))


# Pictures.


@pytest.fixture
def folder_of_anything(tmp_path) -> Path:
    """Make a folder of three pictures, one of them further down, among files and folders that are none."""
    folder = tmp_path / "anything"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "empty").mkdir()
    for number, name in enumerate(("one.png", "two.JPG", "a/b/three.webp")):
        draw_picture(SIZE, SIZE, number).save(folder / name)
    draw_picture(SIZE, SIZE, 9).save(folder / ".hidden" / "four.png")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "one.txt").write_text("a dog")
    (folder / "table.csv").write_text("a,b")
    return folder


def cut_short(path: Path) -> Path:
    """Write a picture that ends too early."""
    draw_picture(SIZE, SIZE, 5).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_that_are_no_pictures_are_passed_over(trainer, folder_of_anything, tmp_path, script):
    """.DS_Store, text files and empty folders do no harm, subfolders are read."""
    run = trainer.run(script, tmp_path / "out", f"--instance_data_dir {folder_of_anything} --max_train_steps 3")
    assert "photos ........ 3 of" in run.stdout
    assert run.stderr.count(".DS_Store") == 1 and "table.csv" in run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_truncated_photos_are_named_before_training(trainer, folder_of_anything, tmp_path, script):
    """All unreadable photos are listed at once; with --skip_bad_images the others are learned."""
    bad = [cut_short(folder_of_anything / name) for name in ("bad.jpg", "a/worse.png")]
    flags = f"--instance_data_dir {folder_of_anything} --max_train_steps 3"
    run = trainer.run(script, tmp_path / "out", flags, code=1)
    assert all(str(path) in run.stderr for path in bad)
    assert "2 of 5 images" in run.stderr and "--skip_bad_images" in run.stderr
    assert "Traceback" not in run.text
    assert not (tmp_path / "out").exists()
    run = trainer.run(script, tmp_path / "out", f"{flags} --skip_bad_images")
    assert "photos ........ 3 of" in run.stdout
    assert all(str(path) in run.stderr for path in bad)


def test_only_pictures_count_as_class_images(trainer, folder_of_anything, tmp_path):
    """What is in the folder beside decodable pictures is not counted: as many are drawn as are really missing."""
    cut_short(folder_of_anything / "bad.png")
    before = names(folder_of_anything)
    flags = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --num_class_images 5 --max_train_steps 3"
    run = trainer.run("lora", tmp_path / "out", f"{flags} --class_data_dir {folder_of_anything}")
    assert "Drawing 2 class images" in run.stderr
    assert "class images .. 5 of" in run.stdout
    assert sorted(set(names(folder_of_anything)) - set(before)) == [".prompt", "00000.png", "00001.png"]


def test_deep_grey_photos_are_not_white(trainer, tmp_path):
    """A 16-bit grey photo trains as the 8-bit one that it was made of, and not as a white one."""
    grey = draw_picture(SIZE, SIZE, 3).convert("L")
    versions = {
        "deep": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "plain": grey,
        "white": Image.new("L", grey.size, "white"),
    }
    runs = {}
    for name, image in versions.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "photo.png")
        runs[tmp_path / f"{name} out"] = ("lora", f"--instance_data_dir '{tmp_path / name}'")
    assert Image.open(tmp_path / "deep" / "photo.png").mode.startswith("I")
    deep, plain, white = (untimed(out) for out in trainer.run_all(runs))
    assert deep == plain
    assert deep[0]["loss"] != white[0]["loss"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_without_photos_is_said_to_be_one(trainer, tmp_path, script):
    """The message names the flag, the folder, what was looked for and what was found; nothing is written."""
    folder = tmp_path / "photos"
    folder.mkdir()
    run = trainer.run(script, tmp_path / "out", f"--instance_data_dir {folder}", code=1)
    assert f"--instance_data_dir {folder} holds no images" in run.stderr and "It is empty." in run.stderr
    (folder / "notes.txt").write_text("none")
    run = trainer.run(script, tmp_path / "out", f"--instance_data_dir {folder}", code=1)
    assert ".jpg" in run.stderr and "Found: notes.txt." in run.stderr
    assert "num_samples" not in run.text and "Traceback" not in run.text
    assert not (tmp_path / "out").exists()


# Sharing.


def test_args_json_has_every_flag_and_no_secret(trainer, tmp_path):
    """A token given as a flag is in no file and in nothing printed."""
    secret = "hf_ThisMustNotBeWritten"
    run = trainer.run(
        "full", tmp_path / "out", f"--hub_token {secret} --checkpointing_steps 2 --report_to tensorboard"
    )
    assert secret not in run.text
    files = [path for path in run.out.rglob("*") if path.is_file()]
    assert files and not [path for path in files if secret.encode() in path.read_bytes()]
    used = json.loads((run.out / "args.json").read_text())
    assert {"seed", "learning_rate", "instance_prompt", "report_to", "checkpointing_steps"} <= used.keys()
    assert used["resolution"] == str(SIZE), "a size is a text, which may have two edges"


# Faults of our own first version.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_diverged_run_stops_before_it_saves(trainer, tmp_path, script):
    """Weights that are no numbers are in no checkpoint and in no result, and the good checkpoint stays."""
    good = trainer.run(script, tmp_path / "out", "--max_train_steps 2 --checkpointing_steps 2")
    flags = "--max_train_steps 8 --checkpointing_steps 2 --checkpoints_total_limit 1 --learning_rate 1e30"
    bad = trainer.run(script, good.out, f"{flags} --resume_from_checkpoint latest", code=1)
    assert "Training has diverged" in bad.stderr and "Traceback" not in bad.stderr
    kept = [tensor for path in good.out.glob("checkpoint-*") for tensor in read_tensors(path).values()]
    assert kept and all(tensor.isfinite().all() for tensor in kept)
    assert all(tensor.isfinite().all() for tensor in read_tensors(good.out).values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_result_is_not_overwritten_by_another_run(trainer, tmp_path, script):
    """A second run into the same folder is refused, also if it asks for a checkpoint that is not there."""
    out = trainer.run(script, tmp_path / "out", "--max_train_steps 1").out
    before = read_tensors(out)
    for flags in ("--max_train_steps 1 --seed 8", "--max_train_steps 1 --resume_from_checkpoint latest"):
        refused = trainer.run(script, out, flags, code=2)
        assert "of an earlier run" in refused.stderr
    assert differing(before, read_tensors(out)) == []


def test_class_images_of_another_prompt_or_guidance_are_not_used(trainer, tmp_path):
    """Dogs are not learned as cars; guidance changes what is drawn."""
    flags = f"--with_prior_preservation --num_class_images 2 --max_train_steps 1 --class_data_dir {tmp_path / 'class'}"
    trainer.run("lora", tmp_path / "one", f"{flags} --class_prompt 'a dog'")
    refused = trainer.run("lora", tmp_path / "two", f"{flags} --class_prompt 'a car'", code=1)
    assert "were drawn from 'a dog', not 'a car'" in refused.stderr
    assert not (tmp_path / "two").exists()
    unguided = f"{flags} --class_prompt 'a dog' --class_guidance_scale 1"
    refused = trainer.run("lora", tmp_path / "two", unguided, code=1)
    assert "were drawn from 'a dog', not 'a dog (guidance 1)'" in refused.stderr
    trainer.run("lora", tmp_path / "two", f"{unguided} --class_data_dir {tmp_path / 'other'}")
    drawn = [np.asarray(Image.open(tmp_path / folder / "00000.png"), int) for folder in ("class", "other")]
    assert abs(drawn[0] - drawn[1]).max() > 0


def test_weight_decay_of_the_resuming_command_counts(trainer, tmp_path):
    """The checkpoint's moments are restored, not its settings."""
    out = trainer.run("lora", tmp_path / "out", "--max_train_steps 1 --checkpointing_steps 1").out
    flags = "--max_train_steps 2 --checkpointing_steps 1 --adam_weight_decay 0.5 --adam_beta1 0.1"
    trainer.run("lora", out, f"{flags} --resume_from_checkpoint latest")
    state = read_optimizer(out / "checkpoint-2")
    assert state["/optimizer/param_groups/0/weight_decay"] == 0.5
    assert state["/optimizer/param_groups/0/betas"] == (0.1, 0.999)
    assert all(value == 2 for key, value in state.items() if key.endswith("/step"))


def test_a_checkpoint_of_elsewhere_does_not_open_a_folder_that_is_taken(trainer, tmp_path):
    """Going on from another run's checkpoint must not replace the result that lies in the output folder."""
    flags = "--max_train_steps 2 --checkpointing_steps 1"
    one = trainer.run("lora", tmp_path / "one", flags).out
    two = trainer.run("lora", tmp_path / "two", f"{flags} --seed 8").out
    before = read_tensors(two)
    refused = trainer.run("lora", two, f"{flags} --resume_from_checkpoint {one / 'checkpoint-1'}", code=2)
    assert "of an earlier run" in refused.stderr and differing(before, read_tensors(two)) == []
    elsewhere = trainer.run("lora", tmp_path / "new", f"{flags} --resume_from_checkpoint {one / 'checkpoint-1'}").out
    assert differing(read_tensors(one), read_tensors(elsewhere)) == []


def test_another_subject_is_no_resume(trainer, tmp_path):
    """The prompt and the photos are part of what must fit."""
    out = trainer.run("lora", tmp_path / "out", "--max_train_steps 1 --checkpointing_steps 1").out
    others = tmp_path / "others"
    others.mkdir()
    for number in range(5):
        draw_picture(SIZE, SIZE, number).save(others / f"cat-{number}.png")
    flags = (
        f"--max_train_steps 2 --resume_from_checkpoint latest --instance_data_dir {others} --instance_prompt 'a cat'"
    )
    refused = trainer.run("lora", out, flags, code=1)
    assert "photos:" in refused.stderr and "instance_prompt: a photo of sks dog there, a cat here" in refused.stderr


def test_a_closed_terminal_saves_a_checkpoint(trainer, tmp_path):
    """SIGHUP is a wish to stop like the others."""
    job = trainer.start("lora", tmp_path / "out", ENDLESS)
    wait_until(lambda: job.steps_logged() >= 2, "two steps")
    os.kill(job.pid, signal.SIGHUP)
    assert job.finish().code == 128 + signal.SIGHUP
    assert len(checkpoint_names(tmp_path / "out")) == 1


def test_previews_are_no_class_images(trainer, tmp_path):
    """An output folder below the class folder is refused."""
    flags = f"--with_prior_preservation --class_prompt 'a dog' --num_class_images 1 --class_data_dir {tmp_path}"
    refused = trainer.run("lora", tmp_path / "out", flags, code=2)
    assert "--output_dir in --class_data_dir" in refused.stderr


def test_the_launchers_precision_is_repeated(trainer, tmp_path):
    """args.json holds the precision that was used, wherever it came from."""
    out = trainer.run("lora", tmp_path / "out", "--max_train_steps 1", ACCELERATE_MIXED_PRECISION="bf16").out
    assert json.loads((out / "args.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize("script", SCRIPTS)
def test_padding_is_hidden_as_the_models_pipeline_hides_it(trainer, tiny, tmp_path, script):
    """What the text encoder's own config says counts without a flag, because it counts when the model draws."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    (model / "text_encoder" / "config.json").write_text(json.dumps(config | {"use_attention_mask": True}))
    flags = "--max_train_steps 2"
    told = trainer.run(script, tmp_path / "told", f"{flags} --text_encoder_use_attention_mask").out
    found = trainer.run(script, tmp_path / "found", f"{flags} --pretrained_model_name_or_path {model}").out
    plain = trainer.run(script, tmp_path / "plain", flags).out
    losses = [[line["loss"] for line in read_metrics(out)] for out in (told, found, plain)]
    assert losses[0] == losses[1] != losses[2]


def test_a_precision_that_is_none_of_ours_is_refused(trainer, tmp_path):
    """The launcher's fp8 is a message, not a KeyError."""
    run = trainer.run("lora", tmp_path / "out", code=2, ACCELERATE_MIXED_PRECISION="fp8")
    assert "accelerate is set to fp8" in run.stderr and "Traceback" not in run.stderr


def test_a_compiler_set_in_accelerate_is_refused_by_name(trainer, tmp_path):
    """A compiled network could not be resumed."""
    run = trainer.run("full", tmp_path / "out", code=1, how="python", ACCELERATE_DYNAMO_BACKEND="eager")
    assert "torch.compile by EAGER" in run.stderr and "Traceback" not in run.stderr
