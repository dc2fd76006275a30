"""sampler_step: its reference, its operator where no kernel can run, and its kernels, interpreted."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from fastimagen import ops
from tests.kernels.interpreting import tests_of
from tests.kernels.sampler_step_cases import CASES, RECOVERY, UPDATE, Case


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", tests_of("interpreted_sampler_step.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_reference_matches_float64(case: Case) -> None:
    case.check()


def test_operator_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3.0, "dynamic", previous=True, noise=True)
    output, x, extra = case.inputs()
    x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.fastimagen.sampler_step, (output, x, extra["previous"], None, *RECOVERY, *UPDATE, 3.0, "dynamic", 0.9)
    )
    monkeypatch.setattr(sys.modules["fastimagen.ops.sampler_step"], "use_triton", lambda *unused: True)
    case.check()
    assert case.run(output, x, extra)[0].is_contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled_op = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled_op(output, x, extra), case.run(output, x, extra)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"guidance": 3.0}, r"output must be \(4, 3\) for x \(2, 3\), got \(2, 3\)"),
        ({"threshold": "soft"}, 'threshold must be one of dynamic, static, none, got "soft"'),
        ({"percentile": 1.5}, r"percentile must lie in \[0, 1\], got 1.5"),
        ({"noise": torch.zeros(2, 4)}, r"noise must be \(2, 3\) like x, got \(2, 4\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x must be floating point"),
    ],
)
def test_invalid_arguments_raise(change: dict[str, object], complaint: str) -> None:
    arguments = {"output": torch.zeros(2, 3), "x": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=complaint):
        ops.sampler_step(arguments.pop("output"), arguments.pop("x"), RECOVERY, UPDATE, **arguments)
