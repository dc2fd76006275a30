"""Validation samples out of the training shards, chosen by a hash of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..data_config import HeldOutConfig
from .loader import Embeddings
from .shard import Shard

FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a, 64 bits
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64 (Steele et al. 2014)


def hash_keys(names: np.ndarray) -> np.ndarray:
    """A uint64 for every key, (S,) bytes; the same key has the same hash everywhere.

    FNV-1a with the final mix of SplitMix64, because the high bits of FNV-1a differ little for similar keys. A loop over
    the bytes of a key, not over the keys: 10,000 keys take about a millisecond.
    """
    columns = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), names.itemsize).T  # (longest, S)
    hashes = np.full(len(names), FNV_OFFSET, dtype=np.uint64)  # (S,)
    for column in columns:
        hashes = np.where(column == 0, hashes, (hashes ^ column) * FNV_PRIME)  # zeros pad the shorter keys
    hashes = (hashes ^ (hashes >> np.uint64(30))) * MIX[0]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * MIX[1]
    return hashes ^ (hashes >> np.uint64(31))


def choose_held_out(shards: Sequence[Shard], config: HeldOutConfig) -> list[np.ndarray]:
    """For each shard a mask (S,) of the validation samples.

    Samples of the same key, in different shards, are on the same side, so that a count may be exceeded. Raises
    ValueError if training or validation would be left without samples.
    """
    hashes = [hash_keys(shard.names) for shard in shards]
    if config.share is not None:
        described, largest = f"share {config.share:g}", np.uint64(config.share * 2.0**64)
    else:
        assert config.count is not None
        described, largest = f"count {config.count}", _nth_smallest(hashes, config.count)
    masks = [shard_hashes <= largest for shard_hashes in hashes]
    held_out, total = sum(int(mask.sum()) for mask in masks), sum(map(len, masks))
    if not 0 < held_out < total:
        raise ValueError(
            f"fastimagen.data.validation: {described} holds out {held_out} of {total} samples: choose another, so that "
            f"samples are left for training and for validation"
        )
    return masks


def _nth_smallest(hashes: Sequence[np.ndarray], n: int) -> np.uint64:
    """The n-th smallest hash; the largest if there are fewer. Keeps n hashes in memory, not those of all shards."""
    smallest = np.empty(0, dtype=np.uint64)
    for shard_hashes in hashes:
        smallest = np.sort(np.concatenate([smallest, shard_hashes]))[:n]
    return smallest[-1]


def select_samples(shard: Shard, mask: np.ndarray) -> Shard:
    """The shard with only the samples of a mask (S,)."""
    arrays = {name: getattr(shard, name) for name in ("extents", "names", "counts", "passes")}
    return replace(shard, **{name: values[mask] for name, values in arrays.items() if values is not None})


@dataclass(frozen=True, eq=False)
class SelectedEmbeddings:
    """The embeddings of the samples that `select_samples` keeps; indices are their numbers in the whole shard."""

    embeddings: Embeddings
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.embeddings[int(self.indices[index])]  # (L, E)

    def caption(self, index: int, number: int) -> Tensor:
        return self.embeddings.caption(int(self.indices[index]), number)  # (L, E)
