"""The end of a residual block on a GPU: values and every gradient against a formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.gpu.comparison import DTYPES, Inputs, assert_right, normal


def residual_formula(h: Tensor, residual: Tensor, bias: Tensor, more_bias: Tensor | None = None) -> Tensor:
    h = h + residual + bias[:, None, None]
    return h if more_bias is None else h + more_bias[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("more_bias", [False, True], ids=["one bias", "two biases"])
@pytest.mark.parametrize("shape", [(2, 256, 16, 16), (3, 24, 7, 13), (1, 64, 256, 256), (2, 1, 1, 1)], ids=str)
def test_add_residual(
    shape: tuple[int, ...], more_bias: bool, layout: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    inputs: Inputs = {
        "h": normal(*shape).contiguous(memory_format=layout),
        "residual": normal(*shape, seed=1).contiguous(memory_format=layout),
        "bias": normal(shape[1], seed=2),
    }
    if more_bias:
        inputs["more_bias"] = normal(shape[1], seed=3)
    assert_right(ops.add_residual, residual_formula, inputs, dtype)
