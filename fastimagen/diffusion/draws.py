"""What is random in training. All of it is a function of (seed, stage, position of the sample), not of ranks or
batches.

One hash per sample gives its time, augmentation level and caption dropout, and the seed of its noise. The hash runs on
the CPU; noise is drawn on the images' device, by a generator that is reseeded for each sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of B samples: three uniform ones in [0, 1), and standard normal noise like their images."""

    time: Tensor
    """(B,) float64: becomes the diffusion time."""
    level: Tensor
    """(B,) float64: becomes the augmentation level of the low-resolution image."""
    caption: Tensor
    """(B,) float64: a caption is dropped if it is below the dropout probability."""
    noise: Tensor
    """(B, C, H, W)."""
    lowres_noise: Tensor | None
    """(B, C, H, W), for the low-resolution image of a super-resolution stage."""


def draw(seed: int, stage: str, positions: Iterable[int], images: Tensor, *, lowres: bool) -> Draws:
    """The random numbers of the samples at `positions`, whose images are (B, C, H, W); row i depends on
    (seed, stage, positions[i]) only.

    The CPU's generator uses 32 bits of a sample's seed, so that two samples there share their noise with probability
    2^-32; that of CUDA uses 63.
    """
    digests = [blake2b(f"{seed}/{stage}/{position}".encode(), digest_size=32).digest() for position in positions]
    bits = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 4)  # (B, 4)
    assert len(bits) == len(images), "one position per image"
    uniforms = torch.from_numpy((bits[:, :3] >> 11) * 2.0**-53).T.contiguous()  # (3, B) float64
    if images.device.type == "cuda":
        uniforms = uniforms.pin_memory()
    time, level, caption = uniforms.to(images.device, non_blocking=True)

    noise = torch.empty_like(images, memory_format=torch.contiguous_format)  # (B, C, H, W)
    lowres_noise = torch.empty_like(noise) if lowres else None
    generator = torch.Generator(images.device)
    for row, sample_seed in enumerate((bits[:, 3] >> 1).tolist()):
        generator.manual_seed(sample_seed)
        noise[row].normal_(generator=generator)
        if lowres_noise is not None:
            lowres_noise[row].normal_(generator=generator)
    return Draws(time, level, caption, noise, lowres_noise)
