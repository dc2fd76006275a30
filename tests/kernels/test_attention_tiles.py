"""The tiles of the attention kernels are those of the GPU that the tensors are on."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastimagen_kernels import device
from fastimagen_kernels.attention_tiles import TILES, tile_for


class MixedGPUs:
    """Triton's driver on a machine with an A100 as GPU 0 and an H100 as GPU 1."""

    current = 0

    def get_current_device(self) -> int:
        return self.current

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", (80, 90)[self.current], 32)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> MixedGPUs:
    gpus = MixedGPUs()

    @contextmanager
    def make_current(index: int):
        before, gpus.current = gpus.current, index
        yield
        gpus.current = before

    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(driver, "_active", gpus)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    device._architecture.cache_clear()
    yield gpus
    device._architecture.cache_clear()


def queries(index: int) -> SimpleNamespace:
    """What is asked of q (B, N, A, D) in bf16 on GPU `index`."""
    return SimpleNamespace(shape=(2, 4096, 8, 64), dtype=torch.bfloat16, device=torch.device("cuda", index))


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
def test_each_of_different_gpus_gets_its_own_tiles(order: tuple[int, ...], gpus: MixedGPUs) -> None:
    for index in order:  # whichever comes first, and whichever is current
        expected = TILES[("sm_80", "sm_90")[index], "forward"][64][1]
        assert tile_for("forward", queries(index), 4096 * 8) == expected
    assert gpus.current == 0
