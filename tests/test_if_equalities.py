"""What must not change a run on DeepFloyd IF, and what must come out the same by another way; compared bit by bit."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.if_models import (
    PAIRS,
    PIPELINES,
    SIZE,
    STAGES,
    flags_of,
    generator_of,
    load_result,
    quiet,
    read_scheduler,
    write_models,
)
from tests.runs import (
    CLASS_PROMPT,
    PRIOR_FLAGS,
    SCRIPTS,
    SEED,
    WEIGHTS_FILE,
    differing,
    names,
    read_metrics,
    read_tensors,
    untimed,
)
from tests.test_equalities import RANDOM, assert_resumed, assert_same_end, continue_from, pictures
from utils.core.seeds import generator

WORDS = "A photo of SKS dog &amp; a <b>cat</b>!"  # which cleaning changes
VALIDATION = f"--validation_prompt '{WORDS}' --validation_negative_prompt Blue --validation_num_inference_steps 3"
EYES = {"if1": f"{VALIDATION} --num_validation_images 2", "if2": f"{VALIDATION} --num_eval_images 2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Write the tiny models."""
    return write_models(tmp_path_factory.mktemp("models"))


# Resuming.


RESUMED = {  # after step 2 of 5, in the middle of an epoch of 3 micro-steps
    "plain": ("", PAIRS),
    "prior": (f"{PRIOR_FLAGS} --class_data_dir {{class_images}}", PAIRS[3:]),
    "variance": ("--train_variance --caption_dropout 0.5", PAIRS[1:3]),
    "crops": ("--crop_style shifted_center --resolution 24x16 --dataloader_num_workers 1", PAIRS[1:2]),
    "8-bit Adam": ("--use_8bit_adam --gradient_accumulation_steps 2 --caption_dropout 0.5", PAIRS[:1]),
    "bf16": ("--mixed_precision bf16 --class_labels_conditioning timesteps", PAIRS[2:]),
    "previews": ("--validation_steps 2 {eyes}", PAIRS[1:3]),
    "one cycle": ("--lr_scheduler one_cycle --lora_dropout 0.3", PAIRS[1:2]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_equals_uninterrupted(trainer, models, class_images, tmp_path, case):
    """A run that goes on from a checkpoint ends in the bits of one that never stopped."""
    text, pairs = RESUMED[case]
    jobs = {}
    for script, stage in pairs:
        flags = text.format(class_images=class_images, eyes=EYES[stage])
        flags = flags_of(models, stage, f"{RANDOM} --max_train_steps 5 --checkpointing_steps 2 {flags}")
        jobs[script, stage] = flags, trainer.start(script, tmp_path / f"{script}-{stage}", flags)
    wholes = []
    for (script, stage), (flags, job) in jobs.items():
        whole = job.finish()
        assert whole.code == 0, whole.text
        part = continue_from(whole.out, 2, tmp_path / f"{script}-{stage}-part")
        if (whole.out / "samples").exists():
            shutil.copytree(whole.out / "samples" / "small", part / "samples" / "small") if stage == "if2" else None
        wholes.append((whole.out, trainer.start(script, part, f"{flags} --resume_from_checkpoint latest")))
    for whole, job in wholes:
        run = job.finish()
        assert_resumed(whole, run)
        for place in (whole, whole / "checkpoint-2", run.out / "checkpoint-4"):
            learned = "--train_variance" in text
            assert read_scheduler(place)["variance_type"] == ("learned_range" if learned else "fixed_small")
        if (whole / "samples").exists():
            last = "samples/step-000005"
            assert pictures(whole / last) == pictures(run.out / last)


def test_the_default_by_its_name_goes_on_from_the_default(trainer, models, tmp_path):
    """--class_labels_conditioning noise_level is what unset means: the checkpoint fits, and the end is the same."""
    flags = flags_of(models, "if2", "--checkpointing_steps 1")
    whole = trainer.run("lora", tmp_path / "whole", flags).out
    part, more = continue_from(whole, 1, tmp_path / "part"), "--class_labels_conditioning noise_level"
    assert_same_end(whole, trainer.run("lora", part, f"{flags} {more} --resume_from_checkpoint latest").out)


# What only saves time or memory, or looks on.


@pytest.mark.parametrize(("script", "stage"), PAIRS)
def test_what_only_helps_changes_no_bit(trainer, models, tmp_path, script, stage):
    """Workers, previews, saving and the flags that IF has set anyway leave weights and metrics as they are."""
    text = "--pre_compute_text_embeddings --tokenizer_max_length 77 --text_encoder_use_attention_mask"
    others = (f"{text} --dataloader_num_workers 1", f"{EYES[stage]} --validation_steps 1 --checkpointing_steps 1")
    flags = {str(key): flags_of(models, stage, f"{RANDOM} {other}") for key, other in enumerate(("", *others))}
    plain, *changed = trainer.run_all({tmp_path / key: (script, text) for key, text in flags.items()})
    for out in changed:
        assert_same_end(plain, out)


def test_gradient_checkpointing_changes_next_to_nothing(trainer, models, tmp_path):
    """Recomputed activations give the same losses and norms, but for rounding."""
    for script, stage in PAIRS[::3]:
        texts = {"without": "--train_variance", "with": "--train_variance --gradient_checkpointing"}
        flags = {tmp_path / stage / name: (script, flags_of(models, stage, text)) for name, text in texts.items()}
        for line, other in zip(*map(untimed, trainer.run_all(flags)), strict=True):
            assert line == pytest.approx(other, rel=1e-4)


# Previews.


def draw(pipeline, sampler: str, stage: str, samples: Path, index: int) -> np.ndarray:
    """Draw picture `index` of a round of previews by another way than the scripts do: from the words."""
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    small = {"image": Image.open(samples / "small" / f"{index:02d}.png")} if stage == "if2" else {}
    options = {"negative_prompt": "Blue", "num_inference_steps": 3, "guidance_scale": 4.0}
    options |= {"height": SIZE, "width": SIZE, "generator": generator_of(SEED + index)}
    return np.asarray(pipeline(WORDS, **small, **options).images[0])


PREVIEWS = [(*pair, "DDPMScheduler", "") for pair in PAIRS]
PREVIEWS += [(*pair, "DPMSolverMultistepScheduler", "--skip_save_text_encoder") for pair in PAIRS[::3]]
PREVIEWS += [(*pair, "DDPMScheduler", "--train_variance") for pair in PAIRS[1:3]]


@pytest.mark.parametrize(("script", "stage", "sampler", "flags"), PREVIEWS)
def test_previews_are_what_the_base_and_the_result_draw(trainer, models, tmp_path, script, stage, sampler, flags):
    """At step 0 the live model draws the base's pictures, at the end those of the saved result: bit by bit."""
    if script == "lora":
        flags = flags.replace("--skip_save_text_encoder", "")
    flags += f" {EYES[stage]} --validation_scheduler {sampler} --validation_guidance_scale 4 --checkpointing_steps 3"
    out = trainer.run(script, tmp_path / "out", flags_of(models, stage, f"{flags} --max_train_steps 3")).out
    samples = out / "samples"
    assert names(samples / "step-000003") == ["00.png", "01.png", "grid.png"]
    base = quiet(PIPELINES[stage].from_pretrained(models[stage]))
    if "--train_variance" not in flags:
        base.scheduler = diffusers.DDPMScheduler.from_config(base.scheduler.config, variance_type="fixed_small")
    parts = {"text_encoder": base.text_encoder} if "--skip_save" in flags else {}
    result = load_result(models[stage], out, **parts)
    for pipeline, step in ((base, 0), (result, 3)):
        for index in range(2):
            live = np.asarray(Image.open(samples / f"step-{step:06d}" / f"{index:02d}.png"))
            assert np.array_equal(live, draw(pipeline, sampler, stage, samples, index)), (step, index)
    assert not np.array_equal(draw(base, sampler, stage, samples, 0), draw(result, sampler, stage, samples, 0))
    check_checkpoint(out / "checkpoint-3", models[stage], script, result)


def check_checkpoint(folder: Path, base: Path, script: str, result) -> None:
    """Check that a checkpoint of the last step holds the result's weights and scheduler, readable as they lie."""
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == read_scheduler(folder.parent)
    if script == "full":
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        assert differing(dict(unet.state_dict()), dict(result.unet.state_dict())) == []
    else:
        assert (folder / WEIGHTS_FILE).read_bytes() == (folder.parent / WEIGHTS_FILE).read_bytes()


def test_both_scripts_begin_with_the_same_model(trainer, models, tmp_path):
    """Before training, adapters change neither the first loss nor a pixel."""
    for stage in STAGES:
        flags = flags_of(models, stage, f"{EYES[stage]} --train_variance --max_train_steps 1")
        outs = trainer.run_all({tmp_path / stage / script: (script, flags) for script in SCRIPTS})
        one, other = (pictures(out / "samples" / "step-000000") for out in outs)
        assert one == other and len(one) == 3
        assert len({read_metrics(out)[0]["loss"] for out in outs}) == 1


# Class images.


def class_flags(count: int, size: int) -> str:
    """Return flags that let class images be drawn, in batches of a size, and little else."""
    flags = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --num_class_images {count}"
    return f"{flags} --sample_batch_size {size} --max_train_steps 1"


def test_class_images_of_stage_one_are_the_models_own(trainer, models, tmp_path):
    """They are drawn from precomputed embeddings, as the base's pipeline draws them from the words."""
    out = trainer.run("full", tmp_path, flags_of(models, "if1", class_flags(1, 1))).out
    assert_same_pictures(out / "class_images", draw_class_images(models, [0]))


def test_class_images_of_stage_two_are_enlarged_ones_of_stage_one(trainer, models, tmp_path):
    """Both stages draw in turn; what is missing comes back as it was, from the other script and another seed too."""
    folder = tmp_path / "class"
    flags = f"{class_flags(3, 2)} --class_data_dir {folder} --stage_one_model_name_or_path {models['if1']}"
    trainer.run("lora", tmp_path / "one", flags_of(models, "if2", flags))
    drawn = pictures(folder)
    pipeline, small = quiet(PIPELINES["if2"].from_pretrained(models["if2"])), draw_class_images(models, [2])
    seeds = [generator("enlarged class image", 2)]
    assert_same_pictures(folder, pipeline([CLASS_PROMPT], image=small, generator=seeds).images, first=2)
    assert list(drawn) == ["00000.png", "00001.png", "00002.png"] and len(set(drawn.values())) == 3
    (folder / "00001.png").unlink()
    run = trainer.run("full", tmp_path / "two", flags_of(models, "if2", f"{flags} --seed 99"))
    assert "Drawing 1 class images" in run.stderr
    assert pictures(folder) == drawn


def draw_class_images(models: dict[str, Path], indices: list[int]) -> list[Image.Image]:
    """Draw class images as stage I's own pipeline does it from the words."""
    pipeline = quiet(PIPELINES["if1"].from_pretrained(models["if1"]))
    seeds = [generator("class image", index) for index in indices]
    return pipeline([CLASS_PROMPT] * len(indices), generator=seeds).images


def assert_same_pictures(folder: Path, wanted: list[Image.Image], first: int = 0) -> None:
    """Check that a folder holds these pictures from a number on."""
    for index, picture in enumerate(wanted, first):
        found = Image.open(folder / f"{index:05d}.png")
        assert found.size == picture.size
        assert np.array_equal(np.asarray(found), np.asarray(picture))


def test_class_images_that_are_there_are_used(trainer, models, class_images, tmp_path):
    """Stage II needs no stage I when there are enough of them."""
    run = trainer.run(
        "lora", tmp_path, flags_of(models, "if2", f"{PRIOR_FLAGS} --class_data_dir {class_images} --max_train_steps 1")
    )
    assert "Drawing" not in run.stderr and "loss_prior" in read_metrics(run.out)[0]


# The cache of embeddings.


def encoded(run) -> list[str]:
    """Return what a run says of encoding, without the folder."""
    return [line.partition(";")[0].partition("Encoding ")[2] for line in run.stderr.splitlines() if "Encoding" in line]


def test_a_second_run_needs_no_text_encoder(trainer, models, tmp_path):
    """With a filled cache T5 is not loaded, and could not be by now; what differs is encoded anew."""
    base, cache = tmp_path / "base", tmp_path / "cache"
    shutil.copytree(models["if1"], base)
    (weights,) = (base / "text_encoder").glob("*.safetensors")
    # A long header, of which samples do not see all.
    save_file(load_file(weights), weights, metadata={"format": "pt", "filler": "x" * 2**20})
    flags = f"--pretrained_model_name_or_path {base} --resolution {SIZE} --cache_dir {cache} {EYES['if1']}"
    first = trainer.run("lora", tmp_path / "first", flags)
    assert encoded(first) == ["4 of 4 prompts"]  # of the photos, of the previews, the negative and the empty one
    assert len(list(cache.glob("*.safetensors"))) == 4
    state = weights.stat()
    content = weights.read_bytes()
    with weights.open("r+b") as file:  # so that it cannot be loaded, but has the same size, time and samples
        file.seek(10 * (len(content) // 64) + 5000)
        file.write(b'"')
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = trainer.run("lora", tmp_path / "second", flags)
    assert encoded(second) == []
    assert_same_end(first.out, second.out)
    assert pictures(first.out / "samples" / "step-000002") == pictures(second.out / "samples" / "step-000002")

    for other in ("--instance_prompt 'a photo of sks cat'", "--text_encoder_precision bf16"):
        run = trainer.run("lora", tmp_path / other[2:10], f"{flags} {other}", code=1)
        assert len(encoded(run)) == 1 and "text_encoder" in run.stderr
    weights.write_bytes(content)
    run = trainer.run("full", tmp_path / "touched", f"{flags} --max_train_steps 1")
    assert encoded(run) == ["4 of 4 prompts"], "another time of the file is another text encoder"


def test_damaged_entries_are_made_anew(trainer, models, tmp_path):
    """A truncated and a swapped entry of the cache are found out, encoded again, and change nothing."""
    flags = flags_of(models, "if2", f"--cache_dir {tmp_path / 'cache'} {EYES['if2']}")
    first = trainer.run("full", tmp_path / "first", flags)
    one, two, three, _ = sorted((tmp_path / "cache").iterdir())
    # Copied: what is loaded is a view of the file.
    entries = {path: load_file(path)["embeds"].clone() for path in (one, two, three)}
    one.write_bytes(one.read_bytes()[:-5])
    shutil.copy(three, two)
    second = trainer.run("full", tmp_path / "second", flags)
    assert encoded(second) == ["2 of 4 prompts"]
    assert all(torch.equal(load_file(path)["embeds"], embeds) for path, embeds in entries.items())
    assert_same_end(first.out, second.out)


def test_two_processes_do_what_one_does(trainer, models, tmp_path):
    """Two processes with half the batch encode each prompt once, draw what one draws, and leave one set of files."""
    script, stage = "lora", "if2"
    flags = f"{class_flags(2, 1)} --stage_one_model_name_or_path {models['if1']} --caption_dropout 0.3 {VALIDATION}"
    flags = flags_of(models, stage, f"{flags} --num_validation_images 2 --max_train_steps 2 --checkpointing_steps 2")
    two = trainer.start(
        script,
        tmp_path / "two",
        f"{flags} --train_batch_size 1 --cache_dir {tmp_path / 'cache'}",
        "two processes",
    )
    one = trainer.run(script, tmp_path / "one", flags).out
    run = two.finish()
    assert run.code == 0, run.text
    assert encoded(run) == ["5 of 5 prompts"]
    assert names(one) == names(run.out) and run.stdout.count("DreamBooth of") == 1
    drawn = [
        np.stack([np.array(Image.open(path), int) for path in sorted(out.glob("class_images/0*.png"))])
        for out in (one, run.out)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    for folder in ("step-000000", "small"):
        assert names(one / "samples" / folder) == names(run.out / "samples" / folder)
    for line, other in zip(untimed(one), untimed(run.out), strict=True):
        assert line == pytest.approx(other, abs=1e-4, rel=1e-3)
    mine, theirs = read_tensors(one), read_tensors(run.out)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=4e-3)


# Captions.


def test_dropped_captions_are_the_empty_prompts(trainer, models, tmp_path):
    """With practically all captions dropped, a run equals one of whose prompt the cleaning leaves nothing."""
    flags = {
        "dropped": "--caption_dropout 0.999999",
        "empty": "--instance_prompt '*'",
        "never": "--caption_dropout 0",
        "plain": "",
    }
    outs = trainer.run_all({tmp_path / name: ("full", flags_of(models, "if1", text)) for name, text in flags.items()})
    dropped, empty, never, plain = (untimed(out) for out in outs)
    assert dropped == empty != plain == never
