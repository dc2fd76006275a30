"""The forward kernel of attention; attention.py has the formulas, shapes and launchers."""

import triton
import triton.language as tl

from .attention_device import dot_transposed, load_null, load_tile, num_text_keys, tile_pointers


@triton.jit
def attend(
    q,  # tile of queries (ROWS, DP)
    k,  # keys of one source, as (pointer, strides / 8)
    v,  # values, as k
    sample,  # index in the batch
    head,  # key head
    start,  # first key of the tile
    count,  # number of keys
    m,  # (ROWS,) running maximum of c q.k
    denom,  # (ROWS,) running sum of 2^(c q.k - m)
    acc,  # (ROWS, DP) running sum of 2^(c q.k - m) v
    c,  # scale * log2(e)
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    WHOLE: tl.constexpr,  # whether all keys of the tile exist
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """One step of the online softmax, over KEYS keys: m, denom and acc with them."""
    keys = load_tile(k, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)  # (KEYS, DP)
    s = dot_transposed(q, keys, ROWS, KEYS, DP)  # (ROWS, KEYS)
    if not WHOLE:
        s = tl.where((start + tl.arange(0, KEYS) < count)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * c)
    p = tl.math.exp2(s * c - m_new[:, None])
    decay = tl.math.exp2(m - m_new)
    values = load_tile(v, sample, head, start, count, 1, D, DP, KEYS, WHOLE, UPCAST)  # (KEYS, DP)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return m_new, denom * decay + tl.sum(p, axis=1), acc


@triton.jit
def attend_all(
    q,  # tile of queries (ROWS, DP)
    k,  # keys of one source, as (pointer, strides / 8)
    v,  # values, as k
    sample,  # index in the batch
    head,  # key head
    count,  # number of keys
    m,  # (ROWS,) running maximum of c q.k
    denom,  # (ROWS,) running sum of 2^(c q.k - m)
    acc,  # (ROWS, DP) running sum of 2^(c q.k - m) v
    c,  # scale * log2(e)
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """The online softmax over all keys of one source: whole tiles, then the rest with a mask."""
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
    """out and lse of ROWS rows."""
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
    total = tl.where(denom > 0, denom, 1.0)  # a row without any key gives zeros
    tl.store(lse + index * rows + row, tl.where(denom > 0, m + tl.math.log2(total), 0.0), row < rows)
    pointers, exists = tile_pointers(out, sample, head, start, rows, G, D, DP, ROWS)
    tl.store(pointers, acc / total[:, None], exists)
