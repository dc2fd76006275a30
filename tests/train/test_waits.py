"""A training step reads no tensor back: on a GPU that would wait for everything before it.

tests/gpu counts the waits where there is a GPU; here the profile of a step on the CPU shows what would wait.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.config import EMAConfig
from fastimagen.text import TextEmbeddings
from fastimagen.train.ema import EMA
from fastimagen.unet import UNet
from tests.conftest import toy_cascade

READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


def reads(work: Callable[[], object]) -> dict[str, int]:
    """Operations of the profile that need a value of a tensor on the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key: event.count for event in profile.key_averages() if event.key in READS}


@pytest.mark.parametrize("name", ["base", "sr"])
def test_a_step_reads_nothing_back(name: str) -> None:
    cascade = toy_cascade()
    stage = Stage(next(stage for stage in cascade.stages if stage.name == name), cascade.below(name))
    unet = UNet(stage.config.unet)
    images = torch.rand(2, 3, stage.config.size, stage.config.size) * 2 - 1
    text = TextEmbeddings(torch.randn(2, 5, 64), torch.arange(5) < torch.tensor([[5], [2]]))
    generator = torch.Generator().manual_seed(0)
    average = EMA(list(unet.parameters()), EMAConfig())

    def step() -> None:
        stage.training_loss(unet, images, text, generator).mean().backward()
        average.update(1)

    step()
    assert reads(step) == {}


def test_the_profile_sees_reads() -> None:
    assert reads(lambda: torch.ones(3).sum().item()) == {"aten::item": 1, "aten::_local_scalar_dense": 1}
