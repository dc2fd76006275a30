"""The order of the data as a pure function of (seed, epoch, position): a number is all it takes to resume.

Every epoch permutes the shards, takes them in blocks of a few, and permutes the samples inside each block. So
any position is found without making the whole order, and reading touches few shards at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SHARDS, SAMPLES, CROPS = range(3)
"""Independent streams of random numbers."""


def random_bits(seed: int, stream: int, place: tuple[int, int], count: int) -> np.ndarray:
    """`count` random uint64 that depend on seed, stream and place alone (Philox, Salmon et al. 2011).

    Raw output of the generator: numpy promises that it stays the same, and not so for its permutations.
    """
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, stream], dtype=np.uint64)
    counter = np.array([0, 0, *place], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


class Order:
    """order[position] -> (shard, index) for any position >= 0; position // total is the epoch.

    sizes: samples of each shard; block: shards whose samples are mixed. Each epoch holds every sample once.
    Threads may share it. Raises ValueError if there are no samples.
    """

    def __init__(self, sizes: Sequence[int], seed: int, block: int = 4) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self.total = int(self.sizes.sum())
        if not self.total or self.sizes.min() < 0 or block < 1:
            raise ValueError(f"no order of {self.total} samples in {len(self.sizes)} shards, {block} a block")
        self.seed = seed
        self.block = block
        self._shards = lru_cache(maxsize=2)(self._permute_shards)
        self._samples = lru_cache(maxsize=4)(self._permute_samples)

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position {position} of the data order")
        epoch, place = divmod(int(position), self.total)
        _, starts = self._shards(epoch)
        block = int(np.searchsorted(starts, place, side="right")) - 1
        shards, indices = self._samples(epoch, block)
        offset = place - int(starts[block])
        return int(shards[offset]), int(indices[offset])

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position in the epoch at which each block starts."""
        shards = np.argsort(random_bits(self.seed, SHARDS, (epoch, 0), len(self.sizes)), kind="stable")
        ends = np.cumsum(self.sizes[shards])
        return shards, np.concatenate([[0], ends[self.block - 1 : -1 : self.block]])

    def _permute_samples(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index) of each sample of a block in order, as two arrays."""
        shards = self._shards(epoch)[0][block * self.block : (block + 1) * self.block]
        owners = np.repeat(shards, self.sizes[shards])
        indices = np.concatenate([np.arange(size) for size in self.sizes[shards]])
        order = np.argsort(random_bits(self.seed, SAMPLES, (epoch, block), len(owners)), kind="stable")
        return owners[order], indices[order]
