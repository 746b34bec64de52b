"""Runs on data as people have it: what must be equal to the bit, what is drawn and seen, and what is said."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import draw_picture
from tests.if_models import flags_of, write_models
from tests.runs import PRIOR_FLAGS, PROMPT, SCRIPTS, SIZE, differing, names, read_metrics, read_tensors, untimed
from tests.test_equalities import assert_same_end, continue_from

STEPS = "--max_train_steps 5"
SHAPES = [(80, 64), (64, 112), (100, 90), (72, 72), (96, 70), (70, 96), (200, 66)]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Draw photos of many shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, size in enumerate(SHAPES):
        draw_picture(*size, number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Draw square photos of several sizes."""
    folder = tmp_path_factory.mktemp("squares")
    for number, edge in enumerate((64, 80, 100, 72, 66)):
        draw_picture(edge, edge, number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def white(tmp_path_factory, photos):
    """Write a white mask for each photo."""
    folder = tmp_path_factory.mktemp("white")
    for path in photos.rglob("*.*"):
        if path.suffix in (".png", ".jpg", ".webp"):
            mask = folder / path.relative_to(photos).with_suffix(".png")
            mask.parent.mkdir(exist_ok=True)
            Image.new("L", Image.open(path).size[:: -1 if path.name == "turned.jpg" else 1], 255).save(mask)
    return folder


def write_list(path: Path, *entries: dict) -> Path:
    """Write a list of concepts."""
    path.write_text(json.dumps(list(entries)))
    return path


def words_of(trainer, out: Path, flags: str) -> list[str]:
    """Return the words of a run that names no photos beside its list of concepts."""
    given = f"--resolution {SIZE} --train_batch_size 2 --seed 3 --learning_rate 1e-3 --report_to none {flags}"
    return ["--pretrained_model_name_or_path", str(trainer.model), "--output_dir", str(out), *given.split()]


# What must not change a bit.

PRIOR = f"{PRIOR_FLAGS} --class_data_dir {{class_images}}"
EQUAL = {  # flags of one run, and what the other has beside them
    "latents of a centre crop": ("--center_crop --cache_latents off", "--cache_latents auto"),
    "latents of mirrored centre crops": ("--center_crop --random_flip --cache_latents off", "--cache_latents"),
    "latents of random crops": ("--random_flip --cache_latents off", "--cache_latents on"),
    "latents of some variants": ("--latent_variants 2 --random_flip --cache_latents off", "--cache_latents on"),
    "latents and workers": ("--cache_latents off", "--cache_latents on --dataloader_num_workers 2"),
    "latents and class images": (f"{PRIOR} --cache_latents off", "--cache_latents"),
    "latents in bf16": ("--mixed_precision bf16 --cache_latents off", "--cache_latents on"),
    "white masks": ("", "--mask_data_dir {white}"),
    "white masks and Min-SNR": ("--snr_gamma 5", "--mask_data_dir {white}"),
    "buckets of squares": ("--instance_data_dir {squares}", "--crop_aspect preserve"),
    "a maximum that none reaches": ("", "--maximum_image_size 500 --target_downsample_size 400"),
    "variants of centre crops": ("--center_crop", "--latent_variants 3"),
}


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.parametrize("script", SCRIPTS)
def test_these_runs_are_equal(trainer, tmp_path, white, squares, class_images, script, case):
    """Weights and metrics after five steps are the same to the bit."""
    places = {"white": white, "squares": squares, "class_images": class_images}
    one, more = (text.format(**places) for text in EQUAL[case])
    flags = {tmp_path / "one": f"{STEPS} {one}", tmp_path / "other": f"{STEPS} {one} {more}"}
    flags = {out: (script, f"{text} --cache_dir {tmp_path / 'cache'}") for out, text in flags.items()}
    assert_same_end(*trainer.run_all(flags))
    assert (tmp_path / "cache").exists() or "latents" not in case


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_list_of_one_concept_equals_its_flags(trainer, tmp_path, white, script):
    """Photos, captions, crops, masks and class images, by flags or by a list, give the same weights."""
    flags = f"{STEPS} --random_flip {PRIOR_FLAGS} --prior_loss_weight 0.5 --crop_style shifted_center"
    one = trainer.run(script, tmp_path / "one", f"{flags} --seed 3 --mask_data_dir {white}")
    entry = {"instance_data_dir": str(trainer.photos), "instance_prompt": PROMPT, "mask_data_dir": str(white)}
    entry |= {"class_prompt": "a photo of dog", "num_class_images": 4, "prior_loss_weight": 0.5, "random_flip": True}
    path = write_list(tmp_path / "list.json", entry | {"crop_style": "shifted_center", "resolution": SIZE})
    words = words_of(trainer, tmp_path / "two", f"{STEPS} --with_prior_preservation --concepts_list {path}")
    two = trainer.start_words(script, tmp_path / "two", words).finish()
    assert two.code == 0, two.text
    assert_same_end(one.out, two.out)
    assert names(two.out / "class_images") == ["a_photo_of_dog"]
    drawn = [sorted(path.read_bytes() for path in run.out.rglob("class_images/**/*.png")) for run in (one, two)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4


RESUMED = {
    "buckets": "--instance_data_dir {shaped} --crop_aspect preserve --random_flip --cache_latents on",
    "concepts": "--with_prior_preservation --concepts_list {list} --gradient_accumulation_steps 2",
    "base prediction": "--with_prior_preservation --class_prompt dog --prior_target base_prediction",
}


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_equals_uninterrupted(trainer, tmp_path, shaped, squares, script, case):
    """A run on buckets or concepts goes on from a checkpoint with the pictures that come next."""
    one = {"instance_data_dir": str(squares), "instance_prompt": "a sks dog", "repeats": 2, "class_prompt": "a dog"}
    two = {"instance_data_dir": str(shaped), "instance_prompt": "a zwx cat", "class_prompt": "a cat", "resolution": 48}
    path = write_list(tmp_path / "list.json", one | {"num_class_images": 2}, two | {"num_class_images": 3})
    flags = f"--max_train_steps 5 --checkpointing_steps 2 {RESUMED[case].format(shaped=shaped, list=path)}"
    if case != "concepts":
        flags += f" --instance_prompt dog {'' if case == 'buckets' else f'--instance_data_dir {squares}'}"
    outs = [tmp_path / "whole", tmp_path / "part"]
    whole = trainer.start_words(script, outs[0], words_of(trainer, outs[0], flags)).finish()
    assert whole.code == 0, whole.text
    continue_from(outs[0], 2, outs[1])
    words = words_of(trainer, outs[1], f"{flags} --resume_from_checkpoint latest")
    part = trainer.start_words(script, outs[1], words).finish()
    assert part.code == 0 and "2 of 5 steps are done" in part.stderr, part.text
    assert_same_end(*outs, "checkpoint-4")


def test_other_buckets_or_concepts_do_not_resume(trainer, tmp_path, shaped):
    """The order of the pictures would be another one."""
    flags = f"--instance_data_dir {shaped} --checkpointing_steps 1"
    trainer.run("lora", tmp_path / "out", flags)
    for more in ("--crop_aspect preserve", "--repeats 2", "--prior_target base_prediction", "--resolution 72"):
        run = trainer.run("lora", tmp_path / "out", f"{flags} {more} --resume_from_checkpoint latest", code=1)
        assert "cannot be resumed: this command" in run.stderr


def test_another_size_of_all_photos_does_not_resume(trainer, tmp_path):
    """Neither a bucket that they share, nor a concept's own resolution; the screen tells such a size."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        draw_picture(96, 72, number).save(photos / f"{number}.png")
    flags = f"--instance_data_dir {photos} --checkpointing_steps 1 --crop_aspect preserve"
    run = trainer.run("lora", tmp_path / "out", flags)
    assert "sizes ......... 2 x 72x56 in 1; batches of up to 2, 100% full" in run.stdout
    more = f"{flags} --crop_aspect square --resume_from_checkpoint latest"
    assert "sizes: ['72x56', '72x56'] there, None here" in trainer.run("lora", tmp_path / "out", more, code=1).stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_changes_in_a_list_or_in_masks_is_said_where_a_run_goes_on(trainer, tmp_path, squares, script):
    """As for the flags of the same names: it holds from there on. Of a list that is the same nothing is said."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in squares.iterdir():
        Image.new("L", Image.open(path).size, 255).save(masks / path.name)
    cat = {"instance_data_dir": str(squares), "instance_prompt": "a zwx cat"}
    dog = cat | {"instance_prompt": "a sks dog", "mask_data_dir": str(masks), "loss_weight": 0.5}
    flags = "--checkpointing_steps 1 --concepts_list {} --max_train_steps"

    def said(number: int, dog: dict) -> list[str]:
        """Go on for a step, and return what is said of changes."""
        path = write_list(tmp_path / f"{number}.json", cat, dog)
        words = words_of(trainer, tmp_path / "out", f"{flags.format(path)} {number} --resume_from_checkpoint latest")
        run = trainer.start_words(script, tmp_path / "out", words[: -2 if number == 1 else None]).finish()
        assert run.code == 0, run.text
        return [line.partition("here on, ")[2] for line in run.stderr.splitlines() if "From here on" in line]

    assert said(1, dog) == said(2, dog) == []
    more = "--concepts_list, concept 2: "
    assert said(3, dog | {"loss_weight": 2, "random_flip": True}) == [
        f"{more}loss_weight is 2; it was 0.5.",
        f"{more}random_flip is True; it was False.",
    ]
    Image.new("L", (64, 64), 200).save(masks / "0.png")
    (changed, *others) = said(4, dog | {"loss_weight": 2, "random_flip": True})
    assert changed == f"the masks are others than in {tmp_path / 'out' / 'checkpoint-3'}." and not others


def test_other_regularisation_data_of_the_same_names_do_not_resume(trainer, tmp_path, squares):
    """Unlike class images, which may be drawn again, they are what they are; their captions are, too."""
    pool = shutil.copytree(squares, tmp_path / "pool")
    for path in pool.iterdir():
        path.with_suffix(".txt").write_text("a dog")
    entry = {"instance_data_dir": str(pool), "caption_strategy": "textfile", "is_regularisation_data": True}
    path = write_list(tmp_path / "l.json", {"instance_data_dir": str(squares), "instance_prompt": "a sks dog"}, entry)
    flags = f"--checkpointing_steps 1 --max_train_steps 1 --concepts_list {path}"

    def go_on(code: int) -> str:
        """Run or go on, and return what is said."""
        more = " --resume_from_checkpoint latest" if (tmp_path / "out").exists() else ""
        words = words_of(trainer, tmp_path / "out", flags + more)
        run = trainer.start_words("lora", tmp_path / "out", words).finish()
        assert run.code == code, run.text
        return run.stderr

    go_on(0), go_on(0)
    (pool / "1.txt").write_text("a cat")
    draw_picture(64, 64, 77).save(pool / "0.png")
    said = go_on(1)
    assert "\n  content of the pictures: " in said and "\n  captions: " in said and "'a cat'" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_ask_the_base_model_as_one_does(trainer, tmp_path, squares, script):
    """With a trained text encoder and the base model's prediction as the prior's target, the losses are the same."""
    flags = f"--instance_data_dir {squares} --with_prior_preservation --class_prompt 'a photo of dog'"
    flags += " --max_train_steps 4 --prior_target base_prediction --train_text_encoder --text_encoder_lr 1e-3"
    two = trainer.start(script, tmp_path / "two", f"{flags} --train_batch_size 1", "two processes")
    one = trainer.run(script, tmp_path / "one", flags).out
    run = two.finish()
    assert run.code == 0, run.text
    for line, other in zip(untimed(one), untimed(run.out), strict=True):
        assert line == pytest.approx(other, abs=1e-4, rel=1e-3)
    assert 0 < read_metrics(one)[3]["loss_prior"] < 0.1


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_see_the_pictures_of_one(trainer, tmp_path, shaped, script):
    """With buckets, short batches and cached latents, two processes log the losses of one."""
    flags = f"--instance_data_dir {shaped} --crop_aspect preserve --max_train_steps 6 --cache_latents on"
    two = trainer.start(script, tmp_path / "two", f"{flags} --train_batch_size 1", "two processes")
    one = trainer.run(script, tmp_path / "one", flags).out
    run = two.finish()
    assert run.code == 0, run.text
    counts = [round(line["samples_per_second"] * line["seconds"]) for line in read_metrics(one)]
    assert {1, 2} == set(counts), "among these steps are short batches"
    for line, other in zip(untimed(one), untimed(run.out), strict=True):
        assert line == pytest.approx(other, abs=1e-4, rel=1e-3)
    mine, theirs = read_tensors(one), read_tensors(run.out)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3)


# The cache of latents.


def test_a_cache_is_used_again_and_mended(trainer, tmp_path):
    """A second run encodes nothing; damaged, missing and foreign entries are made anew; results never differ."""
    flags = f"{STEPS} --center_crop --cache_latents --no-pre_compute_text_embeddings --cache_dir {tmp_path / 'cache'}"
    first = trainer.run("lora", tmp_path / "first", flags).out
    entries = sorted((tmp_path / "cache").iterdir())
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in entries}
    assert len(entries) == 5
    second = trainer.run("lora", tmp_path / "second", flags)
    assert_same_end(first, second.out)
    assert [path.stat().st_ino for path in entries] == [inode for _, inode in before.values()], "no file is new"
    entries[0].unlink()
    entries[1].write_bytes(entries[1].read_bytes()[:-5])
    shutil.copy(entries[3], entries[2])
    third = trainer.run("lora", tmp_path / "third", flags)
    assert_same_end(first, third.out)
    assert third.stderr.count("cannot be used and") == 2, third.stderr
    assert len(sorted((tmp_path / "cache").iterdir())) == 5


