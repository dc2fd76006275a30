"""Exponential moving average of the weights, on the fp32 shard that each process owns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import EMAConfig


class EMA:
    """Average of the flat fp32 shards of a ZeRO optimizer (Ho et al. 2020, appendix B).

    `shards` are the master weights themselves; the average has the same shapes and device.
    """

    def __init__(self, shards: list[Tensor], config: EMAConfig) -> None:
        self.config = config
        self.shards = shards
        self.average = [shard.detach().clone() for shard in shards]

    def decay(self, step: int) -> float:
        """Decay after optimizer step `step`, counted from 1: (1 + n) / (warmup + n) at first, so that the average
        forgets the initial weights; the rule of TensorFlow's ExponentialMovingAverage(num_updates) for a warmup of
        10."""
        return min(self.config.decay, (1 + step) / (self.config.warmup + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay) (weights - average)."""
        torch._foreach_lerp_(self.average, [shard.detach() for shard in self.shards], 1 - self.decay(step))
