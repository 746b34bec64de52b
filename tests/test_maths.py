"""The maths of both scripts against values worked out by hand, and their randomness against what it may depend on."""

import copy
import hashlib
import itertools
import math
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from diffusers.training_utils import compute_snr
from PIL import Image

import train_dreambooth
import train_dreambooth_lora
from tests.conftest import make_concept, make_dataset, visit_of
from utils.core.seeds import derive_seed, generator, shuffled
from utils.data.batch_order import BatchOrder
from utils.data.geometry import Size
from utils.synthetic.model_sizes import NOISE_SCHEDULE, SHAPES
from utils.synthetic.random_models import build_pipeline

# The seeds of a run's examples, as far as statistics are concerned.
SEEDS = [derive_seed(0, "example", number) for number in range(4000)]


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture(scope="module")
def tiny():
    """Build the networks of a tiny Stable Diffusion model."""
    return build_pipeline(SHAPES["tiny"])


def spread(uniform: list[int], below: int, bins: int) -> float:
    """Return chi-square per degree of freedom, near 1 for numbers that are uniform in [0, below)."""
    counts = np.bincount(np.array(uniform) * bins // below, minlength=bins)
    expected = len(uniform) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (bins - 1))


# ---------------------------------------------------------------------------------------------------------- the loss


def losses_of(script, prediction, wanted, *of_steps):
    """Return each example's loss if all places count alike."""
    return script.example_losses(prediction, wanted, torch.ones_like(wanted[:, :1]), *of_steps)


def test_a_loss_is_the_mean_square_of_its_own_example(script):
    """Without Min-SNR, no example knows of its neighbours or of its timestep."""
    wanted = torch.zeros(3, 2, 2, 2)
    prediction = torch.stack([torch.full((2, 2, 2), 2.0), torch.zeros(2, 2, 2), torch.arange(8.0).view(2, 2, 2)])
    losses = losses_of(script, prediction, wanted, torch.arange(3), torch.tensor([0.0, 0.5, 1.0]), "epsilon", None)
    assert losses.tolist() == [4.0, 0.0, 140 / 8]
    assert losses.dtype == torch.float32
    turned = losses_of(script, wanted, prediction, torch.arange(3), torch.rand(3), "v_prediction", None)
    assert turned.tolist() == losses.tolist()


