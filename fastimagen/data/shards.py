"""WebDataset tars as random-access collections of (image, caption): an index of offsets, read with pread.

A sample is all files of a tar that share a key, the path up to the first dot of the file's name (webdataset's rule).
KEY.jpg (or another extension of an image) and KEY.txt make a sample, KEY.json is optional, other files are ignored.
Keys that do not make a sample are counted by reason. The index of TAR is stored as TAR.index next to it, because
indexing 10,000 samples takes half a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extras import import_extra
from ..files import atomic_file, first_line, write_safetensors
from ..images import IMAGE_EXTENSIONS
from ..words import counted
from .tar_headers import OpenFile, decode_name, tar_members

logger = logging.getLogger(__name__)

INDEX_FORMAT = "fastimagen.shard.1"
MAX_OPEN_FILES = 128
"""Open shards; training reads the few shards of a block at a time (order.py)."""

URL = re.compile(r"(?:pipe|file):|[a-zA-Z][a-zA-Z0-9+.-]*://")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key, extension
PRIVATE = re.compile(r"__[^/]*__($|/)")  # webdataset's metadata inside a tar


# ---- one shard


@dataclass(frozen=True, eq=False)
class Shard:
    """One local tar of S samples; threads may share it.

    path: the tar; stamp: its size and modification time when it was indexed; extents (S, 6) int64: offset and size in
    bytes of image, caption and json (size 0: no json); names (S,): keys as bytes; excluded: number of keys that do not
    make a sample, by reason. Reading raises ValueError if the tar has changed.
    """

    path: str
    stamp: str
    extents: np.ndarray
    names: np.ndarray
    excluded: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in the order of the tar."""
        return [decode_name(name) for name in self.names.tolist()]

    def key(self, index: int) -> str:
        """The key of one sample."""
        return decode_name(self.names[index])

    def image(self, index: int) -> bytes:
        """The image file of one sample, as stored."""
        return self._read(index, 0)

    def caption(self, index: int) -> str:
        """The caption of one sample, as stored."""
        return self._read(index, 2).decode("utf-8-sig")

    def captions(self) -> list[str]:
        """The captions of all samples, read from the tar now."""
        return [self.caption(index) for index in range(len(self))]

    def metadata(self, index: int) -> dict[str, Any]:
        """The json of one sample; {} if it has none."""
        return json.loads(self._read(index, 4) or "{}")

    def _read(self, index: int, column: int) -> bytes:
        offset, size = self.extents[index, column : column + 2].tolist()
        file = _open(self.path, self.stamp)  # this reference keeps the file open even if the cache drops it
        data = file.read(offset, size)
        if len(data) != size:
            raise ValueError(f"shard {self.path} has changed since it was indexed")
        return data


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open(path: str, stamp: str) -> OpenFile:
    file = OpenFile(path)
    if file.stamp != stamp:
        raise ValueError(f"shard {path} has changed since it was indexed")
    return file


# ---- the index


def index_shard(path: str | Path) -> Shard:
    """Index a tar from its headers and captions.

    Not samples, and counted: keys with "no image", "no caption", "empty caption" or a "caption not in UTF-8"; images
    with a "dot in the key", which webdataset's rule merges into one key; the "duplicate" second image or caption of a
    key. Raises ValueError, one line, if the file is missing, or as `tar_members` does.
    """
    try:
        file = OpenFile(str(path))
    except OSError as error:
        raise ValueError(f"cannot open shard {path}: {error.strerror}") from error
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    excluded: Counter[str] = Counter()
    dotted: Counter[str] = Counter()
    for name, offset, size in tar_members(file):
        match = MEMBER.fullmatch(name)
        if match is None or PRIVATE.match(name):
            continue
        key, extension = match[1], match[2].lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        files = samples.setdefault(key, {})
        if kind in ("image", "txt", "json"):
            excluded["duplicate"] += kind in files
            files.setdefault(kind, (offset, size))
        elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            dotted[key] += 1
    extents, names = [], []
    for key, files in samples.items():
        reason = _reason_to_exclude(file, files)
        if reason == "no image" and dotted[key]:
            excluded["dot in the key"] += dotted[key]
        elif reason:
            excluded[reason] += 1
        else:
            extents.append((*files["image"], *files["txt"], *files.get("json", (0, 0))))
            names.append(key.encode("utf-8", "surrogateescape"))
    return Shard(
        str(path),
        file.stamp,
        np.array(extents, dtype=np.int64).reshape(-1, 6),  # (S, 6)
        np.array(names, dtype=np.bytes_),
        {reason: count for reason, count in excluded.items() if count},
    )


