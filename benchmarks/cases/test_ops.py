"""Single ops on a CPU, a row for every provider:  python -m pytest benchmarks --benchmark-only

For a look while working on an op. `make bench` measures the same cases, with alternating providers, and keeps the
results.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..harness.measure import Case
from . import attention, dynamic_threshold, group_norm, modulated_norm

CPU = torch.device("cpu")


def cases() -> Iterator[Case]:
    yield from dynamic_threshold.cases(CPU, shapes=((1, 64), (4, 256)))
    yield from group_norm.cases(CPU, shapes=((2, 128, 64),))
    yield from modulated_norm.cases(CPU, shapes=((8, 256, 768),))
    yield from attention.cases(CPU, sides=(16,), batches=(2,))


def parameters() -> Iterator[object]:
    for case in cases():
        for name in case.providers:
            if "triton" not in name:
                yield pytest.param(case, name, id=f"{case.op} {case.shape} {case.mode}-{name}")


@pytest.mark.parametrize(("case", "provider"), parameters())
def test_op(benchmark, case: Case, provider: str) -> None:
    try:
        work = case.work(case.providers[provider])
        work.call(work.setup())
    except Exception as reason:  # a peer's, where it is not installed or not made for this case
        pytest.skip(str(reason))
    benchmark.group = f"{case.op} {case.shape} {case.mode}"
    benchmark.pedantic(work.call, setup=lambda: ((work.setup(),), {}), rounds=10)
