"""GroupNorm, FiLM and an activation fused, forward and backward, for contiguous and channels_last tensors (B, C, H, W).

    v = x + x_bias, and behind its C_X channels skip * skip_scale (both optional)
    xhat = (v - mean) * rstd            over the pixels and channels of a sample's group, M elements
    y = act(z), z = gain * xhat + offset,       gain = weight * (1 + scale), offset = bias * (1 + scale) + shift

Backward: z is computed again from x, dz = dy * act'(z). Everything follows from three sums over pixels for every
sample and channel, S0 = sum xhat, S1 = sum dz and S2 = sum dz * xhat; P is the number of pixels:

    dshift = S1                         dbias = sum over samples of (1 + scale) * S1
    dscale = weight * S2 + bias * S1    dweight = sum over samples of (1 + scale) * S2
    dv = rstd * (gain * dz - c1 - xhat * c2),   c1, c2 = sums over the group's channels of gain * S1, gain * S2, by M
    dx_bias = sum over samples and pixels of dv = sum over samples of rstd * (gain * S1 - P * c1 - S0 * c2)
    dx = dv + x_residual                dskip = skip_scale * dv + skip_residual

x_residual and skip_residual are the gradients that came to x and skip on a residual path.

A group that fits into a program's registers is read once (the one-pass kernels). Larger ones are cut twice: channels
into blocks of GROUPS groups, or a piece of one group where it is wider than WIDTH; pixels into chunks, and a chunk
into tiles of ROWS pixels. The first kernel stores a partial result per chunk, a part; the second merges the parts of a
group, always in the same order, and reads x again. Where x (and dy) exceed the L2 cache a few times, both are
launched for some samples at a time, so that the second reads from it. No atomics; the same input gives the same bits.

The kernels are in group_norm_forward_kernels.py and group_norm_backward_kernels.py; here are their launchers.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .device import architecture
from .group_norm_backward_kernels import (
    group_norm_silu_backward_kernel,
    group_norm_silu_backward_sums_kernel,
    group_norm_silu_one_pass_backward_kernel,
    group_norm_silu_vector_gradients_kernel,
)
from .group_norm_forward_kernels import (
    group_norm_silu_forward_kernel,
    group_norm_silu_one_pass_forward_kernel,
    group_norm_silu_statistics_kernel,
)

MAX_ONE_PASS = 16384  # elements of a group, padded to powers of two, that fit in registers at 1024 per warp
# The backward pass of GELU takes half of it: erf needs more registers, which otherwise spill.
TILE_ELEMENTS = {"forward": 8192, "backward": 4096}  # elements of a tile of larger groups, for 8 warps
CHANNELS_LAST_WIDTH = 64  # channels of a channels_last tile: whole cache lines
SECTOR = 32  # bytes of a memory transaction; a channels_last group narrower than this is read with its neighbours
PROGRAMS = 1024  # pixels are split into chunks up to this number of programs: four waves of two on an H100's 132 cores
MAX_PARTS = 256  # parts of a group: every program of the second kernel reads them all
CHUNKS = 16  # chunks whose S0, S1 and S2 are loaded at once
L2_BYTES = 24 << 20  # of tensors read twice that stay in L2 while results are written: half of an H100's 50 MB
MAX_LAUNCHES = 4  # of a kernel for this: each costs the host and the GPU microseconds; neither effect is measured yet
VECTOR_WIDTH = 8  # channels of a program that sums over samples: 32 bytes, so that there are many programs
VECTOR_SAMPLES = 64  # samples that it loads at once


class Cut(NamedTuple):
    """How a tensor is cut for the split kernels: a tile has ROWS pixels and GROUPS * WIDTH channels."""

    constants: dict[str, int]  # GROUPS, WIDTH, ROWS
    chunks: int
    tiles: int  # per chunk
    parts: int  # per group
    programs: int
    num_warps: int


class Plan(NamedTuple):
    """How the kernels for a tensor are launched."""

    pixels: int
    programs: int  # of a sample
    samples: int  # of a launch
    chunks: int  # 0: one pass
    tiles: int
    parts: int
    first: dict[str, Any]  # constants and warps of the first kernel, or of the only one
    second: dict[str, Any]


class Gradients(NamedTuple):
    """What group_norm_backward returns; those of absent inputs are None."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dfilm: Tensor | None  # (B, 2, C): dscale, dshift
    dfilm_bias: Tensor | None
    dx_bias: Tensor | None
    dskip: Tensor | None


def cut(shape: tuple[int, ...], channels_last: bool, num_groups: int, elements: int) -> Cut:
    """Cut a tensor (B, C, H, W) into tiles of at most `elements`, and into enough programs."""
    batch, channels, height, width = shape
    pixels, cpg = height * width, channels // num_groups
    all_rows, all_columns = triton.next_power_of_2(pixels), triton.next_power_of_2(cpg)
    if channels_last:
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


