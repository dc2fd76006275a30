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
from .perceptual import perceptual_objective


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
    """The objective by step, counted from 1: the stage itself, with perceptual losses if its objective has any, or
    distillation from the model of train.distill.

    device, dtype: of the weights of a teacher or of the networks of perceptual losses. steps: of the whole training.
    """
    if settings.distill is not None:
        return distillations(stage, settings.distill, steps, device, dtype)
    objective: Objective = stage
    if stage.config.objective.perceptual is not None:
        objective = perceptual_objective(stage, device, dtype)
    return lambda step: objective
