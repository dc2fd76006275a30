"""Validation loss and preview grids of a stage in training, both with EMA weights.

Both may last long. A request to stop ends them between two batches or sampling steps, on all ranks at the same point;
the next start does them again, from the checkpoint of the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..cascade import Stage
from ..config import Config, SamplingConfig, StageConfig, StageTrainConfig
from ..data.buckets import bucket_sizes
from ..data.source import Split
from ..files import atomic_file, first_line
from ..images import grid
from ..network_config import LoraConfig
from ..networks.build import build_network
from ..networks.network import Network
from ..seeds import mix_seed
from ..sizes import ImageSize
from .ema import EMA
from .flat_weights import FlatWeights
from .metrics import Metrics
from .objective import Objective
from .phases import Phases
from .preemption import StopRequest

Part = Literal["validation", "samples"]  # their phases

CHUNK_SIZE = 32  # validation samples per batch
MAX_PREVIEW_STEPS = 32
"""Sampling steps of a preview grid. With 1000 DDPM steps, 16 guided images would cost as much as 333 training steps of
32 images. All samplers respace to fewer steps; `fastimagen sample` takes the stage's own number."""


class Stopped(Exception):
    """A request to stop in the middle of a validation or a preview grid. Its text is the reason."""


class Validated(NamedTuple):
    """What has become of the validation and the preview grid of a step."""

    val_loss: float | None = None
    unfinished: Sequence[Part] = ()
    """What a request to stop has left to do."""
    reason: str | None = None
    """Why training stops; the same on all ranks."""


class Validator:
    """Validates one stage in training and samples its preview grids.

    objective_at: the loss by step. data: training and validation samples. folder: for the grids.
    """

    def __init__(
        self,
        config: Config,
        stage: Stage,
        objective_at: Callable[[int], Objective],
        data: tuple[Split, Split | None],
        folder: Path,
        *,
        metrics: Metrics,
        phases: Phases,
        stop: StopRequest,
    ) -> None:
        self.config, self.stage, self.folder = config, stage, folder
        self.objective_at = objective_at
        self.training_data, self.validation_data = data
        self.metrics, self.phases, self.stop = metrics, phases, stop
        self._lora = config.fastimagen.train.stages.get(stage.name, StageTrainConfig()).lora

    def run(self, step: int, parts: Sequence[Part], weights: FlatWeights, ema: EMA, dtype: torch.dtype) -> Validated:
        """Do these parts, validation first. All ranks call it.

        dtype: of the network. Parts without data are left out.
        """
        parts = [part for part in parts if part == "samples" or self.validation_data]
        if not parts:
            return Validated()
        self.phases.enter(parts[0])
        unet, val_loss = ema_unet(self.stage, weights, ema, dtype, self._lora), None
        for index, part in enumerate(parts):
            self.phases.enter(part)
            try:
                if part == "validation":
                    val_loss = self._validate(step, unet)
                else:
                    self._sample(step, unet)
            except Stopped as stopped:
                return Validated(val_loss, parts[index:], str(stopped))
        return Validated(val_loss)

    def _validate(self, step: int, unet: Network) -> float:
        assert self.validation_data is not None
        objective = self.objective_at(step)
        val_loss = validation_loss(self.stage, objective, unet, self.validation_data, self.config, self._check)
        self.metrics.write(step, val_loss=val_loss)
        return val_loss

    def _sample(self, step: int, unet: Network) -> None:
        path = self.folder / f"step-{step:08d}.png"
        data = self.validation_data or self.training_data
        problem = sample_grid(self.stage, unet, data, self.config, path, self._check)
        self.metrics.say(problem) if problem else self.metrics.show_grid(step, path)

    def _check(self) -> None:
        """Raise Stopped on all ranks if any of them is to stop."""
        if reason := self.stop.should_stop_now():
            raise Stopped(reason)


