"""Variance-preserving noise schedules: x_t = alpha(t) x_0 + sigma(t) noise with alpha^2 + sigma^2 = 1.

Time runs from clean to noise. Continuous schedules take t in [0, 1]; discrete ones take the integer steps
0 .. T-1 of DDPM, and -1 for the clean image. All coefficients are computed in float64.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .config import ScheduleConfig


class Schedule(Protocol):
    """What diffusion and samplers need to know about a noise schedule."""

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `time` (any shape), float64."""

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times for uniform random numbers in [0, 1)."""

    def network_time(self, time: Tensor) -> Tensor:
        """The number that the U-Net's sinusoidal embedding sees: float32."""

    def grid(self, steps: int) -> Tensor:
        """Descending times (steps + 1,) from pure noise to clean, float64."""


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that a configuration describes."""
    if config.name == "cosine":
        return Cosine(config.shift, config.logsnr_range)
    return Linear(config.timesteps)


class Cosine:
    """alpha = cos(pi t / 2) in continuous time, bounded in log-SNR (Kingma et al. 2021; shifted: Hoogeboom et al. 2023)."""

    def __init__(self, shift: float = 1.0, logsnr_range: tuple[float, float] = (-15.0, 15.0)) -> None:
        self.offset = -2 * math.log(shift)
        low, high = logsnr_range
        # t in [0, 1] is mapped into the angles whose log-SNR is within bounds: both ends are reached, none is clipped.
        self.first, self.last = (math.atan(math.exp((self.offset - bound) / 2)) for bound in (high, low))

    def logsnr(self, time: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), float64."""
        angle = self.first + time.double() * (self.last - self.first)
        return -2 * torch.log(torch.tan(angle)) + self.offset

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        logsnr = self.logsnr(time)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def training_times(self, uniform: Tensor) -> Tensor:
        return uniform

    def network_time(self, time: Tensor) -> Tensor:
        return (1000 * time).float()

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


class Linear:
    """DDPM's T discrete steps with linear betas, rescaled from T = 1000 (Ho et al. 2020; MinImagen)."""

    def __init__(self, timesteps: int) -> None:
        scale = 1000 / timesteps
        if 0.02 * scale > 1:
            raise ValueError(f"the linear schedule needs at least 20 timesteps, got {timesteps}: betas exceed 1")
        self.timesteps = timesteps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)
        # Index t + 1, so that the clean image, t = -1, is entry 0.
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])  # (T + 1,)

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(time.device)[time.long() + 1]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def training_times(self, uniform: Tensor) -> Tensor:
        return (uniform * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def network_time(self, time: Tensor) -> Tensor:
        return time.float()

    def grid(self, steps: int) -> Tensor:
        if steps > self.timesteps:
            raise ValueError(f"{steps} sampling steps, but the schedule has {self.timesteps} timesteps")
        # Respaced: T-1 first, -1 (clean) last; all T steps when steps = T.
        return torch.linspace(self.timesteps - 1, -1, steps + 1, dtype=torch.float64).round()
