"""A network applied to overlapping tiles of an image that does not fit into memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def in_tiles(network: Callable[..., Tensor], side: int, x: Tensor, **maps: Tensor) -> Tensor:
    """network(x, **maps) (B, C, H, W), computed tile by tile; x and maps (B, ., H, W) are cut in the same way.

    Tiles of `side` pixels overlap by at least a quarter. Outputs of overlapping tiles are averaged, with weights that
    decrease towards a tile's border, so that no seam is visible. The network sees nothing beyond its tile, so the
    result differs slightly from that of the whole image.
    """
    height, width = x.shape[-2:]
    window = tile_weights(min(side, height), x)[:, None] * tile_weights(min(side, width), x)  # (side, side)
    total: Tensor | None = None
    weights = x.new_zeros(height, width)
    for top, left in product(tile_starts(height, side), tile_starts(width, side)):
        tile = (..., slice(top, top + side), slice(left, left + side))
        output = network(x[tile], **{name: values[tile] for name, values in maps.items()})  # (B, C, side, side)
        if total is None:
            total = x.new_zeros(*output.shape[:2], height, width)  # (B, C, H, W)
        total[tile] += window * output
        weights[tile] += window
    assert total is not None
    return total / weights


def tile_starts(length: int, side: int) -> list[int]:
    """First pixels of the evenly spaced tiles that cover `length`."""
    if side >= length:
        return [0]
    count = math.ceil((length - side) / (side - side // 4)) + 1
    return [round(index * (length - side) / (count - 1)) for index in range(count)]


def tile_weights(side: int, like: Tensor) -> Tensor:
    """Weights (side,) that increase linearly over a quarter of the tile from either border."""
    distance = torch.arange(side, device=like.device, dtype=like.dtype) + 1  # (side,)
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(1, side // 4))  # (side,)
