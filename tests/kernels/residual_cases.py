"""Inputs of add_residual, its results with gradients, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, two: bool, last: bool) -> dict[str, Tensor]:
    """h, residual, dy and one or two biases."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    maps = {
        name: torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        for name in ("h", "residual", "dy")
    }
    names = ("bias", "more_bias") if two else ("bias",)
    return maps | {name: torch.randn(shape[1], generator=generator).to(dtype) for name in names}


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """out and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "dy"}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["dy"].to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def by_definition(h: Tensor, residual: Tensor, bias: Tensor, more_bias: Tensor | None = None) -> Tensor:
    out = h + residual + bias[None, :, None, None]
    return out if more_bias is None else out + more_bias[None, :, None, None]


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return results(by_definition, {name: tensor.double() for name, tensor in tensors.items()})
