"""The order of images that are not square: whole batches of one bucket, a pure function of (seed, position).

A bucket is a size, with the images whose aspect ratio is nearest to its own. The buckets are interleaved batch by batch
(interleaving.py), in proportion to their images; within a bucket the order is that of its images alone. So the end of
an epoch leaves no incomplete batches: a batch is filled with images of its bucket's next epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from ..config import CascadeConfig, FastimagenConfig, StageConfig
from ..config_rules import sizes_of_stages
from ..seeds import mix_seed
from ..sizes import ImageSize
from ..words import counted
from .interleaving import BLOCK, Interleaving
from .mixture import Mixture, Part
from .order import BUCKETS, Order


class Sized(Protocol):
    """The part of a shard that this module uses."""

    @property
    def image_sizes(self) -> np.ndarray: ...


def bucket_sizes(config: FastimagenConfig, stage: StageConfig) -> list[ImageSize]:
    """The sizes of data.buckets for a stage of the cascade, which must be resolved; none without buckets.

    Raises ValueError for sizes that the stage cannot have.
    """
    if not config.data.buckets:
        return []
    assert isinstance(config.cascade, CascadeConfig)
    first = config.cascade.stages[0].size
    return [
        sizes_of_stages([stage], ImageSize.parse(text), of=first, key=f"fastimagen.data.buckets: {text}")[stage.name]
        for text in config.data.buckets
    ]


def bucket_numbers(image_sizes: np.ndarray, buckets: Sequence[ImageSize]) -> np.ndarray:
    """The bucket with the nearest aspect ratio, in logarithms, for images (S, 2) of width and height: (S,).

    What is not an image, of size 0, counts as square; training replaces it when it is read.
    """
    width, height = np.maximum(image_sizes, 1).astype(np.float64).T  # (S,) each
    logarithms = np.log([bucket.width / bucket.height for bucket in buckets])  # (buckets,)
    ranked = np.argsort(logarithms, kind="stable")
    borders = (logarithms[ranked][1:] + logarithms[ranked][:-1]) / 2
    return ranked[np.searchsorted(borders, np.log(width / height))]


class BucketOrder:
    """order[position] -> (shard, index) for any position >= 0, as Order; a batch of positions has one bucket.

    buckets: their sizes. batch: positions from multiples of it on that have the same bucket. parts: the data sets of a
    mixture, each of which keeps its share of the samples. Threads may share it. Raises ValueError if there are no
    samples, and if a part has none.
    """

    def __init__(
        self, shards: Sequence[Sized], buckets: Sequence[ImageSize], batch: int, seed: int, parts: Sequence[Part] = ()
    ) -> None:
        self.shards, self.buckets, self.batch, self.parts = shards, buckets, batch, list(parts)
        numbers = [np.bincount(bucket_numbers(shard.image_sizes, buckets), minlength=len(buckets)) for shard in shards]
        self.counts = np.array(numbers, dtype=np.int64).reshape(-1, len(buckets))  # (shards, buckets)
        self.sizes = self.counts.sum(axis=1)  # (shards,)
        whole = Mixture(parts, self.sizes.tolist(), seed) if parts else Order(self.sizes.tolist(), seed)
        self.total, self._whole = whole.total, whole
        self._used = [number for number in range(len(buckets)) if self.counts[:, number].any()]
        # One seed for all: at about the same time they come to the same shards.
        orders = [self._order(self.counts[:, number], seed) for number in self._used]
        self._orders = [order for order, _, _ in orders]
        self._kept = [kept for _, kept, _ in orders]
        block = min(BLOCK, max(1, self.total // batch))  # at the end of a first epoch each has had its batches
        self._interleaving = Interleaving(
            [weight for _, _, weight in orders], mix_seed(seed, "buckets"), BUCKETS, block
        )
        self._indices = lru_cache(maxsize=64)(self._find_indices)

    def __getitem__(self, position: int) -> tuple[int, int]:
        return self.after(position, 0)

    def after(self, position: int, count: int) -> tuple[int, int]:
        """The sample that comes `count` positions after this one in the order of its bucket."""
        which, own = self._own(position)
        kept, nth = self._orders[which][own + count]
        shard = int(self._kept[which][kept])
        return shard, int(self._indices(shard)[self._used[which]][nth])

    def bucket(self, position: int) -> int:
        """The number of the bucket that the sample of a position is in."""
        return self._used[self._own(position)[0]]

    def first_batches(self) -> list[int]:
        """The position of the first batch of each bucket that has samples."""
        found: dict[int, int] = {}
        batch = 0
        while len(found) < len(self._used):
            found.setdefault(self._interleaving[batch][0], batch * self.batch)
            batch += 1
        return list(found.values())

    def ahead(self, position: int, count: int) -> list[int]:
        """As Order.ahead: the shards that the buckets come to next."""
        counts = self._interleaving.counts(position // self.batch)
        found = [
            self._kept[which][order.ahead(int(counts[which]) * self.batch, count)].tolist()
            for which, order in enumerate(self._orders)
        ]
        most = max(map(len, found))
        return list(dict.fromkeys(own[number] for number in range(most) for own in found if number < len(own)))

    def describe(self) -> list[str]:
        """A line about the samples of each bucket, and one for each that has fewer than a batch."""
        samples = self.counts.sum(axis=0).tolist()  # (buckets,)
        listed = ", ".join(f"{size} {count} ({count / self.total:.1%})" for size, count in zip(self.buckets, samples))
        return [f"samples of buckets: {listed}"] + [
            f"bucket {size} has {counted(count, 'sample')}, fewer than a batch of {self.batch}: its batches repeat them"
            for size, count in zip(self.buckets, samples)
            if 0 < count < self.batch
        ]

    def part_of(self, shard: int) -> Part:
        """As Mixture.part_of."""
        assert isinstance(self._whole, Mixture)
        return self._whole.part_of(shard)

    def epochs(self, position: int) -> dict[str, float]:
        """As Mixture.epochs."""
        assert isinstance(self._whole, Mixture)
        batch, offset = divmod(position, self.batch)
        current = self._interleaving[batch][0]
        read = dict.fromkeys((part.name for part in self.parts), 0)
        for which, order in enumerate(self._orders):
            assert isinstance(order, Mixture)
            own = int(self._interleaving.counts(batch)[which]) * self.batch + (offset if which == current else 0)
            for name, count in order.read(own).items():
                read[name] += count
        ends = np.cumsum([0, *(part.shards for part in self.parts)])
        totals = [int(self.sizes[start:end].sum()) for start, end in pairwise(ends)]
        return {name: count / total for (name, count), total in zip(read.items(), totals)}

    def _own(self, position: int) -> tuple[int, int]:
        """(which of the used buckets, position in its own order)."""
        batch, offset = divmod(int(position), self.batch)
        which, own_batch = self._interleaving[batch]
        return which, own_batch * self.batch + offset

    def _order(self, counts: np.ndarray, seed: int) -> tuple[Order | Mixture, np.ndarray, Fraction]:
        """The order of a bucket with these counts (shards,), the shards that it has, and its weight."""
        if not self.parts:
            return Order(counts.tolist(), seed), np.arange(len(counts)), Fraction(int(counts.sum()))
        parts: list[Part] = []
        kept: list[int] = []
        start = 0
        for part in self.parts:
            own = slice(start, start := start + part.shards)
            samples, total = int(counts[own].sum()), int(self.sizes[own].sum())
            if samples:  # of the samples of this part, this bucket has its share
                parts.append(part._replace(weight=Fraction(str(part.weight)) * Fraction(samples, total)))
                kept += range(own.start, own.stop)
        order = Mixture(parts, counts[kept].tolist(), seed)
        return order, np.array(kept), sum((Fraction(part.weight) for part in parts), Fraction(0))

    def _find_indices(self, shard: int) -> list[np.ndarray]:
        """For each bucket the indices of its samples in a shard."""
        numbers = bucket_numbers(self.shards[shard].image_sizes, self.buckets)
        return [np.flatnonzero(numbers == number) for number in range(len(self.buckets))]
