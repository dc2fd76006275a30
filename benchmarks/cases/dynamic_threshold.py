"""Dynamic thresholding, and a sampler's step with it, at the sizes of the paper's stages. Letters: B batch, S side.

Providers have the signatures of ops.dynamic_threshold and ops.sampler_step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastimagen import ops

from ..harness.inputs import normal_inputs, usual_dtype
from ..harness.measure import Case

PERCENTILE = 0.995
SHAPES = ((16, 256), (1, 1024), (16, 64), (64, 64), (64, 256), (8, 1024), (1, 64), (1, 256))  # B, S


def ours(name: str, *arguments: Any) -> Tensor:
    """ops.dynamic_threshold with a backend."""
    ops.set_backend(name)
    return ops.dynamic_threshold(*arguments)


def clipped(x0: Tensor, quantile: Tensor) -> Tensor:
    s = quantile.clamp(min=1.0)[:, None, None, None]
    return x0.clamp(-s, s) / s


def quantile(x0: Tensor, percentile: float) -> Tensor:
    """As MinImagen does."""
    return clipped(x0, torch.quantile(x0.flatten(1).abs(), percentile, dim=1))


def ranks(x0: Tensor, percentile: float) -> tuple[int, int, float]:
    """(rank below, rank above, fraction) of the quantile, from 0."""
    rank = percentile * (x0[0].numel() - 1)
    return math.floor(rank), math.ceil(rank), rank - math.floor(rank)


def kthvalue(x0: Tensor, percentile: float) -> Tensor:
    """Selection, twice, and interpolation."""
    below, above, fraction = ranks(x0, percentile)
    magnitude = x0.flatten(1).abs()
    low, high = (magnitude.kthvalue(rank + 1, dim=1).values for rank in (below, above))
    return clipped(x0, low.lerp(high, fraction))


def topk(x0: Tensor, percentile: float) -> Tensor:
    """The largest of all, sorted, down to the rank below."""
    below, above, fraction = ranks(x0, percentile)
    largest = x0.flatten(1).abs().topk(x0[0].numel() - below, dim=1).values
    return clipped(x0, largest[:, -1].lerp(largest[:, below - above - 1], fraction))


PROVIDERS = {
    "ours, triton": partial(ours, "triton"),
    "ours, torch": partial(ours, "torch"),
    "torch.quantile": quantile,
    "kthvalue": kthvalue,
    "topk": topk,
}


def our_step(name: str, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """ops.sampler_step with a backend."""
    ops.set_backend(name)
    return ops.sampler_step(*arguments, **keywords)


def step_by_hand(
    output: Tensor,
    x: Tensor,
    recovery: tuple[float, float],
    update: tuple[float, ...],
    *,
    guidance: float,
    threshold: str,
    percentile: float,
) -> tuple[Tensor, Tensor]:
    """As one writes it: an operation for each term, and torch.quantile."""
    conditional, unconditional = output.float().chunk(2)
    x0 = recovery[0] * x + recovery[1] * (unconditional + guidance * (conditional - unconditional))
    x0 = quantile(x0, percentile)
    return update[0] * x + update[1] * x0, x0


STEPS = {
    "ours, triton": partial(our_step, "triton"),
    "ours, torch": partial(our_step, "torch"),
    "by hand": step_by_hand,
}


def cases(
    device: torch.device, *, shapes: tuple[tuple[int, int], ...] = SHAPES, dtype: torch.dtype | None = None
) -> Iterator[Case]:
    """`dtype` is that of the network's output."""
    dtype = dtype or usual_dtype(device)
    for batch, side in shapes:
        elements = batch * 3 * side**2
        yield Case(
            "sampler step",
            f"B{batch} {side}x{side}",
            dtype,
            "forward",
            partial(make_step, batch, side, dtype, device),
            STEPS,
            bytes=(12.0 + 2 * dtype.itemsize) * elements,
        )  # x and both halves read, x0 and the next x written
        yield Case(
            "threshold",
            f"B{batch} {side}x{side}",
            torch.float32,
            "forward",
            partial(make_inputs, batch, side, device),
            PROVIDERS,
            bytes=8.0 * elements,
        )  # read and written once


def make_step(batch: int, side: int, dtype: torch.dtype, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """A guided step of DDIM or DPM-Solver++ from a U-Net's output in its own precision."""
    normal = normal_inputs(device)
    x, *halves = (normal(batch, 3, side, side) for _ in range(3))
    return (torch.cat(halves).to(dtype), x, (0.7, -0.7), (0.6, 0.4, 0.0, 0.0)), {
        "guidance": 5.0,
        "threshold": "dynamic",
        "percentile": PERCENTILE,
    }


def make_inputs(batch: int, side: int, device: torch.device) -> tuple[tuple[Tensor, float], dict[str, Any]]:
    """Normal values, larger in later samples, so that some are clipped and some are not."""
    x0 = normal_inputs(device)(batch, 3, side, side)
    return (x0 * torch.linspace(0.2, 2, batch, device=device)[:, None, None, None], PERCENTILE), {}
