"""Rules between the configuration of the stages, the data and the text encoder, checked before anything runs.

config_rules.py has the rules within the stages; these here need torch or files. What they accept, trains.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..cascade import Stage
from ..config import CascadeConfig, FastimagenConfig, StageConfig, StageTrainConfig, TrainConfig
from ..config_rules import MIN_LPIPS
from ..data.buckets import bucket_sizes
from ..data.prepare import encoder_width
from ..data.source import uses_text
from ..networks.build import build_network
from ..sampling.model_directory import check_shapes, read_shapes
from .adapters import check_adapters
from .distillation import check_distillation
from .length import has_own_length
from .perceptual import check_perceptual


def check_fields(config: FastimagenConfig) -> None:
    """Raise ValueError, with one line that names the key, for stages that the rest of the configuration contradicts.

    The cascade must be resolved.
    """
    cascade = config.cascade
    assert isinstance(cascade, CascadeConfig)
    first = cascade.stages[0]
    if first.unet.lowres and first.lowres_size is None:
        raise ValueError(
            f'stage "{first.name}" enlarges images, but no stage is below it: set its "lowres_size" to the size of the '
            f"images that it will get"
        )
    _check_data(config, cascade)
    _check_buckets(config, cascade)
    _check_length(config.train, cascade)
    if uses_text(config):
        _check_text(config, cascade)
    if config.train.distill is not None:
        check_distillation(cascade, config.train.distill)
    for stage in cascade.stages:
        if hasattr(nn.ModuleDict, stage.name):  # Cascade keeps its U-Nets in one
            raise ValueError(f'stage "{stage.name}": choose another name, because torch.nn.ModuleDict has {stage.name}')
        try:
            Stage(stage, cascade.below(stage.name))  # raises for noise schedules that are out of reach
        except ValueError as error:
            raise ValueError(f'stage "{stage.name}": {error}') from None
        if stage.objective.perceptual is not None:
            try:
                check_perceptual(stage.objective.perceptual)
            except ValueError as error:
                raise ValueError(f'stage "{stage.name}": {error}') from None
        settings = config.train.stages.get(stage.name, StageTrainConfig())
        if settings.init_from is not None:
            _check_initial_weights(stage, settings.init_from)
        check_adapters(stage, settings, distilled=config.train.distill is not None)


def _check_text(config: FastimagenConfig, cascade: CascadeConfig) -> None:
    """The width of the embeddings and the length of captions fit the U-Nets."""
    width = encoder_width(config)
    for stage in cascade.stages:
        unet = stage.unet
        if unet.text_dim is None:
            continue
        if unet.text_dim != width:
            raise ValueError(
                f'stage "{stage.name}": unet.text_dim is {unet.text_dim}, but the embeddings of '
                f"fastimagen.text.encoder {config.text.encoder} have width {width}: set one to fit the other"
            )
        if not unet.has_null_text and (config.text.encoding, config.text.max_length) != ("if", unet.max_text_length):
            raise ValueError(
                f'stage "{stage.name}": its network reads {unet.max_text_length} tokens, padding included: set '
                f'fastimagen.text.encoding to "if" and fastimagen.text.max_length to {unet.max_text_length}'
            )
        if config.text.max_length > unet.max_text_length:
            raise ValueError(
                f'stage "{stage.name}": unet.max_text_length is {unet.max_text_length}, but '
                f"fastimagen.text.max_length lets captions have {config.text.max_length} tokens: lower that"
            )


def _check_data(config: FastimagenConfig, cascade: CascadeConfig) -> None:
    """The built-in shapes are rendered in the size of the largest stage, or larger."""
    shapes, largest = config.data.shapes, cascade.stages[-1]
    if shapes is not None and shapes.size < largest.size:
        raise ValueError(
            f'fastimagen.data.shapes.size {shapes.size} is smaller than stage "{largest.name}": set it to '
            f"{largest.size}, in another folder than smaller shapes"
        )


def _check_buckets(config: FastimagenConfig, cascade: CascadeConfig) -> None:
    """Every stage can have images of the sizes of all buckets."""
    for stage in cascade.stages:
        below = cascade.below(stage.name)
        lowres_size = stage.lowres_size if below is None else below.size
        for size, text in zip(bucket_sizes(config, stage), config.data.buckets):
            label = f'fastimagen.data.buckets: {text}: stage "{stage.name}"'
            if stage.crop is not None and stage.crop > min(size):
                raise ValueError(f"{label} has images of {size}, and cannot take crops of {stage.crop} pixels of them")
            if lowres_size is not None:
                try:
                    size.scaled(lowres_size, stage.size)
                except ValueError as error:
                    raise ValueError(f"{label}: {error}") from None
            perceptual = stage.objective.perceptual
            if stage.crop is not None or perceptual is None:
                continue
            if perceptual.dino is not None and size.height != size.width:
                raise ValueError(f"{label}: objective.perceptual.dino compares squares: train on crops, or remove it")
            if perceptual.lpips is not None and min(size) < MIN_LPIPS:
                raise ValueError(f"{label} has {size}, but objective.perceptual.lpips needs {MIN_LPIPS} pixels or more")


def _check_length(train: TrainConfig, cascade: CascadeConfig) -> None:
    """A length for all stages is the length of at least one."""
    names = [stage.name for stage in cascade.stages]
    for key in ("steps", "epochs"):
        value = getattr(train, key)
        if value is not None and all(has_own_length(train, name) for name in names):
            own = ", ".join(f"train.stages.{name}" for name in names)
            raise ValueError(
                f"fastimagen.train.{key} {value:g} has no effect, because every stage has a length of its own: remove "
                f"it, or change steps or epochs in {own}"
            )


def _check_initial_weights(stage: StageConfig, model: str) -> None:
    """The model directory has weights of this stage, with the shapes of its U-Net."""
    path = Path(model) / stage.name / "model.safetensors"
    if not path.exists():
        raise ValueError(f"init_from {model}: there is no {path}")
    with torch.device("meta"):
        unet = build_network(stage.unet)
    check_shapes(unet, read_shapes(path), str(path))
