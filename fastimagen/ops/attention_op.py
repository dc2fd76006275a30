"""Attention as a differentiable function: kernels/attention.py, or the same formulas in dense PyTorch without kernels.

torch.compile sees the operator fastimagen::attention. Where nothing traces, an autograd function calls the same code:
an operator costs the CPU more than all the rest. J is the number of all keys, A the number of query heads, A_kv that
of key heads, G = A / A_kv.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .dispatch import in_kernels, traced

Grads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""dq, dkv (B, J, 2, A_kv, D), dnull (2, *null_k.shape), dcontext_kv (B, L, 2, A_kv, D); None for absent inputs."""


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
    """Attention (B, N, A, D) with keys that `ops.attention._prepare` has prepared."""
    if traced():
        return _forward(q, k, v, null_k, null_v, context_k, context_v, lengths, scale)[0]
    return _Attention.apply(q, k, v, null_k, null_v, context_k, context_v, lengths, scale)


class _Attention(torch.autograd.Function):
    """Attention where nothing traces it; the arguments of `fused`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _attend(*arguments)
        ctx.save_for_backward(*arguments[:-1], out, lse)
        ctx.scale = arguments[-1]
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True: the gradients would be constants to autograd
            raise RuntimeError(
                "the kernels of attention have no second derivative; "
                'compute it in plain PyTorch: fastimagen.ops.set_backend("torch")'
            )
        saved = (*ctx.saved_tensors, ctx.scale)
        return _by_input(*_attend_backward(dout, *saved))


def _by_input(
    dq: Tensor, dkv: Tensor | None, dnull: Tensor | None, dcontext_kv: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `fused`; those of keys and values lie side by side for ops.halves."""
    dk, dv = (None, None) if dkv is None else dkv.unbind(2)  # (B, J, A_kv, D) each
    dnull_k, dnull_v = (None, None) if dnull is None else dnull.unbind()  # (D,) or (A_kv, D) each
    dcontext_k, dcontext_v = (None, None) if dcontext_kv is None else dcontext_kv.unbind(2)  # (B, L, A_kv, D) each
    return dq, dk, dv, dnull_k, dnull_v, dcontext_k, dcontext_v, None, None


