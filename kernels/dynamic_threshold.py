"""Dynamic thresholding of images x (B, N numbers each): s = max(quantile(|x|, p), floor), y = clamp(x, -s, s) / s.

The bits of |x| in fp32, read as integers, are ordered as the numbers are: 31 of them, the digits 11 + 10 + 10. Each
digit takes one pass over x that counts the values of every bin among those that share the digits already known, and
one program for each image that walks the counts to the bin of the wanted rank. After three digits the order
statistic of the lower rank is known to the bit. The next one is the same number if it is tied; else the next bin of
the last count that is not empty; else the least of all numbers with larger first digits, which the last pass has kept.

No sort, no limit on N but 2^31 - 1, no wait for the GPU. Counts and minima are integers, so the order of the atomic
operations cannot be seen. A NaN, either sign, makes its image NaN: its bits are larger than those of infinity.

Launches: 3 counts, 3 walks, 1 application; x is read 4 times and written once.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers of a program
BINS = 2048
SHIFTS, DIGITS = (20, 10, 0), (11, 10, 10)  # bits below each digit, bits in it
INFINITY = 0x7F800000  # its bits; a NaN's are larger
NOTHING = 0x7FFFFFFF

# What is known of an image: columns of `state`, int32.
PREFIX, RANK, ABOVE, LARGEST = (tl.constexpr(column) for column in range(4))
COLUMNS = 4


@triton.jit
def magnitudes(x_pointer, offset, mask):
    """The bits of |x| as int32, ordered as the numbers are."""
    return ordered(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def ordered(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tally(bits, chosen, counts_pointer, image, SHIFT: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr):
    """Add the chosen numbers to the counts (B, BINS) of their digit."""
    counts = tl.histogram((bits >> SHIFT) & ((1 << DIGIT) - 1), BINS, mask=chosen)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_pointer + image * BINS + bins, counts, mask=counts > 0)


@triton.jit
def count(
    x_pointer,
    counts_pointer,
    state_pointer,
    n,
    SHIFT: tl.constexpr,
    DIGIT: tl.constexpr,
    BINS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts (B, BINS) of one digit; the first pass keeps the largest bits, the last the least beyond the prefix."""
    image = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    bits = magnitudes(x_pointer + image * n, offset, mask)
    state = state_pointer + image * 4
    if FIRST:
        tl.atomic_max(state + LARGEST, tl.max(bits, axis=0))
        chosen = mask
    else:
        above = bits >> (SHIFT + DIGIT)
        prefix = tl.load(state + PREFIX)
        chosen = mask & (above == prefix)
        if LAST:
            tl.atomic_min(state + ABOVE, tl.min(tl.where(mask & (above > prefix), bits, 0x7FFFFFFF), axis=0))
    tally(bits, chosen, counts_pointer, image, SHIFT, DIGIT, BINS)


@triton.jit
def walk(
    counts_pointer,
    state_pointer,
    s_pointer,
    fraction,
    floor,
    DIGIT: tl.constexpr,
    BINS: tl.constexpr,
    LAST: tl.constexpr,
):
    """From the counts of a digit to the prefix with it; in the end to the threshold s (B,)."""
    image = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_pointer + image * BINS + bins)
    upto = tl.cumsum(counts, axis=0)
    state = state_pointer + image * 4
    rank = tl.load(state + RANK)
    digit = tl.min(tl.where(upto > rank, bins, BINS), axis=0)
    before = tl.sum(tl.where(bins < digit, counts, 0), axis=0)
    prefix = (tl.load(state + PREFIX) << DIGIT) | digit
    if not LAST:
        tl.store(state + PREFIX, prefix)
        tl.store(state + RANK, rank - before)
    else:
        tied = tl.sum(tl.where(bins == digit, counts, 0), axis=0) > rank - before + 1
        following = tl.min(tl.where((bins > digit) & (counts > 0), bins, BINS), axis=0)
        beyond = tl.load(state + ABOVE)
        upper = tl.where(following < BINS, prefix - digit + following, beyond)
        upper = tl.where(tied | (upper == 0x7FFFFFFF), prefix, upper)  # the largest of all has no next
        low = prefix.to(tl.float32, bitcast=True)
        high = upper.to(tl.float32, bitcast=True)
        # Lerp from the nearer end, as PyTorch does; equal ends stay what they are, infinite ones too.
        gap = tl.where(low == high, 0.0, high - low)
        quantile = tl.where(fraction < 0.5, low + fraction * gap, high - (1 - fraction) * gap)
        quantile = tl.where((fraction == 0) | (low == high), low, quantile)
        s = tl.where(quantile > floor, quantile, floor)
        largest = tl.load(state + LARGEST)
        s = tl.where(largest > 0x7F800000, float("nan"), s)
        tl.store(s_pointer + image, s)


@triton.jit
def clamped(x, s):
    """x in [-s, s]; a NaN stays one."""
    return tl.where(x > s, s, tl.where(x < -s, -s, x))


@triton.jit
def apply(x_pointer, s_pointer, y_pointer, n, BLOCK: tl.constexpr):
    """y = clamp(x, -s, s) / s."""
    image = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    x = tl.load(x_pointer + image * n + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_pointer + image)
    y = clamped(x, s) / s
    tl.store(y_pointer + image * n + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


def quantile_rank(n: int, percentile: float) -> tuple[int, float]:
    """The lower rank, from 0, and how far the quantile lies beyond it: computed in float64 (fp32 is off at 2^20)."""
    position = percentile * (n - 1)
    rank = min(int(position), n - 1)
    return rank, position - rank


class Selection:
    """The search for the thresholds of images (B, N each): what is known, the counts, and the result s (B,)."""

    def __init__(self, batch: int, n: int, percentile: float, floor: float, device: torch.device) -> None:
        rank, self.fraction = quantile_rank(n, percentile)
        self.n, self.floor = n, floor
        self.state = torch.empty(batch, COLUMNS, dtype=torch.int32, device=device)
        for column, value in ((PREFIX, 0), (RANK, rank), (ABOVE, NOTHING), (LARGEST, 0)):
            self.state[:, column.value].fill_(value)
        self.counts = torch.zeros(len(DIGITS), batch, BINS, dtype=torch.int32, device=device)
        self.s = torch.empty(batch, dtype=torch.float32, device=device)
        self.grid = (triton.cdiv(n, BLOCK), batch)

    def run(self, x: Tensor, counted: int = 0) -> Tensor:
        """s (B,) of x; of the first `counted` digits the counts are there already."""
        for step, (shift, digit) in enumerate(zip(SHIFTS, DIGITS)):
            last = step == len(DIGITS) - 1
            if step >= counted:
                count[self.grid](
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
            walk[(len(self.s),)](
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
    """x (B, ...), each image dense in memory and the images one after the other; y like x."""
    n, y = x[0].numel(), torch.empty_like(x)
    with torch.cuda.device_of(x):
        selection = Selection(len(x), n, percentile, floor, x.device)
        apply[selection.grid](x, selection.run(x), y, n, BLOCK=BLOCK, num_warps=8)
    return y


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(2, 3, 64, 64, dtype=dtype, device="meta")
        yield str(dtype)[6:], partial(dynamic_threshold, x, 0.995, 1.0)
