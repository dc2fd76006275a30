"""Classifier-free guidance and thresholding: from a network to the `denoise(x, time) -> x0` that samplers call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .config import SamplingConfig
from .diffusion import Diffusion

Network = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


def guided(both: Network, weight: float) -> Network:
    """Classifier-free guidance (Imagen, section 2.2): output u + w (c - u).

    `both(x, time)` runs the conditional and the unconditional half in one batch: it gets x (2B, C, H, W) and time
    (2B,), captions kept in the first B rows and dropped in the rest. Guidance acts on the network's output; since
    x0 is affine in it with the same coefficients in both halves, that equals guidance on epsilon or x0.
    """

    def network(x: Tensor, time: Tensor) -> Tensor:
        conditional, unconditional = both(torch.cat([x, x]), torch.cat([time, time])).chunk(2)  # 2 x (B, C, H, W)
        return unconditional.lerp(conditional, weight)  # exact for weight 0 and 1

    return network


def threshold(x0: Tensor, sampling: SamplingConfig) -> Tensor:
    """Clip x0 (B, C, H, W) as the stage asks (Imagen, section 2.3)."""
    if sampling.threshold == "dynamic":
        return ops.dynamic_threshold(x0, sampling.percentile)
    if sampling.threshold == "static":
        return x0.clamp(-1, 1)
    return x0


def denoiser(network: Network, diffusion: Diffusion, sampling: SamplingConfig) -> Denoise:
    """`denoise(x, time) -> x0` around `network(network_input, network_time) -> output`; time is a scalar tensor."""

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        network_time = diffusion.schedule.network_time(time).to(x.device).expand(len(x))  # (B,)
        output = network(diffusion.network_input(x, time), network_time)
        return threshold(diffusion.x0(output.to(x.dtype), x, time), sampling)

    return denoise
