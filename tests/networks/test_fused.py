"""Residual blocks as they run on a GPU, but on a CPU with plain PyTorch: biases, skips, shortcuts without copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen.networks import convolution
from fastimagen.networks.blocks import ResBlock
from fastimagen.networks.convolution import OutputConv, PointwiseConv
from tests.networks.test_unet import VARIANTS, captions, inputs, network

B, SCALE = 2, 0.7


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "in_kernels", lambda x: True)


def maps(channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, channels, 5, 4, dtype=dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def pointwise_by_hand(layer: PointwiseConv, x: Tensor, skip: Tensor | None, bias: Tensor | None) -> Tensor:
    both = x if skip is None else torch.cat([x, skip * SCALE], dim=1)
    return F.conv2d(both, layer.weight[:, :, None, None], bias)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("add_bias", [True, False])
@pytest.mark.parametrize("skip_channels", [0, 3])
def test_pointwise_convolution_and_its_gradients(skip_channels: int, add_bias: bool) -> None:
    layer = PointwiseConv(7 + skip_channels, 6).double()
    x, skip = maps(7), maps(skip_channels) if skip_channels else None
    leaves = [x, *([] if skip is None else [skip]), layer.weight, *([layer.bias] if add_bias else [])]
    found = layer(x, skip, skip_scale=SCALE, add_bias=add_bias)
    expected = pointwise_by_hand(layer, x, skip, layer.bias if add_bias else None)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for dy in (torch.randn_like(found), torch.ones(()).double().expand_as(found)):
        grads = (torch.autograd.grad(out, leaves, dy, retain_graph=True) for out in (found, expected))
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_pointwise_convolution_of_a_frozen_weight_and_of_frozen_inputs() -> None:
    layer, x, skip = PointwiseConv(10, 6).double(), maps(7), maps(3)
    layer.weight.requires_grad_(False)
    found = torch.autograd.grad(layer(x.detach(), skip, skip_scale=SCALE).sum(), [skip, layer.bias])
    expected = torch.autograd.grad(pointwise_by_hand(layer, x.detach(), skip, layer.bias).sum(), [skip, layer.bias])
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_pointwise_convolution_under_autocast() -> None:
    """In bf16 with fp32 gradients, as any convolution."""
    layer, x, skip = PointwiseConv(10, 6), maps(7, torch.float32), maps(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, skip, skip_scale=SCALE)
    assert out.dtype == torch.bfloat16
    leaves = [x, skip, layer.weight, layer.bias]
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    expected = torch.autograd.grad(pointwise_by_hand(layer, x, skip, layer.bias).square().sum(), leaves)
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()


def test_pointwise_convolution_does_not_keep_memory_of_its_weight() -> None:
    """As in test_convolution.py, for ZeRO-3."""
    layer, x, skip = PointwiseConv(10, 6).double(), maps(7), maps(3)
    expected = torch.autograd.grad(pointwise_by_hand(layer, x, skip, layer.bias).square().sum(), [x, skip])
    out = layer(x, skip, skip_scale=SCALE)
    gathered, copy = layer.weight.data, layer.weight.data.clone()
    layer.weight.data = torch.empty(0, dtype=torch.float64)
    gathered.fill_(torch.nan)
    layer.weight.data = copy
    for one, other in zip(torch.autograd.grad(out.square().sum(), [x, skip]), expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("as_on_gpu")
def test_output_convolution_and_its_gradients() -> None:
    layer, x, more = OutputConv(9, 4, zero_init=False).double(), maps(6), maps(3)
    weight = layer.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)  # (O, I + J, 3, 3)
    expected = F.conv2d(torch.cat([x, more], dim=1), weight, layer.bias, padding=1)
    found = layer(x, more)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, more, layer.weight, layer.bias]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["regular", "minimagen", "wider first level", "efficient", "extra_block"])
def test_whole_network_equals_the_formulation_for_cpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients; checkpointed too."""
    unet = network(**VARIANTS[name]).double().train()
    given, text = inputs(unet, torch.float64), captions(dtype=torch.float64)
    results = []
    for fused, levels in ((False, ()), (True, ()), (True, (0, 1))):
        monkeypatch.setattr(convolution, "in_kernels", lambda x, fused=fused: fused)
        unet.config = unet.config.model_copy(update={"checkpoint_levels": levels})
        out = unet(**given, text=text)
        grads = torch.autograd.grad(out.square().sum(), list(unet.parameters()), allow_unused=True)
        results.append([out, *(grad for grad in grads if grad is not None)])
    for other in results[1:]:
        assert len(results[0]) == len(other) > 50
        for one, two in zip(results[0], other):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_block_with_a_skip_compiles_into_one_graph() -> None:
    unet = network(cross_attention=False)
    block = unet.ups[0].blocks[0]
    assert isinstance(block, ResBlock) and block.shortcut is not None
    x, skip, vector = maps(16, torch.float32), maps(8, torch.float32), torch.randn(B, 32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaves = [x, skip, *block.parameters()]
    found, expected = (torch.autograd.grad(f(x, vector, None, skip).square().sum(), leaves) for f in (compiled, block))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("as_on_gpu")
def test_convolutions_of_a_block_get_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """GroupNorm and the residual sum add it."""
    unet, convolve, biases = network(cross_attention=False), convolution.convolve, []

    def record(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
        biases.append(bias)
        return convolve(x, weight, bias, kernel, stride, padding)

    monkeypatch.setattr(convolution, "convolve", record)
    unet.ups[0].blocks[0](maps(16, torch.float32), torch.randn(B, 32), None, maps(8, torch.float32))
    assert biases == [None, None]
