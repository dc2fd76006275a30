"""One step of a sampler, from the U-Net's output to the next x, for images of N elements each.

    F  = u + w (c - u)                                       guidance; without it F is the output itself
    x0 = threshold(skip x + out F)                           dynamic, static (clamp to [-1, 1]) or none
    x' = c_x x + c_x0 x0 + c_prev previous + c_noise noise   the coefficients choose DDPM, DDIM, DPM-Solver++ or Heun

Without dynamic thresholding this is one kernel. With it, the first kernel stores x0 and counts the first digit of its
bits, dynamic_threshold.py counts the others, and the last kernel finds s, clamps, divides and computes x'. Everything
is fp32 except the output, which may be bf16 or fp16.

Launches: 1, or 6 (zeroing of the counts, x0, 3 counts, finish). Bytes per element for a guided bf16 output, without
previous and noise: 16 (x 4, c and u 2 each, x0 4, x' 4) in one kernel; 40 with dynamic thresholding, which reads x once
more and x0 four times, and stores x0 twice.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dynamic_threshold import (
    BLOCK,
    COUNTS,
    LAST_DIGIT,
    STATE_COLUMNS,
    WARPS,
    clamp_symmetric,
    count_digit,
    count_digits,
    find_threshold,
    magnitude_bits,
    new_state,
    program_elements,
    selection,
)


@triton.jit
def compute_x0(output_pointer, x, offset, mask, elements, skip, out, weight, GUIDED: tl.constexpr):
    """x0 before thresholding. With guidance, output (2 B, N) has `elements` elements with captions, then those
    without."""
    output = tl.load(output_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        other = tl.load(output_pointer + elements + offset, mask=mask, other=0.0).to(tl.float32)
        gap = output - other
        output = tl.where(weight < 0.5, other + weight * gap, output - (1 - weight) * gap)  # exact for 0 and 1
    return skip * x + out * output


@triton.jit
def compute_x_next(x, x0, previous_pointer, noise_pointer, offset, mask, c_x, c_x0, c_prev, c_noise):
    """x'."""
    x_next = c_x * x + c_x0 * x0
    if previous_pointer is not None:
        x_next += c_prev * tl.load(previous_pointer + offset, mask=mask, other=0.0)
    if noise_pointer is not None:
        x_next += c_noise * tl.load(noise_pointer + offset, mask=mask, other=0.0)
    return x_next


