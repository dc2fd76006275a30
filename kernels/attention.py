"""Attention of image tokens to a learned null key, text keys and image keys, forward and backward.

    s = c q.k,  c = scale * log2(e);    p = 2^(s - lse),  lse = log2 sum 2^s;    out = sum p v

The three sources of keys are never concatenated: the null key starts the online softmax (m = c q.k0, l = 1, acc = v0),
then follow the first `lengths[b]` text keys, and then the image keys.

The G query heads that share a key head are rows of one matrix: row r is head r % G of token r // G. So keys are read
once for all of these heads, and their gradients need no sum over heads. G is A for one key head (multi-query) and 1 for
one key head per query head.

Backward, with delta = sum_d dout * out of each row (Dao et al. 2022, FlashAttention, appendix B.4):

    dp = dout.v,  ds = p (dp - delta);    dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout

One kernel iterates over the keys of a block of rows for dq; it also stores delta and the block's part of the null
gradients. Another one iterates over the rows of a block of keys for dk and dv. If there are few keys, it splits the
rows, and a third kernel adds the splits in order. No atomics; the same input gives the same bits.

J is the number of image keys, A that of query heads, A_kv (K in the code) that of key heads, G = A / A_kv; D is
padded to DP. A tensor is passed to a kernel as a tuple (pointer, strides of batch, token and head divided by 8);
channels are contiguous.

The kernels are in attention_forward_kernel.py and attention_backward_kernels.py; here are their launchers.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .attention_backward_kernels import (
    attention_add_splits_kernel,
    attention_backward_keys_kernel,
    attention_backward_rows_kernel,
)
from .attention_forward_kernel import attention_forward_kernel
from .attention_tiles import Tile, padded, tile_for
from .device import architecture

PROGRAMS = 256  # rows are split until dk and dv have this many programs: two per multiprocessor of an H100
MIN_SPLIT_TILES = 4  # tiles of rows per split
ADD_BLOCK = 1024  # elements of a program that adds splits
LOG2_E = math.log2(math.e)


class Launch(NamedTuple):
    """How a kernel is launched: its grid, its constants in the order of its arguments, and its options."""

    grid: tuple[int]
    constants: tuple[int, ...]  # K, G, D, DP, ROWS, KEYS, UPCAST
    options: dict[str, int]  # warps and stages


class Plan(NamedTuple):
    """All that the launchers need besides the tensors. It depends on shapes, dtype and GPU alone, and is kept."""

    rows: int  # N G, rows of a sample and key head
    keys: int  # J
    context: int  # L
    null_stride: int
    key_heads: int
    blocks: int  # of rows, in the pass over rows
    forward: Launch
    backward_rows: Launch
    backward_keys: Launch | None  # None without keys
    chunk: int  # rows of a split
    splits: int
    image: int  # elements of dk
    text: int  # elements of dcontext_k


PLANS: dict[tuple, Plan] = {}
MAX_PLANS = 4096  # caption lengths and batch sizes vary


def plan_for(q: Tensor, k: Tensor | None, context_k: Tensor | None, null_k: Tensor | None) -> Plan:
    """The plan for q (B, N, A, D), k (B, J, A_kv, D), context_k (B, L, A_kv, D), null_k (D,) or (A_kv, D)."""
    key = (
        q.device if q.is_cuda else architecture(q.device),
        q.dtype,
        q.shape,
        None if k is None else k.shape,
        None if context_k is None else context_k.shape,
        None if null_k is None else null_k.shape,
    )
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) == MAX_PLANS:
            PLANS.clear()
        plan = PLANS[key] = make_plan(q, k, context_k, null_k)
    return plan


def make_plan(q: Tensor, k: Tensor | None, context_k: Tensor | None, null_k: Tensor | None) -> Plan:
    """`plan_for`, not kept."""
    batch, queries, heads, width = q.shape
    key_heads = num_key_heads(k, context_k, null_k)
    rows, keys, context = queries * (heads // key_heads), length(k), length(context_k)
    programs = batch * key_heads
    upcast = architecture(q.device) == "interpreter" and q.dtype == torch.bfloat16

    def launch(tile: Tile, blocks: int) -> Launch:
        """Of a kernel with `blocks` programs for every sample and key head."""
        constants = (key_heads, heads // key_heads, width, padded(width), tile.rows, tile.keys, upcast)
        return Launch((blocks * programs,), constants, {"num_warps": tile.warps, "num_stages": tile.stages})

    forward, backward_rows, backward_keys = (
        tile_for(name, q, rows) for name in ("forward", "backward_rows", "backward_keys")
    )
    blocks = triton.cdiv(rows, backward_rows.rows)
    key_blocks = triton.cdiv(keys, backward_keys.keys) + triton.cdiv(context, backward_keys.keys)
    row_tiles = triton.cdiv(rows, backward_keys.rows)
    max_splits = max(1, min(PROGRAMS // max(1, key_blocks * programs), row_tiles // MIN_SPLIT_TILES))
    tiles = triton.cdiv(row_tiles, max_splits)  # per split
    splits = triton.cdiv(row_tiles, tiles)
    return Plan(
        rows=rows,
        keys=keys,
        context=context,
        null_stride=0 if null_k is None or null_k.dim() == 1 else width,
        key_heads=key_heads,
        blocks=blocks,
        forward=launch(forward, triton.cdiv(rows, forward.rows)),
        backward_rows=launch(backward_rows, blocks),
        backward_keys=launch(backward_keys, key_blocks * splits) if key_blocks else None,
        chunk=tiles * backward_keys.rows,
        splits=splits,
        image=programs * keys * width,
        text=programs * context * width,
    )


def num_key_heads(k: Tensor | None, context_k: Tensor | None, null_k: Tensor | None) -> int:
    """A_kv of the keys that are present."""
    for key in (k, context_k):
        if key is not None:
            return key.shape[2]
    assert null_k is not None
    return 1 if null_k.dim() == 1 else null_k.shape[0]


def length(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


def strided(x: Tensor | None) -> tuple | None:
    """(x, strides of batch, token and head divided by 8) for the kernels.

    Copies x only if its channels are not contiguous or a stride is not a multiple of 8.
    """
    if x is None:
        return None
    strides = _strides(x.shape, x.stride())
    if strides is None:
        return strided(x.contiguous())
    return x, *strides


@lru_cache(4096)
def _strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of batch, token and head divided by 8; None if x must be copied."""
    found = [0 if size == 1 else stride for size, stride in zip(shape, strides)][:3]
    if strides[3] != 1 or any(stride % 8 for stride in found):
        return None
    return tuple(stride // 8 for stride in found)


def attention_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, N, A, D), and lse (B, A_kv, N G) to base 2 in fp32.

    q (B, N, A, D), k, v (B, J, A_kv, D), context_k, context_v (B, L, A_kv, D) in one dtype, with any strides; null_k,
    null_v (D,) or (A_kv, D), contiguous, in any float dtype; lengths (B,) integers; scale > 0. q is not empty.
    """
    plan = plan_for(q, k, context_k, null_k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(len(q), plan.key_heads, plan.rows, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attention_forward_kernel[plan.forward.grid](
            strided(q),
            strided(k),
            strided(v),
            null_k,
            null_v,
            strided(context_k),
            strided(context_v),
            lengths,
            strided(out),
            lse,
            plan.null_stride,
            plan.rows,
            plan.keys,
            plan.context,
            scale * LOG2_E,
            *plan.forward.constants,
            **plan.forward.options,
        )
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    null_k: Tensor | None,
    null_v: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dkv (B, J, 2, A_kv, D), dnull (2, *null_k.shape), dcontext_kv (B, L, 2, A_kv, D); None for absent inputs.

    dout is like out.
    """
    plan = plan_for(q, k, context_k, null_k)
    inputs = (strided(q), strided(k), strided(v))
    context = (strided(context_k), strided(context_v))
    strided_dout = strided(dout)
    assert strided_dout is not None
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    dnull = None
    if null_k is not None:
        shape = (2, len(q), plan.key_heads, plan.blocks, q.shape[3])
        dnull = torch.empty(shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attention_backward_rows_kernel[plan.backward_rows.grid](
            *inputs,
            null_k,
            null_v,
            *context,
            lengths,
            strided(out),
            lse,
            strided_dout,
            strided(dq),
            delta,
            dnull,
            plan.null_stride,
            plan.rows,
            plan.keys,
            plan.context,
            scale * LOG2_E,
            scale,
            *plan.backward_rows.constants,
            **plan.backward_rows.options,
        )
        dkv, dcontext_kv = (
            None if x is None else torch.empty((*x.shape[:2], 2, *x.shape[2:]), dtype=x.dtype, device=x.device)
            for x in (k, context_k)
        )
        if plan.backward_keys is not None:
            rows = (inputs, context, lengths, lse, strided_dout, delta)
            launch_backward_keys(plan, plan.backward_keys, *rows, scale, dkv, dcontext_kv)
    if dnull is not None:
        assert null_k is not None
        dnull = dnull.sum((1, 2, 3) if null_k.dim() == 1 else (1, 3))  # (2, D) or (2, A_kv, D)
        if dnull.dtype != null_k.dtype:
            dnull = dnull.to(null_k.dtype)
    return dq, dkv, dnull, dcontext_kv


def launch_backward_keys(
    plan: Plan,
    launch: Launch,
    inputs: tuple,
    context: tuple,
    lengths: Tensor | None,
    lse: Tensor,
    dout: tuple,
    delta: Tensor,
    scale: float,
    dkv: Tensor | None,
    dcontext_kv: Tensor | None,
) -> None:
    """Compute dkv and dcontext_kv.

    inputs: q, k, v; context: context_k, context_v; dout: all as `strided` returns them.
    """
    image, text = plan.image, plan.text
    total = 2 * (image + text)
    parts, sums_kv, sums_context_kv = None, dkv, dcontext_kv
    if plan.splits > 1:
        parts = torch.empty(plan.splits, total, dtype=torch.float32, device=lse.device)
        first = parts[0]  # (total,): the other splits follow at the same offsets
        sums_kv = None if dkv is None else first[: 2 * image].view(dkv.shape)  # (B, J, 2, A_kv, D)
        sums_context_kv = None if dcontext_kv is None else first[2 * image :].view(dcontext_kv.shape)
    targets: list[tuple | None] = []
    for sums in (sums_kv, sums_context_kv):
        targets += [None, None] if sums is None else map(strided, sums.unbind(2))  # (B, J, A_kv, D) each
    attention_backward_keys_kernel[launch.grid](
        *inputs,
        *context,
        lengths,
        lse,
        dout,
        delta,
        *targets,
        plan.rows,
        plan.keys,
        plan.context,
        plan.chunk,
        plan.splits,
        total,
        scale * LOG2_E,
        scale,
        *launch.constants,
        **launch.options,
    )
    if parts is not None:
        attention_add_splits_kernel[(-(-total // ADD_BLOCK),)](
            parts, dkv, dcontext_kv, plan.splits, total, 2 * image, BLOCK=ADD_BLOCK
        )


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time: a label, and a call of a launcher on meta tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 32, 16):
            for tokens in (64, 1024) if dtype == torch.bfloat16 else (1024,):
                label = f"{str(dtype).removeprefix('torch.')} D={width} {tokens} tokens"
                yield label, partial(run_on_meta, dtype, width, tokens)


def run_on_meta(dtype: torch.dtype, width: int, tokens: int) -> None:
    """Forward and backward on meta tensors: 8 heads that share one key head, with all sources of keys.

    Few tokens come with few samples, so that rows are split.
    """
    batch = 2 if tokens == 64 else 64
    q, k = (torch.empty(batch, tokens, heads, width, dtype=dtype, device="meta") for heads in (8, 1))
    context = torch.empty(batch, 258, 1, width, dtype=dtype, device="meta")
    null, lengths = torch.empty(width, device="meta"), torch.empty(batch, dtype=torch.int64, device="meta")
    inputs = (q, k, k, null, null, context, context, lengths)
    out, lse = attention_forward(*inputs, width**-0.5)
    attention_backward(out, *inputs, out, lse, width**-0.5)
