"""Dynamic thresholding of x0 (Imagen, section 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, in_kernels, traced, use_triton
from .layout import dense, laid_as

MAX_ELEMENTS = 2**31 - 1  # of an image: the kernel counts in int32

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64: Apple GPUs."""


def dynamic_threshold(x0: Tensor, percentile: float, *, floor: float = 1.0, ceiling: float | None = None) -> Tensor:
    """s = clamp(quantile(|x0|, p), floor, ceiling) per sample; clamp(x0, -s, s) / s.

    x0 (B, ...) float32, bfloat16, float16 or float64; the result has its layout and dtype. Not differentiable. The
    quantile interpolates linearly and is exact for samples of any size: order statistics are selected, and ranks are
    float64. A ceiling of None is infinite. A NaN makes its sample NaN. Infinite values above the threshold are clamped
    like any other; if s itself is infinite, finite values become 0 and infinite ones NaN, by the division.
    Raises ValueError for a percentile outside [0, 1], a floor that is not positive, a ceiling below it, empty samples
    and other dtypes.
    """
    check_limits(percentile, floor, ceiling)
    if x0.dim() < 2 or 0 in x0.shape[1:]:
        raise ValueError(f"dynamic_threshold takes samples (B, ...) that are not empty, got {tuple(x0.shape)}")
    if x0.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"dynamic_threshold takes floating point samples, got {x0.dtype}")
    if use_triton("dynamic_threshold", x0, dynamic_threshold_unsupported(x0)):
        return (_operator if traced() else _thresholded)(x0, percentile, floor, ceiling)
    return dynamic_threshold_reference(x0, percentile, floor=floor, ceiling=ceiling)


def check_limits(percentile: float, floor: float, ceiling: float | None) -> None:
    """Raise ValueError for a quantile, or limits of a threshold, that there are not."""
    if not 0 <= percentile <= 1:
        raise ValueError(f"percentile must lie in [0, 1], got {percentile}")
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    if ceiling is not None and not ceiling >= floor:
        raise ValueError(f"ceiling must be at least the floor, {floor}, or None, got {ceiling}")


@torch.no_grad()
def dynamic_threshold_reference(
    x0: Tensor, percentile: float, *, floor: float = 1.0, ceiling: float | None = None
) -> Tensor:
    """`dynamic_threshold` in plain PyTorch: one selection and one pass instead of a sort."""
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    magnitude = x0.abs().flatten(1).to(dtype)  # (B, elements)
    count = magnitude.shape[1]
    position = percentile * (count - 1)
    rank = min(int(position), count - 1)
    low = magnitude.kthvalue(rank + 1, dim=1, keepdim=True).values  # (B, 1); a NaN counts as the largest
    larger = magnitude > low
    tied = count - larger.sum(dim=1, keepdim=True) > rank + 1  # (B, 1): the next order statistic equals low
    high = torch.where(larger, magnitude, torch.inf).amin(dim=1, keepdim=True)  # (B, 1)
    high = torch.where(tied | (rank + 1 >= count), low, high)
    fraction = position - rank
    # Equal ends are exact, infinite ones too. Between different ends float64 keeps both, even if they are far apart.
    wide = torch.float32 if x0.device.type in WITHOUT_FLOAT64 else torch.float64
    low, high = low.to(wide), high.to(wide)  # (B, 1) each
    between = torch.where(low == high, low, low + fraction * (high - low))
    s = (between if fraction else low).clamp(floor, ceiling)
    has_nan = magnitude.sum(dim=1, keepdim=True).isnan()  # (B, 1); a sum of magnitudes has no inf - inf
    s = torch.where(has_nan, torch.nan, s).to(dtype)
    s = s.reshape(-1, *(1,) * (x0.dim() - 1))  # (B, 1, ..., 1)
    return x0.to(dtype).clamp(-s, s).div_(s).to(x0.dtype)


def dynamic_threshold_unsupported(x0: Tensor) -> str | None:
    """Why the kernels cannot take x0; None if they can."""
    if x0.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {str(x0.dtype).removeprefix('torch.')}"
    if not x0.numel():
        return "there are no samples"
    elements = x0.numel() // len(x0)
    if elements > MAX_ELEMENTS:
        return f"the kernel takes samples of at most {MAX_ELEMENTS} elements, not {elements}"
    return None


def _thresholded(x0: Tensor, percentile: float, floor: float, ceiling: float | None) -> Tensor:
    x0 = dense(x0)
    if not in_kernels(x0):
        return laid_as(x0, dynamic_threshold_reference(x0, percentile, floor=floor, ceiling=ceiling))
    from fastimagen_kernels import dynamic_threshold as kernels

    return kernels.dynamic_threshold(x0, percentile, floor, math.inf if ceiling is None else ceiling)


# ---- the operator


@torch.library.custom_op("fastimagen::dynamic_threshold", mutates_args=())
def _operator(x0: Tensor, percentile: float, floor: float, ceiling: float | None) -> Tensor:
    return _thresholded(x0, percentile, floor, ceiling)


@_operator.register_fake
def _(x0: Tensor, percentile: float, floor: float, ceiling: float | None) -> Tensor:
    return torch.empty_like(dense(x0))
