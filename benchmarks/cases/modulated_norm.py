"""LayerNorm with scale and shift per sample, over the tokens of the presets. Letters: B batch, N tokens, C channels.

Providers have the signature of ops.modulated_norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen import ops

from ..harness.inputs import normal_inputs, usual_dtype
from ..harness.measure import Case

SHAPES = ((32, 256, 768), (32, 256, 1280), (8, 1024, 768), (4, 4096, 768), (1, 256, 1024))
"""B, N, C: JiT-B and JiT-H at 256 pixels, super-resolution to 1024 in patches of 32 and 16, one image of JiT-L."""
TENSORS = {"forward": 2, "backward": 3}
"""Of x's size that an op must read or write: x and y; x, dy and dx."""


def ours(name: str, *arguments: Any, **keywords: Any) -> Tensor:
    """ops.modulated_norm with a backend."""
    ops.set_backend(name)
    return ops.modulated_norm(*arguments, **keywords)


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As one writes it by hand."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def cases(
    device: torch.device,
    *,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Forward and backward for every shape."""
    dtype = dtype or usual_dtype(device)
    providers = {"ours, triton": partial(ours, "triton"), "ours, torch": partial(ours, "torch"), "eager": eager}
    for batch, tokens, channels in shapes:
        for mode in ("forward", "backward"):
            yield Case(
                "modulated_norm",
                f"B{batch} N{tokens} C{channels}",
                dtype,
                mode,
                partial(make_inputs, batch, tokens, channels, dtype, device),
                providers,
                bytes=float(TENSORS[mode] * batch * tokens * channels * dtype.itemsize),
            )


def make_inputs(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict[str, Any]]:
    """Random arguments, the same at every call; scale and shift are parts of one tensor, as in the transformer."""
    normal = normal_inputs(device, dtype)
    scale, shift, _ = normal(batch, 3 * channels).chunk(3, dim=1)
    return (normal(batch, tokens, channels), scale.detach(), shift.detach()), {}
