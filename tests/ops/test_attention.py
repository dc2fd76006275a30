"""ops.attention in plain PyTorch and through xFormers, and its operator without kernels."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastimagen import ops
from fastimagen.ops import dispatch
from fastimagen.ops.attention import Keys, attention_xformers
from fastimagen.ops.attention_op import fused
from tests.conftest import ROOT
from tests.kernels.attention_cases import Case, assert_close, exact, make, results

CASES = [
    Case(queries=9, heads=4, width=24, keys=9, context=20, lengths=(20, 0)),
    Case(queries=6, heads=3, width=16, keys=5, key_heads=3, null="heads", context=4, lengths=(4, 1)),
    Case(queries=6, heads=2, width=16, key_heads=2, null="", context=6, lengths=(0, 4)),
    Case(queries=6, heads=2, width=16, keys=7, null=""),
    Case(queries=4, heads=2, width=16, context=3),
    Case(queries=4, heads=2, width=16),
]
OPERATOR_ARGUMENTS = ("q", "k", "v", "null_k", "null_v", "context_k", "context_v", "context_lengths")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_float64(case: Case) -> None:
    tensors = make(case)
    assert_close(results(ops.attention, tensors), exact(tensors))


def test_query_without_any_key_gives_zeros() -> None:
    tensors = make(Case(queries=6, heads=2, width=16, key_heads=2, null="", context=6, lengths=(0, 4)))
    got = results(ops.attention, tensors)
    assert all((got[name][0] == 0).all() for name in ("out", "dq", "dcontext_k", "dcontext_v"))
    assert (got["out"][1] != 0).all()


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_gradients_of_reference_and_operator_pass_gradcheck(case: Case) -> None:
    tensors = make(case, torch.float64)
    tensors = {name: x.requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    arguments = tuple(tensors.get(name) for name in OPERATOR_ARGUMENTS)

    def public(q: Tensor, *keys: Tensor | None) -> Tensor:
        names = Keys._fields[:-1] + ("context_lengths",)
        return ops.attention(q, **dict(zip(names, keys)))

    assert torch.autograd.gradcheck(public, arguments, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *a: fused(*a, case.width**-0.5), arguments, fast_mode=True)
    torch.testing.assert_close(public(*arguments), fused(*arguments, case.width**-0.5))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_operator_passes_opcheck(case: Case) -> None:
    tensors = make(case)
    leaves = [
        x.requires_grad_() if (x := tensors.get(name)) is not None and x.is_floating_point() else x
        for name in OPERATOR_ARGUMENTS
    ]
    torch.library.opcheck(torch.ops.fastimagen.attention, (*leaves, 0.25))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_and_autograd_function_agree(case: Case) -> None:
    """Under a dispatch mode calls go to the operator, otherwise to the function."""

    def run(q: Tensor, context_lengths: Tensor | None = None, **keys: Tensor) -> Tensor:
        names = OPERATOR_ARGUMENTS[1:-1]
        return fused(q, *(keys.get(name) for name in names), context_lengths, 0.25)

    tensors = make(case)
    with Operators() as eager:
        through_operator = results(run, tensors)
    assert "fastimagen.attention.default" in eager.names
    with torch.profiler.profile() as profile:
        through_function = results(run, tensors)
    assert not [event.key for event in profile.key_averages() if event.key.startswith("fastimagen::")]
    for name, expected in through_operator.items():
        torch.testing.assert_close(through_function[name], expected, rtol=0, atol=0)


class Operators(TorchDispatchMode):
    """The names of all operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Callable, types: object, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> object:
        self.names.add(str(function))
        return function(*arguments, **(options or {}))


