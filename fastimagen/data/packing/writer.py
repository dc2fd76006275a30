"""Items -> shards, in several processes. A run that is killed resumes: shards that are complete are kept.

Shard n holds the usable ones of items n * shard_size to (n + 1) * shard_size - 1, so that each shard depends on its own
items alone. All is written into a hidden folder beside the output, which becomes the output when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ...extras import import_extra, require_extra
from ...files import atomic_file, read_json_object, require_empty, write_json
from .report import PackReport, Tally
from .samples import Item, Packed, Unusable, pack_item, read_local, read_usable

T = TypeVar("T")

REPORT = "report.json"
"""In the output folder: what was packed and what was not, by reason."""


@dataclass(frozen=True)
class PackOptions:
    """How to pack. max_side: images with a longer side are made smaller. captions: False packs images alone."""

    shard_size: int = 1000
    max_side: int | None = None
    captions: bool = True
    processes: int = 1

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"a shard holds at least one sample: got a shard size of {self.shard_size}")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"--max-side must be at least 1 pixel, got {self.max_side}")
        if self.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {self.processes}")


PackOne = Callable[[Item], Packed]
MapItems = Callable[[PackOne, list[Item]], Iterable["Packed | Unusable"]]


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """The hidden folder to write shards into; it becomes `out` when the block ends without an error.

    After an error or a kill it stays, with the shards that are complete. Raises ValueError if `out` is not empty or
    another process is writing it.
    """
    out = out.resolve()
    require_empty(out)
    require_extra("webdataset", user="packing shards", extra="data")
    working = out.with_name(f".{out.name}.incomplete")
    working.mkdir(parents=True, exist_ok=True)
    lock = os.open(working, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process packs into {out}: wait until it ends") from None
        yield working
        for pattern in (".*.tmp", ".[0-9]*.json"):  # of a run that was killed; records of finished shards
            for path in working.rglob(pattern):
                path.unlink(missing_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(working, out)
    finally:
        os.close(lock)
        if working.exists() and not any(working.rglob("*.tar")):
            shutil.rmtree(working)


def write_shards(
    items: Iterable[Item], folder: Path, report: PackReport, options: PackOptions, *, map_items: MapItems | None = None
) -> None:
    """Write items as shards into `folder` and add them to `report`.

    map_items: packs the items of a shard in some other way than one after the other; then in this process. A shard
    whose items and options are those of an earlier run is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pack_one = partial(pack_item, read=read_local, max_side=options.max_side, captions=options.captions)
    pack = partial(_pack_chunk, folder, options, pack_one, map_items or _one_by_one)
    numbers = 0
    for tally, kept in _map_chunks(pack, items, options, in_process=map_items is not None):
        report.add(tally)
        report.shards += tally.packed > 0
        report.kept += kept and tally.packed > 0
        numbers += 1
    for path in folder.glob("[0-9]*.tar"):  # of an interrupted run over more items
        if int(path.stem) >= numbers:
            path.unlink()


def usable_items(items: Iterable[Item], report: PackReport, options: PackOptions) -> list[Item]:
    """The items that `pack_item` accepts; the others are counted in `report`."""
    found = []
    for usable, tally in _map_chunks(partial(_check_chunk, options.captions), items, options):
        report.add(tally)
        found += usable
    return found


def _check_chunk(captions: bool, numbered: tuple[int, list[Item]]) -> tuple[list[Item], Tally]:
    usable, tally = [], Tally()
    for item in numbered[1]:
        try:
            read_usable(item, read_local, captions=captions)
        except Unusable as problem:
            _skip(tally, item, problem)
        else:
            usable.append(item)
    return usable, tally


def _map_chunks(
    work: Callable[[tuple[int, list[Item]]], T],
    items: Iterable[Item],
    options: PackOptions,
    *,
    in_process: bool = False,
) -> Iterator[T]:
    """work((number, items of the shard)) for each shard in order, in several processes if there are several shards."""
    chunks = enumerate(_chunks(items, options.shard_size))
    first = list(islice(chunks, 2))
    if in_process or options.processes == 1 or len(first) < 2:
        yield from map(work, first)
        yield from map(work, chunks)
        return
    # Not fork: this process may have threads, whose locks a forked one would inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        pending: deque[Future[T]] = deque(pool.submit(work, chunk) for chunk in first)
        try:
            for chunk in chunks:
                if len(pending) > 2 * options.processes:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, chunk))
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a packing process was killed, perhaps for lack of memory; rerun to resume") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _one_by_one(pack_one: PackOne, items: list[Item]) -> Iterator[Packed | Unusable]:
    for item in items:
        try:
            yield pack_one(item)
        except Unusable as problem:
            yield problem


def _pack_chunk(
    folder: Path, options: PackOptions, pack_one: PackOne, map_items: MapItems, numbered: tuple[int, list[Item]]
) -> tuple[Tally, bool]:
    """Write one shard, unless it is there. Returns its counts, and whether it was there."""
    number, items = numbered
    path, record = folder / f"{number:05d}.tar", folder / f".{number:05d}.json"
    digest = _digest(items, options)
    if record.exists():
        known = read_json_object(record)
        if known.pop("digest") == digest and path.exists() == (known["packed"] > 0):
            return Tally(**known), True
    webdataset = import_extra("webdataset", user="packing shards", extra="data")
    tally, digits = Tally(), max(4, len(str(options.shard_size - 1)))
    with atomic_file(path) as temporary, webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as tar:
        for item, result in zip(items, map_items(pack_one, items), strict=True):
            if isinstance(result, Unusable):
                _skip(tally, item, result)
                continue
            tar.write({"__key__": f"{number:05d}{tally.packed:0{digits}d}", **result.files})
            tally.packed += 1
            tally.resized += result.resized
            tally.captions += max(1, len(item.captions)) if options.captions else 0
    if not tally.packed:
        path.unlink()
    write_json(record, {"digest": digest, **asdict(tally)})
    return tally, False


def _skip(tally: Tally, item: Item, problem: Unusable) -> None:
    tally.skip(problem.reason, f"{item.name}: {problem.detail}" if problem.detail else item.name)


def _digest(items: list[Item], options: PackOptions) -> str:
    """What a shard depends on: items and options. Of a file its size and modification time stand for its content."""
    digest = blake2b(json.dumps([options.shard_size, options.max_side, options.captions]).encode(), digest_size=16)
    for item in items:
        image: object = str(item.image)
        if isinstance(item.image, bytes):
            image = blake2b(item.image, digest_size=16).hexdigest()
        elif isinstance(item.image, Path):
            try:
                stat = item.image.stat()
                image = [str(item.image), stat.st_size, stat.st_mtime_ns]
            except OSError:
                image = [str(item.image), "missing"]
        line = [item.name, image, item.captions, item.metadata]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()
