"""Attention on a GPU: values and every gradient, by each backend, against a formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen import ops
from tests.gpu.comparison import DTYPES, Inputs, assert_reproducible, assert_right, is_real, normal


def attention_formula(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt(D)) v over all keys that count, written out."""
    batch, _, heads, width = q.shape
    scores, values = [], []
    for key, value, lengths in ((null_k, null_v, None), (context_k, context_v, context_lengths), (k, v, None)):
        if key is None:
            continue
        key, value = (x.reshape(1, 1, -1, width) if x.dim() < 4 else x for x in (key, value))
        key, value = (x.expand(batch, -1, heads, -1) for x in (key, value))
        score = torch.einsum("bnhd,bshd->bhns", q, key) / math.sqrt(width)
        if lengths is not None:
            outside = torch.arange(key.shape[1], device=q.device) >= lengths[:, None]
            score = score.masked_fill(outside[:, None, None], -math.inf)
        scores.append(score)
        values.append(value)
    score = torch.cat(scores, dim=-1)
    seen = (score > -math.inf).any(dim=-1, keepdim=True)
    weights = torch.where(seen, score, 0).softmax(dim=-1).where(seen, 0)
    return torch.einsum("bhns,bshd->bnhd", weights, torch.cat(values, dim=1))


def attention_inputs(
    batch: int,
    queries: int,
    heads: int,
    key_heads: int,
    width: int,
    *,
    image: int = 0,
    text: int = 0,
    lengths: list[int] | None = None,
    null: bool = True,
) -> Inputs:
    inputs: Inputs = {"q": normal(batch, queries, heads, width)}
    if image:
        inputs |= {name: normal(batch, image, key_heads, width, seed=i) for i, name in enumerate("kv", 1)}
    if null:
        inputs |= {"null_k": normal(width, seed=3), "null_v": normal(width, seed=4)}
    if text:
        inputs |= {
            "context_k": normal(batch, text, key_heads, width, seed=5),
            "context_v": normal(batch, text, key_heads, width, seed=6),
        }
    if lengths:
        inputs["context_lengths"] = torch.tensor(lengths, device="cuda")
    return inputs


ATTENTION = {
    "8x8": dict(batch=3, queries=64, heads=8, key_heads=1, width=64, image=64),
    "one query": dict(batch=2, queries=1, heads=1, key_heads=1, width=16, image=1, null=False),
    "odd everything": dict(batch=3, queries=77, heads=5, key_heads=1, width=72, image=131, text=13, lengths=[0, 13, 7]),
    "16x16 with text": dict(batch=2, queries=256, heads=8, key_heads=1, width=64, image=256, text=258),
    "32x32 with ragged text": dict(
        batch=4, queries=1024, heads=8, key_heads=1, width=64, image=1024, text=256, lengths=[1, 256, 64, 0]
    ),
    "64x64": dict(batch=1, queries=4096, heads=2, key_heads=1, width=64, image=4096),
    "cross": dict(batch=3, queries=256, heads=8, key_heads=8, width=64, image=2, text=256, lengths=[256, 9, 0]),
    "cross, narrow": dict(batch=2, queries=100, heads=3, key_heads=3, width=40, image=4, text=20, lengths=[20, 1]),
    "pooling": dict(
        batch=5, queries=1, heads=8, key_heads=8, width=64, text=77, lengths=[77, 1, 5, 64, 33], null=False
    ),
    "no key at all": dict(batch=2, queries=33, heads=4, key_heads=1, width=32, text=9, lengths=[0, 9], null=False),
    "wide heads": dict(batch=2, queries=130, heads=2, key_heads=2, width=128, image=130),
    "null key alone": dict(batch=1, queries=50, heads=2, key_heads=1, width=24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str, dtype: torch.dtype, backend: str) -> None:
    assert_right(ops.attention, attention_formula, attention_inputs(**ATTENTION[case]), dtype)


def test_attention_of_strided_inputs(backend: str) -> None:
    inputs = attention_inputs(2, 90, 4, 1, 64, image=90, text=17, lengths=[17, 3])
    inputs["q"] = normal(2, 90, 3, 4, 64)[:, :, 1]
    inputs["k"], inputs["v"] = normal(2, 90, 1, 128).chunk(2, dim=-1)
    inputs["context_k"] = normal(1, 17, 1, 64).expand(2, -1, -1, -1)

    def strided(**given: Tensor) -> Tensor:
        return ops.attention(**given)

    exact = attention_formula(**{name: x.double() if is_real(x) else x for name, x in inputs.items()})
    error = (strided(**inputs).double() - exact).norm() / exact.norm()
    assert error < 5e-6, f"relative error {error:.1e}"


def test_normalized_queries_and_keys(backend: str) -> None:
    inputs = attention_inputs(2, 64, 4, 1, 32, image=64, text=10, lengths=[10, 4])
    scales = (normal(32, seed=8), normal(32, seed=9))
    exact = {name: x.double() if is_real(x) else x for name, x in inputs.items()}
    for name, scale in (("q", scales[0]), ("k", scales[1]), ("null_k", scales[1]), ("context_k", scales[1])):
        exact[name] = F.normalize(exact[name], dim=-1) * scale.double() * (8 * math.sqrt(32) if name == "q" else 1)
    right = attention_formula(**exact)
    error = (ops.attention(**inputs, qk_scales=scales, scale=8.0).double() - right).norm() / right.norm()
    assert error < 2e-5, f"relative error {error:.1e}"


def test_outputs_and_gradients_are_bitwise_reproducible() -> None:
    ops.set_backend("triton")
    assert_reproducible(ops.attention, attention_inputs(4, 300, 8, 1, 64, image=300, text=100, lengths=[100, 50, 0, 1]))