def test_two_runs_fill_a_cache_at_once(trainer, tmp_path):
    """Both of them, and a run without a cache, end in the same bits; each picture has one entry."""
    flags = f"{STEPS} --center_crop --no-pre_compute_text_embeddings --cache_dir {tmp_path / 'cache'}"
    runs = {tmp_path / name: ("lora", f"{flags} --cache_latents on") for name in ("one", "two")}
    outs = trainer.run_all(runs | {tmp_path / "plain": ("lora", f"{flags} --cache_latents off")})
    for out in outs[:2]:
        assert_same_end(out, outs[2])
    assert len(names(tmp_path / "cache")) == 5


@pytest.mark.parametrize("change", ["photo", "resolution", "filter", "stepwise"])
def test_what_latents_depend_on_is_another_entry(trainer, tmp_path, change):
    """Another photo, size or filter is encoded anew, and the run is that of one without a cache."""
    photos = tmp_path / "photos"
    shutil.copytree(trainer.photos, photos)
    common = f"--instance_data_dir {photos} --center_crop --max_train_steps 3"
    cached = f"{common} --cache_latents --cache_dir {tmp_path / 'cache'}"
    trainer.run("lora", tmp_path / "first", cached)
    known = set(names(tmp_path / "cache"))
    more = {"resolution": "--resolution 48", "filter": "--image_interpolation_mode bilinear"}.get(change, "")
    more = "--stepwise_downsampling" if change == "stepwise" else more
    if change == "photo":
        draw_picture(80, 64, 77).save(photos / "beach.png")
    outs = {tmp_path / "with": f"{cached} {more}", tmp_path / "without": f"{common} {more} --cache_latents off"}
    assert_same_end(*trainer.run_all({out: ("lora", flags) for out, flags in outs.items()}))
    assert len(set(names(tmp_path / "cache")) - known) == (1 if change == "photo" else 5)


