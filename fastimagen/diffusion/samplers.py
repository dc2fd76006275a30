"""Samplers: plain functions of one signature that walk a descending grid of times from noise to image.

    sample(denoise, x, times, *, schedule, noise=None, callback=None) -> Tensor

x (B, C, H, W) is noise at times[0]; `denoise(x, time) -> x0` has prediction type, guidance and thresholding applied
already; times (steps + 1,) ends at the clean image, as schedule.grid does, or earlier; `noise(step) -> (B, C, H, W)`
feeds the stochastic sampler; `callback(step, x, x0)` sees every intermediate state. alpha = 0 is a valid start.

All of them go on linearly, x_next = c_x x + c_x0 x0 + c_prev previous + c_noise noise: they differ in the numbers, an
`Update`. A denoiser that has a method `step` (guidance.Denoiser) makes x0 and x_next in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .schedule import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


class Update(NamedTuple):
    """x_next = c_x x + c_x0 x0 + c_prev previous + c_noise noise."""

    c_x: float
    c_x0: float
    c_prev: float = 0.0
    c_noise: float = 0.0


def advance(
    denoise: Denoise,
    x: Tensor,
    time: Tensor,
    update: Update,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_next, x0) from x at `time`."""
    if hasattr(denoise, "step"):
        return denoise.step(x, time, update, previous=previous, noise=noise)
    x0 = denoise(x, time)
    x_next = update.c_x * x + update.c_x0 * x0
    if previous is not None:
        x_next = x_next + update.c_prev * previous
    if noise is not None:
        x_next = x_next + update.c_noise * noise
    return x_next, x0


def _levels(schedule: Schedule, times: Tensor) -> list[tuple[float, float]]:
    """(alpha, sigma) of every time of the grid as Python numbers: one transfer before the loop, none inside."""
    alpha, sigma = schedule.alpha_sigma(times)
    return list(zip(alpha.tolist(), sigma.tolist()))


def _log_ratio(alpha: float, sigma: float) -> float:
    """log(alpha / sigma): half the log-SNR, minus infinity for pure noise and infinity for the clean image."""
    if min(alpha, sigma) == 0:
        return math.inf if alpha > 0 else -math.inf
    return math.log(alpha / sigma)


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the small posterior variance (DDPM, eq. 6-7), on any subset of the steps."""
    if noise is None:
        raise ValueError("ddpm is stochastic: give noise(step)")
    levels = _levels(schedule, times)
    for step in range(len(times) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[step], levels[step + 1]
        ratio = alpha_t / alpha_s
        step_variance = sigma_t**2 - ratio**2 * sigma_s**2
        update = Update(
            c_x=ratio * sigma_s**2 / sigma_t**2,
            c_x0=alpha_s * step_variance / sigma_t**2,
            c_noise=math.sqrt(max(step_variance, 0.0)) * sigma_s / sigma_t,
        )
        # No noise on the way to the clean image.
        x, x0 = advance(denoise, x, times[step], update, noise=noise(step) if sigma_s > 0 else None)
        if callback:
            callback(step, x, x0)
    return x


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0): first order on the probability-flow ODE."""
    levels = _levels(schedule, times)
    for step in range(len(times) - 1):
        x, x0 = advance(denoise, x, times[step], _ddim(levels[step], levels[step + 1]))
        if callback:
            callback(step, x, x0)
    return x


def _ddim(start: tuple[float, float], stop: tuple[float, float]) -> Update:
    """alpha_s x0 + sigma_s epsilon, with epsilon = (x - alpha_t x0) / sigma_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = start, stop
    return Update(c_x=sigma_s / sigma_t, c_x0=alpha_s - sigma_s / sigma_t * alpha_t)


def sample_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    The first step and one onto the clean image are of first order: there is no history before the one, and the
    other reaches infinitely far in log-SNR. The order of the whole stays two, but for a logarithm on an even grid.
    """
    levels = _levels(schedule, times)
    log_ratio = [_log_ratio(alpha, sigma) for alpha, sigma in levels]
    previous = None
    for step in range(len(times) - 1):
        (_, sigma_t), (alpha_s, sigma_s) = levels[step], levels[step + 1]
        width = log_ratio[step + 1] - log_ratio[step]
        c_x0, c_prev = -alpha_s * math.expm1(-width), 0.0
        if previous is not None and width < math.inf:
            r = (log_ratio[step] - log_ratio[step - 1]) / width
            c_x0, c_prev = c_x0 + c_x0 / (2 * r), -c_x0 / (2 * r)  # of x0 + (x0 - previous) / (2 r)
        x, x0 = advance(
            denoise, x, times[step], Update(sigma_s / sigma_t, c_x0, c_prev), previous=previous if c_prev else None
        )
        previous = x0
        if callback:
            callback(step, x, x0)
    return x


def sample_heun(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method on dx/dphi = v, where tan(phi) = sigma / alpha (Salimans and Ho 2022, appendix D).

    Second order, two evaluations a step: DDIM predicts, the mean of v at both ends corrects. A step onto the clean
    image is DDIM's alone. Differs from Karras et al. 2022, algorithm 1, which steps in sigma / alpha: that variable
    runs away where alpha is small, and on an even grid of times the first corrections do more harm than good.
    """
    levels = _levels(schedule, times)
    for step in range(len(times) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[step], levels[step + 1]
        predicted, x0 = advance(denoise, x, times[step], _ddim(levels[step], levels[step + 1]))
        if sigma_s > 0:
            half = (math.atan2(sigma_t, alpha_t) - math.atan2(sigma_s, alpha_s)) / 2
            start = x - half / sigma_t * (alpha_t * x - x0)  # v = (alpha x - x0) / sigma at both ends
            update = Update(c_x=-half * alpha_s / sigma_s, c_x0=half / sigma_s, c_prev=1.0)
            x, _ = advance(denoise, predicted, times[step + 1], update, previous=start)
        else:
            x = predicted
        if callback:
            callback(step, x, x0)
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpmpp_2m": sample_dpmpp_2m, "heun": sample_heun}
