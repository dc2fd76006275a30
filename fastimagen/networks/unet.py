"""The U-Net of every stage: base and super-resolution, regular and Efficient (Imagen, sections 2.3, 2.4, appendix B).

Letters: B batch, C channels, H height, W width, T time width, K conditioning width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import UNetConfig
from ..text.embeddings import TextEmbeddings
from .attention import AttentionPooling, Context, CrossAttention, SelfAttention, TransformerBlock, to_map, to_tokens
from .convolution import Conv2d
from .layers import MultiScaleStem, Downsample, GroupNormSiLU, Sinusoidal, Upsample, ParallelConv

NUM_FREQS = 3  # waves that show a pixel's place: half a period over the image, a whole one, two
SKIP_SCALE = 2**-0.5  # Imagen, appendix B.1: skip connections are scaled


@dataclass(frozen=True)
class TextState:
    """Text as the U-Net uses it, the same in every sampling step: made by `UNet.encode_text`.

    vector (B, T) joins the time embedding; lengths (B,) or None; kv: (keys, values) per attention that reads text.
    """

    vector: Tensor
    lengths: Tensor | None
    kv: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.vector)


class TimeEmbedding(nn.Module):
    """A number per sample (B,) -> vector (B, T) and tokens (B, R, K)."""

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__()
        self.tokens, self.cond_dim = config.time_tokens, config.cond_dim or config.dim
        self.hidden = nn.Sequential(Sinusoidal(config.dim), nn.Linear(config.dim, time_dim), nn.SiLU())
        self.to_vector = nn.Linear(time_dim, time_dim)
        self.to_tokens = nn.Linear(time_dim, self.cond_dim * self.tokens)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.hidden[0](time).to(self.to_vector.weight.dtype)  # the angles stay fp32 in a bf16 network
        hidden = self.hidden[2](self.hidden[1](embedding))  # (B, T)
        return self.to_vector(hidden), self.to_tokens(hidden).unflatten(-1, (self.tokens, self.cond_dim))


class TextConditioning(nn.Module):
    """Text embeddings -> conditioning tokens (B, L, K) with lengths, and a vector (B, T).

    A dropped caption becomes learned null tokens and a learned null vector. With text_padding "null" there are always
    max_text_length tokens, the null tokens standing in for padding too (MinImagen); with "none" a dropped caption is
    one null token.
    """

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__()
        cond_dim = config.cond_dim or config.dim
        self.padding, self.max_length, self.pooling = config.text_padding, config.max_text_length, config.text_pooling
        self.project = nn.Linear(config.text_dim, cond_dim)
        self.null_tokens = nn.Parameter(torch.randn(1, self.max_length if self.padding == "null" else 1, cond_dim))
        self.null_vector = nn.Parameter(torch.randn(1, time_dim))
        self.pool = AttentionPooling(cond_dim, config.heads, config.head_dim) if self.pooling == "attention" else None
        self.pooled_embedding = nn.Sequential(
            nn.LayerNorm(cond_dim), nn.Linear(cond_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )

    def forward(self, text: TextEmbeddings, keep: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        if text.embeds.shape[1] > self.max_length:
            raise ValueError(f"text of {text.embeds.shape[1]} tokens, but max_text_length is {self.max_length}")
        embeds = text.embeds.to(self.project.weight.dtype)  # (B, L, D)
        embeds = embeds.masked_fill(~text.mask[..., None], 0)  # padding may hold anything: NaN * 0 would be NaN
        keep = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device) if keep is None else keep
        tokens = self.project(embeds)  # (B, L, K)
        if self.padding == "null":
            missing = self.max_length - tokens.shape[1]
            visible = F.pad(text.mask & keep[:, None], (0, missing))  # (B, max_length)
            tokens = torch.where(visible[..., None], F.pad(tokens, (0, 0, 0, missing)), self.null_tokens)
            lengths = None
            mean = tokens.mean(dim=1)
        else:
            first = torch.where(keep[:, None, None], tokens[:, :1], self.null_tokens)  # (B, 1, K)
            tokens = torch.cat([first, tokens[:, 1:]], dim=1)
            lengths = torch.where(keep, text.lengths.to(keep.device), 1)  # (B,)
            weight = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).to(tokens.dtype)
            mean = torch.einsum("blk,bl->bk", tokens, weight) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = mean if self.pool is None else self.pool(tokens, lengths)  # (B, K)
        vector = torch.where(keep[:, None], self.pooled_embedding(pooled), self.null_vector)  # (B, T)
        return tokens, lengths, vector


class ResBlock(nn.Module):
    """norm, SiLU, conv; cross-attention where asked; norm modulated by time and text, SiLU, conv; residual."""

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
        h = self.conv1(self.norm1(x))  # (B, C', H, W)
        if self.cross_attention is not None:
            h = h + to_map(self.cross_attention(to_tokens(h), context), h)
        scale, shift = self.embedding_to_film(vector).chunk(2, dim=1)  # 2 x (B, C')
        h = self.conv2(self.norm2(h, scale, shift))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Level(nn.Module):
    """One resolution: a block with cross-attention, further blocks, a transformer block. Base of Down and Up."""

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
    """Going down: every block after the first leaves a skip, and so does the end of the level."""

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
    """Going up: every block reads the skip that its mirror image left."""

    def forward(self, x: Tensor, vector: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(torch.cat([x, skip * SKIP_SCALE], dim=1), vector, context)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return x if self.after is None else self.after(x)


def positional_encoding(x: Tensor) -> Tensor:
    """Sines and cosines of every pixel's row and column, octave by octave: (1, 4 * NUM_FREQS, H, W) for x
    (B, C, H, W)."""
    waves = []
    for axis, side in enumerate(x.shape[-2:]):
        octaves = 2.0 ** torch.arange(NUM_FREQS, device=x.device)
        angle = torch.linspace(0, math.pi, side, device=x.device)[:, None] * octaves  # (side, NUM_FREQS)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2 * NUM_FREQS, side)
        waves.append((wave[:, :, None] if axis == 0 else wave[:, None, :]).expand(-1, *x.shape[-2:]))
    return torch.cat(waves)[None].to(x.dtype)


class UNet(nn.Module):
    """Denoising U-Net of one stage.

    Raises ValueError when a call's inputs do not fit the configuration.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        time_dim = config.dim * 4 * (2 if config.lowres else 1)
        widths = [config.dim, *(config.dim * mult for mult in config.dim_mults)]
        patch = config.stem_stride**2
        self._slots = 0

        self.time_embedding = TimeEmbedding(config, time_dim)
        self.lowres_time_embedding = TimeEmbedding(config, time_dim) if config.lowres else None
        self.text = TextConditioning(config, time_dim) if config.text_dim else None
        self.norm_cond = nn.LayerNorm(config.cond_dim or config.dim)

        self.stem = MultiScaleStem(
            config.channels * patch * (2 if config.lowres else 1), config.dim, config.stem_kernels
        )
        self.positional_projection = Conv2d(4 * NUM_FREQS, config.dim, 1) if config.positional_encoding else None
        refined = config.full_resolution == "extra_block"
        self.full_resolution_block = ResBlock(config, config.dim, config.dim, time_dim) if refined else None

        blocks, self_attention, cross_attention = map(
            config.per_level, ("num_blocks", "self_attention", "cross_attention")
        )
        last = len(config.dim_mults) - 1
        downs, ups = [], []
        for level, (dim_in, dim_out) in enumerate(zip(widths[:-1], widths[1:])):
            first = config.downsample_first
            dim = dim_out if first else dim_in
            before = Downsample(dim_in, dim_out) if first else None
            after = None if first else (Downsample if level < last else ParallelConv)(dim_in, dim_out)
            cross = self._cross(dim) if cross_attention[level] else None
            chain = [ResBlock(config, dim, dim, time_dim, cross if i == 0 else None) for i in range(blocks[level] + 1)]
            downs.append(DownLevel(chain, self._transformer(dim) if self_attention[level] else None, before, after))
        middle = widths[-1]
        self.middle1 = ResBlock(config, middle, middle, time_dim, self._cross(middle))
        self.middle_attention = SelfAttention(config, middle, None) if config.middle_attention else None
        self.middle2 = ResBlock(config, middle, middle, time_dim, self._cross(middle))
        for level in reversed(range(last + 1)):
            dim_in, dim_out = widths[level], widths[level + 1]
            skip = dim_out if config.downsample_first else dim_in
            after = Upsample(dim_out, dim_in) if config.downsample_first or level else None
            cross = self._cross(dim_out) if cross_attention[level] else None
            chain = [
                ResBlock(config, dim_out + skip, dim_out, time_dim, cross if i == 0 else None)
                for i in range(blocks[level] + 1)
            ]
            ups.append(UpLevel(chain, self._transformer(dim_out) if self_attention[level] else None, None, after))
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)

        final = (config.dim if config.downsample_first else widths[1]) + (config.dim if refined else 0)
        self.final_block = ResBlock(config, final, config.dim, time_dim)
        extra = config.channels * patch if refined and config.lowres else 0
        self.final_conv = Conv2d(config.dim + extra, config.channels * patch, 3, padding=1, zero_init=config.zero_init)

    def _slot(self) -> int | None:
        """The next place in TextState.kv, None without text."""
        if not self.config.text_dim:
            return None
        self._slots += 1
        return self._slots - 1

    def _cross(self, dim: int) -> CrossAttention:
        return CrossAttention(self.config, dim, self._slot())

    def _transformer(self, dim: int) -> TransformerBlock:
        return TransformerBlock(self.config, dim, self._slot() if self.config.text_in_self_attention else None)

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextState:
        """Everything about the text that does not change with time. keep_text (B,) bool: False drops the caption."""
        if self.text is None:
            raise ValueError("this U-Net has no text path (text_dim is not set), but text was given")
        if text.embeds.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"text embeddings are {text.embeds.shape[-1]} wide, but the U-Net was built for "
                f"text_dim {self.config.text_dim}"
            )
        tokens, lengths, vector = self.text(text, keep_text)
        tokens = self.norm_cond(tokens)  # (B, L, K)
        readers = [m for m in self.modules() if isinstance(m, (SelfAttention, CrossAttention)) and m.slot is not None]
        readers.sort(key=lambda module: module.slot)
        return TextState(vector, lengths, tuple(module.project_text(tokens) for module in readers))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        *,
        text: TextEmbeddings | TextState | None = None,
        lowres: Tensor | None = None,
        lowres_time: Tensor | None = None,
        keep_text: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) at `time` (B,) -> output (B, C, H, W).

        time is the number the sinusoidal embedding sees: the step of a discrete schedule or 1000 t. lowres
        (B, C, H, W) is already resized, in [-1, 1] and noised at lowres_time (B,). keep_text (B,) bool: False means
        the caption is dropped. text=None is a call without any text path.
        """
        self._check(x, text, keep_text, lowres, lowres_time)
        vector, tokens = self.time_embedding(time)
        if lowres is not None:
            lowres_vector, lowres_tokens = self.lowres_time_embedding(lowres_time)
            vector, tokens = vector + lowres_vector, torch.cat([tokens, lowres_tokens], dim=1)  # (B, 2R, K)
            x = torch.cat([x, lowres], dim=1)  # (B, 2C, H, W)
        state = self.encode_text(text, keep_text) if isinstance(text, TextEmbeddings) else text
        if state is not None:
            vector = vector + state.vector
        context = Context(self.norm_cond(tokens), state.lengths if state else None, state.kv if state else ())
        vector = F.silu(vector)  # (B, T): every block modulates from silu(vector)

        x = x.to(self.final_conv.weight.dtype)
        shown = F.pixel_unshuffle(x, self.config.stem_stride).contiguous(memory_format=torch.channels_last)
        x = self.stem(shown)
        if self.positional_projection is not None:
            x = x + self.positional_projection(positional_encoding(x))
        if self.full_resolution_block is not None:
            x = self.full_resolution_block(x, vector, context)
        full = x
        skips = []
        for index, level in enumerate(self.downs):
            x, left = self._run(index, level, x, vector, context)
            skips.append(left)
        x = self.middle1(x, vector, context)
        if self.middle_attention is not None:
            x = x + to_map(self.middle_attention(to_tokens(x), context), x)
        x = self.middle2(x, vector, context)
        for index, level in enumerate(self.ups):
            x = self._run(len(self.ups) - 1 - index, level, x, vector, context, skips.pop())
        if self.full_resolution_block is not None:
            x = torch.cat([x, full * SKIP_SCALE], dim=1)
        x = self.final_block(x, vector, context)
        if self.full_resolution_block is not None and lowres is not None:
            x = torch.cat([x, shown[:, shown.shape[1] // 2 :]], dim=1)  # the low-res half of the stem's input
        return F.pixel_shuffle(self.final_conv(x), self.config.stem_stride)  # (B, C, H, W)

    def _run(self, index: int, level: Level, *inputs: object) -> object:
        if index in self.config.checkpoint_levels and self.training:
            return checkpoint(level, *inputs, use_reentrant=False)
        return level(*inputs)

    def _check(
        self,
        x: Tensor,
        text: TextEmbeddings | TextState | None,
        keep_text: Tensor | None,
        lowres: Tensor | None,
        lowres_time: Tensor | None,
    ) -> None:
        if x.shape[1] != self.config.channels:
            raise ValueError(f"images have {x.shape[1]} channels, but the U-Net was built for {self.config.channels}")
        if text is not None and len(text) != len(x):
            raise ValueError(f"{len(text)} texts for {len(x)} images")
        if keep_text is not None and not isinstance(text, TextEmbeddings):
            raise ValueError("keep_text goes with TextEmbeddings: a TextState has its captions dropped already")
        if self.config.lowres != (lowres is not None):
            raise ValueError(
                "this U-Net needs lowres and lowres_time"
                if self.config.lowres
                else "this U-Net is not built for a low-resolution image, but lowres was given"
            )
        if (lowres is None) != (lowres_time is None):
            raise ValueError("lowres and lowres_time go together")
        if lowres is not None and lowres.shape != x.shape:
            raise ValueError(f"lowres must be resized to x: {tuple(lowres.shape)} against {tuple(x.shape)}")
        if x.shape[-1] % self.config.stride or x.shape[-2] % self.config.stride:
            raise ValueError(
                f"image sides {tuple(x.shape[-2:])} must be multiples of {self.config.stride}, the total "
                f"stride of this U-Net"
            )
