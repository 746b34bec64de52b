"""Runs of both scripts on both stages of DeepFloyd IF: what they log, change, save and say, and what they refuse."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.pipelines import deepfloyd_if
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from tests.conftest import draw_picture
from tests.if_models import (
    PAIRS,
    PIPELINES,
    PROJECTIONS,
    SIZE,
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
    PROMPT,
    ROOT,
    SCRIPTS,
    SEED,
    STEP_KEYS,
    WEIGHTS_FILE,
    differing,
    first_loss,
    names,
    read_metrics,
    read_optimizer,
    read_tensors,
)
from utils.data.geometry import Size
from utils.devices import device_memory
from utils.sampling import preview_pipeline

FIRST, SECOND, FULL, LORA = PAIRS[:2], PAIRS[2:], PAIRS[::2], PAIRS[1::2]
ONE_OF_EACH = (("full", "if1"), ("lora", "if2")), (("lora", "if1"), ("full", "if2"))
TEXT_FLAGS = "--pre_compute_text_embeddings --tokenizer_max_length=77 --text_encoder_use_attention_mask"


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: flags, and what they lead to."""

    flags: str
    losses: dict[str, float]  # of the first step, by stage
    pairs: tuple[tuple[str, str], ...] = PAIRS
    keys: tuple[str, ...] = ()  # in the metrics, beyond `STEP_KEYS`
    said: str = ""  # once, in what the run prints
    variance: str = "fixed_small"  # with which the result draws
    tolerance: float = 1e-4


