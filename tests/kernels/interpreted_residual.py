"""The kernel of add_residual in Triton's interpreter, against float64. test_residual.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastimagen import ops
from fastimagen_kernels import residual as kernels
from tests.kernels.interpreting import guarded
from tests.kernels.residual_cases import exact, inputs, results

pytestmark = pytest.mark.usefixtures("interpreter")

HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    with guarded(kernels):
        yield


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("two", [False, True], ids=["one bias", "two biases"])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 300, 1, 1), (3, 1, 20, 17), (2, 64, 9, 8)], ids=str)
def test_sum_is_rounded_once_and_gradients_are_exact(
    shape: tuple[int, ...], dtype: torch.dtype, two: bool, last: bool
) -> None:
    tensors = inputs(shape, dtype, two=two, last=last)
    found, expected = results(ops.add_residual, tensors), exact(tensors)
    assert found["out"].dtype == dtype and found["out"].stride() == tensors["h"].stride()
    limit = 1.01 * HALF_ULP[dtype] * expected["out"].abs() + 1e-6
    assert ((found["out"].double() - expected["out"]).abs() <= limit).all()
    assert torch.equal(found["dh"], tensors["dy"]) and torch.equal(found["dresidual"], tensors["dy"])
    for name in {"dbias", "dmore_bias"} & found.keys():
        torch.testing.assert_close(found[name].double(), expected[name], rtol=4 * HALF_ULP[dtype], atol=1e-5)


def test_result_is_bitwise_reproducible_and_takes_other_layouts() -> None:
    """h decides on the layout."""
    tensors = inputs((2, 6, 5, 4), torch.float32, two=True, last=True)
    first = results(ops.add_residual, tensors)
    other = results(ops.add_residual, tensors | {"residual": tensors["residual"].contiguous()})
    assert all(torch.equal(first[name], other[name]) for name in first)
    assert other["out"].is_contiguous(memory_format=torch.channels_last)


def test_dtypes_may_differ() -> None:
    """Under autocast h comes from a convolution in bf16, and the residual path is fp32."""
    tensors = inputs((2, 6, 5, 4), torch.float32, two=False, last=True)
    tensors["h"] = tensors["h"].bfloat16()
    found = results(ops.add_residual, tensors)
    assert found["out"].dtype == torch.float32 and found["dh"].dtype == torch.bfloat16
    torch.testing.assert_close(found["out"].double(), exact(tensors)["out"], rtol=1e-6, atol=1e-6)


def test_float64_raises_with_backend_triton() -> None:
    tensors = inputs((1, 4, 2, 2), torch.float64, two=False, last=False)
    with pytest.raises(ValueError, match="the kernel takes float32, bfloat16 and float16, not float64"):
        ops.add_residual(tensors["h"], tensors["residual"], tensors["bias"])
