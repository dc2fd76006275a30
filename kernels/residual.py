"""The end of a residual block: out = h + residual + bias + more_bias, for maps (B, C, H, W) and the biases (C,) of the
convolutions that made them.

h, residual and out are read or written once, which is 3 maps; each addition of PyTorch moves 2 or 3 more. The sum is
fp32 and rounded once. The backward pass needs no kernel: the gradients of h and residual are that of out.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program
MAX_WIDTH = 256  # channels or pixels of a tile: 512 contiguous bytes in bf16


@triton.jit
def load_bias(bias_ptr, more_bias_ptr, channel, mask):
    """The sum of the biases of some channels, in fp32."""
    bias = tl.load(bias_ptr + channel, mask, 0.0).to(tl.float32)
    if more_bias_ptr is not None:
        bias += tl.load(more_bias_ptr + channel, mask, 0.0).to(tl.float32)
    return bias


@triton.jit
def add_residual_kernel(
    h_ptr,  # (B, C, H, W)
    residual_ptr,  # (B, C, H, W), as h
    bias_ptr,  # (C,)
    more_bias_ptr,  # (C,), or None
    out_ptr,  # (B, C, H, W), as h
    rows,  # B H W if channels_last, else B C
    columns,  # C if channels_last, else H W
    channels,  # C
    ROWS: tl.constexpr,  # rows of a tile
    WIDTH: tl.constexpr,  # columns of a tile
    CHANNELS_LAST: tl.constexpr,  # whether a row is a pixel, else a channel
):
    """out of one tile (ROWS, WIDTH)."""
    blocks = tl.cdiv(columns, WIDTH)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    offset = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if CHANNELS_LAST:
        bias = load_bias(bias_ptr, more_bias_ptr, column, column < columns)[None, :]
    else:
        bias = load_bias(bias_ptr, more_bias_ptr, row % channels, row < rows)[:, None]
    h = tl.load(h_ptr + offset, mask, 0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offset, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + offset, h + residual + bias, mask)


def add_residual(h: Tensor, residual: Tensor, bias: Tensor, more_bias: Tensor | None) -> Tensor:
    """out like h, in the wider of the dtypes of h and residual, which are both contiguous or both channels_last."""
    batch, channels, height, width = h.shape
    channels_last = not h.is_contiguous()
    rows, columns = (batch * height * width, channels) if channels_last else (batch * channels, height * width)
    out = torch.empty_like(h, dtype=torch.promote_types(h.dtype, residual.dtype))
    tile_width = min(MAX_WIDTH, triton.next_power_of_2(columns))
    tile_rows = ELEMENTS // tile_width
    with torch.cuda.device_of(h):
        add_residual_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_width),)](
            h,
            residual,
            bias,
            more_bias,
            out,
            rows,
            columns,
            channels,
            ROWS=tile_rows,
            WIDTH=tile_width,
            CHANNELS_LAST=channels_last,
            num_warps=8,
        )
    return out


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype, layout in (
        (torch.bfloat16, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ):
        h = torch.empty(8, 512, 64, 64, dtype=dtype, device="meta", memory_format=layout)
        layout_name = "channels_last" if layout is torch.channels_last else "contiguous"
        label = f"{str(dtype).removeprefix('torch.')} {layout_name} 512x64x64"
        bias = torch.empty(512, dtype=dtype, device="meta")
        yield label, partial(add_residual, h, h, bias, bias)
