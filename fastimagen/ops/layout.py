"""The memory layouts that kernels of images and feature maps take: contiguous, or channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x (B, ...) itself if it is contiguous or channels_last, else a contiguous copy."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def laid_as(x: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, of x's dimensions, in the layout of x, which is dense; a copy only if it has another."""
    return tensor.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
