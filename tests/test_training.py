"""Runs of both scripts from one table of cases: what they log, what they change, what they save, what they say."""

import dataclasses
import functools
import hashlib
import json
import math
import random
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.runs import (
    CLASS_PROMPT,
    PRIOR_FLAGS,
    PROMPT,
    SCRIPTS,
    SEED,
    SIZE,
    STEP_KEYS,
    WEIGHTS_FILE,
    differing,
    first_loss,
    names,
    read_metrics,
    read_optimizer,
    read_tensors,
    untimed,
)

BOTH, FULL, LORA = ("full", "lora"), ("full",), ("lora",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: flags, and what they lead to."""

    flags: str
    loss: float  # of the first step
    scripts: tuple[str, ...] = BOTH
    model: str = "tiny"
    keys: tuple[str, ...] = ()  # in the metrics, beyond `STEP_KEYS`
    said: str = ""  # once, in what the run prints
    trained: tuple[str, ...] = ("unet",)
    tolerance: float = 1e-4


PRIOR = ("loss_prior",)
CASES = {
    "plain": Case("", 0.972134),
    "prior preservation": Case(PRIOR_FLAGS, 2.06402, keys=PRIOR),
    "prior weight": Case(f"{PRIOR_FLAGS} --prior_loss_weight 0.5", 1.51808, keys=PRIOR),
    "text encoder": Case(
        "--train_text_encoder --text_encoder_lr 2e-3",
        0.972134,
        keys=("lr_text_encoder",),
        trained=("unet", "text_encoder"),
    ),
    "text encoder and prior": Case(
        f"--train_text_encoder --gradient_checkpointing {PRIOR_FLAGS}",
        2.06402,
        keys=("lr_text_encoder", "loss_prior"),
        trained=("unet", "text_encoder"),
    ),
    "prompts encoded in the loop": Case("--no-pre_compute_text_embeddings", 0.972134),
    "v-prediction": Case("", 0.782229, model="tiny_v"),
    "v-prediction and prior": Case(PRIOR_FLAGS, 1.45231, model="tiny_v", keys=PRIOR),
    "Min-SNR": Case("--snr_gamma 5", 0.886507),
    "Min-SNR and prior": Case(f"--snr_gamma 5 {PRIOR_FLAGS}", 1.60739, keys=PRIOR),
    "v-prediction, Min-SNR": Case("--snr_gamma 5", 0.544116, model="tiny_v"),
    "v-prediction, Min-SNR and prior": Case(f"--snr_gamma 5 {PRIOR_FLAGS}", 0.75495, model="tiny_v", keys=PRIOR),
    "offset noise": Case("--offset_noise", 0.978267),
    "noise offset": Case("--noise_offset 0.5", 1.30596),
    "accumulation": Case("--gradient_accumulation_steps 2 --scale_lr", 0.990734),
    "bf16": Case("--mixed_precision bf16", 0.971644, tolerance=5e-3),
    "bf16, text encoder and prior": Case(
        f"--mixed_precision bf16 --train_text_encoder {PRIOR_FLAGS}",
        2.06369,
        keys=("lr_text_encoder", "loss_prior"),
        trained=("unet", "text_encoder"),
        tolerance=5e-3,
    ),
    "8-bit Adam": Case("--use_8bit_adam", 0.972134),
    "Adam's settings": Case(
        "--adam_beta1 0.8 --adam_beta2 0.99 --adam_weight_decay 0.1 --adam_epsilon 1e-6 --max_grad_norm 0.1", 0.972134
    ),
    "gradient checkpointing": Case("--gradient_checkpointing", 0.972134),
    "workers": Case("--dataloader_num_workers 2", 0.972134),
    "crop and flip": Case("--center_crop --random_flip --image_interpolation_mode bicubic", 0.785723, model="tiny_v"),
    "attention mask": Case("--text_encoder_use_attention_mask", 0.993916),
    "short prompts": Case("--tokenizer_max_length 24", 0.982441),
    "cut prompt": Case("--tokenizer_max_length 4", 0.997085, said="is longer than 4 tokens"),
    "no xformers": Case("--enable_xformers_memory_efficient_attention", 0.972134, said="xformers is not installed"),
    "no set_grads_to_none": Case("--set_grads_to_none", 0.972134, said="--set_grads_to_none has no effect"),
    "no local_rank": Case("--local_rank 0", 0.972134, said="--local_rank has no effect"),
    "TF32 and exact kernels": Case("--allow_tf32 --deterministic", 0.972134),
    "without text encoder": Case("--skip_save_text_encoder", 0.972134, scripts=FULL),
    "adapters": Case("--rank 2 --lora_alpha 6 --lora_dropout 0.5 --lora_layers to_k,ff.net.2", 0.972134, scripts=LORA),
    "adapters of the text encoder": Case(
        "--train_text_encoder --rank 2 --lora_alpha 6",
        0.972134,
        scripts=LORA,
        keys=("lr_text_encoder",),
        trained=("unet", "text_encoder"),
    ),
}


@pytest.fixture(scope="module")
def models(tiny, tiny_v) -> dict[str, Path]:
    """Return the folders of the base models."""
    return {"tiny": tiny, "tiny_v": tiny_v}


@pytest.mark.parametrize("name", CASES)
def test_case(trainer, models, class_images, tmp_path, name):
    """A case trains what it should, from the known loss on, and its result comes back whole."""
    case = CASES[name]
    flags = f"{case.flags} --pretrained_model_name_or_path {models[case.model]}"
    if "--with_prior_preservation" in flags:
        flags += f" --class_data_dir {class_images}"
    jobs = {script: trainer.start(script, tmp_path / script, flags) for script in case.scripts}
    for script, job in jobs.items():
        run = job.finish()
        assert run.code == 0, run.text
        assert run.stderr.count(case.said) == 1 or not case.said, run.stderr
        check_metrics(run.out, case)
        if script == "full":
            check_pipeline(run.out, models[case.model], case)
        else:
            check_adapter(run.out, models[case.model], case)


def check_metrics(out: Path, case: Case) -> None:
    """Check the two lines of a run's metrics."""
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert sorted(line) == sorted([*STEP_KEYS, *case.keys])
        assert all(math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
    assert lines[0]["loss"] == pytest.approx(case.loss, abs=case.tolerance), lines[0]["loss"]
    if "loss_prior" not in case.keys:
        assert lines[0]["loss_instance"] == lines[0]["loss"]


def check_pipeline(out: Path, base: Path, case: Case) -> None:
    """Check that a full result is a pipeline of one dtype in which exactly what was trained differs from the base."""
    before, after = read_tensors(base), read_tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    left_out = "--skip_save_text_encoder" in case.flags
    assert after.keys() == {key for key in before if not (left_out and key.startswith("text_encoder/"))}
    assert differing({key: before[key] for key in after}, after) == sorted(
        key for key in after if key.partition("/")[0] in case.trained
    )
    whole = diffusers.DiffusionPipeline.from_pretrained(base) if left_out else None
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        out, **({"text_encoder": whole.text_encoder} if left_out else {})
    )
    loaded = pipeline.unet.state_dict()
    assert differing({f"unet/{key}": value for key, value in loaded.items()}, part_of(after, "unet")) == []


def check_adapter(out: Path, base: Path, case: Case) -> None:
    """Check that a LoRA result is an adapter that comes back whole, has learned in every layer, and nothing more."""
    saved = {key.removeprefix("./"): tensor for key, tensor in read_tensors(out).items()}
    assert set(names(out)) - {"class_images", "samples"} == {
        *("README.md", "args.json", "metrics.jsonl", "scheduler", WEIGHTS_FILE)
    }
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all("lora_A" in key or "lora_B" in key for key in saved)
    assert {key.partition(".")[0] for key in saved} == set(case.trained)
    assert all(tensor.any() for tensor in saved.values())
    assert any("lora_B" in key for key in saved)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(out)
    loaded = {}
    for part in case.trained:
        state = peft.get_peft_model_state_dict(
            getattr(pipeline, part), adapter_name="default_0", save_embedding_layers=False
        )
        loaded |= {f"{part}.{key}": value for key, value in state.items()}
    assert (
        differing(loaded, {key.replace("text_encoder.text_model.", "text_encoder."): saved[key] for key in saved})
        == []
    )


def part_of(tensors: dict, part: str) -> dict:
    """Return the tensors of one network."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{part}/")}


# The first loss once more, from the description of what it is and nothing of the scripts.


def seed_of(*parts) -> int:
    """Derive a seed as documented: 32 bits of a hash of what it is for."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def generator_of(*parts) -> torch.Generator:
    """Return a generator that starts from a derived seed."""
    return torch.Generator().manual_seed(seed_of(*parts))


def cut_out(path: Path, index: int) -> torch.Tensor:
    """Read a picture as the first visit to it does: (1, 3, H, W) float32 in [-1, 1]."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize([round(edge * scale) for edge in image.size], Image.Resampling.LANCZOS)
    chance = random.Random(seed_of(SEED, "crop and flip", index, 0))
    left, top = (chance.randint(0, edge - SIZE) for edge in image.size)
    pixels = np.asarray(image)[top : top + SIZE, left : left + SIZE]
    return torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]


@torch.no_grad()
def recompute(case: Case, model: Path, kind: str, micro_step: int, paths: list[Path], index: int) -> float:
    """Return the mean loss of the two examples of one kind in an early batch, before any training.

    Args:
        kind: "instance" or "class".
        paths: all pictures of the kind.
        index: of the first of them in the run's list of pictures.
    """
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
    prompt = PROMPT if kind == "instance" else CLASS_PROMPT
    tokens = pipeline.tokenizer(prompt, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
    embeds = pipeline.text_encoder(tokens["input_ids"])[0]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    order = torch.randperm(len(paths), generator=generator_of(SEED, "order", kind, 0))
    gamma = 5 if "--snr_gamma 5" in case.flags else math.inf
    velocity = case.model == "tiny_v"
    losses = []
    for place in range(2):
        chosen = int(order[2 * micro_step + place])
        seed = seed_of(SEED, "example", kind, micro_step, place)
        posterior = pipeline.vae.encode(cut_out(paths[chosen], index + chosen)).latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=generator_of(seed, "posterior"))
        clean = (posterior.mean + posterior.std * drawn) * 0.18215
        noise = torch.randn(clean.shape[1:], generator=generator_of(seed, "noise"))[None]
        if "--offset_noise" in case.flags:
            noise = noise + 0.1 * torch.randn(4, 1, 1, generator=generator_of(seed, "noise offset"))
        timestep = torch.randint(1000, (), generator=generator_of(seed, "timestep"))
        signal = (1 - betas).cumprod(0)[timestep]
        predicted = pipeline.unet(signal.sqrt() * clean + (1 - signal).sqrt() * noise, timestep, embeds).sample
        snr = float(signal / (1 - signal))
        if velocity:
            wanted = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            weight = min(snr, gamma) / (snr + 1) if gamma < math.inf else 1
        else:
            wanted, weight = noise, min(snr, gamma) / snr
        losses.append(weight * float((predicted - wanted).square().mean()))
    return sum(losses) / 2


RECOMPUTED = [
    name for name in CASES if "accumulation" in name or name.startswith(("plain", "prior", "v-", "Min", "offset"))
]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_the_pinned_loss_is_right(models, photos, class_images, name):
    """A pinned first loss is that of the formulas."""
    case = CASES[name]
    loss_of = functools.partial(recompute, case, models[case.model])
    assert first_loss(case.flags, photos, class_images, loss_of) == pytest.approx(case.loss, abs=1e-5)


# What flags do that a first loss does not show.


@pytest.mark.parametrize(
    "schedule",
    ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "one_cycle"],
)
def test_learning_rates_are_those_of_diffusers(trainer, tmp_path, schedule):
    """Each schedule's rates equal those of the diffusers schedule of that name, or torch's, to float precision."""
    flags = f"--lr_scheduler {schedule} --lr_warmup_steps 2 --lr_num_cycles 2 --lr_power 2 --max_train_steps 7"
    outs = trainer.run_all({tmp_path / script: (script, flags) for script in SCRIPTS})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    if schedule == "one_cycle":
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 7, pct_start=2 / 7, cycle_momentum=False)
    else:
        theirs = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=7, num_cycles=2, power=2)
    wanted = []
    for _ in range(7):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    for out in outs:
        assert [line["lr"] for line in read_metrics(out)] == pytest.approx(wanted, rel=1e-6)


def test_scaled_learning_rates_and_epochs(trainer, tmp_path):
    """--scale_lr multiplies both rates by accumulation times batch; an epoch is one pass over the photos."""
    flags = (
        "--scale_lr --gradient_accumulation_steps 3 --train_text_encoder --text_encoder_lr 1e-4 --train_batch_size 2 "
        "--max_train_steps 2"
    )
    lines = read_metrics(trainer.run("full", tmp_path / "steps", flags).out)
    assert [line["lr"] for line in lines] == pytest.approx([6e-3] * 2)
    assert [line["lr_text_encoder"] for line in lines] == pytest.approx([6e-4] * 2)
    assert [line["epoch"] for line in lines] == [1, 2]  # 5 photos, 2 a batch: 3 batches

    words = "--train_batch_size 2 --num_train_epochs 2 --seed 1 --resolution 64 --report_to none".split()
    words += ["--pretrained_model_name_or_path", trainer.model, "--instance_data_dir", trainer.photos]
    words += ["--instance_prompt", PROMPT, "--output_dir", tmp_path / "epochs"]
    run = trainer.start_words("lora", tmp_path / "epochs", list(map(str, words))).finish()
    assert run.code == 0, run.text
    assert [line["epoch"] for line in read_metrics(run.out)] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_one_step_is_that_of_adamw(trainer, tiny, tmp_path):
    """After one step, each weight is where AdamW puts it, with the flags' numbers and a clipped gradient."""
    flags = (
        "--adam_beta1 0.8 --adam_beta2 0.99 --adam_weight_decay 0.1 --adam_epsilon 1e-6 --max_grad_norm 0.01 "
        "--max_train_steps 1 --checkpointing_steps 1 --train_text_encoder --text_encoder_lr 2e-3"
    )
    out = trainer.run("full", tmp_path / "out", flags).out
    saved = torch.load(out / "checkpoint-1" / "optimizer.pt", weights_only=True)["optimizer"]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    after = diffusers.StableDiffusionPipeline.from_pretrained(out)
    gradients = {number: state["exp_avg"] / 0.2 for number, state in saved["state"].items()}
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(total) == pytest.approx(0.01, rel=1e-4)
    for group, part, rate in zip(saved["param_groups"], ("unet", "text_encoder"), (1e-3, 2e-3), strict=True):
        old, new = (list(getattr(each, part).parameters()) for each in (pipeline, after))
        assert len(group["params"]) == len(old)
        for number, before, now in zip(group["params"], old, new, strict=True):
            gradient = gradients[number]
            step = gradient / (gradient.abs() + 1e-6)
            torch.testing.assert_close(now, before * (1 - rate * 0.1) - rate * step, rtol=1e-4, atol=1e-6)


def test_8_bit_adam_keeps_8_bits(trainer, tmp_path):
    """With --use_8bit_adam the moments of large tensors are bytes."""
    out = trainer.run("full", tmp_path / "out", "--use_8bit_adam --checkpointing_steps 2").out
    state = read_optimizer(out / "checkpoint-2")
    moments = [value for key, value in state.items() if key.endswith(("/state1", "/state2"))]
    assert {(moment.dtype, moment.numel() >= 4096) for moment in moments} == {
        (torch.uint8, True),
        (torch.float32, False),
    }


def test_adapters_have_the_layers_rank_and_strength_asked_for(trainer, tiny, tmp_path):
    """The result holds adapters of the named layers and rank, and is loaded with alpha / rank."""
    flags = "--rank 2 --lora_alpha 6 --lora_layers to_k,ff.net.2 --train_text_encoder"
    out = trainer.run("lora", tmp_path / "out", flags).out
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny)
    layers = {name for name, _ in pipeline.unet.named_modules() if name.endswith((".to_k", ".ff.net.2"))}
    pipeline.load_lora_weights(out)
    for network, wanted in ((pipeline.unet, layers), (pipeline.text_encoder, None)):
        adapted = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
        assert adapted and (wanted is None or adapted.keys() == wanted)
        assert {layer.scaling["default_0"] for layer in adapted.values()} == {3.0}
        assert {layer.r["default_0"] for layer in adapted.values()} == {2}
    ends = {name.rpartition(".")[2] for name in adapted}
    assert ends == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_dropout_of_adapters_works_and_spares_the_rest(trainer, tmp_path):
    """--lora_dropout changes nothing before the first step, and the weights after it."""
    runs = [trainer.run("lora", tmp_path / rate, f"--lora_dropout {rate}") for rate in ("0.0", "0.5")]
    (first, second), (same_first, other_second) = (untimed(run.out) for run in runs)
    assert first["loss"] == same_first["loss"] and first["grad_norm"] != same_first["grad_norm"]
    assert second["loss"] != other_second["loss"]


