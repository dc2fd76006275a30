"""Residual blocks and the levels of the U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import UNetConfig
from .attention import Context, CrossAttention, TransformerBlock, to_map, to_tokens
from .convolution import Conv2d
from .layers import GroupNormSiLU

SKIP_SCALE = 2**-0.5
"""Skip connections are scaled by 1 / sqrt(2) (Imagen, appendix B.1)."""


class ResBlock(nn.Module):
    """norm, SiLU, conv; cross-attention; norm modulated by time and text (FiLM), SiLU, conv; residual connection.

    x (B, I, H, W), vector (B, T) -> (B, O, H, W). Cross-attention is optional.
    """

    def __init__(
        self, config: UNetConfig, dim_in: int, dim_out: int, time_dim: int, cross: CrossAttention | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(dim_in, config.groups)
        self.conv1 = Conv2d(dim_in, dim_out, 3, padding=1)
        self.cross_attention = cross
        self.embedding_to_film = nn.Linear(time_dim, 2 * dim_out)
        self.norm2 = GroupNormSiLU(dim_out, config.groups)
        self.conv2 = Conv2d(dim_out, dim_out, 3, padding=1, zero_init=config.zero_init)
        self.shortcut = Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, vector: Tensor, context: Context) -> Tensor:
        h = self.conv1(self.norm1(x))  # (B, O, H, W)
        if self.cross_attention is not None:
            h = h + to_map(self.cross_attention(to_tokens(h), context), h)  # (B, O, H, W)
        scale, shift = self.embedding_to_film(vector).chunk(2, dim=1)  # (B, O) each
        h = self.conv2(self.norm2(h, scale, shift))  # (B, O, H, W)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Level(nn.Module):
    """The blocks of one resolution; base class of DownLevel and UpLevel. `before` and `after` change the resolution."""

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

    def forward(self, x: Tensor, vector: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        skips = []
        if self.before is not None:
            x = self.before(x)
        for index, block in enumerate(self.blocks):
            x = block(x, vector, context)
            if index:
                skips.append(x)
        if self.transformer is not None:
            x = self.transformer(x, context)
        skips.append(x)
        return (x if self.after is None else self.after(x)), skips


class UpLevel(Level):
    """x (B, I, H, W) and the skips of the DownLevel at the same resolution -> (B, O, H', W')."""

    def forward(self, x: Tensor, vector: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = torch.cat([x, skip * SKIP_SCALE], dim=1)  # (B, C + C_skip, H, W)
            x = block(x, vector, context)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return x if self.after is None else self.after(x)
