"""Inputs of modulated_norm, its results with gradients, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, *, offset: float = 0.0) -> dict[str, Tensor]:
    """x around `offset`, dy, and scale and shift as parts of one tensor, as in a transformer block."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    film = torch.randn(shape[0], 3 * shape[2], generator=generator).to(dtype)  # (B, 3 C)
    _, scale, shift = film.chunk(3, dim=1)
    return {"x": (x + offset).to(dtype), "dy": dy.to(dtype), "scale": scale, "shift": shift}


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "dy"}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def by_definition(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    xhat = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return xhat * (1 + scale[:, None]) + shift[:, None]


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return results(by_definition, {name: tensor.double() for name, tensor in tensors.items()})
