"""What the tests of single ops share: random inputs, and the comparison with a formula in float64.

Errors are relative, in the 2-norm, and at most twice those of the same formula in plain PyTorch and the same dtype, or
5e-6 where that is more. Those of a result that is far smaller than the others, such as the gradient of queries that
have a single key, which is 0, are relative to a tenth of the largest result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(*shape, generator=generator).cuda()


def run(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed weighted sum of it for every floating-point input, all in `dtype`."""
    given = {name: x.to(dtype).detach().requires_grad_() if is_real(x) else x for name, x in inputs.items()}
    out = function(**given)
    leaves = {name: x for name, x in given.items() if is_real(x)}
    weights = normal(*out.shape, seed=7).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    found = {
        f"d{name}": torch.zeros_like(x) if grad is None else grad for (name, x), grad in zip(leaves.items(), grads)
    }
    return {"out": out.detach(), **found}


def is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def assert_right(op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> None:
    rounded = {name: x.to(dtype) if is_real(x) else x for name, x in inputs.items()}
    exact = run(formula, rounded, torch.float64)
    plain, ours = run(formula, rounded, dtype), run(op, rounded, dtype)
    largest = max(right.norm() for right in exact.values())
    for name, right in exact.items():
        assert ours[name].dtype == dtype and ours[name].shape == right.shape, name
        scale = max(right.norm(), largest / 10)
        error, allowed = (((found[name].double() - right).norm() / scale).item() for found in (ours, plain))
        assert error <= max(2 * allowed, 5e-6), f"{name}: relative error {error:.1e}, plain PyTorch's {allowed:.1e}"


def threshold_formula(x0: Tensor, percentile: float) -> Tensor:
    """Linear interpolation between order statistics, in float64."""
    values = x0.double().abs().flatten(1).sort(dim=1).values
    rank = percentile * (values.shape[1] - 1)
    low, high = values[:, math.floor(rank)], values[:, math.ceil(rank)]
    s = (low + (high - low) * (rank - math.floor(rank))).clamp(min=1)[:, None, None, None]
    return x0.double().clamp(-s, s) / s


def assert_reproducible(op: Callable[..., Tensor], inputs: Inputs) -> None:
    """Output and gradients are the same bits in ten more runs."""
    first = run(op, inputs, torch.bfloat16)
    for _ in range(10):
        again = run(op, inputs, torch.bfloat16)
        assert all(torch.equal(first[name], again[name]) for name in first)
