"""GroupNorm, FiLM and SiLU fused, forward and backward, for contiguous and channels_last tensors (B, C, H, W).

    xhat = (x - mean) * rstd            over the pixels and channels of a sample's group, M numbers
    y = act(z), z = gain * xhat + offset,       gain = weight * (1 + scale), offset = bias * (1 + scale) + shift

Backward: z is computed again from x, dz = dy * act'(z). Everything follows from two sums over pixels for every sample
and channel, S1 = sum dz and S2 = sum dz * xhat:

    dshift = S1                         dbias = sum over samples of (1 + scale) * S1
    dscale = weight * S2 + bias * S1    dweight = sum over samples of (1 + scale) * S2
    dx = rstd * (gain * dz - c1 - xhat * c2),   c1, c2 = sums over the group's channels of gain * S1, gain * S2, by M

A group that fits into a program's registers is read once (the one-pass kernels). Larger ones are cut twice: channels
into blocks of GROUPS groups, or a piece of one group where it is wider than WIDTH; pixels into chunks, and a chunk
into tiles of ROWS pixels. The first kernel leaves something for each chunk, a part; the second merges the parts of a
group, always in the same order, and reads x again. No atomics; the same input gives the same bits."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    y_ptr,  # as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between rows of scale
    shift_stride,  # elements between rows of shift
    pixels,  # H W
    eps,  # added to the variance
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # layout of x
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
    CHANNELS_LAST: tl.constexpr,  # layout of x
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
    y_ptr,  # as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    part_mean_ptr,  # (B, G, parts) fp32
    part_m2_ptr,  # (B, G, parts) fp32, sums of squared deviations
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    scale_stride,  # elements between rows of scale
    shift_stride,  # elements between rows of shift
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
    CHANNELS_LAST: tl.constexpr,  # layout of x
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """y of one block and chunk; mean and rstd of its groups."""
    # In reverse: what partial_statistics read last is still in L2.
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
    dy_ptr,  # as x
    x_ptr,  # (B, C, H, W)
    dx_ptr,  # as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    s1_ptr,  # (B, chunks, C) fp32
    s2_ptr,  # (B, chunks, C) fp32
    scale_stride,  # elements between rows of scale
    shift_stride,  # elements between rows of shift
    pixels,  # H W
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # layout of x
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
    dy_ptr,  # as x
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
    scale_stride,  # elements between rows of scale
    shift_stride,  # elements between rows of shift
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    CHANNELS_LAST: tl.constexpr,  # layout of x
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
    dy_ptr,  # as x
    x_ptr,  # (B, C, H, W)
    dx_ptr,  # as x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (B, C), or None
    shift_ptr,  # (B, C), or None
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    part_c1_ptr,  # (B, G, parts) fp32
    part_c2_ptr,  # (B, G, parts) fp32
    scale_stride,  # elements between rows of scale
    shift_stride,  # elements between rows of shift
    pixels,  # H W
    chunks,  # chunks of pixels
    tiles,  # tiles of a chunk
    C: tl.constexpr,  # channels
    CPG: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # groups of a block
    WIDTH: tl.constexpr,  # channels of a tile
    ROWS: tl.constexpr,  # pixels of a tile
    PARTS: tl.constexpr,  # parts of a group, padded to a power of two
    CHANNELS_LAST: tl.constexpr,  # layout of x
    SILU: tl.constexpr,  # whether the activation is SiLU
):
    """dx of one block and chunk."""
    # In reverse: what partial_sums read last is still in L2.
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
    scale_stride,  # elements between rows of scale
    batch,  # B
    chunks,  # chunks of pixels
    C: tl.constexpr,  # channels
    SAMPLES: tl.constexpr,  # samples read at once
    CHUNKS: tl.constexpr,  # chunks read at once
    WIDTH: tl.constexpr,  # channels of a tile
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


# ---- launchers

ONE_PASS = 16384  # elements of a group, padded to powers of two, that stay on chip, at 1024 per warp
TILE = {"forward": 8192, "backward": 4096}  # elements of a tile of larger groups, for 8 warps
CHANNELS_LAST_WIDTH = 64  # channels of a channels_last tile: whole cache lines
SECTOR = 32  # bytes of a memory transaction; a channels_last group narrower than this is read with its neighbours
PROGRAMS = 4096  # pixels are split into chunks up to this number of programs: enough waves for any GPU
PARTS = 256  # maximum parts of a group, since every program of the second kernel reads them all


class Cut(NamedTuple):
    """How a tensor is cut for the two kernels: a tile has ROWS pixels and GROUPS * WIDTH channels."""

    constants: dict[str, int]  # GROUPS, WIDTH, ROWS
    chunks: int
    tiles: int  # of a chunk
    parts: int  # of a group
    programs: int
    num_warps: int


def cut(x: Tensor, num_groups: int, elements: int) -> Cut:
    """Cut x (B, C, H, W) into tiles of at most `elements`, and into enough programs."""
    batch, channels, height, width = x.shape
    pixels, cpg = height * width, channels // num_groups
    all_rows, all_columns = triton.next_power_of_2(pixels), triton.next_power_of_2(cpg)
    if is_channels_last(x):
        columns_of_group = min(all_columns, CHANNELS_LAST_WIDTH)
        groups = min(triton.next_power_of_2(num_groups), CHANNELS_LAST_WIDTH // columns_of_group)
    else:
        columns_of_group, groups = min(all_columns, max(4, elements // all_rows)), 1
    rows = min(all_rows, max(1, elements // (groups * columns_of_group)))
    pieces = triton.cdiv(cpg, columns_of_group)
    blocks = triton.cdiv(num_groups, groups) * pieces
    row_tiles = triton.cdiv(pixels, rows)
    max_chunks = max(1, min(PARTS, 8 * PARTS // groups) // pieces)
    tiles = triton.cdiv(row_tiles, min(max_chunks, triton.cdiv(PROGRAMS, batch * blocks)))
    chunks = triton.cdiv(row_tiles, tiles)
    num_warps = max(1, 8 * rows * groups * columns_of_group // elements)
    return Cut(
        dict(GROUPS=groups, WIDTH=columns_of_group, ROWS=rows),
        chunks,
        tiles,
        pieces * chunks,
        batch * blocks * chunks,
        min(8, num_warps),
    )


def one_pass_tile(x: Tensor, num_groups: int) -> dict[str, int] | None:
    """Tile and warps for a whole group; None if it is too large, or has too few channels to be read alone."""
    cpg = x.shape[1] // num_groups
    rows, columns_of_group = triton.next_power_of_2(x.shape[2] * x.shape[3]), triton.next_power_of_2(cpg)
    narrow = is_channels_last(x) and cpg * x.element_size() < SECTOR
    if narrow or rows * columns_of_group > ONE_PASS:
        return None
    return {"ROWS": rows, "WIDTH": columns_of_group, "num_warps": max(1, rows * columns_of_group // 1024)}


def is_channels_last(x: Tensor) -> bool:
    """Of a tensor that is contiguous in one of the two layouts, or in both, which counts as contiguous."""
    return not x.is_contiguous()


def row_stride(vectors: Tensor | None) -> int:
    return 0 if vectors is None else vectors.stride(0)


def group_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, mean and rstd (B, G) in fp32.

    x (B, C, H, W) is contiguous or channels_last; so are weight, bias (C,) and the rows of scale, shift (B, C).
    """
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(batch, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    vectors, strides = (weight, bias, scale, shift), (row_stride(scale), row_stride(shift))
    constants = dict(C=channels, CPG=channels // num_groups, CHANNELS_LAST=is_channels_last(x))
    with torch.cuda.device_of(x):
        if whole := one_pass_tile(x, num_groups):
            group_norm_silu_one_pass_forward_kernel[(batch * num_groups,)](
                x, y, *vectors, mean, rstd, *strides, height * width, eps, **constants, **whole, SILU=silu
            )
            return y, mean, rstd
        c = cut(x, num_groups, TILE["forward"])
        constants |= c.constants
        parts = torch.empty(2, batch, num_groups, c.parts, dtype=torch.float32, device=x.device).unbind()
        group_norm_silu_statistics_kernel[(c.programs,)](
            x, *parts, height * width, c.chunks, c.tiles, **constants, num_warps=c.num_warps
        )
        group_norm_silu_forward_kernel[(c.programs,)](
            x,
            y,
            *vectors,
            *parts,
            mean,
            rstd,
            *strides,
            height * width,
            c.chunks,
            c.tiles,
            eps,
            **constants,
            PARTS=triton.next_power_of_2(c.parts),
            SILU=silu,
            num_warps=c.num_warps,
        )
    return y, mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, dscale, dshift, the last two None without FiLM. dy has the layout of x."""
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x)
    saved = (weight, bias, scale, shift, mean, rstd)
    strides = (row_stride(scale), row_stride(shift))
    constants = dict(C=channels, CPG=channels // num_groups, CHANNELS_LAST=is_channels_last(x), SILU=silu)
    with torch.cuda.device_of(x):
        if whole := one_pass_tile(x, num_groups):
            s1, s2 = torch.empty(2, batch, 1, channels, dtype=torch.float32, device=x.device).unbind()
            group_norm_silu_one_pass_backward_kernel[(batch * num_groups,)](
                dy, x, dx, *saved, s1, s2, *strides, height * width, **constants, **whole
            )
            return dx, *launch_vector_gradients(s1, s2, weight, bias, scale, shift)
        c = cut(x, num_groups, TILE["backward"])
        constants |= c.constants
        s1, s2 = torch.empty(2, batch, c.chunks, channels, dtype=torch.float32, device=x.device).unbind()
        parts = torch.empty(2, batch, num_groups, c.parts, dtype=torch.float32, device=x.device).unbind()
        group_norm_silu_backward_sums_kernel[(c.programs,)](
            dy,
            x,
            *saved,
            s1,
            s2,
            *parts,
            *strides,
            height * width,
            c.chunks,
            c.tiles,
            **constants,
            num_warps=c.num_warps,
        )
        group_norm_silu_backward_kernel[(c.programs,)](
            dy,
            x,
            dx,
            *saved,
            *parts,
            *strides,
            height * width,
            c.chunks,
            c.tiles,
            **constants,
            PARTS=triton.next_power_of_2(c.parts),
            num_warps=c.num_warps,
        )
        return dx, *launch_vector_gradients(s1, s2, weight, bias, scale, shift)


def launch_vector_gradients(
    s1: Tensor, s2: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dweight, dbias (C,), dscale, dshift (B, C) from S1, S2 (B, chunks, C)."""
    batch, chunks, channels = s1.shape
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dscale = dshift = None
    if scale is not None:
        dscale = torch.empty(batch, channels, dtype=scale.dtype, device=scale.device)
        assert shift is not None
        dshift = torch.empty(batch, channels, dtype=shift.dtype, device=shift.device)
    at_once = min(64, triton.next_power_of_2(chunks))
    group_norm_silu_vector_gradients_kernel[(triton.cdiv(channels, 32),)](
        s1,
        s2,
        weight,
        bias,
        scale,
        dweight,
        dbias,
        dscale,
        dshift,
        row_stride(scale),
        batch,
        chunks,
        C=channels,
        SAMPLES=64 // at_once,
        CHUNKS=at_once,
        WIDTH=32,
        num_warps=8,
    )
    return dweight, dbias, dscale, dshift


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    last, contiguous = torch.channels_last, torch.contiguous_format
    for dtype, layout, channels, side, film in (
        (torch.bfloat16, last, 512, 64, True),
        (torch.bfloat16, last, 128, 256, False),
        (torch.bfloat16, last, 512, 16, True),
        (torch.bfloat16, contiguous, 512, 64, True),
        (torch.float32, last, 512, 64, True),
        (torch.float32, contiguous, 512, 16, True),
    ):
        x = torch.empty(8, channels, side, side, dtype=dtype, device="meta", memory_format=layout)
        vector, statistic = torch.empty(channels, device="meta"), torch.empty(8, 8, device="meta")
        scale, shift = (
            torch.empty(8, 2 * channels, dtype=dtype, device="meta").chunk(2, dim=1) if film else (None, None)
        )
        label = f"{str(dtype)[6:]} {'channels_last' if layout is last else 'contiguous'} {channels}x{side}x{side}"
        yield f"forward {label}", partial(group_norm_forward, x, vector, vector, scale, shift, 8, 1e-5, True)
        yield (
            f"backward {label}",
            partial(group_norm_backward, x, x, vector, vector, scale, shift, statistic, statistic, 8, True),
        )
