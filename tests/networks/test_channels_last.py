"""The U-Net's feature maps are channels_last from the stem to the last convolution, forward and backward."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastimagen.network_config import UNetConfig
from fastimagen.networks.unet import UNet
from fastimagen.ops import group_norm
from fastimagen.text.embeddings import TextEmbeddings

MAX_IMAGE_CHANNELS = 12  # inputs and outputs may be contiguous; feature maps have more channels in these networks
ASPECT = 3  # width / height of all images; distinguishes feature maps from other tensors of four dimensions
READERS = {
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
}  # these copy an input that is not channels_last


def is_map(value: Any) -> bool:
    """Whether this is a feature map of a batch. The positional encoding, computed once for all samples, is not."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.is_floating_point()
        and len(value) > 1
        and value.shape[1] > MAX_IMAGE_CHANNELS
        and value.shape[3] == ASPECT * value.shape[2]
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the strides of channels, columns and rows ascend in this order, as also in a slice of such a tensor."""
    strides = [x.stride(axis) for axis in (1, 3, 2) if x.shape[axis] > 1]
    return strides[0] == 1 and strides == sorted(strides)


class LayoutTrace(TorchDispatchMode):
    """Records every operation that creates a feature map in another layout, or that copies one to read it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.maps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(result.alias_info is not None for result in func._schema.returns)
        made = [] if view else [value for value in tree_leaves(out) if is_map(value)]
        read = [value for value in args if is_map(value)] if func.overloadpacket in READERS else []
        self.maps += len(made)
        for verb, maps in (("makes", made), ("reads", read)):
            self.found += [
                f"{func.overloadpacket} {verb} {tuple(x.shape)} with strides {x.stride()} in {where()}"
                for x in maps
                if not is_channels_last(x)
            ]
        return out


def where() -> str:
    """The node of the backward pass, or the line of fastimagen, that runs the current operation."""
    node = torch._C._current_autograd_node()
    if node is not None:
        return node.name()
    frames = [frame for frame in traceback.extract_stack() if "/fastimagen/" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "this test"


def step(unet: UNet) -> None:
    """One training step, forward and backward."""
    height, width = 8, 8 * ASPECT
    x, lowres, target = torch.randn(3, 2, 3, height, width).unbind()
    time = torch.tensor([10.0, 500.0])
    text = TextEmbeddings(torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[3], [5]]))
    low = dict(lowres=lowres, lowres_time=time) if unet.config.lowres else {}
    loss = (unet(x, time, text=text, keep_text=torch.tensor([True, False]), **low) - target).square().mean()
    loss.backward()


BASE = dict(
    dim=16,
    dim_mults=(1, 2),
    heads=1,
    head_dim=16,
    text_dim=32,
    cond_dim=16,
    groups=4,
    zero_init=False,
    middle_attention=True,
    positional_encoding=True,
    stem_stride=2,
)
SUPER = dict(
    BASE,
    lowres=True,
    positional_encoding=False,
    stem_stride=1,
    downsample_first=True,
    cross_attention=(False, True),
    self_attention=(False, True),
)


@pytest.mark.parametrize("norms", ["reference", "operator"])
@pytest.mark.parametrize(
    "config",
    [BASE, dict(SUPER, stem_kernels=(3,)), dict(SUPER, full_resolution="extra_block")],
    ids=["base", "super-resolution", "extra_block"],
)
def test_training_step_never_copies_a_feature_map_to_another_layout(
    config: dict[str, Any], norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if norms == "operator":  # as on a GPU
        monkeypatch.setattr(group_norm, "use_triton", lambda *unused: True)
    unet = UNet(UNetConfig(**config))
    with LayoutTrace() as trace:
        step(unet)
    assert trace.maps > 100
    assert trace.found == []
    for name, parameter in unet.named_parameters():
        assert parameter.is_contiguous() and (parameter.grad is None or parameter.grad.is_contiguous()), name


def test_layout_trace_records_hidden_copies() -> None:
    x, weight, loss = (
        torch.randn(16, 16, height, width).to(memory_format=torch.channels_last).requires_grad_()
        for height, width in ((2, 6), (1, 1), (2, 6))
    )
    with LayoutTrace() as trace:
        (torch.conv2d(x, weight) * loss).sum().backward()
        assert trace.found == []
        torch.conv2d(x.contiguous(), weight)
        assert [line.split()[0] for line in trace.found][:2] == ["aten.clone", "aten.convolution"]
        trace.found.clear()
        (torch.conv2d(x, weight) * loss.detach().contiguous()).sum().backward()
        assert "aten.convolution_backward reads" in " ".join(trace.found)
        trace.found.clear()
        torch.conv2d(x, weight).sum().backward()  # the gradient of sum is an expanded scalar
        assert "aten.convolution_backward reads" in " ".join(trace.found)
