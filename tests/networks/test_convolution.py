"""Conv2d against PyTorch's convolution in float64: the implementations for training on a CPU, and the default one."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastimagen.networks import convolution
from fastimagen.networks.convolution import MANY_CHANNELS, Conv2d

CASES = {
    "default": (3, 4, 3),
    "1x1": (MANY_CHANNELS, MANY_CHANNELS, 1),
    "wide kernel": (3, 4, 9),
    "wider kernel": (3, 4, 15),
    "many channels": (MANY_CHANNELS, MANY_CHANNELS + 1, 3),
    "many channels, even kernel": (MANY_CHANNELS + 1, MANY_CHANNELS, 4),
}


def reference(layer: Conv2d, x: Tensor) -> Tensor:
    weight = rearrange(layer.weight, "o (h w i) -> o i h w", h=layer.kernel, w=layer.kernel)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("elements", [1, 20_000, 100_000, 1 << 20], ids="{}-elements".format)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_pytorchs(
    case: str, stride: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes give products over one row, several rows with a remainder, one image, and all images."""
    monkeypatch.setattr(convolution, "IM2COL_ELEMENTS", elements)
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, stride=stride, padding=(kernel - 1) // 2).double()
    x = torch.randn(3, dim_in, 7, 10, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    leaves = (x, layer.weight, layer.bias)
    expected, found = reference(layer, x), layer(x)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["wide kernel", "many channels"])
def test_layouts_and_frozen_parameters(case: str) -> None:
    """Contiguous inputs, expanded gradients, and layers with a frozen weight or bias."""
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2).double()
    x = torch.randn(2, dim_in, 8, 8, dtype=torch.float64)
    for frozen in (layer.weight, layer.bias):
        layer.requires_grad_(True)
        frozen.requires_grad_(False)
        trainable = [leaf for leaf in layer.parameters() if leaf.requires_grad]
        found = torch.autograd.grad(layer(x).sum(), trainable)  # the gradient of sum is an expanded scalar
        for one, other in zip(found, torch.autograd.grad(reference(layer, x).sum(), trainable)):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", ["default", "wide kernel", "many channels"])
def test_autocast_runs_in_bfloat16_with_fp32_gradients(case: str) -> None:
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2)
    x = torch.randn(2, dim_in, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    found = layer.weight.grad.clone()
    expected = torch.autograd.grad(reference(layer, x).square().sum(), layer.weight)[0]
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_bias_can_be_left_out(case: str) -> None:
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2).double()
    x = torch.randn(2, dim_in, 8, 8, dtype=torch.float64)
    with_bias, without = layer(x), layer(x, add_bias=False)
    torch.testing.assert_close(without + layer.bias[:, None, None], with_bias, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(without.sum(), layer.bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("case", ["default", "1x1", "many channels"])
def test_memory_of_the_weight_is_free_between_forward_and_backward(case: str, checkpointed: bool) -> None:
    """As under ZeRO-3, which then gives the memory to other tensors and gathers the weight again for the backward pass.
    A view of the weight that autograd saved would read the old memory."""
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2).double()
    layer.weight.ds_id = 0  # DeepSpeed marks the parameters that it partitions
    x = torch.randn(2, dim_in, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(reference(layer, x).square().sum(), (x, layer.weight))
    out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    gathered, copy = layer.weight.data, layer.weight.data.clone()
    layer.weight.data = torch.empty(0, dtype=torch.float64)
    gathered.fill_(torch.nan)
    layer.weight.data = copy
    for one, other in zip(torch.autograd.grad(out.square().sum(), (x, layer.weight)), expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", ["default", "many channels"])
def test_compiles_into_one_graph(case: str) -> None:
    dim_in, dim_out, kernel = CASES[case]
    layer = Conv2d(dim_in, dim_out, kernel, padding=kernel // 2).double()
    x = torch.randn(2, dim_in, 8, 8, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(reference(layer, x).square().sum(), (x, *layer.parameters()))
    for one, other in zip(torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters())), expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
