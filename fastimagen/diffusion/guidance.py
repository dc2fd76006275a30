"""From a network to the denoiser that samplers call: guidance, prediction type and thresholding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..config import SamplingConfig
from .process import Diffusion
from .samplers import Update

Network = Callable[[Tensor, Tensor], Tensor]


class Denoiser:
    """`denoise(x, time) -> x0` around `network(model_input, network_time) -> output`; `step` adds the sampler's step.

    With a guidance weight (Imagen, section 2.2) the network computes both halves in one batch: it gets x (2B, C, H, W)
    and time (2B,), with captions in the first B rows and null text or negative captions in the others. Guidance acts on
    the network's output. x0 is affine in the output with the same coefficients in both halves, so this equals guidance
    on epsilon or on x0. Without a guidance weight (None) the network gets x (B, C, H, W).
    """

    def __init__(
        self, network: Network, diffusion: Diffusion, sampling: SamplingConfig, *, guidance: float | None = None
    ) -> None:
        self.network, self.diffusion, self.sampling, self.guidance = network, diffusion, sampling, guidance

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """x0 (B, C, H, W) from x at `time`, a scalar on the CPU."""
        return self.step(x, time, Update(c_x=0.0, c_x0=1.0))[1]

    def step(
        self, x: Tensor, time: Tensor, update: Update, *, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_next, x0), each (B, C, H, W): everything behind the network in one op, `ops.sampler_step`."""
        c_skip, c_out, c_in = (float(c) for c in self.diffusion.coefficients(time))
        model_input = x if c_in == 1 else c_in * x
        if self.guidance is not None:
            model_input = torch.cat([model_input, model_input])  # (2B, C, H, W)
        network_time = float(self.diffusion.schedule.network_time(time))
        times = model_input.new_full((len(model_input),), network_time, dtype=torch.float32)  # (B,) or (2B,)
        return ops.sampler_step(
            self.network(model_input, times),
            x,
            (c_skip, c_out),
            update,
            guidance=self.guidance,
            threshold=self.sampling.threshold,
            percentile=self.sampling.percentile,
            ceiling=self.sampling.ceiling,
            previous=previous,
            noise=noise,
        )
