"""Attention of image tokens to a learned null key, text keys and image keys, forward and backward.

    s = c q.k,  c = scale * log2(e);    p = 2^(s - lse),  lse = log2 sum 2^s;    out = sum p v

The three sources of keys are never concatenated: the null key starts the online softmax (m = c q.k0, l = 1, acc = v0),
then follow the first `lengths[b]` text keys, and then the image keys.

The G query heads that share a key head are rows of one matrix: row r is head r % G of token r // G. So keys are read
once for all of these heads, and their gradients need no sum over heads. G is A for one key head (multi-query) and 1 for
one key head per query head.

Backward, with delta = sum_d dout * out of each row (Dao et al. 2022, FlashAttention, appendix B.4):

    dp = dout.v,  ds = p (dp - delta);    dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout

One kernel iterates over the keys of a block of rows for dq; it also stores delta and the block's part of the null
gradients. Another one iterates over the rows of a block of keys for dk and dv. If there are few keys, it splits the
rows, and a third kernel adds the splits in order. No atomics; the same input gives the same bits.

J is the number of image keys, A that of query heads, A_kv (K in the code) that of key heads, G = A / A_kv; D is
padded to DP. A tensor is passed to a kernel as a tuple (pointer, strides of batch, token and head divided by 8);
channels are contiguous.

The kernels are in attention_forward_kernel.py and attention_backward_kernels.py; here are their launchers.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from .attention_backward_kernels import (
    attention_add_splits_kernel,
    attention_backward_keys_kernel,
    attention_backward_rows_kernel,
)
from .attention_forward_kernel import attention_forward_kernel
from .attention_tiles import padded, tile_for
from .device import architecture

PROGRAMS = 256  # rows are split until dk and dv have this many programs: two per multiprocessor of an H100
MIN_SPLIT_TILES = 4  # tiles of rows per split
ADD_BLOCK = 1024  # elements of a program that adds splits


def strided(x: Tensor | None) -> tuple | None:
    """(x, strides of batch, token and head divided by 8) for the kernels.

    Copies x only if its channels are not contiguous or a stride is not a multiple of 8.
    """
    if x is None:
        return None
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())][:3]
    if x.stride(3) != 1 or any(stride % 8 for stride in strides):
        return strided(x.contiguous())
    return x, *(stride // 8 for stride in strides)


def num_key_heads(k: Tensor | None, context_k: Tensor | None, null_k: Tensor | None) -> int:
    """A_kv of the keys that are present."""
    for key in (k, context_k):
        if key is not None:
            return key.shape[2]
    assert null_k is not None
    return 1 if null_k.dim() == 1 else null_k.shape[0]


def geometry(q: Tensor, k: Tensor | None, context_k: Tensor | None, null_k: Tensor | None) -> dict[str, int]:
    """The constants that all kernels get from the shapes."""
    kv_heads = num_key_heads(k, context_k, null_k)
    width = q.shape[3]
    return dict(
        K=kv_heads,
        G=q.shape[2] // kv_heads,
        D=width,
        DP=padded(width),
        UPCAST=architecture(q.device) == "interpreter" and q.dtype == torch.bfloat16,
    )


def length(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def null_stride(null_k: Tensor | None) -> int:
    return 0 if null_k is None or null_k.dim() == 1 else null_k.shape[1]


def attention_forward(
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
    """out (B, N, A, D), and lse (B, A_kv, N G) to base 2 in fp32.

    q (B, N, A, D), k, v (B, J, A_kv, D), context_k, context_v (B, L, A_kv, D) in one dtype, with any strides; null_k,
    null_v (D,) or (A_kv, D), contiguous, in any float dtype; lengths (B,) integers; scale > 0. q is not empty.
    """
    shape = geometry(q, k, context_k, null_k)
    batch, queries = q.shape[:2]
    rows = queries * shape["G"]
    tile = tile_for("forward", q, rows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, shape["K"], rows, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(triton.cdiv(rows, tile.rows) * batch * shape["K"],)](
            strided(q),
            strided(k),
            strided(v),
            null_k,
            null_v,
            strided(context_k),
            strided(context_v),
            lengths,
            strided(out),
            lse,
            null_stride(null_k),
            rows,
            length(k),
            length(context_k),
            scale * math.log2(math.e),
            **shape,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def attention_backward(
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv, dnull (2, *null_k.shape), dcontext_k, dcontext_v; None for absent inputs. dout is like out."""
    shape = geometry(q, k, context_k, null_k)
    batch, queries = q.shape[:2]
    rows, programs = queries * shape["G"], batch * shape["K"]
    tile = tile_for("backward_rows", q, rows)
    blocks = triton.cdiv(rows, tile.rows)
    inputs = tuple(map(strided, (q, k, v)))
    context = tuple(map(strided, (context_k, context_v)))
    strided_dout, c = strided(dout), scale * math.log2(math.e)
    assert strided_dout is not None
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    dnull = None
    if null_k is not None:
        dnull = torch.empty(2, batch, shape["K"], blocks, q.shape[3], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attention_backward_rows_kernel[(blocks * programs,)](
            *inputs,
            null_k,
            null_v,
            *context,
            lengths,
            strided(out),
            lse,
            strided_dout,
            strided(dq),
            delta,
            dnull,
            null_stride(null_k),
            rows,
            length(k),
            length(context_k),
            c,
            scale,
            **shape,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        dk, dv, dcontext_k, dcontext_v = launch_backward_keys(
            inputs, context, lengths, lse, strided_dout, delta, rows, c, scale, shape
        )
    if dnull is not None:
        assert null_k is not None
        dnull = dnull.sum((1, 2, 3) if null_k.dim() == 1 else (1, 3)).to(null_k.dtype)  # (2, D) or (2, A_kv, D)
    return dq, dk, dv, dnull, dcontext_k, dcontext_v


def launch_backward_keys(
    inputs: tuple,
    context: tuple,
    lengths: Tensor | None,
    lse: Tensor,
    dout: tuple,
    delta: Tensor,
    rows: int,
    c: float,
    scale: float,
    shape: dict[str, int],
) -> list[Tensor | None]:
    """dk, dv, dcontext_k, dcontext_v.

    inputs: q, k, v; context: context_k, context_v; dout: all as `strided` returns them. shape: from `geometry`.
    """
    q = inputs[0][0]
    sources = [None if x is None else x[0] for x in (*inputs[1:], *context)]
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    keys, texts = length(sources[0]), length(sources[2])
    tile = tile_for("backward_keys", q, rows)
    programs = (triton.cdiv(keys, tile.keys) + triton.cdiv(texts, tile.keys)) * lse.shape[0] * lse.shape[1]
    if programs == 0:
        return grads
    row_tiles = triton.cdiv(rows, tile.rows)
    max_splits = max(1, min(PROGRAMS // programs, row_tiles // MIN_SPLIT_TILES))
    tiles = triton.cdiv(row_tiles, max_splits)  # per split
    splits = triton.cdiv(row_tiles, tiles)
    parts, targets = None, grads
    image, text = (0 if x is None else x.numel() for x in sources[::2])
    total = 2 * (image + text)
    if splits > 1:
        parts = torch.empty(splits, total, dtype=torch.float32, device=q.device)
        targets = [
            None if x is None else part.view(x.shape)  # (B, J or L, A_kv, D)
            for x, part in zip(grads, parts[0].split([image, image, text, text]))
        ]
    attention_backward_keys_kernel[(programs * splits,)](
        *inputs,
        *context,
        lengths,
        lse,
        dout,
        delta,
        *map(strided, targets),
        rows,
        keys,
        texts,
        tiles * tile.rows,
        splits,
        total,
        c,
        scale,
        **shape,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        attention_add_splits_kernel[(triton.cdiv(total, ADD_BLOCK),)](
            parts, *grads, splits, total, image, text, BLOCK=ADD_BLOCK
        )
    return grads


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 32, 16):
            for tokens in (64, 1024) if dtype == torch.bfloat16 else (1024,):
                label = f"{str(dtype).removeprefix('torch.')} D={width} {tokens} tokens"
                yield label, partial(run_on_meta, dtype, width, tokens)


def run_on_meta(dtype: torch.dtype, width: int, tokens: int) -> None:
    """Forward and backward on meta tensors: 8 heads that share one key head, with all sources of keys.

    Few tokens come with few samples, so that rows are split.
    """
    batch = 2 if tokens == 64 else 64
    q, k = (torch.empty(batch, tokens, heads, width, dtype=dtype, device="meta") for heads in (8, 1))
    context = torch.empty(batch, 258, 1, width, dtype=dtype, device="meta")
    null, lengths = torch.empty(width, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    inputs = (q, k, k, null, null, context, context, lengths)
    out, lse = attention_forward(*inputs, width**-0.5)
    attention_backward(out, *inputs, out, lse, width**-0.5)
