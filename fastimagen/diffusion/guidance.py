"""From a network to the `denoise(x, time) -> x0` that samplers call: guidance, prediction type and thresholding."""

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
    """`denoise(x, time) -> x0` around `network(network_input, network_time) -> output`; `step` goes on from there.

    With a guidance weight (Imagen, section 2.2) the network runs both halves in one batch: it gets x (2B, C, H, W) and
    time (2B,), captions kept in the first B rows, dropped or negative in the rest. Guidance acts on its output; since
    x0 is affine in it with the same coefficients in both halves, that equals guidance on epsilon or x0. Without one
    (None) it gets x (B, C, H, W).
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
        """(x_next, x0): the sampler's step, by `ops.sampler_step`."""
        skip, out, scale = (float(c) for c in self.diffusion.coefficients(time))
        shown = x if scale == 1 else scale * x
        if self.guidance is not None:
            shown = torch.cat([shown, shown])  # (2B, C, H, W)
        network_time = shown.new_full(
            (len(shown),), float(self.diffusion.schedule.network_time(time)), dtype=torch.float32
        )
        return ops.sampler_step(
            self.network(shown, network_time),
            x,
            (skip, out),
            update,
            guidance=self.guidance,
            threshold=self.sampling.threshold,
            percentile=self.sampling.percentile,
            previous=previous,
            noise=noise,
        )
