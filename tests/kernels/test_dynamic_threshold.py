"""dynamic_threshold: its reference, its operator without kernels, and its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastimagen import ops
from tests.kernels.interpreting import interpreted_tests
from tests.kernels.threshold_cases import (
    CASES,
    PERCENTILES,
    assert_thresholded,
    by_definition,
    counting_launches,
    documented_launches,
)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_dynamic_threshold.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("name", CASES)
def test_reference_matches_numpy(name: str, percentile: float) -> None:
    assert_thresholded(CASES[name](), percentile)
    assert_thresholded(CASES[name]().double(), percentile)
    assert_thresholded(CASES[name](), percentile, floor=0.25)
    assert_thresholded(CASES[name](), percentile, ceiling=1.5)


def test_samples_may_have_more_than_2_to_the_24_elements() -> None:
    x = torch.zeros(1, 2**24 + 5)  # torch.quantile refuses more than 2^24
    x[0, -(2**23) :] = 3.0
    assert ops.dynamic_threshold(x, 0.9).max() == 1.0
    assert ops.dynamic_threshold(x, 0.4).max() == 1.0 and ops.dynamic_threshold(x * 0.1, 0.4).max() == 0.3 * 1.0


def test_ranks_are_computed_in_float64() -> None:
    """For 3 * 1024^2 elements an fp32 rank would be off by up to 0.15 of the distance between neighbours."""
    x = torch.arange(3 * 1024 * 1024, dtype=torch.float64)[None].float()  # exact in fp32
    torch.testing.assert_close(ops.dynamic_threshold(x, 0.95).double(), by_definition(x, 0.95, 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    assert_thresholded(CASES["normal"]().to(dtype), 0.9)


def test_inf_is_clamped_and_nan_spreads_over_its_image() -> None:
    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(2))
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[1, 0, 0, 1] = torch.nan, torch.inf, -torch.inf
    y = ops.dynamic_threshold(x, 0.5)
    assert y[0].isnan().all() and y[1].isfinite().all() and y[1, 0, 0, :2].tolist() == [1, -1]
    infinite = ops.dynamic_threshold(torch.tensor([[torch.inf, -torch.inf, 1.0]]), 0.9)
    assert infinite[0, :2].isnan().all() and infinite[0, 2] == 0
    assert ops.dynamic_threshold(torch.tensor([[torch.inf, -torch.inf, 1.0]]), 0.9, ceiling=2.0).tolist() == [
        [1, -1, 0.5]
    ]


def test_operator_passes_opcheck() -> None:
    x = CASES["normal"]().contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastimagen.dynamic_threshold, (x, 0.9, 1.0, None))


def test_operator_without_kernels_equals_the_reference() -> None:
    x = CASES["normal"]().contiguous(memory_format=torch.channels_last)
    y = torch.ops.fastimagen.dynamic_threshold(x, 0.9, 1.0, None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, ops.dynamic_threshold(x, 0.9), rtol=0, atol=0)


@pytest.mark.parametrize("through", ["reference", "operator"])
def test_compiles_into_one_graph(through: str) -> None:
    x = CASES["normal"]().contiguous(memory_format=torch.channels_last)

    def double(x: torch.Tensor) -> torch.Tensor:
        if through == "operator":
            return torch.ops.fastimagen.dynamic_threshold(x, 0.9, 1.0, None) * 2
        return ops.dynamic_threshold(x, 0.9) * 2

    torch._dynamo.reset()
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), double(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4097), (70_000, 3, 2, 2), (3, 3, 64, 64)], ids=str)
def test_launches_are_as_documented_and_fit_the_grid(shape: tuple[int, ...]) -> None:
    """Only the first axis of a grid takes more than 65,535 programs."""
    pytest.importorskip("triton")
    from fastimagen_kernels import dynamic_threshold as kernels

    with counting_launches(kernels) as launches:
        kernels.dynamic_threshold(torch.empty(shape, device="meta"), 0.9, 1.0, 2.0)
    assert [launches.count] == documented_launches(kernels)
    programs = shape[0] * -(-torch.Size(shape[1:]).numel() // kernels.BLOCK)
    assert set(launches.grids) == {(programs,)}


@pytest.mark.parametrize(("ceiling", "complaint"), [(0.5, "at least the floor, 1.0, or None, got 0.5"), (-1, "got -1")])
def test_ceiling_below_the_floor_raises(ceiling: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.dynamic_threshold(torch.zeros(1, 4), 0.5, ceiling=ceiling)


@pytest.mark.parametrize(
    ("x", "percentile", "floor", "complaint"),
    [
        (torch.zeros(1, 4), 1.5, 1.0, r"percentile must lie in \[0, 1\], got 1.5"),
        (torch.zeros(1, 4), float("nan"), 1.0, r"percentile must lie in \[0, 1\]"),
        (torch.zeros(1, 4), 0.5, 0.0, "floor must be positive, got 0.0"),
        (torch.zeros(4), 0.5, 1.0, r"takes samples \(B, ...\)"),
        (torch.zeros(2, 0), 0.5, 1.0, "that are not empty"),
        (torch.zeros(1, 4, dtype=torch.int32), 0.5, 1.0, "takes floating point samples"),
    ],
)
def test_invalid_arguments_raise(x: torch.Tensor, percentile: float, floor: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.dynamic_threshold(x, percentile, floor=floor)
