"""The convolution against PyTorch's own in float64, on the detours that a training CPU takes and beside them."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fastimagen.networks import convolution
from fastimagen.networks.convolution import MANY_CHANNELS, Conv2d

WAYS = {
    "plain": (3, 4, 3),
    "one pixel": (MANY_CHANNELS, MANY_CHANNELS, 1),
    "wide": (3, 4, 9),
    "wider": (3, 4, 15),
    "many channels": (MANY_CHANNELS, MANY_CHANNELS + 1, 3),
    "many channels, even kernel": (MANY_CHANNELS + 1, MANY_CHANNELS, 4),
}


def plain(layer: Conv2d, x: Tensor) -> Tensor:
    weight = rearrange(layer.weight, "o (h w i) -> o i h w", h=layer.kernel, w=layer.kernel)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("columns", [1, 20_000, 100_000, 1 << 20], ids="{}-numbers".format)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_pytorchs(
    way: str, stride: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row, of several rows with a rest, of one image and of all."""
    monkeypatch.setattr(convolution, "IM2COL_ELEMENTS", columns)
    dim_in, dim_out, kernel = WAYS[way]
    layer = Conv2d(dim_in, dim_out, kernel, stride=stride, padding=(kernel - 1) // 2).double()
    x = torch.randn(3, dim_in, 7, 10, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    leaves = (x, layer.weight, layer.bias)
    expected, found = plain(layer, x), layer(x)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["wide", "many channels"])
def test_layouts_and_frozen_parts(way: str) -> None:
    """Contiguous images and gradients, expanded gradients, and a layer of which only some learns."""
    dim_in, dim_out, kernel = WAYS[way]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2).double()
    x = torch.randn(2, dim_in, 8, 8, dtype=torch.float64)
    for frozen in (layer.weight, layer.bias):
        layer.requires_grad_(True)
        frozen.requires_grad_(False)
        learning = [leaf for leaf in layer.parameters() if leaf.requires_grad]
        found = torch.autograd.grad(layer(x).sum(), learning)  # sum's gradient is an expanded 1
        for one, other in zip(found, torch.autograd.grad(plain(layer, x).sum(), learning)):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", ["wide", "many channels"])
def test_mixed_precision_is_autocasts(way: str) -> None:
    dim_in, dim_out, kernel = WAYS[way]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2)
    x = torch.randn(2, dim_in, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    found = layer.weight.grad.clone()
    expected = torch.autograd.grad(plain(layer, x).square().sum(), layer.weight)[0]
    assert (found - expected).norm() < 0.01 * expected.norm()
