"""Attention of the presets: image tokens among themselves, with the text, and to the text alone.

Letters: B batch, N queries = image tokens, S all keys of a sample, L text tokens, H heads, K key heads, D channels.
Providers have the signature of ops.attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastimagen import ops

from ..harness.inputs import normal_inputs, usual_dtype
from ..harness.measure import Case, Provider, ProviderUnavailable, compiled
from ..harness.timing import first_line

HEADS, WIDTH, TEXT = 8, 64, 256
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


# ---- providers


def ours(name: str, *arguments: Tensor, **keywords: Any) -> Tensor:
    """ops.attention with a backend."""
    ops.set_backend(name)
    return ops.attention(*arguments, **keywords)


def concatenated(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All keys and values (B, S, K, D), null key first, then text, then image; mask (B, S) or None."""
    sources = [(context_k, context_v), (k, v)]
    key_heads = next(key.shape[2] for key, _ in sources if key is not None)
    if null_k is not None:
        sources.insert(0, tuple(x.expand(len(q), 1, key_heads, -1) for x in (null_k, null_v)))
    keys, values = (torch.cat([pair[i] for pair in sources if pair[i] is not None], dim=1) for i in range(2))
    if context_lengths is None:
        return keys, values, None
    at = torch.arange(keys.shape[1], device=q.device) - int(null_k is not None)
    return keys, values, (at < context_lengths[:, None]) | (at >= context_k.shape[1])  # the null key is at -1


def eager(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **sources: Any) -> Tensor:
    """As MinImagen writes it: concatenate, einsum, fp32 softmax, einsum."""
    keys, values, mask = concatenated(q, k, v, **sources)
    keys, values = (x.expand(-1, -1, q.shape[2], -1) for x in (keys, values))
    scores = torch.einsum("bnhd,bshd->bhns", q * q.shape[-1] ** -0.5, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.finfo(scores.dtype).max)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.einsum("bhns,bshd->bnhd", weights, values)