PRIOR = ("loss_prior",)
PLAIN = {"if1": 1.10141, "if2": 1.08461}
CASES = {
    "plain": Case("", PLAIN, said="results draw with fixed_small"),
    "prior preservation": Case(f"{PRIOR_FLAGS} --prior_loss_weight 0.5", {"if1": 1.65244, "if2": 1.64048}, keys=PRIOR),
    "variance": Case(
        "--train_variance", {"if1": 1.11095, "if2": 1.09402}, variance="learned_range", said="variance ...... trained"
    ),
    "timesteps": Case(
        "--class_labels_conditioning timesteps",
        {"if2": 1.08626},
        SECOND,
        said="--class_labels_conditioning timesteps: stage II never sees the low-resolution image",
    ),
    "noise level": Case("--class_labels_conditioning noise_level", PLAIN, ONE_OF_EACH[0][1:]),
    "Min-SNR and prior": Case(
        f"--snr_gamma 5 {PRIOR_FLAGS}", {"if1": 1.21532, "if2": 1.19402}, ONE_OF_EACH[0], keys=PRIOR
    ),
    "Min-SNR and variance": Case(
        "--snr_gamma 5 --train_variance", {"if1": 0.621899, "if2": 0.611967}, ONE_OF_EACH[1], variance="learned_range"
    ),
    "dropped captions": Case(
        "--caption_dropout 0.6", {"if1": 1.11188, "if2": 1.10012}, ONE_OF_EACH[1], said="60% of the captions empty"
    ),
    "offset noise": Case("--offset_noise", {"if1": 1.09261, "if2": 1.08743}, ONE_OF_EACH[0]),
    "accumulation": Case(
        "--gradient_accumulation_steps 2 --scale_lr", {"if1": 1.09819, "if2": 1.06171}, ONE_OF_EACH[1]
    ),
    "flip": Case("--random_flip --crop_style shifted_center", {"if1": 1.0903, "if2": 1.08988}, ONE_OF_EACH[0]),
    "rectangle": Case("--resolution 24x16 --center_crop", {"if1": 1.09305, "if2": 1.07205}, PAIRS),
    "bf16": Case("--mixed_precision bf16", PLAIN, tolerance=2e-2),
    "small memory": Case("--use_8bit_adam --gradient_checkpointing", PLAIN),
    "text encoder in bf16": Case("--text_encoder_precision bf16", PLAIN, ONE_OF_EACH[1], tolerance=5e-3),
    "text encoder in int8": Case("--text_encoder_precision int8", PLAIN, ONE_OF_EACH[0], tolerance=5e-3),
    "without text encoder": Case("--skip_save_text_encoder", PLAIN, FULL),
    "adapters": Case("--rank 2 --lora_alpha 6 --lora_layers add_k_proj,to_q", PLAIN, LORA),
    "workers": Case("--dataloader_num_workers 1", PLAIN, ONE_OF_EACH[0]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Write the tiny models."""
    return write_models(tmp_path_factory.mktemp("models"))


# What a run leaves.


@pytest.mark.parametrize("name", CASES)
def test_case(trainer, models, class_images, tmp_path, name):
    """A case trains what it should, from the known loss on, and its result comes back whole."""
    case = CASES[name]
    flags = f"{case.flags} --class_data_dir {class_images}" if "--with_prior" in case.flags else case.flags
    jobs = [
        (stage, script, trainer.start(script, tmp_path / stage / script, flags_of(models, stage, flags)))
        for script, stage in case.pairs
    ]
    for stage, script, job in jobs:
        run = job.finish()
        assert run.code == 0, run.text
        assert run.text.count(case.said) == 1 or not case.said, run.text
        check_metrics(run.out, case, stage)
        check = check_pipeline if script == "full" else check_adapter
        check(run.out, models[stage], case, stage)
        changed = {key: value for key, value in read_scheduler(models[stage]).items() if key != "variance_type"}
        assert read_scheduler(run.out) == changed | {"variance_type": case.variance}


def check_metrics(out: Path, case: Case, stage: str) -> None:
    """Check the two lines of a run's metrics."""
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert sorted(line) == sorted([*STEP_KEYS, *case.keys])
        assert all(math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
    assert lines[0]["loss"] == pytest.approx(case.losses.get(stage), abs=case.tolerance), lines[0]["loss"]


def check_pipeline(out: Path, base: Path, case: Case, stage: str) -> None:
    """Check that a full result is a float32 pipeline in which exactly the U-Net differs, and that all of it loads."""
    before, after = read_tensors(base), read_tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    left_out = "--skip_save_text_encoder" in case.flags
    assert after.keys() == {key for key in before if not (left_out and key.startswith("text_encoder/"))}
    changed = differing({key: before[key] for key in after}, after)
    expected = {key for key in after if key.startswith("unet/")}
    if "--train_variance" in case.flags:
        assert set(changed) == expected
    else:
        # The variance's half of the last layer gets no gradient, but weight decay.
        assert set(changed) <= expected and len(changed) >= len(expected) - 1
        for name in ("unet/conv_out.weight", "unet/conv_out.bias"):
            torch.testing.assert_close(after[name][3:], before[name][3:] * (1 - 1e-3 * 1e-2) ** 2)
    parts = {"text_encoder": None} if left_out else {}
    pipeline = load_result(base, out, **parts)
    assert type(pipeline) is PIPELINES[stage]
    for part in ("unet", *(() if left_out else ("text_encoder",))):
        state = getattr(pipeline, part).state_dict()
        loaded = {f"{part}/{key}": value for key, value in state.items() if f"{part}/{key}" in after}
        assert differing(loaded, {key: after[key] for key in after if key.startswith(f"{part}/")}) == []
    for name in ("scheduler", "image_noising_scheduler")[: 1 + (stage == "if2")]:
        assert type(getattr(pipeline, name)) is diffusers.DDPMScheduler


def check_adapter(out: Path, base: Path, case: Case, stage: str) -> None:
    """Check that an adapter is of all attention projections, and that every tensor of it comes back to the bit."""
    saved = load_file(out / WEIGHTS_FILE)
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in saved.values())
    pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(base, text_encoder=None, tokenizer=None))
    frozen = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    ends = ("add_k_proj", "to_q") if "--lora_layers" in case.flags else PROJECTIONS
    layers = {name for name, _ in pipeline.unet.named_modules() if name.endswith(tuple(f".{end}" for end in ends))}
    assert {name.rpartition(".attentions.")[2].partition(".")[2] for name in layers} == set(ends)
    pipeline.load_lora_weights(out)
    loaded = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="default_0", save_embedding_layers=False)
    assert len(loaded) == len(saved) == 2 * len(layers)
    assert differing({f"unet.{key}": value for key, value in loaded.items()}, saved) == []
    adapted = {name: layer for name, layer in pipeline.unet.named_modules() if hasattr(layer, "lora_A")}
    assert adapted.keys() == layers
    assert {layer.scaling["default_0"] for layer in adapted.values()} == {3.0 if "--lora_alpha 6" in case.flags else 1}
    base_weights = {key.replace(".base_layer", ""): value for key, value in pipeline.unet.state_dict().items()}
    assert differing({key: base_weights[key] for key in frozen}, frozen) == []


# The first loss once more, from the description of what it is and nothing of the scripts.