def test_a_run_that_is_killed_while_it_encodes_leaves_a_good_cache(trainer, tmp_path):
    """Whatever was written then, the next run's result is that of a run without a cache."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(60):
        draw_picture(64, 64, number).save(photos / f"{number:02d}.png")
    common = f"--instance_data_dir {photos} --center_crop --max_train_steps 30"
    cached = f"{common} --cache_latents --cache_dir {tmp_path / 'cache'}"
    job = trainer.start("lora", tmp_path / "killed", cached)
    end = time.monotonic() + 60
    while not (tmp_path / "cache").exists() or len(names(tmp_path / "cache")) < 10:
        assert time.monotonic() < end, job.printed("stderr")
        time.sleep(0.005)
    job.kill()
    assert len(names(tmp_path / "cache")) < 65
    outs = {tmp_path / "with": cached, tmp_path / "without": f"{common} --cache_latents off"}
    assert_same_end(*trainer.run_all({out: ("lora", flags) for out, flags in outs.items()}))


def test_auto_caches_where_cuts_come_again(trainer, tmp_path):
    """Random crops of wide photos are not cached by themselves; a few variants of them are, and centre crops."""
    said = {}
    for flags in ("", "--center_crop", "--latent_variants 1", "--center_crop --cache_latents off"):
        out = tmp_path / str(len(said))
        run = trainer.run("lora", out, f"--max_train_steps 10 {flags} --cache_dir {tmp_path / 'cache'}")
        said[flags] = "Cached the latents of" in run.stderr
        # Whoever crops at random is told that this costs encoding, and what would not.
        assert ("Latents are not cached: " in run.stderr) == (flags == "")
    assert list(said.values()) == [False, True, True, False]


# What is trained on.


def test_concepts_share_class_folders_by_prompt(trainer, tmp_path, squares, shaped):
    """Two dogs and a cat need two folders; each is drawn once, and a second run draws nothing."""
    entries = [
        {"instance_data_dir": str(folder), "instance_prompt": prompt, "class_prompt": f"a {prompt[6:]}"}
        for folder, prompt in ((squares, "a sks dog"), (shaped, "a zwx dog"), (shaped, "a xyz cat"))
    ]
    path = write_list(tmp_path / "list.json", *entries)
    flags = f"--with_prior_preservation --num_class_images 3 --concepts_list {path} --max_train_steps 2"
    flags += f" --class_data_dir {tmp_path / 'classes'}"
    for name, drawn in (("one", 6), ("two", 0)):
        run = trainer.start_words("lora", tmp_path / name, words_of(trainer, tmp_path / name, flags)).finish()
        assert run.code == 0, run.text
        assert (f"Drawing {drawn} class images of 'a dog' and 'a cat'" in run.stderr) == bool(drawn)
    assert {folder: names(tmp_path / "classes" / folder) for folder in names(tmp_path / "classes")} == {
        "a_cat": [".prompt", "00000.png", "00001.png", "00002.png"],
        "a_dog": [".prompt", "00000.png", "00001.png", "00002.png"],
    }
    assert "class images .. 9 of 'a dog' or 'a cat'" in run.stdout
    assert "5 x 1 of a sks dog; 7 x 1 of a zwx dog; 7 x 1 of a xyz cat" in run.stdout


def test_a_loss_weight_of_zero_teaches_nothing(trainer, tmp_path, squares, shaped):
    """A concept without weight leaves the weights as they are; with some, it does not."""
    ends = {}
    for weight in (0.0, 1.0):
        entry = {"instance_data_dir": str(squares), "instance_prompt": "a sks dog", "loss_weight": weight}
        path = write_list(tmp_path / f"{weight}.json", entry)
        words = words_of(trainer, tmp_path / str(weight), f"--max_train_steps 2 --concepts_list {path}")
        run = trainer.start_words("lora", tmp_path / str(weight), words).finish()
        assert run.code == 0, run.text
        tensors = read_tensors(run.out)
        ends[weight] = max(tensor.abs().max().item() for name, tensor in tensors.items() if "lora_B" in name)
    assert ends[0.0] == 0 and ends[1.0] > 0


@pytest.mark.parametrize("text", ["", "--train_text_encoder", "--no-pre_compute_text_embeddings"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_base_models_prediction_is_the_priors_target(trainer, tmp_path, script, text):
    """Nothing is drawn; before the first step the prior loss is 0, afterwards it grows, and less with more weight."""
    common = f"--with_prior_preservation --class_prompt 'a photo of dog' --prior_target base_prediction {text}"
    common += " --max_train_steps 12 --learning_rate 1e-3"
    weights = (0.1, 100.0)
    outs = trainer.run_all({tmp_path / str(w): (script, f"{common} --prior_loss_weight {w}") for w in weights})
    assert not any((out / "class_images").exists() for out in outs)
    weak, strong = ([line["loss_prior"] for line in read_metrics(out)] for out in outs)
    # The prior's part of the batch is predicted alone, so that the last bits may differ.
    assert weak[0] < 1e-9 and strong[0] < 1e-9
    assert weak[-1] > 10 * max(weak[0], 1e-9)
    assert np.mean(strong[6:]) < 0.5 * np.mean(weak[6:])


def test_class_images_that_are_there_are_used_with_the_base_models_prediction(trainer, tmp_path, class_images):
    """As many as are wanted; missing ones are not drawn."""
    flags = "--with_prior_preservation --class_prompt 'a photo of dog' --prior_target base_prediction"
    run = trainer.run("lora", tmp_path / "out", f"{flags} --class_data_dir {class_images} --num_class_images 50")
    assert f"class images .. {len(list(class_images.glob('*.png')))} of 'a photo of dog'" in run.stdout
    assert "Drawing" not in run.stderr


@pytest.fixture(scope="module")
def if_models(tmp_path_factory):
    """Write tiny models of DeepFloyd IF."""
    return write_models(tmp_path_factory.mktemp("if"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stage", ["if1", "if2"])
def test_pixel_models_take_all_of_it(trainer, tmp_path, shaped, class_images, if_models, stage, script):
    """Both stages of IF train on buckets, masks, class images of the partner's shape, the base's prediction."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in list(shaped.iterdir())[:5]:
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (20, 20, 50, 50))
        mask.save(masks / path.name)
    flags = f"--instance_data_dir {shaped} --mask_data_dir {masks} --crop_aspect preserve --max_train_steps 3"
    flags += f" --bucket_step {4 if stage == 'if1' else 8} {PRIOR_FLAGS} --class_data_dir {class_images}"
    flags += f" --prior_target base_prediction --train_variance --cache_dir {tmp_path / 'cache'} --resolution 32"
    run = trainer.run(script, tmp_path / "out", f"{flags_of(if_models, stage)} {flags}")
    assert "masks ......... 5 of 7 photos" in run.stdout and "2 of 7 photos have no mask" in run.stderr
    assert "sizes ........." in run.stdout
    assert all(np.isfinite(line["loss"]) for line in read_metrics(run.out))


