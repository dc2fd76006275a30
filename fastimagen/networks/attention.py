"""Attention modules of the U-Net; all arithmetic over keys is in ops.attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .. import ops
from ..network_config import UNetConfig

QK_SCALE = 8.0
"""Scale of the logits of l2-normalized queries and keys, as in imagen-pytorch. Cosines alone are too small for a sharp
softmax; the learned scales per channel adapt it."""


@dataclass(frozen=True)
class Context:
    """What blocks are conditioned on besides the time vector.

    time_tokens (B, R, K). text_lengths (B,), or None if all text tokens count. text_kv: keys and values of the text for
    every attention that reads it, by its slot; empty without text. The text's keys and values do not depend on time, so
    a sampler computes them once for all steps.
    """

    time_tokens: Tensor
    text_lengths: Tensor | None
    text_kv: tuple[tuple[Tensor, Tensor], ...]

    def text_sources(self, slot: int | None) -> dict[str, Tensor | None]:
        """The arguments of ops.attention for the text that attention `slot` reads; none without text."""
        if slot is None or not self.text_kv:
            return {}
        text_k, text_v = self.text_kv[slot]
        return {"context_k": text_k, "context_v": text_v, "context_lengths": self.text_lengths}


class TextAttention(nn.Module):
    """The common part of self- and cross-attention: norms, queries, output, null key and optional q/k normalization.

    The learned null key lets a query attend to nothing (as in MinImagen). Subclasses read text through `project_text`
    if `slot` is not None.
    """

    def __init__(self, config: UNetConfig, dim: int, heads: int, slot: int | None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.slot = heads, config.head_dim, slot
        inner = heads * config.head_dim
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.norm_out = nn.LayerNorm(dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, config.head_dim))
        self.qk_scales = nn.Parameter(torch.ones(2, config.head_dim)) if config.qk_norm else None
        if config.zero_init:
            nn.init.zeros_(self.norm_out.weight)

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, A_kv, D), of text tokens (B, L, K)."""
        raise NotImplementedError

    def attend(self, x: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Normalized x (B, N, C) attends to k and v (B, J, A_kv, D), to the text and to the null key: (B, N, C)."""
        q = rearrange(self.to_q(x), "b n (heads d) -> b n heads d", heads=self.heads)  # (B, N, A, D)
        null_k, null_v = ops.halves(rearrange(self.null_kv, "kv d -> (kv d)"), dim=0)  # (D,) each
        qk_scales = None
        if self.qk_scales is not None:
            q_scale, k_scale = self.qk_scales.unbind()  # (D,) each
            qk_scales = (q_scale, k_scale)
        out = ops.attention(
            q,
            k,
            v,
            null_k=null_k,
            null_v=null_v,
            qk_scales=qk_scales,
            scale=None if qk_scales is None else QK_SCALE,
            **context.text_sources(self.slot),
        )
        out = rearrange(out, "b n heads d -> b n (heads d)")  # (B, N, A D)
        return self.norm_out(self.to_out(out))  # (B, N, C)


class SelfAttention(TextAttention):
    """Multi-query self-attention; text tokens are further keys if slot is not None (Imagen, appendix B.1)."""

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__(config, dim, config.heads, slot)
        self.to_kv = nn.Linear(dim, 2 * config.head_dim, bias=False)
        if slot is not None:
            cond_dim = config.cond_dim or config.dim
            self.text_to_kv = nn.Sequential(nn.LayerNorm(cond_dim), nn.Linear(cond_dim, 2 * config.head_dim))

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, 1, D), of text tokens (B, L, K)."""
        return keys_and_values(self.text_to_kv(tokens), heads=1)  # (B, L, 1, D) each

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        x = self.norm(x)
        k, v = keys_and_values(self.to_kv(x), heads=1)  # (B, N, 1, D) each
        return self.attend(x, k, v, context)


class CrossAttention(TextAttention):
    """Multi-head attention from image tokens to time tokens and text (Imagen, section 2.5)."""

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__(config, dim, config.cross_heads or config.heads, slot)
        self.to_kv = nn.Linear(config.cond_dim or config.dim, 2 * self.heads * self.head_dim, bias=False)

    def project_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, A, D), of conditioning tokens (B, L, K)."""
        return keys_and_values(self.to_kv(tokens), self.heads)  # (B, L, A, D) each

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        k, v = self.project_text(context.time_tokens)  # (B, R, A, D) each
        return self.attend(self.norm(x), k, v, context)


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each residual, on a feature map (B, C, H, W).

    The feed-forward network has a second LayerNorm before its output layer, as MinImagen's has.
    """

    def __init__(self, config: UNetConfig, dim: int, slot: int | None) -> None:
        super().__init__()
        self.attention = SelfAttention(config, dim, slot)
        hidden = nn.Linear(dim, 2 * dim, bias=False)
        output = nn.Linear(2 * dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim, bias=False), hidden, nn.GELU(), nn.LayerNorm(2 * dim, bias=False), output
        )
        if config.zero_init:
            nn.init.zeros_(output.weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = to_tokens(x)  # (B, N, C)
        tokens = tokens + self.attention(tokens, context)
        tokens = tokens + self.feed_forward(tokens)
        return to_map(tokens, x)  # (B, C, H, W)


class AttentionPooling(nn.Module):
    """Text tokens (B, L, K) -> (B, K): one learned query per head attends to the real tokens (Imagen, section 2.5)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, head_dim))
        self.norm = nn.LayerNorm(dim)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        k, v = keys_and_values(self.to_kv(self.norm(tokens)), self.heads)  # (B, L, A, D) each
        query = repeat(self.query, "heads d -> b 1 heads d", b=len(tokens)).to(k.dtype)  # (B, 1, A, D)
        pooled = ops.attention(query, context_k=k, context_v=v, context_lengths=lengths)  # (B, 1, A, D)
        return self.to_out(rearrange(pooled, "b 1 heads d -> b (heads d)"))  # (B, K)


def keys_and_values(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The halves of kv (B, J, 2 A_kv D), each (B, J, A_kv, D)."""
    k, v = (rearrange(half, "b j (heads d) -> b j heads d", heads=heads) for half in ops.halves(kv, dim=-1))
    return k, v  # (B, J, A_kv, D) each


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C); a view if x is channels_last."""
    return rearrange(x, "b c h w -> b (h w) c")  # (B, N, C)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W) channels_last, with height and width of `like`."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[2], w=like.shape[3])  # (B, C, H, W)