@triton.jit
def sampler_step_kernel(
    output_pointer,  # (B, N), or (2 B, N) with guidance
    x_pointer,  # (B, N) fp32
    previous_pointer,  # (B, N), or None
    noise_pointer,  # (B, N), or None
    x0_pointer,  # (B, N) fp32
    x_next_pointer,  # x' (B, N) fp32
    elements,  # B N
    skip,  # factor of x in x0
    out,  # factor of F in x0
    weight,  # guidance weight
    c_x,  # factor of x in x'
    c_x0,  # factor of x0 in x'
    c_prev,  # factor of previous in x'
    c_noise,  # factor of noise in x'
    GUIDED: tl.constexpr,  # whether output is (2 B, N)
    STATIC: tl.constexpr,  # whether x0 is clamped to [-1, 1]
    BLOCK: tl.constexpr,  # elements of a program
):
    """The whole step, without a quantile."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    x = tl.load(x_pointer + offset, mask=mask, other=0.0)
    x0 = compute_x0(output_pointer, x, offset, mask, elements, skip, out, weight, GUIDED)
    if STATIC:
        x0 = clamp_symmetric(x0, 1.0)
    x_next = compute_x_next(x, x0, previous_pointer, noise_pointer, offset, mask, c_x, c_x0, c_prev, c_noise)
    tl.store(x0_pointer + offset, x0, mask=mask)
    tl.store(x_next_pointer + offset, x_next, mask=mask)


@triton.jit(do_not_specialize=["blocks", "rank"])
def sampler_step_x0_kernel(
    output_pointer,  # (B, N), or (2 B, N) with guidance
    x_pointer,  # (B, N) fp32
    x0_pointer,  # (B, N) fp32
    state_pointer,  # (B, STATE_COLUMNS) int32
    n,  # N, elements of an image
    blocks,  # programs of an image
    rank,  # of the lower order statistic, from 0
    elements,  # B N
    skip,  # factor of x in x0
    out,  # factor of F in x0
    weight,  # guidance weight
    GUIDED: tl.constexpr,  # whether output is (2 B, N)
    BLOCK: tl.constexpr,  # elements of a program
    STEP: tl.constexpr,  # the first digit
    SHIFT: tl.constexpr,  # bits below it
    DIGIT: tl.constexpr,  # bits of it
    LAST: tl.constexpr,  # whether it is the last digit
):
    """x0 before thresholding, and the first pass of the selection over it."""
    image, block, offset, mask = program_elements(n, blocks, BLOCK)
    x = tl.load(x_pointer + offset, mask=mask, other=0.0)
    x0 = compute_x0(output_pointer, x, offset, mask, elements, skip, out, weight, GUIDED)
    tl.store(x0_pointer + offset, x0, mask=mask)
    bits = magnitude_bits(
        x0
    )  # outside the mask any number is harmless: of the last block's it is no larger than inside
    count_digit(bits, mask, state_pointer + image * STATE_COLUMNS, block, rank, STEP, SHIFT, DIGIT, LAST)


@triton.jit(do_not_specialize=["blocks", "rank"])
def sampler_step_finish_kernel(
    x_pointer,  # (B, N) fp32
    state_pointer,  # (B, STATE_COLUMNS) int32
    previous_pointer,  # (B, N), or None
    noise_pointer,  # (B, N), or None
    x0_pointer,  # (B, N) fp32
    x_next_pointer,  # x' (B, N) fp32
    n,  # N, elements of an image
    blocks,  # programs of an image
    rank,  # of the lower order statistic, from 0
    fraction,  # position of the quantile between the lower (0) and the upper (1) order statistic
    floor,  # smallest threshold
    ceiling,  # largest threshold
    c_x,  # factor of x in x'
    c_x0,  # factor of x0 in x'
    c_prev,  # factor of previous in x'
    c_noise,  # factor of noise in x'
    BLOCK: tl.constexpr,  # elements of a program
    STEP: tl.constexpr,  # the last digit
    DIGIT: tl.constexpr,  # bits of the last digit
):
    """x0 thresholded in place, and x'."""
    image, _, offset, mask = program_elements(n, blocks, BLOCK)
    s = find_threshold(state_pointer + image * STATE_COLUMNS, rank, fraction, floor, ceiling, STEP, DIGIT)
    x0 = clamp_symmetric(tl.load(x0_pointer + offset, mask=mask, other=0.0), s) / s
    x = tl.load(x_pointer + offset, mask=mask, other=0.0)
    x_next = compute_x_next(x, x0, previous_pointer, noise_pointer, offset, mask, c_x, c_x0, c_prev, c_noise)
    tl.store(x0_pointer + offset, x0, mask=mask)
    tl.store(x_next_pointer + offset, x_next, mask=mask)


def sampler_step(
    output: Tensor,
    x: Tensor,
    previous: Tensor | None,
    noise: Tensor | None,
    recovery: tuple[float, float],
    update: tuple[float, float, float, float],
    guidance: float | None,
    threshold: str,
    percentile: float,
    ceiling: float,
) -> tuple[Tensor, Tensor]:
    """(x', x0), both like x (B, ...). All tensors are dense and have the memory layout of x.

    output is (2 B, ...) with a guidance weight. recovery: skip, out; update: c_x, c_x0, c_prev, c_noise. ceiling: the
    largest dynamic threshold.
    """
    guided, weight = guidance is not None, 1.0 if guidance is None else guidance
    elements = x.numel()
    x0, x_next = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        if threshold != "dynamic":
            tensors = (output, x, previous, noise, x0, x_next)
            constants = (guided, threshold == "static", BLOCK)
            sampler_step_kernel[(-(-elements // BLOCK),)](
                *tensors, elements, *recovery, weight, *update, *constants, num_warps=WARPS
            )
            return x_next, x0
        found = selection(len(x), elements // len(x), percentile)
        state = new_state(x)
        sampler_step_x0_kernel[found.grid](
            output, x, x0, state, *found.sizes, elements, *recovery, weight, guided, *COUNTS[0], num_warps=WARPS
        )
        count_digits(found, x0, state, counted=1)
        limits = (found.fraction, 1.0, ceiling)
        sampler_step_finish_kernel[found.grid](
            x,
            state,
            previous,
            noise,
            x0,
            x_next,
            *found.sizes,
            *limits,
            *update,
            BLOCK,
            *LAST_DIGIT,
            num_warps=WARPS,
        )
    return x_next, x0


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    x = torch.empty(2, 3, 64, 64, device="meta")
    output = torch.empty(4, 3, 64, 64, dtype=torch.bfloat16, device="meta")
    recovery, update = (0.5, -0.5), (0.5, 0.5, 0.1, 0.1)
    for threshold in ("dynamic", "static"):
        yield threshold, partial(sampler_step, output, x, x, x, recovery, update, 3.0, threshold, 0.995, math.inf)
    yield (
        "plain",
        partial(sampler_step, output[:2].float(), x, None, None, recovery, update, None, "none", 0.995, math.inf),
    )