def test_gradients_of_gradients_raise() -> None:
    q, null = torch.ones(1, 2, 1, 16, requires_grad=True), torch.ones(16)
    out = fused(q, None, None, null, null, None, None, None, 0.25)
    with pytest.raises(RuntimeError, match="attention have no second derivative; compute it in plain PyTorch"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_qk_scales_normalize_queries_and_keys() -> None:
    tensors = make(CASES[0])
    scales = torch.rand(2, 24) + 0.5
    del tensors["dout"]
    by_hand = tensors | {
        name: F.normalize(tensors[name], dim=-1) * scales[0 if name == "q" else 1]
        for name in ("q", "k", "null_k", "context_k")
    }
    out = ops.attention(**tensors, qk_scales=tuple(scales), scale=8.0)
    torch.testing.assert_close(out, ops.attention(**by_hand, scale=8.0))


def test_autocast_gives_bf16_output_and_fp32_gradients() -> None:
    tensors = make(CASES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(ops.attention, tensors)
    assert got["out"].dtype == torch.bfloat16 and got["dq"].dtype == torch.float32
    assert_close(got, exact(tensors), 2e-2)


def test_compiles_into_one_graph() -> None:
    tensors = make(CASES[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, **keys: ops.attention(q, **keys), fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors), exact(tensors))


@pytest.mark.parametrize("lengths", [None, (4, 2)], ids=["all", "masked"])
def test_flash_attention_of_sdpa_is_used(lengths: tuple[int, ...] | None) -> None:
    """Masked or not, SDPA uses its blockwise kernel, which never stores all scores."""
    case = Case(queries=8, heads=2, width=16, keys=8, context=4, lengths=lengths)
    with torch.profiler.profile() as profile:
        results(ops.attention, make(case))
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names, names
    assert "aten::_scaled_dot_product_attention_math" not in names


PEAK = """
import resource, torch
from fastimagen import ops
q, k, v = (torch.randn(1, 2048, heads, 64, requires_grad=True) for heads in (8, 1, 1))
null = torch.randn(64, requires_grad=True)
ops.attention(q[:, :8], k[:, :8], v[:, :8], null_k=null, null_v=null).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.attention(q, k, v, null_k=null, null_v=null).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_self_attention_needs_less_memory_than_all_scores() -> None:
    """Forward and backward of 2048 tokens and 8 heads."""
    child = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 8 * 2048 * 2049 * 4, child.stdout


@pytest.fixture
def xformers_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that takes what xFormers takes: equal heads of q, k and v, and a bias with aligned rows."""

    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        assert query.dim() == 4 and key.shape == value.shape and key.shape[2] == query.shape[2]
        if attn_bias is not None:
            assert attn_bias.shape == (len(query), query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:3])
            assert attn_bias.dtype == query.dtype
        logits = torch.einsum("bmhd,bnhd->bhmn", query, key) * scale
        weights = (logits if attn_bias is None else logits + attn_bias).softmax(dim=-1)  # NaN where all is masked
        return torch.einsum("bhmn,bnhd->bmhd", weights, value)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.usefixtures("xformers_stub")
def test_xformers_gets_arguments_that_it_supports(case: Case) -> None:
    def through_xformers(q: Tensor, context_lengths: Tensor | None = None, **tensors: Tensor) -> Tensor:
        keys = Keys(**dict.fromkeys(Keys._fields) | tensors | {"lengths": context_lengths})
        return attention_xformers(q, keys, case.width**-0.5)

    tensors = make(case)
    assert_close(results(through_xformers, tensors), exact(tensors))


def test_cpu_tensors_raise_with_backend_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "no_xformers", lambda: None)  # as on a machine with xFormers and a GPU
    ops.set_backend("xformers")
    try:
        with pytest.raises(ValueError, match='attention with backend "xformers": xformers needs CUDA tensors'):
            ops.attention(torch.ones(1, 2, 1, 16), null_k=torch.ones(16), null_v=torch.ones(16))
    finally:
        ops.set_backend("auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 4, 16)}, r"attention takes q \(B, N, A, D\), got \(2, 4, 16\)"),
        ({"k": None, "v": None}, "attention needs at least one of k, null_k and context_k"),
        ({"v": None}, "k and v must be given together"),
        ({"v": torch.ones(2, 3, 1, 16)}, r"k and v must have one shape, got \(2, 5, 1, 16\) and \(2, 3, 1, 16\)"),
        (
            dict.fromkeys("kv", torch.ones(2, 5, 3, 16)),
            r"k and v must be \(2, keys, 1 or 2, 16\) for q .*, got \(2, 5, 3, 16\)",
        ),
        (
            dict.fromkeys(("null_k", "null_v"), torch.ones(8)),
            r"null_k and null_v must be \(16,\) or \(1 or 2, 16\) for q",
        ),
        ({"context_lengths": torch.ones(2)}, "context_lengths needs context_k"),
        (
            dict.fromkeys(("context_k", "context_v"), torch.ones(2, 5, 1, 16)) | {"context_lengths": torch.ones(2)},
            r"context_lengths must be \(2,\) int32 or int64, got \(2,\) float32",
        ),
    ],
)
def test_invalid_arguments_raise(change: dict[str, Tensor | None], message: str) -> None:
    arguments = {"q": torch.ones(2, 4, 2, 16), "k": torch.ones(2, 5, 1, 16), "v": torch.ones(2, 5, 1, 16)}
    with pytest.raises(ValueError, match=message):
        ops.attention(**(arguments | change))
