"""Inputs of group_norm_silu_residual: x with its convolution's bias, a skip behind it, gradients on a residual path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.group_norm_cases import by_definition

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor | None]

SKIP_SCALE = 0.7
GRADIENTS = ("dy", "x_residual", "skip_residual")
"""Names of the gradients that arrive at the outputs y, x and skip; the others are inputs of the op."""


def inputs(
    shape: tuple[int, ...],
    skip_channels: int,
    *,
    film: bool = True,
    biases: bool = True,
    residuals: tuple[str, ...] = ("x_residual", "skip_residual"),
    last: bool = False,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Random tensors by name; weight, bias, film_bias and x_bias stay in fp32."""
    generator = torch.Generator().manual_seed(0)
    batch, x_channels, *side = shape
    channels = x_channels + skip_channels

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def image(count: int, offset: float = 0.0) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return (normal(batch, count, *side) + offset).to(dtype).contiguous(memory_format=layout)

    tensors = {"x": image(x_channels, mean), "weight": normal(channels), "bias": normal(channels)}
    tensors |= {"dy": image(channels)}
    if film:
        scale, shift = normal(batch, 2 * channels).to(dtype).chunk(2, dim=1)  # (B, C) each
        tensors |= {"scale": scale, "shift": shift}
    if biases:
        tensors |= {"x_bias": normal(x_channels)}
    if film and biases:
        tensors |= {"film_bias": normal(2 * channels)}
    if skip_channels:
        tensors |= {"skip": image(skip_channels, mean)}
    return tensors | {name: image(x_channels if name == "x_residual" else skip_channels) for name in residuals}


def results(function: Callable[..., Outputs], tensors: Tensors, groups: int) -> Tensors:
    """y and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name not in GRADIENTS}
    outputs = dict(zip(GRADIENTS, function(num_groups=groups, skip_scale=SKIP_SCALE, **leaves)))
    arriving = {name: tensors[name] for name in outputs if name in tensors}
    given = torch.autograd.grad([outputs[name] for name in arriving], list(leaves.values()), list(arriving.values()))
    y = outputs["dy"]
    assert isinstance(y, Tensor)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, given)}}


def defined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> Outputs:
    """group_norm_silu_residual written out."""
    if film_bias is not None:
        assert scale is not None and shift is not None
        scale, shift = scale + film_bias[: scale.shape[1]], shift + film_bias[scale.shape[1] :]
    both = x if x_bias is None else x + x_bias[:, None, None]
    if skip is not None:
        both = torch.cat([both, skip * skip_scale], dim=1)  # (B, C, H, W)
    y = by_definition(both, weight, bias, num_groups, scale=scale, shift=shift)
    return y, x.clone(), None if skip is None else skip.clone()


def exact(tensors: Tensors, groups: int) -> Tensors:
    """The results of the definition in float64."""
    return results(defined, {name: tensor.double() for name, tensor in tensors.items()}, groups)


def composed(**arguments: object) -> Outputs:
    """group_norm_silu_residual in plain PyTorch."""
    before = ops.backend()
    ops.set_backend("torch")
    try:
        return ops.group_norm_silu_residual(**arguments)  # type: ignore[arg-type]  # as the caller gives them
    finally:
        ops.set_backend(before)