def _attend(
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
    """out (B, N, A, D), and lse (B, A_kv, N G) to base 2 in fp32, or in float64 for float64."""
    inputs = (q, k, v, _contiguous(null_k), _contiguous(null_v), context_k, context_v, _contiguous(lengths))
    if in_kernels(q):
        from fastimagen_kernels.attention import attention_forward

        return attention_forward(*inputs, scale)
    return _dense_forward(*inputs, scale)


def _attend_backward(
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
) -> Grads:
    inputs = (q, k, v, _contiguous(null_k), _contiguous(null_v), context_k, context_v, _contiguous(lengths))
    if in_kernels(q):
        from fastimagen_kernels.attention import attention_backward

        return attention_backward(dout, *inputs, out, lse, scale)
    return _dense_backward(dout, *inputs, out, lse, scale)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- without kernels


def _scores(
    q: Tensor, k: Tensor | None, null_k: Tensor | None, context_k: Tensor | None, lengths: Tensor | None, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, A_kv, N G, J), -inf for padded text keys; rows (B, A_kv, N G, D); keys (B, A_kv, J, D)."""
    keys = _all_keys(q, k, null_k, context_k)  # (B, A_kv, J, D)
    rows = _rows(q, keys.shape[1])  # (B, A_kv, N G, D)
    scores = rows @ keys.mT * c  # (B, A_kv, N G, J)
    if lengths is not None:
        assert context_k is not None
        position = torch.arange(keys.shape[2], device=q.device) - (0 if null_k is None else 1)  # (J,)
        is_real = (position < lengths[:, None]) | (position < 0) | (position >= context_k.shape[1])  # (B, J)
        scores = scores.masked_fill(~is_real[:, None, None], -math.inf)
    return scores, rows, keys


def _precise(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(q: Tensor, key_heads: int) -> Tensor:
    """(B, N, A, D) -> (B, A_kv, N G, D): the queries of heads that share a key head are rows of one matrix."""
    return rearrange(_precise(q), "b n (akv g) d -> b akv (n g) d", akv=key_heads)  # (B, A_kv, N G, D)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """(B, A_kv, N G, D) -> (B, N, A, D), contiguous, in the dtype of `like`."""
    out = rearrange(rows, "b akv (n g) d -> b n (akv g) d", n=like.shape[1])  # (B, N, A, D)
    return out.to(like.dtype).contiguous()


def _all_keys(q: Tensor, k: Tensor | None, null_k: Tensor | None, context_k: Tensor | None) -> Tensor:
    """All keys (B, A_kv, J, D), in the order null key, text, image."""
    sources = [x for x in (context_k, k) if x is not None]
    if null_k is not None:
        heads = _key_heads(k, null_k, context_k)
        sources.insert(0, null_k.expand(q.shape[0], 1, heads, q.shape[3]))  # (B, 1, A_kv, D)
    keys = torch.cat([_precise(x) for x in sources], dim=1)  # (B, J, A_kv, D)
    return keys.transpose(1, 2)  # (B, A_kv, J, D)


def _key_heads(k: Tensor | None, null_k: Tensor | None, context_k: Tensor | None) -> int:
    """A_kv of the keys that are present."""
    for key in (context_k, k):
        if key is not None:
            return key.shape[2]
    assert null_k is not None
    return 1 if null_k.dim() == 1 else null_k.shape[0]


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
        scores, _, _ = _scores(q, k, null_k, context_k, lengths, scale * math.log2(math.e))
        lse = torch.logsumexp(scores * math.log(2), dim=-1) / math.log(2)  # (B, A_kv, N G)
        lse = torch.where(lse == -math.inf, 0, lse)
        p = torch.exp2(scores - lse[..., None])  # (B, A_kv, N G, J)
        values = _all_keys(q, v, null_v, context_v)  # (B, A_kv, J, D)
        return _unrows(p @ values, q), lse


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
) -> Grads:
    with torch.autocast(q.device.type, enabled=False):
        scores, rows, keys = _scores(q, k, null_k, context_k, lengths, scale * math.log2(math.e))
        values = _all_keys(q, v, null_v, context_v)  # (B, A_kv, J, D)
        grads, results = _rows(dout, keys.shape[1]), _rows(out, keys.shape[1])  # (B, A_kv, N G, D) each
        p = torch.exp2(scores - lse[..., None])  # (B, A_kv, N G, J)
        ds = p * (grads @ values.mT - (grads * results).sum(dim=-1, keepdim=True)) * scale  # (B, A_kv, N G, J)
        dkeys = (ds.mT @ rows).transpose(1, 2)  # (B, J, A_kv, D), all sources
        dvalues = (p.mT @ grads).transpose(1, 2)  # (B, J, A_kv, D), all sources
        sizes = [0 if null_k is None else 1, *(0 if x is None else x.shape[1] for x in (context_k, k))]
        dnull_k, dcontext_k, dk = dkeys.split(sizes, dim=1)  # (B, 1, A_kv, D), (B, L, A_kv, D), (B, J, A_kv, D)
        dnull_v, dcontext_v, dv = dvalues.split(sizes, dim=1)  # as the keys
        dnull = None
        if null_k is not None:
            both = torch.stack([dnull_k, dnull_v]).sum(dim=(1, 2))  # (2, A_kv, D)
            dnull = (both.sum(dim=1) if null_k.dim() == 1 else both).to(null_k.dtype)
        dq = _unrows(ds @ keys, q)  # (B, N, A, D)
        return dq, _pair(dk, dv, k), dnull, _pair(dcontext_k, dcontext_v, context_k)


def _pair(dk: Tensor, dv: Tensor, k: Tensor | None) -> Tensor | None:
    """dk and dv (B, J, A_kv, D) as (B, J, 2, A_kv, D) in k's dtype; None if k is absent."""
    return None if k is None else torch.stack([dk, dv], dim=2).to(k.dtype)  # (B, J, 2, A_kv, D)


# ---- the operator


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
    return _attend(q, k, v, null_k, null_v, context_k, context_v, lengths, scale)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_attend_backward`, with empty tensors for absent inputs: operators return no None."""
    grads = _attend_backward(dout, q, k, v, null_k, null_v, context_k, context_v, lengths, out, lse, scale)
    dq, dkv, dnull, dcontext_kv = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dkv, dnull, dcontext_kv


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
    key_heads = _key_heads(k, null_k, context_k)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dkv, dcontext_kv = (
        q.new_empty(0) if x is None else x.new_empty(*x.shape[:2], 2, *x.shape[2:]) for x in (k, context_k)
    )
    dnull = q.new_empty(0) if null_k is None else null_k.new_empty(2, *null_k.shape)
    return q.new_empty(q.shape), dkv, dnull, dcontext_kv


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple:
    saved = ctx.saved_tensors  # read once: with activation checkpointing a second time is an error
    _, k, _, null_k, _, context_k, *_ = saved
    dq, *grads = _backward(dout, *saved, ctx.scale)
    return _by_input(dq, *(None if x is None else grad for x, grad in zip((k, null_k, context_k), grads)))


_forward.register_autograd(_differentiate, setup_context=_setup_context)
