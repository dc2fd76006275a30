"""Averages between two records: losses by noise level, and where the time of each rank went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .phases import Phase

NOISE_EDGES = (0.22, 0.52, 0.86, 0.98)
"""Noise levels between the bins of the loss: sigma of x_t = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1, near log
SNR = 3, 1, -1, -3. Of uniform times of the cosine schedule 14, 21, 31, 21 and 13 % fall into the bins."""
NOISE_BINS = tuple(f"{low:.2f}-{high:.2f}" for low, high in zip((0.0, *NOISE_EDGES), (*NOISE_EDGES, 1.0)))

TRAINING: tuple[Phase, ...] = ("data", "forward", "backward", "step")
"""Phases of a training step; the record puts all others together as "other"."""


class Averages:
    """Sums since the last record, on the device without host synchronisation.

    The losses of a step are added when it is known that the step was not skipped. A checkpoint contains the sums of all
    ranks, so that the next record of a resumed run is that of an uninterrupted one.
    """

    def __init__(self, device: torch.device, state: dict[str, Any] | None = None) -> None:
        """state: what `state()` returned. Another number of ranks divides its sums among them."""
        self.sums = torch.zeros(len(NOISE_BINS), 2, dtype=torch.float64, device=device)  # loss, number of samples
        self.steps = 0
        if state is not None:
            saved = torch.tensor(state["loss_sums"], dtype=torch.float64, device=device)  # (ranks, bins, 2)
            ranks = dist.get_world_size()
            self.sums = saved[dist.get_rank()] if len(saved) == ranks else saved.sum(dim=0) / ranks
            self.steps = state["steps"]
        self.new_steps = 0  # in this process: what its speed is measured on
        self._edges = torch.tensor(NOISE_EDGES, device=device)
        self._bins = torch.arange(len(NOISE_BINS), device=device)
        self._of_step = torch.zeros_like(self.sums)

    def add(self, losses: Tensor, noise_levels: Tensor) -> None:
        """Add a micro-batch to the step in progress: losses (B,), and noise levels sigma (B,) in [0, 1]."""
        bins = torch.bucketize(noise_levels.to(self._edges), self._edges)  # (B,)
        in_bin = (bins[:, None] == self._bins).double()  # (B, bins)
        losses = losses.detach().double()
        self._of_step += in_bin.T @ torch.stack([losses, torch.ones_like(losses)], dim=1)  # (bins, 2)

    def end_step(self, *, skipped: bool) -> None:
        """Keep the losses of the step in progress, or forget those of a step that was skipped."""
        self.new_steps += 1
        if not skipped:
            self.sums += self._of_step
            self.steps += 1
        self._of_step = torch.zeros_like(self.sums)

    def state(self) -> dict[str, Any]:
        """The sums of all ranks. All ranks call it."""
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, self.sums.tolist())
        return {"loss_sums": sums, "steps": self.steps}

    def gather(self, seconds: Mapping[Phase, float], memory: float) -> Gathered:
        """The averages over all ranks. All ranks call it: seconds by phase and peak memory of this one."""
        others = sum(value for phase, value in seconds.items() if phase not in TRAINING)
        own = torch.tensor([*(seconds[phase] for phase in TRAINING), others, memory], dtype=torch.float64)
        own = torch.cat([self.sums.flatten(), own.to(self.sums.device)])
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        table = torch.stack(rows).cpu()  # (ranks, columns)
        sums = table[:, : self.sums.numel()].sum(dim=0).reshape(-1, 2)  # (bins, 2)
        return Gathered(sums, table[:, self.sums.numel() : -1], table[:, -1].max().item(), seconds)


class Gathered(NamedTuple):
    """Sums (bins, 2) of all ranks; seconds (ranks, 5) in the phases of TRAINING and in others; the largest peak memory;
    seconds by phase of this rank."""

    sums: Tensor
    times: Tensor
    memory: float
    seconds: Mapping[Phase, float]

    def losses(self) -> dict[str, float]:
        """The mean loss, and that of each noise level that occurred; {} if all steps were skipped."""
        total, count = self.sums.sum(dim=0).tolist()
        if not count:
            return {}
        bins = {
            f"loss/noise_{name}": loss / number
            for name, (loss, number) in zip(NOISE_BINS, self.sums.tolist())
            if number
        }
        return {"loss": total / count, **bins}

    def training_seconds(self) -> float:
        """The time of this rank in TRAINING: without records, validation, preview grids and checkpoints."""
        return sum(self.seconds[phase] for phase in TRAINING)

    def time_shares(self) -> dict[str, float]:
        """Shares of this rank's time, which add up to 1."""
        total = sum(self.seconds.values()) or 1.0
        shares = {f"time/{phase}": self.seconds[phase] / total for phase in TRAINING}
        return {**shares, "time/other": max(0.0, 1 - sum(shares.values()))}

    def slowest_rank(self) -> dict[str, float]:
        """The rank that needs longest for data and forward pass, and how much longer than the mean, as a share of the
        whole time: in the backward pass the others wait for it. {} for one rank."""
        if len(self.times) == 1:
            return {}
        busy = self.times[:, :2].sum(dim=1)  # (ranks,)
        lag = (busy.max() - busy.mean()) / self.times.sum(dim=1).mean()
        return {"slowest_rank": int(busy.argmax()), "slowest_rank_lag": lag.item()}
