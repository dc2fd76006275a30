"""Writing samples as WebDataset tars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..extras import import_extra


def write_tars(folder: Path, samples: Iterable[Mapping[str, bytes]], shard_size: int) -> int:
    """Write samples as folder/00000.tar, ...: `shard_size` each, fewer in the last. Returns their number.

    samples: file extension -> content. A key is five digits for the shard and four or more for the sample in it. The
    tars depend on the samples alone: all files have the same modification time.
    """
    webdataset = import_extra("webdataset", user="packing shards", extra="data")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(4, len(str(shard_size - 1)))
    pattern = str(folder).replace("%", "%%") + "/%05d.tar"  # ShardWriter formats it with %
    count = 0
    with webdataset.ShardWriter(
        pattern, maxcount=shard_size, maxsize=float("inf"), verbose=0, encoder=False, mtime=0
    ) as writer:
        for sample in samples:
            shard, index = divmod(count, shard_size)
            writer.write({"__key__": f"{shard:05d}{index:0{digits}d}", **sample})
            count += 1
    return count
