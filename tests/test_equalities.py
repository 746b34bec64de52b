"""What must not change a run: resuming, caching, workers, previews, processes; compared bit by bit."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import (
    CLASS_PROMPT,
    PRIOR_FLAGS,
    PROMPT,
    SCRIPTS,
    SEED,
    SIZE,
    Run,
    differing,
    names,
    read_metrics,
    read_optimizer,
    read_tensors,
    untimed,
)

RANDOM = "--random_flip --lr_scheduler cosine --lr_warmup_steps 1"  # what depends on the visit and on the step
VALIDATION = (
    "--validation_prompt 'a photo of sks dog on grass' --num_validation_images 2 --validation_num_inference_steps 3"
)
RESUMED = {  # after step 2 of 5, in the middle of an epoch of 3 micro-steps
    "plain": "",
    "workers": "--dataloader_num_workers 2",
    "prior": f"{PRIOR_FLAGS} --class_data_dir {{class_images}}",
    "text encoder": "--train_text_encoder --text_encoder_lr 1e-4",
    "accumulation": "--gradient_accumulation_steps 2",
    "8-bit Adam": "--use_8bit_adam",
    "bf16": "--mixed_precision bf16",
    "prompts encoded in the loop": "--no-pre_compute_text_embeddings",
    "previews": f"{VALIDATION} --validation_steps 2",
    "dropout": "--lora_dropout 0.3",
}


def continue_from(out: Path, step: int, other: Path) -> Path:
    """Make the folder of a run that was killed some time after saving a checkpoint, from one that was not."""
    other.mkdir()
    shutil.copytree(out / f"checkpoint-{step}", other / f"checkpoint-{step}")
    shutil.copy(out / "metrics.jsonl", other)
    return other


def assert_same_end(one: Path, other: Path, checkpoint: str = "") -> None:
    """Check that two runs ended in the same bits: result, metrics and, if one is named, the last checkpoint."""
    assert differing(read_tensors(one), read_tensors(other)) == []
    assert untimed(one) == untimed(other)
    if checkpoint:
        assert differing(read_tensors(one / checkpoint), read_tensors(other / checkpoint)) == []
        assert differing(read_optimizer(one / checkpoint), read_optimizer(other / checkpoint)) == []


# Resuming.


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_equals_uninterrupted(trainer, class_images, tmp_path, case):
    """A run that goes on from a checkpoint ends in the bits of one that never stopped."""
    flags = f"{RANDOM} --max_train_steps 5 --checkpointing_steps 2 {RESUMED[case].format(class_images=class_images)}"
    scripts = [script for script in SCRIPTS if not (case == "dropout" and script == "full")]
    wholes = trainer.run_all({tmp_path / script: (script, flags) for script in scripts})
    parts = [continue_from(whole, 2, tmp_path / f"{whole.name}-part") for whole in wholes]
    jobs = [
        trainer.start(*pair, f"{flags} --resume_from_checkpoint latest") for pair in zip(scripts, parts, strict=True)
    ]
    for whole, job in zip(wholes, jobs, strict=True):
        assert_resumed(whole, job.finish())


def assert_resumed(whole: Path, run: Run) -> None:
    """Check that a run of 5 steps, resumed at step 2, ended as the whole one did."""
    assert run.code == 0, run.text
    assert "2 of 5 steps are done" in run.stderr
    assert len(read_metrics(whole)) == 5
    assert_same_end(whole, run.out, "checkpoint-4")
    assert names(run.out) == names(whole)


def test_a_checkpoint_depends_on_its_step_alone(trainer, tmp_path):
    """A run that ends at step 2 and is then made longer equals a longer one from the start."""
    whole = trainer.run("lora", tmp_path / "whole", "--max_train_steps 4 --checkpointing_steps 4").out
    part = trainer.run("lora", tmp_path / "part", "--max_train_steps 2 --checkpointing_steps 2").out
    trainer.run("lora", part, "--max_train_steps 4 --checkpointing_steps 4 --resume_from_checkpoint checkpoint-2")
    assert_same_end(whole, part, "checkpoint-4")


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_a_finished_run_trains_nothing_and_says_so(trainer, tmp_path, script):
    """A finished run that is resumed keeps its weights and metrics, and makes its result again."""
    out = trainer.run(script, tmp_path / "out", "--checkpointing_steps 2").out
    tensors, metrics = read_tensors(out), read_metrics(out)
    run = trainer.run(script, out, "--checkpointing_steps 2 --resume_from_checkpoint latest")
    assert "Nothing is left to train" in run.stderr
    assert differing(read_tensors(out), tensors) == []
    assert read_metrics(out) == metrics
    assert [name for name in names(out) if "checkpoint" in name] == ["checkpoint-2"]


# What only saves time or memory, or looks on.


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_only_helps_changes_no_bit(trainer, tmp_path, class_images, script):
    """Prompts encoded in the loop, workers and previews leave weights and metrics as they are, to the bit."""
    common = f"{RANDOM} {PRIOR_FLAGS} --class_data_dir {class_images} --max_train_steps 4"
    others = ("--no-pre_compute_text_embeddings", "--dataloader_num_workers 1", "--dataloader_num_workers 3")
    others += (f"{VALIDATION} --validation_steps 1", f"{VALIDATION} --validation_epochs 1", "--checkpointing_steps 1")
    flags = enumerate((common, *(f"{common} {other}" for other in others)))
    plain, *changed = trainer.run_all({tmp_path / str(key): (script, text) for key, text in flags})
    for out in changed:
        assert_same_end(plain, out)
    assert names(changed[3] / "samples") == [f"step-{step:06d}" for step in range(5)]
    assert names(changed[4] / "samples") == [f"step-{step:06d}" for step in (0, 3, 4)]


def test_previews_change_no_bit_of_a_trained_text_encoder(trainer, tmp_path):
    """Drawing with the live text encoder and adapters with dropout leaves both as they were."""
    common = f"{RANDOM} --train_text_encoder --lora_dropout 0.3 --max_train_steps 3"
    flags = {"without": common, "with": f"{common} {VALIDATION} --validation_steps 1"}
    assert_same_end(*trainer.run_all({tmp_path / name: ("lora", text) for name, text in flags.items()}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_checkpointing_changes_next_to_nothing(trainer, tmp_path, script):
    """Recomputed activations give the same losses and norms, but for rounding."""
    common = "--train_text_encoder --max_train_steps 3"
    flags = {"without": common, "with": f"{common} --gradient_checkpointing"}
    outs = trainer.run_all({tmp_path / name: (script, text) for name, text in flags.items()})
    for line, other in zip(*map(untimed, outs), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


# Previews.


def draw(pipeline, sampler: str, index: int) -> np.ndarray:
    """Draw picture `index` of a round of previews by another way than the scripts do."""
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a photo of sks dog on grass",
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=4.0,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator().manual_seed(SEED + index),
    ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_previews_are_what_the_base_and_the_result_draw(trainer, tiny, tmp_path, script, sampler):
    """At step 0 the live model draws the base model's pictures, at the end those of the saved result: bit by bit."""
    flags = f"{VALIDATION} --validation_scheduler {sampler} --validation_guidance_scale 4 --train_text_encoder"
    out = trainer.run(script, tmp_path / "out", f"{flags} --validation_negative_prompt blue --max_train_steps 3").out
    assert names(out / "samples") == ["step-000000", "step-000003"]
    assert names(out / "samples" / "step-000003") == ["00.png", "01.png", "grid.png"]
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    result = diffusers.StableDiffusionPipeline.from_pretrained(tiny if script == "lora" else out)
    if script == "lora":
        result.load_lora_weights(out)
    for pipeline, step in ((base, 0), (result, 3)):
        for index in range(2):
            live = np.asarray(Image.open(out / "samples" / f"step-{step:06d}" / f"{index:02d}.png"))
            assert np.array_equal(live, draw(pipeline, sampler, index))
    assert not np.array_equal(draw(base, sampler, 0), draw(result, sampler, 0))


