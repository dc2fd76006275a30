"""WebDataset tars as random-access collections of (image, caption): an index of offsets, read with pread.

A sample is all files of a tar that share a key, the path up to the first dot of the file's name (webdataset's rule).
KEY.jpg, .jpeg, .png or .webp and KEY.txt make a sample, KEY.json is optional, other files are ignored. Keys that do not
make a sample are counted by reason. The index of TAR is stored as TAR.index next to it, because indexing 10,000 samples
takes half a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_safetensors

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
"""File extensions of images, in upper or lower case."""

FORMAT = "fastimagen.shard.1"
BLOCK = 512  # bytes of a tar header; contents are padded to multiples of it
URL = re.compile(r"(?:pipe|file):|[a-zA-Z][a-zA-Z0-9+.-]*://")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
PRIVATE = re.compile(r"__[^/]*__($|/)")  # webdataset's metadata inside a tar


# ---- one shard


@dataclass(frozen=True, eq=False)
class Shard:
    """One local tar of S samples; any thread may read their contents.

    path: the tar; stamp: its size and modification time when it was indexed; places (S, 6) int64: offset and size in
    bytes of image, caption and json (size 0: no json); names (S,): keys as bytes; excluded: number of keys that do not
    make a sample, by reason. Reading raises ValueError if the tar has changed.
    """

    path: str
    stamp: str
    places: np.ndarray
    names: np.ndarray
    excluded: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in the order of the tar."""
        return [_text(name) for name in self.names.tolist()]

    def key(self, index: int) -> str:
        """The key of one sample."""
        return _text(self.names[index])

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
        offset, size = self.places[index, column : column + 2].tolist()
        file = _open(self.path, self.stamp)  # keeps the descriptor open even if the cache drops it
        data = os.pread(file.fd, size, offset)
        if len(data) != size:
            raise ValueError(f"shard {self.path} has changed since it was indexed")
        return data


