"""From model directories to cascades: one with its adapters, and another that guides it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..cascade import Cascade
from ..config import CascadeConfig
from .adapters import with_adapters
from .model_directory import load_weights, read_model

Lora = str | Path | Mapping[str, float] | Mapping[Path, float]
"""Adapters: a file or folder, or the scales of several by path."""


def scales_of(lora: Lora | None) -> dict[str, float]:
    """The scales of adapters by path."""
    if lora is None:
        return {}
    if isinstance(lora, (str, Path)):
        return {str(lora): 1.0}
    return {str(path): float(scale) for path, scale in lora.items()}


def load_cascade(folder: Path, lora: Mapping[str, float] | None = None) -> tuple[Cascade, dict[str, Any]]:
    """The cascade of a model directory with its weights, and its model_index.json.

    lora: scales of adapters by path, which are added to the weights in memory. Raises ValueError as `read_model`,
    `load_weights` and `with_adapters` do.
    """
    config, weights, index = read_model(folder)
    with torch.device("meta"):
        cascade = Cascade(config)
    adapted = with_adapters(cascade, weights, lora or {})
    for stage in config.stages:
        load_weights(cascade.unets[stage.name], adapted[stage.name], str(folder / stage.name), assign=True)
    return cascade, index


def check_guide(config: CascadeConfig, guide: CascadeConfig, source: str) -> None:
    """Raise ValueError if the stages that both have do not compute the same thing, or if there are none."""
    stages = {stage.name: stage for stage in config.stages}
    shared = [stage for stage in guide.stages if stage.name in stages]
    if not shared:
        raise ValueError(f"the guide {source} has none of the stages {', '.join(stages)}")
    for stage in shared:
        for key in (
            "size",
            "schedule",
            "augmentation",
            "objective.prediction",
            "objective.sigma_data",
            "unet.channels",
            "unet.lowres",
            "unet.text_dim",
        ):
            own, other = (attrgetter(key)(one) for one in (stages[stage.name], stage))
            if own != other:
                raise ValueError(f'the guide {source} cannot guide stage "{stage.name}": its {key} is another')
