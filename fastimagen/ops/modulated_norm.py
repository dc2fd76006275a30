"""LayerNorm modulated by a vector per sample (adaLN: Peebles and Xie 2023, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import KERNEL_DTYPES, in_kernels, stands_for_gpu, traced, use_triton

MAX_CHANNELS = 8192  # the kernel holds whole tokens in registers


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift for tokens x (B, N, C), scale and shift (B, C); the result has x's dtype.

    The norm has no weights of its own. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"modulated_norm takes tokens (B, N, C), got {tuple(x.shape)}")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.shape != (x.shape[0], x.shape[2]):
            expected = (x.shape[0], x.shape[2])
            raise ValueError(f"{name} must be {expected} for x {tuple(x.shape)}, got {tuple(vector.shape)}")
    if not use_triton("modulated_norm", x, _unsupported(x, scale, shift)):
        return modulated_norm_reference(x, scale, shift, eps)
    if traced() or stands_for_gpu(x):
        return _forward(x, scale, shift, eps)[0]
    return ModulatedNorm.apply(x, scale, shift, eps)


def modulated_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`modulated_norm` in plain PyTorch, differentiable by PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale, shift = scale.to(y.dtype)[:, None], shift.to(y.dtype)[:, None]  # (B, 1, C) each
    return torch.addcmul(shift, y, 1 + scale).to(x.dtype)  # (B, N, C)


def _unsupported(x: Tensor, *vectors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    wrong = [tensor.dtype for tensor in (x, *vectors) if tensor.dtype not in KERNEL_DTYPES]
    if wrong:
        return f"the kernel takes float32, bfloat16 and float16, not {str(wrong[0]).removeprefix('torch.')}"
    if x.shape[2] > MAX_CHANNELS:
        return f"the kernel takes at most {MAX_CHANNELS} channels, not {x.shape[2]}"
    return None if x.numel() else "x is empty"


def _rows(vector: Tensor) -> Tensor:
    """A vector per sample (B, C), with contiguous rows; the parts of a linear layer's output need no copy."""
    return vector if vector.stride(1) == 1 else vector.contiguous()


class ModulatedNorm(torch.autograd.Function):
    """The kernels where nothing traces them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        from fastimagen_kernels.modulated_norm import modulated_norm_forward

        x, scale, shift = x.contiguous(), _rows(scale), _rows(shift)
        y, mean, rstd = modulated_norm_forward(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.shift_dtype = shift.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fastimagen_kernels.modulated_norm import modulated_norm_backward

        x, scale, mean, rstd = ctx.saved_tensors
        dx, dfilm = modulated_norm_backward(dy.contiguous(), x, scale, mean, rstd)
        dscale, dshift = dfilm.to(scale.dtype).unbind(1)  # (B, C) each
        return dx, dscale, dshift.to(ctx.shift_dtype), None


# ---- the operator, for what traces operators


@torch.library.custom_op("fastimagen::modulated_norm", mutates_args=())
def _forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd (B, N) in fp32."""
    x = x.contiguous()
    if in_kernels(x):
        from fastimagen_kernels.modulated_norm import modulated_norm_forward

        return modulated_norm_forward(x, _rows(scale), _rows(shift), eps)
    var, mean = torch.var_mean(x.float(), dim=-1, correction=0)  # (B, N) each
    return modulated_norm_reference(x, scale, shift, eps), mean, (var + eps).rsqrt()


@torch.library.custom_op("fastimagen::modulated_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and dscale and dshift as (B, 2, C) in fp32."""
    dy, x = dy.contiguous(), x.contiguous()
    if in_kernels(x):
        from fastimagen_kernels.modulated_norm import modulated_norm_backward

        return modulated_norm_backward(dy, x, _rows(scale), mean, rstd)
    xhat = (x.float() - mean[..., None]) * rstd[..., None]  # (B, N, C)
    g = dy.float() * (1 + scale.float())[:, None]  # (B, N, C)
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))  # (B, N, C)
    return dx.to(x.dtype), torch.stack([(dy.float() * xhat).sum(1), dy.float().sum(1)], dim=1)


@_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2, x.shape[2], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, scale, shift, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _differentiate(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, mean, rstd = ctx.saved_tensors  # read once: with activation checkpointing a second time is an error
    dx, dfilm = _backward(dy, x, scale, mean, rstd)
    dscale, dshift = dfilm.to(scale.dtype).unbind(1)  # (B, C) each
    return dx, dscale, dshift.to(ctx.shift_dtype), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
