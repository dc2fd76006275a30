"""GroupNorm, FiLM and SiLU fused, forward and backward, for contiguous and channels_last tensors (B, C, H, W).

    xhat = (x - mean) * rstd            over the pixels and channels of a sample's group, M elements
    y = act(z), z = gain * xhat + offset,       gain = weight * (1 + scale), offset = bias * (1 + scale) + shift

Backward: z is computed again from x, dz = dy * act'(z). Everything follows from two sums over pixels for every sample
and channel, S1 = sum dz and S2 = sum dz * xhat:

    dshift = S1                         dbias = sum over samples of (1 + scale) * S1
    dscale = weight * S2 + bias * S1    dweight = sum over samples of (1 + scale) * S2
    dx = rstd * (gain * dz - c1 - xhat * c2),   c1, c2 = sums over the group's channels of gain * S1, gain * S2, by M

A group that fits into a program's registers is read once (the one-pass kernels). Larger ones are cut twice: channels
into blocks of GROUPS groups, or a piece of one group where it is wider than WIDTH; pixels into chunks, and a chunk
into tiles of ROWS pixels. The first kernel stores a partial result per chunk, a part; the second merges the parts of a
group, always in the same order, and reads x again. No atomics; the same input gives the same bits.

The kernels are in group_norm_kernels.py; here are their launchers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .group_norm_kernels import (
    group_norm_silu_backward_kernel,
    group_norm_silu_backward_sums_kernel,
    group_norm_silu_forward_kernel,
    group_norm_silu_one_pass_backward_kernel,
    group_norm_silu_one_pass_forward_kernel,
    group_norm_silu_statistics_kernel,
    group_norm_silu_vector_gradients_kernel,
)

MAX_ONE_PASS = 16384  # elements of a group, padded to powers of two, that fit in registers at 1024 per warp
TILE_ELEMENTS = {"forward": 8192, "backward": 4096}  # elements of a tile of larger groups, for 8 warps
CHANNELS_LAST_WIDTH = 64  # channels of a channels_last tile: whole cache lines
SECTOR = 32  # bytes of a memory transaction; a channels_last group narrower than this is read with its neighbours
PROGRAMS = 4096  # pixels are split into chunks up to this number of programs: enough waves for any GPU
MAX_PARTS = 256  # parts of a group: every program of the second kernel reads them all
VECTOR_WIDTH = 32  # channels of a program for the gradients of weight, bias, scale and shift
VECTOR_ROWS = 64  # rows (sample, chunk) of S1 and S2 that it loads at once


class Cut(NamedTuple):
    """How a tensor is cut for the split kernels: a tile has ROWS pixels and GROUPS * WIDTH channels."""

    constants: dict[str, int]  # GROUPS, WIDTH, ROWS
    chunks: int
    tiles: int  # per chunk
    parts: int  # per group
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
    max_chunks = max(1, min(MAX_PARTS, 8 * MAX_PARTS // groups) // pieces)
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
    """Tile and warps for a whole group; None if it is too large, or too narrow to be loaded without its neighbours."""
    cpg = x.shape[1] // num_groups
    rows, columns_of_group = triton.next_power_of_2(x.shape[2] * x.shape[3]), triton.next_power_of_2(cpg)
    narrow = is_channels_last(x) and cpg * x.element_size() < SECTOR
    if narrow or rows * columns_of_group > MAX_ONE_PASS:
        return None
    return {"ROWS": rows, "WIDTH": columns_of_group, "num_warps": max(1, rows * columns_of_group // 1024)}


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor in one of the two layouts is channels_last; a tensor in both counts as contiguous."""
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
        c = cut(x, num_groups, TILE_ELEMENTS["forward"])
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
        c = cut(x, num_groups, TILE_ELEMENTS["backward"])
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
    chunks_at_once = min(VECTOR_ROWS, triton.next_power_of_2(chunks))
    group_norm_silu_vector_gradients_kernel[(triton.cdiv(channels, VECTOR_WIDTH),)](
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
        SAMPLES=VECTOR_ROWS // chunks_at_once,
        CHUNKS=chunks_at_once,
        WIDTH=VECTOR_WIDTH,
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
        scale = shift = None
        if film:
            scale, shift = torch.empty(8, 2 * channels, dtype=dtype, device="meta").chunk(2, dim=1)  # (B, C) each
        dtype_name = str(dtype).removeprefix("torch.")
        layout_name = "channels_last" if layout is last else "contiguous"
        label = f"{dtype_name} {layout_name} {channels}x{side}x{side}"
        vectors = (vector, vector, scale, shift)
        yield f"forward {label}", partial(group_norm_forward, x, *vectors, 8, 1e-5, True)
        yield f"backward {label}", partial(group_norm_backward, x, x, *vectors, statistic, statistic, 8, True)
