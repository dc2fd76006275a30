"""From a network to the denoiser that samplers call: guidance, prediction type and thresholding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..config import SamplingConfig
from .process import Diffusion
from .samplers import Update

NetworkCall = Callable[[Tensor, Tensor], Tensor]
"""network(model_input, network_time) -> output, with everything else given."""


class Denoiser:
    """`denoise(x, time) -> x0` around `network(model_input, network_time) -> output`; `step` adds the sampler's step.

    With a guidance weight (Imagen, section 2.2) the network computes both halves in one batch: it gets x (2B, C, H, W)
    and time (2B,), with captions in the first B rows and null text or negative captions in the others. Guidance acts on
    the network's output. x0 is affine in the output with the same coefficients in both halves, so this equals guidance
    on epsilon or on x0. Without a guidance weight (None) the network gets x (B, C, H, W). Where sampling.guidance_range
    turns guidance off, `conditional` is called in its place, with x (B, C, H, W) and captions.

    An output of 2 C channels has the variance of ddpm's steps behind the prediction. sampling.variance "learned" takes
    it, of the half with captions; otherwise it is not used.
    """

    def __init__(
        self,
        network: NetworkCall,
        diffusion: Diffusion,
        sampling: SamplingConfig,
        *,
        guidance: float | None = None,
        conditional: NetworkCall | None = None,
    ) -> None:
        self.network, self.diffusion, self.sampling, self.guidance = network, diffusion, sampling, guidance
        self.conditional = conditional
        assert conditional is not None or guidance is None or sampling.guidance_range is None

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """x0 (B, C, H, W) from x at `time`, a scalar on the CPU."""
        return self.step(x, time, Update(c_x=0.0, c_x0=1.0))[1]

    def step(
        self, x: Tensor, time: Tensor, update: Update, *, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_next, x0), each (B, C, H, W): everything behind the network in one op, `ops.sampler_step`."""
        network, guidance = self._at(time)
        c_skip, c_out, c_in = (float(c) for c in self.diffusion.coefficients(time))
        model_input = x if c_in == 1 else c_in * x
        if guidance is not None:
            model_input = torch.cat([model_input, model_input])  # (2B, C, H, W)
        network_time = float(self.diffusion.schedule.network_time(time))
        times = model_input.new_full((len(model_input),), network_time, dtype=torch.float32)  # (B,) or (2B,)
        output = network(model_input, times)
        prediction = output[:, : x.shape[1]]  # (B, C, H, W) or (2B, C, H, W)
        if noise is not None and self.sampling.variance == "learned":
            noise = noise * learned_factor(output[: len(x), x.shape[1] :], update)
        return ops.sampler_step(
            prediction,
            x,
            (c_skip, c_out),
            update[:4],
            guidance=guidance,
            threshold=self.sampling.threshold,
            percentile=self.sampling.percentile,
            ceiling=self.sampling.ceiling,
            previous=previous,
            noise=noise,
        )

    def _at(self, time: Tensor) -> tuple[NetworkCall, float | None]:
        """The network to call at `time`, and its guidance weight."""
        if self.guidance is None or bool(guided(self.diffusion, self.sampling, time)):
            return self.network, self.guidance
        assert self.conditional is not None
        return self.conditional, None


def guided(diffusion: Diffusion, sampling: SamplingConfig, time: Tensor) -> Tensor:
    """Whether the noise level at `time` (any shape) is one that guidance acts at: above the range's first number, up to
    its second (Kynkäänniemi et al. 2024, eq. 4)."""
    alpha, sigma = diffusion.schedule.alpha_sigma(time)
    if sampling.guidance_range is None:
        return torch.ones_like(alpha, dtype=torch.bool)
    low, high = sampling.guidance_range
    return (sigma > low * alpha) & (sigma <= high * alpha)  # alpha may be 0


def learned_factor(variance: Tensor, update: Update) -> Tensor:
    """Factor (B, C, H, W) on the noise of a step with the network's variance (B, C, H, W), float32.

    The network interpolates the logarithm of the variance between its bounds: -1 is the lower one, c_noise^2, and 1 the
    upper one, max_noise^2 (Nichol and Dhariwal 2021, eq. 15).
    """
    share = (variance.float() + 1) / 2  # (B, C, H, W)
    return torch.exp(share * math.log(update.max_noise / update.c_noise))