def seed_of(*parts) -> int:
    """Derive a seed as documented: 32 bits of a hash of what it is for."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def normal(shape, *parts) -> torch.Tensor:
    """Draw noise from a derived seed, (1, C, H, W)."""
    return torch.randn(shape, generator=generator_of(seed_of(*parts)))[None]


def whole_number(below: int, *parts) -> int:
    """Draw a whole number from a derived seed."""
    return int(torch.randint(below, (), generator=generator_of(seed_of(*parts))))


def cut_out(path: Path, index: int, flags: str) -> torch.Tensor:
    """Read a picture as the first visit to it does: (1, 3, H, W) float32 in [-1, 1]."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = (24, 16) if "24x16" in flags else (SIZE, SIZE)
    scale = max(width / image.width, height / image.height)
    image = image.resize([round(edge * scale) for edge in image.size], Image.Resampling.BICUBIC)
    chance = random.Random(seed_of(SEED, "crop and flip", index, 0))
    margins = image.width - width, image.height - height
    if "--center_crop" in flags:
        left, top = (margin // 2 for margin in margins)
    elif "shifted_center" in flags:
        shifts = [round(chance.uniform(-1, 1) * edge / 10) for edge in (width, height)]
        left, top = (min(max(margin // 2 + shift, 0), margin) for margin, shift in zip(margins, shifts, strict=True))
    else:
        left, top = (chance.randint(0, margin) for margin in margins)
    pixels = np.asarray(image)[top : top + height, left : left + width]
    if "--random_flip" in flags and chance.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]


@torch.no_grad()
def recompute(case: Case, pipeline, kind: str, micro_step: int, paths: list[Path], index: int) -> float:
    """Return the mean loss of the two examples of one kind in an early batch, before any training.

    Args:
        kind: "instance" or "class".
        paths: all pictures of the kind.
        index: of the first of them in the run's list of pictures.
    """
    order = torch.randperm(len(paths), generator=generator_of(seed_of(SEED, "order", kind, 0)))
    share = 0.6 if "--caption_dropout" in case.flags else 0
    scheduler, losses = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config), []
    for place in range(2):
        chosen = int(order[2 * micro_step + place])
        seed = seed_of(SEED, "example", kind, micro_step, place)
        clean = cut_out(paths[chosen], index + chosen, case.flags)
        shape = clean.shape[1:]
        noise = normal(shape, seed, "noise")
        if "--offset_noise" in case.flags:
            noise = noise + 0.1 * normal((3, 1, 1), seed, "noise offset")
        timestep = whole_number(1000, seed, "timestep")
        kept = scheduler.alphas_cumprod[timestep]
        noisy, more = kept.sqrt() * clean + (1 - kept).sqrt() * noise, {}
        if pipeline.unet.config.in_channels == 6:
            level = whole_number(1000, seed, "low resolution timestep")
            small = F.interpolate(clean, [edge // 4 for edge in shape[1:]], mode="bicubic", antialias=True)
            large = F.interpolate(small.clamp(-1, 1), shape[1:], mode="bilinear", align_corners=True)
            clear = scheduler.alphas_cumprod[level]
            second = clear.sqrt() * large + (1 - clear).sqrt() * normal(shape, seed, "low resolution noise")
            if "timesteps" in case.flags:
                level, second = timestep, noisy
            more["class_labels"] = torch.tensor([level])
        dropped = random.Random(seed_of(seed, "caption dropout")).random() < share
        prompt = "" if dropped else PROMPT if kind == "instance" else CLASS_PROMPT
        embeds, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        fed = torch.cat([noisy, second], dim=1) if more else noisy
        predicted = pipeline.unet(fed, timestep, embeds, **more).sample
        snr = float(kept / (1 - kept))
        weight = min(snr, 5) / snr if "--snr_gamma 5" in case.flags else 1
        losses.append(weight * float((predicted[:, :3] - noise).square().mean()))
        if "--train_variance" in case.flags:
            losses[-1] += bound(scheduler, predicted, clean, noisy, timestep)
    return sum(losses) / 2


def bound(scheduler, predicted, clean, noisy, timestep: int) -> float:
    """Return the bits of one step of the reverse process, for timesteps above 0, with diffusers' own variances."""
    kept, before = (scheduler.alphas_cumprod[step].double() for step in (timestep, timestep - 1))
    beta = 1 - kept / before
    posterior = scheduler._get_variance(timestep, variance_type="fixed_small").double().log()
    learned = scheduler._get_variance(timestep, predicted[:, 3:].double(), "learned_range")
    guess = (noisy - (1 - kept).sqrt() * predicted[:, :3]) / kept.sqrt()
    apart = before.sqrt() * beta / (1 - kept) * (clean - guess)
    nats = (learned - posterior - 1 + (posterior - learned).exp() + apart.square() * (-learned).exp()) / 2
    return float(nats.mean()) / math.log(2)


RECOMPUTED = [name for name, case in CASES.items() if case.losses is not PLAIN or name == "plain"]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_the_pinned_loss_is_right(models, photos, class_images, name):
    """A pinned first loss is that of the formulas."""
    case = CASES[name]
    found = {}
    for stage in {stage for _, stage in case.pairs}:
        pipeline = PIPELINES[stage].from_pretrained(models[stage])
        found[stage] = first_loss(case.flags, photos, class_images, functools.partial(recompute, case, pipeline))
    assert case.losses == pytest.approx(found, abs=2e-4), found


# The text encoder.


def test_precisions_of_the_text_encoder(trainer, models, tmp_path):
    """The cache holds embeddings in the precision asked for, which differ by rounding, an entry each."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": None}
    found = {}
    for precision, dtype in precisions.items():
        flags = f"--cache_dir {tmp_path / 'cache'} --max_train_steps 1 --text_encoder_precision {precision}"
        run = trainer.run("lora", tmp_path / precision, flags_of(models, "if1", flags))
        assert run.stderr.count("Encoding 2 of 2 prompts") == 1
        entries = set((tmp_path / "cache").iterdir()) - set(found)
        assert len(entries) == 2
        found |= dict.fromkeys(entries, precision)
        (embeds,) = {tensor.dtype for path in entries for tensor in load_file(path).values()}
        assert dtype in (None, embeds)
    sums = {
        precision: sorted(
            float(load_file(path)["embeds"].double().abs().mean()) for path in found if found[path] == precision
        )
        for precision in precisions
    }
    assert sums["fp32"] != sums["int8"] != sums["bf16"] != sums["fp32"]
    assert sums["int8"] == pytest.approx(sums["fp32"], rel=0.05)
    assert sums["bf16"] == pytest.approx(sums["fp32"], rel=0.01)


def test_8_bit_adam_keeps_8_bits(trainer, models, tmp_path):
    """With --use_8bit_adam the moments of large tensors are bytes."""
    out = trainer.run("full", tmp_path, flags_of(models, "if1", "--use_8bit_adam --checkpointing_steps 2")).out
    state = read_optimizer(out / "checkpoint-2")
    moments = [value for key, value in state.items() if key.endswith(("/state1", "/state2"))]
    assert {(moment.dtype, moment.numel() >= 4096) for moment in moments} == {
        (torch.uint8, True),
        (torch.float32, False),
    }


# The published commands, as they are but for sizes and lengths: the last of two equal flags wins.


PUBLISHED = {
    "stage I, LoRA": (
        "lora",
        "if1",
        "--resolution=64 --train_batch_size=4 --gradient_accumulation_steps=1 --learning_rate=5e-6 --scale_lr "
        "--max_train_steps=1200 --validation_prompt='a sks dog' --validation_epochs=25 --checkpointing_steps=100 "
        f"{TEXT_FLAGS}",
        2e-5,
    ),
    "stage II, LoRA": (
        "lora",
        "if2",
        "--resolution=256 --train_batch_size=4 --gradient_accumulation_steps=1 --learning_rate=1e-6 "
        "--max_train_steps=2000 --validation_prompt='a sks dog' --validation_epochs=100 --checkpointing_steps=500 "
        f"{TEXT_FLAGS} --validation_images {{photo}} {{photo}} {{other}} --class_labels_conditioning=timesteps",
        1e-6,
    ),
    "stage I, full": (
        "full",
        "if1",
        "--resolution=64 --train_batch_size=4 --gradient_accumulation_steps=1 --learning_rate=1e-7 "
        f"--max_train_steps=150 --validation_prompt 'a photo of sks dog' --validation_steps 25 {TEXT_FLAGS} "
        "--use_8bit_adam --set_grads_to_none --skip_save_text_encoder",
        1e-7,
    ),
    "stage II, full": (
        "full",
        "if2",
        "--resolution=256 --train_batch_size=2 --gradient_accumulation_steps=6 --learning_rate=5e-6 "
        "--max_train_steps=2000 --validation_prompt='a sks dog' --validation_steps=150 --checkpointing_steps=500 "
        f"{TEXT_FLAGS} --validation_images {{photo}} {{photo}} {{other}} --class_labels_conditioning=timesteps",
        5e-6,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_command_runs_unchanged(trainer, models, photos, tmp_path, name):
    """Every flag of it is understood and fits; it draws previews and leaves a result."""
    script, stage, flags, rate = PUBLISHED[name]
    flags = flags.format(photo=photos / "beach.png", other=photos / "grass.jpg")
    small = "--resolution=16 --max_train_steps=2 --num_validation_images=1 --validation_num_inference_steps=2"
    words = ["--pretrained_model_name_or_path", str(models[stage]), "--instance_data_dir", str(photos)]
    words += ["--output_dir", str(tmp_path), "--instance_prompt", "a sks dog"]
    run = trainer.start_words(script, tmp_path, [*words, *shlex.split(f"{flags} {small}")]).finish()
    assert run.code == 0, run.text
    lines = read_metrics(tmp_path)
    assert [line["lr"] for line in lines] == pytest.approx([rate] * 2)
    drawn = [f"{number:02d}.png" for number in range(3 if stage == "if2" else 1)]
    for step in ("step-000000", "step-000002"):
        assert names(tmp_path / "samples" / step) == [*drawn, "grid.png"]
    assert ("model_index.json" if script == "full" else WEIGHTS_FILE) in names(tmp_path)


# The card.


@pytest.mark.parametrize(("script", "stage"), [("lora", "if1"), ("full", "if2")])
def test_the_cards_code_draws_as_was_trained(trainer, models, tmp_path, monkeypatch, script, stage):
    """The code in the model card runs as it stands, and its picture has the size of the training's."""
    flags = flags_of(models, stage, "--resolution 24x16 --skip_save_text_encoder --max_train_steps 1")
    flags = flags.replace("--skip_save_text_encoder", "") if script == "lora" else flags
    out = trainer.run(script, tmp_path / "out", flags).out
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    draw_picture(30, 20, 1).save("small.png")
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open("image.png").size == (24, 16)


# Sizes.


EYES = "--validation_prompt 'a photo of sks dog' --validation_num_inference_steps 2 --max_train_steps 1"


def test_pictures_of_several_sizes(trainer, models, tmp_path):
    """Previews of each size asked for have names of their own and that size; stage II's come from a quarter of it."""
    flags = f"{EYES} --validation_resolution 16,24x16"
    one, two = trainer.run_all(
        {
            tmp_path / "one": ("lora", flags_of(models, "if1", f"{flags} --num_validation_images 2")),
            tmp_path / "two": ("full", flags_of(models, "if2", f"{flags} --num_eval_images 2")),
        }
    )
    sizes = {"00-16.png": (16, 16), "00-24x16.png": (24, 16), "01-16.png": (16, 16), "01-24x16.png": (24, 16)}
    for folder, divisor in (
        *((out / "samples" / f"step-{step:06d}", 1) for out in (one, two) for step in (0, 1)),
        (two / "samples" / "small", 4),
    ):
        found = {path.name: Image.open(path).size for path in folder.glob("0*.png")}
        assert found == {name: (width // divisor, height // divisor) for name, (width, height) in sizes.items()}


# What stage II enlarges.


@pytest.mark.parametrize("script", SCRIPTS)
def test_given_pictures_are_made_small_and_that_is_said(trainer, models, tmp_path, script):
    """Pictures of any size and kind are cut to the shape and resized to a quarter of the resolution."""
    large, clear, grey = (tmp_path / name for name in ("large.png", "clear.png", "grey.png"))
    draw_picture(90, 60, 1).save(large)
    draw_picture(20, 30, 2).convert("RGBA").save(clear)
    draw_picture(4, 4, 3).convert("L").save(grey)
    flags = f"{EYES} --resolution 32 --validation_images {large} {clear} {grey}"
    run = trainer.run(script, tmp_path / "out", f"--pretrained_model_name_or_path {models['if2']} {flags}")
    assert run.stderr.count(f"{large}, {clear}, {grey}, cut and shrunk to 8 px") == 1
    samples = run.out / "samples"
    assert names(samples / "small") == ["00.png", "01.png", "02.png"]
    for step in (0, 1):
        assert names(samples / f"step-{step:06d}") == ["00.png", "01.png", "02.png", "grid.png"]
    wanted = draw_picture(90, 60, 1).crop((15, 0, 75, 60)).resize((8, 8), Image.Resampling.BICUBIC)
    small = [Image.open(samples / "small" / f"0{number}.png") for number in range(3)]
    assert np.abs(np.asarray(small[0], int) - np.asarray(wanted, int)).max() <= 1
    assert {picture.size for picture in small} == {(8, 8)} and {picture.mode for picture in small} == {"RGB"}
    assert np.ptp(np.asarray(small[2], int), axis=2).max() == 0


def test_training_photos_are_enlarged_at_most_once_each(trainer, models, photos, tmp_path):
    """--num_eval_images takes the first photos, and no more than there are, the same in every round."""
    flags = {
        tmp_path / str(count): ("lora", flags_of(models, "if2", f"{EYES} --num_eval_images {count}"))
        for count in (2, 9)
    }
    few, many = trainer.run_all(flags)
    assert names(few / "samples" / "small") == ["00.png", "01.png"]
    assert names(many / "samples" / "small") == [f"0{number}.png" for number in range(5)]
    for number in range(2):
        assert (few / "samples" / "small" / f"0{number}.png").read_bytes() == (
            many / "samples" / "small" / f"0{number}.png"
        ).read_bytes()
    assert names(many / "samples" / "step-000001") == [*(f"0{number}.png" for number in range(5)), "grid.png"]


def test_stage_one_draws_what_stage_two_enlarges(trainer, models, tmp_path):
    """With --stage_one_model_name_or_path, small pictures are stage I's own of the prompt, and no T5 draws them."""
    flags = f"{EYES} --num_validation_images 2 --stage_one_model_name_or_path {models['if1']} --resolution 32"
    out = trainer.run("lora", tmp_path / "out", f"--pretrained_model_name_or_path {models['if2']} {flags}").out
    pipeline = quiet(PIPELINES["if1"].from_pretrained(models["if1"]))
    for number in range(2):
        drawn = pipeline(
            PROMPT,
            num_inference_steps=2,
            guidance_scale=7.5,
            height=8,
            width=8,
            generator=generator_of(SEED + number),
        ).images[0]
        saved = Image.open(out / "samples" / "small" / f"0{number}.png")
        assert saved.size == (8, 8) and np.array_equal(np.asarray(saved), np.asarray(drawn))


# Mistakes.


LOST = "becomes 'a photo of dog'. Identifiers that survive: sks,"
ERRORS = {  # kind of model, flags, parts of the message
    "T5 is not trained": ("if1", "--train_text_encoder", "T5 is never trained"),
    "T5 is always freed": ("if1", "--no-pre_compute_text_embeddings", "T5 is always freed"),
    "padding": (
        "if2",
        "--no-text_encoder_use_attention_mask",
        "--no-text_encoder_use_attention_mask: the model's own pipeline hides",
    ),
    "tokens": ("if1", "--tokenizer_max_length 64", "IF's pipelines always give 77 tokens"),
    "a name with digits": ("if1", "--instance_prompt 'a photo of p3rs0n dog'", f"would lose 'p3rs0n'|{LOST}"),
    "a name in brackets": ("if2", "--instance_prompt 'a photo of <sks> dog'", f"would lose '<sks>'|{LOST}"),
    "a name of letters": ("if1", "--instance_prompt 'a photo of zwx5k dog'", f"would lose 'zwx5k'|{LOST}"),
    "class labels": (
        "if1",
        "--class_labels_conditioning timesteps",
        "--class_labels_conditioning is for DeepFloyd IF",
    ),
    "pictures to enlarge": (
        "if1",
        "--validation_images {photo}",
        "--validation_images is for DeepFloyd IF's stage II",
    ),
    "photos to enlarge": ("tiny", "--num_eval_images 2", "--num_eval_images is for DeepFloyd IF's stage II"),
    "stage I": ("if1", "--stage_one_model_name_or_path {if1}", "--stage_one_model_name_or_path is for DeepFloyd IF"),
    "variance": ("tiny", "--train_variance", "--train_variance: this U-Net predicts no variance"),
    "a size of stage I": ("if1", "--resolution 18x16", "18x16: |multiples of 4"),
    "a size of stage II": ("if2", "--resolution 16x22", "16x22: |multiples of 4"),
    "a size of previews": ("if1", "--validation_resolution 16,18", "18: |multiples of 4"),
    "nothing to enlarge": (
        "if2",
        "--validation_prompt dog",
        "--validation_prompt needs one of --validation_images, --num_eval_images, --stage_one_model_name_or_path",
    ),
    "two at once": (
        "if2",
        "--validation_prompt dog --validation_images {photo} --num_eval_images 1",
        "--validation_images excludes --num_eval_images",
    ),
    "no picture": ("if2", "--validation_prompt dog --validation_images {if1}/no.png", "--validation_images|no.png"),
    "class images": (
        "if2",
        PRIOR_FLAGS,
        "lacks 4 of 4 class images, and stage II cannot draw from words alone|--stage_one_model_name_or_path",
    ),
    "stage I is not there": (
        "if2",
        "--validation_prompt dog --stage_one_model_name_or_path {if1}/none",
        "{if1}/none",
    ),
    "stage I is stage II": (
        "if2",
        "--validation_prompt dog --stage_one_model_name_or_path {if2}",
        "--stage_one_model_name_or_path",
    ),
    "stage I is Stable Diffusion": (
        "if2",
        f"{PRIOR_FLAGS} --stage_one_model_name_or_path {{tiny}}",
        "--stage_one_model_name_or_path",
    ),
    "a size that stage I cannot draw": (
        "if2",
        "--validation_prompt dog --validation_resolution 24x16 --stage_one_model_name_or_path {if1}",
        "draws multiples of 4 px; a quarter of the previews' size is 6x4",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_told_before_anything_is_written(trainer, models, tiny, photos, tmp_path, name):
    """What contradicts the model is one message, without a traceback, and leaves no folder."""
    kind, flags, message = ERRORS[name]
    places = models | {"tiny": tiny, "photo": photos / "beach.png"}
    script = list(SCRIPTS)[list(ERRORS).index(name) % 2]
    run = trainer.start(script, tmp_path / "out", flags_of(places, kind, flags.format(**places))).finish()
    assert run.code in (1, 2) and "Traceback" not in run.text, run.text
    assert run.stderr.count("error:") == 1
    for part in message.format(**places).split("|"):
        assert part in run.stderr
    assert not (tmp_path / "out").exists()


def test_all_contradictions_are_told_at_once(trainer, models, tmp_path):
    """Several flags that do not fit are one message with a line each."""
    flags = (
        "--train_text_encoder --tokenizer_max_length 64 --resolution 18 --num_eval_images 1 --validation_prompt dog"
    )
    run = trainer.run("lora", tmp_path / "out", flags_of(models, "if1", flags), code=1)
    for part in ("T5 is never trained", "77 tokens", "multiples of 4", "--num_eval_images is for"):
        assert run.stderr.count(part) == 1
    assert not (tmp_path / "out").exists()


def test_the_prompts_of_a_run_may_lose_words_but_not_the_subjects(trainer, models, tmp_path):
    """Only the instance prompt must survive the cleaning whole; punctuation and upper case are no loss."""
    flags = (
        f"{EYES} --num_validation_images 1 --validation_prompt 'a p3rs0n' --instance_prompt 'A Photo, of SKS dog!!!'"
    )
    trainer.run("lora", tmp_path / "out", flags_of(models, "if1", flags))
    assert json.loads((tmp_path / "out" / "args.json").read_text())["instance_prompt"] == "A Photo, of SKS dog!!!"


# As the released repositories are.


def add_released_parts(folder: Path) -> None:
    """Add what DeepFloyd's repositories have as well: a safety checker, its feature extractor, and a watermark."""
    encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**encoder, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config={**encoder, "vocab_size": 50}, vision_config=vision, projection_dim=8)
    checker = deepfloyd_if.IFSafetyChecker(config)
    config.architectures = ["IFSafetyChecker"]
    config.save_pretrained(folder / "safety_checker")
    save_file(
        {name: value.contiguous() for name, value in checker.state_dict().items()},
        folder / "safety_checker" / "model.safetensors",
        {"format": "pt"},
    )
    transformers.CLIPImageProcessor(size=32, crop_size=32).save_pretrained(folder / "feature_extractor")
    deepfloyd_if.IFWatermarker().save_pretrained(folder / "watermarker")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["deepfloyd_if", "IFSafetyChecker"], "watermarker": ["deepfloyd_if", "IFWatermarker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checker_that_cannot_be_loaded_costs_no_result(trainer, models, tmp_path, script):
    """diffusers' checker of IF does not load with transformers 5: class images, the result and the card do without."""
    base = shutil.copytree(models["if1"], tmp_path / "base")
    add_released_parts(base)
    run = trainer.run(script, tmp_path / "out", flags_of({"if1": base}, "if1", f"{PRIOR_FLAGS} --num_class_images 2"))
    if script == "full":
        pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(run.out))
        assert pipeline.safety_checker is None and pipeline.watermarker is not None
        assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in run.out.glob("*/config.json"))
    code = (run.out / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    place = os.getcwd()
    os.chdir(tmp_path)
    try:
        # Pictures this small have no room for the watermark.
        code = code.replace("safety_checker=None", "safety_checker=None, watermarker=None")
        exec(code.replace("width=", "num_inference_steps=2, width="), {})
    finally:
        os.chdir(place)
    assert Image.open(tmp_path / "image.png").size == (SIZE, SIZE)


def test_a_text_encoder_that_is_gone_costs_no_training(trainer, models, tmp_path):
    """With all embeddings in the cache T5's weights may be deleted; the result then lacks them, and that is said."""
    base = shutil.copytree(models["if1"], tmp_path / "base")
    flags = f"{flags_of({'if1': base}, 'if1')} --cache_dir {tmp_path / 'cache'}"
    whole = trainer.run("full", tmp_path / "whole", flags)
    (base / "text_encoder" / "model.safetensors").unlink()
    run = trainer.run("full", tmp_path / "out", flags)
    assert run.stderr.count("The result has no text encoder, as with --skip_save_text_encoder.") == 1
    ours, theirs = (load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (run.out, whole.out))
    assert differing(ours, theirs) == []
    assert json.loads((run.out / "model_index.json").read_text())["text_encoder"] == [None, None]


def test_a_lora_of_a_stage_two_without_self_attention(trainer, models, tmp_path):
    """diffusers' conversion makes its self-attention cross-attention only: it has no to_k and to_v.

    Layers that the script would take by itself are left out if they are not there; given ones are refused by name.
    """
    model = shutil.copytree(models["if2"], tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text()) | {"only_cross_attention": True}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(config)
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet")
    ends = {path.rpartition(".attentions.")[2].partition(".")[2] for path, _ in unet.named_modules()}
    assert "to_q" in ends and "add_k_proj" in ends and "to_k" not in ends
    flags = f"--pretrained_model_name_or_path {model} --resolution {SIZE}"
    out = trainer.run("lora", tmp_path / "out", flags).out
    adapted = {
        key.rpartition(".lora_")[0].rpartition(".attentions.")[2].partition(".")[2] for key in read_tensors(out)
    }
    assert adapted == {"to_q", "to_out.0", "add_k_proj", "add_v_proj"}
    again = load_result(model, out)
    loaded = peft.get_peft_model_state_dict(again.unet, adapter_name="default_0", save_embedding_layers=False)
    assert len(loaded) == len(read_tensors(out))
    refused = trainer.run("lora", tmp_path / "refused", f"{flags} --lora_layers to_q,to_k", code=1)
    assert "has no layers named to_k. It has the linear layers add_k_proj, add_v_proj" in refused.stderr
    trainer.run("lora", tmp_path / "resumed", f"{flags} --max_train_steps 1 --checkpointing_steps 1")
    more = f"{flags} --checkpointing_steps 1 --resume_from_checkpoint latest"
    resumed = trainer.run("lora", tmp_path / "resumed", more).out
    assert differing(read_tensors(resumed), read_tensors(out)) == []


def test_another_variance_is_another_run(trainer, models, tmp_path):
    """A run that trained no variance cannot be resumed by one that does: its result would say what is not so."""
    flags = f"{flags_of(models, 'if1')} --checkpointing_steps 2"
    trainer.run("lora", tmp_path / "out", flags)
    run = trainer.start("lora", tmp_path / "out", f"{flags} --train_variance --resume_from_checkpoint latest").finish()
    assert run.code == 1 and "train_variance: False there, True here" in run.stderr


def test_words_lost_from_other_prompts_are_a_warning(trainer, models, tmp_path):
    """Previews of a prompt that cleaning changed would otherwise be judged for what they were not asked."""
    flags = "--validation_prompt 'a <sks> dog' --num_validation_images 1 --validation_num_inference_steps 1"
    run = trainer.run("lora", tmp_path / "out", flags_of(models, "if1", flags))
    assert (
        run.stderr.count("The prompt 'a <sks> dog' loses '<sks>' when IF's pipelines clean it: T5 reads 'a dog'.") == 1
    )


def test_a_variance_that_is_trained_is_drawn_with(trainer, models, tmp_path):
    """Also where the base model's scheduler draws with a fixed one, as our own results do."""
    base = shutil.copytree(models["if1"], tmp_path / "base")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": "fixed_small"}))
    run = trainer.run("lora", tmp_path / "out", flags_of({"if1": base}, "if1", "--train_variance"))
    assert read_scheduler(run.out)["variance_type"] == "learned_range"


# Memory.

WATCHED = """
import gc, sys, weakref
import {script} as script

encoders, original, load_models = [], script.load_text_encoder, script.load_models

def load_and_remember(*arguments):
    encoder = original(*arguments)
    encoders.append(weakref.ref(encoder))
    return encoder

def load_when_it_is_gone(*arguments):
    gc.collect()
    print("encoders:", [encoder() for encoder in encoders], flush=True)
    return load_models(*arguments)

script.load_text_encoder, script.load_models = load_and_remember, load_when_it_is_gone
sys.exit(script.main(sys.argv[1:]))
"""


def test_t5_is_freed_before_the_u_net_is_loaded(models, photos, tmp_path):
    """One text encoder is loaded, and nothing refers to it any more when the training networks come."""
    own = ["--instance_data_dir", str(photos), "--instance_prompt", PROMPT, "--output_dir", str(tmp_path / "out")]
    own += ["--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "1", "--report_to", "none"]
    code = WATCHED.format(script="train_dreambooth_lora")
    command = [sys.executable, "-c", code, *shlex.split(flags_of(models, "if1")), *own]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "encoders: [None]" in run.stdout, run.stdout + run.stderr


def test_previews_are_left_out_that_have_nothing_to_enlarge(models, tmp_path):
    """When memory ran out while stage I drew, the pictures that it did draw are enlarged."""
    base = PIPELINES["if2"].from_pretrained(models["if2"])
    noising = base.image_noising_scheduler
    pipeline = preview_pipeline.assemble(
        PIPELINES["if2"], unet=base.unet, scheduler=base.scheduler, image_noising_scheduler=noising
    )
    previews = preview_pipeline.list_previews([Size(16, 16)], 2, seed=0)
    draw_picture(4, 4, 0).save(tmp_path / previews[1].name)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), base.encode_prompt("a dog"), strict=True))
    preview_pipeline.draw(pipeline, previews, tmp_path / "drawn", tmp_path, **embeds, num_inference_steps=2)
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == [previews[1].name]


def test_only_a_lack_of_memory_is_a_warning(caplog):
    """Whatever else goes wrong ends the run."""
    with device_memory.skip_if_out_of_memory("Stage I"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "Stage I ran out of memory; the run goes on." in caplog.text
    with pytest.raises(RuntimeError, match="shapes"), device_memory.skip_if_out_of_memory("Stage I"):
        raise RuntimeError("shapes do not match")
