"""What a stage is trained to do: the loss that the training loop and the validation call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..cascade import Stage
from ..config import TrainConfig
from ..diffusion.draws import Draws
from ..text.embeddings import TextEmbeddings
from .distillation import distillations


class Objective(Protocol):
    """The loss of a network's samples. `cascade.Stage` is the objective of a stage that learns from images."""

    def training_loss(
        self,
        unet: nn.Module,
        images: Tensor,
        text: TextEmbeddings | None,
        draws: Draws,
        *,
        drop_captions: bool = True,
    ) -> Tensor:
        """Weighted loss per sample (B,) for images (B, C, H, W) in [-1, 1]."""

    def noise_levels(self, draws: Draws) -> Tensor:
        """The noise levels sigma (B,) of the noisy images that `training_loss` makes of `draws`."""


def objectives(
    stage: Stage, settings: TrainConfig, steps: int, device: torch.device, dtype: torch.dtype
) -> Callable[[int], Objective]:
    """The objective by step, counted from 1: the stage itself, or distillation from the model of train.distill.

    device, dtype: of the teacher's weights. steps: of the whole training.
    """
    if settings.distill is None:
        return lambda step: stage
    return distillations(stage, settings.distill, steps, device, dtype)
