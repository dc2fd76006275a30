"""GroupNorm + FiLM + SiLU over the feature maps of the presets. Letters: B batch, C channels, S side of the map.

Providers have the signature of ops.group_norm_silu.
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
from ..harness.measure import Case, compiled

GROUPS = 8
SHAPES = (  # B, C, S: MinImagen Base and Super, the paper's networks, and what a single image asks for
    (32, 512, 64),
    (32, 1024, 32),
    (8, 128, 256),
    (32, 1024, 16),
    (32, 3584, 8),
    (8, 256, 128),
    (32, 1536, 32),
    (1, 512, 64),
    (1, 128, 256),
    (1, 1024, 16),
    (1, 2048, 8),
)
TENSORS = {"forward": 2, "backward": 3}
"""Of x's size that an op must read or write: x and y; x, dy and dx."""


def ours(name: str, *arguments: Any, **keywords: Any) -> Tensor:
    """ops.group_norm_silu with a backend."""
    ops.set_backend(name)
    return ops.group_norm_silu(*arguments, **keywords)


def eager(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *, scale: Tensor, shift: Tensor) -> Tensor:
    """As one writes it by hand."""
    y = F.group_norm(x, num_groups, weight, bias)
    return F.silu(y * (scale[:, :, None, None] + 1) + shift[:, :, None, None])


def cases(
    device: torch.device,
    *,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    compilers: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """In the U-Net's layout, channels_last, and contiguous; with `compilers` inductor's row of each, alone."""
    dtype = dtype or usual_dtype(device)
    providers = (
        {"inductor": compiled(eager)}
        if compilers
        else {"ours, triton": partial(ours, "triton"), "ours, torch": partial(ours, "torch"), "eager": eager}
    )
    for batch, channels, side in shapes:
        for layout in (torch.channels_last, torch.contiguous_format):
            name = "channels_last" if layout is torch.channels_last else "contiguous"
            for mode in ("forward", "backward"):
                yield Case(
                    "group_norm",
                    f"B{batch} C{channels} {side}x{side} {name}",
                    dtype,
                    mode,
                    partial(make_inputs, batch, channels, side, layout, dtype, device),
                    providers,
                    bytes=float(TENSORS[mode] * batch * channels * side**2 * dtype.itemsize),
                )


def make_inputs(
    batch: int, channels: int, side: int, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict[str, Any]]:
    """Random arguments with FiLM, the same at every call; scale and shift are halves of one tensor, as in the U-Net."""
    normal = normal_inputs(device, dtype)
    x = normal(batch, channels, side, side).contiguous(memory_format=layout)
    scale, shift = normal(batch, 2 * channels).chunk(2, dim=1)
    return (x, normal(channels), normal(channels), GROUPS), {"scale": scale.detach(), "shift": shift.detach()}
