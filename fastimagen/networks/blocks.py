"""Residual blocks and the levels of the U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..network_config import UNetConfig
from .attention import Context, CrossAttention, TransformerBlock, to_map, to_tokens
from .convolution import Conv2d, PointwiseConv, convolutions_add_bias
from .layers import SKIP_SCALE, Film, GroupNormSiLU, ResidualGroupNormSiLU


class ResBlock(nn.Module):
    """norm, SiLU, conv; cross-attention; norm modulated by time and text (FiLM), SiLU, conv; residual connection.

    x (B, I, H, W), or x and a skip behind it with I channels together, and vector (B, T) -> (B, O, H, W).
    Cross-attention is optional.
    """

    def __init__(
        self, config: UNetConfig, dim_in: int, dim_out: int, time_dim: int, cross: CrossAttention | None = None
    ) -> None:
        super().__init__()
        self.norm1 = ResidualGroupNormSiLU(dim_in, config.groups)
        self.conv1 = Conv2d(dim_in, dim_out, 3, padding=1)
        self.cross_attention = cross
        self.embedding_to_film = Film(time_dim, 2 * dim_out)
        self.norm2 = GroupNormSiLU(dim_out, config.groups)
        self.conv2 = Conv2d(dim_out, dim_out, 3, padding=1, zero_init=config.zero_init)
        self.shortcut = PointwiseConv(dim_in, dim_out) if dim_in != dim_out else None

    def forward(self, x: Tensor, vector: Tensor, context: Context, skip: Tensor | None = None) -> Tensor:
        plain = convolutions_add_bias(x)  # then neither is the skip read apart: one product is faster on a CPU than two
        if skip is not None and plain:
            x, skip = torch.cat([x, skip * SKIP_SCALE], dim=1), None  # (B, I, H, W)
        h, x, skip = self.norm1(x, skip)  # (B, I, H, W), and the residual path
        film = self.embedding_to_film(vector, add_bias=plain)  # (B, 2 O)
        film_bias = None if plain else self.embedding_to_film.bias
        if self.cross_attention is not None:
            h = self.conv1(h)  # (B, O, H, W)
            h = h + to_map(self.cross_attention(to_tokens(h), context), h)  # (B, O, H, W)
            h = self.norm2(h, film, film_bias)
        else:
            h = self.conv1(h, add_bias=plain)  # (B, O, H, W)
            h = self.norm2(h, film, film_bias, None if plain else self.conv1.bias)
        h = self.conv2(h, add_bias=plain)  # (B, O, H, W)
        if self.shortcut is None:
            return ops.add_residual(h, x, None if plain else self.conv2.bias)
        x = self.shortcut(x, skip, skip_scale=SKIP_SCALE, add_bias=plain)  # (B, O, H, W)
        return ops.add_residual(h, x) if plain else ops.add_residual(h, x, self.conv2.bias, self.shortcut.bias)


class Level(nn.Module):
    """The blocks of one resolution; base class of DownLevel and UpLevel. `before` and `after` change the resolution.

    Each block has a vector (B, T) of its own.
    """

    def __init__(
        self,
        blocks: list[ResBlock],
        transformer: TransformerBlock | None,
        before: nn.Module | None,
        after: nn.Module | None,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.blocks = nn.ModuleList(blocks)
        self.transformer = transformer


class DownLevel(Level):
    """x (B, I, H, W) -> x (B, O, H', W') and skips: the outputs of all blocks but the first, and of the level."""

    def forward(self, x: Tensor, vectors: list[Tensor], context: Context) -> tuple[Tensor, list[Tensor]]:
        skips = []
        if self.before is not None:
            x = self.before(x)
        for index, (block, vector) in enumerate(zip(self.blocks, vectors, strict=True)):
            x = block(x, vector, context)
            if index:
                skips.append(x)
        if self.transformer is not None:
            x = self.transformer(x, context)
        skips.append(x)
        return (x if self.after is None else self.after(x)), skips


class UpLevel(Level):
    """x (B, I, H, W) and the skips of the DownLevel at the same resolution -> (B, O, H', W')."""

    def forward(self, x: Tensor, vectors: list[Tensor], context: Context, skips: list[Tensor]) -> Tensor:
        for block, vector, skip in zip(self.blocks, vectors, reversed(skips), strict=True):
            x = block(x, vector, context, skip)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return x if self.after is None else self.after(x)
