"""The sampler's step on a GPU against formulas in float64, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from tests.gpu.comparison import DTYPES, normal, threshold_formula


@pytest.mark.parametrize("threshold", ["dynamic", "static", "none"])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampler_step(threshold: str, guidance: float | None, dtype: torch.dtype, backend: str) -> None:
    output = normal(3 if guidance is None else 6, 3, 65, 64, seed=1).to(dtype)
    x, previous, noise = (normal(3, 3, 65, 64, seed=seed) for seed in (2, 3, 4))
    x_next, x0 = ops.sampler_step(
        output,
        x,
        (1.7, -1.3),
        (0.6, 0.5, -0.2, 0.3),
        guidance=guidance,
        threshold=threshold,
        percentile=0.9,
        previous=previous,
        noise=noise,
    )
    exact = output.double()
    if guidance is not None:
        exact = guidance * exact[:3] + (1 - guidance) * exact[3:]
    exact = 1.7 * x.double() - 1.3 * exact
    if threshold == "dynamic":
        exact = threshold_formula(exact, 0.9)
    elif threshold == "static":
        exact = exact.clamp(-1, 1)
    right = 0.6 * x.double() + 0.5 * exact - 0.2 * previous.double() + 0.3 * noise.double()
    torch.testing.assert_close(x0.double(), exact, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(x_next.double(), right, rtol=3e-6, atol=3e-6)


def test_sampler_step_in_a_cuda_graph() -> None:
    ops.set_backend("triton")
    output, x = normal(2, 3, 64, 64, seed=1), normal(1, 3, 64, 64)

    def step() -> tuple[Tensor, Tensor]:
        return ops.sampler_step(output, x, (1.0, -1.0), (0.5, 0.5, 0.0, 0.0), guidance=3.0, threshold="dynamic")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(normal(1, 3, 64, 64, seed=9))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step()))
