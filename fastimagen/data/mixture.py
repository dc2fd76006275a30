"""The order of a mixture of data sets, a pure function of (seed, position) like that of one data set.

Every BLOCK positions have as many samples of each data set as its weight says, in random order. So the number of
earlier positions of a data set is known without a walk through them, and is the position in its own order: each data
set has its own epochs, and a checkpoint stores one number for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from ..seeds import mix_seed, random_bits
from .order import SOURCES, Order

BLOCK = 1024
"""Positions that are shuffled together. Counts at their ends follow the weights, to less than one for each data set."""


class Part(NamedTuple):
    """A data set of a mixture: name, weight, number of shards, and the factor on the loss of its samples."""

    name: str
    weight: float
    shards: int
    loss_weight: float = 1.0


class Mixture:
    """mixture[position] -> (shard, index) for any position >= 0, as Order; shards of all parts count through.

    sizes: number of samples of each shard, those of the first part first. Threads may share it. Raises ValueError if a
    part has no samples.
    """

    def __init__(self, parts: Sequence[Part], sizes: Sequence[int], seed: int) -> None:
        assert sum(part.shards for part in parts) == len(sizes), "the parts have other shards"
        self.parts, self.seed = list(parts), seed
        self.sizes = np.array(sizes, dtype=np.int64)
        self.total = int(self.sizes.sum())
        self._starts = np.cumsum([0, *(part.shards for part in parts)])  # of the shards of each part
        self._orders = []
        for number, part in enumerate(self.parts):
            own = self.sizes[self._starts[number] : self._starts[number + 1]].tolist()
            if not sum(own):
                raise ValueError(f"fastimagen.data.shards: {part.name} has no samples to train on: leave it out")
            self._orders.append(Order(own, mix_seed(seed, "source", number)))
        weights = [Fraction(str(part.weight)) for part in parts]
        self._shares = [weight / sum(weights[number:]) for number, weight in enumerate(weights)]  # of what is left
        self._block = lru_cache(maxsize=4)(self._draw)

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position {position} of the data order is negative")
        block, offset = divmod(int(position), BLOCK)
        numbers, positions = self._block(block)
        part = int(numbers[offset])
        shard, index = self._orders[part][int(positions[offset])]
        return int(self._starts[part]) + shard, index

    def ahead(self, position: int, count: int) -> list[int]:
        """As Order.ahead: the shards that the parts come to next, by turns, each part with its share of `count`."""
        block, offset = divmod(position, BLOCK)
        numbers, _ = self._block(block)
        counts = self._counts(block) + np.bincount(numbers[:offset], minlength=len(self.parts))  # (parts,)
        found = [
            [int(start) + shard for shard in order.ahead(int(own), -(-count // len(self.parts)))]
            for start, order, own in zip(self._starts, self._orders, counts)
        ]
        return [shard for turn in zip_longest(*found) for shard in turn if shard is not None]

    def part_of(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        return self.parts[int(np.searchsorted(self._starts, shard, side="right")) - 1]

    def epochs(self, position: int) -> dict[str, float]:
        """How often the samples of each part have been read at a position."""
        block, offset = divmod(position, BLOCK)
        numbers, _ = self._block(block)
        counts = self._counts(block) + np.bincount(numbers[:offset], minlength=len(self.parts))  # (parts,)
        return {part.name: count / order.total for part, count, order in zip(self.parts, counts, self._orders)}

    def _counts(self, block: int) -> np.ndarray:
        """The samples of each part before a block, (parts,). Every count rises with the block: of the samples that the
        parts before it leave, each part has its share, rounded down."""
        counts, left = [], block * BLOCK
        for share in self._shares:
            counts.append(left * share.numerator // share.denominator)  # exact: Python's integers do not round
            left -= counts[-1]
        return np.array(counts, dtype=np.int64)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each position of a block, and its position in the part's own order, as two arrays (BLOCK,)."""
        before, after = self._counts(block), self._counts(block + 1)
        numbers = np.repeat(np.arange(len(before)), after - before)  # (BLOCK,)
        numbers = numbers[np.argsort(random_bits(self.seed, SOURCES, (block, 0), BLOCK), kind="stable")]
        positions = np.empty(BLOCK, dtype=np.int64)
        for part, first in enumerate(before):
            own = numbers == part
            positions[own] = first + np.arange(own.sum())
        return numbers, positions
