"""Few-step distillation: what the student is trained to predict.

The student samples with DDIM in `steps` steps. Each is a segment of the teacher's time grid, of `substeps` DDIM steps.
A sample starts inside a segment, at time t with x_t, and its target leads to the segment's end q: it is the x0 with
which one DDIM step from t to q arrives where several steps arrive. With rho = alpha / sigma, a DDIM step from t to s
with x0 adds (rho_s - rho_t) x0 to x / sigma. So the x0 of one long step is the mean of the x0s of the short ones,
weighted by their shares of rho_q - rho_t: nothing is divided by a small difference, and the target stays within [-1, 1]
if they do.

progressive (after Salimans and Ho 2022): t is the start of a segment, and the teacher takes all steps to its end.
consistency (multistep consistency distillation, Heek et al. 2024): t is any time of the grid; the teacher takes one
step, and the student itself, without a gradient, the rest of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .process import expand
from .schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""predict(x_t, time) -> x0, for x_t (B, C, H, W) and time (B,)."""

MAX_SNR_WEIGHT = 5.0  # the largest loss weight; min-SNR-gamma (Hang et al. 2023) has the same number


class Segments(NamedTuple):
    """The steps of a student on its teacher's time grid."""

    schedule: Schedule
    times: Tensor
    """(steps * substeps + 1,) float64, descending from the noisiest to -1, the clean image."""
    substeps: int

    @classmethod
    def of(cls, schedule: Schedule, steps: int, substeps: int, device: torch.device | str = "cpu") -> Segments:
        """Raises ValueError if a discrete schedule has fewer timesteps than that."""
        return cls(schedule, schedule.sampling_times(steps * substeps).to(device), substeps)

    def start(self, uniform: Tensor, *, inside: bool) -> Tensor:
        """Indices (B,) into `times` from uniform numbers (B,) in [0, 1): of any time but the last if `inside`, else of
        the starts of segments."""
        spacing = 1 if inside else self.substeps
        count = (len(self.times) - 1) // spacing
        return (uniform * count).long().clamp_(max=count - 1) * spacing

    def target(self, start: Tensor, x: Tensor, teacher: Predict, student: Predict | None = None) -> Tensor:
        """The x0 (B, C, H, W) that leads from x at times[start] (B,) to the end of its segment in one DDIM step.

        Without a student the teacher takes all steps, and start must be that of a segment. With one, the teacher takes
        a single step.
        """
        end = (start // self.substeps + 1) * self.substeps  # (B,)
        target = torch.zeros_like(x)
        for offset in range(self.substeps if student is None else 1):
            now, then = start + offset, start + offset + 1
            x0 = teacher(x, self.times[now])
            target += expand(self._share(start, now, then, end), x) * x0
            x = self._ddim(x, x0, now, then)
        if student is not None:
            now = torch.where(start + 1 < end, start + 1, start)  # nothing is left: any valid time, with a share of 0
            share = torch.where(start + 1 < end, self._share(start, now, end, end), 0)
            target += expand(share, x) * student(x, self.times[now])
        return target

    def weight(self, start: Tensor) -> Tensor:
        """Loss weight (B,) of x0's error, float64: the signal-to-noise ratio at the start within [1, MAX_SNR_WEIGHT]
        (Salimans and Ho 2022, section 4, truncated SNR)."""
        return self._rho(start).square().clamp(1, MAX_SNR_WEIGHT)

    def _rho(self, index: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(self.times[index])
        return alpha / sigma  # infinite for the clean image

    def _share(self, start: Tensor, now: Tensor, then: Tensor, end: Tensor) -> Tensor:
        """The share (B,) of the step from now to then in the way from start to end."""
        first, a, b, last = (self._rho(index) for index in (start, now, then, end))
        return torch.where(last.isinf(), b.isinf().to(a), (b - a) / (last - first))

    def _ddim(self, x: Tensor, x0: Tensor, now: Tensor, then: Tensor) -> Tensor:
        (alpha, sigma), (alpha_next, sigma_next) = (
            self.schedule.alpha_sigma(self.times[index]) for index in (now, then)
        )
        ratio = sigma_next / sigma
        return expand(ratio, x) * x + expand(alpha_next - ratio * alpha, x) * x0
