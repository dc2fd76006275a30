"""Everything of a sampler's step that follows the U-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, in_kernels, traced, use_triton
from .dynamic_threshold import check_limits, dynamic_threshold_reference, dynamic_threshold_unsupported
from .layout import dense, laid_as

THRESHOLDS = ("dynamic", "static", "none")


def sampler_step(
    output: Tensor,
    x: Tensor,
    recovery: tuple[float, float],
    update: tuple[float, float, float, float],
    *,
    guidance: float | None = None,
    threshold: str = "none",
    percentile: float = 0.995,
    ceiling: float | None = None,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', x0), both (B, C, H, W) in x's dtype and layout, from a network's output.

        F  = u + w (c - u)                                      classifier-free guidance (Imagen, section 2.2)
        x0 = threshold(skip x + out F)                          skip, out = recovery, for any prediction type
        x' = c_x x + c_x0 x0 + c_prev previous + c_noise noise  c_x, c_x0, c_prev, c_noise = update, for any sampler

    output (B, C, H, W), or with a guidance weight w (2B, C, H, W): c with captions, then u without. threshold is
    "dynamic" (ops.dynamic_threshold with percentile and ceiling), "static" (clamp to [-1, 1]) or "none". previous and
    noise (B, C, H, W). Not differentiable. Raises ValueError for shapes that do not fit together, an unknown threshold,
    a percentile outside [0, 1] and a ceiling below 1.
    """
    if threshold not in THRESHOLDS:
        raise ValueError(f'threshold must be one of {", ".join(THRESHOLDS)}, got "{threshold}"')
    check_limits(percentile, 1.0, ceiling)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (B, ...), got {x.dtype} {tuple(x.shape)}")
    wanted = (len(x) * (1 if guidance is None else 2), *x.shape[1:])
    if tuple(output.shape) != wanted:
        raise ValueError(f"output must be {wanted} for x {tuple(x.shape)}, got {tuple(output.shape)}")
    for name, tensor in (("previous", previous), ("noise", noise)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name} must be {tuple(x.shape)} like x, got {tuple(tensor.shape)}")
    if use_triton("sampler_step", x, _unsupported(output, x)):
        step = _operator if traced() else _step
        return step(output, x, previous, noise, *recovery, *update, guidance, threshold, percentile, ceiling)
    return sampler_step_reference(
        output,
        x,
        recovery,
        update,
        guidance=guidance,
        threshold=threshold,
        percentile=percentile,
        ceiling=ceiling,
        previous=previous,
        noise=noise,
    )


@torch.no_grad()
def sampler_step_reference(
    output: Tensor,
    x: Tensor,
    recovery: tuple[float, float],
    update: tuple[float, float, float, float],
    *,
    guidance: float | None,
    threshold: str,
    percentile: float,
    ceiling: float | None,
    previous: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sampler_step` in plain PyTorch."""
    output = output.to(x.dtype)
    if guidance is not None:
        conditional, unconditional = output.chunk(2)  # (B, C, H, W) each
        output = unconditional.lerp(conditional, guidance)  # exact for weights 0 and 1
    skip, out = recovery
    x0 = skip * x + out * output
    if threshold == "dynamic":
        x0 = dynamic_threshold_reference(x0, percentile, ceiling=ceiling)
    elif threshold == "static":
        x0 = x0.clamp(-1, 1)
    c_x, c_x0, c_prev, c_noise = update
    x_next = c_x * x + c_x0 * x0
    if previous is not None:
        x_next += c_prev * previous
    if noise is not None:
        x_next += c_noise * noise
    return x_next, x0


def _unsupported(output: Tensor, x: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if x.dtype != torch.float32 or output.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32 x and float32, bfloat16 or float16 output, not {x.dtype} and {output.dtype}"
    return dynamic_threshold_unsupported(x)


def _step(
    output: Tensor,
    x: Tensor,
    previous: Tensor | None,
    noise: Tensor | None,
    skip: float,
    out: float,
    c_x: float,
    c_x0: float,
    c_prev: float,
    c_noise: float,
    guidance: float | None,
    threshold: str,
    percentile: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    recovery, update = (skip, out), (c_x, c_x0, c_prev, c_noise)
    if not in_kernels(x):
        x_next, x0 = sampler_step_reference(
            output,
            x,
            recovery,
            update,
            guidance=guidance,
            threshold=threshold,
            percentile=percentile,
            ceiling=ceiling,
            previous=previous,
            noise=noise,
        )
        return laid_as(x, x_next), laid_as(x, x0)
    from fastimagen_kernels import sampler_step as kernels

    output = laid_as(x, output)
    previous, noise = (None if tensor is None else laid_as(x, tensor) for tensor in (previous, noise))
    largest = math.inf if ceiling is None else ceiling
    return kernels.sampler_step(output, x, previous, noise, recovery, update, guidance, threshold, percentile, largest)


# ---- the operator


@torch.library.custom_op("fastimagen::sampler_step", mutates_args=())
def _operator(
    output: Tensor,
    x: Tensor,
    previous: Tensor | None,
    noise: Tensor | None,
    skip: float,
    out: float,
    c_x: float,
    c_x0: float,
    c_prev: float,
    c_noise: float,
    guidance: float | None,
    threshold: str,
    percentile: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor]:
    return _step(
        output, x, previous, noise, skip, out, c_x, c_x0, c_prev, c_noise, guidance, threshold, percentile, ceiling
    )


@_operator.register_fake
def _(
    output: Tensor,
    x: Tensor,
    previous: Tensor | None,
    noise: Tensor | None,
    skip: float,
    out: float,
    c_x: float,
    c_x0: float,
    c_prev: float,
    c_noise: float,
    guidance: float | None,
    threshold: str,
    percentile: float,
    ceiling: float | None,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    return torch.empty_like(x), torch.empty_like(x)
