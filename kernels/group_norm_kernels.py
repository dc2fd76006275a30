"""The kernels of group_norm_silu; group_norm.py has the formulas, shapes and launchers."""

import triton
import triton.language as tl

from .group_norm_device import (
    activate,
    activation_gradient,
    affine,
    by_group,
    columns,
    load_masked,
    merge,
    moments,
    part_pointers,
    program_position,
    store_part,
    tile,
    to_columns,
)

# ---- forward


@triton.jit
def group_norm_silu_one_pass_forward_kernel(
    x_ptr,  # (B, C, H, W)
    y_ptr,  # (B, C, H, W), as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    pixels,  # H W
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """y, mean and rstd of one group of one sample."""
    index = tl.program_id(0)
    group, _, n = program_position(index, 1, C, CPG, 1, WIDTH)
    channel, valid = columns(group, C, CPG, 1, WIDTH)
    offset, mask = tile(0, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
    base = n * C * pixels
    x = load_masked(x_ptr + base, offset, mask)
    count = pixels * 1.0
    mean, m2 = moments(x, mask, count)  # (WIDTH,)
    mean, m2 = merge(by_group(valid * count, 1, WIDTH), by_group(mean, 1, WIDTH), by_group(m2, 1, WIDTH))  # (1,)
    rstd = tl.rsqrt(m2 / (CPG * count) + eps)
    gain, bias = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid)
    z = (x - mean[None, :]) * (to_columns(rstd, 1, WIDTH) * gain)[None, :] + bias[None, :]
    tl.store(y_ptr + base + offset, activate(z, SILU), mask)
    one = index + tl.arange(0, 1)
    tl.store(mean_ptr + one, mean)
    tl.store(rstd_ptr + one, rstd)


@triton.jit(do_not_specialize=["chunks", "tiles"])
def group_norm_silu_statistics_kernel(
    x_ptr,  # (B, C, H, W)
    part_mean_ptr,  # (B, G, parts) fp32
    part_m2_ptr,  # (B, G, parts) fp32, sums of squared deviations
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
):
    """Mean and sum of squared deviations of every group in one block and chunk."""
    block, chunk, n = program_position(tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    x_ptr += n * C * pixels
    first = chunk.to(tl.int64) * tiles * ROWS
    last = tl.minimum(first + tiles * ROWS, pixels)
    seen = 0.0
    mean = tl.zeros([GROUPS * WIDTH], tl.float32)
    m2 = tl.zeros([GROUPS * WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        offset, mask = tile(start, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
        count = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean, tile_m2 = moments(load_masked(x_ptr, offset, mask), mask, count)
        share = count / (seen + count)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tile_m2 + delta * delta * (seen * share)
        seen += count
    mean, m2 = merge(
        by_group(valid * seen, GROUPS, WIDTH), by_group(mean, GROUPS, WIDTH), by_group(m2, GROUPS, WIDTH)
    )  # (GROUPS,)
    store_part(part_mean_ptr, mean, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)
    store_part(part_m2_ptr, m2, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)


@triton.jit(do_not_specialize=["chunks", "tiles"])
def group_norm_silu_forward_kernel(
    x_ptr,  # (B, C, H, W)
    y_ptr,  # (B, C, H, W), as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    part_mean_ptr,  # (B, G, parts) fp32
    part_m2_ptr,  # (B, G, parts) fp32, sums of squared deviations
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    PARTS: tl.constexpr,  # parts of a group, padded to a power of two
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """y of one block and chunk; mean and rstd of its groups."""
    # In reverse: what group_norm_silu_statistics_kernel loaded last is still in L2.
    block, chunk, n = program_position(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)

    group, at, exists = part_pointers(n, block, chunks, C, CPG, GROUPS, WIDTH, PARTS)
    part = tl.arange(0, PARTS)
    count = tl.minimum(CPG - part // chunks * WIDTH, WIDTH).to(tl.float32) * tl.minimum(
        pixels - part % chunks * (tiles * ROWS), tiles * ROWS
    ).to(tl.float32)
    mean, m2 = merge(
        tl.where(exists, count[None, :], 0.0),
        load_masked(part_mean_ptr, at, exists),
        load_masked(part_m2_ptr, at, exists),
    )  # (GROUPS,)
    rstd = tl.rsqrt(m2 / (CPG * (pixels * 1.0)) + eps)
    first_of_group = (chunk == 0) & (block % tl.cdiv(CPG, WIDTH) == 0)
    tl.store(mean_ptr + n * (C // CPG) + group, mean, first_of_group & (group < C // CPG))
    tl.store(rstd_ptr + n * (C // CPG) + group, rstd, first_of_group & (group < C // CPG))

    gain, bias = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid)
    mean = to_columns(mean, GROUPS, WIDTH)
    gain = gain * to_columns(rstd, GROUPS, WIDTH)
    base = n * C * pixels
    first = chunk.to(tl.int64) * tiles * ROWS
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        offset, mask = tile(start, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
        z = (load_masked(x_ptr + base, offset, mask) - mean[None, :]) * gain[None, :] + bias[None, :]
        tl.store(y_ptr + base + offset, activate(z, SILU), mask)


# ---- backward


@triton.jit
def group_norm_silu_one_pass_backward_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C, H, W)
    dx_ptr,  # (B, C, H, W), as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    s1_ptr,  # (B, chunks, C) fp32
    s2_ptr,  # (B, chunks, C) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    pixels,  # H W
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """dx, S1 and S2 of one group of one sample."""
    index = tl.program_id(0)
    group, _, n = program_position(index, 1, C, CPG, 1, WIDTH)
    channel, valid = columns(group, C, CPG, 1, WIDTH)
    offset, mask = tile(0, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
    base = n * C * pixels
    gain, bias = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid)
    rstd = tl.load(rstd_ptr + index)
    xhat = (load_masked(x_ptr + base, offset, mask) - tl.load(mean_ptr + index)) * rstd
    dz = activation_gradient(load_masked(dy_ptr + base, offset, mask), xhat * gain[None, :] + bias[None, :], SILU)
    s1 = tl.sum(dz, axis=0)
    s2 = tl.sum(dz * xhat, axis=0)  # (WIDTH,)
    tl.store(s1_ptr + n * C + channel, s1, valid)
    tl.store(s2_ptr + n * C + channel, s2, valid)
    c1 = tl.sum(gain * s1, axis=0) / (CPG * (pixels * 1.0))
    c2 = tl.sum(gain * s2, axis=0) / (CPG * (pixels * 1.0))
    tl.store(dx_ptr + base + offset, rstd * (gain[None, :] * dz - c1 - xhat * c2), mask)


@triton.jit(do_not_specialize=["chunks", "tiles"])
def group_norm_silu_backward_sums_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C, H, W)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    s1_ptr,  # (B, chunks, C) fp32
    s2_ptr,  # (B, chunks, C) fp32
    part_c1_ptr,  # (B, G, parts) fp32
    part_c2_ptr,  # (B, G, parts) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """S1 and S2 of one block and chunk, and their weighted sums over each group's channels."""
    block, chunk, n = program_position(tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    gain, bias = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid)
    statistic = n * (C // CPG) + channel // CPG
    mean = load_masked(mean_ptr, statistic, valid)
    rstd = load_masked(rstd_ptr, statistic, valid)
    base = n * C * pixels
    first = chunk.to(tl.int64) * tiles * ROWS
    s1 = tl.zeros([GROUPS * WIDTH], tl.float32)
    s2 = tl.zeros([GROUPS * WIDTH], tl.float32)
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        offset, mask = tile(start, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
        xhat = (load_masked(x_ptr + base, offset, mask) - mean[None, :]) * rstd[None, :]
        dz = activation_gradient(load_masked(dy_ptr + base, offset, mask), xhat * gain[None, :] + bias[None, :], SILU)
        s1 += tl.sum(dz, axis=0)
        s2 += tl.sum(dz * xhat, axis=0)
    row = (n * chunks + chunk) * C
    tl.store(s1_ptr + row + channel, s1, valid)
    tl.store(s2_ptr + row + channel, s2, valid)
    c1 = tl.sum(by_group(gain * s1, GROUPS, WIDTH), axis=1)
    c2 = tl.sum(by_group(gain * s2, GROUPS, WIDTH), axis=1)  # (GROUPS,)
    store_part(part_c1_ptr, c1, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)
    store_part(part_c2_ptr, c2, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)


@triton.jit(do_not_specialize=["chunks", "tiles"])
def group_norm_silu_backward_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C, H, W)
    dx_ptr,  # (B, C, H, W), as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    part_c1_ptr,  # (B, G, parts) fp32
    part_c2_ptr,  # (B, G, parts) fp32
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    PARTS: tl.constexpr,  # parts of a group, padded to a power of two
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """dx of one block and chunk."""
    # In reverse: what group_norm_silu_backward_sums_kernel loaded last is still in L2.
    block, chunk, n = program_position(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    gain, bias = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid)
    statistic = n * (C // CPG) + channel // CPG
    mean = load_masked(mean_ptr, statistic, valid)
    rstd = load_masked(rstd_ptr, statistic, valid)
    _, at, exists = part_pointers(n, block, chunks, C, CPG, GROUPS, WIDTH, PARTS)
    c1 = tl.sum(load_masked(part_c1_ptr, at, exists), axis=1) / (CPG * (pixels * 1.0))
    c2 = tl.sum(load_masked(part_c2_ptr, at, exists), axis=1) / (CPG * (pixels * 1.0))
    c1 = to_columns(c1, GROUPS, WIDTH)
    c2 = to_columns(c2, GROUPS, WIDTH)
    base = n * C * pixels
    first = chunk.to(tl.int64) * tiles * ROWS
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        offset, mask = tile(start, channel, valid, pixels, C, ROWS, CHANNELS_LAST)
        xhat = (load_masked(x_ptr + base, offset, mask) - mean[None, :]) * rstd[None, :]
        dz = activation_gradient(load_masked(dy_ptr + base, offset, mask), xhat * gain[None, :] + bias[None, :], SILU)
        dx = rstd[None, :] * (gain[None, :] * dz - c1[None, :] - xhat * c2[None, :])
        tl.store(dx_ptr + base + offset, dx, mask)


@triton.jit(do_not_specialize=["batch", "chunks"])
def group_norm_silu_vector_gradients_kernel(
    s1_ptr,  # (B, chunks, C) fp32
    s2_ptr,  # (B, chunks, C) fp32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    dscale_ptr,  # (B, C), or None
    dshift_ptr,  # (B, C), or None
    scale_stride,  # elements between samples of scale
    batch,  # B
    chunks,  # chunks of pixels
    C: tl.constexpr,  # channels
    SAMPLES: tl.constexpr,  # samples loaded at once
    CHUNKS: tl.constexpr,  # chunks loaded at once
    WIDTH: tl.constexpr,  # channels of a program
):
    """dweight, dbias, dscale and dshift of WIDTH channels from S1 and S2 (B, chunks, C)."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    valid = channel < C
    weight = load_masked(weight_ptr, channel, valid)[None, :]
    bias = load_masked(bias_ptr, channel, valid)[None, :]
    dweight = tl.zeros([WIDTH], tl.float32)
    dbias = tl.zeros([WIDTH], tl.float32)
    for first in range(0, batch, SAMPLES):
        n = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        s1 = tl.zeros([SAMPLES, WIDTH], tl.float32)
        s2 = tl.zeros([SAMPLES, WIDTH], tl.float32)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            offset = (n[:, None] * chunks + chunk[None, :])[:, :, None] * C + channel[None, None, :]
            mask = ((n < batch)[:, None] & (chunk < chunks)[None, :])[:, :, None] & valid[None, None, :]
            s1 += tl.sum(load_masked(s1_ptr, offset, mask), axis=1)
            s2 += tl.sum(load_masked(s2_ptr, offset, mask), axis=1)
        if scale_ptr is not None:
            mask = (n < batch)[:, None] & valid[None, :]
            offset = n[:, None] * C + channel[None, :]
            tl.store(dshift_ptr + offset, s1, mask)
            tl.store(dscale_ptr + offset, weight * s2 + bias * s1, mask)
            factor = 1 + load_masked(scale_ptr, n[:, None] * scale_stride + channel[None, :], mask)
            s1 = s1 * factor
            s2 = s2 * factor
        dweight += tl.sum(s2, axis=0)
        dbias += tl.sum(s1, axis=0)
    tl.store(dweight_ptr + channel, dweight, valid)
    tl.store(dbias_ptr + channel, dbias, valid)