# Sizes of photos.


def test_small_photos_are_left_out_and_large_ones_cut_at_a_larger_scale(trainer, tmp_path, shaped):
    """By the flags that say so; if none is large enough, that is an error."""
    flags = f"--instance_data_dir {shaped} --minimum_image_size 70 --resolution_type pixel"
    run = trainer.run("lora", tmp_path / "one", flags)
    assert "3 of 7 photos are too small, left out" in run.stderr and "photos ........ 4 of" in run.stdout
    run = trainer.run("lora", tmp_path / "two", f"{flags} --minimum_image_size 700", code=1)
    assert f"All 7 photos are smaller than --minimum_image_size 700: {shaped / '0.png'} (80x64) …" in run.stderr
    outs = trainer.run_all(
        {
            tmp_path / "whole": ("lora", f"--instance_data_dir {shaped}"),
            tmp_path / "larger": (
                "lora",
                f"--instance_data_dir {shaped} --maximum_image_size 75 --target_downsample_size 70",
            ),
        }
    )
    assert differing(*map(read_tensors, outs)) != []


# Looking without training.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_what_the_run_would_and_writes_nothing(trainer, tmp_path, shaped, script):
    """Its screen is that of the run; neither a file nor a class image nor a cache is made."""
    flags = f"--instance_data_dir {shaped} --crop_aspect preserve {PRIOR_FLAGS} --cache_dir {tmp_path / 'cache'}"
    flags += " --pre_compute_text_embeddings --report_to tensorboard --push_to_hub"
    before = names(tmp_path)
    dry = trainer.run(script, tmp_path / "dry", f"{flags} --dry_run")
    assert names(tmp_path) == before
    assert "not begun (--dry_run)" in dry.stdout and "4 yet to be drawn" in dry.stdout and "steps:" not in dry.stderr
    real = trainer.run(script, tmp_path / "real", f"{flags} --no-push_to_hub")
    lines = [run.stdout.partition("What it would cost")[0].split("\n")[1:] for run in (dry, real)]
    assert [line.replace(", 4 yet to be drawn", "") for line in lines[0]] == lines[1]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stage", ["if1", "if2"])