def test_a_loss_counts_each_place_by_its_weight(script):
    """Of all channels alike: a half counts half, what is dark neither adds nor divides, and whole darkness is 0."""
    errors = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]).expand(4, 2, 2, 2)
    light = torch.tensor(
        [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.5, 1.0], [0.0, 0.0]], [[0.0] * 2] * 2]
    )
    rest = (torch.arange(4), torch.full((4,), 0.5), "epsilon", None)
    losses = script.example_losses(errors, torch.zeros(4, 2, 2, 2), light[:, None], *rest)
    assert losses.tolist() == pytest.approx([204 / 8, (1 + 25) / 2, (0.5 * (1 + 25) + 4 + 36) / 3, 0])


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "weights"),
    [
        # SNR of the four examples: 0, 1/4, 1, 9.
        ("epsilon", 5.0, [1, 1, 1, 5 / 9]),
        ("epsilon", 0.5, [1, 1, 1 / 2, 1 / 18]),
        ("epsilon", 20.0, [1, 1, 1, 1]),
        ("v_prediction", 5.0, [0, 1 / 5, 1 / 2, 1 / 2]),
        ("v_prediction", 0.5, [0, 1 / 5, 1 / 4, 1 / 20]),
        ("v_prediction", 20.0, [0, 1 / 5, 1 / 2, 9 / 10]),
    ],
)
def test_min_snr_weights_by_hand(script, prediction_type, gamma, weights):
    """Each example of a batch is weighted by its own signal-to-noise ratio."""
    alphas = torch.tensor([0.0, 0.2, 0.5, 0.9])
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    prediction = errors.view(4, 1, 1, 1).expand(4, 3, 2, 2)
    losses = losses_of(
        script, prediction, torch.zeros(4, 3, 2, 2), torch.arange(len(alphas)), alphas, prediction_type, gamma
    )
    assert losses.shape == (4,)
    expected = [weight * error**2 for weight, error in zip(weights, errors.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    order = [2, 0, 3, 1]
    turned = losses_of(
        script, prediction[order], torch.zeros(4, 3, 2, 2), torch.tensor(order), alphas, prediction_type, gamma
    )
    assert turned.tolist() == losses[order].tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_equals_the_definition_at_every_timestep(script, prediction_type):
    """The weights of a whole schedule are those of the paper, with diffusers' signal-to-noise ratios."""
    scheduler = DDPMScheduler.from_config(NOISE_SCHEDULE)
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    losses = losses_of(
        script,
        torch.ones(1000, 1, 1, 1),
        torch.zeros(1000, 1, 1, 1),
        timesteps,
        scheduler.alphas_cumprod,
        prediction_type,
        5.0,
    )
    least = torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(losses, least / (snr if prediction_type == "epsilon" else snr + 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_and_its_gradient_are_finite_at_both_ends(script, prediction_type):
    """Neither zero signal nor zero noise gives NaN."""
    prediction = torch.ones(2, 1, 2, 2, requires_grad=True)
    alphas = torch.tensor([0.0, 1.0])
    losses = losses_of(
        script, prediction, torch.zeros(2, 1, 2, 2), torch.arange(len(alphas)), alphas, prediction_type, 5.0
    )
    losses.sum().backward()
    assert losses.isfinite().all() and prediction.grad.isfinite().all()


LOSSES = ("loss", "loss_instance", "loss_prior")


def combine(script, losses, is_prior, weight):
    """Combine losses that are each an equal part of the mean over their kind; class images have a weight."""
    shares = torch.where(is_prior, 1 / is_prior.sum().clamp(min=1), 1 / (~is_prior).sum())
    return script.combine_losses(losses, shares, torch.where(is_prior, weight, 1.0), is_prior)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 0.25])
def test_combine_in_every_order(script, weight):
    """Whatever the order, the loss is the mean over the photos and the weighted mean over the class images."""
    kinds = [(1.0, False), (3.0, False), (10.0, True), (40.0, True)]
    for order in itertools.permutations(kinds):
        losses, is_prior = (torch.tensor(column) for column in zip(*order, strict=True))
        loss = combine(script, losses, is_prior, weight)
        assert {name: part.item() for name, part in loss.items()} == dict(
            zip(LOSSES, [2 + weight * 25, 2, 25], strict=True)
        )


@pytest.mark.parametrize(
    ("losses", "is_prior", "expected"),
    [
        ([7.0], [False], (7, 7, None)),
        ([1.0, 2.0, 6.0], [False] * 3, (3, 3, None)),
        ([1.0, 5.0], [False, True], (11, 1, 5)),
        ([4.0, 1.0, 2.0, 3.0], [False, True, True, True], (8, 4, 2)),
        ([1.0, 2.0, 3.0, 4.0], [False, False, False, True], (10, 2, 4)),
    ],
)
def test_combine_with_uneven_parts(script, losses, is_prior, expected):
    """Each kind is averaged over its own examples, weighted here by 2; without class images there is no weight."""
    loss = combine(script, torch.tensor(losses), torch.tensor(is_prior), 2.0)
    assert {name: part.item() for name, part in loss.items()} == {
        name: pytest.approx(part) for name, part in zip(LOSSES, expected, strict=True) if part is not None
    }


def test_combine_weighs_each_example_and_shows_the_parts_unweighted(script):
    """A concept's weight counts in the total alone, as the class images' does; a share is taken as it is given."""
    columns = ([1.0, 2.0, 4.0, 8.0], [0.5, 0.25, 0.5, 0.0], [1.0, 3.0, 2.0, 9.0])
    losses, shares, weights = (torch.tensor(column) for column in columns)
    loss = script.combine_losses(losses, shares, weights, torch.tensor([False, False, True, True]))
    assert [loss[name].item() for name in LOSSES] == [0.5 + 3 * 0.5 + 2 * 2, 0.5 + 0.5, 2]


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_gradients_reach_the_examples_that_count(script, weight):
    """An example's gradient is its share of its own mean, times the weight for a class image."""
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    loss = combine(script, losses, torch.tensor([True, False, True, False, True]), weight)
    loss["loss"].backward()
    third = pytest.approx(weight / 3)
    assert losses.grad.tolist() == [third, 0.5, third, 0.5, third]
    assert not loss["loss_instance"].requires_grad and not loss["loss_prior"].requires_grad


def test_targets_by_hand(script):
    """The target is the noise, or alpha x noise - sigma x picture."""
    scheduler = DDPMScheduler.from_config(NOISE_SCHEDULE | {"prediction_type": "v_prediction"})
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=generator("target"))
    timesteps = torch.tensor([0, 400, 999])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.from_numpy(np.cumprod(1 - betas)[timesteps.numpy()]).view(3, 1, 1, 1)
    velocity = kept.sqrt() * noise.double() - (1 - kept).sqrt() * clean.double()
    found = script.prediction_target(scheduler, "v_prediction", clean, noise, timesteps)
    torch.testing.assert_close(found.double(), velocity, rtol=1e-4, atol=1e-5)
    assert torch.equal(script.prediction_target(scheduler, "epsilon", clean, noise, timesteps), noise)


# --------------------------------------------------------------------------------------------- noise and model space


def test_noise_depends_on_the_seed_alone(script):
    """Neither the order nor the company of an example changes its noise or its timestep."""
    shape = (4, 4, 8, 8)
    noise, timesteps = script.sample_noise(torch.Size(shape), [11, 22, 33, 44], 1000, 0.1)
    assert noise.shape == shape and noise.dtype == torch.float32
    assert timesteps.shape == (4,) and timesteps.dtype == torch.int64
    torch.manual_seed(5)
    for places in ([2], [3, 0], [3, 2, 1, 0]):
        seeds = [(11, 22, 33, 44)[place] for place in places]
        again, at = script.sample_noise(torch.Size((len(places), *shape[1:])), seeds, 1000, 0.1)
        assert torch.equal(again, noise[places]) and torch.equal(at, timesteps[places])
    assert len({tensor.sum().item() for tensor in noise}) == 4
    assert torch.initial_seed() == 5, "drawing must leave the global generator alone"


def test_noise_is_standard_normal(script):
    """Mean, variance, tails and the likeness of neighbours are those of independent normal numbers."""
    noise, timesteps = script.sample_noise(torch.Size((1000, 4, 8, 8)), SEEDS[:1000], 1000, 0.0)
    assert abs(noise.mean()) < 0.006 and abs(noise.var() - 1) < 0.01
    assert (noise.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.002)
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.006
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.006
    with_time = torch.corrcoef(torch.stack([noise[:, 0, 0, 0], timesteps.float()]))[0, 1]
    assert abs(with_time) < 0.1


@pytest.mark.parametrize("steps", [10, 1000])
def test_timesteps_are_uniform(script, steps):
    """All timesteps from 0 to T - 1 come, and equally often."""
    _, timesteps = script.sample_noise(torch.Size((len(SEEDS), 1, 1, 1)), SEEDS, steps, 0.0)
    assert timesteps.min() >= 0 and timesteps.max() < steps
    assert timesteps.min() <= 0.005 * steps and timesteps.max() >= 0.995 * steps - 1
    bins = min(steps, 40)
    assert spread(timesteps.tolist(), steps, bins) < 1 + 4 * math.sqrt(2 / (bins - 1))


def test_offset_noise_is_constant_over_each_channel(script):
    """The offset is one number per example and channel, of the given strength, and leaves everything else alone."""
    shape = torch.Size((2000, 4, 2, 3))
    plain, at = script.sample_noise(shape, SEEDS[:2000], 1000, 0.0)
    noisy, also_at = script.sample_noise(shape, SEEDS[:2000], 1000, 0.1)
    assert torch.equal(at, also_at)
    offset = noisy - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand(shape), rtol=0, atol=1e-6)
    offset = offset[:, :, 0, 0]
    assert offset.std() == pytest.approx(0.1, abs=0.003) and abs(offset.mean()) < 0.005
    assert offset.round(decimals=6).unique().numel() > 7000, "channels and examples have offsets of their own"
    assert abs(torch.corrcoef(offset.T) - torch.eye(4)).max() < 0.1
    twice, _ = script.sample_noise(shape, SEEDS[:2000], 1000, 0.2)
    torch.testing.assert_close(twice - plain, 2 * (noisy - plain), rtol=0, atol=1e-6)


