"""Dynamic thresholding (Imagen, section 2.3). Letters: B batch, C channels, H height, W width."""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_threshold(x0: Tensor, percentile: float, *, floor: float = 1.0) -> Tensor:
    """Dynamic thresholding (Imagen, section 2.3): s = max(quantile(|x0|, p), floor) per sample; clamp(x0, -s, s) / s.

    x0 (B, ...); the quantile interpolates linearly. Returns x0's shape and dtype.
    """
    magnitude = x0.float().abs().flatten(1)  # (B, C * H * W)
    s = torch.quantile(magnitude, percentile, dim=1).clamp(min=floor)
    s = s.to(x0.dtype).reshape(-1, *(1,) * (x0.dim() - 1))
    return x0.clamp(-s, s) / s
