"""Averages of the weights, on the fp32 shard that each process owns: one by decay, and two by power functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import EMAConfig
from . import power_average


class EMA:
    """Averages of the flat fp32 shards of a ZeRO optimizer.

    `shards` are the master weights themselves; every average has the same shapes and device. `average` is the one of
    the configured decay (Ho et al. 2020, appendix B), which validation, preview grids and exports use. `powers` by
    quantity of a checkpoint are those that averages of other lengths are made of after training (power_average.py).
    """

    def __init__(self, shards: list[Tensor], config: EMAConfig) -> None:
        self.config = config
        self.shards = shards
        self.average = [shard.detach().clone() for shard in shards]
        self.powers = {name: [shard.detach().clone() for shard in shards] for name in power_average.QUANTITIES.values()}

    def decay(self, step: int) -> float:
        """Decay after optimizer step `step`, counted from 1: (1 + n) / (warmup + n) at first, so that the average
        forgets the initial weights; the rule of TensorFlow's ExponentialMovingAverage(num_updates) for a warmup of
        10."""
        return min(self.config.decay, (1 + step) / (self.config.warmup + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay) (weights - average), for each average. step: optimizer steps so far, without those
        that were skipped."""
        shards = [shard.detach() for shard in self.shards]
        torch._foreach_lerp_(self.average, shards, 1 - self.decay(step))
        for sigma_rel, name in power_average.QUANTITIES.items():
            torch._foreach_lerp_(self.powers[name], shards, 1 - power_average.decay(sigma_rel, step))