def ema_unet(
    stage: Stage, weights: FlatWeights, ema: EMA, dtype: torch.dtype, lora: LoraConfig | None = None
) -> Network:
    """A separate U-Net with the EMA weights in `dtype`. All ranks call it. Valid until the next training step.

    lora: its adapters, of which these are the averages; the network under them is the engine's."""
    with torch.device("meta"):
        unet = build_network(stage.config.unet, lora)
    unet.load_state_dict(weights.all_gather(ema.average, dtype), assign=True)
    return unet.eval()


@torch.no_grad()
def validation_loss(
    stage: Stage,
    objective: Objective,
    unet: Network,
    split: Split,
    config: Config,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss of the first validation samples, without caption dropout, with the same times and noise every time.

    All ranks call it. check: called before every batch, as often on all ranks; what it raises ends the validation."""
    device = next(unet.parameters()).device
    settings = config.fastimagen.train
    count = len(split) if settings.validation_samples == "all" else min(settings.validation_samples, len(split))
    total = torch.zeros((), dtype=torch.float64, device=device)
    buckets = bucket_sizes(config.fastimagen, stage.config)
    chunks = split.in_chunks(count, CHUNK_SIZE, buckets)
    for first in range(0, len(chunks), dist.get_world_size()):
        check()
        index = first + dist.get_rank()
        if index >= len(chunks):
            continue
        indices, bucket = chunks[index]
        size = buckets[bucket] if buckets else stage.config.size
        batch = split.fixed_batch(config.fastimagen, indices, size=size, crop=stage.config.crop)
        images, text = batch.images_for(device), batch.text_for(stage.config.unet, device)
        draws = stage.draw(mix_seed(settings.seed, "validation"), indices, images)
        loss = objective.training_loss(unet, images, text, draws, drop_captions=False)
        total += loss.double().sum()
    dist.all_reduce(total)
    return total.item() / count


def preview_sampling(stage: StageConfig) -> SamplingConfig:
    """The stage's sampling settings with at most MAX_PREVIEW_STEPS steps."""
    return stage.sampling.model_copy(update={"steps": min(stage.sampling.steps, MAX_PREVIEW_STEPS)})


def sample_grid(
    stage: Stage, unet: Network, split: Split, config: Config, path: Path, check: Callable[[], None] = lambda: None
) -> str | None:
    """Save a captioned grid of images of this stage for fixed captions and seeds, of the size of the first bucket if
    there are some. All ranks call it.

    check: called after every sampling step, as often on all ranks; what it raises ends the sampling. Returns a line on
    rank 0 if the grid could not be saved: a full disk does not end training.

    A super-resolution stage enlarges validation images that were reduced to the size of the stage below, so that the
    grid shows this stage only."""
    device = next(unet.parameters()).device
    settings = config.fastimagen.train
    size = next(iter(bucket_sizes(config.fastimagen, stage.config)), ImageSize.of(stage.config.size))
    captions, text, images = split.examples(settings.sample_count, config.fastimagen, size=size)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = list(range(rank, len(captions), world_size))
    sampled: Tensor | None = None
    sampling = preview_sampling(stage.config)
    check()
    if own:
        lowres = stage.shrink(images[own]).to(device) if stage.config.unet.lowres else None
        own_text = None
        if stage.config.unet.text_dim is not None:
            assert text is not None
            own_text = text[own].to(device=device)
        sampled = stage.sample(
            unet, own_text, own, size=size, lowres=lowres, sampling=sampling, callback=lambda *_: check()
        ).cpu()  # (n, C, H, W)
    else:
        for _ in range(sampling.steps):
            check()
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, (own, sampled))
    if rank == 0:
        by_index: dict[int, Tensor] = {}
        for indices, rows in parts:
            if indices:
                by_index |= zip(indices, rows)
        ordered = torch.stack([by_index[index] for index in range(len(captions))])  # (B, C, H, W)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                grid(ordered, captions).save(temporary, format="PNG")
        except OSError as error:
            return f"cannot save the preview grid {path}: {first_line(error)}"
    return None
