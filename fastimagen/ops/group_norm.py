"""GroupNorm, FiLM and SiLU in one op, of one tensor or of two behind each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, use_triton
from .group_norm_op import composed, fused

ACTIVATIONS = ("silu", "none")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> Tensor:
    """y = act(GroupNorm(x) * (1 + scale) + shift); act is "silu" or "none" (Imagen's residual blocks, appendix B).

    x (B, C, H, W), contiguous or channels_last; y has its layout and dtype, under autocast too. weight, bias (C,);
    scale, shift (B, C), both or neither. x_bias (C,) is added to x first: the bias of the convolution before it. With
    skip (B, S, H, W), cat([x + x_bias, skip * skip_scale], dim=1) is normalized: weight, bias, scale, shift and y have
    C + S channels, x_bias has C; skip takes x's dtype. The kernels compute in fp32, make neither the sum nor the
    concatenation, and save only their inputs and the statistics for the backward pass. Raises ValueError for shapes
    that do not fit and for another activation.
    """
    return group_norm_silu_residual(
        x,
        weight,
        bias,
        num_groups,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=activation,
        x_bias=x_bias,
        skip=skip,
        skip_scale=skip_scale,
    )[0]


def group_norm_silu_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, x, skip): `group_norm_silu` of the same arguments, and x and skip once more for a residual path.

    The gradients that arrive at these x (without x_bias) and skip (without skip_scale; in x's dtype; None without a
    skip) are added inside the backward kernel, where autograd would add in passes of their own.
    """
    _check(x, weight, bias, num_groups, scale, shift, activation, x_bias, skip)
    if skip is not None:
        skip = skip.to(x.dtype)
    both = joined(x, x_bias, skip, skip_scale)
    if use_triton("group_norm_silu", x, _unsupported(x, weight, bias, scale, shift, x_bias, skip)):
        y = fused(both, weight, bias, scale, shift, num_groups, eps, activation)
    else:
        y = composed(both, weight, bias, num_groups, scale, shift, eps, activation)
    return y, x, skip


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> Tensor:
    """`group_norm_silu` in plain PyTorch, differentiable by PyTorch."""
    return composed(joined(x, x_bias, skip, skip_scale), weight, bias, num_groups, scale, shift, eps, activation)


def joined(x: Tensor, x_bias: Tensor | None, skip: Tensor | None, skip_scale: float) -> Tensor:
    """What is normalized, (B, C + S, H, W): x with its bias, and behind it the skip with its scale."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)[:, None, None]
    if skip is None:
        return x
    skip = skip.to(x.dtype)
    return torch.cat([x, skip if skip_scale == 1 else skip * skip_scale], dim=1)  # (B, C + S, H, W)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    x_bias: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Raise ValueError for shapes that do not fit and for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'no activation "{activation}"; there are {", ".join(ACTIVATIONS)}')
    if x.dim() != 4:
        raise ValueError(f"group_norm_silu takes x (B, C, H, W), got {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    of = f"x {tuple(x.shape)}"
    if x_bias is not None and x_bias.shape != (channels,):
        raise ValueError(f"x_bias must be {(channels,)} for {of}, got {tuple(x_bias.shape)}")
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (batch, height, width):
            raise ValueError(f"skip must be ({batch}, channels, {height}, {width}) for {of}, got {tuple(skip.shape)}")
        channels += skip.shape[1]
        of += f" and skip {tuple(skip.shape)}"
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels cannot be split into {num_groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    for name, vector, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if vector is not None and vector.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} for {of}, got {tuple(vector.shape)}")


def _unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, x first; None if they can."""
    wrong = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype not in KERNEL_DTYPES]
    if wrong:
        return f"the kernel takes float32, bfloat16 and float16, not {str(wrong[0]).removeprefix('torch.')}"
    x = tensors[0]
    assert x is not None
    return None if x.numel() else "x is empty"