def one_pass_tile(
    shape: tuple[int, ...], channels_last: bool, num_groups: int, itemsize: int, max_elements: int
) -> dict[str, int] | None:
    """Tile and warps for a whole group; None if it is too large, or too narrow to be loaded without its neighbours."""
    cpg = shape[1] // num_groups
    rows, columns_of_group = triton.next_power_of_2(shape[2] * shape[3]), triton.next_power_of_2(cpg)
    narrow = channels_last and cpg * itemsize < SECTOR
    if narrow or rows * columns_of_group > max_elements:
        return None
    return {"ROWS": rows, "WIDTH": columns_of_group, "num_warps": max(1, rows * columns_of_group // 1024)}


def samples_in_l2(batch: int, bytes_of_sample: int) -> int:
    """Samples of a launch: all, unless a few launches of fewer fit into L2 and read from there the second time."""
    if batch * bytes_of_sample <= L2_BYTES or bytes_of_sample > L2_BYTES:
        return batch
    launches = triton.cdiv(batch, L2_BYTES // bytes_of_sample)
    return batch if launches > MAX_LAUNCHES else triton.cdiv(batch, launches)


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    skip_channels: int,
    channels_last: bool,
    itemsize: int,
    num_groups: int,
    activation: str,
    direction: str,
    select: bool = True,
) -> Plan:
    """The launches for x of this shape and a skip of so many channels; direction is "forward" or "backward".

    With `select`, kernels load x and skip at once (load_input in group_norm_device.py).
    """
    batch, x_channels, height, width = shape
    channels, pixels = x_channels + skip_channels, height * width
    constants: dict[str, Any] = dict(
        C=channels, C_X=x_channels, CPG=channels // num_groups, CHANNELS_LAST=channels_last, SELECT=select
    )
    chosen = dict(ACTIVATION=activation)
    max_elements = MAX_ONE_PASS // 2 if (activation, direction) == ("gelu", "backward") else MAX_ONE_PASS
    whole = one_pass_tile((batch, channels, height, width), channels_last, num_groups, itemsize, max_elements)
    if whole is not None:
        return Plan(pixels, num_groups, batch, 0, 0, 0, constants | whole | chosen, {})
    forward = direction == "forward"
    samples = samples_in_l2(batch, channels * pixels * itemsize * (1 if forward else 2))
    c = cut((samples, channels, height, width), channels_last, num_groups, TILE_ELEMENTS[direction])
    constants |= c.constants | dict(num_warps=c.num_warps)
    second = constants | chosen | dict(PARTS=triton.next_power_of_2(c.parts))
    if forward:
        return Plan(pixels, c.programs // samples, samples, c.chunks, c.tiles, c.parts, constants, second)
    first, second = constants | chosen, second | dict(CHUNKS=CHUNKS)
    return Plan(pixels, c.programs // samples, samples, c.chunks, c.tiles, c.parts, first, second)


def group_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str,
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W) in x's layout and dtype, mean and rstd (B, G) in fp32.

    x (B, C_X, H, W) is contiguous or channels_last; skip (B, C - C_X, H, W) has its layout and dtype. weight, bias
    (C,), x_bias (C_X,), film_bias (2 C,) and the rows of scale, shift (B, C) are contiguous.
    """
    shape, channels_last, device = x.shape, is_channels_last(x), x.device
    batch = shape[0]
    if skip is None:
        p = plan(shape, 0, channels_last, x.itemsize, num_groups, activation, "forward")
        y = torch.empty_like(x)
    else:
        select = can_select(device)
        p = plan(shape, skip.shape[1], channels_last, x.itemsize, num_groups, activation, "forward", select)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty((batch, weight.shape[0], *shape[2:]), dtype=x.dtype, device=device, memory_format=layout)
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=device)
    rstd = torch.empty((batch, num_groups), dtype=torch.float32, device=device)
    tensors = (x, skip, y, x_bias, weight, bias, scale, shift, film_bias)
    scales = (0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0), skip_scale)
    with torch.cuda.device_of(x):
        if not p.chunks:
            group_norm_silu_one_pass_forward_kernel[(batch * p.programs,)](
                *tensors, mean, rstd, *scales, p.pixels, eps, **p.first
            )
            return y, mean, rstd
        parts = torch.empty((batch, num_groups, p.parts, 2), dtype=torch.float32, device=device)
        for first_sample in range(0, batch, p.samples):
            grid = (p.programs * min(p.samples, batch - first_sample),)
            position = (first_sample, p.pixels, p.chunks, p.tiles)
            group_norm_silu_statistics_kernel[grid](x, skip, x_bias, parts, skip_scale, *position, **p.first)
            group_norm_silu_forward_kernel[grid](*tensors, parts, mean, rstd, *scales, *position, eps, **p.second)
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
    activation: str,
    film_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
    x_residual: Tensor | None = None,
    skip_residual: Tensor | None = None,
) -> Gradients:
    """All gradients. dy (B, C, H, W), and the residuals, shaped as x and skip, have the layout of x."""
    shape, device, fp32 = x.shape, x.device, torch.float32
    batch, channels = shape[0], weight.shape[0]
    select = skip is None or can_select(device)
    p = plan(shape, channels - shape[1], is_channels_last(x), x.itemsize, num_groups, activation, "backward", select)
    dx = torch.empty_like(x)
    dskip = None if skip is None else torch.empty_like(skip)
    dfilm = None
    scales: tuple[int, int, float] = (0, 0, skip_scale)
    if scale is not None:
        assert shift is not None
        dfilm = torch.empty((batch, 2, channels), dtype=scale.dtype, device=device)
        scales = (scale.stride(0), shift.stride(0), skip_scale)
    vectors = 2 if x_bias is None else 3
    samples = torch.empty((batch, vectors, channels), dtype=fp32, device=device)
    gradients = (x_residual, skip_residual, dx, dskip)
    saved = (x_bias, weight, bias, scale, shift, film_bias, mean, rstd)
    results = (dfilm, samples, *scales)
    with torch.cuda.device_of(x):
        if not p.chunks:
            group_norm_silu_one_pass_backward_kernel[(batch * p.programs,)](
                dy, x, skip, *gradients, *saved, *results, p.pixels, **p.first
            )
        else:
            sums = torch.empty((batch, p.chunks, vectors, channels), dtype=fp32, device=device)
            parts = torch.empty((batch, num_groups, p.parts, 2), dtype=fp32, device=device)
            for first_sample in range(0, batch, p.samples):
                grid = (p.programs * min(p.samples, batch - first_sample),)
                position = (first_sample, p.pixels, p.chunks, p.tiles)
                group_norm_silu_backward_sums_kernel[grid](
                    dy, x, skip, *saved, sums, parts, *scales, *position, **p.first
                )
                group_norm_silu_backward_kernel[grid](
                    dy, x, skip, *gradients, *saved, sums, parts, *results, *position, **p.second
                )
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dx_bias = None if x_bias is None else torch.empty_like(x_bias)
        dfilm_bias = None if film_bias is None else torch.empty_like(film_bias)
        group_norm_silu_vector_gradients_kernel[(triton.cdiv(channels, VECTOR_WIDTH),)](
            samples,
            dweight,
            dbias,
            dx_bias,
            dfilm,
            dfilm_bias,
            batch,
            C=channels,
            C_X=shape[1],
            SAMPLES=VECTOR_SAMPLES,
            WIDTH=VECTOR_WIDTH,
        )
    return Gradients(dx, dweight, dbias, dfilm, dfilm_bias, dx_bias, dskip)


def can_select(device: torch.device) -> bool:
    """Whether Triton compiles a load from addresses in two tensors: for AMD's GPUs it does not."""
    return not architecture(device).startswith("gfx")


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor in one of the two layouts is channels_last; a tensor in both counts as contiguous."""
    return not x.is_contiguous()


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    last, contiguous = torch.channels_last, torch.contiguous_format
    for dtype, layout, channels, side, film, more in (
        (torch.bfloat16, last, 512, 64, True, ""),
        (torch.bfloat16, last, 128, 256, False, ""),
        (torch.bfloat16, last, 512, 16, True, ""),
        (torch.bfloat16, contiguous, 512, 64, True, ""),
        (torch.float32, last, 512, 64, True, ""),
        (torch.float32, contiguous, 512, 16, True, ""),
        (torch.bfloat16, last, 512, 64, True, "biases"),
        (torch.bfloat16, last, 512, 16, True, "biases"),
        (torch.bfloat16, last, 768, 64, False, "skip and residuals"),
        (torch.bfloat16, last, 512, 16, False, "skip and residuals"),
        (torch.bfloat16, contiguous, 768, 64, False, "skip and residuals"),
        (torch.bfloat16, last, 512, 64, True, "gelu"),
        (torch.bfloat16, last, 512, 16, True, "gelu"),
        (torch.bfloat16, last, 256, 16, True, "gelu"),
    ):
        meta = partial(meta_map, side=side, dtype=dtype, layout=layout)
        vector, statistic = torch.empty(channels, device="meta"), torch.empty(8, 8, device="meta")
        film_bias, x_bias = (torch.empty(2 * channels, device="meta"), vector) if more == "biases" else (None, None)
        x, skip = meta(channels), None
        if more == "skip and residuals":
            x, skip = meta(320), meta(channels - 320)  # 64-channel tiles are whole; of 512 / 8 or 768 / 8 channels
        activation = "gelu" if more == "gelu" else "silu"
        scale = shift = None
        if film:
            scale, shift = torch.empty(8, 2 * channels, dtype=dtype, device="meta").chunk(2, dim=1)  # (B, C) each
        dtype_name = str(dtype).removeprefix("torch.")
        layout_name = "channels_last" if layout is last else "contiguous"
        label = " ".join(filter(None, (dtype_name, layout_name, f"{channels}x{side}x{side}", more)))
        vectors = (vector, vector, scale, shift)
        yield (
            f"forward {label}",
            partial(group_norm_forward, x, *vectors, 8, 1e-5, activation, film_bias, x_bias, skip, 0.7),
        )
        saved = (meta(channels), x, *vectors, statistic, statistic, 8, activation, film_bias, x_bias, skip, 0.7)
        yield f"backward {label}", partial(group_norm_backward, *saved, *((x, skip) if skip is not None else ()))


def meta_map(channels: int, *, side: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(8, channels, side, side, dtype=dtype, device="meta", memory_format=layout)
