"""The backward kernels of attention; attention.py has the formulas, shapes and launchers."""

import triton
import triton.language as tl

from .attention_device import dot_transposed, load_null, load_tile, num_text_keys, tile_pointers, with_offset


@triton.jit
def add_to_dq(
    q,  # tile of queries (ROWS, DP)
    dout,  # tile of output gradients (ROWS, DP)
    lse,  # (ROWS,)
    delta,  # (ROWS,)
    k,  # keys of one source, as (pointer, strides / 8)
    v,  # values, as k
    sample,  # index in the batch
    head,  # key head
    start,  # first key of the tile
    count,  # number of keys
    dq,  # (ROWS, DP) sum so far, without the factor scale
    c,  # scale * log2(e)
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    WHOLE: tl.constexpr,  # whether all keys of the tile exist
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dq with what KEYS keys add."""
    keys = load_tile(k, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)
    values = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)
    p = tl.math.exp2(dot_transposed(q, keys, ROWS, KEYS, DP) * c - lse[:, None])
    if not WHOLE:  # the score 0 of a missing key may lie far above lse, and p would overflow
        p = tl.where((start + tl.arange(0, KEYS) < count)[None, :], p, 0.0)
    ds = p * (dot_transposed(dout, values, ROWS, KEYS, DP) - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit
def add_all_to_dq(
    q,  # tile of queries (ROWS, DP)
    dout,  # tile of output gradients (ROWS, DP)
    lse,  # (ROWS,)
    delta,  # (ROWS,)
    k,  # keys of one source, as (pointer, strides / 8)
    v,  # values, as k
    sample,  # index in the batch
    head,  # key head
    count,  # number of keys
    dq,  # (ROWS, DP) sum so far, without the factor scale
    c,  # scale * log2(e)
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dq with what all keys of one source add."""
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
    """dq and delta of ROWS rows, and their part of dnull."""
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
    k,  # tile of keys (KEYS, DP)
    v,  # tile of values (KEYS, DP)
    q,  # queries, as (pointer, strides / 8)
    dout,  # output gradients, as q
    lse,  # pointer to the rows of this sample and key head
    delta,  # pointer, as lse
    sample,  # index in the batch
    head,  # key head
    start,  # first row of the tile
    rows,  # number of rows
    dk,  # (KEYS, DP) sum so far, without the factor scale
    dv,  # (KEYS, DP) sum so far
    c,  # scale * log2(e)
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    WHOLE: tl.constexpr,  # whether all rows of the tile exist
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dk and dv with what ROWS rows add. Rows that do not exist have q = dout = 0 and add nothing."""
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
def sum_dk_dv(
    k,  # tile of keys (KEYS, DP)
    v,  # tile of values (KEYS, DP)
    q,  # queries, as (pointer, strides / 8)
    dout,  # output gradients, as q
    lse,  # pointer to the rows of this sample and key head
    delta,  # pointer, as lse
    sample,  # index in the batch
    head,  # key head
    first,  # first row of the split
    last,  # end of the split
    rows,  # number of rows
    c,  # scale * log2(e)
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dk, without the factor scale, and dv (KEYS, DP) of a tile of keys from all rows of a split."""
    dk = tl.zeros([KEYS, DP], tl.float32)
    dv = tl.zeros([KEYS, DP], tl.float32)
    whole = first + (last - first) // ROWS * ROWS
    for row in range(first, whole, ROWS):
        dk, dv = add_to_dk_dv(
            k, v, q, dout, lse, delta, sample, head, row, rows, dk, dv, c, G, D, DP, ROWS, KEYS, True, UPCAST
        )
    if whole < last:
        dk, dv = add_to_dk_dv(
            k, v, q, dout, lse, delta, sample, head, whole, rows, dk, dv, c, G, D, DP, ROWS, KEYS, False, UPCAST
        )
    return dk, dv


@triton.jit
def backward_block(
    q,  # queries, as (pointer, strides / 8)
    k,  # keys of one source, as q
    v,  # values, as q
    dk,  # gradient of k, as q
    dv,  # gradient of v, as q
    lse,  # pointer to the rows of this sample and key head
    delta,  # pointer, as lse
    dout,  # output gradients, as q
    sample,  # index in the batch
    head,  # key head
    start,  # first key of the block
    count,  # number of keys that are used
    size,  # number of keys
    first,  # first row of the split
    last,  # end of the split
    rows,  # number of rows
    c,  # scale * log2(e)
    scale,  # of the logits
    G: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """dk and dv of KEYS keys from the rows of a split. Keys from `count` on are not used: their gradients are 0."""
    k_tile = load_tile(k, sample, head, start, count, 1, D, DP, KEYS, False, UPCAST)
    v_tile = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, False, UPCAST)
    last = tl.where(start < count, last, first)  # no rows for a block of padding
    dk_sum, dv_sum = sum_dk_dv(
        k_tile, v_tile, q, dout, lse, delta, sample, head, first, last, rows, c, G, D, DP, ROWS, KEYS, UPCAST
    )
    used = (start + tl.arange(0, KEYS) < count)[:, None]
    pointers, exists = tile_pointers(dk, sample, head, start, size, 1, D, DP, KEYS)
    tl.store(pointers, tl.where(used, dk_sum * scale, 0.0), exists)
    pointers, exists = tile_pointers(dv, sample, head, start, size, 1, D, DP, KEYS)
    tl.store(pointers, tl.where(used, dv_sum, 0.0), exists)


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
    dk,  # (B, J, A_kv, D), or the first split of parts
    dv,  # as dk
    dcontext_k,  # (B, L, A_kv, D), or the first split of parts
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
    """Gradients of KEYS text or image keys from `chunk` rows; split i stores them i * total elements further on."""
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
    parts,  # (splits, total) fp32: dkv and dcontext_kv of each split, one after the other
    dkv,  # (B, J, 2, A_kv, D), or None
    dcontext_kv,  # (B, L, 2, A_kv, D), or None
    splits,  # splits of the rows
    total,  # elements of dkv and dcontext_kv together
    image,  # elements of dkv
    BLOCK: tl.constexpr,  # elements of a program
):
    """The sum of `parts` over the splits, in order, stored as dkv and dcontext_kv."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * total + at, at < total, 0.0)
    if dkv is not None:
        tl.store(dkv + at, acc, at < image)
    if dcontext_kv is not None:
        tl.store(dcontext_kv + (at - image), acc, (at >= image) & (at < total))
