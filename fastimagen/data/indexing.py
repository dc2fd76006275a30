"""Manifests brought up to date: by `fastimagen index`, and by training before it opens its data."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..config import FastimagenConfig
from ..words import counted
from .embedding_cache import claim
from .listed import ListedShard
from .listing import index_some, manifest_part, store_manifest
from .manifest import manifest_path, read_manifest, row_of, write_manifest
from .remote.shard import checksum
from .shard import Reading
from .shards import list_shards
from .source import Say, open_source, reading_of, remote_cache

LOOK_AGAIN = 0.2
"""Seconds after which the first process looks whether the others have finished."""


def index_share(config: FastimagenConfig, rank: int, world_size: int) -> None:
    """Index this rank's share of the shards that manifests do not know. Problems are left to who opens the data."""
    for source in config.data.data_sets:
        with suppress(ValueError, OSError, ImportError):
            shards = list_shards(source.shards)[rank::world_size]
            index_some(shards, remote_cache(config.data), reading_of(source, config))


def index_all(config: FastimagenConfig, *, say: Say, rank: int = 0, world_size: int = 1) -> None:
    """Write the manifests of all shards, with checksums, for which every tar is read in full once.

    The processes share the shards and need no network between them; the first one waits for the others, and writes.
    Raises ValueError as `open_source`.
    """
    shards = _shards(config, rank, world_size)
    new = [(shard, reading) for shard, reading in shards if shard.row.entry.checksum is None]
    start = rank * len(new) // world_size
    left = new[start:] + new[:start]
    while left:
        left = [(shard, reading) for shard, reading in left if not _add_checksum(shard, reading)]
        if left and rank:
            return  # others are at them
        time.sleep(LOOK_AGAIN if left else 0)
    if rank:
        return
    for folder, reading in dict.fromkeys((Path(shard.path).parent, reading) for shard, reading in shards):
        rows = read_manifest(manifest_path(folder, reading))
        parts = {
            shard.path: _part(shard, own) for shard, own in new if (Path(shard.path).parent, own) == (folder, reading)
        }
        rows |= {Path(path).name: row for path, part in parts.items() for row in read_manifest(part).values()}
        store_manifest(folder, reading, rows)
        for part in parts.values():
            part.unlink(missing_ok=True)
        say(f"{manifest_path(folder, reading)}: {counted(len(rows), 'shard')}")
    excluded: Counter[str] = Counter()
    for shard, _ in shards:
        excluded.update(shard.excluded)
    reasons = ", ".join(f"{count} {reason}" for reason, count in excluded.most_common()) or "nothing"
    samples = sum(len(shard) for shard, _ in shards)
    say(f"{counted(samples, 'sample')} in {counted(len(shards), 'shard')}; excluded: {reasons}")


def check_index(config: FastimagenConfig, *, say: Say, rank: int = 0, world_size: int = 1) -> None:
    """Read this process's share of the shards in full, and compare them with their manifests.

    Raises ValueError that names what differs.
    """
    shards = _shards(config, trust=True)[rank::world_size]
    problems, unchecked = [], 0
    for shard, _ in shards:
        try:
            entry, whole = shard.row.entry, shard.opener()
            tar = Path(shard.path)
            if row_of(whole).entry.samples_hash != entry.samples_hash or len(whole) != entry.samples:
                raise ValueError(f"shard {tar} has other samples than its manifest says")
            unchecked += entry.checksum is None
            if entry.checksum is not None and checksum(tar) != entry.checksum:
                raise ValueError(f"shard {tar} is damaged: its checksum is not that of the manifest")
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{len(problems)} of {counted(len(shards), 'shard')} not intact: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}"
        )
    without = f"; {unchecked} of them without a checksum: run fastimagen index" if unchecked else ""
    say(f"{counted(len(shards), 'shard')} intact{without}")


def _shards(
    config: FastimagenConfig, rank: int = 0, world_size: int = 1, *, trust: bool = False
) -> list[tuple[ListedShard, Reading]]:
    """The shards of training and validation that can be read, each once for a reading. trust: as in `open_shards`."""
    listed = {
        (shard.path, reading_of(source, config)): shard
        for source in config.data.data_sets
        for shard in open_source(source, config, rank=rank, world_size=world_size, trust=trust)
    }
    return [(shard, reading) for (_, reading), shard in listed.items() if not shard.lost]


def _part(shard: ListedShard, reading: Reading) -> Path:
    return manifest_part(Path(shard.path), reading)


def _add_checksum(shard: ListedShard, reading: Reading) -> bool:
    """Write the shard's row with its checksum, unless that is done. False if another process is at it."""
    part = _part(shard, reading)
    with claim(part) as free:
        if not free:
            return False
        known = [row for row in read_manifest(part).values() if row.entry.checksum is not None]
        if not known or known[0].entry.stamp != shard.row.entry.stamp:
            whole = shard.opener()
            write_manifest(part, {Path(shard.path).name: row_of(whole, checksum(whole.path))})
    return True
