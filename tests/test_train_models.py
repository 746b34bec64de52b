"""How the small models are trained, in a few steps, and what the trained ones in models/ can do."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from transformers import CLIPTokenizer, T5Tokenizer

import train_dreambooth
from train_dreambooth import vlb_loss
from utils.evaluation import exam
from utils.lab import train_models, train_parts
from utils.lab.train_models import RECIPES
from utils.sampling import results
from utils.synthetic import shapes

ROOT = train_models.ROOT
MODELS = ROOT / "models"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train all four for three steps on a few pictures."""
    folder = tmp_path_factory.mktemp("models")
    short = {"steps": 3, "text_steps": 3, "vae_steps": 3, "decoder_steps": 3, "batch_size": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_models, "PICTURES", 24)
        for name, recipe in RECIPES.items():
            patch.setitem(RECIPES, name, dataclasses.replace(recipe, **short))
        assert train_models.main(["--output", str(folder), "--threads", "1"]) == 0
        assert train_models.main(["--output", str(folder), "--only", "shapes-sd"]) == 1
    return folder


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_trained_folder_is_a_pipeline_of_its_kind(trained, name):
    """It loads in float32 from half the bytes, knows the words, and draws at its size."""
    pipeline = DiffusionPipeline.from_pretrained(trained / name)
    assert pipeline.unet.dtype is pipeline.text_encoder.dtype is torch.float32
    assert pipeline.scheduler.config.prediction_type == RECIPES[name].prediction_type
    stored = safetensors.torch.load_file(trained / name / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    inputs = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    if name == "shapes-if2":
        inputs["image"] = torch.zeros(1, 3, 16, 16)
    picture = pipeline("a small sks circle on a blue background", **inputs).images[0]
    assert picture.shape == (RECIPES[name].pixels, RECIPES[name].pixels, 3) and np.isfinite(picture).all()
    ids = pipeline.tokenizer("small sks circle", add_special_tokens=False).input_ids
    assert len(ids) == 3 and isinstance(pipeline.tokenizer, T5Tokenizer if "if" in name else CLIPTokenizer)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "shapes-if2"])
def test_the_trained_models_draw_what_they_are_asked_for(name):
    """Classes, colours, backgrounds, sizes and places, and nothing that looks like a subject."""
    pipeline = results.load_pipeline(MODELS / name, scheduler=results.SAVED)
    scores = exam.score(exam.answer(pipeline, exam.ask("quartered circle", "", [0]), "quartered circle"))
    for measure in ("class right", "colour right", "background right", "prompts obeyed", "other prompts obeyed"):
        assert scores[measure].value >= 0.8, measure
    assert scores["diversity of class backgrounds, bits"].value > 1.5
    assert scores["leak into the class"].value == scores["leak into other classes"].value == 0


def test_the_trained_stage_two_enlarges_better_than_bilinear_resizing():
    """Sharper everywhere, and closer to the truth on the whole."""
    pipeline = results.load_pipeline(MODELS / "shapes-if2", scheduler=results.SAVED)
    scores = exam.score_enlarged(exam.enlarge(pipeline, "quartered circle", "", [0], 64))
    topics = ("subject", "class", "others")
    for topic in topics:
        assert scores[f"SSIM, {topic}"].value > scores[f"SSIM, {topic}, bilinear"].value + 0.02
    ours, plain = ([scores[f"PSNR, {topic}{of}"].value for topic in topics] for of in ("", ", bilinear"))
    assert np.mean(ours) > np.mean(plain) + 0.3


def test_the_trained_models_are_small():
    """All of them together take at most 25 MB."""
    assert {path.name for path in MODELS.iterdir()} == set(RECIPES)
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 25e6


def test_models_share_what_belongs_together(trained):
    """The sisters their VAE and text encoder, the stages their T5; and every model has moved from its random start."""
    pipelines = {name: DiffusionPipeline.from_pretrained(trained / name) for name in RECIPES}
    for first, second, part in (
        ("shapes-sd", "shapes-sd-v", "vae"),
        ("shapes-sd", "shapes-sd-v", "text_encoder"),
        ("shapes-if1", "shapes-if2", "text_encoder"),
    ):
        one, other = (getattr(pipelines[name], part).state_dict() for name in (first, second))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert pipelines["shapes-sd"].vae.config.scaling_factor == pipelines["shapes-sd-v"].vae.config.scaling_factor != 1
    one, other = (pipelines[name].unet.state_dict() for name in ("shapes-sd", "shapes-sd-v"))
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("conv1.weight"))


def test_a_model_that_starts_from_another_needs_it(tmp_path, capsys):
    """A plain error says which."""
    assert train_models.main(["--output", str(tmp_path), "--only", "shapes-if2"]) == 1
    assert f"{tmp_path / 'shapes-if1'} is missing, from which this model starts" in capsys.readouterr().err


def test_the_variational_term_is_that_of_the_scripts():
    """From t = 1 on."""
    torch.manual_seed(0)
    alphas_cumprod = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    clean, noise, error = torch.rand(6, 3, 4, 4) * 2 - 1, torch.randn(6, 3, 4, 4), 0.1 * torch.randn(6, 3, 4, 4)
    variance, timesteps = torch.rand(6, 3, 4, 4) * 2 - 1, torch.tensor([1, 2, 50, 400, 900, 999])
    signal = alphas_cumprod[timesteps][:, None, None, None]
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    pictures = (noise + error, variance, clean, noisy)
    expected = vlb_loss(*pictures, timesteps, alphas_cumprod)
    found = train_parts.variational_term(error, variance, timesteps, alphas_cumprod)
    assert found.item() == pytest.approx(expected.mean().item(), rel=1e-3)


def test_made_up_captions_are_labelled_by_what_they_say():
    """Every word of an attribute that is labelled stands there, rare words before the colour."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        text, labels = train_parts.made_up_caption(rng)
        words = [
            None if at == len(names) else names[at] for at, names in zip(labels, train_parts.ATTRIBUTES, strict=True)
        ]
        shape, colour, background, size, place, rare = words
        described = " ".join(word for word in (rare, colour) if word)
        assert text == shapes.phrase(shape, described or None, background, size, place)


def test_stage_two_is_fed_what_the_scripts_feed_it():
    """The enlarged picture, without noise."""
    clean = torch.rand(2, 3, 32, 32) * 2 - 1
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    timesteps, seeds = torch.tensor([0, 0]), [1, 2]
    inputs = train_dreambooth.stage_two_inputs(clean, timesteps, clean, seeds, scheduler, "noise_level")
    drawn = train_dreambooth.sample_noise(clean.shape, seeds, 1000, 0.0, "low resolution ")
    expected = scheduler.add_noise(train_parts.enlarge(clean), *drawn)
    assert torch.allclose(inputs["sample"][:, 3:], expected, atol=1e-6)