def latents_of(script, vae, pixel_values, seeds):
    """Return the latents of a batch of pictures."""
    batch = {"pixel_values": pixel_values, "seeds": torch.tensor(seeds)}
    return script.latents_or_pixels(batch, vae, vae.config.scaling_factor, torch.device("cpu"))


def test_latents_of_a_batch_equal_those_of_its_pictures_one_by_one(script, tiny):
    """Neighbours do not change a picture's latents, not even in the last bit."""
    pictures = torch.rand(3, 3, 32, 48, generator=generator("pictures")) * 2 - 1
    latents = latents_of(script, tiny.vae, pictures, [1, 2, 3])
    assert latents.shape == (3, 4, 4, 6) and latents.dtype == torch.float32
    for place, seed in enumerate((1, 2, 3)):
        assert torch.equal(latents_of(script, tiny.vae, pictures[place : place + 1], [seed])[0], latents[place])
    assert torch.equal(latents_of(script, tiny.vae, pictures.flip(0), [3, 2, 1]), latents.flip(0))


def test_latents_from_moments_equal_those_of_the_pictures(script, tiny):
    """To the bit, whatever else was encoded with them: what is cached is the posterior, and draws differ by seed."""
    pictures = torch.rand(2, 3, 32, 48, generator=generator("pictures")) * 2 - 1
    moments = torch.cat([script.encode_images(tiny.vae, picture[None]) for picture in pictures])
    assert moments.shape == (2, 2, 4, 4, 6) and torch.equal(script.encode_images(tiny.vae, pictures), moments)
    batch = {"moments": moments, "seeds": torch.tensor([1, 2])}
    found = script.latents_or_pixels(batch, None, tiny.vae.config.scaling_factor, torch.device("cpu"))
    assert torch.equal(found, latents_of(script, tiny.vae, pictures, [1, 2]))
    assert not torch.equal(found, latents_of(script, tiny.vae, pictures, [1, 3]))


def test_pictures_are_their_own_model_space_without_a_vae(script):
    """They are what they were, unscaled."""
    pictures = torch.rand(2, 3, 8, 8)
    batch = {"pixel_values": pictures, "seeds": torch.tensor([1, 2])}
    assert torch.equal(script.latents_or_pixels(batch, None, 1.0, torch.device("cpu")), pictures)


