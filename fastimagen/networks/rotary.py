"""Rotary positions in two dimensions (Su et al. 2021; axial, as in JiT)."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor


def rotation(height: int, width: int, head_dim: int, reach: int, device: torch.device) -> Tensor:
    """Cosine and sine of the angle of every channel pair at every patch: (N, 1, D / 2, 2), in fp32, N = height x width.

    The first half of the pairs turns with the row, the second with the column. The frequencies are geometric, from
    half a circle per patch to half a circle per `reach` patches. They do not depend on the size of the image, so that
    neighbours look the same in larger ones. Differs from JiT, whose slowest frequency (base 10,000) hardly turns.
    """
    frequency = math.pi / reach ** torch.linspace(0, 1, head_dim // 4, device=device)  # (D / 4,)
    rows = torch.arange(height, device=device)[:, None] * frequency  # (height, D / 4)
    columns = torch.arange(width, device=device)[:, None] * frequency  # (width, D / 4)
    angle = torch.cat(
        [repeat(rows, "h d -> (h w) d", w=width), repeat(columns, "w d -> (h w) d", h=height)], dim=1
    )  # (N, D / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]  # (N, 1, D / 2, 2)


def without_position(count: int, like: Tensor) -> Tensor:
    """The rotation of `count` tokens that have no position in the image: (count, 1, D / 2, 2)."""
    unit = torch.ones_like(like[:1, :, :, 0])  # (1, 1, D / 2)
    return torch.stack([unit, torch.zeros_like(unit)], dim=-1).expand(count, -1, -1, -1)  # (count, 1, D / 2, 2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys x (B, N, A, D), whose neighbouring channels are pairs, turned by turn (N, 1, D / 2, 2)."""
    pairs = rearrange(x, "b n a (pairs two) -> b n a pairs two", two=2)  # (B, N, A, D / 2, 2)
    if x.dtype == torch.float32 and not torch.compiler.is_compiling():  # one pass; compilers fuse the formula below
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))  # (B, N, A, D / 2, 2)
    else:
        cos, sin = turn.unbind(-1)  # (N, 1, D / 2) each
        first, second = pairs.unbind(-1)  # (B, N, A, D / 2) each
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)  # (B, N, A, D / 2, 2)
    return rearrange(turned, "b n a pairs two -> b n a (pairs two)").to(x.dtype)  # (B, N, A, D)
