"""LayerNorm modulated per sample: y = xhat (1 + scale) + shift, for tokens x (B, N, C), scale and shift (B, C).

    xhat = (x - mean) rstd, mean and rstd over C; with g = (1 + scale) dy:
    dx = rstd (g - mean_C(g) - xhat mean_C(g xhat)),  dscale = sum_N dy xhat,  dshift = sum_N dy

Forward reads x and writes y; backward reads x and dy and writes dx: 4 and 6 bytes per element in 16 bits. PyTorch moves
8 and about 20. Statistics are fp32, by two passes over registers. A program of the backward pass adds dscale and
dshift of its tokens; the sums of the programs are added in their order, so that results are reproducible.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 8192  # a program holds whole tokens in registers
ELEMENTS = 4096  # of a tile
TOKENS = 32  # of a program of the backward pass


@triton.jit
def load_tile(x_ptr, offset, mask):
    """A tile in fp32, zero outside."""
    return tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)


@triton.jit
def load_row(vector_ptr, sample, stride, channel, channels):
    """The row of one sample of a vector (B, C), in fp32: (1, WIDTH)."""
    return tl.load(vector_ptr + sample * stride + channel, channel < channels, 0.0).to(tl.float32)[None, :]


@triton.jit
def modulated_norm_forward_kernel(
    x_ptr,  # (B, N, C)
    scale_ptr,  # (B, C), rows of stride scale_stride
    shift_ptr,  # (B, C), rows of stride shift_stride
    y_ptr,  # (B, N, C)
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    tokens,  # N
    channels,  # C
    scale_stride,
    shift_stride,
    eps,
    ROWS: tl.constexpr,  # tokens of a tile
    WIDTH: tl.constexpr,  # channels of a tile, at least C
):
    """y, mean and rstd of one tile (ROWS, WIDTH)."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row = sample * tokens + token
    offset = row[:, None] * channels + channel[None, :]
    mask = (token < tokens)[:, None] & (channel < channels)[None, :]
    x = load_tile(x_ptr, offset, mask)
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps * 1.0)
    scale = load_row(scale_ptr, sample, scale_stride, channel, channels)
    shift = load_row(shift_ptr, sample, shift_stride, channel, channels)
    tl.store(y_ptr + offset, centred * rstd[:, None] * (1.0 + scale) + shift, mask)
    tl.store(mean_ptr + row, mean, token < tokens)
    tl.store(rstd_ptr + row, rstd, token < tokens)


@triton.jit
def modulated_norm_backward_kernel(
    dy_ptr,  # (B, N, C)
    x_ptr,  # (B, N, C)
    scale_ptr,  # (B, C), rows of stride scale_stride
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    dx_ptr,  # (B, N, C)
    sums_ptr,  # (B, blocks, 2, C) fp32: dscale and dshift of the tokens of each program
    tokens,  # N
    channels,  # C
    scale_stride,
    ROWS: tl.constexpr,  # tokens of a tile
    TILES: tl.constexpr,  # tiles of a program
    WIDTH: tl.constexpr,  # channels of a tile, at least C
):
    """dx of ROWS x TILES tokens of one sample, and their sums."""
    blocks = tl.cdiv(tokens, ROWS * TILES)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * (ROWS * TILES)
    channel = tl.arange(0, WIDTH)
    gain = 1.0 + load_row(scale_ptr, sample, scale_stride, channel, channels)
    dscale = tl.zeros((ROWS, WIDTH), tl.float32)
    dshift = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(TILES):
        token = first + tile * ROWS + tl.arange(0, ROWS)
        row = sample * tokens + token
        offset = row[:, None] * channels + channel[None, :]
        mask = (token < tokens)[:, None] & (channel < channels)[None, :]
        dy = load_tile(dy_ptr, offset, mask)
        mean = tl.load(mean_ptr + row, token < tokens, 0.0)
        rstd = tl.load(rstd_ptr + row, token < tokens, 0.0)
        xhat = tl.where(mask, (load_tile(x_ptr, offset, mask) - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * gain
        c1 = tl.sum(g, axis=1) / channels
        c2 = tl.sum(g * xhat, axis=1) / channels
        tl.store(dx_ptr + offset, (g - c1[:, None] - xhat * c2[:, None]) * rstd[:, None], mask)
        dscale += dy * xhat
        dshift += dy
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(sums, tl.sum(dscale, axis=0), channel < channels)
    tl.store(sums + channels, tl.sum(dshift, axis=0), channel < channels)


def tile_of(channels: int) -> tuple[int, int]:
    """Tokens and channels of a tile."""
    width = triton.next_power_of_2(channels)
    return max(1, ELEMENTS // width), width


def modulated_norm_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd (B, N) in fp32. x is contiguous; the rows of scale and shift are."""
    batch, tokens, channels = x.shape
    rows, width = tile_of(channels)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((batch, tokens), dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        modulated_norm_forward_kernel[(batch * triton.cdiv(tokens, rows),)](
            x,
            scale,
            shift,
            y,
            mean,
            rstd,
            tokens,
            channels,
            scale.stride(0),
            shift.stride(0),
            eps,
            ROWS=rows,
            WIDTH=width,
            num_warps=8,
        )
    return y, mean, rstd


def modulated_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and dscale and dshift as (B, 2, C) in fp32."""
    batch, tokens, channels = x.shape
    rows, width = tile_of(channels)
    tiles = max(1, TOKENS // rows)
    blocks = triton.cdiv(tokens, rows * tiles)
    dx = torch.empty_like(x)
    sums = torch.empty((batch, blocks, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        modulated_norm_backward_kernel[(batch * blocks,)](
            dy,
            x,
            scale,
            mean,
            rstd,
            dx,
            sums,
            tokens,
            channels,
            scale.stride(0),
            ROWS=rows,
            TILES=tiles,
            WIDTH=width,
            num_warps=8,
        )
    return dx, sums[:, 0] if blocks == 1 else sums.sum(dim=1)  # (B, 2, C)


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype, channels in ((torch.bfloat16, 768), (torch.bfloat16, 1280), (torch.float32, 768)):
        x = torch.empty(8, 256, channels, dtype=dtype, device="meta")
        vector = torch.empty(8, channels, dtype=dtype, device="meta")
        mean = torch.empty(8, 256, device="meta")
        label = f"{str(dtype).removeprefix('torch.')} C={channels}"
        yield f"{label} forward", partial(modulated_norm_forward, x, vector, vector, 1e-5)
        yield f"{label} backward", partial(modulated_norm_backward, x, x, vector, mean, mean)
