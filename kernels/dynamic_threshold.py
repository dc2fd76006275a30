"""Dynamic thresholding of images x (B, N): s = clamp(quantile(|x|, p), floor, ceiling), y = clamp(x, -s, s) / s.

The bits of |x| in fp32, read as integers, are ordered as the numbers are: 31 of them, the digits 8 + 8 + 8 + 7. Each
digit takes one pass over x, which counts the values of every bin among those that share the digits found so far. The
pass that follows begins by finding the bin of the wanted rank in these counts: every program for itself, as 256 counts
are read faster than another kernel is launched. After four digits the lower order statistic is known exactly. The
upper one is the same number if that is tied; otherwise it is in the next bin of the last count that is not empty, or it
is the least of all numbers with larger first digits, which the last pass stored.

No sort, no host synchronisation, N up to 2^31 - 1. Counts and minima are integers, so the order of the atomic
operations does not matter. A NaN of either sign makes its image NaN: its bits are larger than those of infinity.

Launches: 6 (zeroing of the counts, 4 counts, application); x is read 5 times and written once. A histogram costs every
thread an instruction per element and 32 bins, so that four digits of 8 bits need fewer than three of 11.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a program
WARPS = 8
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # bits below each digit, bits of each digit
BINS = tl.constexpr(256)  # of a histogram
INFINITY_BITS = tl.constexpr(0x7F800000)  # of +infinity in fp32; those of a NaN are larger
MAX_INT32 = tl.constexpr(0x7FFFFFFF)  # also the mask of the magnitude bits

# Columns of `state` (B, STATE_COLUMNS) int32, which begins as zeros: the counts of each digit; the largest bits of all;
# MAX_INT32 minus the smallest bits above the digits found; for each pass the digits found before it, and the rank among
# the elements that share them.
LARGEST, ABOVE = tl.constexpr(1024), tl.constexpr(1025)
PREFIX, RANK = tl.constexpr(1028), tl.constexpr(1032)
STATE_COLUMNS = tl.constexpr(1040)


@triton.jit
def program_elements(n, blocks, BLOCK: tl.constexpr):
    """The image of this program, which block of the image it is, the offsets of its elements, and which exist."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return image, block, image * n + element, element < n


@triton.jit
def magnitude_bits(x):
    """The bits of |x| as int32, ordered as the magnitudes are."""
    return x.to(tl.int32, bitcast=True) & MAX_INT32


@triton.jit
def digits_before(state, rank, STEP: tl.constexpr):
    """Before the search in the counts of digit STEP: the digits found so far, and the rank among their elements."""
    if STEP == 0:
        return 0, rank
    else:
        return tl.load(state + PREFIX + STEP), tl.load(state + RANK + STEP)


@triton.jit
def cumulative_counts(state, STEP: tl.constexpr):
    """The counts of digit STEP, summed up to each bin and including it."""
    return tl.cumsum(tl.load(state + STEP * BINS + tl.arange(0, BINS)), axis=0)


@triton.jit
def count_digit(
    bits,  # (BLOCK,) of the elements
    mask,  # which elements exist
    state,  # pointer to the columns of the image
    block,  # which block of the image this program has
    rank,  # of the lower order statistic, from 0
    STEP: tl.constexpr,  # which digit
    SHIFT: tl.constexpr,  # bits below the digit
    DIGIT: tl.constexpr,  # bits of the digit
    LAST: tl.constexpr,  # whether this is the last digit
):
    """Find the digit before this one, and count this one among the elements that share all digits found."""
    if STEP == 0:
        tl.atomic_max(state + LARGEST, tl.max(bits, axis=0))
        chosen = mask
    else:
        prefix, rank = digits_before(state, rank, STEP - 1)
        cumulative = cumulative_counts(state, STEP - 1)
        below = cumulative <= rank  # the bins before that of the rank
        prefix = (prefix << 8) | tl.sum(below.to(tl.int32), axis=0)  # all digits but the last have 8 bits
        rank -= tl.max(tl.where(below, cumulative, 0), axis=0)
        tl.store(state + PREFIX + STEP, prefix, block == 0)
        tl.store(state + RANK + STEP, rank, block == 0)
        above = bits >> (SHIFT + DIGIT)
        chosen = mask & (above == prefix)
        if LAST:
            tl.atomic_max(state + ABOVE, tl.max(tl.where(mask & (above > prefix), MAX_INT32 - bits, 0), axis=0))
    counts = tl.histogram((bits >> SHIFT) & ((1 << DIGIT) - 1), BINS, mask=chosen)
    tl.atomic_add(state + STEP * BINS + tl.arange(0, BINS), counts, mask=counts > 0)


