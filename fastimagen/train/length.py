"""How long a stage trains: optimizer steps, given as such or as epochs."""

from __future__ import annotations

import math

from ..config import StageTrainConfig, TrainConfig

DEFAULT_STEPS = 1000


def planned_epochs(settings: TrainConfig, stage: str) -> float | None:
    """The epochs of a stage; None if its length is given in steps."""
    own = settings.stages.get(stage, StageTrainConfig())
    return own.epochs if own.steps or own.epochs else settings.epochs


def planned_steps(settings: TrainConfig, stage: str) -> int:
    """The optimizer steps of a stage without epochs."""
    own = settings.stages.get(stage, StageTrainConfig())
    return own.steps or settings.steps or DEFAULT_STEPS


def has_own_length(settings: TrainConfig, stage: str) -> bool:
    """Whether train.steps and train.epochs say nothing about a stage."""
    own = settings.stages.get(stage, StageTrainConfig())
    return own.steps is not None or own.epochs is not None


def steps_of_epochs(epochs: float, samples: int, batch_size: int, *, done: tuple[int, int] = (0, 0)) -> int:
    """The fewest steps that read `samples` training samples `epochs` times.

    done: the steps that a resumed stage has taken, and the samples that it has read, with any batch size."""
    done_steps, done_samples = done
    rest = math.ceil(round((epochs * samples - done_samples) / batch_size, 6))  # 0.1 x 30 / 1 is 3.0000000000000004
    return max(1, done_steps + max(0, rest))
