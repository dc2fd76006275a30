"""Samples that selection gets wrong first, and the definition of dynamic thresholding in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastimagen import ops

PERCENTILES = [0.0, 0.5, 0.9, 0.995, 1.0]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: _random(3, 3, 9, 7) * 2,
    "ties": lambda: (_random(2, 1, 8, 8) * 2).round(),
    "constant": lambda: torch.full((2, 1, 4, 4), -1.5),
    "two values": lambda: torch.where(_random(2, 1, 5, 5) > 0, 3.0, -1.25),
    "zeros": lambda: torch.zeros(1, 1, 3, 3),
    "denormals": lambda: _random(1, 1, 6, 6) * 1e-41,
    "huge": lambda: _random(1, 1, 6, 6) * 1e37,
    "huge range": lambda: torch.pow(10.0, _random(1, 1, 6, 6) * 15),
    "one element": lambda: torch.tensor([[2.5], [-0.5]]),
    "two elements": lambda: torch.tensor([[2.5, -4.0]]),
    "neighbouring digits": lambda: torch.tensor(
        [[1.0, 2.0, 4.0, 8.0, 1.0 + 2**-23, 2.0 - 2**-22, 1.5, 3.0, 2**10, 6.0]]
    ),
    "close together": lambda: torch.cat([1.5 + torch.arange(58) * 2.0**-20, torch.full((4,), 100.0)])[None],
    "bf16 grid": lambda: (_random(2, 3, 6, 6) * 3).bfloat16().float(),
}


def by_definition(x: Tensor, percentile: float, floor: float) -> Tensor:
    """In float64, with NumPy's quantile: an implementation that shares nothing with ours."""
    wide = x.double()
    s = torch.from_numpy(np.quantile(wide.abs().flatten(1).numpy(), percentile, axis=1)).clamp(min=floor)
    s = s.reshape(-1, *(1,) * (x.dim() - 1))
    return wide.clamp(-s, s) / s


def assert_thresholded(x: Tensor, percentile: float, floor: float = 1.0) -> None:
    y = ops.dynamic_threshold(x, percentile, floor=floor)
    assert y.dtype == x.dtype and y.shape == x.shape
    atol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[x.dtype]
    torch.testing.assert_close(y.double(), by_definition(x, percentile, floor), rtol=0, atol=atol)
