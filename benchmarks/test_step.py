"""CPU timings of the quickstart's networks: one training step and one denoising step of each stage.

    make bench        (pytest-benchmark; compare rows of one run, the machines differ)
"""

from __future__ import annotations

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.presets import shapes
from fastimagen.text import TextEmbeddings
from fastimagen.unet import UNet

BATCH = 16
STAGES = {stage.name: stage for stage in shapes().stages}


def setup(name: str) -> tuple[Stage, UNet, torch.Tensor, TextEmbeddings]:
    config = STAGES[name]
    torch.manual_seed(0)
    stage, unet = Stage(config, shapes().below(name)), UNet(config.unet)
    images = torch.rand(BATCH, 3, config.crop or config.size, config.crop or config.size) * 2 - 1
    text = TextEmbeddings(torch.randn(BATCH, 14, 64), torch.ones(BATCH, 14, dtype=torch.bool))
    return stage, unet, images, text


@pytest.mark.parametrize("name", STAGES)
def test_training_step(benchmark, name: str) -> None:
    stage, unet, images, text = setup(name)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        optimizer.zero_grad()
        stage.training_loss(unet, images, text, generator).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()

    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", STAGES)
def test_sampling_two_steps(benchmark, name: str) -> None:
    stage, unet, images, text = setup(name)
    lowres = images[..., :32, :32] if stage.config.unet.lowres else None
    sampling = stage.config.sampling.model_copy(update={"steps": 2})
    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(lambda: stage.sample(unet.eval(), text, list(range(BATCH)), lowres=lowres, sampling=sampling),
                       rounds=5, warmup_rounds=1)
