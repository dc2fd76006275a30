"""Whole U-Nets with all kernels in Triton's interpreter, against float64. test_networks.py runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from fastimagen.network_config import UNetConfig
from fastimagen.networks.unet import UNet
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import TOY_UNET

pytestmark = pytest.mark.usefixtures("interpreter")

SHALLOW = dict(dim=8, groups=4, num_blocks=1, head_dim=16, zero_init=False)
VARIANTS = {
    "regular": {},  # skips of other widths than x: 16 and 8 channels in 4 groups of 6
    "efficient": dict(lowres=True, downsample_first=True, full_resolution="extra_block", self_attention=False),
}


def outputs(unet: UNet, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of all parameters and of x."""
    generator = torch.Generator().manual_seed(2)
    x, lowres, dy = torch.randn(3, 2, 3, 8, 8, generator=generator).to(dtype).unbind()
    embeds = torch.randn(2, 3, 64, generator=generator).to(dtype)
    text = TextEmbeddings(embeds, torch.arange(3) < torch.tensor([[3], [1]]))
    low = dict(lowres=lowres, lowres_time=torch.tensor([20.0, 700.0])) if unet.config.lowres else {}
    x.requires_grad_()
    out = unet(x, torch.tensor([3.0, 500.0]), text=text, **low)
    out.backward(dy)
    grads = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **grads}


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_all_gradients_equal_plain_pytorch_in_float64(name: str) -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**{**TOY_UNET, **SHALLOW, **VARIANTS[name]}))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = outputs(unet, torch.float32)
    unet.zero_grad()
    unet.double()
    ops.set_backend("torch")
    expected = outputs(unet, torch.float64)
    assert found.keys() == expected.keys() and len(found) > 100
    largest = max(value.norm() for value in expected.values())
    errors = {
        key: float((found[key].double() - value).norm() / torch.maximum(value.norm(), 1e-4 * largest))
        for key, value in expected.items()
    }
    assert {key: error for key, error in errors.items() if not error < 1e-4} == {}
