"""The shards that a configuration names: folders, globs, ranges and URLs of tars, as their manifests know them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from glob import escape, glob, has_magic
from pathlib import Path

from ..extras import import_extra
from ..words import counted
from .listed import ListedShard
from .listing import list_local, list_remote, lost_shard
from .remote.cache import RemoteCache
from .remote.transfer import URL, shown
from .shard import PLAIN, Reading

logger = logging.getLogger(__name__)


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
    cache: RemoteCache | None = None,
    rank: int = 0,
    world_size: int = 1,
    reading: Reading = PLAIN,
    max_lost: float = 0.0,
    trust: bool = False,
) -> list[ListedShard]:
    """All shards of `source` (see `list_shards`), known from the manifests of their folders. cache: for those of URLs.

    What a manifest does not know is indexed, and the manifest written by rank 0. Each rank starts at another shard, so
    that ranks share the work of the first run. trust: do not compare the manifest with the tars, because another
    process has. A shard that is missing, empty or damaged has no samples, and excludes as many "in lost shards" as the
    others have on average; the log names it. Raises ValueError as `list_shards` does, as `index_shard` does if more
    than the share `max_lost` of the samples is lost, for a URL without cache, and if there are no samples.
    """
    paths = list_shards(source)
    urls = [path for path in paths if URL.match(path)]
    shards, lost = list_local([path for path in paths if not URL.match(path)], reading, rank, world_size, trust=trust)
    if urls:
        if cache is None:
            raise ValueError(
                f"shard {shown(urls[0])} is remote: set fastimagen.data.cache to a folder for downloaded shards"
            )
        remote, also_lost = list_remote(urls, cache, reading, rank, world_size)
        shards, lost = shards | remote, lost | also_lost
    if lost:
        mean = sum(map(len, shards.values())) / max(1, len(shards))
        if len(lost) / len(paths) > max_lost or not mean:
            raise _too_many_lost(lost, len(paths), max_lost)
        for path, problem in lost.items():
            place = cache.place(path) if cache is not None and URL.match(path) else path
            shards[path] = lost_shard(str(place), round(mean))
            logger.warning("lost shard, counted with %s: %s", counted(round(mean), "sample"), problem)
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
    return [shards[path] for path in paths]


def _too_many_lost(lost: dict[str, ValueError], total: int, max_lost: float) -> ValueError:
    first = next(iter(lost.values()))
    if max_lost == 0 or total == 1:
        return first
    return ValueError(
        f"{len(lost)} of {total} shards cannot be read, more than fastimagen.data.max_bad_share = {max_lost} allows: "
        f"{first}"
    )
