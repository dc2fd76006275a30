"""One WebDataset tar as a random-access collection of (image, captions, metadata), read with pread.

KEY.jpg (or another extension of an image) and KEY.txt make a sample, KEY.json is optional. shard_index.py finds them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .key_hash import hash_keys
from .tar_headers import OpenFile, decode_name

MAX_OPEN_FILES = 128
"""Open shards; training reads the few shards of a block at a time (order.py)."""


@dataclass(frozen=True)
class Reading:
    """What counts as a sample.

    caption_key: the key in KEY.json with the caption or the list of captions; None reads KEY.txt. where: conditions on
    KEY.json, as `parse_conditions` takes them. captions: whether a sample needs one. sizes: whether the sizes of the
    images are read, which does not change what counts.
    """

    caption_key: str | None = None
    where: tuple[str, ...] = ()
    captions: bool = True
    sizes: bool = False

    @property
    def suffix(self) -> str:
        """Of the files of indices and manifests: other readings have others. "" for PLAIN."""
        if self == PLAIN:
            return ""
        text = json.dumps([self.caption_key, self.where, self.captions, *(["sizes"] if self.sizes else [])])
        return f".{hashlib.sha256(text.encode()).hexdigest()[:8]}"


PLAIN = Reading()
"""KEY.txt has the caption, and all samples are taken."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One local tar of S samples; threads may share it.

    path: the tar; stamp: its size and modification time when it was indexed, or LOST; extents (S, 6) int64: offset and
    size in bytes of image, caption and json (size 0: none); names (S,): keys as bytes; excluded: number of keys that do
    not make a sample, by reason; caption_key: of the captions in the json, None for those in the .txt; counts (S,):
    captions of each sample, None for one; passes (S,) bool: whether data.where takes the sample; filtered: those it
    does not take, by condition; image_sizes (S, 2) uint16: width and height, 0 for what is not an image, None if the
    reading has no sizes; samples_hash: of all keys and captions of the tar (embedding_cache.captions_hash), ""
    if captions are not read; file: the open tar, which may be deleted while it is read; None opens it when it is read.
    Reading raises ValueError if the tar has changed.
    """

    path: str
    stamp: str
    extents: np.ndarray
    names: np.ndarray
    excluded: dict[str, int]
    caption_key: str | None = None
    counts: np.ndarray | None = None
    passes: np.ndarray | None = None
    filtered: dict[str, int] = field(default_factory=dict)
    samples_hash: str = ""
    image_sizes: np.ndarray | None = None
    file: OpenFile | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def hashes(self) -> np.ndarray:
        """The hash of each key, (S,) uint64."""
        return hash_keys(self.names)

    @property
    def ends(self) -> tuple[str, ...]:
        """The first and the last key."""
        return (self.key(0), self.key(len(self) - 1)) if len(self) else ()

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
        """The caption of one sample, as stored; the first one of several. "" if it has none."""
        return self.captions_of(index)[0]

    def captions_of(self, index: int) -> list[str]:
        """All captions of one sample."""
        if self.caption_key is None:
            return [self._read(index, 2).decode("utf-8-sig")]
        return captions_in(self.metadata(index), self.caption_key)

    def number_of_captions(self, index: int) -> int:
        """How many captions a sample has."""
        return 1 if self.counts is None else int(self.counts[index])

    def captions(self) -> list[str]:
        """The captions of all samples, all those of a sample after each other, read from the tar now."""
        return [caption for index in range(len(self)) for caption in self.captions_of(index)]

    def metadata(self, index: int) -> dict[str, Any]:
        """The json of one sample; {} if it has none."""
        return json.loads(self._read(index, 4) or "{}")

    def select(self, mask: np.ndarray) -> Shard:
        """The shard with only the samples of a mask (S,)."""
        arrays = {name: getattr(self, name) for name in ("extents", "names", "counts", "passes", "image_sizes")}
        return replace(self, **{name: values[mask] for name, values in arrays.items() if values is not None})

    def _read(self, index: int, column: int) -> bytes:
        offset, size = self.extents[index, column : column + 2].tolist()
        file = self.file or _open(self.path, self.stamp)  # stays open while it is referred to
        data = file.read(offset, size)
        if len(data) != size:
            raise ValueError(f"shard {self.path} has changed since it was indexed")
        return data


def captions_in(metadata: dict[str, Any], key: str) -> list[str]:
    """The captions under a key: a text, or a list of texts. Blank ones, and values of other types, are left out."""
    value = metadata.get(key)
    values = value if isinstance(value, list) else [value]
    return [caption for caption in values if isinstance(caption, str) and caption.strip()]


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open(path: str, stamp: str) -> OpenFile:
    file = OpenFile(path)
    if file.stamp != stamp:
        raise ValueError(f"shard {path} has changed since it was indexed")
    return file
