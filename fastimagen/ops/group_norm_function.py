"""GroupNorm by the kernels outside torch.compile: an autograd function, which costs less host time than an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import stands_for_gpu
from .group_norm_op import rows
from .layout import dense, laid_as

Vectors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""weight, bias (C,), scale, shift (B, C), film_bias (2 C,), x_bias (C_x,)."""


def by_kernels(
    x: Tensor,
    vectors: Vectors,
    skip: Tensor | None,
    skip_scale: float,
    num_groups: int,
    eps: float,
    activation: str,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, x, skip) of ops.group_norm_silu_residual, or without `residual` y and the arguments, which are checked."""
    if residual:
        return GroupNorm.apply(x, *vectors, skip, skip_scale, num_groups, eps, activation, True)
    return GroupNorm.apply(x, *vectors, skip, skip_scale, num_groups, eps, activation, False), x, skip


def _launchers(x: Tensor) -> Any:
    """The module that launches the kernels for x, or does as if."""
    if stands_for_gpu(x):
        from . import group_norm_meta

        return group_norm_meta
    from fastimagen_kernels import group_norm

    return group_norm


class GroupNorm(torch.autograd.Function):
    """y; with `residual` x and skip once more: gradients that arrive at these are added inside the backward kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        film_bias: Tensor | None,
        x_bias: Tensor | None,
        skip: Tensor | None,
        skip_scale: float,
        num_groups: int,
        eps: float,
        activation: str,
        residual: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        dense_x = dense(x)
        dense_skip = None if skip is None else laid_as(dense_x, skip)
        weight, bias, scale, shift = weight.contiguous(), bias.contiguous(), rows(scale), rows(shift)
        film_bias, x_bias = (None if vector is None else vector.contiguous() for vector in (film_bias, x_bias))
        y, mean, rstd = _launchers(x).group_norm_forward(
            dense_x, weight, bias, scale, shift, num_groups, eps, activation, film_bias, x_bias, dense_skip, skip_scale
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dense_x, weight, bias, scale, shift, mean, rstd, film_bias, x_bias, dense_skip)
        ctx.constants = skip_scale, num_groups, activation
        return (y, x, skip) if residual else y

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, x_residual: Tensor | None = None, skip_residual: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients would be constants to autograd
            raise RuntimeError(
                "the kernels of group_norm_silu have no second derivative; "
                'compute it in plain PyTorch: fastimagen.ops.set_backend("torch")'
            )
        if dy is None:
            return x_residual, *[None] * 6, skip_residual, *[None] * 5
        x, weight, bias, scale, shift, mean, rstd, film_bias, x_bias, skip = ctx.saved_tensors
        skip_scale, num_groups, activation = ctx.constants
        dx, dweight, dbias, dfilm, dfilm_bias, dx_bias, dskip = _launchers(x).group_norm_backward(
            laid_as(x, dy),
            x,
            weight,
            bias,
            scale,
            shift,
            mean,
            rstd,
            num_groups,
            activation,
            film_bias,
            x_bias,
            skip,
            skip_scale,
            None if x_residual is None else laid_as(x, x_residual),
            None if skip_residual is None else laid_as(x, skip_residual),
        )
        dscale = dshift = None
        if dfilm is not None:
            dscale, dshift = dfilm.unbind(1)  # (B, C) each; side by side for ops.halves
            dshift = dshift.to(shift.dtype)
        return dx, dweight, dbias, dscale, dshift, dfilm_bias, dx_bias, dskip, None, None, None, None, None
