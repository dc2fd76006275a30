"""The sum at the end of a residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import KERNEL_DTYPES, traced, use_triton
from .layout import dense, laid_as


def add_residual(h: Tensor, residual: Tensor, bias: Tensor | None = None, more_bias: Tensor | None = None) -> Tensor:
    """h + residual + bias + more_bias for maps (B, C, H, W) and the biases (C,) of the convolutions that made them.

    The result has h's layout and the wider dtype of the two. The kernel adds in fp32 and rounds once. Without a bias,
    and under torch.compile, which fuses additions itself, it is plain PyTorch. Raises ValueError for shapes that do not
    fit.
    """
    if h.dim() != 4 or residual.shape != h.shape:
        raise ValueError(f"add_residual takes two maps (B, C, H, W), got {tuple(h.shape)} and {tuple(residual.shape)}")
    for name, vector in (("bias", bias), ("more_bias", more_bias)):
        if vector is not None and vector.shape != h.shape[1:2]:
            raise ValueError(f"{name} must be {tuple(h.shape[1:2])} for h {tuple(h.shape)}, got {tuple(vector.shape)}")
    if bias is None and more_bias is not None:
        raise ValueError("more_bias needs bias")
    if bias is None:
        return h + residual
    if not traced() and use_triton("add_residual", h, _unsupported(h, residual, bias, more_bias)):
        return AddResidual.apply(h, residual, bias, more_bias)
    return add_residual_reference(h, residual, bias, more_bias)


def add_residual_reference(h: Tensor, residual: Tensor, bias: Tensor, more_bias: Tensor | None) -> Tensor:
    """`add_residual` in plain PyTorch, differentiable by PyTorch."""
    both = bias if more_bias is None else bias + more_bias
    return h + both.to(h.dtype)[:, None, None] + residual


def _unsupported(h: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    wrong = [tensor.dtype for tensor in (h, *others) if tensor is not None and tensor.dtype not in KERNEL_DTYPES]
    if wrong:
        return f"the kernel takes float32, bfloat16 and float16, not {str(wrong[0]).removeprefix('torch.')}"
    return None if h.numel() else "h is empty"


class AddResidual(torch.autograd.Function):
    """The kernel forward. The gradient of the result is that of h and residual, and its sum is that of the biases."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, residual: Tensor, bias: Tensor, more_bias: Tensor | None) -> Tensor:
        from fastimagen_kernels.residual import add_residual

        h = dense(h)
        more_bias = None if more_bias is None else more_bias.contiguous()
        return add_residual(h, laid_as(h, residual), bias.contiguous(), more_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        for_bias, for_more = ctx.needs_input_grad[2:]
        dbias = dy.sum((0, 2, 3)) if for_bias or for_more else None  # (C,)
        return dy, dy, dbias if for_bias else None, dbias if for_more else None
