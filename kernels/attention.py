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
channels are contiguous."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import padded, tile_for
from .device import architecture

# ---- tiles


@triton.jit
def tile_pointers(
    x, sample, head, start, count, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):
    """Pointers (ROWS, DP) to the rows of x from `start` on, and which exist: rows below `count`, channels below D."""
    token_stride = x[2] * 8  # so Triton sees that rows are aligned, and reads 8 channels at once
    head_stride = x[3] * 8
    pointer = x[0] + sample * 8 * x[1]
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    if G == 1:
        pointer += head * head_stride + tl.cast(start, tl.int64) * token_stride
        offset = row * token_stride
    else:
        offset = tl.cast((start + row) // G, tl.int64) * token_stride + (head * G + (start + row) % G) * head_stride
    return pointer + (offset[:, None] + channel[None, :]), (start + row < count)[:, None] & (channel < D)[None, :]


@triton.jit
def load_tile(
    x,
    sample,
    head,
    start,
    count,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile (ROWS, DP) of x, zero where there is nothing; WHOLE promises that all its rows exist."""
    pointers, exists = tile_pointers(x, sample, head, start, count, G, D, DP, ROWS)
    if WHOLE and D == DP:
        tile = tl.load(pointers)
    elif WHOLE:
        tile = tl.load(pointers, (tl.arange(0, DP) < D)[None, :], 0.0)
    else:
        tile = tl.load(pointers, exists, 0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def split_channels(x, ROWS: tl.constexpr, DP: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, DP // 2]), [0, 2, 1]))


@triton.jit
def dot_transposed(a, b, A: tl.constexpr, B: tl.constexpr, DP: tl.constexpr):
    """a (A, DP) times b (B, DP) transposed."""
    if a.dtype == tl.float32 and DP > 32:  # without tensor cores, a thread holds its rows in full: 32 channels at once
        a0, a1 = split_channels(a, A, DP)
        b0, b1 = split_channels(b, B, DP)
        return dot_transposed(a0, b0, A, B, DP // 2) + dot_transposed(a1, b1, A, B, DP // 2)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def load_null(pointer, head, head_stride, D: tl.constexpr, DP: tl.constexpr):
    """The null key or value of a key head, (1, DP) in fp32."""
    channel = tl.arange(0, DP)
    return tl.load(pointer + head * head_stride + channel, channel < D, 0.0).to(tl.float32)[None, :]


@triton.jit
def num_text_keys(lengths, sample, context):
    """How many of a sample's text keys count."""
    if lengths is None:
        return context
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + sample).to(tl.int32), 0), context)


# ---- forward