class _File:
    """A file descriptor that stays open while the cache or a reading thread refers to it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size = stat.st_size
        self.stamp = f"{stat.st_size} bytes of {stat.st_mtime_ns} ns"

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(maxsize=128)
def _open(path: str, stamp: str) -> _File:
    file = _File(path)
    if file.stamp != stamp:
        raise ValueError(f"shard {path} has changed since it was indexed")
    return file


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# ---- the index


def index_shard(path: str | Path) -> Shard:
    """Walks the headers of a tar, and reads its captions.

    Not samples, and counted: keys with "no image", "no caption", "empty caption" or a "caption not in UTF-8";
    images with a "dot in the key", which webdataset's rule merges into one key; the "duplicate" second
    image or caption of a key. Raises ValueError, one line, if the file is missing, empty, truncated,
    damaged or no plain tar.
    """
    try:
        file = _File(str(path))
    except OSError as error:
        raise ValueError(f"cannot open shard {path}: {error.strerror}") from error
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    excluded: Counter[str] = Counter()
    dotted: Counter[str] = Counter()
    for name, offset, size in _walk(file, path):
        match = MEMBER.fullmatch(name)
        if match is None or PRIVATE.match(name):
            continue
        key, extension = match[1], match[2].lower()
        kind = "image" if extension in IMAGES else extension
        files = samples.setdefault(key, {})
        if kind in ("image", "txt", "json"):
            excluded["duplicate"] += kind in files
            files.setdefault(kind, (offset, size))
        elif extension.rpartition(".")[2] in IMAGES:
            dotted[key] += 1
    places, names = [], []
    for key, files in samples.items():
        reason = _fault(file.fd, files)
        if reason == "no image" and dotted[key]:
            excluded["dot in the key"] += dotted[key]
        elif reason:
            excluded[reason] += 1
        else:
            places.append((*files["image"], *files["txt"], *files.get("json", (0, 0))))
            names.append(key.encode("utf-8", "surrogateescape"))
    return Shard(
        str(path),
        file.stamp,
        np.array(places, dtype=np.int64).reshape(-1, 6),
        np.array(names, dtype=np.bytes_),
        {reason: n for reason, n in excluded.items() if n},
    )


def _fault(fd: int, files: dict[str, tuple[int, int]]) -> str | None:
    """Why these files of one key do not make a sample; None if they do."""
    if "image" not in files:
        return "no image"
    if "txt" not in files:
        return "no caption"
    offset, size = files["txt"]
    try:
        return None if os.pread(fd, size, offset).decode("utf-8-sig").strip() else "empty caption"
    except UnicodeDecodeError:
        return "caption not in UTF-8"


def _walk(file: _File, path: str | Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file of a tar: POSIX.1-1988 (ustar), pax and GNU long names."""
    fd, total = file.fd, file.size
    if not total:
        raise ValueError(f"shard {path} is empty: 0 bytes")
    offset = 0
    long: dict[str, str] = {}  # what pax and GNU headers say about the next file
    while True:
        header = os.pread(fd, BLOCK, offset)
        if len(header) < BLOCK:
            raise ValueError(f"shard {path} is truncated: it stops at byte {total} without a tar's end mark")
        if not any(header):
            break
        size, kind = _check(header, offset, path), header[156:157]
        offset += BLOCK
        if kind in b"123456":  # links, devices, directories have no content
            size, long = 0, {}
        elif kind in b"xL":
            content = os.pread(fd, size, offset)
            long |= _pax(content, path) if kind == b"x" else {"path": _text(content.rstrip(b"\0"))}
        elif kind not in b"gK":
            size = int(long.get("size", size))
            if offset + size > total:
                raise ValueError(f"shard {path} is truncated: a file ends at byte {offset + size} of {total}")
            if kind in b"07\0":
                yield long.get("path") or _name(header), offset, size
            long = {}
        offset += -(-size // BLOCK) * BLOCK
    if not offset:
        raise ValueError(f"shard {path} is empty: a tar without files")
    if any(os.pread(fd, 1 << 16, offset)):
        raise ValueError(f"shard {path} has data after a tar's end mark: are these several tars in one file?")


def _check(header: bytes, offset: int, path: str | Path) -> int:
    """Size in the header, once its checksum is right."""
    try:
        expected = int(header[148:156].strip(b"\0 "), 8)
        if header[124] == 0x80:  # GNU: binary, since octal digits end at 8 GiB
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        expected = size = -1
    if expected != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        what = f"damaged at byte {offset}" if offset else "not a tar"
        if header.startswith(b"\x1f\x8b"):
            what += ": it is compressed, and cannot be read at random places"
        raise ValueError(f"shard {path} is {what}")
    return size


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(content: bytes, path: str | Path) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header."""
    records = {}
    while content.strip(b"\0"):
        length = content.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise ValueError(f"shard {path} is damaged: it has an invalid pax header")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[int(length) :]
    if any(key.startswith("GNU.sparse.") for key in records):
        raise ValueError(f"shard {path} contains sparse files: write it without --sparse")
    return records


# ---- many shards


def list_shards(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The tars of a folder (sorted), glob, {000..999} range, path or URL, or of a list of these in its order.

    Raises ValueError that says what was looked for if there is nothing, or if a shard comes twice.
    """
    if not isinstance(source, (str, Path)):
        shards = [shard for part in source for shard in list_shards(part)]
        twice = [shard for shard, count in Counter(shards).items() if count > 1]
        if twice or not shards:
            raise ValueError(f"shard {twice[0]} is listed twice" if twice else "the list of shards is empty")
        return shards
    pattern = str(source)
    if os.path.isdir(pattern):
        shards = sorted(glob(os.path.join(escape(pattern), "*.tar")))
        if not shards:
            raise ValueError(f"no *.tar in the folder {pattern}")
        return shards
    if "{" in pattern and not os.path.exists(pattern):
        from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # stubs lack the error

        try:
            expanded = list(braceexpand(pattern))
        except UnbalancedBracesError as error:
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
    share the work of the first start. Raises ValueError as `list_shards` and `index_shard` do, for a URL without cache,
    for a failed download, and if there are no samples.
    """
    paths = list_shards(source)
    shards: dict[int, Shard] = {}
    for i in range(len(paths)):
        i = (i + rank * len(paths) // world_size) % len(paths)
        shards[i] = _indexed(fetch(paths[i], cache) if URL.match(paths[i]) else paths[i])
    excluded: Counter[str] = Counter()
    for shard in shards.values():
        excluded.update(shard.excluded)
    samples = sum(map(len, shards.values()))
    reasons = ", ".join(f"{count} {reason}" for reason, count in excluded.items()) or "nothing"
    if not samples:
        raise ValueError(f"no sample in {len(shards)} shards ({paths[0]} ...): left out {reasons}")
    logger.log(
        logging.WARNING if excluded else logging.INFO,
        "%d samples in %d shards; left out: %s",
        samples,
        len(shards),
        reasons,
    )
    return [shards[i] for i in range(len(paths))]


def fetch(url: str, cache: str | Path | None) -> str:
    """Download a shard, once, with webdataset's gopen into the folder `cache`; returns its path.

    The file appears complete, after it was indexed. If several processes need the same shard, one downloads it.
    Raises ValueError if there is no cache folder, the download fails or the tar is damaged.
    """
    from webdataset import gopen

    if cache is None:
        raise ValueError(f"shard {url} is remote: set data.cache to a folder for downloaded shards")
    stem = (re.findall(r"[\w.-]+\.tar\b", url) or ["shard.tar"])[-1]
    target = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return str(target)
        logger.info("fetching %s", url)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with gopen(url) as stream, open(temporary, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            shard = index_shard(temporary)
            os.replace(temporary, target)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].replace(f"shard {temporary}", "it")
            raise ValueError(f"cannot fetch shard {url}: {reason}") from error
        finally:
            temporary.unlink(missing_ok=True)
        _keep_index(replace(shard, path=str(target)))
    return str(target)


def _indexed(path: str) -> Shard:
    """The shard with its stored index if that matches the tar, otherwise with a new one."""
    from safetensors import SafetensorError, safe_open

    try:
        stamp = _File(path).stamp
        with safe_open(f"{path}.index", framework="np") as kept:
            header = kept.metadata() or {}
            if (header.get("format"), header.get("tar")) == (FORMAT, stamp):
                names = kept.get_tensor("names")  # (n, longest) uint8
                return Shard(
                    path,
                    stamp,
                    kept.get_tensor("places"),
                    names.view(f"S{names.shape[1]}").reshape(-1),
                    json.loads(header["excluded"]),
                )
    except FileNotFoundError:
        pass  # no index yet, or no tar: then index_shard raises
    except (OSError, SafetensorError) as error:
        logger.warning("rebuilding %s.index: %s", path, error)
    shard = index_shard(path)
    _keep_index(shard)
    return shard


def _keep_index(shard: Shard) -> None:
    names = shard.names.view(np.uint8).reshape(len(shard), shard.names.itemsize)  # (n, longest)
    tensors = {"places": torch.from_numpy(shard.places), "names": torch.from_numpy(names)}
    try:
        write_safetensors(
            f"{shard.path}.index",
            tensors,
            {"format": FORMAT, "tar": shard.stamp, "excluded": json.dumps(shard.excluded)},
        )
    except OSError as error:
        _warn_unkept(os.path.dirname(shard.path), error.strerror)


@lru_cache
def _warn_unkept(folder: str, reason: str) -> None:
    logger.warning("the index of shards in %s cannot be stored (%s): every start rebuilds it", folder, reason)
