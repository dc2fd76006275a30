"""Before the first step: the stages to train and their initial weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import CascadeChanges, CascadeConfig, Config, StageConfig, StageTrainConfig
from ..data.prepare import check_data, encoder_width
from ..files import read_safetensors
from ..network_config import LoraConfig
from ..networks.build import build_network
from ..networks.lora import add_lora
from ..networks.network import Network
from ..presets import change, resolve
from ..sampling.model_directory import load_weights, read_cascade
from .field_checks import check_fields


def resolve_cascade(config: Config) -> Config:
    """The same configuration with its cascade in full, for the run directory to record.

    Stages of a model directory start from its weights unless train.stages names others. Raises ValueError for unknown
    presets, stages and keys, for a folder that is not a model directory, and as `check_data` and `check_fields` do.
    """
    ours = config.fastimagen
    given = ours.cascade
    stages = dict(ours.train.stages)
    if isinstance(given, CascadeChanges) and given.model is not None:
        cascade = change(read_cascade(given.model)[0], given.stages)
        for stage in cascade.stages:
            settings = stages.get(stage.name, StageTrainConfig())
            stages[stage.name] = settings.model_copy(update={"init_from": settings.init_from or given.model})
    else:
        cascade = resolve(given)
    ours = ours.model_copy(update={"cascade": cascade, "train": ours.train.model_copy(update={"stages": stages})})
    check_data(ours)
    reads_text = any(stage.unet.text_dim for stage in cascade.stages)
    is_preset = isinstance(given, str) or (isinstance(given, CascadeChanges) and given.preset is not None)
    if is_preset and reads_text:  # presets take the width of the text encoder
        ours = ours.model_copy(update={"cascade": resolve(given, text_dim=encoder_width(ours))})
    check_fields(ours)
    return config.model_copy(update={"fastimagen": ours})


def plan(config: Config, stage: str = "all") -> tuple[CascadeConfig, list[StageConfig]]:
    """The cascade of a configuration, and the stages to train: one by name, or "all".

    Raises ValueError as `resolve_cascade` does, for stages under train.stages that the cascade does not have, and for a
    first stage that enlarges images of unknown size.
    """
    ours = resolve_cascade(config).fastimagen
    cascade = ours.cascade
    assert isinstance(cascade, CascadeConfig)
    for name in ours.train.stages:
        try:
            cascade.stage(name)
        except ValueError as error:
            raise ValueError(f"fastimagen.train.stages: {error}") from None
    return cascade, list(cascade.stages) if stage == "all" else [cascade.stage(stage)]


def initial_unet(
    config: StageConfig, *, seed: int, init_from: str | None = None, lora: LoraConfig | None = None
) -> Network:
    """A U-Net with seeded random weights, the same on all ranks, or with the weights of an exported model.

    lora: freeze it, and add adapters with seeded random weights. Raises ValueError when the exported weights are of
    another architecture.
    """
    if init_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = build_network(config.unet)
    else:
        path = Path(init_from) / config.name / "model.safetensors"
        if not path.exists():
            raise ValueError(f"init_from {init_from}: there is no {path}")
        with torch.device("meta"):  # random weights would take as much memory again, and for billions of them minutes
            unet = build_network(config.unet)
        # Copies: what is read is the file itself, in memory, and must not change with it.
        weights = {name: weight.to(torch.float32, copy=True) for name, weight in read_safetensors(path).items()}
        load_weights(unet, weights, str(path), assign=True)
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(unet, lora)
    return unet
