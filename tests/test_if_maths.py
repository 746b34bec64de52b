"""What is particular to DeepFloyd IF's training step: against values by hand, and against what its pipelines do."""

import copy
import math
from argparse import Namespace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image

import train_dreambooth
import train_dreambooth_lora
from tests.conftest import make_concept, make_dataset, visit_of
from tests.if_models import PIPELINES, STAGES, quiet, write_models
from train_dreambooth import vlb_loss
from utils.core.seeds import derive_seed, generator
from utils.data.geometry import Size

SEEDS = [derive_seed(0, "example", number) for number in range(12000)]
WORDS = [
    "A Photo of SKS Dog!!!",
    "a photo of <b>sks</b> dog &amp; a “cat” — at https://dogs.org/p.jpg",
    "",
    ":-:sks" + " dog" * 90,
]


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write the tiny models."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pipelines(models):
    """Load the tiny models' own pipelines."""
    return {stage: quiet(PIPELINES[stage].from_pretrained(models[stage])) for stage in STAGES}


@pytest.fixture
def accelerator(monkeypatch):
    """Set accelerate up on the CPU, and forget it afterwards."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def capture(unet, calls: list):
    """Let every call of a U-Net leave its inputs, by name."""

    def remember(module, args, kwargs):
        names = ("sample", "timestep")
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    return unet.register_forward_pre_hook(remember, with_kwargs=True)


def edges(count: int, width: int, height: int) -> torch.Tensor:
    """Draw pictures of hard black and white edges, (B, 3, H, W), which bicubic resizing overshoots."""
    chance = generator("edges")
    return (
        (torch.rand(count, 3, height // 4, width // 4, generator=chance).round() * 2 - 1)
        .repeat_interleave(4, dim=2)
        .repeat_interleave(4, dim=3)
        .roll((1, 2), (2, 3))
    )


def one_step(script, pipeline, stage: str, pictures: torch.Tensor, embeds: torch.Tensor, **flags):
    """Return the loss of a batch of pictures, and the inputs and the output of its call of the U-Net."""
    conditioning = flags.pop("class_labels_conditioning", "noise_level")
    weight_map = flags.pop("weight_map", torch.ones_like(pictures[:, :1]))
    args = Namespace(**{"snr_gamma": None, "train_variance": False, "prior_target": "images"} | flags)
    kind = {"if1": script.ModelKind.IF_STAGE_1, "if2": script.ModelKind.IF_STAGE_2}[stage]
    base = SimpleNamespace(kind=kind, prediction_type="epsilon", conditioning=conditioning, scaling_factor=1.0)
    plan = SimpleNamespace(base=base, noise_offset=0.1)
    noising = getattr(pipeline, "image_noising_scheduler", None)
    unet = pipeline.unet
    prompts = script.PromptTable(["dog"], torch.zeros(1, 77), None, embeds)
    models = script.Models(prompts, unet, None, None, pipeline.scheduler, noising, {"unet": unet}, {})
    count = len(pictures)
    batch = {
        "pixel_values": pictures,
        "prompt_rows": torch.zeros(count, dtype=torch.int64),
        "weight_map": weight_map,
        "is_prior": torch.zeros(count, dtype=torch.bool),
        "mean_weights": torch.full((count,), 1 / count, dtype=torch.float64),
        "loss_weights": torch.ones(count, dtype=torch.float64),
        "seeds": torch.tensor(SEEDS[:count]),
    }
    calls, outputs = [], []

    def keep(module, inputs, output):
        output.sample.retain_grad()
        outputs.append(output.sample)

    hooks = [capture(unet, calls), unet.register_forward_hook(keep)]
    loss = script.compute_loss(args, SimpleNamespace(device=torch.device("cpu")), plan, models, batch)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 1
    return loss, calls[0], outputs[0]


# ---------------------------------------------------------------------------------------- what the U-Net is fed


class Started(diffusers.IFSuperResolutionPipeline):
    """The pipeline, but it goes on from a given picture: then the first noise that it draws is the small picture's."""

    def prepare_intermediate_images(self, *shape_and_more) -> torch.Tensor:
        """Return the picture from which to go on."""
        return self.start


