"""The kernels of dynamic_threshold, run in Triton's interpreter by test_dynamic_threshold.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.threshold_cases import CASES, PERCENTILES, assert_thresholded, digit_boundaries

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("name", CASES)
def test_quantile_is_exact(name: str, percentile: float) -> None:
    assert_thresholded(CASES[name](), percentile)


def test_every_rank_and_every_midpoint_to_the_last_bit() -> None:
    x = digit_boundaries()
    ordered = x.abs().double().sort().values[0]  # (17,)
    for position in range(33):
        low, high = ordered[position // 2], ordered[(position + 1) // 2]
        s = ((low + high) / 2).float()  # half of the sum of neighbours is rounded once
        y = ops.dynamic_threshold(x, position / 32, floor=0.5)
        assert torch.equal(y, x.clamp(-s, s) / s), position


def test_ceiling_limits_the_threshold() -> None:
    for name in ("normal", "huge range", "zeros"):
        assert_thresholded(CASES[name](), 0.9, floor=0.25, ceiling=1.5)
    x = torch.tensor([[torch.inf, -torch.inf, 1.0], [torch.nan, 5.0, 1.0]])
    y = ops.dynamic_threshold(x, 0.9, ceiling=2.0)
    assert y[0].tolist() == [1, -1, 0.5] and y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    assert_thresholded(CASES["normal"]().to(dtype), 0.9)


def test_several_programs_per_image_in_any_layout() -> None:
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2  # 6912 numbers: two programs
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:1].expand(2, -1, -1, -1)):
        assert_thresholded(given, 0.995)
    last = ops.dynamic_threshold(x.contiguous(memory_format=torch.channels_last), 0.995)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_result_is_bitwise_reproducible() -> None:
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2
    first = ops.dynamic_threshold(x, 0.9)
    assert all(torch.equal(ops.dynamic_threshold(x, 0.9), first) for _ in range(3))


def test_inf_is_clamped_and_nan_spreads_over_its_image() -> None:
    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(2))
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[1, 0, 0, 1] = torch.nan, torch.inf, -torch.inf
    y: Tensor = ops.dynamic_threshold(x, 0.5)
    assert y[0].isnan().all() and y[1].isfinite().all() and y[1, 0, 0, :2].tolist() == [1, -1]
    assert_thresholded(x[2:], 0.5)
    all_infinite = ops.dynamic_threshold(torch.tensor([[torch.inf, -torch.inf, 1.0]]), 0.9)
    assert all_infinite[0, :2].isnan().all() and all_infinite[0, 2] == 0
