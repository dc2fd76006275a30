"""From seeds to random numbers."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def image_noise(seeds: list[int], shape: tuple[int, ...], *, stage: str, step: int, device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape) fp32, row i a function of (seeds[i], stage, step) alone.

    Made on the CPU, so that an image's noise has the same bits in every batch, order, process and device. The
    CPU's generator uses 32 bits of the seed: two draws share their noise with chance 2^-32.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(mix_seed(seed, stage, step))) for seed in seeds]
    noise = torch.stack(rows)  # (B, *shape)
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed from several numbers and names; neighbouring inputs give unrelated seeds."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1
