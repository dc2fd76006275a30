"""sampler_step: its reference, its operator without kernels, and its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.interpreting import interpreted_tests
from tests.kernels.sampler_step_cases import CASES, RECOVERY, UPDATE, Case
from tests.kernels.threshold_cases import counting_launches, documented_launches


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_sampler_step.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_reference_matches_float64(case: Case) -> None:
    case.check()


CASE = Case(3.0, "dynamic", previous=True, noise=True)


def channels_last_inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output, x, extra = CASE.inputs()
    return output, x.contiguous(memory_format=torch.channels_last), extra


def operator(output: Tensor, x: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The registered operator, which ops.sampler_step calls on a GPU."""
    tensors = (output, x, extra["previous"], extra["noise"])
    return torch.ops.fastimagen.sampler_step(*tensors, *RECOVERY, *UPDATE, CASE.guidance, CASE.threshold, 0.9, None)


def test_operator_passes_opcheck() -> None:
    output, x, extra = channels_last_inputs()
    torch.library.opcheck(
        torch.ops.fastimagen.sampler_step,
        (output, x, extra["previous"], None, *RECOVERY, *UPDATE, 3.0, "dynamic", 0.9, None),
    )


def test_operator_without_kernels_equals_the_reference() -> None:
    inputs = channels_last_inputs()
    for found, expected in zip(operator(*inputs), CASE.run(*inputs)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", [CASE.run, operator], ids=["reference", "operator"])
def test_compiles_into_one_graph(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    inputs = channels_last_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), function(*inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 5), (70_000, 3, 2, 2), (3, 3, 64, 64)], ids=str)
def test_launches_are_as_documented_and_fit_the_grid(shape: tuple[int, ...]) -> None:
    """Only the first axis of a grid takes more than 65,535 programs."""
    pytest.importorskip("triton")
    from fastimagen_kernels import dynamic_threshold, sampler_step

    x = torch.empty(shape, device="meta")
    counts = []
    for threshold in ("static", "dynamic"):
        with counting_launches(sampler_step, dynamic_threshold) as launches:
            sampler_step.sampler_step(x, x, None, None, RECOVERY, UPDATE, None, threshold, 0.9, 2.0)
        counts.append(launches.count)
        programs = shape[0] * -(-torch.Size(shape[1:]).numel() // dynamic_threshold.BLOCK)
        if threshold == "static":  # whose programs do not end with an image
            programs = -(-x.numel() // dynamic_threshold.BLOCK)
        assert set(launches.grids) == {(programs,)}
    assert counts == documented_launches(sampler_step)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"guidance": 3.0}, r"output must be \(4, 3\) for x \(2, 3\), got \(2, 3\)"),
        ({"threshold": "soft"}, 'threshold must be one of dynamic, static, none, got "soft"'),
        ({"percentile": 1.5}, r"percentile must lie in \[0, 1\], got 1.5"),
        ({"ceiling": 0.5}, "ceiling must be at least the floor, 1.0, or None, got 0.5"),
        ({"noise": torch.zeros(2, 4)}, r"noise must be \(2, 3\) like x, got \(2, 4\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x must be floating point"),
    ],
)
def test_invalid_arguments_raise(change: dict[str, object], complaint: str) -> None:
    arguments = {"output": torch.zeros(2, 3), "x": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=complaint):
        ops.sampler_step(arguments.pop("output"), arguments.pop("x"), RECOVERY, UPDATE, **arguments)
