"""LayerNorm modulated by a vector per sample (adaLN: Peebles and Xie 2023, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift for tokens x (B, N, C), scale and shift (B, C); the result has x's dtype.

    The norm has no weights of its own. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"modulated_norm takes tokens (B, N, C), got {tuple(x.shape)}")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must be {(x.shape[0], x.shape[2])} for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    return modulated_norm_reference(x, scale, shift, eps)


def modulated_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`modulated_norm` in plain PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale, shift = scale.to(y.dtype)[:, None], shift.to(y.dtype)[:, None]  # (B, 1, C) each
    return torch.addcmul(shift, y, 1 + scale).to(x.dtype)  # (B, N, C)