@triton.jit
def find_threshold(
    state,  # pointer to the columns of the image
    rank,  # of the lower order statistic, from 0
    fraction,  # position of the quantile between the lower (0) and the upper (1) order statistic
    floor,  # smallest threshold
    ceiling,  # largest threshold
    STEP: tl.constexpr,  # the last digit
    DIGIT: tl.constexpr,  # bits of the last digit
):
    """The threshold s, after all digits have been counted."""
    prefix, rank = digits_before(state, rank, STEP)
    cumulative = cumulative_counts(state, STEP)
    digit = tl.sum((cumulative <= rank).to(tl.int32), axis=0)
    upto = tl.min(tl.where(cumulative > rank, cumulative, MAX_INT32), axis=0)  # elements up to the digit's bin
    next_bin = tl.sum((cumulative <= upto).to(tl.int32), axis=0)  # that is not empty; BINS if there is none
    lower = (prefix << DIGIT) | digit
    upper = tl.where(next_bin < BINS, lower - digit + next_bin, MAX_INT32 - tl.load(state + ABOVE))
    upper = tl.where((upto > rank + 1) | (upper == MAX_INT32), lower, upper)  # tied, or the largest of all
    low = lower.to(tl.float32, bitcast=True)
    high = upper.to(tl.float32, bitcast=True)
    # Interpolate from the nearer end, as torch.lerp does. Equal ends are exact, infinite ones too.
    gap = tl.where(low == high, 0.0, high - low)
    quantile = tl.where(fraction < 0.5, low + fraction * gap, high - (1 - fraction) * gap)
    quantile = tl.where((fraction == 0) | (low == high), low, quantile)
    s = tl.where(quantile > floor, quantile, floor)
    s = tl.where(s < ceiling, s, ceiling)
    return tl.where(tl.load(state + LARGEST) > INFINITY_BITS, float("nan"), s)


@triton.jit
def clamp_symmetric(x, s):
    """x clamped to [-s, s]; NaN stays NaN."""
    return tl.where(x > s, s, tl.where(x < -s, -s, x))


@triton.jit(do_not_specialize=["blocks", "rank"])
def dynamic_threshold_count_kernel(
    x_pointer,  # (B, N)
    state_pointer,  # (B, STATE_COLUMNS) int32
    n,  # N, elements of an image
    blocks,  # programs of an image
    rank,  # of the lower order statistic, from 0
    BLOCK: tl.constexpr,  # elements of a program
    STEP: tl.constexpr,  # which digit
    SHIFT: tl.constexpr,  # bits below the digit
    DIGIT: tl.constexpr,  # bits of the digit
    LAST: tl.constexpr,  # whether this is the last digit
):
    """Counts of one digit. The first pass also stores the largest bits, the last the smallest above the prefix."""
    image, block, offset, mask = program_elements(n, blocks, BLOCK)
    bits = magnitude_bits(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32))
    count_digit(bits, mask, state_pointer + image * STATE_COLUMNS, block, rank, STEP, SHIFT, DIGIT, LAST)


@triton.jit(do_not_specialize=["blocks", "rank"])
def dynamic_threshold_apply_kernel(
    x_pointer,  # (B, N)
    state_pointer,  # (B, STATE_COLUMNS) int32
    y_pointer,  # (B, N)
    n,  # N, elements of an image
    blocks,  # programs of an image
    rank,  # of the lower order statistic, from 0
    fraction,  # position of the quantile between the lower (0) and the upper (1) order statistic
    floor,  # smallest threshold
    ceiling,  # largest threshold
    BLOCK: tl.constexpr,  # elements of a program
    STEP: tl.constexpr,  # the last digit
    DIGIT: tl.constexpr,  # bits of the last digit
):
    """y = clamp(x, -s, s) / s."""
    image, _, offset, mask = program_elements(n, blocks, BLOCK)
    x = tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    s = find_threshold(state_pointer + image * STATE_COLUMNS, rank, fraction, floor, ceiling, STEP, DIGIT)
    y = clamp_symmetric(x, s) / s
    tl.store(y_pointer + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


COUNTS = tuple((BLOCK, step, *digit, step == len(DIGITS) - 1) for step, digit in enumerate(DIGITS))
"""The constants of dynamic_threshold_count_kernel for each digit."""
LAST_DIGIT = (len(DIGITS) - 1, DIGITS[-1][1])
"""STEP and DIGIT of the kernels that follow the counts."""


class Selection(NamedTuple):
    """The search for the thresholds of images (B, N): what depends on their sizes alone."""

    grid: tuple[int]
    sizes: tuple[int, int, int]  # N, programs of an image, rank of the lower order statistic from 0
    fraction: float  # of the quantile's position beyond that rank


@lru_cache(256)
def selection(batch: int, n: int, percentile: float) -> Selection:
    """Ranks are computed in float64: fp32 is inaccurate from 2^20 elements on."""
    position = percentile * (n - 1)
    rank = min(int(position), n - 1)
    blocks = triton.cdiv(n, BLOCK)
    return Selection((blocks * batch,), (n, blocks, rank), position - rank)


def new_state(x: Tensor) -> Tensor:
    """The state of the search in x (B, ...)."""
    return torch.zeros(len(x), STATE_COLUMNS.value, dtype=torch.int32, device=x.device)


def count_digits(found: Selection, x: Tensor, state: Tensor, counted: int = 0) -> None:
    """Count the digits of x. The first `counted` have been counted already."""
    for constants in COUNTS[counted:]:
        dynamic_threshold_count_kernel[found.grid](x, state, *found.sizes, *constants, num_warps=WARPS)


def dynamic_threshold(x: Tensor, percentile: float, floor: float, ceiling: float) -> Tensor:
    """y, like x (B, ...). Each image is dense in memory, and the images follow each other."""
    found = selection(len(x), x.numel() // len(x), percentile)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        state = new_state(x)
        count_digits(found, x, state)
        dynamic_threshold_apply_kernel[found.grid](
            x, state, y, *found.sizes, found.fraction, floor, ceiling, BLOCK, *LAST_DIGIT, num_warps=WARPS
        )
    return y


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(2, 3, 64, 64, dtype=dtype, device="meta")
        yield str(dtype).removeprefix("torch."), partial(dynamic_threshold, x, 0.995, 1.0, float("inf"))
