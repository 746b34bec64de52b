"""The loss that teaches a U-Net its variance, beside the one that teaches it the noise; tensors only."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence


def variational_bound(
    noise: Tensor,
    variance: Tensor,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """Return each place's term of the variational bound, which teaches the variance (arXiv 2102.09672, section 3.1).

    Args:
        noise: (B, C, H, W) predicted and detached.
        variance: (B, C, H, W) in about [-1, 1], from the log variance of the posterior to that of the forward step.
        clean, noisy: (B, C, H, W) float32, clean in [-1, 1].
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) share of the signal in the variance at each timestep, in [0, 1].

    Returns:
        (B, C, H, W) float32 in bits per dimension.
    """
    before = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    beta = 1 - alphas_cumprod / before
    smallest = beta * (1 - before) / (1 - alphas_cumprod)
    smallest[0] = smallest[1]  # at t = 0 it is 0, which has no logarithm
    tables = (alphas_cumprod, before, beta, smallest)
    signal, before, beta, smallest = (table[timesteps][:, None, None, None] for table in tables)
    share = (variance + 1) / 2
    deviation = (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp()
    # The mean of x_{t-1} is a mix of x_t and the clean picture, true or predicted (arXiv 2006.11239, equation 7).
    predicted = (noisy - (1 - signal).sqrt() * noise) / signal.sqrt()
    of_clean, of_noisy = before.sqrt() * beta / (1 - signal), (1 - beta).sqrt() * (1 - before) / (1 - signal)
    true_mean, mean = (of_clean * picture + of_noisy * noisy for picture in (clean, predicted))
    true, model = Normal(true_mean, smallest.sqrt().expand_as(clean)), Normal(mean, deviation)
    # The last step is scored by the probability of the picture's 256 levels (equation 13 there).
    above = model.cdf(clean + 1 / 255).where(clean < 0.999, 1.0)
    below = model.cdf(clean - 1 / 255).where(clean > -0.999, 0.0)
    surprise = -(above - below).clamp(min=1e-12).log()
    nats = torch.where((timesteps == 0)[:, None, None, None], surprise, kl_divergence(true, model))
    return nats / math.log(2)