def test_latents_are_a_scaled_draw_from_the_posterior(script, tiny):
    """A picture's latents are (mean + standard deviation x noise of its seed) x the VAE's scaling factor."""
    picture = torch.rand(1, 3, 16, 16, generator=generator("picture")) * 2 - 1
    vae = copy.deepcopy(tiny.vae)
    vae.quant_conv.bias.data[4:] -= 2  # so that standard deviations are not near 1, where variances would pass as well
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
    draws = torch.cat([latents_of(script, vae, picture, [seed]) for seed in SEEDS[:400]])
    assert torch.equal(draws[7:8], latents_of(script, vae, picture, [SEEDS[7]]))
    assert not torch.equal(draws[7], draws[8])
    noise = (draws / 0.18215 - posterior.mean) / posterior.std
    assert abs(noise.mean()) < 0.03 and noise.std() == pytest.approx(1, abs=0.02)
    assert abs(noise.mean(dim=0)).max() < 0.2, "each latent is centred on its own mean"
    training, _ = script.sample_noise(draws.shape, SEEDS[:400], 1000, 0.0)
    assert abs((noise * training).mean()) < 0.03, "the noise that is added must be independent of this draw"
    assert not draws.requires_grad


def test_latents_are_float32_whatever_the_precision_of_the_vae(script):
    """A VAE in bfloat16 encodes in bfloat16; the draw and the scaling are float32."""
    vae = build_pipeline(SHAPES["tiny"], dtype=torch.bfloat16).vae
    latents = latents_of(script, vae, torch.zeros(1, 3, 16, 16), [1])
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())


# ----------------------------------------------------------------------------------------------------- learning rate


def rates(script, steps, peak, schedule, warmup, **flags):
    """Return a run's learning rates."""
    defaults = {"lr_num_cycles": 1, "lr_power": 1.0, "lr_end": None}
    args = Namespace(lr_scheduler=schedule, lr_warmup_steps=warmup, **(defaults | flags))
    return [script.learning_rate(args, step, steps, peak) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 50])
@pytest.mark.parametrize(
    ("schedule", "cycles", "power"),
    [
        ("constant", 1, 1.0),
        ("constant_with_warmup", 1, 1.0),
        ("linear", 1, 1.0),
        ("cosine", 1, 1.0),
        ("cosine_with_restarts", 1, 1.0),
        ("cosine_with_restarts", 3, 1.0),
        ("polynomial", 1, 1.0),
        ("polynomial", 1, 2.5),
        ("polynomial", 1, 0.0),
    ],
)
def test_learning_rates_are_those_of_diffusers(script, schedule, cycles, power, warmup):
    """At every one of 20 steps, also in a run that is over before its warm-up."""
    steps, peak = 20, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(schedule, optimizer, None, warmup, steps, num_cycles=cycles, power=power)
    ours = rates(script, steps, peak, schedule, warmup, lr_num_cycles=cycles, lr_power=power)
    assert ours == pytest.approx([peak * theirs.lr_lambdas[0](step) for step in range(steps)], rel=1e-9, abs=1e-15)
    assert ours[0] == optimizer.param_groups[0]["lr"]
    assert max(ours) <= peak and (schedule == "constant" or warmup == 0 or ours[0] == 0)


def test_polynomial_never_rises_to_its_end(script):
    """A rate below the end of the schedule, where diffusers refuses, stays as it is."""
    assert rates(script, 10, 1e-8, "polynomial", 0) == pytest.approx([1e-8] * 10)
    assert rates(script, 10, 1e-5, "polynomial", 0, lr_end=1e-4) == pytest.approx([1e-5] * 10)


@pytest.mark.parametrize("end", [0.0, 1e-5, 2e-4])
@pytest.mark.parametrize("power", [1.0, 2.5])
@pytest.mark.parametrize("warmup", [0, 7])
def test_polynomial_falls_to_the_end_asked_for(script, warmup, power, end):
    """At every step, to --lr_end as diffusers' lr_end."""
    steps, peak = 20, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=end, power=power)
    wanted = [peak * theirs.lr_lambdas[0](step) for step in range(steps + 1)]
    ours = rates(script, steps, peak, "polynomial", warmup, lr_power=power, lr_end=end)
    assert ours == pytest.approx(wanted[:-1], rel=1e-9, abs=1e-15) and wanted[-1] == pytest.approx(end, abs=1e-15)


def one_cycle_of_torch(steps, peak, warmup, end):
    """Return the rates of torch's OneCycleLR, to a last one if that is given."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    last = {} if end is None else {"final_div_factor": peak / 25 / end if end else math.inf}
    options = {"pct_start": warmup / steps, "anneal_strategy": "cos", "cycle_momentum": False}
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, **options, **last)
    found = [theirs.get_last_lr()[0]]
    for _ in range(steps - 1):
        optimizer.step()
        theirs.step()
        found.append(theirs.get_last_lr()[0])
    return found


@pytest.mark.parametrize("end", [None, 0.0, 1e-6, 2e-4])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(3, 2), (5, 2), (5, 4), (20, 2), (20, 7), (20, 10), (20, 19), (1000, 2), (1000, 500)]
)
def test_one_cycle_is_torchs(script, steps, warmup, end):
    """At every step, from torch's own first rate over the peak to --lr_end or, without it, torch's own last."""
    peak = 3e-4
    ours = rates(script, steps, peak, "one_cycle", warmup, lr_end=end)
    assert ours == pytest.approx(one_cycle_of_torch(steps, peak, warmup, end), rel=1e-9, abs=1e-15)
    assert ours[0] == pytest.approx(peak / 25) and ours[warmup - 1] == peak == max(ours)
    assert ours[-1] == pytest.approx(peak / 25e4 if end is None else end, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("end", [None, 1e-6])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_one_cycle_without_a_way_up_starts_at_the_peak(script, steps, warmup, end):
    """A warm-up of one step, which torch cannot divide by, and none at all: the rest is torch's way down."""
    peak = 3e-4
    ours = rates(script, steps, peak, "one_cycle", warmup, lr_end=end)
    assert ours[0] == peak
    assert ours[1:] == pytest.approx(one_cycle_of_torch(steps, peak, 1 + 1e-12, end)[1:], rel=1e-8, abs=1e-15)


