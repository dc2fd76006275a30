"""The fused ops on a GPU: values and every gradient, by each backend, against formulas in float64.

Errors are relative, in the 2-norm, and at most twice those of the same formula in plain PyTorch and the same dtype, or
5e-6 where that is more. Needs pytest, torch and the repository alone; `python -m benchmarks.gpu_check` runs it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = dict[str, Any]


@pytest.fixture(params=["triton", "torch", "xformers"])
def backend(request: pytest.FixtureRequest):
    if request.param == "xformers" and find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    before = ops.backend()
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(*shape, generator=generator).cuda()


def run(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed weighted sum of it for every floating-point input, all in `dtype`."""
    given = {name: x.to(dtype).detach().requires_grad_() if _is_real(x) else x for name, x in inputs.items()}
    out = function(**given)
    leaves = {name: x for name, x in given.items() if _is_real(x)}
    weights = normal(*out.shape, seed=7).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    found = {
        f"d{name}": torch.zeros_like(x) if grad is None else grad for (name, x), grad in zip(leaves.items(), grads)
    }
    return {"out": out.detach(), **found}


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def assert_right(op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> None:
    rounded = {name: x.to(dtype) if _is_real(x) else x for name, x in inputs.items()}
    exact = run(formula, rounded, torch.float64)
    plain, ours = run(formula, rounded, dtype), run(op, rounded, dtype)
    for name, right in exact.items():
        assert ours[name].dtype == dtype and ours[name].shape == right.shape, name
        scale = right.norm().clamp(min=1e-12)
        error, allowed = (((found[name].double() - right).norm() / scale).item() for found in (ours, plain))
        assert error <= max(2 * allowed, 5e-6), f"{name}: relative error {error:.1e}, plain PyTorch's {allowed:.1e}"


# ---- attention


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

    exact = attention_formula(**{name: x.double() if _is_real(x) else x for name, x in inputs.items()})
    error = (strided(**inputs).double() - exact).norm() / exact.norm()
    assert error < 5e-6, f"relative error {error:.1e}"


def test_normalized_queries_and_keys(backend: str) -> None:
    inputs = attention_inputs(2, 64, 4, 1, 32, image=64, text=10, lengths=[10, 4])
    scales = (normal(32, seed=8), normal(32, seed=9))
    exact = {name: x.double() if _is_real(x) else x for name, x in inputs.items()}
    for name, scale in (("q", scales[0]), ("k", scales[1]), ("null_k", scales[1]), ("context_k", scales[1])):
        exact[name] = F.normalize(exact[name], dim=-1) * scale.double() * (8 * math.sqrt(32) if name == "q" else 1)
    right = attention_formula(**exact)
    error = (ops.attention(**inputs, qk_scales=scales, scale=8.0).double() - right).norm() / right.norm()
    assert error < 2e-5, f"relative error {error:.1e}"


# ---- GroupNorm


def group_norm_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(dim=2, keepdim=True)
    y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y * torch.sigmoid(y) if activation == "silu" else y


GROUP_NORM = {  # B, C, H, W, G, FiLM
    "one pixel": (2, 32, 1, 1, 8, True),
    "8x8": (3, 1536, 8, 8, 8, True),
    "16x16": (2, 256, 16, 16, 8, False),
    "odd": (3, 24, 7, 13, 3, True),
    "a channel each": (2, 10, 5, 6, 10, True),
    "one group": (2, 30, 9, 9, 1, True),
    "64x64": (2, 128, 64, 64, 8, True),
    "256x256": (1, 64, 256, 256, 8, False),
    "37 channels": (1, 37, 33, 17, 1, True),
    "32 groups": (4, 320, 32, 32, 32, True),
    "wide": (2, 3584, 8, 8, 8, True),
    "long": (1, 8, 3, 1000, 4, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", GROUP_NORM)
def test_group_norm(case: str, layout: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    batch, channels, height, width, groups, film = GROUP_NORM[case]
    inputs: Inputs = {
        "x": (3 * normal(batch, channels, height, width) + 2).contiguous(memory_format=layout),
        "weight": normal(channels, seed=1),
        "bias": normal(channels, seed=2),
        "num_groups": groups,
    }
    if film:
        inputs |= {"scale": normal(batch, channels, seed=3), "shift": normal(batch, channels, seed=4)}
    assert_right(ops.group_norm_silu, group_norm_formula, inputs, dtype)
    y = ops.group_norm_silu(**{name: x.to(dtype) if _is_real(x) else x for name, x in inputs.items()})
    assert y.is_contiguous(memory_format=layout)


# ---- thresholding


def threshold_formula(x0: Tensor, percentile: float) -> Tensor:
    """Linear interpolation between order statistics, in float64."""
    values = x0.double().abs().flatten(1).sort(dim=1).values
    rank = percentile * (values.shape[1] - 1)
    low, high = values[:, math.floor(rank)], values[:, math.ceil(rank)]
    s = (low + (high - low) * (rank - math.floor(rank))).clamp(min=1)[:, None, None, None]
    return x0.double().clamp(-s, s) / s


THRESHOLD = {
    "64x64": lambda: 2 * normal(5, 3, 64, 64),
    "one value": lambda: 3 * normal(2, 1, 1, 1),
    "ties": lambda: (2 * normal(4, 3, 33, 17)).round(),
    "constant": lambda: torch.full((2, 3, 16, 16), -4.0).cuda(),
    "zeros": lambda: torch.zeros(2, 3, 8, 8).cuda(),
    "small": lambda: 0.1 * normal(3, 3, 32, 32),
    "two values": lambda: torch.where(normal(2, 3, 64, 64) > 1.5, 9.0, 0.5),
    "huge range": lambda: normal(2, 3, 40, 40).exp() ** 8,
    "1024x1024": lambda: 2 * normal(1, 3, 1024, 1024),
    "beyond 2^24 values": lambda: 2 * normal(1, 3, 2400, 2400),
    "channels_last": lambda: (2 * normal(3, 3, 48, 40)).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("percentile", [0.0, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("case", THRESHOLD)
def test_threshold(case: str, percentile: float, backend: str) -> None:
    if backend == "xformers":
        pytest.skip("xformers has no thresholding")
    x0 = THRESHOLD[case]()
    torch.testing.assert_close(
        ops.dynamic_threshold(x0, percentile).double(), threshold_formula(x0, percentile), rtol=1e-6, atol=1e-6
    )


# ---- sampler's step


@pytest.mark.parametrize("threshold", ["dynamic", "static", "none"])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampler_step(threshold: str, guidance: float | None, dtype: torch.dtype, backend: str) -> None:
    if backend == "xformers":
        pytest.skip("xformers has no samplers")
    output = normal(3 if guidance is None else 6, 3, 65, 64, seed=1).to(dtype)
    x, previous, noise = (normal(3, 3, 65, 64, seed=seed) for seed in (2, 3, 4))
    x_next, x0 = ops.sampler_step(
        output,
        x,
        (1.7, -1.3),
        (0.6, 0.5, -0.2, 0.3),
        guidance=guidance,
        threshold=threshold,
        percentile=0.9,
        previous=previous,
        noise=noise,
    )
    exact = output.double()
    if guidance is not None:
        exact = guidance * exact[:3] + (1 - guidance) * exact[3:]
    exact = 1.7 * x.double() - 1.3 * exact
    if threshold == "dynamic":
        exact = threshold_formula(exact, 0.9)
    elif threshold == "static":
        exact = exact.clamp(-1, 1)
    right = 0.6 * x.double() + 0.5 * exact - 0.2 * previous.double() + 0.3 * noise.double()
    torch.testing.assert_close(x0.double(), exact, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(x_next.double(), right, rtol=3e-6, atol=3e-6)


def test_sampler_step_in_a_cuda_graph() -> None:
    ops.set_backend("triton")
    output, x = normal(2, 3, 64, 64, seed=1), normal(1, 3, 64, 64)

    def step() -> tuple[Tensor, Tensor]:
        return ops.sampler_step(output, x, (1.0, -1.0), (0.5, 0.5, 0.0, 0.0), guidance=3.0, threshold="dynamic")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(normal(1, 3, 64, 64, seed=9))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step()))


# ---- reproducibility


def test_outputs_and_gradients_are_bitwise_reproducible(backend: str) -> None:
    if backend != "triton":
        pytest.skip("only the Triton kernels are deterministic")
    attention = attention_inputs(4, 300, 8, 1, 64, image=300, text=100, lengths=[100, 50, 0, 1])
    norm = {
        "x": normal(4, 256, 40, 40).contiguous(memory_format=torch.channels_last),
        "weight": normal(256),
        "bias": normal(256, seed=2),
        "num_groups": 8,
        "scale": normal(4, 256, seed=3),
        "shift": normal(4, 256, seed=4),
    }
    for op, inputs in ((ops.attention, attention), (ops.group_norm_silu, norm)):
        first = run(op, inputs, torch.bfloat16)
        for _ in range(10):
            again = run(op, inputs, torch.bfloat16)
            assert all(torch.equal(first[name], again[name]) for name in first)
