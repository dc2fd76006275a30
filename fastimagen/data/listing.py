"""From paths and URLs of shards to listed shards: what manifests know is taken from them, the rest is indexed.

Local folders have their manifest beside the shards. Remote folders may have one beside theirs, which is downloaded; if
there is none, every shard is downloaded once to be indexed, and the manifest stays in the cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..files import first_line, remove_abandoned
from .listed import ListedShard
from .manifest import Entry, Row, manifest_path, read_manifest, row_of, write_manifest
from .remote.cache import RemoteCache, sibling
from .remote.shard import RemoteShard
from .remote.transfer import URL, TransferError, check_protocol, shown
from .shard import Reading, Shard
from .shard_index import load_or_build_index, warn_not_stored
from .tar_headers import stamp_of

logger = logging.getLogger(__name__)

Listed = tuple[dict[str, ListedShard], dict[str, ValueError]]
"""The shards, and the problems of those that cannot be read, by path."""

DOWNLOADS = 4
"""At a time, while remote shards are indexed."""


def list_local(paths: Sequence[str], reading: Reading, rank: int, world_size: int, *, trust: bool) -> Listed:
    """Shards of local tars. trust: a manifest is right; otherwise a tar that has another size or time is indexed."""
    folders = {*map(os.path.dirname, paths)}
    if rank == 0 and not trust:
        for folder in folders:
            remove_abandoned(folder or ".")
    known = {folder: read_manifest(manifest_path(folder, reading)) for folder in folders}
    rows: dict[str, Row] = {}
    lost: dict[str, ValueError] = {}
    for path in paths:
        row = known[os.path.dirname(path)].get(os.path.basename(path))
        if row is not None and (trust or row.entry.stamp == stamp_of(path)):
            rows[path] = row
    new = [path for path in _rotated(paths, rank, world_size) if path not in rows]
    for path in new:
        try:
            rows[path] = row_of(load_or_build_index(path, reading))
        except ValueError as error:
            lost[path] = error
    for folder in {*map(os.path.dirname, new)} if rank == 0 else ():
        here = {os.path.basename(path): row for path, row in rows.items() if os.path.dirname(path) == folder}
        others = {name: row for name, row in known[folder].items() if stamp_of(os.path.join(folder, name))}
        gone = {os.path.basename(path) for path in lost}
        store_manifest(folder, reading, {name: row for name, row in (others | here).items() if name not in gone})
    return {path: _local(path, row, reading) for path, row in rows.items()}, lost


def list_remote(urls: Sequence[str], cache: RemoteCache, reading: Reading, rank: int, world_size: int) -> Listed:
    """Shards of URLs. Raises ValueError for unknown protocols, URLs of the same shard, and a cache that is too
    small."""
    for url in {url.partition(":")[0]: url for url in urls}.values():
        check_protocol(url)
    places = {url: cache.place(url) for url in urls}
    owners = {place: url for url, place in places.items()}
    if twice := [url for url, place in places.items() if owners[place] != url]:
        raise ValueError(f"shard {shown(twice[0])} is listed twice, with different queries")
    first = {place.parent: url for url, place in reversed(places.items())}
    known = {folder: _remote_manifest(url, folder, cache, reading) for folder, url in first.items()}
    rows = {url: row for url, place in places.items() if (row := known[place.parent].get(place.name)) is not None}
    new = [url for url in _rotated(urls, rank, world_size) if url not in rows]
    lost: dict[str, ValueError] = {}
    if new:
        logger.warning("%s has no manifest of %d shards: each is downloaded once to index it", shown(new[0]), len(new))
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for url, found in zip(new, pool.map(lambda url: _index_remote(url, cache, reading), new)):
            if isinstance(found, Row):
                rows[url] = found
            else:
                lost[url] = found
    for folder in {places[url].parent for url in new}:
        here = {places[url].name: row for url, row in rows.items() if places[url].parent == folder}
        store_manifest(folder, reading, known[folder] | here)
        for name in here:
            manifest_part(folder / name, reading).unlink(missing_ok=True)
    cache.check_limit(max((row.entry.bytes for row in rows.values()), default=0))
    return {url: _remote(url, cache, reading, row) for url, row in rows.items()}, lost


def index_some(paths: Sequence[str], cache: RemoteCache | None, reading: Reading) -> None:
    """Index those of some shards that no manifest knows, for another process that writes it."""
    known: dict[Path, dict[str, Row]] = {}  # by folder
    for path in paths:
        if URL.match(path):
            if cache is None:
                continue
            place = cache.place(path)
            if place.parent not in known:
                known[place.parent] = _remote_manifest(path, place.parent, cache, reading)
            if place.name not in known[place.parent]:
                _index_remote(path, cache, reading)
            continue
        folder = Path(path).parent
        if folder not in known:
            known[folder] = read_manifest(manifest_path(folder, reading))
        row = known[folder].get(os.path.basename(path))
        if row is None or row.entry.stamp != stamp_of(path):
            with contextlib.suppress(ValueError):  # the other process reports it
                load_or_build_index(path, reading)


def lost_shard(path: str, samples: int) -> ListedShard:
    """A shard that cannot be read: it has no samples, and excludes `samples`."""
    entry = Entry("", 0, 0, {"in lost shards": samples} if samples else {}, {}, "", ())
    empty = Shard(path, "", np.empty((0, 6), dtype=np.int64), np.empty(0, dtype=np.bytes_), {})
    return ListedShard(path, Row(entry, np.empty(0, dtype=np.uint64), None), lambda: empty, lost=True)


def store_manifest(folder: str | Path, reading: Reading, rows: Mapping[str, Row]) -> None:
    """Write the manifest of a folder; where that is not possible, the log says so once."""
    try:
        write_manifest(manifest_path(folder, reading), rows)
    except OSError as error:
        warn_not_stored(str(folder), error.strerror or first_line(error))


def manifest_part(tar: Path, reading: Reading) -> Path:
    """The manifest of one remote shard, kept until all are indexed."""
    return tar.with_name(f".{tar.name}{reading.suffix}.manifest")


def _local(path: str, row: Row, reading: Reading) -> ListedShard:
    return ListedShard(path, row, lambda: load_or_build_index(path, reading))


def _remote(url: str, cache: RemoteCache, reading: Reading, row: Row) -> ListedShard:
    remote = RemoteShard(url, cache, reading, row.entry)
    return ListedShard(str(remote.path), row, remote.open, remote)


def _rotated(paths: Sequence[str], rank: int, world_size: int) -> list[str]:
    """Each rank begins at another shard, and finds those of the others indexed when it reaches them."""
    start = rank * len(paths) // world_size
    return [*paths[start:], *paths[:start]]


def _remote_manifest(url: str, folder: Path, cache: RemoteCache, reading: Reading) -> dict[str, Row]:
    """The manifest of a remote folder, downloaded once; {} if there is none."""
    path = manifest_path(folder, reading)

    def check(part: Path) -> None:
        if not read_manifest(part):
            raise TransferError(f"{part} is no manifest", missing=True)

    try:
        cache.get(sibling(url, path.name), path, check, tries=1 if url.startswith("pipe:") else None)
    except TransferError as error:
        if not (error.missing or url.startswith("pipe:")):
            raise
        return {}
    return read_manifest(path)


def _index_remote(url: str, cache: RemoteCache, reading: Reading) -> Row | ValueError:
    """A shard's row: as an earlier run or another process has it, or from the shard itself."""
    place = cache.place(url)
    part = manifest_part(place, reading)
    for path in (part, manifest_path(place.parent, reading)):
        if (row := read_manifest(path).get(place.name)) is not None:
            return row
    try:
        row = row_of(RemoteShard(url, cache, reading).open())
        write_manifest(part, {place.name: row})
    except ValueError as error:
        return error
    return row
