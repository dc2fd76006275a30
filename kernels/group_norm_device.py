"""Device functions of group_norm's kernels: tiles of one tensor or of two behind each other, and accurate statistics.

C is the number of channels, C_X of them in x and the others in skip; CPG that of a group. A tile has ROWS pixels and
GROUPS * WIDTH channels.
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
def pointers(pointer, n, row, channel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Addresses (rows, columns) of pixels and channels of sample n in a tensor (B, CHANNELS, H, W)."""
    row = row.to(tl.int64)[:, None]  # the interpreter counts in int32
    if CHANNELS_LAST:
        pointer += n * CHANNELS * pixels + row * CHANNELS + channel[None, :]
    else:
        pointer += (n * CHANNELS + channel)[None, :] * pixels + row
    return pointer  # (rows, columns)


@triton.jit
def load_masked(pointer, mask):
    """In fp32; 0 outside the mask."""
    return tl.load(pointer, mask, 0.0).to(tl.float32)


@triton.jit
def skip_factor(skip_ptr, skip_scale, channel, C_X: tl.constexpr):
    """What `load_input` multiplies the channels (columns,) by: 1 in x, skip_scale in skip."""
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if skip_ptr is not None:
        factor = tl.where(channel < C_X, factor, skip_scale)
    return factor


@triton.jit
def load_input(
    x_ptr,
    skip_ptr,
    skip_scale,
    n,
    row,
    channel,
    mask,
    pixels,
    C: tl.constexpr,
    C_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Pixels (rows, columns) of sample n: of x, or beyond its C_X channels of skip times skip_scale; 0 outside.

    With SELECT by one load, of addresses in either tensor: fewer registers, but Triton's AMD backend cannot compile it.
    """
    at = pointers(x_ptr, n, row, channel, pixels, C_X, CHANNELS_LAST)
    if skip_ptr is None:
        x = load_masked(at, mask)
    else:
        in_x = channel < C_X
        skip_at = pointers(skip_ptr, n, row, channel - C_X, pixels, C - C_X, CHANNELS_LAST)
        if SELECT:
            x = load_masked(tl.where(in_x[None, :], at, skip_at), mask)
            x = x * skip_factor(skip_ptr, skip_scale, channel, C_X)[None, :]
        else:
            x = load_masked(at, mask & in_x[None, :])
            x += load_masked(skip_at, mask & ~in_x[None, :]) * skip_scale
    return x


@triton.jit
def store_gradient(
    dx_ptr,
    dskip_ptr,
    x_residual_ptr,
    skip_residual_ptr,
    dx,
    n,
    row,
    channel,
    mask,
    pixels,
    C: tl.constexpr,
    C_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Store dx (rows, columns) in the tensors that `load_input` loaded, plus the gradients of a residual path."""
    in_x = mask
    if dskip_ptr is not None:
        in_x = mask & (channel < C_X)[None, :]
        in_skip = mask & (channel >= C_X)[None, :]
        if skip_residual_ptr is not None:
            at = pointers(skip_residual_ptr, n, row, channel - C_X, pixels, C - C_X, CHANNELS_LAST)
            dx += load_masked(at, in_skip)
        tl.store(pointers(dskip_ptr, n, row, channel - C_X, pixels, C - C_X, CHANNELS_LAST), dx, in_skip)
    if x_residual_ptr is not None:
        dx += load_masked(pointers(x_residual_ptr, n, row, channel, pixels, C_X, CHANNELS_LAST), in_x)
    tl.store(pointers(dx_ptr, n, row, channel, pixels, C_X, CHANNELS_LAST), dx, in_x)


@triton.jit
def input_bias(x_bias_ptr, channel, valid, C_X: tl.constexpr):
    """What is added to the channels (columns,): x_bias in x, 0 in skip."""
    bias = tl.zeros(channel.shape, tl.float32)
    if x_bias_ptr is not None:
        bias = load_masked(x_bias_ptr + channel, valid & (channel < C_X))
    return bias


@triton.jit
def by_group(v, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """One row per group."""
    return tl.reshape(v, [GROUPS, WIDTH])  # (GROUPS, WIDTH)


@triton.jit
def to_columns(v, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """The value of each column's group."""
    return tl.reshape(tl.broadcast_to(v[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])  # (GROUPS * WIDTH,)


@triton.jit
def film_factor(scale_ptr, film_bias_ptr, scale_stride, n, channel, valid):
    """1 + scale (columns,) of sample n, with the bias of FiLM's linear layer."""
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if scale_ptr is not None:
        factor += load_masked(scale_ptr + n * scale_stride + channel, valid)
        if film_bias_ptr is not None:
            factor += load_masked(film_bias_ptr + channel, valid)
    return factor


@triton.jit
def affine(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    film_bias_ptr,
    scale_stride,
    shift_stride,
    n,
    channel,
    valid,
    C: tl.constexpr,
):
    """gain and offset (columns,) of group_norm.py's formulas."""
    gain = load_masked(weight_ptr + channel, valid)
    offset = load_masked(bias_ptr + channel, valid)
    if scale_ptr is not None:
        factor = film_factor(scale_ptr, film_bias_ptr, scale_stride, n, channel, valid)
        shift = load_masked(shift_ptr + n * shift_stride + channel, valid)
        if film_bias_ptr is not None:
            shift += load_masked(film_bias_ptr + C + channel, valid)
        gain = gain * factor
        offset = offset * factor + shift
    return gain, offset


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """y."""
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = z * normal_cdf(z)
    return z


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """dz = dy * act'(z)."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1 + z * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327  # 1 / sqrt(2 pi)
        dy = dy * (normal_cdf(z) + z * density)
    return dy


@triton.jit
def normal_cdf(z):
    """Phi(z), of which the exact GELU is z Phi(z) (Hendrycks and Gimpel 2016)."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)  # 1 / sqrt(2)


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


# ---- parts: two numbers for each group, and each piece and chunk of it


@triton.jit
def part_pointers(
    parts_ptr,
    n,
    block,
    chunks,
    C: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Groups (GROUPS,) of a block, the addresses (GROUPS, PARTS) of their parts, and which exist."""
    PIECES: tl.constexpr = tl.cdiv(CPG, WIDTH)
    group = block // PIECES * GROUPS + tl.arange(0, GROUPS)
    part = tl.arange(0, PARTS)
    offset = (n * (C // CPG) + group)[:, None] * (PIECES * chunks) + part[None, :]
    return group, parts_ptr + 2 * offset, (group < C // CPG)[:, None] & (part < PIECES * chunks)[None, :]


@triton.jit
def store_part(
    parts_ptr,
    one,
    other,
    n,
    block,
    chunk,
    chunks,
    C: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store two values (GROUPS,) of this block and chunk in parts (B, G, pieces * chunks, 2)."""
    PIECES: tl.constexpr = tl.cdiv(CPG, WIDTH)
    group = block // PIECES * GROUPS + tl.arange(0, GROUPS)
    pointer = parts_ptr + 2 * ((n * (C // CPG) + group) * (PIECES * chunks) + block % PIECES * chunks + chunk)
    tl.store(pointer, one, group < C // CPG)
    tl.store(pointer + 1, other, group < C // CPG)
