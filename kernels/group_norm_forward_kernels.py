"""The forward kernels of group_norm_silu; group_norm.py has the formulas, shapes and launchers."""

import triton
import triton.language as tl

from .group_norm_device import (
    activate,
    affine,
    by_group,
    columns,
    input_bias,
    load_input,
    load_masked,
    merge,
    moments,
    part_pointers,
    pointers,
    program_position,
    store_part,
    to_columns,
)


@triton.jit
def group_norm_silu_one_pass_forward_kernel(
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    y_ptr,  # (B, C, H, W), as x
    x_bias_ptr,  # (C_X,), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    film_bias_ptr,  # (2 C,): added to scale and shift, or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    skip_scale,  # skip is multiplied by it
    pixels,  # H W
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    C_X: tl.constexpr,  # channels of x
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SELECT: tl.constexpr,  # how x and skip are loaded, see load_input
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "none"
):
    """y, mean and rstd of one group of one sample."""
    index = tl.program_id(0)
    group, _, n = program_position(index, 1, C, CPG, 1, WIDTH)
    channel, valid = columns(group, C, CPG, 1, WIDTH)
    row = tl.arange(0, ROWS).to(tl.int64)
    mask = (row < pixels)[:, None] & valid[None, :]
    x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
    count = pixels * 1.0
    column_mean, m2 = moments(x, mask, count)  # (WIDTH,)
    x_bias = input_bias(x_bias_ptr, channel, valid, C_X)
    mean, m2 = merge(
        by_group(valid * count, 1, WIDTH), by_group(column_mean + x_bias, 1, WIDTH), by_group(m2, 1, WIDTH)
    )  # (1,)
    rstd = tl.rsqrt(m2 / (CPG * count) + eps)
    gain, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, film_bias_ptr, scale_stride, shift_stride, n, channel, valid, C
    )
    centre = to_columns(mean, 1, WIDTH) - x_bias
    z = (x - centre[None, :]) * (to_columns(rstd, 1, WIDTH) * gain)[None, :] + bias[None, :]
    y_at = pointers(y_ptr, n, row, channel, pixels, C, CHANNELS_LAST)
    tl.store(y_at, activate(z, ACTIVATION), mask)
    one = index + tl.arange(0, 1)
    tl.store(mean_ptr + one, mean)
    tl.store(rstd_ptr + one, rstd)


@triton.jit(do_not_specialize=["first_sample", "chunks", "tiles"])
def group_norm_silu_statistics_kernel(
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    x_bias_ptr,  # (C_X,), or None
    parts_ptr,  # (B, G, parts, 2) fp32: means, sums of squared deviations
    skip_scale,  # skip is multiplied by it
    first_sample,  # of this launch
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    C_X: tl.constexpr,  # channels of x
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SELECT: tl.constexpr,  # how x and skip are loaded, see load_input
):
    """Mean and sum of squared deviations of every group in one block and chunk.

    Each thread sums deviations from a pivot, and their squares, over all tiles; the sums of all threads are added once,
    after the loop. The pivot is the mean of the first tile: its distance from the chunk's mean, squared, is at most
    `tiles` variances, so the subtraction at the end loses no accuracy.
    """
    block, chunk, n = program_position(tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    n += first_sample
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    first = chunk.to(tl.int64) * tiles * ROWS
    last = tl.minimum(first + tiles * ROWS, pixels)
    row = first + tl.arange(0, ROWS)
    mask = (row < pixels)[:, None] & valid[None, :]
    x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
    pivot = tl.sum(x, axis=0) / tl.minimum(last - first, ROWS).to(tl.float32)
    sums = tl.where(mask, x - pivot[None, :], 0.0)
    squares = sums * sums
    for start in range(first + ROWS, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & valid[None, :]
        x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
        deviation = tl.where(mask, x - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    seen = (last - first).to(tl.float32)
    rest = tl.sum(sums, axis=0) / seen
    m2 = tl.sum(squares, axis=0) - seen * rest * rest
    mean = pivot + rest + input_bias(x_bias_ptr, channel, valid, C_X)  # (GROUPS * WIDTH,)
    mean, m2 = merge(
        by_group(valid * seen, GROUPS, WIDTH),
        by_group(mean, GROUPS, WIDTH),
        by_group(m2, GROUPS, WIDTH),
    )  # (GROUPS,)
    store_part(parts_ptr, mean, m2, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)


@triton.jit(do_not_specialize=["first_sample", "chunks", "tiles"])
def group_norm_silu_forward_kernel(
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    y_ptr,  # (B, C, H, W), as x
    x_bias_ptr,  # (C_X,), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    film_bias_ptr,  # (2 C,): added to scale and shift, or None
    parts_ptr,  # (B, G, parts, 2) fp32: means, sums of squared deviations
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    skip_scale,  # skip is multiplied by it
    first_sample,  # of this launch
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    C_X: tl.constexpr,  # channels of x
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    PARTS: tl.constexpr,  # parts of a group, padded to a power of two
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SELECT: tl.constexpr,  # how x and skip are loaded, see load_input
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "none"
):
    """y of one block and chunk; mean and rstd of its groups."""
    # In reverse: what group_norm_silu_statistics_kernel loaded last is still in L2.
    block, chunk, n = program_position(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    n += first_sample
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)

    group, at, exists = part_pointers(parts_ptr, n, block, chunks, C, CPG, GROUPS, WIDTH, PARTS)
    part = tl.arange(0, PARTS)
    count = tl.minimum(CPG - part // chunks * WIDTH, WIDTH).to(tl.float32) * tl.minimum(
        pixels - part % chunks * (tiles * ROWS), tiles * ROWS
    ).to(tl.float32)
    mean, m2 = merge(
        tl.where(exists, count[None, :], 0.0), load_masked(at, exists), load_masked(at + 1, exists)
    )  # (GROUPS,)
    rstd = tl.rsqrt(m2 / (CPG * (pixels * 1.0)) + eps)
    first_of_group = (chunk == 0) & (block % tl.cdiv(CPG, WIDTH) == 0)
    tl.store(mean_ptr + n * (C // CPG) + group, mean, first_of_group & (group < C // CPG))
    tl.store(rstd_ptr + n * (C // CPG) + group, rstd, first_of_group & (group < C // CPG))

    gain, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, film_bias_ptr, scale_stride, shift_stride, n, channel, valid, C
    )
    gain = gain * to_columns(rstd, GROUPS, WIDTH)
    centre = to_columns(mean, GROUPS, WIDTH) - input_bias(x_bias_ptr, channel, valid, C_X)
    first = chunk.to(tl.int64) * tiles * ROWS
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & valid[None, :]
        x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
        z = (x - centre[None, :]) * gain[None, :] + bias[None, :]
        y_at = pointers(y_ptr, n, row, channel, pixels, C, CHANNELS_LAST)
        tl.store(y_at, activate(z, ACTIVATION), mask)
