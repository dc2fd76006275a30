"""The kernels of sampler_step, run in Triton's interpreter by test_sampler_step.py."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import guarded
from tests.kernels.sampler_step_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_step_matches_float64(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("threshold", ["dynamic", "static"])
def test_all_outputs_are_written_and_nothing_else(threshold: str) -> None:
    from fastimagen_kernels import sampler_step

    case = Case(3.0, threshold, previous=True, noise=True, shape=(2, 3, 5, 5))
    with guarded(sampler_step):
        case.check()


def test_inputs_may_have_different_layouts() -> None:
    """x decides; the others lie as a U-Net or a sum of halves leaves them."""
    case = Case(3.0, "dynamic", previous=True, noise=True)
    output, x, extra = case.inputs()
    expected = case.expected(output, x, extra)
    last = torch.channels_last
    for laid_x in (x.contiguous(memory_format=last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for laid_output in (output.contiguous(memory_format=last), output.flip(0).contiguous().flip(0)):
            found = case.run(laid_output, laid_x, extra)
            for one, other in zip(found, expected):
                torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    assert case.run(output, x.contiguous(memory_format=last), extra)[0].is_contiguous(memory_format=last)


def test_nan_spreads_over_its_image_only() -> None:
    case = Case(None, "dynamic")
    output, x, extra = case.inputs()
    output[1, 0, 0, 0] = torch.nan
    x_next, x0 = case.run(output, x, extra)
    assert x0[1].isnan().all() and x_next[1].isnan().all()
    assert x0[[0, 2]].isfinite().all() and x_next[[0, 2]].isfinite().all()
    static = Case(None, "static").run(output, x, extra)[1]
    assert static.isnan().sum() == 1


def test_result_is_bitwise_reproducible() -> None:
    case = Case(3.0, "dynamic", noise=True, shape=(2, 3, 48, 48))
    first = case.run(*case.inputs())
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(case.run(*case.inputs()), first))
