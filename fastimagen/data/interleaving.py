"""Several sequences interleaved in proportion to weights: data sets of a mixture, buckets of images.

Every block of numbers has as many of each sequence as its weight says, in random order. So how many come before a
number is known without a walk: (seed, number) says which sequence comes, and with which of its own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ..seeds import random_bits

BLOCK = 1024
"""Numbers that are shuffled together. Counts at their ends follow the weights, to less than one for each sequence."""


class Interleaving:
    """interleaving[number] -> (sequence, its own number) for any number >= 0. Threads may share it.

    weights: of the n sequences, exact. stream: of random numbers, as order.py lists them. block: as BLOCK.
    """

    def __init__(self, weights: Sequence[Fraction], seed: int, stream: int, block: int = BLOCK) -> None:
        self.seed, self.stream, self.block = seed, stream, block
        self._shares = [weight / sum(weights[number:]) for number, weight in enumerate(weights)]  # of what is left
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def __getitem__(self, number: int) -> tuple[int, int]:
        if number < 0:
            raise IndexError(f"position {number} of the data order is negative")
        block, offset = divmod(int(number), self.block)
        sequences, own = self._drawn(block)
        return int(sequences[offset]), int(own[offset])

    def counts(self, number: int) -> np.ndarray:
        """How often each sequence came before a number, (n,)."""
        block, offset = divmod(int(number), self.block)
        sequences, _ = self._drawn(block)
        return self._counts(block) + np.bincount(sequences[:offset], minlength=len(self._shares))

    def _counts(self, block: int) -> np.ndarray:
        """How often each sequence came before a block, (n,). Every count rises with the block: of the numbers that the
        sequences before it leave, each one has its share, rounded down."""
        counts, left = [], block * self.block
        for share in self._shares:
            counts.append(left * share.numerator // share.denominator)  # exact: Python's integers do not round
            left -= counts[-1]
        return np.array(counts, dtype=np.int64)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence at each number of a block, and its own number, as two arrays (block,)."""
        before, after = self._counts(block), self._counts(block + 1)
        sequences = np.repeat(np.arange(len(before)), after - before)  # (block,)
        bits = random_bits(self.seed, self.stream, (block, 0), self.block)
        sequences = sequences[np.argsort(bits, kind="stable")]
        numbers = np.empty(self.block, dtype=np.int64)
        for sequence, first in enumerate(before):
            own = sequences == sequence
            numbers[own] = first + np.arange(own.sum())
        return sequences, numbers
