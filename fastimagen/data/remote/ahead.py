"""Downloads ahead of the position: the shards that the order of the data comes to next, before they are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from ..listed import Download
from .transfer import TransferError

SHARDS_AHEAD = 12
"""Three blocks of the order: one that is read, and two that come."""

THREADS = 2
"""Downloads at a time and process. The processes of a node share their cache, and download different shards."""

PATIENCE = 5.0
"""Seconds that `close` waits. A thread that is killed with the process inside of PyTorch would abort it."""


class Remote(Protocol):
    """A shard, or the embeddings of one."""

    @property
    def download(self) -> Download | None: ...


class DataOrder(Protocol):
    """The part of an order that this module uses."""

    def ahead(self, position: int, count: int) -> list[int]: ...


class Ahead:
    """Threads that download; they end with the process, or after what they are at when `close` is called.

    shards, embeddings: as the loader has them. What cannot be downloaded is reported when it is read.
    """

    def __init__(self, shards: Sequence[Remote], embeddings: Sequence[Remote] | None, order: DataOrder) -> None:
        self.shards, self.embeddings, self.order = shards, embeddings, order
        self._wanted: list[int] = []
        self._begun: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._changed, self._closed = threading.Condition(), False

    def reach(self, position: int) -> None:
        """Say that samples from `position` on are about to be read."""
        wanted = self.order.ahead(position, SHARDS_AHEAD)
        while len(self._threads) < THREADS:
            self._threads.append(threading.Thread(target=self._work, daemon=True, name=f"ahead-{len(self._threads)}"))
            self._threads[-1].start()
        with self._changed:
            if wanted != self._wanted:
                self._wanted = wanted
                self._begun &= set(wanted)
                self._changed.notify_all()

    def close(self) -> None:
        """Begin no other download, and wait a little for those that have begun: a server may not answer for long."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            for item in (self.shards[shard], None if self.embeddings is None else self.embeddings[shard]):
                if item is not None and item.download is not None and not self._closed:
                    try:
                        item.download(wait=False)
                    except BlockingIOError:
                        break  # another process of the node is downloading it
                    except (TransferError, OSError):
                        break  # who reads the shard reports it

    def _next(self) -> int | None:
        """The first wanted shard that no thread has begun with; None when closed."""
        with self._changed:
            while not self._closed:
                for shard in self._wanted:
                    if shard not in self._begun:
                        self._begun.add(shard)
                        return shard
                self._changed.wait()
        return None