@pytest.mark.parametrize(("width", "height"), [(16, 16), (24, 16)])
def test_stage_two_is_fed_in_training_as_when_it_draws(script, pipelines, width, height):
    """For the same picture, level and noise, every input of the U-Net is that of the pipeline, to the bit."""
    pipeline = Started(**pipelines["if2"].components, requires_safety_checker=False)
    quiet(pipeline)
    pictures, embeds = edges(4, width, height), torch.randn(1, 77, 48, generator=generator("embeds"))
    _, fed, _ = one_step(script, pipeline, "if2", pictures, embeds)
    assert sorted(fed) == ["class_labels", "encoder_hidden_states", "sample", "timestep"]
    levels = fed["class_labels"].tolist()
    assert len(set(levels)) == 4 and levels != fed["timestep"].tolist()
    calls = []
    hook = capture(pipeline.unet, calls)
    for place, picture in enumerate(pictures):
        small = F.interpolate(picture[None], (height // 4, width // 4), mode="bicubic", antialias=True)
        assert small.abs().max() > 1.01, "the picture must put the clamp to the test"
        pipeline.start = fed["sample"][place : place + 1, :3]
        pipeline(
            image=small.clamp(-1, 1),  # no stage draws anything else
            prompt_embeds=embeds,
            noise_level=levels[place],
            timesteps=[int(fed["timestep"][place])],
            guidance_scale=1.0,
            height=height,
            width=width,
            generator=generator(SEEDS[place], "low resolution noise"),
        )
    hook.remove()
    assert len(calls) == 4
    for place, call in enumerate(calls):
        assert torch.equal(call["sample"][0], fed["sample"][place])
        assert call["class_labels"].tolist() == [levels[place]]
        assert torch.equal(call["encoder_hidden_states"][0], fed["encoder_hidden_states"][place])
        assert int(call["timestep"]) == fed["timestep"][place]


def test_stage_one_is_fed_the_noisy_picture(script, pipelines):
    """A pixel model sees sqrt(a) x picture + sqrt(1 - a) x noise, no latents, and is compared with the noise."""
    pictures, embeds = edges(3, 16, 16), torch.randn(1, 77, 48, generator=generator("embeds"))
    loss, fed, output = one_step(script, pipelines["if1"], "if1", pictures, embeds)
    assert sorted(fed) == ["encoder_hidden_states", "sample", "timestep"]
    noise, timesteps = script.sample_noise(pictures.shape, SEEDS[:3], 1000, 0.1)
    kept = pipelines["if1"].scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    assert torch.equal(fed["timestep"], timesteps)
    torch.testing.assert_close(fed["sample"], kept.sqrt() * pictures + (1 - kept).sqrt() * noise)
    assert output.shape == (3, 6, 16, 16)
    torch.testing.assert_close(loss["loss"], (output[:, :3] - noise).square().mean())


def enlarged_part(inputs: dict, seeds: list[int], alphas: torch.Tensor) -> torch.Tensor:
    """Take the noise out of the low-resolution half of stage II's inputs again."""
    shape = inputs["sample"][:, 3:].shape
    noise = torch.stack([torch.randn(shape[1:], generator=generator(seed, "low resolution noise")) for seed in seeds])
    kept = alphas[inputs["class_labels"]].double().view(-1, 1, 1, 1)
    return (inputs["sample"][:, 3:].double() - (1 - kept).sqrt() * noise.double()) / kept.sqrt()


def stage_two(script, pictures: torch.Tensor, seeds: list[int], conditioning: str = "noise_level"):
    """Return stage II's inputs, and the noisy pictures and timesteps that they were made from."""
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noise, timesteps = script.sample_noise(pictures.shape, seeds, 1000, 0.0)
    noisy = noising.add_noise(pictures, noise, timesteps)
    return script.stage_two_inputs(noisy, timesteps, pictures, seeds, noising, conditioning), noisy, timesteps


def test_the_small_picture_is_the_one_that_pillow_would_make(script):
    """What is to be enlarged is a quarter of the size, antialiased as Pillow does it."""
    levels = torch.cat([stage_two(script, torch.zeros(1, 3, 4, 4), [seed])[0]["class_labels"] for seed in SEEDS[:60]])
    seeds = [SEEDS[place] for place in levels.argsort()[:4]]  # little noise, which is taken out exactly
    y, x = np.mgrid[0:32, 0:48]
    # Not black and white: between its two passes, Pillow cuts off what overshoots.
    stripes = np.uint8(50 + 155 * np.stack([(x + y) % 2, x // 2 % 2, (x // 5 + y // 7) % 2], axis=-1))
    picture = torch.from_numpy(stripes / np.float32(127.5) - 1).permute(2, 0, 1).expand(4, 3, 32, 48)
    inputs, noisy, _ = stage_two(script, picture, seeds)
    assert torch.equal(inputs["sample"][:, :3], noisy)
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert inputs["class_labels"].max() < 150
    small = np.asarray(Image.fromarray(stripes).resize((12, 8), Image.Resampling.BICUBIC)) / 127.5 - 1
    wanted = F.interpolate(
        torch.from_numpy(small).permute(2, 0, 1)[None], (32, 48), mode="bilinear", align_corners=True
    )
    found = enlarged_part(inputs, seeds, alphas)
    assert (found - wanted).abs().max() < 1.5 / 127.5


def test_every_noise_level_comes_equally_often_and_alone(script):
    """Levels are uniform in [0, T), of an example's own seed, and know nothing of its timestep."""
    noising, many = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), torch.zeros(len(SEEDS), 3, 4, 4)
    inputs = script.stage_two_inputs(many, None, many, SEEDS, noising, "noise_level")
    levels = inputs["class_labels"]
    _, noisy, timesteps = stage_two(script, torch.zeros(3000, 3, 4, 4), SEEDS[:3000])
    assert levels.dtype == torch.int64 and sorted(set(levels.tolist())) == list(range(1000))
    counts = np.bincount(levels.numpy() // 25, minlength=40)
    assert ((counts - 300) ** 2 / 300).sum() / 39 < 1 + 4 * math.sqrt(2 / 39)
    assert abs(torch.corrcoef(torch.stack([levels[:3000].float(), timesteps.float()]))[0, 1]) < 0.03
    assert (levels[:3000] == timesteps).float().mean() < 0.004
    assert abs((inputs["sample"][:3000, 3:] * noisy).mean()) < 0.01, "the two halves have noise of their own"
    for places in ([2], [3, 0], [3, 2, 1, 0]):
        again, _, _ = stage_two(script, torch.zeros(len(places), 3, 4, 4), [SEEDS[place] for place in places])
        assert torch.equal(again["class_labels"], levels[places])
        assert torch.equal(again["sample"][:, 3:], inputs["sample"][places, 3:])


def test_the_published_recipe_feeds_the_noisy_picture_twice(script, pipelines):
    """With `timesteps`, both halves are the noisy picture, and the class label is the timestep."""
    pictures, embeds = edges(3, 16, 16), torch.randn(1, 77, 48, generator=generator("embeds"))
    _, fed, _ = one_step(script, pipelines["if2"], "if2", pictures, embeds, class_labels_conditioning="timesteps")
    _, ours, _ = one_step(script, pipelines["if2"], "if2", pictures, embeds, class_labels_conditioning="noise_level")
    assert torch.equal(fed["sample"][:, :3], fed["sample"][:, 3:])
    assert torch.equal(fed["class_labels"], fed["timestep"])
    assert torch.equal(fed["sample"][:, :3], ours["sample"][:, :3])
    assert torch.equal(fed["timestep"], ours["timestep"])


def test_prompts_are_fed_as_when_the_pipeline_is_called(script, models, pipelines, photos, accelerator, tmp_path):
    """For every prompt of the run, the U-Net gets the embeddings that a call with its text gives it, to the bit."""
    stage = "if1" if script is train_dreambooth else "if2"
    argv = ["--pretrained_model_name_or_path", models[stage], "--instance_data_dir", photos, "--cache_dir", tmp_path]
    argv += ["--instance_prompt", WORDS[0], "--validation_prompt", WORDS[1], "--validation_negative_prompt", WORDS[3]]
    argv += ["--num_eval_images", "1"] if stage == "if2" else []
    args = script.parse_args([*map(str, argv), "--output_dir", str(tmp_path / "out")])
    base, size = script.detect_model(args), Size(16, 16)
    examples = [script.Example(tmp_path / "a.png", (WORDS[0],), make_concept(), size)]
    plan = SimpleNamespace(base=base, frozen_dtype=torch.float32, examples=examples)
    first = script.encode_prompts(args, accelerator, plan)
    again = script.encode_prompts(args, accelerator, plan)
    assert sorted(first.texts) == sorted(WORDS)
    assert first.ids.shape == first.mask.shape == (4, 77)
    lengths = dict(zip(first.texts, first.mask.sum(dim=1).tolist(), strict=True))
    assert lengths[""] == 1 and 5 < lengths[WORDS[0]] < lengths[WORDS[1]] < lengths[WORDS[3]] == 77
    assert first.embeds.shape == (4, 77, 48) and torch.equal(first.embeds, again.embeds)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    pipeline, calls = pipelines[stage], []
    hook = capture(pipeline.unet, calls)
    small = {"image": torch.zeros(1, 3, 4, 4)} if stage == "if2" else {}
    for text in WORDS:
        pipeline(text, height=16, width=16, num_inference_steps=1, guidance_scale=2.0, **small)
        empty, embeds = calls.pop()["encoder_hidden_states"]
        rows = first.rows_of(text, "")
        assert torch.equal(script.embed_prompts(first, None, rows[:1], together=False)[0], embeds)
        assert torch.equal(first.embeds[rows[1]], empty)
    hook.remove()


# ------------------------------------------------------------------------------------------- the variance


ALPHAS = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod


def bound_by_hand(noise, variance, clean, noisy, timestep) -> float:
    """Return one number's term of the bound in bits, from the papers, for plain numbers."""
    alphas = ALPHAS.double().tolist()
    kept, before = alphas[timestep], alphas[timestep - 1] if timestep else 1.0
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    if timestep == 0:
        posterior = (1 - alphas[1] / alphas[0]) * (1 - alphas[0]) / (1 - alphas[1])
    log_variance = (1 + variance) / 2 * math.log(beta) + (1 - variance) / 2 * math.log(posterior)
    guess = noisy / math.sqrt(kept) - math.sqrt(1 / kept - 1) * noise
    means = [
        math.sqrt(before) * beta / (1 - kept) * start + math.sqrt(kept / before) * (1 - before) / (1 - kept) * noisy
        for start in (clean, guess)
    ]
    if timestep:
        distance = (means[0] - means[1]) ** 2 / math.exp(log_variance)
        nats = (log_variance - math.log(posterior) + math.exp(math.log(posterior) - log_variance) + distance - 1) / 2
        return nats / math.log(2)
    left, right = ((clean + step / 255 - means[1]) / math.exp(log_variance / 2) for step in (-1, 1))
    below = 0.0 if clean == -1 else (1 + math.erf(left / math.sqrt(2))) / 2
    above = 1.0 if clean == 1 else (1 + math.erf(right / math.sqrt(2))) / 2
    return -math.log2(max(above - below, 1e-12))


def bound(noise, variance, clean, noisy, timesteps, dtype=torch.float64) -> torch.Tensor:
    """Return the bound for lists of numbers, an example each."""
    columns = [torch.tensor(column, dtype=dtype).view(-1, 1, 1, 1) for column in (noise, variance, clean, noisy)]
    return vlb_loss(*columns, torch.tensor(timesteps), ALPHAS.to(dtype)).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("timestep", [0, 1, 2, 30, 500, 998, 999])
def test_the_bound_by_hand(timestep):
    """Each term is the KL divergence of two Gaussians, or at the last step minus the logarithm of a probability."""
    chance = np.random.default_rng(timestep)
    clean = [*(chance.integers(0, 256, 6) / 127.5 - 1).tolist(), -1.0, 1.0, -1.0, 1.0]
    noise = chance.normal(size=10).tolist()
    kept = float(ALPHAS[timestep])
    true = chance.normal(size=10)
    noisy = [math.sqrt(kept) * picture + math.sqrt(1 - kept) * one for picture, one in zip(clean, true, strict=True)]
    variance = chance.uniform(-1.2, 1.2, 10).tolist()
    wanted = [bound_by_hand(*numbers, timestep) for numbers in zip(noise, variance, clean, noisy, strict=True)]
    found = bound(noise, variance, clean, noisy, [timestep] * 10)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    single = bound(noise, variance, clean, noisy, [timestep] * 10, torch.float32)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(wanted, rel=2e-2, abs=2e-3)


def test_the_bound_is_the_mean_of_an_examples_numbers():
    """Over its own channels and pixels, as much as each counts, whatever the others' timesteps are."""
    chance = generator("bound")
    noise, variance, noisy = torch.randn(3, 3, 3, 2, 2, generator=chance, dtype=torch.float64)
    clean = torch.rand(3, 3, 2, 2, generator=chance, dtype=torch.float64) * 2 - 1
    timesteps = [700, 0, 1]
    light = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])[:, None]
    pictures = (noise, variance, clean, noisy)
    terms = vlb_loss(*pictures, torch.tensor(timesteps), ALPHAS.double())
    found = train_dreambooth.weighted_mean(terms, light.double())
    for place, timestep in enumerate(timesteps):
        numbers = (tensor[place].flatten().tolist() for tensor in pictures)
        terms, weights = (
            [bound_by_hand(*four, timestep) for four in zip(*numbers, strict=True)],
            light[place].flatten().tolist(),
        )
        assert found[place].item() == pytest.approx(np.average(terms, weights=3 * weights), rel=1e-6)


def test_the_range_of_the_variance_is_that_of_diffusers():
    """With an exact prediction, what is left are the two log variances, and those are the scheduler's own."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    for timestep in (1, 2, 10, 100, 400, 800):
        posterior = scheduler._get_variance(timestep, variance_type="fixed_small").double().log()
        deviation = scheduler._get_variance(timestep, variance_type="fixed_small_log")
        assert float(2 * deviation.log()) == pytest.approx(float(posterior), rel=1e-5)
        for share in (-1.0, -0.4, 0.0, 0.7, 1.0):
            log_variance = scheduler._get_variance(timestep, predicted_variance=torch.tensor(share))
            above = log_variance.double() - posterior
            wanted = float(above + (-above).exp() - 1) / 2 / math.log(2)
            noisy = math.sqrt(ALPHAS[timestep]) * 0.3 + math.sqrt(1 - ALPHAS[timestep]) * 1.2
            found = bound([1.2], [share], [0.3], [noisy], [timestep]).item()
            assert found == pytest.approx(wanted, rel=2e-2, abs=1e-12), (timestep, share)
            assert share == -1 or found > 1e-12


def test_an_exact_prediction_with_the_posteriors_variance_costs_nothing():
    """At every step but the last, the bound's term is zero there, and above zero for any other prediction."""
    timesteps = list(range(1, 1000))
    kept = ALPHAS[1:].double()
    noisy = (kept.sqrt() * 0.5 - (1 - kept).sqrt() * 0.8).tolist()
    same = bound([-0.8] * 999, [-1.0] * 999, [0.5] * 999, noisy, timesteps)
    assert same.abs().max() < 1e-9
    assert bound([-0.8] * 999, [-0.9] * 999, [0.5] * 999, noisy, timesteps).min() > 0
    assert (bound([-0.7] * 999, [-1.0] * 999, [0.5] * 999, noisy, timesteps) > same + 1e-12).all()


@pytest.mark.parametrize(("mean", "variance"), [(0.1, 1.0), (-0.999, 0.0), (0.998, 0.5), (1.3, 1.0), (-1.3, 1.0)])
def test_the_last_steps_probabilities_add_up(mean, variance):
    """The probabilities of a picture's 256 levels sum to one, wherever the predicted picture lies."""
    kept = float(ALPHAS[0])
    levels = [level / 127.5 - 1 for level in range(256)]
    noisy = math.sqrt(kept) * mean + math.sqrt(1 - kept) * 0.7
    bits = bound([0.7] * 256, [variance] * 256, levels, [noisy] * 256, [0] * 256)
    chances = 2**-bits
    assert chances.sum().item() == pytest.approx(1, abs=1e-6)
    assert chances.argmax() == min(max(round((mean + 1) * 127.5), 0), 255)
    if abs(mean) > 1.2:
        assert chances.max() > 1 - 1e-6


def test_the_bounds_gradient_is_finite_at_every_step():
    """Also for bad predictions of black and of white, and in a batch of all timesteps."""
    chance = generator("gradient")
    noise, noisy = 3 * torch.randn(2, 1000, 3, 2, 2, generator=chance)
    variance = (torch.randn(1000, 3, 2, 2, generator=chance) * 2).requires_grad_()
    clean = torch.rand(1000, 3, 2, 2, generator=chance).mul(3).sub(1.5).clamp(-1, 1)
    losses = vlb_loss(noise, variance, clean, noisy, torch.arange(1000), ALPHAS)
    losses.sum().backward()
    assert losses.isfinite().all() and variance.grad.isfinite().all()
    assert variance.grad[1:].abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("steps", [1000, 500])
@pytest.mark.parametrize("stage", STAGES)
def test_the_variance_is_taught_by_the_bound_and_the_prediction_is_not(script, pipelines, stage, steps):
    """The bound counts T / 1000 times; its gradient reaches the variance's channels and no other."""
    pipeline = copy.copy(pipelines[stage])
    pipeline.scheduler = DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
    pictures, embeds = edges(4, 16, 16), torch.randn(1, 77, 48, generator=generator("embeds"))
    plain, fed, without = one_step(script, pipeline, stage, pictures, embeds)
    hybrid, same, output = one_step(script, pipeline, stage, pictures, embeds, train_variance=True)
    assert torch.equal(output, without) and torch.equal(fed["sample"], same["sample"])
    for loss in (plain, hybrid):
        loss["loss"].backward()
    assert torch.equal(output.grad[:, :3], without.grad[:, :3]) and without.grad[:, :3].abs().max() > 0
    assert not without.grad[:, 3:].any() and output.grad[:, 3:].abs().amax(dim=(1, 2, 3)).min() > 0
    alphas, noisy = pipeline.scheduler.alphas_cumprod, fed["sample"][:, :3]
    terms = vlb_loss(*output.detach().split(3, dim=1), pictures, noisy, fed["timestep"], alphas)
    assert (hybrid["loss"] - plain["loss"]).item() == pytest.approx(steps / 1000 * terms.mean().item(), rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_mask_hides_teaches_no_variance(script, pipelines, stage):
    """Neither the prediction nor the variance has a gradient where the mask is dark."""
    pictures, embeds = edges(2, 16, 16), torch.randn(1, 77, 48, generator=generator("embeds"))
    light = torch.zeros(2, 1, 16, 16)
    light[:, :, 4:12, 2:9] = 1
    options = {"train_variance": True, "weight_map": light}
    loss, _, output = one_step(script, pipelines[stage], stage, pictures, embeds, **options)
    loss["loss"].backward()
    dark, bright = ((light == value).expand_as(output) for value in (0, 1))
    assert not output.grad[dark].any() and (output.grad[bright] != 0).float().mean() > 0.9


# ------------------------------------------------------------------------------------- pictures and captions


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Write a picture of noise, no two parts of which are alike."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("is_if", "mode"), [(True, "BICUBIC"), (False, "LANCZOS")])
@pytest.mark.parametrize(
    ("style", "lefts"), [("shifted_center", range(16, 25)), ("center", [20]), ("random", range(41))]
)
def test_crops_lie_where_their_style_says(script, wide, is_if, mode, style, lefts):
    """A shifted crop is at most a tenth of its edge off the centre, and every place there comes; IF is bicubic."""
    dataset = make_dataset(script, [wide], 40, is_if=is_if, crop_style=style)
    resized = np.asarray(Image.open(wide).resize((80, 40), Image.Resampling[mode])).transpose(2, 0, 1)
    crops = {(resized[:, :, left : left + 40] / np.float32(127.5) - 1).tobytes(): left for left in range(41)}
    found = [crops[visit_of(dataset, 0, visit)["pixel_values"].numpy().tobytes()] for visit in range(300)]
    assert set(found) == set(lefts)


def test_pictures_are_as_wide_and_high_as_asked(script, wide):
    """A size of width x height is (3, height, width)."""
    assert visit_of(make_dataset(script, [wide], "24x16"), 0, 0)["pixel_values"].shape == (3, 16, 24)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_captions_are_dropped_in_that_share_of_the_visits(script, wide, share):
    """A visit's caption is the empty one with that chance, of the visit's own seed, and nothing else changes."""
    dataset = make_dataset(script, [wide], 8, caption_dropout=share)
    plain = make_dataset(script, [wide], 8)
    rows = [visit_of(dataset, 0, 0, seed)["prompt_rows"] for seed in SEEDS[:1500]]
    assert set(rows) == ({1} if share == 0 else {0, 1})
    assert rows.count(0) / 1500 == pytest.approx(share, abs=0.04)
    again = make_dataset(script, [wide], 8, caption_dropout=share)
    for place in (7, 3):
        item, other = (visit_of(each, 0, 0, SEEDS[place]) for each in (again, plain))
        assert item["prompt_rows"] == rows[place]
        assert torch.equal(item["pixel_values"], other["pixel_values"])
