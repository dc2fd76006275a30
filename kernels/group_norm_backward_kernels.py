"""The backward kernels of group_norm_silu; group_norm.py has the formulas, shapes and launchers."""

import triton
import triton.language as tl

from .group_norm_device import (
    activation_gradient,
    affine,
    by_group,
    columns,
    film_factor,
    input_bias,
    load_input,
    load_masked,
    part_pointers,
    pointers,
    program_position,
    skip_factor,
    store_gradient,
    store_part,
    to_columns,
)


@triton.jit
def sums_of_chunks(sums_ptr, n, chunks, channel, valid, C: tl.constexpr, VECTORS: tl.constexpr, CHUNKS: tl.constexpr):
    """S0 (0 without x_bias), S1 and S2 (columns,) of sample n."""
    s0 = tl.zeros(channel.shape, tl.float32)
    s1 = tl.zeros(channel.shape, tl.float32)
    s2 = tl.zeros(channel.shape, tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        there = (chunk < chunks)[:, None] & valid[None, :]
        at = sums_ptr + (n * chunks + chunk)[:, None] * (VECTORS * C) + channel[None, :]
        s1 += tl.sum(load_masked(at, there), axis=0)
        s2 += tl.sum(load_masked(at + C, there), axis=0)
        if VECTORS == 3:
            s0 += tl.sum(load_masked(at + 2 * C, there), axis=0)
    return s0, s1, s2


@triton.jit
def store_film_gradients(s1, s2, weight_ptr, bias_ptr, dfilm_ptr, n, channel, valid, C: tl.constexpr):
    """dscale and dshift of channels (columns,) of sample n, if there is FiLM."""
    if dfilm_ptr is not None:
        weight = load_masked(weight_ptr + channel, valid)
        bias = load_masked(bias_ptr + channel, valid)
        at = dfilm_ptr + n * 2 * C + channel
        tl.store(at, weight * s2 + bias * s1, valid)
        tl.store(at + C, s1, valid)


@triton.jit
def store_sample_gradients(
    samples_ptr,
    s0,
    s1,
    s2,
    c1,
    c2,
    gain,
    rstd,
    factor,
    n,
    channel,
    valid,
    pixels,
    C: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """What sample n adds to dweight, dbias and, of 3 VECTORS, dx_bias (of x's channels; the others are not read)."""
    at = samples_ptr + n * VECTORS * C + channel
    tl.store(at, factor * s2, valid)
    tl.store(at + C, factor * s1, valid)
    if VECTORS == 3:
        tl.store(at + 2 * C, rstd * (gain * s1 - pixels * c1 - s0 * c2), valid)


@triton.jit
def group_norm_silu_one_pass_backward_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    residual_ptr,  # (B, C_X, H, W), as x, or None
    skip_residual_ptr,  # (B, C - C_X, H, W), as x, or None
    dx_ptr,  # (B, C_X, H, W), as x
    dskip_ptr,  # (B, C - C_X, H, W), as x, or None
    x_bias_ptr,  # (C_X,), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    film_bias_ptr,  # (2 C,): added to scale and shift, or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    dfilm_ptr,  # (B, 2, C): dscale, dshift, or None
    samples_ptr,  # (B, 2, C) fp32, with x_bias (B, 3, C): dweight, dbias, dx_bias
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
    skip_scale,  # skip is multiplied by it
    pixels,  # H W
    C: tl.constexpr,  # channels
    C_X: tl.constexpr,  # channels of x
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SELECT: tl.constexpr,  # how x and skip are loaded, see load_input
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "none"
):
    """All gradients of one group of one sample."""
    index = tl.program_id(0)
    group, _, n = program_position(index, 1, C, CPG, 1, WIDTH)
    channel, valid = columns(group, C, CPG, 1, WIDTH)
    row = tl.arange(0, ROWS).to(tl.int64)
    mask = (row < pixels)[:, None] & valid[None, :]
    gain, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, film_bias_ptr, scale_stride, shift_stride, n, channel, valid, C
    )
    rstd = tl.load(rstd_ptr + index)
    centre = tl.load(mean_ptr + index) - input_bias(x_bias_ptr, channel, valid, C_X)  # (WIDTH,)
    x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
    xhat = tl.where(mask, (x - centre[None, :]) * rstd, 0.0)
    dy = load_masked(pointers(dy_ptr, n, row, channel, pixels, C, CHANNELS_LAST), mask)
    dz = activation_gradient(dy, xhat * gain[None, :] + bias[None, :], ACTIVATION)
    s1 = tl.sum(dz, axis=0)
    s2 = tl.sum(dz * xhat, axis=0)  # (WIDTH,)
    s0 = tl.zeros([WIDTH], tl.float32)
    VECTORS: tl.constexpr = 2 if x_bias_ptr is None else 3
    if x_bias_ptr is not None:
        s0 = tl.sum(xhat, axis=0)
    c1 = tl.sum(gain * s1, axis=0) / (CPG * (pixels * 1.0))
    c2 = tl.sum(gain * s2, axis=0) / (CPG * (pixels * 1.0))
    dx = rstd * (gain[None, :] * dz - c1 - xhat * c2)
    dx = dx * skip_factor(skip_ptr, skip_scale, channel, C_X)[None, :]
    store_gradient(
        dx_ptr, dskip_ptr, residual_ptr, skip_residual_ptr, dx, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST
    )
    store_film_gradients(s1, s2, weight_ptr, bias_ptr, dfilm_ptr, n, channel, valid, C)
    factor = film_factor(scale_ptr, film_bias_ptr, scale_stride, n, channel, valid)
    store_sample_gradients(samples_ptr, s0, s1, s2, c1, c2, gain, rstd, factor, n, channel, valid, pixels, C, VECTORS)


