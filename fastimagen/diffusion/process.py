"""The diffusion process of one stage: noising, training target and loss, and x0 from a network output.

Every prediction type is one affine map, x0 = c_skip x_t + c_out F(c_in x_t) (Karras et al. 2022, eq. 7, in the scale of
the schedule), where F is the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion_config import ObjectiveConfig, ScheduleConfig
from .schedule import make_schedule


def huber(error: Tensor) -> Tensor:
    """error^2 / 2 up to 1, then |error| - 1/2 (Huber 1964), element by element."""
    size = error.abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs, "huber": huber}


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) or () float64 coefficients as (B, 1, 1, 1) or (1, 1, 1, 1), in `like`'s dtype but at least fp32."""
    coefficient = coefficient.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return coefficient.reshape(-1, *(1,) * (like.dim() - 1))


class Diffusion:
    """Forward process and objective of a stage. Has no trainable parameters.

    Raises ValueError for a prediction type that does not belong to the schedule, or cannot recover x0 at alpha = 0 on a
    schedule that reaches it.
    """

    def __init__(self, schedule: ScheduleConfig, objective: ObjectiveConfig) -> None:
        self.schedule = make_schedule(schedule)
        self.objective = objective
        if schedule.name == "flow" and objective.prediction not in ("flow", "x0"):
            raise ValueError(
                f'the schedule "flow" needs the prediction "flow", the velocity, or "x0", got "{objective.prediction}"'
            )
        if objective.prediction == "flow" and schedule.name != "flow":
            raise ValueError(
                f'the prediction "flow" is the velocity of the straight path: set schedule.name to "flow", or use "v", '
                f"the velocity of the {schedule.name} schedule"
            )
        alpha, _ = self.schedule.alpha_sigma(self.schedule.sampling_times(1)[:1])
        if objective.prediction in ("epsilon", "edm") and alpha.item() == 0:
            raise ValueError(
                f'prediction "{objective.prediction}" needs alpha > 0 at every step, but the '
                f"{schedule.name} schedule with {schedule.timesteps} timesteps ends in pure noise; "
                f'use "v", "x0" or more timesteps'
            )

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times (B,) from uniform numbers (B,) in [0, 1), float64: uniform, logit-normal, or with log-normal noise
        levels sigma / alpha.

        Noise levels outside of the schedule's range become its first or last time.
        """
        if self.objective.times == "uniform":
            return self.schedule.training_times(uniform)
        if self.objective.times == "logit_normal":
            logit = self.objective.logit_mean + self.objective.logit_std * torch.special.ndtri(uniform)
            return self.schedule.training_times(torch.sigmoid(logit))
        log_ratio = self.objective.edm_mean + self.objective.edm_std * torch.special.ndtri(uniform)
        return self.schedule.time_of(-2 * log_ratio)

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise (DDPM, eq. 4)."""
        alpha, sigma = (expand(c, x0) for c in self.schedule.alpha_sigma(time))
        return alpha * x0 + sigma * noise

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at `time`, float64."""
        alpha, sigma = self.schedule.alpha_sigma(time)
        one = torch.ones_like(alpha)
        if self.objective.prediction == "epsilon":
            return 1 / alpha, -sigma / alpha, one
        if self.objective.prediction == "x0":
            return 0 * one, one, one
        if self.objective.prediction == "v":
            return alpha, -sigma, one
        if self.objective.prediction == "flow":
            return one, -sigma, one
        # Karras et al., table 1, for x_t / alpha at noise level sigma / alpha; multiplied out.
        data = self.objective.sigma_data
        total = (sigma**2 + (alpha * data) ** 2).sqrt()  # standard deviation of x_t
        return alpha * data**2 / total**2, sigma * data / total, 1 / total

    def network_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        """c_in x_t (B, C, H, W), the input of the U-Net."""
        return expand(self.coefficients(time)[2], x_t) * x_t

    def x0(self, output: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """The denoised image (B, C, H, W) from a network output, in at least fp32."""
        if (
            self.objective.prediction == "epsilon"
        ):  # (x_t - sigma epsilon) / alpha rounds once less than c_skip and c_out
            alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(time))
            return (x_t - sigma * output) / alpha
        c_skip, c_out, _ = (expand(c, x_t) for c in self.coefficients(time))
        return c_skip * x_t + c_out * output

    def target(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The output (B, C, H, W) that the network is trained to give for x_t = alpha x_0 + sigma noise."""
        if self.objective.prediction == "epsilon":
            return noise
        if self.objective.prediction == "x0":
            return x0
        if self.objective.prediction == "flow":
            return noise - x0  # dx_t / dsigma, the same at all times (Lipman et al. 2023, section 4.1)
        alpha, sigma = self.schedule.alpha_sigma(time)
        if self.objective.prediction == "v":
            return expand(alpha, x0) * noise - expand(sigma, x0) * x0
        data = self.objective.sigma_data
        total = (sigma**2 + (alpha * data) ** 2).sqrt()
        return expand(sigma / (data * total), x0) * x0 - expand(alpha * data / total, x0) * noise

    def weight(self, time: Tensor) -> Tensor:
        """Loss weight (B,) of samples at `time`, float64: min_snr is min(SNR, gamma) on x0's squared error."""
        alpha, sigma = self.schedule.alpha_sigma(time)
        if self.objective.weighting == "none":
            return torch.ones_like(alpha)
        # min(SNR, gamma) c_out^2 (Hang et al. 2023, section 3.4), arranged so that SNR = inf or 0 divides nothing by 0.
        gamma, snr_sigma2 = self.objective.min_snr_gamma, alpha**2
        limited = torch.minimum(snr_sigma2, gamma * sigma**2)  # min(SNR, gamma) sigma^2
        if self.objective.prediction == "epsilon":
            return limited / alpha**2
        if self.objective.prediction in ("v", "flow"):  # c_out = -sigma
            return limited
        if self.objective.prediction == "x0":
            return torch.minimum(alpha**2 / sigma**2, torch.full_like(alpha, gamma))
        return limited / (sigma**2 + (alpha * self.objective.sigma_data) ** 2) * self.objective.sigma_data**2

    def loss(self, output: Tensor, target: Tensor, time: Tensor) -> Tensor:
        """Weighted error per sample (B,), averaged over pixels and over pairs of neighbouring pixels, fp32."""
        per_sample = self.penalty(output.float() - target.float())  # (B,)
        return per_sample * self.weight(time).to(per_sample)

    def penalty(self, error: Tensor) -> Tensor:
        """The unweighted loss (B,) of errors (B, C, H, W)."""
        per_sample = self._mean(error)  # (B,)
        if self.objective.difference_weight:
            differences = self._mean(error.diff(dim=-1)) + self._mean(error.diff(dim=-2))  # (B,)
            per_sample = per_sample + self.objective.difference_weight * differences
        return per_sample

    def _mean(self, error: Tensor) -> Tensor:
        """The mean loss of an error (B, C, H, W) per sample, (B,)."""
        return PENALTIES[self.objective.loss](error).flatten(1).mean(dim=1)  # (B,)
