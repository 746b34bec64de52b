"""How each part of a small model is trained: the text encoder, the VAE, the U-Net.

The U-Net's loss has its own short variational bound, not that of the scripts: it takes the mean, so that models can be
trained again to the same bits. The average of the weights is no `EMAModel` for the same reason: that begins otherwise.

Letters: B pictures, C channels, H W height and width, L tokens, D text width, T timesteps.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from utils.core.seeds import derive_seed, generator
from utils.synthetic import shapes

EMPTY_CAPTIONS = 0.1
EMA = 0.997
TOKENS = 77


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    shape: str  # in `model_sizes.SHAPES`
    pixels: int
    steps: int
    batch_size: int
    learning_rate: float
    prediction_type: str = "epsilon"
    starts_from: str | None = None  # a model of this list that is trained before it
    text_steps: int = 1500
    vae_steps: int = 3000
    decoder_steps: int = 3000  # of the VAE's decoder alone, after that
    noise_offset: float = 0.0
    crop: int | None = None  # pixels of the pieces that it is trained on; None: whole pictures
    highest_weight: float = 10.0  # of a timestep's loss


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Return pictures (B, H, W, 3) of 8 bits as (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------- text


class AttributeReader(nn.Module):
    """Tell each attribute of a caption from the mean of what the text encoder makes of its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(words) + 1) for words in ATTRIBUTES)

    def forward(self, hidden: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the logits (B, words + 1) of each attribute.

        Args:
            hidden: (B, L, D).
            mask: (B, L), of the tokens that are read.
        """
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return [head(pooled) for head in self.heads]


ATTRIBUTES = tuple(
    tuple(words)
    for words in (shapes.CLASSES, shapes.COLOURS, shapes.COLOURS, shapes.SIZES, shapes.PLACES, shapes.RARE_WORDS)
)


def teach_text_encoder(pipeline: DiffusionPipeline, steps: int, seed: int, batch_size: int = 128) -> None:
    """Train the text encoder to tell shape, colour, background, size, place and rare word of a caption."""
    rng = np.random.default_rng(derive_seed(seed, "text"))
    torch.manual_seed(derive_seed(seed, "text"))
    encoder, tokenizer = pipeline.text_encoder.train(), pipeline.tokenizer
    reader = AttributeReader(encoder.config.hidden_size)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    for step in range(steps):
        set_rate(optimizer, 2e-3, step, steps)
        texts, labels = zip(*(made_up_caption(rng) for _ in range(batch_size)), strict=True)
        tokens = tokenizer(list(texts), padding="longest", return_tensors="pt")
        is_t5 = tokenizer.bos_token is None
        hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if is_t5 else None).last_hidden_state
        # CLIP's tokens see those before them only; the whole caption is known from its end on, padding included.
        mask = tokens.attention_mask.float() if is_t5 else (tokens.input_ids == tokenizer.eos_token_id).float()
        wanted = torch.tensor(labels).T
        loss = sum(F.cross_entropy(*pair) for pair in zip(reader(hidden, mask), wanted, strict=True))
        take_step(loss, optimizer, parameters)
    encoder.eval().requires_grad_(False)


def made_up_caption(rng: np.random.Generator) -> tuple[str, list[int]]:
    """Return a caption and, for each attribute, the number of its word; the last number means that none is there."""
    said = [None if rng.random() < 0.3 else int(rng.integers(len(words))) for words in ATTRIBUTES]
    said[0] = int(rng.integers(len(ATTRIBUTES[0])))
    words = [None if number is None else words[number] for number, words in zip(said, ATTRIBUTES, strict=True)]
    shape, colour, background, size, place, rare = words
    described = " ".join(word for word in (rare, colour) if word)
    text = shapes.phrase(shape, described or None, background, size, place)
    return text, [len(words) if number is None else number for number, words in zip(said, ATTRIBUTES, strict=True)]


@torch.no_grad()
def encode_captions(pipeline: DiffusionPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Encode each different caption once.

    Returns:
        (N, L, D) float32 for N captions, the first being empty, and for each of `captions` its row, (B,) int64.
    """
    distinct = {"": 0} | {text: number + 1 for number, text in enumerate(dict.fromkeys(captions))}
    rows, options = list(distinct), {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    encoded = []
    for start in range(0, len(rows), 256):
        tokens = pipeline.tokenizer(rows[start : start + 256], **options, return_tensors="pt")
        mask = tokens.attention_mask if pipeline.tokenizer.bos_token is None else None
        encoded.append(pipeline.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state)
    return torch.cat(encoded), torch.tensor([distinct[text] for text in captions])


# ----------------------------------------------------------------------------------------------------------------- VAE


def train_vae(vae: AutoencoderKL, pictures: np.ndarray, recipe: Recipe, seed: int, batch_size: int = 32) -> None:
    """Train an autoencoder on the corpus and on patches of random colours, and measure its scaling factor."""
    torch.manual_seed(derive_seed(seed, "vae"))
    examples = to_tensor(np.concatenate([pictures, draw_patchworks(len(pictures) // 2, recipe.pixels, seed)]))
    optimizer = torch.optim.AdamW(vae.train().parameters(), 2e-3, weight_decay=0.0)
    for step in range(recipe.vae_steps):
        set_rate(optimizer, 2e-3, step, recipe.vae_steps)
        clean = examples[torch.randint(len(examples), (batch_size,))]
        posterior = vae.encode(clean).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(restored, clean) + 0.1 * F.l1_loss(restored, clean) + 1e-5 * posterior.kl().mean() / 64
        take_step(loss, optimizer, list(vae.parameters()))
        if step % 250 == 0:
            print(f"    VAE step {step}, squared error {F.mse_loss(restored, clean).item():.5f}", flush=True)
    vae.eval().requires_grad_(False)
    moments = cache_latents(vae, pictures[:2000])
    vae.register_to_config(scaling_factor=round(1 / sample_latents(moments).std().item(), 5))


def train_decoder(vae: AutoencoderKL, pictures: np.ndarray, recipe: Recipe, seed: int, batch_size: int = 32) -> None:
    """Train the decoder alone, which changes no latents, above all on patches: fine patterns are what it blurs."""
    torch.manual_seed(derive_seed(seed, "decoder"))
    pictures = np.concatenate([pictures[:8000], draw_patchworks(2 * len(pictures[:8000]), recipe.pixels, seed)])
    examples, moments = to_tensor(pictures), cache_latents(vae, pictures)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1.5e-3, weight_decay=0.0)
    for step in range(recipe.decoder_steps):
        set_rate(optimizer, 1.5e-3, step, recipe.decoder_steps)
        chosen = torch.randint(len(examples), (batch_size,))
        restored = vae.decode(sample_latents(moments[chosen])).sample
        clean = examples[chosen]
        take_step(F.mse_loss(restored, clean) + 0.1 * F.l1_loss(restored, clean), optimizer, parameters)
    vae.requires_grad_(False)


def draw_patchworks(count: int, pixels: int, seed: int) -> np.ndarray:
    """Draw patchworks, (count, H, W, 3) uint8."""
    rng = np.random.default_rng(derive_seed(seed, "patchworks"))
    return np.stack([draw_patchwork(pixels, rng) for _ in range(count)])


def draw_patchwork(pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a shape whose parts, cut by random lines and circles, have random colours, before a random background."""
    scene = shapes.random_scene(rng)
    u, v = shapes.own_axes(pixels * 4, scene.x, scene.y, scene.radius, scene.angle)
    parts = np.zeros(u.shape, int)
    for cut in range(2):
        turn, across = rng.uniform(0, 2 * math.pi), rng.uniform(-0.5, 0.5)
        line = np.cos(turn) * u + np.sin(turn) * v > across
        circle = (u - rng.uniform(-0.5, 0.5)) ** 2 + (v - rng.uniform(-0.5, 0.5)) ** 2 < rng.uniform(0.2, 0.8) ** 2
        parts += 2**cut * (line if rng.random() < 0.6 else circle)
    inside = shapes.CLASSES[scene.shape](u, v)
    inks = rng.uniform(15, 250, (5, 3)).astype(np.float32)
    drawn = np.where(inside[..., None], inks[parts], inks[4])
    return np.rint(shapes.shrink(drawn, 4)).astype(np.uint8)


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Return the means and log variances of the latents, (B, 8, h, w) float32."""
    chunks = torch.split(to_tensor(pictures), 128)
    return torch.cat([vae.encode(chunk).latent_dist.parameters for chunk in chunks])


def sample_latents(moments: Tensor) -> Tensor:
    """Draw latents from their means and log variances."""
    return diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments).sample()


# --------------------------------------------------------------------------------------------------------------- U-Net


def train_unet(
    pipeline: DiffusionPipeline,
    examples: Tensor,
    is_latent: bool,
    embeds: tuple[Tensor, Tensor],
    recipe: Recipe,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Train the U-Net and leave the moving average of its weights in the pipeline."""
    unet, scheduler = pipeline.unet.train(), DDPMScheduler.from_config(pipeline.scheduler.config)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), recipe.learning_rate, weight_decay=0.01)
    torch.manual_seed(derive_seed(seed, "unet"))
    losses = []
    for step, chosen in enumerate(choose(len(examples), recipe, seed)):
        set_rate(optimizer, recipe.learning_rate, step, recipe.steps)
        clean = examples[chosen]
        if is_latent:
            clean = sample_latents(clean) * pipeline.vae.config.scaling_factor
        rows = embeds[1][chosen].where(torch.rand(len(chosen)) >= EMPTY_CAPTIONS, 0)
        loss = compute_loss(unet, scheduler, pipeline, clean, embeds[0][rows], recipe)
        take_step(loss, optimizer, list(unet.parameters()))
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in unet.parameters()], 1 - decay)
        losses.append(loss.item())
        if step % 100 == 99:
            report(f"step {step + 1} of {recipe.steps}, loss {np.mean(losses[-100:]):.4f}")
    with torch.no_grad():
        for parameter, value in zip(unet.parameters(), average, strict=True):
            parameter.copy_(value)
    unet.eval()


def choose(count: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Return the examples of each step: all of them in a random order, again and again."""
    order, at = torch.randperm(count, generator=generator(seed, "order", 0)), 0
    for step in range(recipe.steps):
        if at + recipe.batch_size > count:
            order, at = torch.randperm(count, generator=generator(seed, "order", step)), 0
        yield order[at : at + recipe.batch_size]
        at += recipe.batch_size


def compute_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    pipeline: DiffusionPipeline,
    clean: Tensor,
    embeds: Tensor,
    recipe: Recipe,
) -> Tensor:
    """Return the loss of a batch, for IF the hybrid one (arXiv 2102.09672).

    Args:
        clean: (B, C, H, W), pictures in [-1, 1] or scaled latents.
        embeds: (B, L, D).
    """
    inputs = {}
    condition = enlarge(clean) if unet.config.in_channels == 6 else None
    if recipe.crop:
        top, left = (4 * int(torch.randint((recipe.pixels - recipe.crop) // 4 + 1, ())) for _ in range(2))
        clean, condition = (
            tensor[..., top : top + recipe.crop, left : left + recipe.crop] for tensor in (clean, condition)
        )
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
    noise = torch.randn_like(clean) + recipe.noise_offset * torch.randn(*clean.shape[:2], 1, 1)
    noisy = sample = scheduler.add_noise(clean, noise, timesteps)
    if condition is not None:
        # Half of the levels are among the lower ones, which are drawn with.
        levels = torch.randint(1000, timesteps.shape) // (1 + 2 * torch.randint(2, timesteps.shape))
        condition = pipeline.image_noising_scheduler.add_noise(condition, torch.randn_like(condition), levels)
        sample, inputs = torch.cat([noisy, condition], dim=1), {"class_labels": levels}
    prediction = unet(sample, timesteps, embeds, **inputs).sample
    signal = scheduler.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    if recipe.prediction_type == "v_prediction":
        return F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
    weights = (1 / snr).clamp(1, recipe.highest_weight)
    errors = F.mse_loss(prediction[:, : clean.shape[1]], noise, reduction="none").mean((1, 2, 3))
    loss = (weights * errors).mean()
    if prediction.shape[1] == clean.shape[1]:
        return loss
    guess, variance = prediction.chunk(2, dim=1)
    return loss + 0.001 * variational_term(guess.detach() - noise, variance, timesteps, scheduler.alphas_cumprod)


def enlarge(clean: Tensor) -> Tensor:
    """Make pictures small and large again, as stage II gets them."""
    size = clean.shape[-2:]
    low = F.interpolate(clean, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
    return F.interpolate(low, size, mode="bilinear", align_corners=True)


def variational_term(error: Tensor, variance: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the mean variational bound in bits per dimension; t = 0 counts like t = 1.

    Args:
        error: (B, C, H, W) of the predicted noise.
        variance: (B, C, H, W), from the log variance of the posterior (-1) to that of the forward step (1).
    """
    t = timesteps.clamp(min=1)
    now, before = (alphas_cumprod[index][:, None, None, None] for index in (t, t - 1))
    beta = 1 - now / before
    smallest = beta * (1 - before) / (1 - now)
    log_variance = torch.lerp(smallest.log(), beta.log(), (variance + 1) / 2)
    distance = error * beta / ((1 - now) * (1 - beta)).sqrt()  # between the means of the posteriors
    nats = (log_variance - smallest.log() + (smallest + distance**2) / log_variance.exp() - 1) / 2
    return nats.mean() / math.log(2)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Set the learning rate: up within 50 steps, then down to 0 along half a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Update the weights by a loss, the gradient clipped to a norm of 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
