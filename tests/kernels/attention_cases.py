"""Inputs for attention, its definition, and the error of its results, for the tests of both of its computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Sizes; `null` is "shared" by the heads, one for each ("heads"), or there is none ("")."""

    queries: int
    heads: int
    width: int
    keys: int = 0
    key_heads: int = 1
    null: str = "shared"
    context: int = 0
    lengths: tuple[int, ...] | None = None
    batch: int = 2


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of ops.attention, and dout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {name: normal(case.batch, case.queries, case.heads, case.width) for name in ("dout", "q")}
    if case.keys:
        tensors |= {name: normal(case.batch, case.keys, case.key_heads, case.width) for name in ("k", "v")}
    if case.null:
        shape = (case.width,) if case.null == "shared" else (case.key_heads, case.width)
        tensors |= {name: normal(*shape) for name in ("null_k", "null_v")}
    if case.context:
        tensors |= {
            name: normal(case.batch, case.context, case.key_heads, case.width) for name in ("context_k", "context_v")
        }
    if case.lengths is not None:
        tensors["context_lengths"] = torch.tensor(case.lengths)
    return tensors


def by_definition(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The contract of ops.attention, sample by sample and head by head."""
    samples = []
    for b in range(len(q)):
        heads = []
        for h in range(q.shape[2]):
            keys, values = [], []
            if null_k is not None:
                keys.append(null_k[None] if null_k.dim() == 1 else null_k[h % len(null_k), None])
                values.append(null_v[None] if null_v.dim() == 1 else null_v[h % len(null_v), None])
            if context_k is not None:
                count = context_k.shape[1] if context_lengths is None else int(context_lengths[b])
                keys.append(context_k[b, :count, h % context_k.shape[2]])
                values.append(context_v[b, :count, h % context_k.shape[2]])
            if k is not None:
                keys.append(k[b, :, h % k.shape[2]])
                values.append(v[b, :, h % k.shape[2]])
            keys, values = torch.cat(keys), torch.cat(values)  # (J, D) each
            logits = q[b, :, h] @ keys.T * (q.shape[-1] ** -0.5 if scale is None else scale)  # (N, J)
            heads.append(logits.softmax(dim=-1) @ values if len(keys) else torch.zeros_like(q[b, :, h]))
        samples.append(torch.stack(heads, dim=1))  # (N, A, D)
    return torch.stack(samples)  # (B, N, A, D)


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """out and every gradient."""
    arguments = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    dout = arguments.pop("dout").detach()
    out = function(**arguments, **options)
    leaves = {name: x for name, x in arguments.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), materialize_grads=True)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def exact(tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """The results of the definition in float64."""
    return results(
        by_definition, {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}, **options
    )


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to its largest magnitude; where all should be 0, to 1."""
    assert got.keys() == true.keys()
    return {
        name: ((got[name].double() - true[name]).abs().max() / (true[name].abs().max() or 1)).item() for name in true
    }


def assert_close(got: dict[str, Tensor], true: dict[str, Tensor], limit: float = 5e-6) -> None:
    wrong = {name: error for name, error in errors(got, true).items() if not error <= limit}
    assert not wrong, wrong
