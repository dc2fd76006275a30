"""Validation samples out of the training shards, chosen by a hash of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..data_config import HeldOutConfig


class Hashed(Protocol):
    """The part of a shard that this module uses."""

    @property
    def hashes(self) -> np.ndarray: ...


def choose_held_out(shards: Sequence[Hashed], config: HeldOutConfig) -> np.uint64:
    """The largest hash of a key of a validation sample: those with larger ones are for training.

    Samples of the same key, in different shards, are on the same side, so that a count may be exceeded. Raises
    ValueError if training or validation would be left without samples.
    """
    hashes = [shard.hashes for shard in shards]
    if config.share is not None:
        described, largest = f"share {config.share:g}", np.uint64(config.share * 2.0**64)
    else:
        assert config.count is not None
        described, largest = f"count {config.count}", _nth_smallest(hashes, config.count)
    held_out = sum(int((shard_hashes <= largest).sum()) for shard_hashes in hashes)
    total = sum(map(len, hashes))
    if not 0 < held_out < total:
        raise ValueError(
            f"fastimagen.data.validation: {described} holds out {held_out} of {total} samples: choose another, so that "
            f"samples are left for training and for validation"
        )
    return largest


def _nth_smallest(hashes: Sequence[np.ndarray], n: int) -> np.uint64:
    """The n-th smallest hash; the largest if there are fewer. Keeps n hashes in memory, not those of all shards."""
    smallest = np.empty(0, dtype=np.uint64)
    for shard_hashes in hashes:
        if len(smallest) == n:
            shard_hashes = shard_hashes[shard_hashes < smallest[-1]]
        smallest = np.sort(np.concatenate([smallest, shard_hashes]))[:n]
    return smallest[-1]