@triton.jit(do_not_specialize=["first_sample", "chunks", "tiles"])
def group_norm_silu_backward_sums_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    x_bias_ptr,  # (C_X,), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    film_bias_ptr,  # (2 C,): added to scale and shift, or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    sums_ptr,  # (B, chunks, 2, C) fp32, with x_bias (B, chunks, 3, C): S1, S2, S0
    parts_ptr,  # (B, G, parts, 2) fp32: sums over channels of gain * S1 and gain * S2
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
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
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "none"
):
    """S1, S2 and S0 of one block and chunk, and their weighted sums over each group's channels.

    Each thread sums over all tiles; the sums of all threads are added once, after the loop.
    """
    block, chunk, n = program_position(tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    n += first_sample
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    gain, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, film_bias_ptr, scale_stride, shift_stride, n, channel, valid, C
    )
    statistic = n * (C // CPG) + channel // CPG
    rstd = load_masked(rstd_ptr + statistic, valid)
    centre = load_masked(mean_ptr + statistic, valid) - input_bias(x_bias_ptr, channel, valid, C_X)
    slope = gain * rstd
    first = chunk.to(tl.int64) * tiles * ROWS
    t0 = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    t1 = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    t2 = tl.zeros([ROWS, GROUPS * WIDTH], tl.float32)
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & valid[None, :]
        x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
        x -= centre[None, :]
        dy = load_masked(pointers(dy_ptr, n, row, channel, pixels, C, CHANNELS_LAST), mask)
        dz = activation_gradient(dy, x * slope[None, :] + bias[None, :], ACTIVATION)
        t1 += dz
        t2 += dz * x
        if x_bias_ptr is not None:
            t0 += tl.where(mask, x, 0.0)
    s1 = tl.sum(t1, axis=0)
    s2 = tl.sum(t2, axis=0) * rstd  # (GROUPS * WIDTH,)
    VECTORS: tl.constexpr = 2 if x_bias_ptr is None else 3
    at = sums_ptr + (n * chunks + chunk) * (VECTORS * C) + channel
    tl.store(at, s1, valid)
    tl.store(at + C, s2, valid)
    if x_bias_ptr is not None:
        tl.store(at + 2 * C, tl.sum(t0, axis=0) * rstd, valid)
    c1 = tl.sum(by_group(gain * s1, GROUPS, WIDTH), axis=1)
    c2 = tl.sum(by_group(gain * s2, GROUPS, WIDTH), axis=1)  # (GROUPS,)
    store_part(parts_ptr, c1, c2, n, block, chunk, chunks, C, CPG, GROUPS, WIDTH)


@triton.jit(do_not_specialize=["first_sample", "chunks", "tiles"])
def group_norm_silu_backward_kernel(
    dy_ptr,  # (B, C, H, W), as x
    x_ptr,  # (B, C_X, H, W)
    skip_ptr,  # (B, C - C_X, H, W), as x, or None
    residual_ptr,  # (B, C_X, H, W), as x, or None
    skip_residual_ptr,  # (B, C - C_X, H, W), as x, or None
    dx_ptr,  # (B, C_X, H, W), as x
    dskip_ptr,  # (B, C - C_X, H, W), as x, or None
    x_bias_ptr,  # (C_X,), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    film_bias_ptr,  # (2 C,): added to scale and shift, or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    sums_ptr,  # (B, chunks, 2, C) fp32, with x_bias (B, chunks, 3, C): S1, S2, S0
    parts_ptr,  # (B, G, parts, 2) fp32: sums over channels of gain * S1 and gain * S2
    dfilm_ptr,  # (B, 2, C): dscale, dshift, or None
    samples_ptr,  # (B, 2, C) fp32, with x_bias (B, 3, C): dweight, dbias, dx_bias
    scale_stride,  # elements between samples of scale
    shift_stride,  # elements between samples of shift
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
    PARTS: tl.constexpr,  # parts of a group, padded to a power of two
    CHUNKS: tl.constexpr,  # chunks whose sums are loaded at once
    CHANNELS_LAST: tl.constexpr,  # whether x is channels_last, else contiguous
    SELECT: tl.constexpr,  # how x and skip are loaded, see load_input
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "none"
):
    """dx and dskip of one block and chunk; in the last chunk, the sample's gradients of the block's vectors as well."""
    # In reverse: what group_norm_silu_backward_sums_kernel loaded last is still in L2.
    block, chunk, n = program_position(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, CPG, GROUPS, WIDTH)
    n += first_sample
    channel, valid = columns(block, C, CPG, GROUPS, WIDTH)
    gain, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, film_bias_ptr, scale_stride, shift_stride, n, channel, valid, C
    )
    statistic = n * (C // CPG) + channel // CPG
    rstd = load_masked(rstd_ptr + statistic, valid)
    centre = load_masked(mean_ptr + statistic, valid) - input_bias(x_bias_ptr, channel, valid, C_X)
    _, at, exists = part_pointers(parts_ptr, n, block, chunks, C, CPG, GROUPS, WIDTH, PARTS)
    c1 = tl.sum(load_masked(at, exists), axis=1) / (CPG * (pixels * 1.0))
    c2 = tl.sum(load_masked(at + 1, exists), axis=1) / (CPG * (pixels * 1.0))
    c1 = to_columns(c1, GROUPS, WIDTH)
    c2 = to_columns(c2, GROUPS, WIDTH)

    if chunk == chunks - 1:  # these programs are the first to start
        VECTORS: tl.constexpr = 2 if x_bias_ptr is None else 3
        s0, s1, s2 = sums_of_chunks(sums_ptr, n, chunks, channel, valid, C, VECTORS, CHUNKS)
        store_film_gradients(s1, s2, weight_ptr, bias_ptr, dfilm_ptr, n, channel, valid, C)
        factor = film_factor(scale_ptr, film_bias_ptr, scale_stride, n, channel, valid)
        store_sample_gradients(
            samples_ptr, s0, s1, s2, c1, c2, gain, rstd, factor, n, channel, valid, pixels, C, VECTORS
        )

    slope = gain * rstd
    of_input = skip_factor(skip_ptr, skip_scale, channel, C_X)
    by_x = rstd * rstd * c2
    constant = rstd * c1
    first = chunk.to(tl.int64) * tiles * ROWS
    for start in range(first, tl.minimum(first + tiles * ROWS, pixels), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & valid[None, :]
        x = load_input(x_ptr, skip_ptr, skip_scale, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST, SELECT)
        x -= centre[None, :]
        dy = load_masked(pointers(dy_ptr, n, row, channel, pixels, C, CHANNELS_LAST), mask)
        dz = activation_gradient(dy, x * slope[None, :] + bias[None, :], ACTIVATION)
        dx = slope[None, :] * dz - (by_x[None, :] * x + constant[None, :])
        dx = dx * of_input[None, :]
        store_gradient(
            dx_ptr, dskip_ptr, residual_ptr, skip_residual_ptr, dx, n, row, channel, mask, pixels, C, C_X, CHANNELS_LAST
        )


@triton.jit(do_not_specialize=["batch"])
def group_norm_silu_vector_gradients_kernel(
    samples_ptr,  # (B, 2, C) fp32, with dx_bias (B, 3, C): dweight, dbias, dx_bias
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    dx_bias_ptr,  # (C_X,), or None
    dfilm_ptr,  # (B, 2, C): dscale, dshift, or None
    dfilm_bias_ptr,  # (2 C,), or None
    batch,  # B
    C: tl.constexpr,  # channels
    C_X: tl.constexpr,  # channels of x
    SAMPLES: tl.constexpr,  # samples loaded at once
    WIDTH: tl.constexpr,  # channels of a program
):
    """dweight, dbias, dx_bias and dfilm_bias of WIDTH channels: sums over the samples."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    VECTORS: tl.constexpr = 2 if dx_bias_ptr is None else 3
    dweight = tl.zeros([SAMPLES, WIDTH], tl.float32)
    dbias = tl.zeros([SAMPLES, WIDTH], tl.float32)
    dx_bias = tl.zeros([SAMPLES, WIDTH], tl.float32)
    dscale = tl.zeros([SAMPLES, WIDTH], tl.float32)
    dshift = tl.zeros([SAMPLES, WIDTH], tl.float32)
    for first in range(0, batch, SAMPLES):
        n = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        at = samples_ptr + n[:, None] * (VECTORS * C) + channel[None, :]
        there = (n < batch)[:, None]
        dweight += load_masked(at, there & (channel < C)[None, :])
        dbias += load_masked(at + C, there & (channel < C)[None, :])
        if dx_bias_ptr is not None:
            dx_bias += load_masked(at + 2 * C, there & (channel < C_X)[None, :])
        if dfilm_bias_ptr is not None:
            film_at = dfilm_ptr + n[:, None] * (2 * C) + channel[None, :]
            dscale += load_masked(film_at, there & (channel < C)[None, :])
            dshift += load_masked(film_at + C, there & (channel < C)[None, :])
    tl.store(dweight_ptr + channel, tl.sum(dweight, axis=0), channel < C)
    tl.store(dbias_ptr + channel, tl.sum(dbias, axis=0), channel < C)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + channel, tl.sum(dx_bias, axis=0), channel < C_X)
    if dfilm_bias_ptr is not None:
        tl.store(dfilm_bias_ptr + channel, tl.sum(dscale, axis=0), channel < C)
        tl.store(dfilm_bias_ptr + C + channel, tl.sum(dshift, axis=0), channel < C)
