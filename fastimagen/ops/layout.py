"""The memory layouts that the kernels of images and feature maps support: contiguous and channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x (B, ...) itself if it is contiguous or channels_last, otherwise a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def laid_as(x: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, with the shape of x, in the layout of x, which is dense; copied only if its layout differs."""
    return tensor.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
