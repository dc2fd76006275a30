"""Defects of MinImagen that concern the stages of a cascade.

The numbers are those of a survey of MinImagen. Tests of other defects: 1 and 7 in train/test_parts.py, 3 in
test_presets.py, 6 in train/test_deepspeed_steps.py, 8 and 10 in networks/test_unet.py, 4, 11 and 19 in
interop/test_minimagen.py. `pytest -k defect` runs those with a number in their names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastimagen.cascade import Stage
from fastimagen.config import StageConfig
from fastimagen.images import to_tensor
from fastimagen.networks.unet import UNet
from tests.conftest import TOY_STAGES

UNCONDITIONAL = {name: value for name, value in TOY_STAGES[1]["unet"].items() if name != "text_dim"}


class Spy(nn.Module):
    """A network that records its arguments and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        self.calls.append(condition)
        return torch.zeros_like(x) * self.weight


def sr_stage(**changes: Any) -> Stage:
    base = StageConfig.model_validate(TOY_STAGES[0])
    return Stage(
        StageConfig.model_validate({**TOY_STAGES[1], "unet": {**UNCONDITIONAL, "text_dim": None}, **changes}), base
    )


def test_defect_2_training_and_sampling_augment_the_lowres_image_alike() -> None:
    """A constant image of 0.6, in [-1, 1], reaches the network as 0.6 alpha + sigma noise in both."""
    stage, spy = sr_stage(augmentation={"train_range": [0.2, 0.2], "sample_level": 0.2}), Spy()
    constant = torch.full((64, 3, 16, 16), 0.6)
    stage.training_loss(spy, constant, None, stage.draw(0, range(64), constant))
    stage.sample(spy, None, list(range(64)), lowres=stage.shrink(constant))
    (trained, sampled) = spy.calls[0], spy.calls[1]
    alpha, sigma = (value.item() for value in stage.augmentation.alpha_sigma(torch.tensor(0.2)))
    for call in (trained, sampled):
        assert abs(call["lowres"].mean() - 0.6 * alpha) < 0.01
        assert abs(call["lowres"].std() - sigma) < 0.01
    assert torch.equal(trained["lowres_time"].float(), sampled["lowres_time"].float())


def test_defect_5_flat_images_train_and_contrast_is_unchanged() -> None:
    black = to_tensor(np.zeros((16, 16, 3), dtype=np.uint8))
    assert torch.equal(black, torch.full((3, 16, 16), -1.0))
    faint = to_tensor(np.full((16, 16, 3), 102, dtype=np.uint8))
    faint[:, :8] = to_tensor(np.full((8, 16, 3), 153, dtype=np.uint8))
    torch.testing.assert_close(faint.unique(), torch.tensor([-0.2, 0.2]), rtol=0, atol=1e-6)
    stage = sr_stage()
    unet = UNet(stage.config.unet)
    images = torch.stack([black, faint])
    stage.training_loss(unet, images, None, stage.draw(0, range(2), images)).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in unet.parameters())


def test_defect_9_each_sample_has_its_own_augmentation_level() -> None:
    stage, spy = sr_stage(augmentation={"train_range": [0.0, 1.0]}), Spy()
    images = torch.zeros(8, 3, 16, 16)
    stage.training_loss(spy, images, None, stage.draw(0, range(8), images))
    assert len(spy.calls[0]["lowres_time"].unique()) == 8
