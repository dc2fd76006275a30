"""modulated_norm: plain PyTorch, the operator, and its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.interpreting import interpreted_tests
from tests.kernels.modulated_norm_cases import exact, inputs, results


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_modulated_norm.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


def test_reference_and_operator_match_the_definition() -> None:
    tensors = inputs((2, 5, 24), torch.float64)
    found, expected = results(ops.modulated_norm, tensors), exact(tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    single = inputs((2, 5, 24), torch.float32)
    found, expected = results(lambda **given: _operator(*given.values(), 1e-5)[0], single), exact(single)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)


def _operator(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastimagen.modulated_norm(*arguments)


def test_opcheck() -> None:
    tensors = inputs((2, 5, 24), torch.float32)
    given = (*(tensors[name].detach().requires_grad_() for name in ("x", "scale", "shift")), 1e-5)
    torch.library.opcheck(torch.ops.fastimagen.modulated_norm.default, given)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(x=torch.zeros(2, 6)), r"tokens \(B, N, C\), got \(2, 6\)"),
        (dict(scale=torch.zeros(2, 5)), r"scale must be \(2, 6\) for x \(2, 3, 6\), got \(2, 5\)"),
        (dict(shift=torch.zeros(1, 6)), r"shift must be \(2, 6\) for x \(2, 3, 6\), got \(1, 6\)"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(change: dict[str, Tensor], complaint: str) -> None:
    vector = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=complaint):
        ops.modulated_norm(**dict(x=torch.zeros(2, 3, 6), scale=vector, shift=vector) | change)