def test_one_cycle_of_one_step_is_its_peak(script):
    """There is no step left to fall in."""
    assert rates(script, 1, 3e-4, "one_cycle", 0) == [3e-4]


# ------------------------------------------------------------------------------------------- which example comes when


def make_sampler(script, photos, batch, first=0, last=20, rank=0, processes=1, priors=0, seed=3):
    """Make a sampler over so many photos and, after them, class images."""
    kinds, concept = [False] * photos + [True] * priors, make_concept()
    examples = [
        script.Example(Path(str(number)), ("a prompt",), concept, Size(16, 16), kind)
        for number, kind in enumerate(kinds)
    ]
    plan, order = SimpleNamespace(seed=seed, processes=processes), BatchOrder(examples, batch * processes, seed)
    return script.StepSampler(plan, order, range(first, last), rank)


@pytest.mark.parametrize(("photos", "batch"), [(7, 3), (6, 3), (1, 1), (1, 4), (2, 5), (5, 1)])
def test_every_photo_comes_once_a_pass(script, photos, batch):
    """The draws fall into passes of all photos in changing order; a visit's number is that of its pass."""
    draws = [draw for step in make_sampler(script, photos, batch, last=photos * 8) for draw in step]
    assert len(draws) == photos * 8 * batch
    orders = []
    for start in range(0, len(draws), photos):
        part = draws[start : start + photos]
        orders.append(tuple(draw.example for draw in part))
        assert sorted(orders[-1]) == list(range(photos))
        assert {draw.earlier_visits for draw in part} == {start // photos}
    assert len({draw.seed for draw in draws}) == len(draws), "no two visits share their noise"
    assert photos < 5 or len(set(orders)) > 5


def test_all_orders_come_equally_often(script):
    """Over many seeds, each of the six orders of three photos comes in about a sixth of the passes."""
    orders = Counter(tuple(shuffled(3, seed)) for seed in SEEDS)
    assert len(orders) == 6 and all(abs(count - len(SEEDS) / 6) < 100 for count in orders.values())


def test_a_shuffle_depends_on_its_seed_alone(script):
    """The same numbers come in the same order again, whatever was shuffled in between, and each of them once."""
    first = list(shuffled(50, 1))
    assert sorted(first) == list(range(50)) and first != list(range(50))
    others = [shuffled(50, seed) for seed in range(2, 40)]
    assert shuffled(50, 1) == first and first not in others


@pytest.mark.parametrize("priors", [0, 11])
def test_two_processes_share_the_batches_of_one(script, priors):
    """Rank 0 and rank 1 with batch 2 draw together what one process with batch 4 draws, noise included."""
    whole = list(make_sampler(script, 7, 4, priors=priors))
    ranks = [list(make_sampler(script, 7, 2, rank=rank, processes=2, priors=priors)) for rank in (0, 1)]
    assert len(whole) == 20
    for step, (first, second) in zip(whole, zip(*ranks, strict=True), strict=True):
        assert len(first) == len(second) == (4 if priors else 2)
        assert {visit.mean_weight for visit in step} == {1 / 4} and {
            visit.mean_weight for visit in first + second
        } == {1 / 2}
        first, second = ([draw._replace(mean_weight=1 / 4) for draw in part] for part in (first, second))
        assert sorted(first + second) == sorted(step)
        assert [draw for draw in first + second if draw.example < 7] == step[:4]


@pytest.mark.parametrize("first", [1, 9, 19, 20])
def test_a_later_start_gives_the_rest_of_the_run(script, first):
    """A sampler that starts at a micro-step draws what the whole run draws from there on."""
    whole = list(make_sampler(script, 7, 3, priors=5))
    assert list(make_sampler(script, 7, 3, first=first, priors=5)) == whole[first:]
    assert list(make_sampler(script, 7, 3, last=40, priors=5))[:20] == whole, "a longer run begins alike"


def test_photos_and_class_images_do_not_disturb_each_other(script):
    """The photos' draws do not depend on the class images, nor do both kinds go through the same orders."""
    alone = list(make_sampler(script, 8, 2))
    both = list(make_sampler(script, 8, 2, priors=8))
    assert [[draw for draw in step if draw.example < 8] for step in both] == alone
    classes = [[(draw.example - 8, draw.earlier_visits) for draw in step if draw.example >= 8] for step in both]
    assert classes != [[(draw.example, draw.earlier_visits) for draw in step] for step in alone]
    assert not {draw.seed for step in both for draw in step if draw.example >= 8} & {d.seed for s in alone for d in s}
    assert [draw.example >= 8 for draw in both[0]] == [False, False, True, True]


def test_class_images_are_seen_equally_often(script):
    """With 3 photos and 10 class images, each kind goes round at its own pace and evenly."""
    draws = [draw for step in make_sampler(script, 3, 4, last=25, priors=10) for draw in step]
    counts = Counter(draw.example for draw in draws)
    assert [counts[number] for number in range(3, 13)] == [10] * 10
    assert sorted(counts[number] for number in range(3)) == [33, 33, 34]


def test_another_seed_gives_another_order(script):
    """Order and noise follow the seed of the run."""
    one, other = (list(make_sampler(script, 9, 3, seed=seed)) for seed in (1, 2))
    assert [[draw.example for draw in step] for step in one] != [[draw.example for draw in step] for step in other]
    assert not {draw.seed for step in one for draw in step} & {draw.seed for step in other for draw in step}


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(params=[False, True], ids=["all-tokens", "masked"])
def prompts(request, script, tiny):
    """Tokenize three prompts of different length, with and without a mask of the padding."""
    texts = ["a photo of sks dog", "a photo of dog", ""]
    rows = tiny.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    return script.PromptTable(texts, rows["input_ids"], rows["attention_mask"] if request.param else None)


def test_prompts_encoded_in_the_loop_equal_precomputed_ones(script, tiny, prompts):
    """A frozen text encoder gives the same bits one by one and beforehand, and nearly the same all together."""
    rows = torch.tensor([2, 0, 0, 1, 2])
    with torch.no_grad():
        table = script.embed_prompts(prompts, tiny.text_encoder, torch.arange(3), together=False)
        in_loop = script.embed_prompts(prompts, tiny.text_encoder, rows, together=False)
        together = script.embed_prompts(prompts, tiny.text_encoder, rows, together=True)
        alone = script.embed_prompts(prompts, tiny.text_encoder, torch.tensor([1]), together=False)
    prompts.embeds = table
    looked_up = script.embed_prompts(prompts, None, rows, together=False)
    assert looked_up.shape == (5, 77, 32)
    assert torch.equal(looked_up, in_loop) and torch.equal(alone[0], table[1])
    torch.testing.assert_close(together, in_loop, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(table[0], table[1]) and not torch.allclose(table[1], table[2])


def test_embeddings_are_the_text_encoders_own(script, tiny, prompts):
    """A row is the last hidden state for its tokens and, if there is one, its mask."""
    with torch.no_grad():
        mask = None if prompts.mask is None else prompts.mask[1:2]
        expected = tiny.text_encoder(prompts.ids[1:2], attention_mask=mask).last_hidden_state
        unmasked = tiny.text_encoder(prompts.ids[1:2]).last_hidden_state
        found = script.embed_prompts(prompts, tiny.text_encoder, torch.tensor([1]), together=False)
    assert torch.equal(found, expected)
    assert torch.allclose(found, unmasked) == (prompts.mask is None)


@pytest.mark.parametrize(("together", "sizes"), [(False, [1, 1]), (True, [2])])
def test_equal_prompts_are_encoded_once(script, tiny, prompts, together, sizes):
    """A batch of one photo prompt and one class prompt costs two rows, however large it is."""
    seen = []
    hook = tiny.text_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        script.embed_prompts(prompts, tiny.text_encoder, torch.tensor([1, 0, 1, 1, 0]), together)
    hook.remove()
    assert seen == sizes


def test_gradients_reach_a_text_encoder_that_trains(script, tiny, prompts):
    """Two examples of one prompt give its embedding the sum of their gradients."""
    weight = tiny.text_encoder.get_input_embeddings().weight.requires_grad_()
    gradients = []
    for rows in ([0], [0, 0]):
        weight.grad = None
        script.embed_prompts(prompts, tiny.text_encoder, torch.tensor(rows), together=True).square().sum().backward()
        gradients.append(weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- pictures


def to_tensor(image):
    """Scale a picture from 0 … 255 to -1 … 1, channels first."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write pictures of several shapes: noise, and two ramps whose values tell where a crop was taken."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name, (width, height) in {"tall": (40, 101), "wide": (97, 33), "square": (50, 50), "small": (9, 12)}.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    ramp = np.repeat(np.tile(np.arange(200, dtype=np.uint8), (16, 1))[..., None], 3, axis=2)
    Image.fromarray(ramp).save(folder / "ramp.png")
    Image.fromarray(ramp.transpose(1, 0, 2)).save(folder / "ramp_down.png")
    return folder


@pytest.mark.parametrize("mode", ["lanczos", "bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(
    ("name", "size", "corner"),
    [
        ("tall", (32, 81), (0, 24)),
        ("wide", (94, 32), (31, 0)),
        ("square", (32, 32), (0, 0)),
        ("small", (32, 43), (0, 5)),
    ],
)
def test_a_centre_crop_equals_pillows(script, pictures, name, size, corner, mode):
    """The shorter edge becomes the resolution, and the middle of the longer one stays."""
    with Image.open(pictures / f"{name}.png") as image:
        resized = image.resize(size, Image.Resampling[mode.upper()])
    expected = resized.crop((*corner, corner[0] + 32, corner[1] + 32))
    dataset = make_dataset(script, [pictures / f"{name}.png"], 32, crop_style="center", image_interpolation_mode=mode)
    item = visit_of(dataset, 0, 0, 77)
    torch.testing.assert_close(item["pixel_values"], to_tensor(expected), rtol=0, atol=1e-6)
    assert item["prompt_rows"] == 1 and item["is_prior"] is False and item["seeds"] == 77


@pytest.mark.parametrize("name", ["ramp", "ramp_down"])
def test_random_crops_are_uniform_and_whole(script, pictures, name):
    """Every position of the crop comes equally often, and what is cut out is a part of the picture."""
    dataset = make_dataset(script, [pictures / f"{name}.png"])
    starts = []
    for visit in range(1500):
        pixels = (visit_of(dataset, 0, visit, 0)["pixel_values"] + 1) * 127.5
        line = pixels[0, 0] if name == "ramp" else pixels[0, :, 0]
        start = round(line[0].item())
        starts.append(start)
        assert torch.allclose(line, torch.arange(start, start + 16.0), atol=1e-3)
    assert min(starts) == 0 and max(starts) == 184
    assert spread(starts, 185, 37) < 1 + 4 * math.sqrt(2 / 36)


def test_a_crop_depends_on_seed_example_and_visit_alone(script, pictures):
    """Neither the noise's seed, nor the order of access, nor global random states change a picture."""
    paths = [pictures / "ramp.png"] * 2
    dataset, flags = make_dataset(script, paths, random_flip=True), {"random_flip": True}
    first = visit_of(dataset, 0, 5, 1)["pixel_values"]
    for visit in range(4):
        visit_of(dataset, 1, visit, 0)
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    again = visit_of(make_dataset(script, paths, **flags), 0, 5, 999)["pixel_values"]
    assert torch.equal(first, again)
    others = [(0, example, visit) for example, visit in ((0, 6), (1, 5))] + [(1, 0, 5)]
    for seed, example, visit in others:
        other = visit_of(make_dataset(script, paths, seed=seed, **flags), example, visit, 1)["pixel_values"]
        assert not torch.equal(first, other)


@pytest.mark.parametrize("variants", [1, 3])
def test_so_many_variants_of_a_crop_take_turns(script, pictures, variants):
    """K visits give K crops, and the next ones the same again: what is cached is used, and no crop comes beyond it."""
    dataset = make_dataset(script, [pictures / "ramp.png"], latent_variants=variants)
    crops = [dataset.crop(script.ExampleVisit(0, visit, Size(16, 16), 1.0, 0)) for visit in range(4 * variants)]
    assert len(set(crops[:variants])) == variants
    assert crops == crops[:variants] * 4


def test_each_of_several_captions_is_drawn_as_often_as_the_others(script, pictures):
    """By the visit, apart from the crop and from another photo."""
    dataset = make_dataset(script, [pictures / "square.png"] * 2)
    dataset.prompt_rows = [[3, 4, 5], [6]]
    rows = [visit_of(dataset, 0, visit, seed=7)["prompt_rows"] for visit in range(600)]
    assert all(150 < rows.count(row) < 250 for row in (3, 4, 5)) and set(rows) == {3, 4, 5}
    assert rows[:50] == [visit_of(dataset, 0, visit, seed=8)["prompt_rows"] for visit in range(50)]
    assert visit_of(dataset, 1, 0)["prompt_rows"] == 6


@pytest.mark.parametrize("crop_style", ["center", "random"])
def test_half_of_the_visits_are_exact_mirror_images(script, pictures, crop_style):
    """A mirrored picture is the other one read from right to left, and comes about every second time."""
    path = pictures / ("wide.png" if crop_style == "center" else "square.png")
    plain = make_dataset(script, [path], crop_style=crop_style)
    flipping = make_dataset(script, [path], crop_style=crop_style, random_flip=True)
    upright = visit_of(plain, 0, 0, 0)["pixel_values"]
    mirrored = 0
    for visit in range(1200):
        pixels = visit_of(flipping, 0, visit, 0)["pixel_values"]
        is_mirrored = not torch.equal(pixels, upright)
        assert not is_mirrored or torch.equal(pixels, upright.flip(2))
        mirrored += is_mirrored
    assert 540 < mirrored < 660
    assert torch.equal(visit_of(plain, 0, 9, 0)["pixel_values"], upright), "without the flag, none is mirrored"


def test_black_is_minus_one_and_white_is_one(script, tmp_path):
    """Pixel values cover [-1, 1] and are float32, colours first."""
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, :, 0] = 255
    Image.fromarray(colours).save(tmp_path / "red.png")
    pixels = visit_of(make_dataset(script, [tmp_path / "red.png"]), 0, 0, 0)["pixel_values"]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert [pixels[channel].unique().tolist() for channel in range(3)] == [[1.0], [-1.0], [-1.0]]


def test_a_picture_of_16_bits_equals_the_one_of_8(script, tmp_path):
    """One grey picture gives the same tensor at both depths, and in another lossless format."""
    grey = np.random.default_rng(1).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "8.webp", lossless=True)
    names = ("8.png", "16.png", "8.webp")
    tensors = [visit_of(make_dataset(script, [tmp_path / name], 32), 0, 0, 0)["pixel_values"] for name in names]
    assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[0], tensors[2])
    assert tensors[0].std() > 0.1


