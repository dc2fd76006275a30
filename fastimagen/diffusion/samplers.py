"""Samplers: plain functions of one signature that integrate from noise to an image.

    sample(denoise, x, times, *, schedule, noise=None, callback=None) -> Tensor

x (B, C, H, W) is noise at times[0]. `denoise(x, time) -> x0` includes the prediction type, guidance and thresholding.
times (steps + 1,) descends to the clean image, as Schedule.sampling_times does, or stops earlier. It is on the CPU, so
that computing a step's coefficients is no host synchronisation. `noise(step)` returns the noise (B, C, H, W) of a
stochastic sampler. `callback(step, x, x0)` sees the state after every step. alpha = 0 is a valid start. Subscript t is
the start of a step and s its end: alpha_t, sigma_t, alpha_s, sigma_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..ops.sampler_step import sampler_step_reference
from .schedule import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


class Update(NamedTuple):
    """Coefficients of a sampler's step: x_next = c_x x + c_x0 x0 + c_prev previous + c_noise noise.

    max_noise: where the network predicts the variance, the noise has coefficients from c_noise to this.
    """

    c_x: float
    c_x0: float
    c_prev: float = 0.0
    c_noise: float = 0.0
    max_noise: float = 0.0


@runtime_checkable
class SteppingDenoiser(Protocol):
    """A denoiser that computes x0 and the sampler's step together, as guidance.Denoiser does in one fused op."""

    def __call__(self, x: Tensor, time: Tensor) -> Tensor: ...

    def step(
        self, x: Tensor, time: Tensor, update: Update, *, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def take_step(
    denoise: Denoise,
    x: Tensor,
    time: Tensor,
    update: Update,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_next, x0), each (B, C, H, W), from x at `time`; `denoise` may be any function of x and time."""
    if isinstance(denoise, SteppingDenoiser):
        return denoise.step(x, time, update, previous=previous, noise=noise)
    return sampler_step_reference(
        denoise(x, time),
        x,
        (0.0, 1.0),  # the output is x0 itself
        update[:4],
        guidance=None,
        threshold="none",
        percentile=1.0,
        ceiling=None,
        previous=previous,
        noise=noise,
    )


def alpha_sigma_pairs(schedule: Schedule, times: Tensor) -> list[tuple[float, float]]:
    """(alpha, sigma) at every time, as Python numbers."""
    alpha, sigma = schedule.alpha_sigma(times)
    return list(zip(alpha.tolist(), sigma.tolist()))


def half_logsnr(alpha: float, sigma: float) -> float:
    """log(alpha / sigma): minus infinity for pure noise, infinity for the clean image."""
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
    """Ancestral sampling from the posterior with its lower variance (Ho et al. 2020, eq. 6-7), on any subset of times.

    A denoiser that knows the variance takes it between that and the upper bound (Nichol and Dhariwal 2021, eq. 15).
    Raises ValueError without `noise`.
    """
    if noise is None:
        raise ValueError("ddpm is stochastic: give noise(step)")
    pairs = alpha_sigma_pairs(schedule, times)
    for step in range(len(times) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = pairs[step], pairs[step + 1]
        ratio = alpha_t / alpha_s
        step_variance = sigma_t**2 - ratio**2 * sigma_s**2  # of x_t given x_s
        max_noise = math.sqrt(max(step_variance, 0.0))
        update = Update(
            c_x=ratio * sigma_s**2 / sigma_t**2,
            c_x0=alpha_s * step_variance / sigma_t**2,
            c_noise=max_noise * sigma_s / sigma_t,
            max_noise=max_noise,
        )
        step_noise = noise(step) if sigma_s > 0 else None  # the step to the clean image is deterministic
        x, x0 = take_step(denoise, x, times[step], update, noise=step_noise)
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
    pairs = alpha_sigma_pairs(schedule, times)
    for step in range(len(times) - 1):
        x, x0 = take_step(denoise, x, times[step], ddim_update(pairs[step], pairs[step + 1]))
        if callback:
            callback(step, x, x0)
    return x


def ddim_update(start: tuple[float, float], stop: tuple[float, float]) -> Update:
    """x_s = alpha_s x0 + sigma_s epsilon, with epsilon = (x_t - alpha_t x0) / sigma_t."""
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
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one network evaluation per step.

    The first step and a step to the clean image are first order: the former has no previous x0, the latter is infinite
    in log-SNR. The order of the whole is two up to a logarithm if times are evenly spaced.
    """
    pairs = alpha_sigma_pairs(schedule, times)
    log_ratio = [half_logsnr(alpha, sigma) for alpha, sigma in pairs]
    previous = None
    for step in range(len(times) - 1):
        (_, sigma_t), (alpha_s, sigma_s) = pairs[step], pairs[step + 1]
        h = log_ratio[step + 1] - log_ratio[step]
        # x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D, with D = x0 in the first order
        c_x0, c_prev = -alpha_s * math.expm1(-h), 0.0
        if previous is not None and h < math.inf:
            r = (log_ratio[step] - log_ratio[step - 1]) / h  # D = x0 + (x0 - previous) / (2 r)
            c_x0, c_prev = c_x0 + c_x0 / (2 * r), -c_x0 / (2 * r)
        update = Update(sigma_s / sigma_t, c_x0, c_prev)
        x, x0 = take_step(denoise, x, times[step], update, previous=previous if c_prev else None)
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
    """Heun's method on dy/dphi = v, where tan(phi) = sigma / alpha (Salimans and Ho 2022, appendix D).

    y = x / scale with scale^2 = alpha^2 + sigma^2, which is 1 unless the schedule is that of flow. Second order, two
    network evaluations per step: DDIM predicts, the mean of v at both ends corrects. A step to the clean image is DDIM
    only. Differs from Karras et al. 2022, algorithm 1, which steps in sigma / alpha: that variable diverges where alpha
    is small, so that with evenly spaced times the first corrections increase the error.
    """
    pairs = alpha_sigma_pairs(schedule, times)
    for step in range(len(times) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = pairs[step], pairs[step + 1]
        predicted, x0 = take_step(denoise, x, times[step], ddim_update(pairs[step], pairs[step + 1]))
        if sigma_s > 0:
            half = (math.atan2(sigma_t, alpha_t) - math.atan2(sigma_s, alpha_s)) / 2  # of the step in phi
            scale_t, scale_s = math.hypot(alpha_t, sigma_t), math.hypot(alpha_s, sigma_s)
            # y_s = y_t - half (v_t + v_s), with v = (alpha y - scale x0) / sigma at both ends
            start = x / scale_t - half / sigma_t * (alpha_t / scale_t * x - scale_t * x0)  # y
            update = Update(c_x=-half * alpha_s / sigma_s, c_x0=half * scale_s**2 / sigma_s, c_prev=scale_s)
            x, _ = take_step(denoise, predicted, times[step + 1], update, previous=start)
        else:
            x = predicted
        if callback:
            callback(step, x, x0)
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpmpp_2m": sample_dpmpp_2m, "heun": sample_heun}