def test_both_scripts_begin_with_the_same_model(trainer, tmp_path):
    """Before training, adapters change neither the first loss nor a pixel."""
    outs = trainer.run_all({tmp_path / script: (script, VALIDATION) for script in SCRIPTS})
    one, other = ((out / "samples" / "step-000000" / "01.png").read_bytes() for out in outs)
    assert one == other
    assert len({read_metrics(out)[0]["loss"] for out in outs}) == 1


# Class images.


def class_flags(count: int = 5, size: int = 2) -> str:
    """Return flags that let class images be drawn, and little else."""
    return (
        f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --num_class_images {count} "
        f"--sample_batch_size {size} --max_train_steps 1"
    )


def pictures(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_class_images_depend_on_nothing_but_their_index(trainer, tmp_path):
    """Another seed, the other script and the other folder flag draw the same files, no two alike."""
    one = trainer.run("lora", tmp_path / "one", class_flags()).out / "class_images"
    trainer.run("full", tmp_path / "two", f"{class_flags()} --seed 99 --class_data_dir {tmp_path / 'other'}")
    drawn = pictures(one)
    assert list(drawn) == [f"{index:05d}.png" for index in range(5)]
    assert pictures(tmp_path / "other") == drawn
    assert len(set(drawn.values())) == 5
    assert not (tmp_path / "two" / "class_images").exists()


def test_missing_class_images_are_drawn_again_and_others_left_alone(trainer, tmp_path):
    """A deleted and a truncated class image come back as they were; more images leave the old ones untouched."""
    folder = tmp_path / "class"
    flags = f"{class_flags()} --class_data_dir {folder}"
    trainer.run("lora", tmp_path / "one", flags)
    drawn = pictures(folder)
    (folder / "00001.png").unlink()
    (folder / "00004.png").write_bytes(drawn["00004.png"][:200])
    times = {name: (folder / name).stat().st_mtime_ns for name in ("00000.png", "00002.png", "00003.png")}
    run = trainer.run("lora", tmp_path / "two", flags)
    assert "Drawing 2 class images" in run.stderr and "00004.png does not count" in run.stderr
    assert pictures(folder) == drawn
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}

    run = trainer.run("lora", tmp_path / "three", f"{class_flags(7)} --class_data_dir {folder}")
    more = pictures(folder)
    assert "Drawing 2 class images" in run.stderr
    assert {name: more.pop(name) for name in drawn} == drawn
    assert list(more) == ["00005.png", "00006.png"]
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}
    run = trainer.run("lora", tmp_path / "four", f"{class_flags(3)} --class_data_dir {folder}")
    assert "class images of 'a photo of dog' at" not in run.stderr
    assert "takes the first 3" in run.stderr