def test_a_photo_is_turned_upright(script, pictures, tmp_path):
    """A photo that the camera stored lying gives the tensor of the one stored upright."""
    with Image.open(pictures / "wide.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 8  # turn by 90 degrees to the left to see it upright
        image.save(tmp_path / "lying.png", exif=exif)
    upright, lying = (
        visit_of(make_dataset(script, [tmp_path / name], 32, crop_style="center"), 0, 0, 0)["pixel_values"]
        for name in ("upright.png", "lying.png")
    )
    assert torch.equal(upright, lying)


def test_a_batch_has_the_promised_shapes_and_types(script, pictures):
    """Collation keeps the order, and seeds of 32 bits fit."""
    paths = [pictures / "wide.png", pictures / "tall.png"]
    dataset = make_dataset(script, paths, 24)
    items = [visit_of(dataset, 1, 0, 2**32 - 1), visit_of(dataset, 0, 3, 5)]
    items[1]["is_prior"] = True
    batch = script.collate(items)
    keys = {"pixel_values", "weight_map", "prompt_rows", "is_prior", "mean_weights", "loss_weights", "seeds", "names"}
    assert set(batch) == keys
    assert batch["weight_map"].dtype == torch.float32 and batch["weight_map"].tolist() == [[[[1.0] * 3] * 3]] * 2
    assert batch["mean_weights"].tolist() == batch["loss_weights"].tolist() == [1, 1]
    assert batch["names"] == [str(path) for path in reversed(paths)]
    assert batch["pixel_values"].shape == (2, 3, 24, 24) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][1], items[1]["pixel_values"])
    for key, dtype, values in (
        ("prompt_rows", torch.int64, [1, 1]),
        ("is_prior", torch.bool, [False, True]),
        ("seeds", torch.int64, [2**32 - 1, 5]),
    ):
        assert batch[key].dtype == dtype and batch[key].tolist() == values


