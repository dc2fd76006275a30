"""group_norm_silu with a skip and a convolution's bias: its reference, its operator, its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastimagen import ops
from fastimagen.ops import group_norm
from tests.kernels.group_norm_cases import assert_close
from tests.kernels.group_norm_skip_cases import SKIP_SCALE, exact, inputs, results
from tests.kernels.interpreting import interpreted_tests

BOTH = ("x_residual", "skip_residual")
CASES = pytest.mark.parametrize(
    ("shape", "skip_channels", "groups", "biases", "residuals"),
    [
        ((2, 15, 7, 5), 9, 3, True, BOTH),
        ((2, 20, 5, 3), 0, 5, True, ("x_residual",)),
        ((1, 4, 6, 4), 12, 2, False, ()),
    ],
    ids=str,
)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_group_norm_skip.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@pytest.mark.parametrize("path", ["reference", "operator"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@CASES
def test_every_gradient_matches_float64(
    shape: tuple[int, ...],
    skip_channels: int,
    groups: int,
    biases: bool,
    residuals: tuple[str, ...],
    last: bool,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if path == "operator":  # without kernels
        monkeypatch.setattr(group_norm, "use_triton", lambda *unused: True)
    tensors = inputs(shape, skip_channels, biases=biases, residuals=residuals, last=last)
    got = results(ops.group_norm_silu_residual, tensors, groups)
    assert_close(got, exact(tensors, groups))
    layout = torch.channels_last if last else torch.contiguous_format
    assert got["y"].is_contiguous(memory_format=layout)


def test_output_is_that_of_the_joined_tensor() -> None:
    tensors = inputs((2, 15, 7, 5), 9, residuals=())
    vectors = {name: tensors[name] for name in ("weight", "bias", "scale", "shift")}
    skip = {"skip": tensors["skip"], "skip_scale": SKIP_SCALE, "x_bias": tensors["x_bias"]}
    both = torch.cat([tensors["x"] + tensors["x_bias"][:, None, None], SKIP_SCALE * tensors["skip"]], dim=1)
    y = ops.group_norm_silu(tensors["x"], num_groups=3, **vectors, **skip)
    torch.testing.assert_close(y, ops.group_norm_silu(both, num_groups=3, **vectors), rtol=0, atol=1e-6)
    again, x, given = ops.group_norm_silu_residual(tensors["x"], num_groups=3, **vectors, **skip)
    assert torch.equal(again, y) and x is tensors["x"] and given is tensors["skip"]


def test_skip_takes_the_dtype_of_x() -> None:
    tensors = inputs((2, 15, 7, 5), 9, residuals=())
    y, x, skip = ops.group_norm_silu_residual(
        tensors["x"].bfloat16(), tensors["weight"], tensors["bias"], 3, skip=tensors["skip"], x_bias=tensors["x_bias"]
    )
    assert y.dtype == x.dtype == torch.bfloat16
    assert skip is not None and torch.equal(skip, tensors["skip"].bfloat16())


def test_compiles_into_one_graph() -> None:
    tensors = inputs((2, 4, 2, 3), 2)
    torch._dynamo.reset()
    compiled = torch.compile(ops.group_norm_silu_residual, fullgraph=True, backend="eager")
    assert_close(results(compiled, tensors, 2), exact(tensors, 2))


@pytest.mark.parametrize("function", [ops.group_norm_silu, ops.group_norm_silu_residual])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(x_bias=torch.ones(8)), r"x_bias must be \(6,\) for x \(2, 6, 3, 3\) and skip \(2, 2, 3, 3\), got \(8,\)"),
        (dict(weight=torch.ones(6)), r"weight must be \(8,\) for x \(2, 6, 3, 3\) and skip \(2, 2, 3, 3\), got \(6,\)"),
        (dict(bias=torch.ones(9)), r"bias must be \(8,\) for"),
        (dict(scale=torch.ones(2, 6), shift=torch.ones(2, 8)), r"scale must be \(2, 8\) for"),
        (dict(scale=torch.ones(2, 8), shift=torch.ones(2, 6)), r"shift must be \(2, 8\) for"),
        (dict(film_bias=torch.ones(16)), "film_bias needs scale and shift"),
        (
            dict(scale=torch.ones(2, 8), shift=torch.ones(2, 8), film_bias=torch.ones(8)),
            r"film_bias must be \(16,\) for x \(2, 6, 3, 3\) and skip \(2, 2, 3, 3\), got \(8,\)",
        ),
        (dict(num_groups=3), "8 channels cannot be split into 3 groups"),
        (
            dict(skip=torch.zeros(2, 2, 3, 4)),
            r"skip must be \(2, channels, 3, 3\) for x \(2, 6, 3, 3\), got \(2, 2, 3, 4\)",
        ),
        (dict(skip=torch.zeros(1, 2, 3, 3)), r"skip must be \(2, channels, 3, 3\)"),
        (dict(skip=torch.zeros(2, 2, 9)), r"skip must be \(2, channels, 3, 3\)"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(function: Callable[..., object], change: dict[str, object], complaint: str) -> None:
    arguments: dict[str, object] = dict(
        x=torch.zeros(2, 6, 3, 3),
        weight=torch.ones(8),
        bias=torch.ones(8),
        num_groups=2,
        x_bias=torch.ones(6),
        skip=torch.zeros(2, 2, 3, 3),
    )
    with pytest.raises(ValueError, match=complaint):
        function(**arguments | change)
