"""What GroupNorm's kernels allocate, without computing: for meta tensors, which stand for those of a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    film_bias: Tensor | None,
    x_bias: Tensor | None,
    skip: Tensor | None,
    skip_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W) channels_last, mean and rstd (B, G) fp32, of the arguments of the launcher in kernels/."""
    y = x if skip is None else torch.cat([x, skip], dim=1)  # (B, C, H, W)
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(y) if skip is None else y, mean, rstd


def group_norm_backward(
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
    film_bias: Tensor | None,
    x_bias: Tensor | None,
    skip: Tensor | None,
    skip_scale: float,
    x_residual: Tensor | None,
    skip_residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, dfilm (B, 2, C), dfilm_bias, dx_bias, dskip, of the arguments of the launcher in kernels/."""
    dskip, dfilm_bias, dx_bias = (
        None if like is None else torch.empty_like(like) for like in (skip, film_bias, x_bias)
    )
    dfilm = None if scale is None else scale.new_empty(len(scale), 2, scale.shape[1])  # (B, 2, C)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dfilm, dfilm_bias, dx_bias, dskip