def test_a_crop_that_is_not_cached_is_encoded_in_its_step(script, tiny, pictures):
    """A batch takes cached latents only if it finds all of its crops; what it trains on is the same to the bit."""
    paths = [pictures / "wide.png", pictures / "tall.png"]
    dataset = make_dataset(script, paths, 32)
    size = dataset.examples[0].size
    visits = [script.ExampleVisit(example, 0, size, 0.5, 7 + example) for example in (0, 1)]
    crops = [(path, dataset.crop(visit)) for path, visit in zip(paths, visits, strict=True)]
    plain = script.collate(dataset.__getitems__(visits))
    moments = {place: script.encode_images(tiny.vae, dataset.pixels(*place)[None])[0] for place in crops}
    expected = script.latents_or_pixels(plain, tiny.vae, 0.18215, torch.device("cpu"))
    for held, key in ((crops, "moments"), (crops[:1], "pixel_values"), ([], "pixel_values")):
        dataset.latents = {place: moments[place] for place in held}
        batch = script.collate(dataset.__getitems__(visits))
        assert (set(batch) - set(plain)) | {"pixel_values"} == {key, "pixel_values"} and key in batch
        assert torch.equal(script.latents_or_pixels(batch, tiny.vae, 0.18215, torch.device("cpu")), expected)