def folded(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as SDPA takes them, (B, K, N * H / K, D): heads that share a key are rows of one head."""
    if keys.shape[2] == 1:
        q = q.reshape(q.shape[0], -1, 1, q.shape[3])
    return q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def sdpa(name: str | None, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **sources: Any) -> Tensor:
    """Heads folded, keys concatenated here where there are several sources, masked where lengths ask for it; `name`
    forces one of SDPA's backends."""
    keys, values, mask = concatenated(q, k, v, **sources) if sources else (k, v, None)
    rows, keys, values = folded(q, keys, values)
    mask = None if mask is None else mask[:, None, None]
    with sdpa_kernel(list(SDPA.values()) if name is None else SDPA[name]):
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return out.transpose(1, 2).reshape(q.shape)


def chosen(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **sources: Any) -> str:
    """The backend that SDPA takes by itself for the call that `sdpa` makes."""
    keys, values, mask = concatenated(q, k, v, **sources) if sources else (k, v, None)
    choice = torch._fused_sdp_choice(*folded(q, keys, values), None if mask is None else mask[:, None, None])
    return f"SDPA chose {SDPBackend(choice).name.removesuffix('_ATTENTION').lower()}"


def xformers(*arguments: Tensor, **keywords: Any) -> Tensor:
    if find_spec("xformers") is None:
        raise ProviderUnavailable("xformers is not installed")
    return ours("xformers", *arguments, **keywords)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def flex(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **sources: Any) -> Tensor:
    """FlexAttention, heads folded; the lengths in its score function, which needs no block mask per batch."""
    keys, values, mask = concatenated(q, k, v, **sources)

    def masked(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return torch.where(mask[b, key], score, -math.inf)

    out = _flex()(*folded(q, keys, values), score_mod=None if mask is None else masked)
    return out.transpose(1, 2).reshape(q.shape)


# ---- cases


def cases(
    device: torch.device,
    *,
    sides: tuple[int, ...] = (64, 32, 16, 8),
    batches: tuple[int, ...] = (8, 32, 64, 64),
    compilers: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Largest maps first. With `compilers` the providers that take seconds to compile a shape, and only those."""
    dtype = dtype or usual_dtype(device)
    for side, batch in zip(sides, batches):
        for kind in ("self", "self + text", "self + ragged text", "cross to ragged text"):
            if compilers and (side < 32 or kind != "self + ragged text"):
                continue
            inputs = partial(make_inputs, kind, batch, side * side, dtype, device)
            for mode in ("forward", "backward"):
                shape = f"{kind} {side}x{side} B{batch} H{HEADS} D{WIDTH}"
                names = providers(kind, compilers)
                yield Case(
                    "attention",
                    shape,
                    dtype,
                    mode,
                    inputs,
                    names,
                    *amounts(kind, batch, side * side, dtype, mode),
                    notes={"SDPA": _note(inputs)} if "SDPA" in names else {},
                )
            if not compilers and kind in ("self", "self + text"):  # what SDPA would do if keys came in one piece
                inputs = partial(in_one_piece, inputs)
                for mode in ("forward", "backward"):
                    yield Case(
                        "attention",
                        shape,
                        dtype,
                        mode,
                        inputs,
                        {f"SDPA {name}, keys in one piece": partial(sdpa, name) for name in SDPA},
                        *amounts(kind, batch, side * side, dtype, mode),
                    )


def providers(kind: str, compilers: bool) -> dict[str, Provider]:
    """By name. Flash attention takes no mask: for ragged text it is not asked."""
    if compilers:
        return {"FlexAttention": flex, "compiled eager": compiled(eager)}
    backends = [name for name in SDPA if name != "math" and (name != "flash" or "ragged" not in kind)]
    return {
        "ours, triton": partial(ours, "triton"),
        "ours, torch": partial(ours, "torch"),
        "eager": eager,
        "SDPA": partial(sdpa, None),
        **{f"SDPA {name}": partial(sdpa, name) for name in backends},
        "xformers": xformers,
    }


def make_inputs(
    kind: str,
    batch: int,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Random arguments of a kind, the same at every call. Ragged captions have 8 to 64 tokens of 256."""
    normal = normal_inputs(device, dtype)
    key_heads, keys = (HEADS, 2) if kind.startswith("cross") else (1, queries)  # cross: two time tokens
    image = tuple(normal(batch, keys, key_heads, WIDTH) for _ in range(2))
    sources = {name: normal(WIDTH) for name in ("null_k", "null_v")}
    if "text" in kind:
        sources |= {name: normal(batch, TEXT, key_heads, WIDTH) for name in ("context_k", "context_v")}
    if "ragged" in kind:
        sources["context_lengths"] = lengths(batch, device)
    return (normal(batch, queries, HEADS, WIDTH), *image), sources


def lengths(batch: int, device: torch.device) -> Tensor:
    """Of captions, (B,): evenly spread from 8 to 64 tokens."""
    return torch.linspace(8, 64, batch, device=device).long()


def in_one_piece(inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    (q, k, v), sources = inputs()
    keys, values, _ = concatenated(q, k, v, **sources)
    return (q, keys, values), {}


def _note(inputs: Any) -> str:
    arguments, keywords = inputs()
    try:
        return chosen(*arguments, **keywords)
    except RuntimeError as error:
        return f"SDPA's choice unknown: {first_line(error)}"


def amounts(kind: str, batch: int, queries: int, dtype: torch.dtype, mode: str) -> tuple[float, float]:
    """(floating-point operations, bytes): two products forward, five backward; every tensor read or written once."""
    text = 0 if "text" not in kind else batch * TEXT
    if "ragged" in kind:
        text = int(lengths(batch, torch.device("cpu")).sum())
    cross = kind.startswith("cross")
    keys = batch * (1 + (2 if cross else queries)) + text  # of the whole batch
    flops = 4.0 * queries * HEADS * WIDTH * keys
    elements = 2 * batch * queries * HEADS * WIDTH + 2 * keys * (HEADS if cross else 1) * WIDTH
    if mode == "forward":
        return flops, elements * dtype.itemsize
    return 2.5 * flops, 2.0 * elements * dtype.itemsize  # q, k, v, out, dout in; dq, dk, dv out