def _reason_to_exclude(file: OpenFile, files: dict[str, tuple[int, int]]) -> str | None:
    """Why the files of one key do not make a sample; None if they do."""
    if "image" not in files:
        return "no image"
    if "txt" not in files:
        return "no caption"
    try:
        caption = file.read(*files["txt"]).decode("utf-8-sig")
    except UnicodeDecodeError:
        return "caption not in UTF-8"
    return None if caption.strip() else "empty caption"


def _load_or_build_index(path: str) -> Shard:
    """The shard with its stored index if that matches the tar, otherwise with a new one."""
    from safetensors import SafetensorError, safe_open

    try:
        stamp = OpenFile(path).stamp
        with safe_open(f"{path}.index", framework="np") as stored:
            header = stored.metadata() or {}
            if (header.get("format"), header.get("tar")) == (INDEX_FORMAT, stamp):
                names = stored.get_tensor("names")  # (S, longest) uint8
                names = names.view(f"S{names.shape[1]}").reshape(-1)  # (S,)
                return Shard(path, stamp, stored.get_tensor("places"), names, json.loads(header["excluded"]))
    except FileNotFoundError:
        pass  # no index yet; or no tar, which index_shard reports
    except (OSError, SafetensorError) as error:
        logger.warning("rebuilding %s.index: %s", path, error)
    shard = index_shard(path)
    _store_index(shard)
    return shard


def _store_index(shard: Shard) -> None:
    names = shard.names.view(np.uint8).reshape(len(shard), shard.names.itemsize)  # (S, longest)
    tensors = {"places": torch.from_numpy(shard.extents), "names": torch.from_numpy(names)}
    header = {"format": INDEX_FORMAT, "tar": shard.stamp, "excluded": json.dumps(shard.excluded)}
    try:
        write_safetensors(f"{shard.path}.index", tensors, header)
    except OSError as error:
        _warn_index_not_stored(os.path.dirname(shard.path), error.strerror or first_line(error))


@lru_cache
def _warn_index_not_stored(folder: str, reason: str) -> None:
    """Cached, so that each folder is reported once."""
    logger.warning("the index of shards in %s cannot be stored (%s): every run rebuilds it", folder, reason)


# ---- many shards


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
            return list_shards(expanded)
    if URL.match(pattern) or os.path.isfile(pattern):
        return [pattern]
    shards = sorted(glob(pattern)) if has_magic(pattern) else []
    if not shards:
        raise ValueError(f"no shards: {pattern} is not a tar, folder, URL or pattern that matches a file")
    return shards


def open_shards(
    source: str | Path | Sequence[str | Path], *, cache: str | Path | None = None, rank: int = 0, world_size: int = 1
) -> list[Shard]:
    """All shards of `source` (see `list_shards`), those of URLs fetched into the folder `cache`.

    Indices are read from files next to the tars, or written there. Each rank starts at another shard, so that ranks
    share the work of the first run. Raises ValueError as `list_shards` and `index_shard` do, for a URL without cache,
    for a failed download, and if there are no samples.
    """
    paths = list_shards(source)
    shards: dict[int, Shard] = {}
    for step in range(len(paths)):
        index = (step + rank * len(paths) // world_size) % len(paths)
        path = paths[index]
        shards[index] = _load_or_build_index(fetch(path, cache) if URL.match(path) else path)
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
        _store_index(replace(shard, path=str(target)))
    return str(target)


def _index_download(temporary: Path) -> Shard:
    """As `index_shard`; errors do not name the temporary file."""
    try:
        return index_shard(temporary)
    except ValueError as error:
        raise ValueError(str(error).replace(f"shard {temporary}", "it")) from None