@triton.jit
def attend(
    q,
    k,
    v,
    sample,
    head,
    start,
    count,
    m,
    denom,
    acc,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the online softmax, over KEYS keys."""
    s = dot_transposed(q, load_tile(k, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST), ROWS, KEYS, DP)
    if not WHOLE:
        s = tl.where((start + tl.arange(0, KEYS) < count)[None, :], s, float("-inf"))
    highest = tl.maximum(m, tl.max(s, axis=1) * c)
    p = tl.math.exp2(s * c - highest[:, None])
    fade = tl.math.exp2(m - highest)
    values = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return highest, denom * fade + tl.sum(p, axis=1), acc


@triton.jit
def attend_all(
    q,
    k,
    v,
    sample,
    head,
    count,
    m,
    denom,
    acc,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    whole = count // KEYS * KEYS
    for start in range(0, whole, KEYS):
        m, denom, acc = attend(q, k, v, sample, head, start, count, m, denom, acc, c, D, DP, ROWS, KEYS, True, UPCAST)
    if whole < count:
        m, denom, acc = attend(q, k, v, sample, head, whole, count, m, denom, acc, c, D, DP, ROWS, KEYS, False, UPCAST)
    return m, denom, acc


@triton.jit(do_not_specialize=["rows", "keys", "context"])
def attention_forward_kernel(
    q,  # queries (B, N, A, D) as (pointer, strides / 8)
    k,  # image keys (B, J, A_kv, D), or None
    v,  # image values, as k
    null_k,  # (D,) or (A_kv, D), or None
    null_v,  # as null_k
    context_k,  # text keys (B, L, A_kv, D), or None
    context_v,  # text values, as context_k
    lengths,  # (B,) text keys used of each sample, or None
    out,  # (B, N, A, D)
    lse,  # (B, A_kv, N G) fp32, log2 of the softmax denominators
    null_stride,  # elements between heads of null_k; 0 if shared
    rows,  # N G, rows of one sample and key head
    keys,  # J, image keys
    context,  # L, text keys
    c,  # scale * log2(e)
    K: tl.constexpr,  # A_kv, key heads
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """out and lse (B, K, N * G) of ROWS rows."""
    blocks = tl.cdiv(rows, ROWS)
    start = tl.program_id(0) % blocks * ROWS
    index = (tl.program_id(0) // blocks).to(tl.int64)  # of sample and key head
    sample = index // K
    head = index % K
    queries = load_tile(q, sample, head, start, rows, G, D, DP, ROWS, False, UPCAST)
    if null_k is not None:
        m = tl.sum(queries.to(tl.float32) * load_null(null_k, head, null_stride, D, DP), axis=1) * c
        denom = tl.full([ROWS], 1.0, tl.float32)
        acc = tl.zeros([ROWS, DP], tl.float32) + load_null(null_v, head, null_stride, D, DP)
    else:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        denom = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DP], tl.float32)
    if context_k is not None:
        count = num_text_keys(lengths, sample, context)
        m, denom, acc = attend_all(
            queries, context_k, context_v, sample, head, count, m, denom, acc, c, D, DP, ROWS, KEYS, UPCAST
        )
    if k is not None:
        m, denom, acc = attend_all(queries, k, v, sample, head, keys, m, denom, acc, c, D, DP, ROWS, KEYS, UPCAST)
    row = start + tl.arange(0, ROWS)
    total = tl.where(denom > 0, denom, 1.0)  # a row without any key: zeros
    tl.store(lse + index * rows + row, tl.where(denom > 0, m + tl.math.log2(total), 0.0), row < rows)
    pointers, exists = tile_pointers(out, sample, head, start, rows, G, D, DP, ROWS)
    tl.store(pointers, acc / total[:, None], exists)


# ---- backward


@triton.jit
def add_to_dq(
    q,
    dout,
    lse,
    delta,
    k,
    v,
    sample,
    head,
    start,
    count,
    dq,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    keys = load_tile(k, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)
    values = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)
    p = tl.math.exp2(dot_transposed(q, keys, ROWS, KEYS, DP) * c - lse[:, None])
    if not WHOLE:  # s = 0 is no small number where all others are far below
        p = tl.where((start + tl.arange(0, KEYS) < count)[None, :], p, 0.0)
    ds = p * (dot_transposed(dout, values, ROWS, KEYS, DP) - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit
def add_all_to_dq(
    q,
    dout,
    lse,
    delta,
    k,
    v,
    sample,
    head,
    count,
    dq,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    whole = count // KEYS * KEYS
    for start in range(0, whole, KEYS):
        dq = add_to_dq(q, dout, lse, delta, k, v, sample, head, start, count, dq, c, D, DP, ROWS, KEYS, True, UPCAST)
    if whole < count:
        dq = add_to_dq(q, dout, lse, delta, k, v, sample, head, whole, count, dq, c, D, DP, ROWS, KEYS, False, UPCAST)
    return dq


@triton.jit(do_not_specialize=["rows", "keys", "context"])
def attention_backward_rows_kernel(
    q,  # queries (B, N, A, D) as (pointer, strides / 8)
    k,  # image keys (B, J, A_kv, D), or None
    v,  # image values, as k
    null_k,  # (D,) or (A_kv, D), or None
    null_v,  # as null_k
    context_k,  # text keys (B, L, A_kv, D), or None
    context_v,  # text values, as context_k
    lengths,  # (B,) text keys used of each sample, or None
    out,  # (B, N, A, D)
    lse,  # (B, A_kv, N G) fp32, log2 of the softmax denominators
    dout,  # (B, N, A, D)
    dq,  # (B, N, A, D)
    delta,  # (B, A_kv, N G) fp32, row sums of dout * out
    dnull,  # (2, B, A_kv, blocks, D) fp32, or None
    null_stride,  # elements between heads of null_k; 0 if shared
    rows,  # N G, rows of one sample and key head
    keys,  # J, image keys
    context,  # L, text keys
    c,  # scale * log2(e)
    scale,  # of the logits
    K: tl.constexpr,  # A_kv, key heads
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dq and delta (B, K, N * G) of ROWS rows, and their part of dnull (2, B, K, blocks, D)."""
    blocks = tl.cdiv(rows, ROWS)
    start = tl.program_id(0) % blocks * ROWS
    index = (tl.program_id(0) // blocks).to(tl.int64)
    sample = index // K
    head = index % K
    row = start + tl.arange(0, ROWS)
    queries = load_tile(q, sample, head, start, rows, G, D, DP, ROWS, False, UPCAST)
    grads = load_tile(dout, sample, head, start, rows, G, D, DP, ROWS, False, UPCAST)
    results = load_tile(out, sample, head, start, rows, G, D, DP, ROWS, False, UPCAST)
    deltas = tl.sum(grads.to(tl.float32) * results.to(tl.float32), axis=1)
    tl.store(delta + index * rows + row, deltas, row < rows)
    lses = tl.load(lse + index * rows + row, row < rows, 0.0)
    acc = tl.zeros([ROWS, DP], tl.float32)
    if null_k is not None:
        key = load_null(null_k, head, null_stride, D, DP)
        p = tl.math.exp2(tl.sum(queries.to(tl.float32) * key, axis=1) * c - lses)
        dp = tl.sum(grads.to(tl.float32) * load_null(null_v, head, null_stride, D, DP), axis=1)
        ds = p * (dp - deltas)
        acc += ds[:, None] * key
        channel = tl.arange(0, DP)
        part = dnull + tl.program_id(0).to(tl.int64) * D + channel
        tl.store(part, tl.sum(ds[:, None] * queries.to(tl.float32), axis=0) * scale, channel < D)
        part += tl.num_programs(0).to(tl.int64) * D
        tl.store(part, tl.sum(p[:, None] * grads.to(tl.float32), axis=0), channel < D)
    if context_k is not None:
        count = num_text_keys(lengths, sample, context)
        acc = add_all_to_dq(
            queries, grads, lses, deltas, context_k, context_v, sample, head, count, acc, c, D, DP, ROWS, KEYS, UPCAST
        )
    if k is not None:
        acc = add_all_to_dq(queries, grads, lses, deltas, k, v, sample, head, keys, acc, c, D, DP, ROWS, KEYS, UPCAST)
    pointers, exists = tile_pointers(dq, sample, head, start, rows, G, D, DP, ROWS)
    tl.store(pointers, acc * scale, exists)


@triton.jit
def add_to_dk_dv(
    k,
    v,
    q,
    dout,
    lse,
    delta,
    sample,
    head,
    start,
    rows,
    dk,
    dv,
    c,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What ROWS rows add. Rows that do not exist have q = dout = 0 and add nothing."""
    row = start + tl.arange(0, ROWS)
    queries = load_tile(q, sample, head, start, rows, G, D, DP, ROWS, WHOLE, UPCAST)
    lses = tl.load(lse + row, row < rows, 0.0)
    p = tl.math.exp2(dot_transposed(k, queries, KEYS, ROWS, DP) * c - lses[None, :])  # (KEYS, ROWS)
    grads = load_tile(dout, sample, head, start, rows, G, D, DP, ROWS, WHOLE, UPCAST)
    dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision="ieee")
    deltas = tl.load(delta + row, row < rows, 0.0)
    ds = p * (dot_transposed(v, grads, KEYS, ROWS, DP) - deltas[None, :])
    return tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee"), dv


@triton.jit
def backward_block(
    q,
    k,
    v,
    dk,
    dv,
    lse,
    delta,
    dout,
    sample,
    head,
    start,
    count,
    size,
    first,
    last,
    rows,
    c,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk and dv of KEYS of `size` keys, from the rows first to last. Keys from `count` on do not count: zeros."""
    keys = load_tile(k, sample, head, start, count, 1, D, DP, KEYS, False, UPCAST)
    values = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, False, UPCAST)
    acc_k = tl.zeros([KEYS, DP], tl.float32)
    acc_v = tl.zeros([KEYS, DP], tl.float32)
    last = tl.where(start < count, last, first)
    whole = first + (last - first) // ROWS * ROWS
    for at in range(first, whole, ROWS):
        acc_k, acc_v = add_to_dk_dv(
            keys,
            values,
            q,
            dout,
            lse,
            delta,
            sample,
            head,
            at,
            rows,
            acc_k,
            acc_v,
            c,
            G,
            D,
            DP,
            ROWS,
            KEYS,
            True,
            UPCAST,
        )
    if whole < last:
        acc_k, acc_v = add_to_dk_dv(
            keys,
            values,
            q,
            dout,
            lse,
            delta,
            sample,
            head,
            whole,
            rows,
            acc_k,
            acc_v,
            c,
            G,
            D,
            DP,
            ROWS,
            KEYS,
            False,
            UPCAST,
        )
    counts = (start + tl.arange(0, KEYS) < count)[:, None]
    pointers, exists = tile_pointers(dk, sample, head, start, size, 1, D, DP, KEYS)
    tl.store(pointers, tl.where(counts, acc_k * scale, 0.0), exists)
    pointers, exists = tile_pointers(dv, sample, head, start, size, 1, D, DP, KEYS)
    tl.store(pointers, tl.where(counts, acc_v, 0.0), exists)


@triton.jit
def with_offset(x, offset):
    return x[0] + offset, x[1], x[2], x[3]


@triton.jit(do_not_specialize=["rows", "keys", "context", "chunk", "splits", "total"])
def attention_backward_keys_kernel(
    q,  # queries (B, N, A, D) as (pointer, strides / 8)
    k,  # image keys (B, J, A_kv, D), or None
    v,  # image values, as k
    context_k,  # text keys (B, L, A_kv, D), or None
    context_v,  # text values, as context_k
    lengths,  # (B,) text keys used of each sample, or None
    lse,  # (B, A_kv, N G) fp32, log2 of the softmax denominators
    dout,  # (B, N, A, D)
    delta,  # (B, A_kv, N G) fp32, row sums of dout * out
    dk,  # (B, J, A_kv, D), or one split of parts
    dv,  # as dk
    dcontext_k,  # (B, L, A_kv, D), or one split of parts
    dcontext_v,  # as dcontext_k
    rows,  # N G, rows of one sample and key head
    keys,  # J, image keys
    context,  # L, text keys
    chunk,  # rows of a split
    splits,  # splits of the rows
    total,  # elements of dk, dv, dcontext_k and dcontext_v together
    c,  # scale * log2(e)
    scale,  # of the logits
    K: tl.constexpr,  # A_kv, key heads
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """Gradients of KEYS text or image keys from `chunk` rows; split i writes them i * total elements further on."""
    context_blocks = tl.cdiv(context, KEYS)
    blocks = context_blocks + tl.cdiv(keys, KEYS)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    index = (tl.program_id(0) // blocks // splits).to(tl.int64)
    sample = index // K
    head = index % K
    shift = split.to(tl.int64) * total
    first = split * chunk
    last = tl.minimum(first + chunk, rows)
    lse += index * rows
    delta += index * rows
    if block < context_blocks:
        if context_k is not None:
            backward_block(
                q,
                context_k,
                context_v,
                with_offset(dcontext_k, shift),
                with_offset(dcontext_v, shift),
                lse,
                delta,
                dout,
                sample,
                head,
                block * KEYS,
                num_text_keys(lengths, sample, context),
                context,
                first,
                last,
                rows,
                c,
                scale,
                G,
                D,
                DP,
                ROWS,
                KEYS,
                UPCAST,
            )
    else:
        if k is not None:
            backward_block(
                q,
                k,
                v,
                with_offset(dk, shift),
                with_offset(dv, shift),
                lse,
                delta,
                dout,
                sample,
                head,
                (block - context_blocks) * KEYS,
                keys,
                keys,
                first,
                last,
                rows,
                c,
                scale,
                G,
                D,
                DP,
                ROWS,
                KEYS,
                UPCAST,
            )


@triton.jit(do_not_specialize=["splits", "total", "image", "text"])
def attention_add_splits_kernel(
    parts,  # (splits, total) fp32
    dk,  # (B, J, A_kv, D), or one split of parts
    dv,  # as dk
    dcontext_k,  # (B, L, A_kv, D), or one split of parts
    dcontext_v,  # as dcontext_k
    splits,  # splits of the rows
    total,  # elements of dk, dv, dcontext_k and dcontext_v together
    image,  # elements of dk
    text,  # elements of dcontext_k
    BLOCK: tl.constexpr,  # elements of a program
):
    """parts (splits, total) added over the splits, in order; total is dk, dv, dcontext_k, dcontext_v in a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * total + at, at < total, 0.0)
    if dk is not None:
        tl.store(dk + at, acc, at < image)
        tl.store(dv + (at - image), acc, (at >= image) & (at < 2 * image))
    if dcontext_k is not None:
        at -= 2 * image
        tl.store(dcontext_k + at, acc, (at >= 0) & (at < text))
        tl.store(dcontext_v + (at - text), acc, (at >= text) & (at < 2 * text))


# ---- launchers

PROGRAMS = 256  # as many splits of the rows as make so many programs for dk and dv: two on a multiprocessor of an H100
SPLIT_TILES = 4  # tiles of rows that a split has at least


def strided(x: Tensor | None) -> tuple | None:
    """(x, its strides of batch, token and head over 8) as kernels take it: a copy only where the channels are not
    contiguous, or a stride is no multiple of 8."""
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
        UPCAST=architecture() == "interpreter" and q.dtype == torch.bfloat16,
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
    """out (B, N, H, D) and lse (B, K, N * H / K), base 2, in fp32.

    q (B, N, H, D), k, v (B, S, K, D), context_k, context_v (B, L, K, D) in one dtype and of any strides; null_k, null_v
    (D,) or (K, D), contiguous, of any float dtype; lengths (B,) integers; scale > 0. No dimension of q is 0.
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
    """dq, dk, dv, dnull (2, *null_k.shape), dcontext_k, dcontext_v; None for absent inputs. dout (B, N, A, D)."""
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
        dnull = dnull.sum((1, 2, 3) if null_k.dim() == 1 else (1, 3)).to(null_k.dtype)  # (2, D) or (2, K, D)
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
    """dk, dv, dcontext_k, dcontext_v."""
    q, *sources = inputs[0][0], *(None if x is None else x[0] for x in (*inputs[1:], *context))
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    keys, texts = length(sources[0]), length(sources[2])
    tile = tile_for("backward_keys", q, rows)
    programs = (triton.cdiv(keys, tile.keys) + triton.cdiv(texts, tile.keys)) * lse.shape[0] * lse.shape[1]
    if programs == 0:
        return grads
    row_tiles = triton.cdiv(rows, tile.rows)
    tiles = triton.cdiv(row_tiles, max(1, min(PROGRAMS // programs, row_tiles // SPLIT_TILES)))  # of a split
    splits = triton.cdiv(row_tiles, tiles)
    parts, targets = None, grads
    image, text = (0 if x is None else x.numel() for x in sources[::2])
    total = 2 * (image + text)
    if splits > 1:
        parts = torch.empty(splits, total, dtype=torch.float32, device=q.device)
        targets = [
            None if x is None else part.view(x.shape)
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
        attention_add_splits_kernel[(triton.cdiv(total, 1024),)](parts, *grads, splits, total, image, text, BLOCK=1024)
    return grads


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 32, 16):
            for tokens in (64, 1024) if dtype == torch.bfloat16 else (1024,):
                label = f"{str(dtype).removeprefix('torch.')} D={width} {tokens} tokens"
                yield label, partial(train, dtype, width, tokens)


def train(dtype: torch.dtype, width: int, tokens: int) -> None:
    """Forward and backward of 8 heads that share one key head, with keys from everywhere; few tokens in few samples,
    so that rows are split."""
    batch = 2 if tokens == 64 else 64
    q, k = (torch.empty(batch, tokens, heads, width, dtype=dtype, device="meta") for heads in (8, 1))
    context = torch.empty(batch, 258, 1, width, dtype=dtype, device="meta")
    null, lengths = torch.empty(width, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    inputs = (q, k, k, null, null, context, context, lengths)
    out, lse = attention_forward(*inputs, width**-0.5)
    attention_backward(out, *inputs, out, lse, width**-0.5)
