"""Time and text, as networks use them: vectors that modulate blocks and tokens that attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..network_config import NetworkConfig, UNetConfig
from ..text.embeddings import TextEmbeddings
from .attention import AttentionPooling
from .layers import Sinusoidal


@dataclass(frozen=True)
class TextState:
    """Encoded text, which does not change from step to step; Network.encode_text computes it.

    vector (B, T) is added to the time embedding; lengths (B,) or None; kv: (keys, values) for every attention that
    reads text; tokens (B, L, C), where they join the image's in the sequence of a transformer.
    """

    vector: Tensor
    lengths: Tensor | None
    kv: tuple[tuple[Tensor, Tensor], ...]
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vector)


class TimeEmbedding(nn.Module):
    """Time (B,) -> vector (B, T) and conditioning tokens (B, R, K)."""

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__()
        self.num_tokens = config.time_tokens
        self.hidden = nn.Sequential(Sinusoidal(config.dim), nn.Linear(config.dim, time_dim), nn.SiLU())
        self.to_vector = nn.Linear(time_dim, time_dim)
        self.to_tokens = nn.Linear(time_dim, (config.cond_dim or config.dim) * self.num_tokens)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        sinusoidal, linear, silu = self.hidden
        embedding = sinusoidal(time).to(self.to_vector.weight.dtype)  # the angles stay fp32 in a bf16 network
        hidden = silu(linear(embedding))  # (B, T)
        tokens = rearrange(self.to_tokens(hidden), "b (r k) -> b r k", r=self.num_tokens)  # (B, R, K)
        return self.to_vector(hidden), tokens


class TextConditioning(nn.Module):
    """Text embeddings (B, L, E) -> conditioning tokens (B, L, K), their lengths, and a vector (B, T).

    A dropped caption becomes learned null tokens and a learned null vector: one null token, or with pad_with_null
    always max_text_length tokens, where null tokens also replace padding (MinImagen). pooling: heads and channels per
    head of the attention that makes the vector; None takes the mean of the tokens.
    """

    def __init__(
        self,
        config: NetworkConfig,
        cond_dim: int,
        time_dim: int,
        *,
        pooling: tuple[int, int] | None,
        pad_with_null: bool = False,
    ) -> None:
        super().__init__()
        assert config.text_dim is not None
        self.pad_with_null, self.max_length = pad_with_null, config.max_text_length
        self.project = nn.Linear(config.text_dim, cond_dim)
        self.null_tokens = nn.Parameter(torch.randn(1, self.max_length if pad_with_null else 1, cond_dim))
        self.null_vector = nn.Parameter(torch.randn(1, time_dim))
        self.pool = AttentionPooling(cond_dim, *pooling) if pooling else None
        self.pooled_embedding = nn.Sequential(
            nn.LayerNorm(cond_dim), nn.Linear(cond_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )

    def forward(self, text: TextEmbeddings, keep: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(tokens, lengths or None, vector). keep (B,) bool: False drops the caption; None keeps all.

        Raises ValueError for captions longer than max_text_length.
        """
        if text.embeds.shape[1] > self.max_length:
            raise ValueError(f"text of {text.embeds.shape[1]} tokens, but max_text_length is {self.max_length}")
        embeds = text.embeds.to(self.project.weight.dtype)  # (B, L, E)
        embeds = embeds.masked_fill(~text.mask[..., None], 0)  # padding may be NaN, and NaN * 0 is NaN
        if keep is None:
            keep = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)  # (B,)
        tokens = self.project(embeds)  # (B, L, K)
        if self.pad_with_null:
            tokens, lengths, mean = self._all_slots(tokens, text.mask & keep[:, None])
        else:
            tokens, lengths, mean = self._real_tokens(tokens, text.lengths, keep)
        pooled = mean if self.pool is None else self.pool(tokens, lengths)  # (B, K)
        vector = torch.where(keep[:, None], self.pooled_embedding(pooled), self.null_vector)  # (B, T)
        return tokens, lengths, vector

    def _all_slots(self, tokens: Tensor, visible: Tensor) -> tuple[Tensor, None, Tensor]:
        """max_text_length tokens, null tokens where `visible` (B, L) is false, and their mean (B, K)."""
        missing = self.max_length - tokens.shape[1]
        visible = F.pad(visible, (0, missing))  # (B, max_text_length)
        tokens = F.pad(tokens, (0, 0, 0, missing))  # (B, max_text_length, K)
        tokens = torch.where(visible[..., None], tokens, self.null_tokens)  # (B, max_text_length, K)
        return tokens, None, tokens.mean(dim=1)

    def _real_tokens(self, tokens: Tensor, lengths: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and lengths with one null token for a dropped caption, and the mean (B, K) of the real tokens."""
        first = torch.where(keep[:, None, None], tokens[:, :1], self.null_tokens)  # (B, 1, K)
        tokens = torch.cat([first, tokens[:, 1:]], dim=1)  # (B, L, K)
        lengths = torch.where(keep, lengths, 1)  # (B,)
        is_real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, L)
        weight = is_real.to(tokens.dtype)
        total = torch.einsum("blk,bl->bk", tokens, weight)  # (B, K)
        return tokens, lengths, total / weight.sum(dim=1, keepdim=True).clamp(min=1)