# Processes.


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_do_what_one_does(trainer, tmp_path, script):
    """Two processes with half the batch draw the same class images, log the same losses and leave one set of files."""
    common = f"{class_flags(5)} {VALIDATION} --max_train_steps 3 --checkpointing_steps 2 --report_to tensorboard"
    two = trainer.start(script, tmp_path / "two", f"{common} --train_batch_size 1", "two processes")
    one = trainer.run(script, tmp_path / "one", common).out
    run = two.finish()
    assert run.code == 0, run.text
    two = run.out
    assert names(one) == names(two)
    assert run.stdout.count("DreamBooth of") == 1
    drawn = [
        np.stack([np.array(Image.open(path), int) for path in sorted((out / "class_images").glob("*.png"))])
        for out in (one, two)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert len({picture.tobytes() for picture in drawn[1]}) == 5
    assert names(one / "samples" / "step-000000") == names(two / "samples" / "step-000000")
    assert [line["step"] for line in read_metrics(two)] == [1, 2, 3]
    for line, other in zip(untimed(one), untimed(two), strict=True):
        assert line == pytest.approx(other, abs=1e-4, rel=1e-3)
    mine, theirs = read_tensors(one), read_tensors(two)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3)


# Repeating a run.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_repeated_by_its_args_json(trainer, tmp_path, script):
    """--config repeats a run to the bit, and flags of the command line win over it, --no- forms too."""
    secret = "hf_ThisMustNotBeWritten"
    flags = f"{RANDOM} --train_text_encoder --center_crop --hub_token {secret} --adam_beta1 0.8 --max_train_steps 3"
    first = trainer.run(script, tmp_path / "first", flags).out
    text = (first / "args.json").read_text()
    assert secret not in text and "hub_token" not in text
    again = trainer.start_words(
        script, tmp_path / "again", ["--config", str(first / "args.json"), "--output_dir", str(tmp_path / "again")]
    ).finish()
    assert again.code == 0, again.text
    assert_same_end(first, again.out)
    changed = json.loads((again.out / "args.json").read_text()) | {"output_dir": str(first)}
    assert changed == json.loads(text)

    words = ["--no-center_crop", "--no-train_text_encoder", "--max_train_steps", "1", "--learning_rate=2e-3"]
    words = ["--config", str(first / "args.json"), *words, "--output_dir", str(tmp_path / "other")]
    other = trainer.start_words(script, tmp_path / "other", words).finish()
    assert other.code == 0, other.text
    kept = json.loads((other.out / "args.json").read_text())
    new = {"center_crop": False, "train_text_encoder": False, "max_train_steps": 1, "learning_rate": 2e-3}
    assert kept == json.loads(text) | new | {"output_dir": str(other.out)}
    assert len(read_metrics(other.out)) == 1 and "lr_text_encoder" not in read_metrics(other.out)[0]


def test_without_a_seed_one_is_drawn_printed_and_kept(trainer, tmp_path):
    """Two runs without --seed differ; args.json has the seed of each, with which it is repeated."""
    words = ["--pretrained_model_name_or_path", trainer.model, "--instance_data_dir", trainer.photos]
    words += ["--instance_prompt", PROMPT, *f"--resolution {SIZE} --train_batch_size 2 --report_to none".split()]
    words = [*map(str, words), "--max_train_steps", "2", "--checkpointing_steps", "1"]
    outs = [tmp_path / name for name in ("one", "two", "again")]
    seeds = []
    for out in outs[:2]:
        run = trainer.start_words("lora", out, [*words, "--output_dir", str(out)]).finish()
        assert run.code == 0, run.text
        seeds.append(json.loads((out / "args.json").read_text())["seed"])
        assert f"seed {seeds[-1]}" in run.stdout
    assert seeds[0] != seeds[1]
    assert differing(read_tensors(outs[0]), read_tensors(outs[1])) != []
    words_again = [*words, "--seed", str(seeds[0]), "--output_dir", str(outs[2])]
    assert trainer.start_words("lora", outs[2], words_again).finish().code == 0
    assert_same_end(outs[0], outs[2])
    # A run that goes on keeps its seed.
    shutil.rmtree(outs[0] / "checkpoint-2")
    words_on = [*words, "--resume_from_checkpoint", "latest", "--output_dir", str(outs[0])]
    assert trainer.start_words("lora", outs[0], words_on).finish().code == 0
    assert_same_end(outs[0], outs[2], "checkpoint-2")
