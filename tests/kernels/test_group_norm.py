"""group_norm_silu: its reference, its operator without kernels, and its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.group_norm_cases import assert_close, by_definition, exact, inputs, operator, results
from tests.kernels.interpreting import interpreted_tests

FUNCTIONS = pytest.mark.parametrize("function", [ops.group_norm_silu, operator], ids=["reference", "operator"])
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
CASES = pytest.mark.parametrize(
    ("shape", "groups", "film", "activation"),
    [
        ((2, 24, 7, 5), 3, True, "silu"),
        ((1, 20, 3, 4), 5, False, "gelu"),
        ((3, 6, 1, 1), 2, True, "none"),
        ((1, 8, 1, 1), 2, True, "silu"),
    ],
    ids=str,
)


def assert_layout(last: bool, *tensors: Tensor) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_group_norm.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@LAYOUTS
@CASES
def test_reference_matches_the_definition(
    shape: tuple[int, ...], groups: int, film: bool, activation: str, last: bool
) -> None:
    tensors = [tensor.double() for tensor in inputs(shape, film=film, last=last)]
    got = results(ops.group_norm_silu, tensors, groups, activation)
    assert_close(got, results(by_definition, tensors, groups, activation), 1e-12)
    assert_layout(last, got["y"], got["dx"])


@LAYOUTS
@CASES
def test_operator_without_kernels_matches_float64(
    shape: tuple[int, ...], groups: int, film: bool, activation: str, last: bool
) -> None:
    tensors = inputs(shape, film=film, last=last)
    got = results(operator, tensors, groups, activation)
    assert_close(got, exact(tensors, groups, activation))
    assert_layout(last, got["y"], got["dx"])


@pytest.mark.parametrize("film", [False, True])
def test_operator_passes_opcheck(film: bool) -> None:
    _, *leaves = inputs((2, 6, 3, 2), film=film, last=True)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves] + ([] if film else [None, None])
    torch.library.opcheck(torch.ops.fastimagen.group_norm_silu, (*leaves, 2, 1e-5, "silu"))


@FUNCTIONS
def test_compiles_into_one_graph(function: Callable[..., Tensor]) -> None:
    tensors = inputs((2, 6, 2, 3), last=True)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors, 2), exact(tensors, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FUNCTIONS
def test_output_keeps_the_dtype_of_x_under_autocast(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    tensors = inputs((2, 6, 2, 3), dtype=dtype, vectors=torch.float32)
    tensors[4:] = (tensor.bfloat16() for tensor in tensors[4:])  # scale and shift come from a linear layer
    with torch.autocast("cpu", torch.bfloat16):
        got = results(function, tensors, 2)
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        "y": dtype,
        "dx": dtype,
        "dweight": torch.float32,
        "dbias": torch.float32,
        "dscale": torch.bfloat16,
        "dshift": torch.bfloat16,
    }


@FUNCTIONS
def test_group_of_one_element_is_normalized_to_zero(function: Callable[..., Tensor]) -> None:
    _, x, weight, bias = inputs((1, 4, 1, 1), film=False)
    y = function(x, weight, bias, 4, activation="none").flatten()  # (4,)
    # PyTorch multiplies by 1 / sqrt(eps) before it subtracts the mean.
    torch.testing.assert_close(y, bias, rtol=1e-5, atol=1e-4)


def test_empty_batch_gives_an_empty_tensor() -> None:
    _, x, *vectors = inputs((1, 6, 2, 3), film=False)
    assert ops.group_norm_silu(x[:0], *vectors, 2).shape == (0, 6, 2, 3)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(activation="relu"), 'no activation "relu"; there are silu, gelu, none'),
        (dict(num_groups=4), "6 channels cannot be split into 4 groups"),
        (dict(num_groups=0), "6 channels cannot be split into 0 groups"),
        (dict(x=torch.zeros(2, 6, 3)), r"takes x \(B, C, H, W\), got \(2, 6, 3\)"),
        (dict(weight=torch.ones(5)), r"weight must be \(6,\) for x \(2, 6, 3, 3\), got \(5,\)"),
        (dict(scale=None), "scale and shift must be given together"),
        (dict(scale=torch.zeros(6)), r"scale must be \(2, 6\) for x \(2, 6, 3, 3\), got \(6,\)"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(change: dict[str, object], complaint: str) -> None:
    arguments = dict(
        x=torch.zeros(2, 6, 3, 3),
        weight=torch.ones(6),
        bias=torch.ones(6),
        num_groups=2,
        scale=torch.zeros(2, 6),
        shift=torch.zeros(2, 6),
    )
    with pytest.raises(ValueError, match=complaint):
        ops.group_norm_silu(**arguments | change)
