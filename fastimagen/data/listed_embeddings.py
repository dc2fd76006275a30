"""The embeddings of listed shards: compared with the manifest at the start, opened when a sample of them is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from .embedding_cache import EmbeddingCache, cache_path, check_download, open_cache
from .listed import CLOSE, MAX_OPEN_SHARDS, Download, ListedShard, open_whole
from .shard import Shard


def list_embeddings(
    shard: ListedShard, identity: Mapping[str, str], folder: str | None, *, trust: bool
) -> ListedEmbeddings:
    """The embeddings of a shard that `folder`, or the folder of the shard, has; else those beside a remote shard.

    identity: of the encoder. trust: do not compare local ones with the manifest, because another process has. Raises
    ValueError that names what differs, and the command that writes them.
    """
    path, remote = cache_path(shard.path, identity, folder), shard.remote
    if remote is None or path.exists():
        if not (trust or shard.lost) and not _matches(path, identity, shard.row.entry.samples_hash):
            open_embeddings(open_whole(shard.opener), path, identity)  # says what is wrong
        return ListedEmbeddings(shard, lambda whole: open_embeddings(whole, path, identity))
    fetch = partial(remote.fetch_beside, path.name.removeprefix(Path(shard.path).stem), check=check_download)

    def opener(whole: Shard) -> EmbeddingCache:
        while True:
            path = fetch()
            try:
                return open_embeddings(whole, path, identity)
            except ValueError:
                if path.exists():
                    raise  # otherwise it was removed for another one since it was fetched

    return ListedEmbeddings(shard, opener, Download(fetch))


def open_embeddings(shard: Shard, path: Path, identity: Mapping[str, str]) -> EmbeddingCache:
    """The cache of a shard after all checks. Raises ValueError as `open_cache`."""
    return open_cache(path, identity=identity, keys=shard.keys, captions_hash=shard.samples_hash, counts=shard.counts)


def _matches(path: Path, identity: Mapping[str, str], samples_hash: str) -> bool:
    """Whether a cache's header, and its size, are those of the encoder and the samples. Reads no tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return found.get("samples") == samples_hash and all(found.get(name) == value for name, value in identity.items())


class ListedEmbeddings:
    """The embeddings of a listed shard's samples. opener: opens the cache of the whole shard, which it is given."""

    def __init__(
        self, shard: ListedShard, opener: Callable[[Shard], EmbeddingCache], download: Download | None = None
    ) -> None:
        self.shard, self.opener, self.download, self._lock = shard, opener, download, threading.Lock()

    def select(self, shard: ListedShard) -> ListedEmbeddings:
        """Those of a selection of the shard."""
        return ListedEmbeddings(shard, self.opener, self.download)

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> Tensor:
        return self.caption(index, 0)  # (L, E)

    def opened(self) -> EmbeddingCache:
        """The cache of the whole shard. Raises ValueError, and TransferError, as `list_embeddings` and `Download`."""
        with self._lock:
            return _open_embeddings(self)

    def caption(self, index: int, number: int) -> Tensor:
        """Raises as `opened`."""
        numbers = self.shard.opened()[1]
        return self.opened().caption(index if numbers is None else int(numbers[index]), number)  # (L, E)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_embeddings(listed: ListedEmbeddings) -> EmbeddingCache:
    if listed.download is not None:
        listed.download()
    return listed.opener(open_whole(listed.shard.opener))


CLOSE.append(_open_embeddings.cache_clear)
