"""Sampling in several processes, as `torchrun` or `deepspeed` starts them: each takes every n-th image."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..cascade import Callback
from ..images import to_uint8
from .output import Output
from .pipeline import ImagenPipeline
from .request import SamplingRequest

Share = tuple[list[int], Tensor | None, list[str]]
"""Image numbers of one rank, their pixels (n, H, W, C) uint8 (None if the rank has no image), its warnings."""


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes) from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sample_distributed(
    pipe: ImagenPipeline, request: SamplingRequest, *, batch_size: int = 32, callback: Callback | None = None
) -> Output | None:
    """`pipe.sample(request)` split over the processes. Rank 0 returns all images, the other ranks None.

    The images are those of a single process, rounded to 8 bits per channel. Raises what `pipe.sample` raises, in the
    process where it happens; the launcher then ends the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return pipe.sample(request, batch_size=batch_size, callback=callback)
    numbers = list(range(rank, len(request), world_size))
    share: Share = ([], None, [])
    dist.init_process_group("gloo")  # only finished images travel
    try:
        if numbers:
            output = pipe.sample(request[numbers], batch_size=batch_size, callback=callback)
            share = (numbers, to_uint8(output.images), output.warnings)
        shares: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(share, shares)
        dist.barrier()  # no rank closes its connections while another one still reads
    finally:
        dist.destroy_process_group()
    return None if shares is None else _merge(pipe, request, shares)


def exit_process() -> NoReturn:
    """End this process of a launcher with status 0, without the interpreter's shutdown. Call it after the last work.

    The shutdown aborts in rare runs while threads of gloo are still alive ("terminate called without an active
    exception", seen with torch 2.13). The launcher would then end the other processes, rank 0 in the middle of saving.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _merge(pipe: ImagenPipeline, request: SamplingRequest, shares: list[Share]) -> Output:
    """One output from the shares of all ranks."""
    pixels: dict[int, Tensor] = {}
    warnings: dict[str, None] = {}  # an ordered set: all ranks have the same negative captions
    for numbers, share_pixels, share_warnings in shares:
        if share_pixels is not None:
            pixels |= zip(numbers, share_pixels)
        warnings |= dict.fromkeys(share_warnings)
    images = torch.stack([pixels[number] for number in range(len(request))])  # (B, H, W, C)
    images = images.permute(0, 3, 1, 2) / 127.5 - 1  # (B, C, H, W)
    return Output(images, request.labels, list(request.seeds), pipe.record(request), list(warnings))
