"""GroupNorm, FiLM and an activation in one op, of one tensor or of two behind each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, in_kernels, use_triton
from .group_norm_function import Vectors, by_kernels
from .group_norm_op import ACTIVATIONS, composed, fused


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
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> Tensor:
    """y = act(GroupNorm(x) * (1 + scale) + shift); act is "silu" (Imagen's residual blocks, appendix B), "gelu" (exact;
    DeepFloyd IF) or "none".

    x (B, C, H, W), contiguous or channels_last; y has its layout and dtype, under autocast too. weight, bias (C,);
    scale, shift (B, C), both or neither. film_bias (2 C,) is added to them first, and x_bias (C,) to x: the biases of
    the linear layer and of the convolution that made them.
    With skip, cat([x + x_bias, skip * skip_scale], dim=1) is normalized: x (B, C_x, H, W), x_bias (C_x,), skip
    (B, C_s, H, W), converted to x's dtype, and C = C_x + C_s. The kernels compute in fp32, make neither the sum nor
    the concatenation, and save only their inputs and the statistics for the backward pass. Raises ValueError for
    shapes that do not fit and for another activation.
    """
    vectors = weight, bias, scale, shift, film_bias, x_bias
    return _normalize(x, vectors, num_groups, eps, activation, skip, skip_scale, residual=False)[0]


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
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, x, skip): `group_norm_silu` of the same arguments, and x and skip once more for a residual path.

    The gradients that arrive at these x (without x_bias) and skip (without skip_scale; in x's dtype; None without a
    skip) are added inside the backward kernel, where autograd would add in passes of their own.
    """
    vectors = weight, bias, scale, shift, film_bias, x_bias
    return _normalize(x, vectors, num_groups, eps, activation, skip, skip_scale, residual=True)


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
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> Tensor:
    """`group_norm_silu` in plain PyTorch, differentiable by PyTorch."""
    x, scale, shift = joined(x, x_bias, skip, skip_scale), *biased(scale, shift, film_bias)
    return composed(x, weight, bias, num_groups, scale, shift, eps, activation)


def _normalize(
    x: Tensor,
    vectors: Vectors,
    num_groups: int,
    eps: float,
    activation: str,
    skip: Tensor | None,
    skip_scale: float,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, x, skip), of which group_norm_silu needs y alone: without `residual` x and skip are the arguments."""
    _check(x, vectors, num_groups, activation, skip)
    if skip is not None and skip.dtype != x.dtype:
        skip = skip.to(x.dtype)
    weight, bias, scale, shift, film_bias, x_bias = vectors
    triton = use_triton("group_norm_silu", x, _unsupported(x, *vectors))
    if triton and in_kernels(x) and not torch.compiler.is_compiling():
        return by_kernels(x, vectors, skip, skip_scale, num_groups, eps, activation, residual=residual)
    both, scale, shift = joined(x, x_bias, skip, skip_scale), *biased(scale, shift, film_bias)
    if triton:
        y = fused(both, weight, bias, scale, shift, num_groups, eps, activation)
    else:
        y = composed(both, weight, bias, num_groups, scale, shift, eps, activation)
    return y, x, skip


def joined(x: Tensor, x_bias: Tensor | None, skip: Tensor | None, skip_scale: float) -> Tensor:
    """What is normalized, (B, C, H, W): x with its bias, and behind it the skip with its scale."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)[:, None, None]
    if skip is None:
        return x
    skip = skip.to(x.dtype)
    return torch.cat([x, skip if skip_scale == 1 else skip * skip_scale], dim=1)  # (B, C, H, W)


def biased(scale: Tensor | None, shift: Tensor | None, film_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """scale and shift (B, C) with their halves of film_bias (2 C,)."""
    if film_bias is None:
        return scale, shift
    assert scale is not None and shift is not None
    scale_bias, shift_bias = film_bias.chunk(2)  # (C,) each
    return scale + scale_bias.to(scale.dtype), shift + shift_bias.to(shift.dtype)


def _check(
    x: Tensor,
    vectors: Vectors,
    num_groups: int,
    activation: str,
    skip: Tensor | None,
) -> None:
    """Raise ValueError for shapes that do not fit and for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'no activation "{activation}"; there are {", ".join(ACTIVATIONS)}')
    if x.dim() != 4:
        raise ValueError(f"group_norm_silu takes x (B, C, H, W), got {tuple(x.shape)}")
    weight, bias, scale, shift, film_bias, x_bias = vectors
    batch, channels, height, width = x.shape
    if x_bias is not None and x_bias.shape != (channels,):
        raise _wrong_shape("x_bias", x_bias, (channels,), x, skip)
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (batch, height, width):
            wanted = f"({batch}, channels, {height}, {width})"
            raise ValueError(f"skip must be {wanted} for x {tuple(x.shape)}, got {tuple(skip.shape)}")
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels cannot be split into {num_groups} groups")
    if weight.shape != (channels,):
        raise _wrong_shape("weight", weight, (channels,), x, skip)
    if bias.shape != (channels,):
        raise _wrong_shape("bias", bias, (channels,), x, skip)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    if scale is None or shift is None:
        if film_bias is not None:
            raise ValueError("film_bias needs scale and shift")
        return
    if scale.shape != (batch, channels):
        raise _wrong_shape("scale", scale, (batch, channels), x, skip)
    if shift.shape != (batch, channels):
        raise _wrong_shape("shift", shift, (batch, channels), x, skip)
    if film_bias is not None and film_bias.shape != (2 * channels,):
        raise _wrong_shape("film_bias", film_bias, (2 * channels,), x, skip)


def _wrong_shape(name: str, vector: Tensor, shape: tuple[int, ...], x: Tensor, skip: Tensor | None) -> ValueError:
    inputs = f"x {tuple(x.shape)}" + ("" if skip is None else f" and skip {tuple(skip.shape)}")
    return ValueError(f"{name} must be {shape} for {inputs}, got {tuple(vector.shape)}")


def _unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, x first; None if they can."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    x = tensors[0]
    assert x is not None
    return None if x.numel() else "x is empty"
