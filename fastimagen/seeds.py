"""Every derivation of random numbers from a seed, so that results depend on seeds and positions, never on processes.

Three generators, for three needs: torch's, seeded through a hash, for noise and weights; raw Philox output, which NumPy
keeps stable between versions, for the order of the data; NumPy's Generator for the built-in shapes.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed for torch from several numbers and names; similar inputs give unrelated seeds."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


def image_noise(seeds: list[int], shape: tuple[int, ...], *, stage: str, step: int, device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape) fp32; row i depends on (seeds[i], stage, step) only.

    Drawn on the CPU, so that the noise of an image has the same bits in every batch, order, process and on every
    device. The CPU generator uses 32 bits of the seed: two draws are equal with probability 2^-32."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(mix_seed(seed, stage, step))) for seed in seeds]
    noise = torch.stack(rows)  # (B, *shape)
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)


def random_bits(seed: int, stream: int, position: tuple[int, int], count: int) -> np.ndarray:
    """`count` random uint64 that depend on seed, stream and position only (Philox, Salmon et al. 2011).

    Raw output of the generator: NumPy guarantees that it never changes, but not its permutations.
    """
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, stream], dtype=np.uint64)
    counter = np.array([0, 0, *position], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def numpy_generator(*key: int) -> np.random.Generator:
    """A NumPy generator for a tuple of non-negative numbers, for distributions that raw bits do not give."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
