"""Looking at a stage while it trains: validation loss and sample grids, both on EMA weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cascade import Stage
from ..config import Config
from ..data.source import Split
from ..images import grid
from ..networks.unet import UNet
from ..seeds import mix_seed
from .ema import EMA
from .engine import gather_fp32

CHUNK = 32  # validation samples that share a generator: the loss does not depend on processes or batch size


def ema_unet(stage: Stage, engine: Any, ema: EMA, device: torch.device) -> UNet:
    """A U-Net of its own with the EMA weights, in the dtype of the engine's. Every process calls it."""
    with ema.swapped():
        weights = gather_fp32(engine)
    with torch.device("meta"):
        unet = UNet(stage.config.unet)
    dtype = next(engine.module.parameters()).dtype
    unet.load_state_dict({name: weight.to(device, dtype) for name, weight in weights.items()}, assign=True)
    return unet.eval()


@torch.no_grad()
def validation_loss(stage: Stage, engine: Any, ema: EMA, split: Split, config: Config, device: torch.device) -> float:
    """Mean loss over the first validation samples: EMA weights, no caption dropout, the same times and noise always."""
    unet = ema_unet(stage, engine, ema, device)
    settings = config.fastimagen.train
    count = min(settings.validation_samples, len(split))
    total = torch.zeros((), dtype=torch.float64, device=device)
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    for index in range(dist.get_rank(), len(chunks), dist.get_world_size()):
        batch = split.fixed_batch(config.fastimagen, chunks[index], size=stage.config.size, crop=stage.config.crop)
        generator = torch.Generator(device).manual_seed(mix_seed(settings.seed, stage.name, "validation", index))
        text = batch.text.to(device=device) if stage.config.unet.text_dim else None
        loss = stage.training_loss(unet, batch.images.to(device), text, generator, drop_captions=False)
        total += loss.double().sum()
    dist.all_reduce(total)
    return total.item() / count


def sample_grid(
    stage: Stage, engine: Any, ema: EMA, split: Split, config: Config, device: torch.device, path: Path
) -> None:
    """Save a captioned grid of images of this stage for fixed captions and seeds.

    A super-resolution stage enlarges the reduced validation images, so that the grid shows this stage alone.
    """
    unet = ema_unet(stage, engine, ema, device)
    settings = config.fastimagen.train
    captions, text, images = split.examples(settings.sample_count, config.fastimagen, size=stage.config.size)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(captions), world))
    sampled: Tensor | None = None
    if mine:
        lowres = stage.shrink(images[mine]).to(device) if stage.config.unet.lowres else None
        texts = text[mine].to(device=device) if stage.config.unet.text_dim else None
        sampled = stage.sample(unet, texts, mine, lowres=lowres).cpu()  # (n, C, S, S)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (mine, sampled))
    if rank == 0:
        drawn = {index: image for indices, rows in parts if indices for index, image in zip(indices, rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(torch.stack([drawn[index] for index in range(len(captions))]), captions).save(path)
