"""Device functions of the attention kernels: tiles of a tensor, products of tiles, lengths of texts.

A tensor is a tuple (pointer, strides of batch, token and head divided by 8); channels are contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def tile_pointers(
    x,  # (B, tokens, heads, D) as (pointer, strides / 8)
    sample,  # index in the batch
    head,  # key head
    start,  # first row of the tile
    count,  # number of rows that exist
    G: tl.constexpr,  # query heads per key head; 1 for keys and values
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of the tile
):
    """Pointers (ROWS, DP) to the rows of x from `start` on, and which exist: rows below `count`, channels below D."""
    token_stride = x[2] * 8  # the factor tells Triton that rows are aligned, so it loads 8 channels at once
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
    x,  # (B, tokens, heads, D) as (pointer, strides / 8)
    sample,  # index in the batch
    head,  # key head
    start,  # first row of the tile
    count,  # number of rows that exist
    G: tl.constexpr,  # query heads per key head; 1 for keys and values
    D: tl.constexpr,  # channels per head
    DP: tl.constexpr,  # D padded to a power of two
    ROWS: tl.constexpr,  # rows of the tile
    WHOLE: tl.constexpr,  # whether all rows of the tile exist
    UPCAST: tl.constexpr,  # load as fp32: the interpreter has no bf16
):
    """A tile (ROWS, DP) of x; elements that do not exist are 0."""
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
    """The two halves (ROWS, DP / 2) of the channels of x (ROWS, DP)."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, DP // 2]), [0, 2, 1]))  # (ROWS, DP / 2) each


@triton.jit
def dot_transposed(a, b, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, DP: tl.constexpr):
    """a (A_ROWS, DP) times b (B_ROWS, DP) transposed, in fp32 without TF32."""
    # fp32 products do not use tensor cores, and each thread holds its rows in full: 32 channels at once.
    if a.dtype == tl.float32 and DP > 32:
        a0, a1 = split_channels(a, A_ROWS, DP)  # (A_ROWS, DP / 2) each
        b0, b1 = split_channels(b, B_ROWS, DP)  # (B_ROWS, DP / 2) each
        low = dot_transposed(a0, b0, A_ROWS, B_ROWS, DP // 2)
        return low + dot_transposed(a1, b1, A_ROWS, B_ROWS, DP // 2)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")  # (A_ROWS, B_ROWS)


@triton.jit
def load_null(pointer, head, head_stride, D: tl.constexpr, DP: tl.constexpr):
    """The null key or value of a key head, (1, DP) in fp32."""
    channel = tl.arange(0, DP)
    return tl.load(pointer + head * head_stride + channel, channel < D, 0.0).to(tl.float32)[None, :]  # (1, DP)


@triton.jit
def num_text_keys(lengths, sample, context):
    """How many text keys of a sample are used: its length, at most `context`."""
    if lengths is None:
        return context
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + sample).to(tl.int32), 0), context)


@triton.jit
def with_offset(x, offset):
    """The tensor x, `offset` elements further on."""
    return x[0] + offset, x[1], x[2], x[3]
