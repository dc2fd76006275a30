"""The U-Net of every stage: base and super-resolution, regular and Efficient (Imagen, section 2.5 and appendix B)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..network_config import UNetConfig
from ..text.embeddings import TextEmbeddings
from .attention import Context, CrossAttention, SelfAttention, TextAttention, TransformerBlock, to_map, to_tokens
from .blocks import DownLevel, ResBlock, UpLevel
from .conditioning import TextConditioning, TextState, TimeEmbedding
from .convolution import Conv2d, OutputConv
from .layers import Downsample, MultiScaleStem, ParallelConv, Upsample, positional_encoding
from .network import Network

NUM_FREQS = 3
"""Frequencies of the positional encoding: half a period over the image, one, and two."""


class UNet(Network):
    """Denoising U-Net of one stage.

    Raises ValueError if the inputs of a call do not fit the configuration.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self._time_dim = config.dim * 4 * (2 if config.lowres else 1)  # as in imagen-pytorch and MinImagen
        self._num_slots = 0
        patch_channels = config.channels * config.stem_stride**2
        has_extra_block = config.full_resolution == "extra_block"

        self.time_embedding = TimeEmbedding(config, self._time_dim)
        self.lowres_time_embedding = TimeEmbedding(config, self._time_dim) if config.lowres else None
        self.text = self._text_conditioning() if config.text_dim else None
        self.norm_cond = nn.LayerNorm(config.cond_dim or config.dim)

        stem_channels = patch_channels * (2 if config.lowres else 1)
        self.stem = MultiScaleStem(stem_channels, config.dim, config.stem_kernels)
        self.positional_projection = Conv2d(4 * NUM_FREQS, config.dim, 1) if config.positional_encoding else None
        self.full_resolution_block = self._block(config.dim, config.dim) if has_extra_block else None

        levels = range(len(config.dim_mults))
        downs = [self._down_level(level) for level in levels]
        middle = config.dim * config.dim_mults[-1]
        self.middle1 = self._block(middle, middle, self._cross(middle))
        self.middle_attention = SelfAttention(config, middle, None) if config.middle_attention else None
        self.middle2 = self._block(middle, middle, self._cross(middle))
        ups = [self._up_level(level) for level in reversed(levels)]
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)

        final = config.dim if config.downsample_first else config.dim * config.dim_mults[0]
        self.final_block = self._block(final + (config.dim if has_extra_block else 0), config.dim)
        lowres_channels = patch_channels if has_extra_block and config.lowres else 0
        self.final_conv = OutputConv(config.dim + lowres_channels, patch_channels, zero_init=config.zero_init)
        self._num_blocks = sum(isinstance(module, ResBlock) for module in self.modules())

    # ---- construction

    def _text_conditioning(self) -> TextConditioning:
        config = self.config
        return TextConditioning(
            config,
            config.cond_dim or config.dim,
            self._time_dim,
            pooling=(config.heads, config.head_dim) if config.text_pooling == "attention" else None,
            pad_with_null=config.text_padding == "null",
        )

    def _level_dims(self, level: int) -> tuple[int, int]:
        """Channels before and after a level, in the order of going down."""
        dims = (self.config.dim, *(self.config.dim * mult for mult in self.config.dim_mults))
        return dims[level], dims[level + 1]

    def _down_level(self, level: int) -> DownLevel:
        """Efficient U-Nets change resolution before the blocks of a level, the others after them."""
        config, (dim_in, dim_out) = self.config, self._level_dims(level)
        before: nn.Module | None = None
        after: nn.Module | None = None
        if config.downsample_first:
            dim, before = dim_out, Downsample(dim_in, dim_out)
        else:
            is_last = level == len(config.dim_mults) - 1
            dim, after = dim_in, (ParallelConv if is_last else Downsample)(dim_in, dim_out)
        return DownLevel(*self._blocks(level, dim, dim), before, after)

    def _up_level(self, level: int) -> UpLevel:
        """The counterpart of `_down_level`: the resolution changes after the blocks."""
        config, (dim_in, dim_out) = self.config, self._level_dims(level)
        skip = dim_out if config.downsample_first else dim_in
        after = Upsample(dim_out, dim_in) if config.downsample_first or level else None
        return UpLevel(*self._blocks(level, dim_out + skip, dim_out), None, after)

    def _blocks(self, level: int, dim_in: int, dim_out: int) -> tuple[list[ResBlock], TransformerBlock | None]:
        """The residual blocks of a level, the first with cross-attention, and its transformer block."""
        config = self.config
        cross = self._cross(dim_out) if config.per_level(config.cross_attention)[level] else None
        count = config.per_level(config.num_blocks)[level] + 1
        blocks = [self._block(dim_in, dim_out, cross if index == 0 else None) for index in range(count)]
        if not config.per_level(config.self_attention)[level]:
            return blocks, None
        return blocks, TransformerBlock(config, dim_out, self._slot() if config.text_in_self_attention else None)

    def _block(self, dim_in: int, dim_out: int, cross: CrossAttention | None = None) -> ResBlock:
        return ResBlock(self.config, dim_in, dim_out, self._time_dim, cross)

    def _cross(self, dim: int) -> CrossAttention:
        return CrossAttention(self.config, dim, self._slot())

    def _slot(self) -> int | None:
        """The next index in TextState.kv; None without text."""
        if not self.config.text_dim:
            return None
        self._num_slots += 1
        return self._num_slots - 1

    # ---- calls

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextState:
        """Everything that depends on text and not on time. keep_text (B,) bool: False drops a caption."""
        self.check_text(text)
        assert self.text is not None
        tokens, lengths, vector = self.text(text, keep_text)
        tokens = self.norm_cond(tokens)  # (B, L, K)
        readers: dict[int, TextAttention] = {}
        for module in self.modules():
            if isinstance(module, TextAttention) and module.slot is not None:
                readers[module.slot] = module
        kv = [readers[slot].project_text(tokens) for slot in range(len(readers))]  # 2 x (B, L, A_kv, D) each
        return TextState(vector, lengths, tuple(kv))

    def denoise(
        self, x: Tensor, time: Tensor, text: TextState | None, lowres: Tensor | None, lowres_time: Tensor | None
    ) -> Tensor:
        vector, tokens = self.time_embedding(time)  # (B, T), (B, R, K)
        if lowres is not None:
            assert self.lowres_time_embedding is not None
            lowres_vector, lowres_tokens = self.lowres_time_embedding(lowres_time)
            vector = vector + lowres_vector
            tokens = torch.cat([tokens, lowres_tokens], dim=1)  # (B, 2 R, K)
            x = torch.cat([x, lowres], dim=1)  # (B, 2 C, H, W)
        if text is not None:
            vector = vector + text.vector
        context = Context(self.norm_cond(tokens), text.lengths if text else None, text.kv if text else ())
        vector = F.silu(vector)  # (B, T): every block modulates from silu(vector)
        # One vector per block: their gradients are added in one sum and not one after the other.
        vectors = deque(vector.expand(self._num_blocks, -1, -1).unbind())  # (B, T) each

        x = x.to(self.final_conv.weight.dtype)
        patches = F.pixel_unshuffle(x, self.config.stem_stride)  # (B, C P P, H / P, W / P) for patch side P
        patches = patches.contiguous(memory_format=torch.channels_last)
        x = self.stem(patches)  # (B, dim, H / P, W / P)
        if self.positional_projection is not None:
            x = x + self.positional_projection(positional_encoding(x.shape[2], x.shape[3], NUM_FREQS, x))
        full_resolution = None
        if self.full_resolution_block is not None:
            x = full_resolution = self.full_resolution_block(x, vectors.popleft(), context)
        skips = []
        for index, level in enumerate(self.downs):
            assert isinstance(level, DownLevel)
            level_vectors = [vectors.popleft() for _ in level.blocks]
            x, level_skips = self.run_level(index, level, x, level_vectors, context)
            skips.append(level_skips)
        x = self.middle1(x, vectors.popleft(), context)
        if self.middle_attention is not None:
            x = x + to_map(self.middle_attention(to_tokens(x), context), x)
        x = self.middle2(x, vectors.popleft(), context)
        for index, level in enumerate(self.ups):
            assert isinstance(level, UpLevel)
            level_vectors = [vectors.popleft() for _ in level.blocks]
            x = self.run_level(len(self.ups) - 1 - index, level, x, level_vectors, context, skips.pop())
        x = self.final_block(x, vectors.popleft(), context, full_resolution)  # (B, dim, H / P, W / P)
        has_lowres = full_resolution is not None and lowres is not None
        x = self.final_conv(x, patches[:, patches.shape[1] // 2 :] if has_lowres else None)  # (B, C P P, H / P, W / P)
        return F.pixel_shuffle(x, self.config.stem_stride)  # (B, C, H, W)