def test_a_second_data_set_has_batches_of_its_own(script, pictures):
    """An evaluation needs its photos, a sampler over their order, and `make_loader`; training's order stays."""
    train, held_out = (make_dataset(script, [pictures / name], 16) for name in ("wide.png", "tall.png"))
    before = [train.order[number] for number in range(6)]
    plan, accelerator = Namespace(seed=0, processes=1), Namespace(device=torch.device("cpu"))
    sampler = script.StepSampler(plan, held_out.order, range(2), rank=0)
    batches = list(script.make_loader(held_out.args, accelerator, held_out, sampler))
    assert [set(batch["names"]) for batch in batches] == [{str(pictures / "tall.png")}] * 2
    assert [train.order[number] for number in range(6)] == before


# ------------------------------------------------------------------------------------------------------------- seeds


def test_derived_seeds_have_32_bits_and_differ():
    """All 32 bits are used, equally often, and no two of many purposes share a seed."""
    seeds = [derive_seed(seed, purpose, n) for seed in (0, 1) for purpose in ("noise", "crop") for n in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and 2**31 < max(seeds) < 2**32
    bits = (np.array(seeds)[:, None] >> np.arange(32) & 1).mean(axis=0)
    assert bits.min() > 0.47 and bits.max() < 0.53


def test_derived_seeds_are_the_hash_of_their_parts():
    """The same parts give the same seed in every process and on every machine."""
    digest = hashlib.blake2b(b"7/example/class/12/0", digest_size=4).digest()
    assert derive_seed(7, "example", "class", 12, 0) == int.from_bytes(digest, "little")
    assert generator(7, "noise").initial_seed() == derive_seed(7, "noise")
    assert derive_seed(1, 23) != derive_seed(12, 3)