def test_dropout_of_adapters_is_not_at_work_when_the_result_draws(trainer, tiny, tmp_path):
    """`load_lora_weights` would make what the file says it was trained with, and leave it switched on."""
    out = trainer.run("lora", tmp_path / "out", "--lora_dropout 0.5 --train_text_encoder").out
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny)
    pipeline.load_lora_weights(out)
    dropouts = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
    assert [layer for layer in dropouts if isinstance(layer, torch.nn.Dropout) and layer.training and layer.p] == []


# Launching and trackers.


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_way_of_launching_trains_the_same(trainer, tmp_path, script):
    """`python script`, `accelerate launch script` and a fork of the tests' process end in the same bits."""
    flags = "--train_text_encoder --max_train_steps 3"
    jobs = {how: trainer.start(script, tmp_path / how, flags, how) for how in ("python", "accelerate", "fork")}
    for job in jobs.values():
        run = job.finish()
        assert run.code == 0, run.text
        assert "Traceback" not in run.text
    forked = jobs["fork"].out
    for how in ("python", "accelerate"):
        assert differing(read_tensors(jobs[how].out), read_tensors(forked)) == []
        assert untimed(jobs[how].out) == untimed(forked)


def read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Read the numbers that TensorBoard would show: by name, then by step."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def read_wandb(path: Path) -> dict[str, dict[int, float]]:
    """Read the numbers of a wandb run file, a LevelDB log of protocol buffers: by name, then by step."""
    data, position, record, found = path.read_bytes(), 7, b"", {}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little for a header: the block ends in padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            history = wandb_internal_pb2.Record.FromString(record).history
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            for name, value in items.items():
                found.setdefault(name, {})[items["_step"]] = value
            record = b""
    return found


