"""Inputs of group_norm_silu, its operator, and its definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("y", "dx", "dweight", "dbias", "dscale", "dshift")


def inputs(
    shape: tuple[int, ...],
    *,
    film: bool = True,
    last: bool = False,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    vectors: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """dy, x, weight, bias and, with film, scale and shift, which are halves of one tensor, as of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]
    dy, x = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x = (x + mean).to(dtype)
    if last:
        dy, x = dy.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=generator).to(vectors or dtype).unbind()
    both = torch.randn(batch, 2 * channels, generator=generator).to(dtype)
    return [dy, x, weight, bias, *(both.chunk(2, dim=1) if film else ())]


def results(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    groups: int,
    activation: str = "silu",
) -> dict[str, Tensor]:
    """y and every gradient."""
    dy, *leaves = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    film = dict(zip(("scale", "shift"), leaves[3:]))
    y = function(*leaves[:3], groups, activation=activation, **film)
    return dict(zip(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, dy)]))


def operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The registered operator, which ops.group_norm_silu calls on a GPU."""
    return torch.ops.fastimagen.group_norm_silu(x, weight, bias, scale, shift, groups, 1e-5, activation)[0]


def by_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """group_norm_silu written out."""
    grouped = x.unflatten(1, (groups, -1))  # (B, G, C / G, H, W)
    centred = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    y = (centred / (centred.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)  # (B, C, H, W)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if activation == "gelu":
        return y * (1 + (y / 2**0.5).erf()) / 2
    return y * y.sigmoid() if activation == "silu" else y


def exact(tensors: list[Tensor], groups: int, activation: str = "silu") -> dict[str, Tensor]:
    """The results of the definition in float64."""
    return results(by_definition, [tensor.double() for tensor in tensors], groups, activation)


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to its largest magnitude."""
    assert got.keys() == true.keys()
    return {name: ((got[name].double() - true[name]).abs().max() / true[name].abs().max()).item() for name in true}


def assert_close(got: dict[str, Tensor], true: dict[str, Tensor], limit: float = 5e-6) -> None:
    wrong = {name: error for name, error in errors(got, true).items() if not error <= limit}
    assert not wrong, wrong
