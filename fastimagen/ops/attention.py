"""Attention over image keys, text keys and a learned null key.

J is the number of keys (of one source, or of all), A the number of query heads, A_kv that of key heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .attention_op import fused
from .dispatch import KERNEL_DTYPES, autocast_dtype, backend, no_xformers, use_triton


class Keys(NamedTuple):
    """All keys of a call, with one dtype and one number of heads; None is an absent source.

    k, v (B, J, A_kv, D); null_k, null_v (D,) or (A_kv, D), in any dtype; context_k, context_v (B, L, A_kv, D);
    lengths (B,).
    """

    k: Tensor | None
    v: Tensor | None
    null_k: Tensor | None
    null_v: Tensor | None
    context_k: Tensor | None
    context_v: Tensor | None
    lengths: Tensor | None


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
    qk_scales: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over up to three sources of keys at once: a learned null key, context (text), and k.

    q (B, N, A, D). k, v (B, J, A_kv, D) with A_kv in {1, A}; absent in pure cross-attention. null_k, null_v (D,),
    shared by all heads, or (A_kv, D). context_k, context_v (B, L, A_kv, D): only the first context_lengths[b] tokens
    are used (0 is allowed, None uses all). qk_scales = (q_scale, k_scale), each (D,): l2-normalizes q and all keys,
    then scales their channels. Logits are multiplied by `scale`, by default D^-0.5. A query without any key gives
    zeros. Returns (B, N, A, D) in q's dtype, or in autocast's. Kernels need D from 16 to 128 in steps of 8; PyTorch
    takes any D. Raises ValueError for arguments that do not fit together.
    """
    keys = Keys(k, v, null_k, null_v, context_k, context_v, context_lengths)
    _check(q, keys)
    q = q.to(autocast_dtype(q) or q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, keys = _prepare(q, keys, qk_scales)
    if backend() == "xformers":
        if reason := _no_xformers_for(q):
            raise ValueError(f'attention with backend "xformers": {reason}')
        return attention_xformers(q, keys, scale)
    # Exact fp32 products do not run on tensor cores, and PyTorch is tuned for the other units. Not measured.
    slower = "float32 is faster there" if q.dtype == torch.float32 else None
    if use_triton("attention", q, _unsupported(q, scale), slower):
        return fused(q, *keys, scale)
    return attention_reference(q, keys, scale)


def attention_reference(q: Tensor, keys: Keys, scale: float) -> Tensor:
    """`attention` in plain PyTorch, of the keys that `_prepare` returns.

    If all heads share one key head, they fold into rows: multi-query attention is single-head attention with N A
    queries, and SDPA needs no expanded keys.
    """
    batch, queries, heads, width = q.shape
    k, v, mask = _concatenated(q, keys)  # (B, J, A_kv, D) twice, (B, J)
    if k.shape[1] == 0:
        return torch.zeros_like(q) * q
    if k.shape[2] == 1:
        q = rearrange(q, "b n a d -> b (n a) 1 d")  # (B, N A, 1, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, 1, N A, D) or (B, A, N, D); (B, A_kv, J, D) twice
    attn_mask = None if mask is None else _never_empty(mask)[:, None, None, :]  # (B, 1, 1, J)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    out = out.transpose(1, 2)  # (B, N A, 1, D) or (B, N, A, D)
    if mask is not None and keys.null_k is None and keys.k is None:
        out = torch.where(mask.any(dim=1)[:, None, None, None], out, 0)
    return out.reshape(batch, queries, heads, width)  # (B, N, A, D)


def attention_xformers(q: Tensor, keys: Keys, scale: float) -> Tensor:
    """`attention` by xFormers, of the keys that `_prepare` returns. xFormers' layout is (B, tokens, heads, D)."""
    from xformers.ops import memory_efficient_attention

    batch, queries, heads, width = q.shape
    k, v, mask = _concatenated(q, keys)  # (B, J, A_kv, D) twice, (B, J)
    if k.shape[1] == 0:
        return torch.zeros_like(q) * q
    if k.shape[2] == 1:
        q = rearrange(q, "b n a d -> b (n a) 1 d")  # (B, N A, 1, D)
    bias = None
    if mask is not None:
        count = mask.shape[1]
        # xFormers needs aligned rows of the bias: a slice of rows padded to a multiple of 8.
        bias = q.new_zeros(batch, 1, 1, -(-count // 8) * 8)[..., :count]  # (B, 1, 1, J)
        bias.masked_fill_(~_never_empty(mask)[:, None, None], float("-inf"))
        bias = bias.expand(batch, q.shape[2], q.shape[1], count)  # (B, 1, N A, J) or (B, A, N, J)
    out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    if mask is not None:
        out = torch.where(mask.any(dim=1)[:, None, None, None], out, 0)
    return out.reshape(batch, queries, heads, width)  # (B, N, A, D)


def _never_empty(mask: Tensor) -> Tensor:
    """The mask (B, J), but all True for a sample without any key, of which the softmax would be NaN."""
    return mask | ~mask.any(dim=1, keepdim=True)


def _no_xformers_for(q: Tensor) -> str | None:
    """Why xFormers cannot take these queries; None if it can."""
    if not q.is_cuda:
        return "xformers needs CUDA tensors"
    return no_xformers() or (None if q.dtype in KERNEL_DTYPES else f"xformers does not take {_name(q.dtype)}")


def _prepare(q: Tensor, keys: Keys, qk_scales: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Keys]:
    """Keys in q's dtype and with one number of heads; q and keys normalized if qk_scales are given.

    PyTorch normalizes for every backend: in a kernel each block of queries would normalize all keys again.
    """
    heads = 1
    for key in (keys.k, keys.context_k, keys.null_k):
        if key is not None:
            heads = max(heads, _heads(key))
    k, v, context_k, context_v = (
        _broadcast(x, q.dtype, heads)  # (B, J, A_kv, D)
        for x in (keys.k, keys.v, keys.context_k, keys.context_v)
    )
    null_k, null_v = (
        x if x is None or x.dim() == 1 or len(x) == heads else x.expand(heads, -1)  # (D,) or (A_kv, D)
        for x in (keys.null_k, keys.null_v)
    )
    if qk_scales is not None:
        q_scale, k_scale = qk_scales
        dtype = q.dtype
        q = (F.normalize(q, dim=-1) * q_scale).to(dtype)  # (B, N, A, D)
        k, context_k, null_k = (
            None if x is None else (F.normalize(x, dim=-1) * k_scale).to(dtype) for x in (k, context_k, null_k)
        )
    return q, Keys(k, v, null_k, null_v, context_k, context_v, keys.lengths)


def _broadcast(x: Tensor | None, dtype: torch.dtype, heads: int) -> Tensor | None:
    """Keys or values (B, J, 1 or A_kv, D) in `dtype`, with `heads` heads. A view of itself would cost time backward."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.shape[2] == heads else x.expand(-1, -1, heads, -1)  # (B, J, A_kv, D)


def _concatenated(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v (B, J, A_kv, D) in the order null key, text, image; mask (B, J) of real keys, or None if all are real."""
    batch, width = q.shape[0], q.shape[3]
    heads = next((key.shape[2] for key in (keys.k, keys.context_k) if key is not None), 1)
    if keys.null_k is not None and keys.null_k.dim() == 2:
        heads = keys.null_k.shape[0]
    null_k, null_v = (
        None if x is None else x.to(q.dtype).expand(batch, 1, heads, width)  # (B, 1, A_kv, D)
        for x in (keys.null_k, keys.null_v)
    )
    k = torch.cat([x for x in (null_k, keys.context_k, keys.k) if x is not None], dim=1)  # (B, J, A_kv, D)
    v = torch.cat([x for x in (null_v, keys.context_v, keys.v) if x is not None], dim=1)  # (B, J, A_kv, D)
    if keys.lengths is None:
        return k, v, None
    first = 0 if keys.null_k is None else 1
    assert keys.context_k is not None
    position = torch.arange(k.shape[1], device=q.device) - first  # (J,)
    mask = (position < keys.lengths[:, None]) | (position >= keys.context_k.shape[1]) | (position < 0)  # (B, J)
    return k, v, mask


def _heads(key: Tensor) -> int:
    """The heads of k or context_k (B, J, A_kv, D), or of null_k (D,) or (A_kv, D)."""
    if key.dim() == 4:
        return key.shape[2]
    return 1 if key.dim() == 1 else key.shape[0]


def _check(q: Tensor, keys: Keys) -> None:
    """Raise ValueError for shapes that do not fit together."""
    if q.dim() != 4:
        raise ValueError(f"attention takes q (B, N, A, D), got {tuple(q.shape)}")
    batch, _, heads, width = q.shape
    if keys.k is None and keys.null_k is None and keys.context_k is None:
        raise ValueError("attention needs at least one of k, null_k and context_k")
    for names, key, value in (
        ("k and v", keys.k, keys.v),
        ("null_k and null_v", keys.null_k, keys.null_v),
        ("context_k and context_v", keys.context_k, keys.context_v),
    ):
        if (key is None) != (value is None):
            raise ValueError(f"{names} must be given together")
        if key is None or value is None:
            continue
        shape = key.shape
        if shape != value.shape:
            raise ValueError(f"{names} must have one shape, got {tuple(shape)} and {tuple(value.shape)}")
        if names == "null_k and null_v":
            if shape not in ((width,), (1, width), (heads, width)):
                wanted = f"({width},) or (1 or {heads}, {width})"
                raise ValueError(f"{names} must be {wanted} for q {tuple(q.shape)}, got {tuple(shape)}")
        elif len(shape) != 4 or shape[0] != batch or shape[2] not in (1, heads) or shape[3] != width:
            wanted = f"({batch}, keys, 1 or {heads}, {width})"
            raise ValueError(f"{names} must be {wanted} for q {tuple(q.shape)}, got {tuple(shape)}")
    if keys.lengths is not None:
        if keys.context_k is None:
            raise ValueError("context_lengths needs context_k")
        if keys.lengths.shape != (batch,) or keys.lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"context_lengths must be ({batch},) int32 or int64, got {tuple(keys.lengths.shape)} "
                f"{_name(keys.lengths.dtype)}"
            )


def _unsupported(q: Tensor, scale: float) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if q.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {_name(q.dtype)}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 128:
        return f"the kernel takes 16 to 128 channels per head in steps of 8, not {q.shape[-1]}"
    if scale <= 0:
        return f"the kernel takes positive scales, not {scale}"
    return None if q.numel() else "q is empty"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
