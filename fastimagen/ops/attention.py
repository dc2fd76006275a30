"""Attention over image keys, text keys and a learned null key.

Letters: B batch, N queries, S keys, L context keys, H heads, Hkv key heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, null_k: Tensor | None = None,
              null_v: Tensor | None = None, context_k: Tensor | None = None, context_v: Tensor | None = None,
              context_lengths: Tensor | None = None, qk_scales: tuple[Tensor, Tensor] | None = None,
              scale: float | None = None) -> Tensor:
    """Attention over up to three sources of keys at once: a learned null key, context (text), and k.

    q (B, N, H, D); k, v (B, S, Hkv, D) with Hkv in {1, H}, absent in pure cross-attention; null_k, null_v (D,), shared
    by heads, or (Hkv, D); context_k, context_v (B, L, Hkv, D), of which the first context_lengths[b] count (0 allowed,
    None is all). qk_scales = (q_scale, k_scale), each (D,): l2-normalise q and every key, then scale channels.
    Logits are scaled by `scale`, by default D^-0.5. A row without any key gives zeros. Returns (B, N, H, D).
    """
    batch, queries, heads, width = q.shape
    keys, values = [], []
    if null_k is not None:
        keys.append(null_k.expand(batch, 1, -1, width) if null_k.dim() == 2 else null_k.expand(batch, 1, 1, width))
        values.append(null_v.expand(batch, 1, -1, width) if null_v.dim() == 2 else null_v.expand(batch, 1, 1, width))
    if context_k is not None:
        keys.append(context_k)
        values.append(context_v)
    if k is not None:
        keys.append(k)
        values.append(v)
    if not keys:
        raise ValueError("attention needs at least one of k, null_k and context_k")
    kv_heads = max(key.shape[2] for key in keys)
    if kv_heads not in (1, heads):
        raise ValueError(f"attention takes 1 or {heads} key heads for {heads} query heads, got {kv_heads}")
    keys = torch.cat([key.expand(-1, -1, kv_heads, -1).to(q.dtype) for key in keys], dim=1)  # (B, S', Hkv, D)
    values = torch.cat([value.expand(-1, -1, kv_heads, -1).to(q.dtype) for value in values], dim=1)
    if qk_scales is not None:
        q = F.normalize(q, dim=-1) * qk_scales[0].to(q.dtype)
        keys = F.normalize(keys, dim=-1) * qk_scales[1].to(q.dtype)
    mask = None
    if context_lengths is not None:
        mask = _key_mask(context_lengths, keys.shape[1], 0 if null_k is None else 1, context_k.shape[1])
    if kv_heads == 1:  # heads fold into rows: multi-query attention is single-head attention with N * H queries
        q = q.reshape(batch, 1, queries * heads, width)
    else:
        q = q.transpose(1, 2)  # (B, H, N, D)
    out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2),
                                         attn_mask=None if mask is None else mask[:, None, None, :], scale=scale)
    if mask is not None and null_k is None and k is None:
        out = torch.where(mask.any(dim=1)[:, None, None, None], out, 0)
    if kv_heads == 1:
        return out.reshape(batch, queries, heads, width)
    return out.transpose(1, 2)  # (B, N, H, D)


def _key_mask(lengths: Tensor, keys: int, start: int, context: int) -> Tensor:
    """(B, S') bool: False for the context keys beyond each sample's length."""
    position = torch.arange(keys, device=lengths.device) - start
    return (position >= context) | (position < lengths[:, None])