def test_a_dry_run_of_if_needs_no_weights(trainer, tmp_path, if_models, class_images, stage, script):
    """Configs and tokenizer are enough: what is wrong with adapters or prompts is found without gigabytes."""
    model = tmp_path / "model"
    shutil.copytree(if_models[stage], model)
    for path in [*model.rglob("*.safetensors"), *model.rglob("*.bin")]:
        path.unlink()
    flags = f"--pretrained_model_name_or_path {model} --resolution 16 {PRIOR_FLAGS} --class_data_dir {class_images}"
    run = trainer.run(script, tmp_path / "dry", f"{flags} --dry_run")
    assert "DeepFloyd IF" in run.stdout and not (tmp_path / "dry").exists()
    if script == "lora":
        run = trainer.run(script, tmp_path / "dry", f"{flags} --dry_run --lora_layers to_nothing", code=1)
        assert "no layers named to_nothing" in run.stderr


# Pictures in every dress.


def test_a_picture_is_the_same_in_every_format_and_turn(trainer, tmp_path):
    """PNG of 8 and 16 bits, palette, grey, WebP, RGBA and each EXIF turn train to the same bits; so does a copy."""
    colours = [(int(90 * x), int(60 * y), 40 * ((x + y) % 4)) for y in range(4) for x in range(3)]
    grid = np.array(colours, np.uint8).reshape(4, 3, 3).repeat(16, axis=0).repeat(22, axis=1)
    picture = Image.fromarray(grid)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> the transposition that undoes it
    photos = {"png": picture, "palette": picture.quantize(64, dither=0), "rgba": picture.convert("RGBA")}
    photos |= {f"turn{turn}": picture.transpose(Image.Transpose(undo)) for turn, undo in turns.items()}
    ends = {}
    for name, photo in photos.items():
        folder = tmp_path / name
        folder.mkdir()
        exif = Image.Exif()
        if name.startswith("turn"):
            exif[0x0112] = int(name[4:])
        photo.save(folder / "photo.png", exif=exif)
    (tmp_path / "webp").mkdir()
    picture.save(tmp_path / "webp" / "photo.webp", lossless=True)
    for name in [*photos, "webp"]:
        ends[name] = (f"--instance_data_dir {tmp_path / name} --train_batch_size 1 --max_train_steps 1", name)
    outs = trainer.run_all({tmp_path / f"out-{name}": ("lora", flags) for flags, name in ends.values()})
    plain = read_tensors(outs[0])
    assert {out.name: differing(plain, read_tensors(out)) for out in outs} == {out.name: [] for out in outs}


