"""The folder of downloaded shards: each file complete or absent, the least recently used ones removed for new ones.

CACHE/FOLDER-HASH/NAME.tar is a shard of a remote folder. Beside it is what belongs to it, which comes and goes with it:
NAME.tar.index, and its embeddings NAME.tar.ENCODER.safetensors. FOLDER and HASH are those of the URL without its query,
so that a URL that was signed again is the same shard. Embeddings that `fastimagen embed` writes here
(NAME.ENCODER.safetensors) and the manifest stay. Several processes may use a folder, best on a disk of the node.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ...data_config import RemoteConfig
from ...files import first_line, remove_abandoned
from .transfer import TransferError, download, shown

QUERY = re.compile(r"\?[^\s'\"]*")
TAR = re.compile(r"[^\s/'\"?&=:]+\.tar\b")

MIN_SHARDS = 16
"""Shards that must fit: those that training reads at a time, and those that are downloaded ahead of it."""


class RemoteCache:
    """A folder of downloaded files. limit: of the bytes of all shards with what belongs to them, None for no limit.

    Making one removes what killed processes have left.
    """

    def __init__(self, folder: str | Path, limit: int | None, patience: RemoteConfig) -> None:
        self.folder, self.limit, self.patience = Path(folder), limit, patience
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()

    def place(self, url: str) -> Path:
        """Where the shard of a URL is, or would be."""
        head, name, tail = _divided(url)
        head, tail = QUERY.sub("", head), QUERY.sub("", tail)
        label = re.sub(r"[^\w.-]", "", head.rstrip("/").rpartition("/")[2])[:40] or "shards"
        key = hashlib.sha256(f"{head} {tail}".encode()).hexdigest()[:8]
        return self.folder / f"{label}-{key}" / (name or "shard.tar")

    def get(
        self,
        url: str,
        target: Path,
        check: Callable[[Path], None],
        *,
        size: int = 0,
        tries: int | None = None,
        wait: bool = True,
    ) -> Path:
        """Download a file to `target`, unless it is there. If several processes need it, one downloads it.

        check: examines the complete file before it gets its name, and raises ValueError. size: how much room to make;
        tries: others than patience.tries. Raises TransferError as `download` does; without `wait`, BlockingIOError if
        another process is downloading it.
        """
        patience = self.patience if tries is None else self.patience.model_copy(update={"tries": tries})
        while not self._touch(target):
            with _locked_part(target, wait) as part:
                if part is None:
                    continue
                path = target.with_name(f".{target.name}.part")
                try:
                    self._make_room(size, keep=target)
                    download(url, part, patience)
                    part.flush()
                    os.fsync(part.fileno())
                    check(path)
                    os.replace(path, target)
                except OSError as error:
                    path.unlink(missing_ok=True)
                    raise OSError(f"cannot write {path.parent}: {error.strerror or first_line(error)}") from error
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
            self._make_room(0, keep=target)
        return target

    def check_limit(self, largest: int) -> None:
        """Raise ValueError if MIN_SHARDS shards with `largest` bytes do not fit."""
        if self.limit is not None and MIN_SHARDS * largest > self.limit:
            raise ValueError(
                f"fastimagen.data.cache_gb is {self.limit / 1e9:g}, but the shards that are read at a time, and those "
                f"that come next, need {MIN_SHARDS * largest / 1e9:.3g}: set it to more, or to null for no limit"
            )

    def _touch(self, target: Path) -> bool:
        """Whether a file is there; it then counts as used now. Its modification time stays: indices depend on it."""
        try:
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int, keep: Path) -> None:
        """Remove the shards that have not been used for the longest time, with what belongs to them, until `size` more
        bytes fit. What other processes have open stays readable for them."""
        if self.limit is None:
            return
        shards: dict[Path, list[Path]] = {}
        used: dict[Path, int] = {}
        total = 0
        for path in self.folder.glob("*/*.tar*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                stat = path.stat()
                shard = _shard_of(path)
                total += stat.st_size
                if not path.name.startswith("."):
                    shards.setdefault(shard, []).append(path)
                if path == shard:
                    used[shard] = stat.st_atime_ns
        for shard in sorted(shards, key=lambda shard: used.get(shard, 0)):
            if total + size <= self.limit:
                return
            if shard == _shard_of(keep):
                continue
            for path in sorted(shards[shard], reverse=True):  # the tar last: without it nothing else is of use
                with contextlib.suppress(FileNotFoundError):
                    total -= path.stat().st_size
                    path.unlink()

    def _clean(self) -> None:
        """Remove the temporary files of processes that were killed."""
        for path in self.folder.glob("*/.*.part"):
            with contextlib.suppress(OSError), open(path, "rb+") as part:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while a process downloads
                path.unlink()
        for folder in self.folder.glob("*/"):
            remove_abandoned(folder)


def sibling(url: str, name: str) -> str:
    """The URL of another file in the folder of a shard; the query stays. In a command it replaces the tar's name.

    Raises TransferError if no *.tar is named.
    """
    head, tar, tail = _divided(url)
    if not tar:
        raise TransferError(f"{shown(url)} names no *.tar, so that nothing is beside it", missing=True)
    return f"{head}{name}{tail}"


def _divided(url: str) -> tuple[str, str, str]:
    """What is before the name of the tar, the name, and what is after it; (url, "", "") without a name."""
    queries = [match.span() for match in QUERY.finditer(url)]
    tars = [tar for tar in TAR.finditer(url) if not any(start <= tar.start() < end for start, end in queries)]
    return (url[: tars[-1].start()], tars[-1][0], url[tars[-1].end() :]) if tars else (url, "", "")


def _shard_of(path: Path) -> Path:
    """The tar that a file belongs to; the file itself if it belongs to none."""
    stem, tar, _ = path.name.partition(".tar")
    return path.with_name(stem + tar)


@contextlib.contextmanager
def _locked_part(target: Path, wait: bool) -> Iterator[BinaryIO | None]:
    """The temporary file of a download, empty, for this process alone; None if it is no longer the one with that name,
    because whoever had it has finished. Its lock ends with the process. Raises BlockingIOError if another process has
    it and this one should not wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.part")
    with open(path, "rb+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as part:
        fcntl.flock(part, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            current = os.stat(path).st_ino == os.fstat(part.fileno()).st_ino
        except FileNotFoundError:
            current = False
        if current and target.exists():
            path.unlink()
            current = False
        if current:
            part.truncate(0)
        yield part if current else None
