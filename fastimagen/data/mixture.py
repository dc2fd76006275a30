"""The order of a mixture of data sets, a pure function of (seed, position) like that of one data set.

The data sets are interleaved (interleaving.py). How often each one came before a position is the position in its own
order: each has its own epochs, and a checkpoint stores one number for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from ..seeds import mix_seed
from .interleaving import Interleaving
from .order import SOURCES, Order


class Part(NamedTuple):
    """A data set of a mixture: name, weight, number of shards, and the factor on the loss of its samples."""

    name: str
    weight: float | Fraction
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
        self._interleaving = Interleaving([Fraction(str(part.weight)) for part in parts], seed, SOURCES)

    def __getitem__(self, position: int) -> tuple[int, int]:
        part, own = self._interleaving[position]
        shard, index = self._orders[part][own]
        return int(self._starts[part]) + shard, index

    def after(self, position: int, count: int) -> tuple[int, int]:
        """As Order.after."""
        return self[position + count]

    def ahead(self, position: int, count: int) -> list[int]:
        """As Order.ahead: the shards that the parts come to next, interleaved, each part with its share of `count`."""
        found = [
            [int(start) + shard for shard in order.ahead(int(own), -(-count // len(self.parts)))]
            for start, order, own in zip(self._starts, self._orders, self._interleaving.counts(position))
        ]
        return [shard for turn in zip_longest(*found) for shard in turn if shard is not None]

    def part_of(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        return self.parts[int(np.searchsorted(self._starts, shard, side="right")) - 1]

    def read(self, position: int) -> dict[str, int]:
        """How many samples of each part come before a position."""
        return {part.name: int(count) for part, count in zip(self.parts, self._interleaving.counts(position))}

    def epochs(self, position: int) -> dict[str, float]:
        """How often the samples of each part have been read at a position."""
        return {name: count / order.total for (name, count), order in zip(self.read(position).items(), self._orders)}