def test_random_bytes_in_the_cache_never_reach_training(trainer, tmp_path):
    """Entries that are damaged at random between runs change no bit of any result."""
    flags = f"--max_train_steps 3 --center_crop --cache_latents --cache_dir {tmp_path / 'cache'}"
    first = trainer.run("lora", tmp_path / "first", flags).out
    chance = random.Random(4)
    for number in range(4):
        for path in sorted((tmp_path / "cache").iterdir()):
            content = bytearray(path.read_bytes())
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(content))
        assert_same_end(first, trainer.run("lora", tmp_path / str(number), flags).out)


# Photos from a dataset.


@pytest.mark.parametrize("by", ["flag", "list"])
def test_a_dataset_trains_like_the_folder_that_it_holds(trainer, tmp_path, by):
    """A parquet file of photos and captions gives the weights that the photos give with captions as text files."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for number, path in enumerate(sorted(path for path in trainer.photos.rglob("*.*") if path.suffix == ".png")):
        rows.append({"picture": {"bytes": path.read_bytes(), "path": None}, "words": f"a sks dog, number {number}"})
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(rows[-1]["words"])
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "dogs.parquet")
    where = f"--caption_strategy textfile --instance_data_dir {tmp_path / 'photos'}"
    plain = trainer.start_words("lora", tmp_path / "plain", words_of(trainer, tmp_path / "plain", f"{STEPS} {where}"))
    given = {"dataset_name": str(tmp_path / "dogs.parquet"), "image_column": "picture", "caption_column": "words"}
    flags = " ".join(f"--{key} {value}" for key, value in given.items())
    if by == "list":
        flags = f"--concepts_list {write_list(tmp_path / 'list.json', given)}"
    flags += f" --cache_dir {tmp_path / 'cache'} --no-pre_compute_text_embeddings"
    run = trainer.start_words(
        "lora", tmp_path / "out", words_of(trainer, tmp_path / "out", f"{STEPS} {flags}")
    ).finish()
    assert plain.finish().code == run.code == 0, run.text
    assert differing(read_tensors(tmp_path / "plain"), read_tensors(run.out)) == []
    assert "2 of 'a sks dog, number 0' or 'a sks dog, number 1'" in run.stdout
    assert sorted(names(tmp_path / "cache")) == ["datasets"]
