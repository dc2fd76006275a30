"""The shards that a configuration names: folders, globs, ranges and URLs of tars, opened or fetched."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from glob import escape, glob, has_magic
from pathlib import Path

import numpy as np

from ..extras import import_extra
from ..files import atomic_file, first_line
from ..words import counted
from .shard import LOST, PLAIN, Reading, Shard
from .shard_index import index_shard, load_or_build_index, store_index

logger = logging.getLogger(__name__)

URL = re.compile(r"(?:pipe|file):|[a-zA-Z][a-zA-Z0-9+.-]*://")


def list_shards(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The tars of a folder (sorted), glob, {000..999} range, path or URL, or of a list of these in its order.

    Raises ValueError that names the source if it has no shards, and if a shard is listed twice.
    """
    if not isinstance(source, (str, Path)):
        shards = [shard for part in source for shard in list_shards(part)]
        if not shards:
            raise ValueError("the list of shards is empty")
        shard, count = Counter(shards).most_common(1)[0]
        if count > 1:
            raise ValueError(f"shard {shard} is listed twice")
        return shards
    pattern = str(source)
    if os.path.isdir(pattern):
        shards = sorted(glob(os.path.join(escape(pattern), "*.tar")))
        if not shards:
            raise ValueError(f"no *.tar in the folder {pattern}")
        return shards
    if "{" in pattern and not os.path.exists(pattern):
        braceexpand = import_extra("braceexpand", user="a {000..999} range of shards", extra="data")
        try:
            expanded = list(braceexpand.braceexpand(pattern))
        except braceexpand.UnbalancedBracesError as error:
            raise ValueError(f"shards {pattern}: {error}") from error
        if expanded != [pattern]:
            return _expand(expanded)
    if URL.match(pattern) or os.path.isfile(pattern):
        return [pattern]
    shards = sorted(glob(pattern)) if has_magic(pattern) else []
    if not shards:
        raise ValueError(f"no shards: {pattern} is not a tar, folder, URL or pattern that matches a file")
    return shards


def _expand(paths: list[str]) -> list[str]:
    """The shards of the patterns that a {000..999} range stands for. Some files may be missing, not all."""
    shards, first_problem = [], None
    for path in paths:
        try:
            shards += list_shards(path)
        except ValueError as problem:
            if has_magic(path):
                raise
            first_problem = first_problem or problem
            shards.append(path)
    if first_problem is not None and not any(map(os.path.exists, shards)):
        raise first_problem
    return shards


def open_shards(
    source: str | Path | Sequence[str | Path],
    *,
    cache: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    reading: Reading = PLAIN,
    max_lost: float = 0.0,
) -> list[Shard]:
    """All shards of `source` (see `list_shards`), those of URLs fetched into the folder `cache`.

    Indices are read from files next to the tars, or written there. Each rank starts at another shard, so that ranks
    share the work of the first run. A shard that is missing, empty or damaged has no samples, and excludes as many
    "in lost shards" as the others have on average; the log names it. Raises ValueError as `list_shards` does, as
    `index_shard` does if more than the share `max_lost` of the samples is lost, for a URL without cache, for a failed
    download, and if there are no samples.
    """
    paths = list_shards(source)
    shards: dict[int, Shard] = {}
    lost: dict[int, ValueError] = {}
    for step in range(len(paths)):
        index = (step + rank * len(paths) // world_size) % len(paths)
        path = fetch(paths[index], cache) if URL.match(paths[index]) else paths[index]
        try:
            shards[index] = load_or_build_index(path, reading)
        except ValueError as error:
            lost[index] = error
            shards[index] = _lost_shard(path, 0)
    if lost:
        mean = sum(map(len, shards.values())) / max(1, len(paths) - len(lost))
        if len(lost) / len(paths) > max_lost or not mean:
            raise _too_many_lost(lost, len(paths), max_lost)
        for index, problem in lost.items():
            shards[index] = _lost_shard(shards[index].path, round(mean))
            logger.warning("lost shard, counted with %d samples: %s", round(mean), problem)
    excluded: Counter[str] = Counter()
    for shard in shards.values():
        excluded.update(shard.excluded)
    samples = sum(map(len, shards.values()))
    reasons = ", ".join(f"{count} {reason}" for reason, count in excluded.items()) or "nothing"
    if not samples:
        raise ValueError(f"no samples in {counted(len(shards), 'shard')} ({paths[0]} ...); excluded: {reasons}")
    level = logging.WARNING if excluded else logging.INFO
    found = f"{counted(samples, 'sample')} in {counted(len(shards), 'shard')}"
    logger.log(level, "%s; excluded: %s", found, reasons)
    return [shards[index] for index in range(len(paths))]


def _lost_shard(path: str, samples: int) -> Shard:
    """A shard without samples, which excludes `samples`."""
    extents, names = np.empty((0, 6), dtype=np.int64), np.empty(0, dtype=np.bytes_)
    return Shard(path, LOST, extents, names, {"in lost shards": samples} if samples else {})


def _too_many_lost(lost: dict[int, ValueError], total: int, max_lost: float) -> ValueError:
    first = next(iter(lost.values()))
    if max_lost == 0 or total == 1:
        return first
    return ValueError(
        f"{len(lost)} of {total} shards cannot be read, more than fastimagen.data.max_bad_share = {max_lost} allows: "
        f"{first}"
    )


def fetch(url: str, cache: str | Path | None) -> str:
    """Download a shard, once, with webdataset's gopen into the folder `cache`; returns its path.

    The file appears when it is complete and indexed. If several processes need the same shard, one downloads it.
    Raises ValueError if there is no cache folder, the download fails or the tar is damaged.
    """
    if cache is None:
        raise ValueError(f"shard {url} is remote: set fastimagen.data.cache to a folder for downloaded shards")
    webdataset = import_extra("webdataset", user="downloading shards", extra="data")
    stem = (re.findall(r"[\w.-]+\.tar\b", url) or ["shard.tar"])[-1]
    target = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return str(target)
        logger.info("downloading %s", url)
        try:
            with atomic_file(target) as temporary:
                with webdataset.gopen(url) as stream, open(temporary, "wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                shard = _index_download(temporary)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot fetch shard {url}: {first_line(error)}") from error
        store_index(replace(shard, path=str(target)), PLAIN)
    return str(target)


def _index_download(temporary: Path) -> Shard:
    """As `index_shard`; errors do not name the temporary file."""
    try:
        return index_shard(temporary)
    except ValueError as error:
        raise ValueError(str(error).replace(f"shard {temporary}", "it")) from None
