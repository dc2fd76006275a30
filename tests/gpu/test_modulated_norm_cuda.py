"""The modulated norm on a GPU: values and every gradient against a formula in float64."""

from __future__ import annotations

import pytest
import torch

from fastimagen import ops
from tests.gpu.comparison import DTYPES, Inputs, assert_right, normal
from tests.kernels.modulated_norm_cases import by_definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 256, 768), (2, 1025, 1280), (3, 7, 96), (1, 1, 8192)], ids=str)
def test_modulated_norm(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    batch, _, channels = shape
    vectors: Inputs = {name: normal(batch, channels, seed=seed) for seed, name in enumerate(("scale", "shift"), 1)}
    assert_right(ops.modulated_norm, by_definition, {"x": normal(*shape), **vectors}, dtype)
