"""Shards that the manifest knows: counted without being open, opened (and downloaded) when a sample of them is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .manifest import Row
from .remote.shard import RemoteShard
from .remote.transfer import TransferError
from .shard import Shard

MAX_OPEN_SHARDS = 64
"""Shards whose index is in memory: blocks of 4 (order.py) of several data sets, and those of validation."""


@dataclass(frozen=True)
class Selection:
    """Which samples of a shard are meant: all, those that data.where takes, or of these one side of a validation split.

    largest: the largest hash of a key that is held out; held_out: whether these are meant, or the others.
    """

    where: bool = False
    largest: np.uint64 | None = None
    held_out: bool = False

    def mask(self, row: Row) -> np.ndarray:
        """Which samples of a shard it takes, (S,) bool."""
        mask = row.passes if self.where and row.passes is not None else np.ones(len(row.hashes), dtype=bool)
        return mask if self.largest is None else mask & ((row.hashes <= self.largest) == self.held_out)


ALL = Selection()


class Download:
    """Fetches a file when it is first needed. What could not be had is not tried again: its samples are lost."""

    def __init__(self, fetch: Callable[[bool], object]) -> None:
        self._fetch, self._lock = fetch, threading.Lock()
        self._problem: tuple[str, bool] | None = None  # an error itself would keep the frames of all who raised it

    def __call__(self, wait: bool = True) -> None:
        """Make sure that the file is here. Raises TransferError, also whenever it is called again; without `wait`,
        BlockingIOError if another process is downloading it."""
        with self._lock:
            if self._problem is None:
                try:
                    self._fetch(wait)
                except TransferError as error:
                    self._problem = str(error), error.missing
            if self._problem is not None:
                raise TransferError(self._problem[0], missing=self._problem[1])


class ListedShard:
    """A shard of S samples, read like Shard; threads may share it.

    path: of the tar here, also before it is downloaded; row: what the manifest knows; opener: opens the whole tar;
    remote: where it comes from; excluded, filtered: as in Shard. Reading raises ValueError if the tar is not what the
    manifest says, and TransferError if it cannot be downloaded.
    """

    def __init__(
        self, path: str, row: Row, opener: Callable[[], Shard], remote: RemoteShard | None = None, *, lost: bool = False
    ) -> None:
        self.path, self.row, self.opener, self.remote, self.lost = path, row, opener, remote, lost
        self.download = None if remote is None else Download(remote.fetch)
        self.excluded, self.filtered = row.entry.excluded, row.entry.filtered
        self.selection, self._size, self._lock = ALL, len(row.hashes), threading.Lock()

    def select(self, selection: Selection, *, reports: bool = True) -> ListedShard:
        """The same shard with fewer samples. reports: whether it has the counts of what is excluded and filtered."""
        shard = ListedShard(self.path, self.row, self.opener, self.remote, lost=self.lost)
        shard.download = self.download  # what could not be had is lost for both
        shard.selection, shard._size = selection, int(selection.mask(self.row).sum())
        if not reports:
            shard.excluded, shard.filtered = {}, {}
        return shard

    def __len__(self) -> int:
        return self._size

    @property
    def hashes(self) -> np.ndarray:
        """The hash of each key, (S,) uint64."""
        return self.row.hashes if self.selection == ALL else self.row.hashes[self.selection.mask(self.row)]

    @property
    def image_sizes(self) -> np.ndarray:
        """Width and height of each image, (S, 2) uint16; of a reading with sizes."""
        if self.lost:
            return np.empty((0, 2), dtype=np.uint16)
        assert self.row.image_sizes is not None, "a reading without sizes"
        return self.row.image_sizes if self.selection == ALL else self.row.image_sizes[self.selection.mask(self.row)]

    @property
    def ends(self) -> tuple[str, ...]:
        """What the first and the last sample are recognised by: their keys, or the hashes of these in a selection."""
        if self.selection == ALL:
            return self.row.entry.ends
        return tuple(str(value) for value in self.hashes[[0, -1]]) if len(self) else ()

    def opened(self) -> tuple[Shard, np.ndarray | None]:
        """The open shard, and the numbers of its samples in the whole one, None for all."""
        with self._lock:
            return _open(self)

    @property
    def keys(self) -> list[str]:
        return self.opened()[0].keys

    @property
    def counts(self) -> np.ndarray | None:
        return self.opened()[0].counts

    @property
    def passes(self) -> np.ndarray | None:
        return self.row.passes

    def key(self, index: int) -> str:
        return self.opened()[0].key(index)

    def image(self, index: int) -> bytes:
        return self.opened()[0].image(index)

    def caption(self, index: int) -> str:
        return self.opened()[0].caption(index)

    def captions_of(self, index: int) -> list[str]:
        return self.opened()[0].captions_of(index)

    def number_of_captions(self, index: int) -> int:
        return self.opened()[0].number_of_captions(index)

    def captions(self) -> list[str]:
        return self.opened()[0].captions()

    def metadata(self, index: int) -> dict[str, Any]:
        return self.opened()[0].metadata(index)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open(listed: ListedShard) -> tuple[Shard, np.ndarray | None]:
    if listed.download is not None:
        listed.download()
        _close_removed()
    shard, entry = open_whole(listed.opener), listed.row.entry
    if (len(shard), shard.samples_hash) != (entry.samples, entry.samples_hash):
        raise ValueError(f"shard {listed.path} has changed since it was indexed: rerun the command")
    if listed.selection == ALL:
        return shard, None
    mask = listed.selection.mask(listed.row)
    return shard.select(mask), np.flatnonzero(mask)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def open_whole(opener: Callable[[], Shard]) -> Shard:
    """The shard that an opener opens, of which several selections and the embeddings have need."""
    shard = opener()
    if shard.file is not None:
        with _held_lock:
            _held[shard.path] = os.fstat(shard.file.fd).st_ino
    return shard


MAX_REMOVED = 4
"""Shards that the cache has removed, when all are closed. Processes that have the same ones open share their space."""

CLOSE: list[Callable[[], None]] = [_open.cache_clear, open_whole.cache_clear]
"""Forget what is open: files are closed when nobody reads them."""

_held: dict[str, int] = {}
"""The remote shards that have been opened since the last time that all were closed, with their inodes."""

_held_lock = threading.Lock()


def _close_removed() -> None:
    """Close all shards if the cache of remote ones has removed MAX_REMOVED of them: open files keep their space on the
    disk. Those that are still read are opened again."""
    with _held_lock:
        if sum(_inode(path) != inode for path, inode in _held.items()) < MAX_REMOVED:
            return
        _held.clear()
        for close in CLOSE:
            close()


def _inode(path: str) -> int | None:
    """None if there is no such file."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
