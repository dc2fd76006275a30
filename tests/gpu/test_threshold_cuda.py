"""Dynamic thresholding on a GPU against order statistics in float64."""

from __future__ import annotations

import pytest
import torch

from fastimagen import ops
from tests.gpu.comparison import normal, threshold_formula

THRESHOLD = {
    "64x64": lambda: 2 * normal(5, 3, 64, 64),
    "one value": lambda: 3 * normal(2, 1, 1, 1),
    "ties": lambda: (2 * normal(4, 3, 33, 17)).round(),
    "constant": lambda: torch.full((2, 3, 16, 16), -4.0).cuda(),
    "zeros": lambda: torch.zeros(2, 3, 8, 8).cuda(),
    "small": lambda: 0.1 * normal(3, 3, 32, 32),
    "two values": lambda: torch.where(normal(2, 3, 64, 64) > 1.5, 9.0, 0.5),
    "huge range": lambda: normal(2, 3, 40, 40).exp() ** 8,
    "1024x1024": lambda: 2 * normal(1, 3, 1024, 1024),
    "beyond 2^24 values": lambda: 2 * normal(1, 3, 2400, 2400),
    "channels_last": lambda: (2 * normal(3, 3, 48, 40)).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("percentile", [0.0, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("case", THRESHOLD)
def test_threshold(case: str, percentile: float, backend: str) -> None:
    x0 = THRESHOLD[case]()
    torch.testing.assert_close(
        ops.dynamic_threshold(x0, percentile).double(), threshold_formula(x0, percentile), rtol=1e-6, atol=1e-6
    )
