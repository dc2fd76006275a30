"""Device functions of group_norm_kernels.py: tiles of a tensor, and accurate statistics.

CPG is the number of channels of a group. A tile has ROWS pixels and GROUPS * WIDTH channels.
"""

import triton
import triton.language as tl

# ---- tiles


@triton.jit
def program_position(index, chunks, C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(block, chunk, sample) of a program; neighbouring programs share their pixels."""
    BLOCKS: tl.constexpr = tl.cdiv(C // CPG, GROUPS) * tl.cdiv(CPG, WIDTH)
    return index % BLOCKS, index // BLOCKS % chunks, (index // BLOCKS // chunks).to(tl.int64)


@triton.jit
def columns(block, C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels (GROUPS * WIDTH,) of a block, and which of them exist: each group is padded to WIDTH."""
    PIECES: tl.constexpr = tl.cdiv(CPG, WIDTH)
    column = tl.arange(0, GROUPS * WIDTH)
    group = block // PIECES * GROUPS + column // WIDTH
    within = block % PIECES * WIDTH + column % WIDTH
    return group * CPG + within, (within < CPG) & (group < C // CPG)


@triton.jit
def tile(start, channel, valid, pixels, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets (ROWS, columns) within a sample, and which of them exist."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    if CHANNELS_LAST:
        offset = row[:, None] * C + channel[None, :]
    else:
        offset = row[:, None] + channel[None, :].to(tl.int64) * pixels
    return offset, (row < pixels)[:, None] & valid[None, :]


@triton.jit
def load_masked(pointer, offset, mask):
    """In fp32; 0 outside the mask."""
    return tl.load(pointer + offset, mask, 0.0).to(tl.float32)


@triton.jit
def by_group(v, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """One row per group."""
    return tl.reshape(v, [GROUPS, WIDTH])  # (GROUPS, WIDTH)


@triton.jit
def to_columns(v, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """The value of each column's group."""
    return tl.reshape(tl.broadcast_to(v[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])  # (GROUPS * WIDTH,)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, valid):
    """gain and offset (columns,) of group_norm.py's formulas."""
    gain = load_masked(weight_ptr, channel, valid)
    offset = load_masked(bias_ptr, channel, valid)
    if scale_ptr is not None:
        factor = 1 + load_masked(scale_ptr, n * scale_stride + channel, valid)
        gain = gain * factor
        offset = offset * factor + load_masked(shift_ptr, n * shift_stride + channel, valid)
    return gain, offset


@triton.jit
def activate(z, SILU: tl.constexpr):
    """y."""
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def activation_gradient(dy, z, SILU: tl.constexpr):
    """dz = dy * act'(z)."""
    if SILU:
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1 + z * (1 - sigmoid))
    return dy


# ---- statistics


@triton.jit
def moments(x, mask, count):
    """Mean and sum of squared deviations of each column's `count` rows.

    The mean is corrected by the mean of the deviations, so its error is one rounding however far it is from 0.
    """
    mean = tl.sum(x, axis=0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    rest = tl.sum(deviation, axis=0) / count
    return mean + rest, tl.sum(deviation * deviation, axis=0) - count * rest * rest


@triton.jit
def merge(count, mean, m2):
    """Merge (count, mean, m2) along axis 1 (Chan, Golub, LeVeque 1979). Entries with count 0 are ignored."""
    total = tl.maximum(tl.sum(count, axis=1), 1.0)
    middle = tl.sum(count * mean, axis=1) / total
    deviation = mean - middle[:, None]
    rest = tl.sum(count * deviation, axis=1) / total
    return middle + rest, tl.sum(m2 + count * deviation * deviation, axis=1) - total * rest * rest


@triton.jit
def part_pointers(
    n, block, chunks, C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """Groups (GROUPS,) of a block, the offsets (GROUPS, PARTS) of their parts, and which exist."""
    PIECES: tl.constexpr = tl.cdiv(CPG, WIDTH)
    group = block // PIECES * GROUPS + tl.arange(0, GROUPS)
    part = tl.arange(0, PARTS)
    offset = (n * (C // CPG) + group)[:, None] * (PIECES * chunks) + part[None, :]
    return group, offset, (group < C // CPG)[:, None] & (part < PIECES * chunks)[None, :]


@triton.jit
def store_part(
    pointer,
    value,
    n,
    block,
    chunk,
    chunks,
    C: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store a value (GROUPS,) of this block and chunk as parts (B, G, pieces * chunks)."""
    PIECES: tl.constexpr = tl.cdiv(CPG, WIDTH)
    group = block // PIECES * GROUPS + tl.arange(0, GROUPS)
    offset = (n * (C // CPG) + group) * (PIECES * chunks) + block % PIECES * chunks + chunk
    tl.store(pointer + offset, value, group < C // CPG)
