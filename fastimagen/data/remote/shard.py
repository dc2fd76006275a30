"""A remote shard: downloaded into the cache, compared with the manifest, and opened there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..manifest import Entry
from ..shard import Reading, Shard
from ..shard_index import index_shard, load_or_build_index, store_index
from ..tar_headers import OpenFile
from .cache import RemoteCache, sibling
from .transfer import TransferError, shown


class RemoteShard:
    """The shard of a URL. entry: what the manifest knows; None while the manifest is made. Threads may share it.

    All methods raise TransferError if a file cannot be downloaded or is damaged, or is not what the manifest says.
    """

    def __init__(self, url: str, cache: RemoteCache, reading: Reading, entry: Entry | None = None) -> None:
        self.url, self.cache, self.reading, self.entry = url, cache, reading, entry
        self.path = cache.place(url)

    def fetch(self, wait: bool = True) -> None:
        """Make sure that the shard is in the cache. wait: as in RemoteCache.get."""
        found: list[Shard] = []

        def check(part: Path) -> None:
            found.append(self._examine(part))

        self.cache.get(self.url, self.path, check, size=self.entry.bytes if self.entry else 0, wait=wait)
        for shard in found:  # it was not there
            store_index(replace(shard, path=str(self.path)), self.reading)

    def open(self) -> Shard:
        """The shard. It stays readable if the cache removes its file."""
        while True:
            self.fetch()
            try:
                file = OpenFile(str(self.path))
                shard = load_or_build_index(str(self.path), self.reading)
            except (FileNotFoundError, ValueError):
                if self.path.exists():
                    raise
                continue  # removed for another one since it was fetched
            if shard.stamp == file.stamp:
                return replace(shard, file=file)

    def fetch_beside(self, suffix: str, wait: bool = True, check: Callable[[Path], None] = lambda part: None) -> Path:
        """The file STEM + suffix beside the shard, such as its embeddings; it comes and goes with the shard.

        check: raises ValueError if what has been downloaded is damaged."""
        path, url = self.path.with_name(f"{self.path.name}{suffix}"), sibling(self.url, f"{self.path.stem}{suffix}")

        def examine(part: Path) -> None:
            try:
                check(part)
            except ValueError as error:
                raise TransferError(f"cannot use {shown(url)}: {error}") from None

        return self.cache.get(url, path, examine, wait=wait)

    def _examine(self, part: Path) -> Shard:
        """Index what has been downloaded."""
        size, entry = part.stat().st_size, self.entry
        if entry is not None and size != entry.bytes:
            raise TransferError(f"shard {shown(self.url)} has {size} bytes, its manifest says {entry.bytes}")
        if entry is not None and entry.checksum is not None and checksum(part) != entry.checksum:
            raise TransferError(f"shard {shown(self.url)} has another checksum than its manifest says")
        try:
            return index_shard(part, self.reading)
        except ValueError as error:
            problem = str(error).replace(f"shard {part}", "it")
            raise TransferError(f"cannot use shard {shown(self.url)}: {problem}") from None


def checksum(path: str | Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
