"""Before the first step: the stages to train, their initial weights, and whether a checkpoint matches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import CascadeConfig, Config, StageConfig
from ..data.source import encoder_width
from ..files import read_safetensors
from ..networks.unet import UNet
from ..presets import resolve
from ..sampling.model_directory import load_weights


def plan(config: Config, stage: str = "all") -> tuple[CascadeConfig, list[StageConfig]]:
    """The cascade of a configuration, and the stages to train: one by name, or "all".

    Raises ValueError for unknown presets, stage names and stages under train.stages that the cascade does not have.
    """
    ours = config.fastimagen
    width = encoder_width(ours) if isinstance(ours.cascade, str) else None
    cascade = resolve(ours.cascade, text_dim=width)
    for name in ours.train.stages:
        try:
            cascade.stage(name)
        except ValueError as error:
            raise ValueError(f"fastimagen.train.stages: {error}") from None
    return cascade, list(cascade.stages) if stage == "all" else [cascade.stage(stage)]


def initial_unet(config: StageConfig, *, seed: int, init_from: str | None = None) -> UNet:
    """A U-Net with seeded random weights, the same on all ranks, or with the weights of an exported model.

    Raises ValueError when the exported weights are of another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(config.unet)
    if init_from is not None:
        path = Path(init_from) / config.name / "model.safetensors"
        if not path.exists():
            raise ValueError(f"init_from {init_from}: there is no {path}")
        load_weights(unet, read_safetensors(path), str(path))
    return unet


def check_same_stage(saved: dict[str, Any], config: StageConfig, where: Path) -> None:
    """Raise ValueError if network or diffusion process differ from those of a checkpoint; sampling settings may."""
    now = flatten(config.model_dump(mode="json", exclude={"sampling"}))
    then = flatten({key: value for key, value in saved.items() if key != "sampling"})
    differing = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if differing:
        raise ValueError(
            f"{where} belongs to another architecture: {', '.join(differing[:5])} differ; use another --run-dir, "
            f"or restore these settings"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
