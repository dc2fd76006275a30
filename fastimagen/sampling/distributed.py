"""Sampling shared by several processes, as `torchrun` or `deepspeed` starts them: every one draws each n-th picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..images import to_uint8
from ..text.embeddings import TextEmbeddings
from .output import Output
from .pipeline import ImagenPipeline


def processes() -> tuple[int, int]:
    """(rank, number of processes) by the launcher's environment; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def draw_shared(
    pipe: ImagenPipeline,
    captions: Sequence[str] | None,
    *,
    seeds: Sequence[int],
    text: TextEmbeddings | None = None,
    **options: Any,
) -> Output | None:
    """`pipe(captions, text=text, seeds=seeds, **options)`, every process its share; the first gets all pictures, as
    8 bits a channel hold them, and the others None.

    A picture depends on its caption and seed, so how many processes share the work does not show in it. Pictures,
    low-resolution pictures and negative captions in `options` are one for all. Raises what `pipe` raises, in the
    process that meets it; the launcher ends the others.
    """
    rank, world = processes()
    if world == 1:
        return pipe(captions, text=text, seeds=seeds, **options)
    mine = list(range(rank, len(seeds), world))
    dist.init_process_group("gloo")  # nothing but finished pictures travels
    try:
        output = None
        if mine:
            output = pipe(
                captions and [captions[i] for i in mine],
                text=None if text is None else text[mine],
                seeds=[seeds[i] for i in mine],
                **options,
            )
        pixels = None if output is None else to_uint8(output.images)  # (n, H, W, 3)
        shares: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object((mine, pixels), shares)
    finally:
        dist.destroy_process_group()
    if rank != 0:
        return None
    rows = {index: row for indices, part in shares if indices for index, row in zip(indices, part)}
    images = torch.stack([rows[index] for index in range(len(seeds))]).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, H, W)
    return Output(images, list(captions or [""] * len(seeds)), list(seeds), output.settings)
