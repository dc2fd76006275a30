"""Dynamic thresholding of images x (B, N): s = max(quantile(|x|, p), floor), y = clamp(x, -s, s) / s.

The bits of |x| in fp32, read as integers, are ordered as the numbers are: 31 of them, the digits 11 + 10 + 10. Each
digit takes one pass over x, which counts the values of every bin among those that share the digits found so far, and
one program per image, which finds the bin of the wanted rank in the counts. After three digits the lower order
statistic is known exactly. The upper one is the same number if that is tied; otherwise it is in the next bin of the
last count that is not empty, or it is the least of all numbers with larger first digits, which the last pass stored.

No sort, no host synchronisation, N up to 2^31 - 1. Counts and minima are integers, so the order of the atomic
operations does not matter. A NaN of either sign makes its image NaN: its bits are larger than those of infinity.

Launches: 3 counts, 3 searches, 1 application; x is read 4 times and written once.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a program
BINS = 2048  # of a histogram: 2^11 values of the first digit
SHIFTS, DIGITS = (20, 10, 0), (11, 10, 10)  # bits below each digit, bits of each digit
INFINITY_BITS = tl.constexpr(0x7F800000)  # of +infinity in fp32; those of a NaN are larger
MAX_INT32 = tl.constexpr(0x7FFFFFFF)  # also the mask of the magnitude bits

# Columns of `state`, int32: the digits found so far; the rank among the elements that share them; the smallest bits
# above them; the largest bits of all.
PREFIX, RANK, ABOVE, LARGEST = (tl.constexpr(column) for column in range(4))
STATE_COLUMNS = tl.constexpr(4)


@triton.jit
def load_magnitude_bits(x_pointer, offset, mask):
    """`magnitude_bits` of elements in memory; 0 outside the mask."""
    return magnitude_bits(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def magnitude_bits(x):
    """The bits of |x| as int32, ordered as the magnitudes are."""
    return x.to(tl.int32, bitcast=True) & MAX_INT32


@triton.jit
def count_digits(bits, chosen, counts_pointer, image, SHIFT: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr):
    """Add the chosen elements to the counts (B, BINS) of their digit."""
    counts = tl.histogram((bits >> SHIFT) & ((1 << DIGIT) - 1), BINS, mask=chosen)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_pointer + image * BINS + bins, counts, mask=counts > 0)


@triton.jit
def dynamic_threshold_count_kernel(
    x_pointer,  # (B, N)
    counts_pointer,  # (B, BINS) int32
    state_pointer,  # (B, STATE_COLUMNS) int32
    n,  # N, elements of an image
    SHIFT: tl.constexpr,  # bits below the digit
    DIGIT: tl.constexpr,  # bits of the digit
    BINS: tl.constexpr,  # bins of a histogram, 2 ** DIGIT or more
    FIRST: tl.constexpr,  # whether this is the first digit
    LAST: tl.constexpr,  # whether this is the last digit
    BLOCK: tl.constexpr,  # elements of a program
):
    """Counts of one digit. The first pass also stores the largest bits, the last the smallest above the prefix."""
    image = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    bits = load_magnitude_bits(x_pointer + image * n, offset, mask)
    state = state_pointer + image * STATE_COLUMNS
    if FIRST:
        tl.atomic_max(state + LARGEST, tl.max(bits, axis=0))
        chosen = mask
    else:
        above = bits >> (SHIFT + DIGIT)
        prefix = tl.load(state + PREFIX)
        chosen = mask & (above == prefix)
        if LAST:
            tl.atomic_min(state + ABOVE, tl.min(tl.where(mask & (above > prefix), bits, MAX_INT32), axis=0))
    count_digits(bits, chosen, counts_pointer, image, SHIFT, DIGIT, BINS)


@triton.jit
def dynamic_threshold_search_kernel(
    counts_pointer,  # (B, BINS) int32
    state_pointer,  # (B, STATE_COLUMNS) int32
    s_pointer,  # (B,) fp32, thresholds
    fraction,  # position of the quantile between the lower (0) and the upper (1) order statistic
    floor,  # smallest threshold
    DIGIT: tl.constexpr,  # bits of the digit
    BINS: tl.constexpr,  # bins of a histogram, 2 ** DIGIT or more
    LAST: tl.constexpr,  # whether this is the last digit
):
    """Find a digit in its counts and append it to the prefix; after the last digit, compute the threshold s."""
    image = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_pointer + image * BINS + bins)
    cumulative = tl.cumsum(counts, axis=0)
    state = state_pointer + image * STATE_COLUMNS
    rank = tl.load(state + RANK)
    digit = tl.min(tl.where(cumulative > rank, bins, BINS), axis=0)
    before = tl.sum(tl.where(bins < digit, counts, 0), axis=0)
    prefix = (tl.load(state + PREFIX) << DIGIT) | digit
    if not LAST:
        tl.store(state + PREFIX, prefix)
        tl.store(state + RANK, rank - before)
    else:
        tied = tl.sum(tl.where(bins == digit, counts, 0), axis=0) > rank - before + 1
        next_bin = tl.min(tl.where((bins > digit) & (counts > 0), bins, BINS), axis=0)
        above = tl.load(state + ABOVE)
        upper = tl.where(next_bin < BINS, prefix - digit + next_bin, above)
        upper = tl.where(tied | (upper == MAX_INT32), prefix, upper)  # the largest element has no successor
        low = prefix.to(tl.float32, bitcast=True)
        high = upper.to(tl.float32, bitcast=True)
        # Interpolate from the nearer end, as torch.lerp does. Equal ends are exact, infinite ones too.
        gap = tl.where(low == high, 0.0, high - low)
        quantile = tl.where(fraction < 0.5, low + fraction * gap, high - (1 - fraction) * gap)
        quantile = tl.where((fraction == 0) | (low == high), low, quantile)
        s = tl.where(quantile > floor, quantile, floor)
        largest = tl.load(state + LARGEST)
        s = tl.where(largest > INFINITY_BITS, float("nan"), s)
        tl.store(s_pointer + image, s)


@triton.jit
def clamp_symmetric(x, s):
    """x clamped to [-s, s]; NaN stays NaN."""
    return tl.where(x > s, s, tl.where(x < -s, -s, x))


@triton.jit
def dynamic_threshold_apply_kernel(
    x_pointer,  # (B, N)
    s_pointer,  # (B,) fp32, thresholds
    y_pointer,  # (B, N)
    n,  # N, elements of an image
    BLOCK: tl.constexpr,  # elements of a program
):
    """y = clamp(x, -s, s) / s."""
    image = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    x = tl.load(x_pointer + image * n + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_pointer + image)
    y = clamp_symmetric(x, s) / s
    tl.store(y_pointer + image * n + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


def quantile_rank(n: int, percentile: float) -> tuple[int, float]:
    """The lower rank, from 0, and the fraction beyond it, in float64: fp32 is inaccurate from 2^20 elements on."""
    position = percentile * (n - 1)
    rank = min(int(position), n - 1)
    return rank, position - rank


class Selection:
    """The search for the thresholds s (B,) of images (B, N): its state, its counts and the launches."""

    def __init__(self, batch: int, n: int, percentile: float, floor: float, device: torch.device) -> None:
        rank, self.fraction = quantile_rank(n, percentile)
        self.n, self.floor = n, floor
        self.state = torch.empty(batch, STATE_COLUMNS.value, dtype=torch.int32, device=device)
        for column, value in ((PREFIX, 0), (RANK, rank), (ABOVE, MAX_INT32.value), (LARGEST, 0)):
            self.state[:, column.value].fill_(value)
        self.counts = torch.zeros(len(DIGITS), batch, BINS, dtype=torch.int32, device=device)
        self.s = torch.empty(batch, dtype=torch.float32, device=device)
        self.grid = (triton.cdiv(n, BLOCK), batch)

    def run(self, x: Tensor, counted: int = 0) -> Tensor:
        """The thresholds s (B,) of x. The first `counted` digits have been counted already."""
        for step, (shift, digit) in enumerate(zip(SHIFTS, DIGITS)):
            last = step == len(DIGITS) - 1
            if step >= counted:
                dynamic_threshold_count_kernel[self.grid](
                    x,
                    self.counts[step],
                    self.state,
                    self.n,
                    SHIFT=shift,
                    DIGIT=digit,
                    BINS=BINS,
                    FIRST=step == 0,
                    LAST=last,
                    BLOCK=BLOCK,
                    num_warps=8,
                )
            dynamic_threshold_search_kernel[(len(self.s),)](
                self.counts[step],
                self.state,
                self.s,
                self.fraction,
                self.floor,
                DIGIT=digit,
                BINS=BINS,
                LAST=last,
                num_warps=8,
            )
        return self.s


def dynamic_threshold(x: Tensor, percentile: float, floor: float) -> Tensor:
    """y, like x (B, ...). Each image is dense in memory, and the images follow each other."""
    n, y = x[0].numel(), torch.empty_like(x)
    with torch.cuda.device_of(x):
        selection = Selection(len(x), n, percentile, floor, x.device)
        dynamic_threshold_apply_kernel[selection.grid](x, selection.run(x), y, n, BLOCK=BLOCK, num_warps=8)
    return y


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(2, 3, 64, 64, dtype=dtype, device="meta")
        yield str(dtype).removeprefix("torch."), partial(dynamic_threshold, x, 0.995, 1.0)
