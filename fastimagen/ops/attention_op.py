"""The operator fastimagen::attention: kernels/attention.py, or its formulas in dense PyTorch where no kernel can run.

Letters: B batch, N queries, S image keys, L text keys, S' all keys, H heads, K key heads, G = H / K, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import in_kernels


def fused(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention (B, N, H, D), of `ops.attention.Keys` as `_prepare` leaves them."""
    return _forward(q, k, v, null_k, null_v, context_k, context_v, lengths, scale)[0]


@torch.library.custom_op("fastimagen::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D) and lse (B, K, N * G), base 2, in fp32, of float64 in float64."""
    inputs = (q, k, v, _contiguous(null_k), _contiguous(null_v), context_k, context_v, _contiguous(lengths))
    if in_kernels(q):
        from fastimagen_kernels.attention import attention_forward

        return attention_forward(*inputs, scale)
    return _dense_forward(*inputs, scale)


@torch.library.custom_op("fastimagen::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dnull (2, *null_k.shape), dcontext_k, dcontext_v; what there is not is empty."""
    inputs = (q, k, v, _contiguous(null_k), _contiguous(null_v), context_k, context_v, _contiguous(lengths))
    if in_kernels(q):
        from fastimagen_kernels.attention import attention_backward

        grads = attention_backward(dout, *inputs, out, lse, scale)
    else:
        grads = _dense_backward(dout, *inputs, out, lse, scale)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ------------------------------------------------------------------------------------- without kernels


def _scores(
    q: Tensor, k: Tensor | None, null_k: Tensor | None, context_k: Tensor | None, lengths: Tensor | None, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, K, N * G, S'), -inf where a key does not count; rows (B, K, N * G, D); keys (B, K, S', D)."""
    keys = _all_keys(q, k, null_k, context_k)
    rows = _rows(q, keys.shape[1])
    scores = rows @ keys.mT * c
    if lengths is not None:
        at = torch.arange(keys.shape[2], device=q.device) - (0 if null_k is None else 1)
        counts = (at < lengths[:, None]) | (at < 0) | (at >= context_k.shape[1])  # (B, S')
        scores = scores.masked_fill(~counts[:, None, None], -math.inf)
    return scores, rows, keys


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(q: Tensor, key_heads: int) -> Tensor:
    """(B, N, H, D) -> (B, K, N * G, D)."""
    return _precise(q).unflatten(2, (key_heads, -1)).transpose(1, 2).flatten(2, 3)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """(B, K, N * G, D) -> (B, N, H, D)."""
    return rows.unflatten(2, (like.shape[1], -1)).transpose(1, 2).reshape(like.shape).to(like.dtype).contiguous()


def _all_keys(q: Tensor, k: Tensor | None, null_k: Tensor | None, context_k: Tensor | None) -> Tensor:
    """(B, K, S', D): null, text, image."""
    sources = [x for x in (context_k, k) if x is not None]
    heads = sources[0].shape[2] if sources else 1 if null_k.dim() == 1 else null_k.shape[0]
    if null_k is not None:
        sources.insert(0, null_k.expand(q.shape[0], 1, heads, q.shape[3]))
    return torch.cat([_precise(x) for x in sources], dim=1).transpose(1, 2)


def _dense_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k, null_k, context_k, lengths, scale * math.log2(math.e))[0]
        lse = torch.logsumexp(scores * math.log(2), dim=-1) / math.log(2)  # (B, K, N * G)
        lse = torch.where(lse == -math.inf, 0, lse)
        return _unrows(torch.exp2(scores - lse[..., None]) @ _all_keys(q, v, null_v, context_v), q), lse


def _dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    with torch.autocast(q.device.type, enabled=False):
        scores, rows, keys = _scores(q, k, null_k, context_k, lengths, scale * math.log2(math.e))
        values = _all_keys(q, v, null_v, context_v)
        grads, results = _rows(dout, keys.shape[1]), _rows(out, keys.shape[1])
        p = torch.exp2(scores - lse[..., None])
        ds = p * (grads @ values.mT - (grads * results).sum(dim=-1, keepdim=True)) * scale
        dkeys = [x.transpose(1, 2) for x in (ds.mT @ rows, p.mT @ grads)]  # 2 x (B, S', K, D)
        sizes = [0 if null_k is None else 1, *(0 if x is None else x.shape[1] for x in (context_k, k))]
        (dnull_k, dcontext_k, dk), (dnull_v, dcontext_v, dv) = (x.split(sizes, dim=1) for x in dkeys)
        dnull = None
        if null_k is not None:
            both = torch.stack([dnull_k, dnull_v]).sum(dim=(1, 2))  # (2, K, D)
            dnull = (both.sum(dim=1) if null_k.dim() == 1 else both).to(null_k.dtype)
        return (
            _unrows(ds @ keys, q),
            *(_like(x, y) for x, y in ((dk, k), (dv, v))),
            dnull,
            *(_like(x, y) for x, y in ((dcontext_k, context_k), (dcontext_v, context_v))),
        )


def _like(grad: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad.to(x.dtype).contiguous()


# ------------------------------------------------------------------------------------- registration


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    key_heads = next((x.shape[2] for x in (k, context_k) if x is not None), None)
    if key_heads is None:
        key_heads = 1 if null_k.dim() == 1 else null_k.shape[0]
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(batch, key_heads, queries * (heads // key_heads), dtype=precise)


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dcontext_k, dcontext_v = (
        q.new_empty(0 if x is None else x.shape) for x in (q, k, v, context_k, context_v)
    )
    dnull = q.new_empty(0) if null_k is None else null_k.new_empty(2, *null_k.shape)
    return dq, dk, dv, dnull, dcontext_k, dcontext_v


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _dlse: Tensor) -> tuple:
    q, k, v, null_k, null_v, context_k, context_v, lengths, out, lse = ctx.saved_tensors
    dq, dk, dv, dnull, dcontext_k, dcontext_v = _backward(dout, *ctx.saved_tensors, ctx.scale)
    dnull_k, dnull_v = (None, None) if null_k is None else dnull.unbind()
    text = (None, None) if context_k is None else (dcontext_k, dcontext_v)
    return dq, *((None, None) if k is None else (dk, dv)), dnull_k, dnull_v, *text, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
