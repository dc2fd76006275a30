"""The manifest of a folder of shards: what training must know of them before it opens one.

One safetensors file for a folder and a reading. Its header has an entry for each shard; its tensors are
    hashes (S of all shards,) int64: the hash of each key (key_hash.py), which decides on samples held out
    passes (S of all shards,) bool: whether data.where takes the sample; only with conditions
    image_sizes (S of all shards, 2) uint16: width and height; only with buckets
in the order of the entries. It is memory-mapped, so that the processes of a node share a copy: 8 to 13 bytes a sample.
The index files beside the tars, and the tars themselves, are what it is made from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..files import first_line, write_safetensors
from .shard import Reading, Shard

logger = logging.getLogger(__name__)

MANIFEST_FORMAT = "fastimagen.manifest.1"


@dataclass(frozen=True)
class Entry:
    """A shard in a manifest. stamp, excluded, filtered, samples_hash: as Shard has them; samples, captions: their
    numbers; ends: the first and the last key; checksum: sha256 of the tar, None if nobody has read it in full."""

    stamp: str
    samples: int
    captions: int
    excluded: dict[str, int]
    filtered: dict[str, int]
    samples_hash: str
    ends: tuple[str, ...]
    checksum: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the tar."""
        return int(self.stamp.partition(" ")[0])


class Row(NamedTuple):
    """A shard in a manifest, with its samples: hashes (S,) uint64, passes (S,) bool or None, and image_sizes (S, 2)
    uint16 or None."""

    entry: Entry
    hashes: np.ndarray
    passes: np.ndarray | None
    image_sizes: np.ndarray | None = None


def row_of(shard: Shard, checksum: str | None = None) -> Row:
    """What the manifest has of an open shard."""
    entry = Entry(
        stamp=shard.stamp,
        samples=len(shard),
        captions=len(shard) if shard.counts is None else int(shard.counts.sum()),
        excluded=shard.excluded,
        filtered=shard.filtered,
        samples_hash=shard.samples_hash,
        ends=shard.ends,
        checksum=checksum,
    )
    passes, sizes = (None if array is None else array.copy() for array in (shard.passes, shard.image_sizes))
    return Row(entry, shard.hashes, passes, sizes)


def manifest_path(folder: str | Path, reading: Reading) -> Path:
    """The manifest of a folder; another reading has another one."""
    return Path(folder) / f"shards{reading.suffix}.manifest"


def read_manifest(path: str | Path) -> dict[str, Row]:
    """The shards of a manifest by the name of the tar, memory-mapped; {} if there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as stored:
            header = stored.metadata() or {}
            if header.get("format") != MANIFEST_FORMAT:
                raise ValueError(f"its format is not {MANIFEST_FORMAT}")
            tensors = {name: stored.get_tensor(name).numpy() for name in stored.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("rebuilding %s: %s", path, first_line(error))
        return {}
    hashes, passes, sizes = tensors["hashes"].view(np.uint64), tensors.get("passes"), tensors.get("image_sizes")
    rows, start = {}, 0
    for name, fields in json.loads(header["shards"]).items():
        entry = Entry(**fields | {"ends": tuple(fields["ends"])})
        own = slice(start, start := start + entry.samples)
        passed, sized = (None if array is None else array[own] for array in (passes, sizes))
        rows[name] = Row(entry, hashes[own], passed, sized)
    return rows


def write_manifest(path: str | Path, rows: Mapping[str, Row]) -> None:
    """Write a manifest atomically, the shards in the order of their names. Raises OSError if that fails."""
    names = sorted(rows)
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(rows[name].hashes for name in names)])
    tensors = {"hashes": torch.from_numpy(hashes.view(np.int64))}
    for column in ("passes", "image_sizes"):
        arrays = [array for name in names if (array := getattr(rows[name], column)) is not None]
        if arrays:
            tensors[column] = torch.from_numpy(np.concatenate(arrays))
    entries = {name: asdict(rows[name].entry) for name in names}
    write_safetensors(path, tensors, {"format": MANIFEST_FORMAT, "shards": json.dumps(entries)})
