"""Steps of samplers, and what they are in float64, by formulas of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastimagen import ops
from tests.kernels.threshold_cases import by_definition

RECOVERY, UPDATE = (1.7, -1.3), (0.6, 0.5, -0.2, 0.3)


@dataclass(frozen=True)
class Case:
    guidance: float | None = None
    threshold: str = "none"
    previous: bool = False
    noise: bool = False
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (3, 3, 9, 7)
    ceiling: float | None = None

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """output, x, and previous and noise by name."""
        generator = torch.Generator().manual_seed(0)

        def draw(batch: int) -> Tensor:
            return torch.randn(batch, *self.shape[1:], generator=generator)

        batch = self.shape[0]
        halves = 1 if self.guidance is None else 2
        output, x, previous, noise = (draw(rows) for rows in (halves * batch, *[batch] * 3))
        chosen = {"previous": previous} if self.previous else {}
        return output.to(self.dtype), x, chosen | ({"noise": noise} if self.noise else {})

    def run(self, output: Tensor, x: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ops.sampler_step(
            output,
            x,
            RECOVERY,
            UPDATE,
            guidance=self.guidance,
            threshold=self.threshold,
            percentile=0.9,
            ceiling=self.ceiling,
            **extra,
        )

    def expected(self, output: Tensor, x: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output, x = output.double(), x.double()
        if self.guidance is not None:
            with_caption, without = output[: len(x)], output[len(x) :]
            output = self.guidance * with_caption + (1 - self.guidance) * without
        x0 = RECOVERY[0] * x + RECOVERY[1] * output
        if self.threshold == "dynamic":
            x0 = by_definition(x0, 0.9, 1.0, self.ceiling)
        elif self.threshold == "static":
            x0 = x0.clamp(-1, 1)
        nothing = torch.zeros(())
        return (
            UPDATE[0] * x
            + UPDATE[1] * x0
            + UPDATE[2] * extra.get("previous", nothing).double()
            + UPDATE[3] * extra.get("noise", nothing).double(),
            x0,
        )

    def check(self) -> None:
        inputs = self.inputs()
        for found, expected in zip(self.run(*inputs), self.expected(*inputs)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


def cases() -> Iterator[Case]:
    for threshold in ("dynamic", "static", "none"):
        for guidance in (None, 0.0, 1.0, 5.0):
            yield Case(guidance, threshold)
        yield Case(3.0, threshold, previous=True, noise=True)
        yield Case(None, threshold, previous=True, dtype=torch.bfloat16)
        yield Case(3.0, threshold, noise=True, dtype=torch.float16)
        yield Case(3.0, threshold, shape=(2, 3, 48, 48))  # 6,912 numbers: two programs
    yield Case(2.0, "dynamic", shape=(1, 1))
    yield Case(2.0, "dynamic", ceiling=1.5)


CASES = list(cases())
