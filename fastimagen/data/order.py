"""The order of the data, a pure function of (seed, epoch, position): a checkpoint stores one number to resume.

Every epoch permutes the shards, groups them into blocks of a few shards, and permutes the samples within each block. So
a position is found without computing the whole order, and reading opens few shards at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..seeds import random_bits

SHARDS, SAMPLES, CROPS, CAPTIONS, FLIPS, SOURCES, BUCKETS = range(7)
"""Streams of random numbers, independent of each other."""


class Order:
    """order[position] -> (shard, index) for any position >= 0; position // total is the epoch.

    sizes: number of samples of each shard; block: number of shards whose samples are mixed. Each epoch contains every
    sample once. Threads may share an Order. Raises ValueError if there are no samples.
    """

    def __init__(self, sizes: Sequence[int], seed: int, block: int = 4) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self.total = int(self.sizes.sum())
        if not self.total or self.sizes.min() < 0 or block < 1:
            raise ValueError(
                f"a data order needs samples and a block of at least 1: got {self.total} samples in "
                f"{len(self.sizes)} shards, block {block}"
            )
        self.seed = seed
        self.block = block
        self._shards = lru_cache(maxsize=2)(self._permute_shards)
        self._samples = lru_cache(maxsize=4)(self._permute_samples)

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position {position} of the data order is negative")
        epoch, offset_in_epoch = divmod(int(position), self.total)
        _, starts = self._shards(epoch)
        block = int(np.searchsorted(starts, offset_in_epoch, side="right")) - 1
        shards, indices = self._samples(epoch, block)
        offset = offset_in_epoch - int(starts[block])
        return int(shards[offset]), int(indices[offset])

    def after(self, position: int, count: int) -> tuple[int, int]:
        """The sample `count` positions after this one, which may replace that of this position."""
        return self[position + count]

    def ahead(self, position: int, count: int) -> list[int]:
        """The shards of the block that a position is in, and of the blocks after it: at least `count`, unless there are
        fewer. In the order in which they are needed."""
        epoch, offset_in_epoch = divmod(position, self.total)
        block = int(np.searchsorted(self._shards(epoch)[1], offset_in_epoch, side="right")) - 1
        found: dict[int, None] = {}  # a set that keeps its order
        while len(found) < min(count, len(self.sizes)):
            shards = self._shards(epoch)[0][block * self.block : (block + 1) * self.block]
            if not len(shards):
                epoch, block = epoch + 1, 0
                continue
            found.update(dict.fromkeys(shards.tolist()))
            block += 1
        return list(found)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position in the epoch at which each block starts."""
        shards = np.argsort(random_bits(self.seed, SHARDS, (epoch, 0), len(self.sizes)), kind="stable")
        ends = np.cumsum(self.sizes[shards])
        return shards, np.concatenate([[0], ends[self.block - 1 : -1 : self.block]])  # (shards,), (blocks,)

    def _permute_samples(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index) of each sample of a block in order, as two arrays."""
        shards = self._shards(epoch)[0][block * self.block : (block + 1) * self.block]
        owners = np.repeat(shards, self.sizes[shards])
        indices = np.concatenate([np.arange(size) for size in self.sizes[shards]])  # (samples of the block,)
        order = np.argsort(random_bits(self.seed, SAMPLES, (epoch, block), len(owners)), kind="stable")
        return owners[order], indices[order]
