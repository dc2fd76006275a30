"""The two halves of a tensor, whose gradients need no copy if they are written side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import in_kernels, traced


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Views of the halves of x along `dim`, each of half its size there.

    The gradient of x is the concatenation of theirs. Where kernels run, and both lie in memory as the halves of one
    tensor, as the backward kernels of attention and GroupNorm write them, it is a view of that tensor. Raises
    ValueError for an odd size.
    """
    if x.shape[dim] % 2:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} has no halves")
    if in_kernels(x) and not traced():
        return Halves.apply(x, dim)
    first, second = x.chunk(2, dim)
    return first, second


class Halves(torch.autograd.Function):
    """`halves` where kernels run and nothing traces them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.dim = dim % x.dim()
        first, second = x.chunk(2, dim)
        return first, second

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        # With create_graph=True autograd must see the concatenation.
        whole = None if torch.is_grad_enabled() else _side_by_side(first, second, ctx.dim)
        return torch.cat([first, second], ctx.dim) if whole is None else whole, None


def _side_by_side(first: Tensor, second: Tensor, dim: int) -> Tensor | None:
    """The tensor of which these are the halves along `dim`; None if they do not lie in memory like that."""
    if first.dtype != second.dtype or first.stride() != second.stride():
        return None
    if first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return None
    if second.storage_offset() - first.storage_offset() != first.shape[dim] * first.stride(dim):
        return None
    shape = list(first.shape)
    shape[dim] *= 2
    return first.as_strided(shape, first.stride())
