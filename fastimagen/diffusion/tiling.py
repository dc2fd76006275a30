"""A network over overlapping tiles of an image that is too large for it as a whole.

Letters: B batch, C channels, H height, W width, S side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def in_tiles(network: Callable[..., Tensor], side: int, x: Tensor, **maps: Tensor) -> Tensor:
    """network(x, **maps) (B, C, H, W), computed tile by tile; x and maps (B, ., H, W) are cut alike.

    Tiles of S x S overlap by at least a quarter. Where several cover a pixel their outputs are averaged, with weights
    that fall off towards a tile's border, so that no seam shows. What a network sees of its surroundings ends at the
    tile: the image differs a little from one that is drawn whole.
    """
    height, width = x.shape[-2:]
    window = _window(min(side, height), x)[:, None] * _window(min(side, width), x)  # (S, S)
    total, weights = None, x.new_zeros(height, width)
    for top, left in product(_starts(height, side), _starts(width, side)):
        tile = (..., slice(top, top + side), slice(left, left + side))
        output = network(x[tile], **{name: values[tile] for name, values in maps.items()})  # (B, C, S, S)
        total = x.new_zeros(*output.shape[:2], height, width) if total is None else total
        total[tile] += window * output
        weights[tile] += window
    return total / weights


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin so that they cover `length`, evenly."""
    if side >= length:
        return [0]
    count = math.ceil((length - side) / (side - side // 4)) + 1
    return [round(index * (length - side) / (count - 1)) for index in range(count)]


def _window(side: int, like: Tensor) -> Tensor:
    """Weights (S,) that rise linearly over a quarter of the tile from either border."""
    distance = torch.arange(side, device=like.device, dtype=like.dtype) + 1
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(1, side // 4))
