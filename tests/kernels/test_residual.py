"""add_residual: plain PyTorch, and its kernel in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.interpreting import interpreted_tests
from tests.kernels.residual_cases import exact, inputs, results


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_residual.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@pytest.mark.parametrize("two", [False, True], ids=["one bias", "two biases"])
def test_reference_matches_the_definition(two: bool) -> None:
    tensors = inputs((2, 6, 3, 2), torch.float64, two=two, last=True)
    found, expected = results(ops.add_residual, tensors), exact(tensors)
    assert found["out"].is_contiguous(memory_format=torch.channels_last)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_without_a_bias_it_is_a_sum() -> None:
    h, residual = torch.randn(2, 2, 6, 3, 2).unbind()
    assert torch.equal(ops.add_residual(h, residual), h + residual)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(residual=torch.zeros(2, 6, 3, 4)), r"two maps \(B, C, H, W\), got \(2, 6, 3, 3\) and \(2, 6, 3, 4\)"),
        (dict(bias=torch.zeros(5)), r"bias must be \(6,\) for h \(2, 6, 3, 3\), got \(5,\)"),
        (dict(more_bias=torch.zeros(1)), r"more_bias must be \(6,\) for h \(2, 6, 3, 3\), got \(1,\)"),
        (dict(bias=None), "more_bias needs bias"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(change: dict[str, Tensor | None], complaint: str) -> None:
    h, vector = torch.zeros(2, 6, 3, 3), torch.zeros(6)
    with pytest.raises(ValueError, match=complaint):
        ops.add_residual(**dict(h=h, residual=h, bias=vector, more_bias=vector) | change)
