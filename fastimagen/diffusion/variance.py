"""The loss of a learned variance: the variational bound of one step, in bits per dimension, with the mean detached.

Nichol and Dhariwal 2021, section 3.1: L_hybrid = L_simple + 0.001 L_vlb (eq. 16), where L_vlb is the sum of the T terms
(eq. 4-7), estimated here by T times the term of the sample's own step, and gives the mean no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .process import expand
from .schedule import Schedule

WEIGHT = 0.001
"""lambda of eq. 16."""
HALF_BIN = 1 / 255
"""Half the distance of two of the 256 values of a pixel in [-1, 1]."""
SMALLEST = 1e-12
"""Floor of probabilities inside a logarithm."""


def hybrid_term(
    schedule: Schedule, timesteps: int, x0: Tensor, predicted: Tensor, variance: Tensor, time: Tensor
) -> Tensor:
    """What is added to the loss (B,): 0.001 T times the bound's term of step `time` (B,), in bits per dimension, fp32.

    x0, predicted (the network's x0) and variance (its output for it): (B, C, H, W). Only `variance` gets a
    gradient. The variance of p is exp(f log beta + (1 - f) log beta~), f = (variance + 1) / 2 (eq. 15); the first step,
    whose posterior has none, takes that of the second as its lower bound.
    """
    alpha, sigma = schedule.alpha_sigma(time)  # (B,) float64 each
    alpha_s, sigma_s = schedule.alpha_sigma(time - 1)
    second = torch.ones_like(time)
    alpha_1, sigma_1 = schedule.alpha_sigma(second)
    alpha_0, sigma_0 = schedule.alpha_sigma(second - 1)
    ratio = alpha / alpha_s
    beta = sigma**2 - (ratio * sigma_s) ** 2
    first_floor = (sigma_1**2 - (alpha_1 / alpha_0 * sigma_0) ** 2) * sigma_0**2 / sigma_1**2
    posterior = torch.where(time > 0, beta * sigma_s**2 / sigma**2, first_floor)
    low, high = expand(posterior.log(), x0), expand(beta.log(), x0)
    share = (variance.float() + 1) / 2  # (B, C, H, W)
    log_variance = share * high + (1 - share) * low
    # The posterior's mean is affine in x0, so that the two means differ by this coefficient times the error of x0.
    error = (expand(alpha_s * beta / sigma**2, x0) * (predicted.detach().float() - x0.float())).detach()
    kl = 0.5 * (log_variance - low + torch.exp(low - log_variance) - 1 + error.square() * torch.exp(-log_variance))
    decoded = _decoder_nll(x0.float(), x0.float() + error, log_variance)
    nats = torch.where(time.reshape(-1, 1, 1, 1) > 0, kl, decoded)  # (B, C, H, W)
    return WEIGHT * timesteps * nats.flatten(1).mean(dim=1) / math.log(2)  # (B,)


def _decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x0 | x_1): the normal distribution's share of the bin of a pixel value (Ho et al. 2020, eq. 13)."""
    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = ((x0 + offset - mean) * inverse for offset in (HALF_BIN, -HALF_BIN))
    above, below = torch.special.ndtr(upper), torch.special.ndtr(lower)
    share = torch.where(x0 < -1 + 1e-3, above, torch.where(x0 > 1 - 1e-3, 1 - below, above - below))
    return -share.clamp(min=SMALLEST).log()
