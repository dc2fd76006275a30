"""ops.halves: views forward; backward a view where the gradients lie side by side, otherwise their concatenation."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fastimagen import ops

SHAPES = pytest.mark.parametrize(("shape", "dim"), [((3, 8), 1), ((3, 8), -1), ((6,), 0), ((2, 5, 4, 3), 2)], ids=str)
PLACES = pytest.mark.parametrize("place", ["where kernels run", "elsewhere"])


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    where = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    monkeypatch.setattr(sys.modules[ops.halves.__module__], "in_kernels", lambda x: where != "elsewhere")


def gradient(x: Tensor, dim: int, first: Tensor, second: Tensor) -> Tensor:
    """The gradient of x, if first and second arrive at its halves."""
    x = x.requires_grad_()
    return torch.autograd.grad(ops.halves(x, dim), x, (first, second))[0]


@SHAPES
@PLACES
def test_halves_are_views_in_order(shape: tuple[int, ...], dim: int, place: str) -> None:
    x = torch.randn(shape)
    first, second = ops.halves(x, dim)
    assert torch.equal(torch.cat([first, second], dim), x)
    assert first.data_ptr() == x.data_ptr() and second.untyped_storage().data_ptr() == x.data_ptr()


@SHAPES
@PLACES
def test_gradients_from_two_tensors_are_joined(shape: tuple[int, ...], dim: int, place: str) -> None:
    true = torch.randn(shape)
    first, second = (half.clone() for half in true.chunk(2, dim))
    assert torch.equal(gradient(torch.empty(shape), dim, first, second), true)


@SHAPES
def test_gradients_side_by_side_are_not_copied(shape: tuple[int, ...], dim: int) -> None:
    written = torch.randn(shape)
    joined = gradient(torch.empty(shape), dim, *written.chunk(2, dim))
    assert torch.equal(joined, written) and joined.data_ptr() == written.data_ptr()


def test_gradients_in_the_other_order_or_at_a_distance_are_copied() -> None:
    written = torch.randn(4, 12)
    first, second, third = written.chunk(3, 1)  # (4, 4) each
    for halves in ((second, first), (first, third), (first, second.clone()), (first, first)):
        joined = gradient(torch.empty(4, 8), 1, *halves)
        assert torch.equal(joined, torch.cat(halves, 1))
        assert joined.untyped_storage().data_ptr() != written.data_ptr()


@PLACES
def test_gradient_is_differentiable(place: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        first, second = ops.halves(x, 1)
        return first.sin() * second**3

    assert torch.autograd.gradgradcheck(function, x)


def test_odd_size_raises() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of \(2, 5\) has no halves"):
        ops.halves(torch.zeros(2, 5), 1)
