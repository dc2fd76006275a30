"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) noise.

Those of diffusion preserve the variance, alpha^2 + sigma^2 = 1; that of flow matching is a straight line from image to
noise, alpha + sigma = 1. At equal sigma / alpha their x_t differ by a factor only, so that samplers work with both.

Time runs from clean to noise. Continuous schedules take t in [0, 1], discrete ones the integer steps 0 .. T-1 of
DDPM; in both, -1 is the clean image itself, alpha = 1 and sigma = 0. All coefficients are computed in float64.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..config import SamplingConfig
from ..diffusion_config import ScheduleConfig
from ..respacing import respaced


class Schedule(Protocol):
    """What diffusion and samplers need to know about a noise schedule."""

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `time` (any shape), float64."""

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times for uniform random numbers in [0, 1)."""

    def time_of(self, logsnr: Tensor) -> Tensor:
        """The time whose log-SNR is nearest to `logsnr` (any shape)."""

    def network_time(self, time: Tensor) -> Tensor:
        """The number that the U-Net's sinusoidal embedding sees: float32."""

    def sampling_times(self, steps: int) -> Tensor:
        """Descending times (steps + 1,) from the noisiest to -1, the clean image, float64, on the CPU."""


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that a configuration describes."""
    if config.name == "cosine":
        return Cosine(config.shift, config.logsnr_range)
    if config.name == "flow":
        return Flow(config.shift)
    assert config.timesteps is not None  # ScheduleConfig demands it of discrete schedules
    return Linear(config.timesteps) if config.name == "linear" else SquaredCos(config.timesteps)


def sampling_times(config: ScheduleConfig, sampling: SamplingConfig) -> Tensor:
    """Descending times (steps + 1,) of the sampling settings, from noise to -1, the clean image, on the CPU."""
    if sampling.respacing == "even":
        return make_schedule(config).sampling_times(sampling.steps)
    assert config.timesteps is not None  # StageConfig demands it
    times = [*respaced(sampling.respacing, sampling.steps, config.timesteps), -1]
    return torch.tensor(times, dtype=torch.float64, device="cpu")


class Cosine:
    """log-SNR = -2 log(shift tan(angle)) in continuous time (Hoogeboom et al. 2023; Kingma et al. 2021, bounded).

    Without bounds angle = pi t / 2, so that alpha = cos(pi t / 2) for shift 1. The bounds apply after the shift. They
    do not clip the log-SNR: they shorten the range of angles at both ends, and t stays uniform over that range. So
    the log-SNR decreases strictly and reaches both bounds exactly. With bounds of -15 and 15 and shift 1, no angle
    changes by more than 0.0006.

    Raises ValueError for bounds so wide that float64 angles cannot distinguish them from alpha = 0 or sigma = 0.
    """

    def __init__(self, shift: float = 1.0, logsnr_range: tuple[float, float] = (-15.0, 15.0)) -> None:
        self.offset = -2 * math.log(shift)
        low, high = logsnr_range
        if not all(abs(bound - self.offset) <= 70 for bound in (low, high)):
            raise ValueError(
                f"logsnr_range {list(logsnr_range)} with shift {shift} is out of reach: "
                f"logsnr + 2 log(shift) must stay within -70 and 70"
            )
        self.first, self.last = (math.atan(math.exp((self.offset - bound) / 2)) for bound in (high, low))

    def logsnr(self, time: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), float64; infinite for the clean image."""
        angle = self.first + time.double() * (self.last - self.first)
        return torch.where(time < 0, math.inf, -2 * torch.log(torch.tan(angle)) + self.offset)

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        logsnr = self.logsnr(time)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def training_times(self, uniform: Tensor) -> Tensor:
        return uniform

    def time_of(self, logsnr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp((self.offset - logsnr.double()) / 2))
        return ((angle - self.first) / (self.last - self.first)).clamp(0, 1)

    def network_time(self, time: Tensor) -> Tensor:
        return (1000 * time).float()

    def sampling_times(self, steps: int) -> Tensor:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
        times[-1] = -1  # the clean image: time 0 still has the noise of the upper bound
        return times


class Flow:
    """alpha = 1 - sigma, the straight path of flow matching (Lipman et al. 2023, section 4.1, with sigma_min = 0).

    sigma = shift t / (1 + (shift - 1) t), so that sigma / alpha is multiplied by shift (Esser et al. 2024, section
    5.3.2). Time 0 is the clean image itself, time 1 is pure noise.
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        time = time.double().clamp(min=0)  # -1 is the clean image
        total = 1 + (self.shift - 1) * time
        return (1 - time) / total, self.shift * time / total

    def training_times(self, uniform: Tensor) -> Tensor:
        return uniform

    def time_of(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr.double() / 2 - math.log(self.shift))

    def network_time(self, time: Tensor) -> Tensor:
        return (1000 * time).float()

    def sampling_times(self, steps: int) -> Tensor:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
        times[-1] = -1
        return times


class Discrete:
    """DDPM's T discrete steps with betas (T,), the variance that each step adds (Ho et al. 2020). Base class."""

    def __init__(self, betas: Tensor) -> None:
        self.timesteps = len(betas)
        # Indexed by t + 1: entry 0 is the clean image, t = -1.
        alpha_bar = torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, dim=0)])  # (T + 1,)
        rising = -torch.logit(alpha_bar[1:])  # (T,): -log-SNR of every step
        self._alpha_bar = _PerDevice(alpha_bar)
        self._midpoints = _PerDevice((rising[1:] + rising[:-1]) / 2)  # (T - 1,): where the nearest step changes

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar.on(time.device)[time.long() + 1]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def training_times(self, uniform: Tensor) -> Tensor:
        return (uniform * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def time_of(self, logsnr: Tensor) -> Tensor:
        return torch.bucketize(-logsnr.double(), self._midpoints.on(logsnr.device), right=True)

    def network_time(self, time: Tensor) -> Tensor:
        return time.float()

    def sampling_times(self, steps: int) -> Tensor:
        if steps > self.timesteps:
            raise ValueError(f"{steps} sampling steps, but the schedule has {self.timesteps} timesteps")
        # Evenly respaced from T - 1 to -1, the clean image; all T steps if steps = T.
        return torch.linspace(self.timesteps - 1, -1, steps + 1, dtype=torch.float64, device="cpu").round()


class Linear(Discrete):
    """Linear betas, rescaled from T = 1000 (Ho et al. 2020; MinImagen).

    With T = 20 the last beta is 1 and the last step is pure noise, alpha = 0. Raises ValueError for fewer steps.
    """

    def __init__(self, timesteps: int) -> None:
        scale = 1000 / timesteps
        if 0.02 * scale > 1:
            raise ValueError(f"the linear schedule needs at least 20 timesteps, got {timesteps}: betas exceed 1")
        # On the CPU even under torch.device("meta") or another default device.
        super().__init__(torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64, device="cpu"))


class SquaredCos(Discrete):
    """Betas of the cosine schedule, at most 0.999 (Nichol and Dhariwal 2021, eq. 17), as in DeepFloyd IF."""

    def __init__(self, timesteps: int) -> None:
        time = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps  # (T + 1,)
        alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()  # (T + 1,)
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


class _PerDevice:
    """A constant tensor on every device that asks for it.

    It is copied to each device once: a copy in every step would be a host synchronisation in every step.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.copies = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        if device not in self.copies:
            self.copies[device] = self.value.to(device)
        return self.copies[device]
