"""GroupNorm, FiLM and SiLU on a GPU: values and every gradient, by each backend, against a formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.gpu.comparison import DTYPES, Inputs, assert_reproducible, assert_right, is_real, normal


def group_norm_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(dim=2, keepdim=True)
    y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if activation == "gelu":
        return y * (1 + (y / 2**0.5).erf()) / 2
    return y * torch.sigmoid(y) if activation == "silu" else y


GROUP_NORM = {  # B, C, H, W, G, FiLM
    "one pixel": (2, 32, 1, 1, 8, True),
    "8x8": (3, 1536, 8, 8, 8, True),
    "16x16": (2, 256, 16, 16, 8, False),
    "odd": (3, 24, 7, 13, 3, True),
    "a channel each": (2, 10, 5, 6, 10, True),
    "one group": (2, 30, 9, 9, 1, True),
    "64x64": (2, 128, 64, 64, 8, True),
    "256x256": (1, 64, 256, 256, 8, False),
    "37 channels": (1, 37, 33, 17, 1, True),
    "32 groups": (4, 320, 32, 32, 32, True),
    "wide": (2, 3584, 8, 8, 8, True),
    "long": (1, 8, 3, 1000, 4, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", GROUP_NORM)
def test_group_norm(case: str, layout: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    batch, channels, height, width, groups, film = GROUP_NORM[case]
    inputs: Inputs = {
        "x": (3 * normal(batch, channels, height, width) + 2).contiguous(memory_format=layout),
        "weight": normal(channels, seed=1),
        "bias": normal(channels, seed=2),
        "num_groups": groups,
        "activation": "gelu" if groups == 32 else "silu",  # DeepFloyd IF has both
    }
    if film:
        inputs |= {"scale": normal(batch, channels, seed=3), "shift": normal(batch, channels, seed=4)}
    assert_right(ops.group_norm_silu, group_norm_formula, inputs, dtype)
    y = ops.group_norm_silu(**{name: x.to(dtype) if is_real(x) else x for name, x in inputs.items()})
    assert y.is_contiguous(memory_format=layout)


def joined_formula(
    x: Tensor,
    film_bias: Tensor,
    x_bias: Tensor,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
    **vectors: Any,
) -> Tensor:
    """Of x with the bias of its convolution, and behind it the scaled skip; FiLM with the bias of its linear layer."""
    scale_bias, shift_bias = film_bias.chunk(2)
    vectors |= {"scale": vectors["scale"] + scale_bias, "shift": vectors["shift"] + shift_bias}
    x = x + x_bias[:, None, None]
    return group_norm_formula(x if skip is None else torch.cat([x, skip_scale * skip], dim=1), **vectors)


def with_residual(normalized: Callable[..., tuple[Tensor, Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    """One tensor of all results, so that a gradient arrives at each."""

    def op(**given: Any) -> Tensor:
        return torch.cat([x for x in normalized(**given) if x is not None], dim=1)

    return op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("shape", "skip_channels"),
    [((2, 256, 16, 16), 0), ((2, 256, 16, 16), 128), ((3, 128, 64, 64), 128), ((2, 24, 7, 13), 8)],
    ids=str,
)
def test_group_norm_with_biases_skip_and_residual(
    shape: tuple[int, ...],
    skip_channels: int,
    residual: bool,
    layout: torch.memory_format,
    dtype: torch.dtype,
    backend: str,
) -> None:
    batch, channels, height, width = shape
    total = channels + skip_channels
    inputs: Inputs = {
        "x": normal(*shape).contiguous(memory_format=layout),
        "x_bias": normal(channels, seed=1),
        "weight": normal(total, seed=2),
        "bias": normal(total, seed=3),
        "scale": normal(batch, total, seed=4),
        "shift": normal(batch, total, seed=5),
        "film_bias": normal(2 * total, seed=7),
        "num_groups": 8,
    }
    if skip_channels:
        inputs["skip"] = normal(batch, skip_channels, height, width, seed=6).contiguous(memory_format=layout)
        inputs["skip_scale"] = 2**-0.5
    if not residual:
        assert_right(ops.group_norm_silu, joined_formula, inputs, dtype)
        return

    def formula(**given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return joined_formula(**given), given["x"], given.get("skip")

    assert_right(with_residual(ops.group_norm_silu_residual), with_residual(formula), inputs, dtype)


def test_outputs_and_gradients_are_bitwise_reproducible() -> None:
    ops.set_backend("triton")
    inputs: Inputs = {
        "x": normal(4, 256, 40, 40).contiguous(memory_format=torch.channels_last),
        "weight": normal(256),
        "bias": normal(256, seed=2),
        "num_groups": 8,
        "scale": normal(4, 256, seed=3),
        "shift": normal(4, 256, seed=4),
    }
    assert_reproducible(ops.group_norm_silu, inputs)
