"""Attention modules of the U-Net; all arithmetic over keys is ops.attention.

Letters: B batch, N image tokens (H * W), L text tokens, R time tokens, C channels, H heads, D channels per head,
K width of the conditioning tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..config import UNetConfig

QK_SCALE = 8.0  # logit scale of l2-normalised queries and keys, times the learned scales per channel


@dataclass(frozen=True)
class Context:
    """What blocks are conditioned on beside the time vector.

    time_tokens (B, R, K); text_lengths (B,), or None where all text tokens count; text_kv: keys and values of the
    text for every attention that reads it, by its slot, empty without text. They do not depend on time, so a sampler
    computes them once for all steps.
    """

    time_tokens: Tensor
    text_lengths: Tensor | None
    text_kv: tuple[tuple[Tensor, Tensor], ...]


class _Heads(nn.Module):
    """What both attentions share: the norms around, queries, output, and optional q/k normalisation."""

    def __init__(self, config: UNetConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, config.head_dim
        inner = heads * config.head_dim
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.norm_out = nn.LayerNorm(dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, config.head_dim))
        self.qk_scales = nn.Parameter(torch.ones(2, config.head_dim)) if config.qk_norm else None
        if config.zero_init:
            nn.init.zeros_(self.norm_out.weight)

    def attend(self, x: Tensor, **sources: Tensor | None) -> Tensor:
        """x (B, N, C) already normalised -> (B, N, C)."""
        q = self.to_q(x).unflatten(-1, (self.heads, self.head_dim))  # (B, N, H, D)
        normalise = (
            {} if self.qk_scales is None else {"qk_scales": (self.qk_scales[0], self.qk_scales[1]), "scale": QK_SCALE}
        )
        out = ops.attention(q, null_k=self.null_kv[0], null_v=self.null_kv[1], **sources, **normalise)
        return self.norm_out(self.to_out(out.flatten(2)))


class SelfAttention(_Heads):
    """Multi-query self-attention with a learned null key, and the text as further keys where the config says so."""

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__(config, dim, config.heads)
        self.to_kv = nn.Linear(dim, 2 * config.head_dim, bias=False)
        self.slot = slot
        if slot is not None:
            cond_dim = config.cond_dim or config.dim
            self.text_to_kv = nn.Sequential(nn.LayerNorm(cond_dim), nn.Linear(cond_dim, 2 * config.head_dim))

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, 1, D) of text tokens (B, L, K)."""
        return self.text_to_kv(tokens).unflatten(-1, (2, 1, self.head_dim)).unbind(2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(x).unflatten(-1, (2, 1, self.head_dim)).unbind(2)  # 2 x (B, N, 1, D)
        if self.slot is None or not context.text_kv:
            return self.attend(x, k=k, v=v)
        text_k, text_v = context.text_kv[self.slot]
        return self.attend(x, k=k, v=v, context_k=text_k, context_v=text_v, context_lengths=context.text_lengths)


class CrossAttention(_Heads):
    """Multi-head attention from image tokens to time tokens and text, with a learned null key."""

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__(config, dim, config.cross_heads or config.heads)
        self.to_kv = nn.Linear(config.cond_dim or config.dim, 2 * self.heads * self.head_dim, bias=False)
        self.slot = slot

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, H, D) of conditioning tokens (B, L, K)."""
        return self.to_kv(tokens).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        k, v = self.project_text(context.time_tokens)  # 2 x (B, R, H, D)
        if self.slot is None or not context.text_kv:
            return self.attend(self.norm(x), k=k, v=v)
        text_k, text_v = context.text_kv[self.slot]
        return self.attend(
            self.norm(x), k=k, v=v, context_k=text_k, context_v=text_v, context_lengths=context.text_lengths
        )


class TransformerBlock(nn.Module):
    """Self-attention and channel feed-forward, each residual, on a feature map (B, C, H, W)."""

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__()
        self.attention = SelfAttention(config, dim, slot)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim, bias=False),
            nn.Linear(dim, 2 * dim, bias=False),
            nn.GELU(),
            nn.LayerNorm(2 * dim, bias=False),
            nn.Linear(2 * dim, dim, bias=False),
        )
        if config.zero_init:
            nn.init.zeros_(self.feed_forward[-1].weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = to_tokens(x)  # (B, N, C)
        tokens = tokens + self.attention(tokens, context)
        tokens = tokens + self.feed_forward(tokens)
        return to_map(tokens, x)


class AttentionPooling(nn.Module):
    """Text tokens (B, L, K) -> (B, K): one learned query per head over the real tokens (Imagen, section 2.3)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Parameter(torch.randn(heads, head_dim))
        self.norm = nn.LayerNorm(dim)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        k, v = self.to_kv(self.norm(tokens)).unflatten(-1, (2, -1, self.head_dim)).unbind(2)  # 2 x (B, L, H, D)
        query = self.query.expand(len(tokens), 1, -1, -1).to(k.dtype)
        pooled = ops.attention(query, context_k=k, context_v=v, context_lengths=lengths)  # (B, 1, H, D)
        return self.to_out(pooled.flatten(1))  # (B, K)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view when x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) channels_last, height and width taken from `like`."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