@pytest.mark.parametrize(("script", "how"), [("full", "fork"), ("lora", "python")])
def test_trackers_get_the_metrics_and_the_previews_and_nothing_secret(trainer, tmp_path, script, how):
    """TensorBoard and wandb, offline, hold the numbers of metrics.jsonl and the pictures; the token is nowhere."""
    secret = "hf_ThisMustNotBeWritten"
    flags = (
        f"--report_to tensorboard,wandb --logging_dir logbook --hub_token {secret} --validation_prompt dog "
        "--num_validation_images 1 --validation_num_inference_steps 2"
    )
    run = trainer.run(script, tmp_path / "out", flags, how=how, WANDB_MODE="offline")
    out, run_log = run.out, trainer.home / f"run-{trainer.count}"
    (wandb_file,) = out.glob("wandb/offline-run-*/*.wandb")
    board, run_file = read_tensorboard(out / "logbook" / "dreambooth"), read_wandb(wandb_file)
    for line in read_metrics(out):
        for name in line.keys() - {"step"}:
            assert board[name][line["step"]] == pytest.approx(line[name], rel=1e-6)
            assert run_file[name][line["step"]] == pytest.approx(line[name], rel=1e-6)
    events = EventAccumulator(str(out / "logbook" / "dreambooth")).Reload()
    assert [event.step for event in events.Images("validation")] == [0, 2]
    live = Image.open(out / "samples" / "step-000002" / "00.png")
    (sent,) = out.glob("wandb/offline-run-*/files/media/images/validation_2_*.png")
    assert np.array_equal(np.asarray(live), np.asarray(Image.open(sent)))
    files = [path for folder in (out, run_log) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert list((run_log / "cwd").iterdir()) == []
