"""Samples that selection gets wrong first, dynamic thresholding by definition in float64, and a count of launches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastimagen import ops

PERCENTILES = [0.0, 0.5, 0.9, 0.995, 1.0]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: _random(3, 3, 9, 7) * 2,
    "ties": lambda: (_random(2, 1, 8, 8) * 2).round(),
    "constant": lambda: torch.full((2, 1, 4, 4), -1.5),
    "two values": lambda: torch.where(_random(2, 1, 5, 5) > 0, 3.0, -1.25),
    "zeros": lambda: torch.zeros(1, 1, 3, 3),
    "denormals": lambda: _random(1, 1, 6, 6) * 1e-41,
    "huge": lambda: _random(1, 1, 6, 6) * 1e37,
    "huge range": lambda: torch.pow(10.0, _random(1, 1, 6, 6) * 15),
    "one element": lambda: torch.tensor([[2.5], [-0.5]]),
    "two elements": lambda: torch.tensor([[2.5, -4.0]]),
    "neighbouring digits": lambda: torch.tensor(
        [[1.0, 2.0, 4.0, 8.0, 1.0 + 2**-23, 2.0 - 2**-22, 1.5, 3.0, 2**10, 6.0]]
    ),
    "close together": lambda: torch.cat([1.5 + torch.arange(58) * 2.0**-20, torch.full((4,), 100.0)])[None],
    "bf16 grid": lambda: (_random(2, 3, 6, 6) * 3).bfloat16().float(),
}


def digit_boundaries() -> Tensor:
    """(1, 17): neighbours on both sides of the boundaries of every digit of the bits, in no order."""
    numbers = [0x3FFF8000, 0x3FFFFFF0, 0x3FFFFFFF, 0x40000000, 0x40000001, 0x4000007F, 0x40000080, 0x400000FF]
    numbers += [0x40000100, 0x40007F80, 0x40007FFF, 0x40008000, 0x40008001, 0x40010000, 0x40010000, 0x40017FFF]
    x = torch.tensor([*numbers, 0x40018000], dtype=torch.int32).view(torch.float32)
    x = x * torch.tensor([1, -1, -1]).repeat(6)[:17]
    return x[torch.randperm(17, generator=torch.Generator().manual_seed(0))][None]  # (1, 17)


def by_definition(x: Tensor, percentile: float, floor: float, ceiling: float | None = None) -> Tensor:
    """In float64, with NumPy's quantile: an implementation that shares nothing with ours."""
    wide = x.double()
    s = torch.from_numpy(np.quantile(wide.abs().flatten(1).numpy(), percentile, axis=1)).clamp(floor, ceiling)
    s = s.reshape(-1, *(1,) * (x.dim() - 1))
    return wide.clamp(-s, s) / s


def assert_thresholded(x: Tensor, percentile: float, floor: float = 1.0, ceiling: float | None = None) -> None:
    y = ops.dynamic_threshold(x, percentile, floor=floor, ceiling=ceiling)
    assert y.dtype == x.dtype and y.shape == x.shape
    atol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[x.dtype]
    torch.testing.assert_close(y.double(), by_definition(x, percentile, floor, ceiling), rtol=0, atol=atol)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given inside: kernels of the modules, with their grids, and operators of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: list[tuple[int, ...]] = []
        self.operators: list[str] = []

    @property
    def count(self) -> int:
        return len(self.grids) + len(self.operators)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """In place of a kernel."""
        return lambda *arguments, **options: self.grids.append(grid)

    def __torch_dispatch__(
        self, function: Callable, types: object, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> object:
        name = str(function)
        if not name.startswith(("aten.empty", "aten.detach")):  # these launch nothing
            self.operators.append(name)
        return function(*arguments, **(options or {}))


@contextmanager
def counting_launches(*modules: ModuleType) -> Iterator[Launches]:
    """Inside, the kernels of these modules are counted and not launched."""
    with pytest.MonkeyPatch.context() as patch, Launches() as launches:
        for module in modules:
            for name in vars(module):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, launches)
        yield launches


def documented_launches(module: ModuleType) -> list[int]:
    """The numbers in the sentence "Launches: ..." of a kernel file."""
    assert module.__doc__
    (sentence,) = re.findall(r"Launches: (.*?)[.;]", module.__doc__, re.DOTALL)
    return [int(number) for number in re.findall(r"\b(\d+)\b(?= \(|, or)", sentence)]
