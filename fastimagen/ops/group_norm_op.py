"""The operator fastimagen::group_norm_silu: kernels/group_norm.py, or the same formulas in PyTorch without kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import in_kernels
from .layout import dense, laid_as

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "none": lambda y: y}
"""Of GroupNorm's result; the GELU is exact."""


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
) -> Tensor:
    """y = act(GroupNorm(x) * (1 + scale) + shift) by the operator."""
    return _forward(x, weight, bias, scale, shift, num_groups, eps, activation)[0]


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The same in plain PyTorch, differentiable by PyTorch."""
    y = torch.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        assert shift is not None
        scale, shift = scale.to(y.dtype)[:, :, None, None], shift.to(y.dtype)[:, :, None, None]  # (B, C, 1, 1)
        y = torch.addcmul(shift, y, scale + 1)
    return ACTIVATIONS[activation](y).to(x.dtype)


@torch.library.custom_op("fastimagen::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd (B, G) in fp32."""
    x = dense(x)
    if in_kernels(x):
        from fastimagen_kernels.group_norm import group_norm_forward

        return group_norm_forward(
            x, weight.contiguous(), bias.contiguous(), rows(scale), rows(shift), num_groups, eps, activation
        )
    grouped = x.float().unflatten(1, (num_groups, -1))  # (B, G, C / G, H, W)
    var, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)  # (B, G) each
    y = composed(x, weight, bias, num_groups, scale, shift, eps, activation)
    return laid_as(x, y), mean, (var + eps).rsqrt()


@torch.library.custom_op("fastimagen::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dfilm (B, 2, C): dscale, dshift; empty without FiLM."""
    x = dense(x)
    dy = laid_as(x, dy)
    if in_kernels(x):
        from fastimagen_kernels.group_norm import group_norm_backward

        dx, dweight, dbias, dfilm, *_ = group_norm_backward(
            dy,
            x,
            weight.contiguous(),
            bias.contiguous(),
            rows(scale),
            rows(shift),
            mean,
            rstd,
            num_groups,
            activation,
        )
    else:
        dx, dweight, dbias, dfilm = _gradients(dy, x, weight, bias, scale, shift, mean, rstd, num_groups, activation)
    return dx, dweight, dbias, x.new_empty(0) if dfilm is None else dfilm


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The backward pass in PyTorch, by the formulas of kernels/group_norm.py."""

    def per_channel(statistic: Tensor) -> Tensor:
        """The statistics (B, G) of each channel's group."""
        return statistic.repeat_interleave(x.shape[1] // num_groups, dim=1)[:, :, None, None]  # (B, C, 1, 1)

    def group_mean(value: Tensor) -> Tensor:
        """The mean of value (B, C, H, W) over each channel's group."""
        grouped = value.unflatten(1, (num_groups, -1))  # (B, G, C / G, H, W)
        return per_channel(grouped.mean(dim=(2, 3, 4)))  # (B, C, 1, 1)

    factor = torch.ones_like(x[:, :, 0, 0], dtype=torch.float32) if scale is None else 1 + scale.float()  # (B, C)
    gain = (weight * factor)[:, :, None, None]  # (B, C, 1, 1)
    offset = (bias * factor + (0 if shift is None else shift))[:, :, None, None]  # (B, C, 1, 1)
    xhat = (x - per_channel(mean)) * per_channel(rstd)  # (B, C, H, W)
    dz = dy.float()
    if activation == "silu":
        z = gain * xhat + offset
        dz = dz * z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    elif activation == "gelu":
        z = gain * xhat + offset
        density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
        dz = dz * (torch.special.ndtr(z) + z * density)
    s1, s2 = dz.sum(dim=(2, 3)), (dz * xhat).sum(dim=(2, 3))  # (B, C) each
    c1, c2 = group_mean(gain * dz), group_mean(gain * dz * xhat)  # (B, C, 1, 1) each
    dx = per_channel(rstd) * (gain * dz - c1 - xhat * c2)  # (B, C, H, W)
    dfilm = None if scale is None else torch.stack([weight * s2 + bias * s1, s1], dim=1).to(scale.dtype)  # (B, 2, C)
    dweight, dbias = (factor * s2).sum(dim=0), (factor * s1).sum(dim=0)  # (C,) each
    return laid_as(x, dx.to(x.dtype)), dweight.to(weight.dtype), dbias.to(bias.dtype), dfilm


def rows(vector: Tensor | None) -> Tensor | None:
    """A vector per sample (B, C), with contiguous rows; the halves of a chunked linear layer need no copy."""
    return vector if vector is None or vector.stride(1) == 1 else vector.contiguous()


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), mean, rstd


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dfilm = x.new_empty(0) if scale is None else scale.new_empty(x.shape[0], 2, x.shape[1])
    return torch.empty_like(dense(x)), torch.empty_like(weight), torch.empty_like(bias), dfilm


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, scale, shift, ctx.num_groups, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple:
    saved = ctx.saved_tensors  # read once: with activation checkpointing a second time is an error
    dx, dweight, dbias, dfilm = _backward(dy, *saved, ctx.num_groups, ctx.activation)
    shift, dscale, dshift = saved[4], None, None
    if shift is not None:
        dscale, dshift = dfilm.unbind(1)  # (B, C) each
        dshift = dshift.to(shift.dtype)
    return dx, dweight, dbias, dscale, dshift, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
