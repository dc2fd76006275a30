"""The cache of text embeddings: one safetensors file per shard and encoder, next to the tar.

tokens (sum of lengths, E) bfloat16: the tokens of all distinct captions of the shard, without padding
offsets (number of distinct captions + 1,) int64: distinct caption n is tokens[offsets[n]:offsets[n + 1]]
rows (S,) int64: the distinct caption of each of the shard's S samples;  keys: their names, JSON as uint8
Header: the encoder's identity, the hash of keys and captions, the schema. A difference on reading is an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..files import write_safetensors
from ..text.embeddings import TextEmbeddings

logger = logging.getLogger(__name__)

SCHEMA = "fastimagen.embeddings.1"
REBUILD = "fastimagen embed --config CONFIG"


class Encoder(Protocol):
    """The part of a text encoder that the cache uses; T5Encoder is one."""

    dim: int
    truncated: int

    def encode(self, captions: Sequence[str], batch_size: int) -> TextEmbeddings: ...

    def identity(self) -> dict[str, str]: ...


class Shard(Protocol):
    """The part of a shard that the cache uses; data.shards.Shard is one."""

    @property
    def path(self) -> str: ...

    @property
    def keys(self) -> list[str]: ...

    def captions(self) -> list[str]: ...


def captions_hash(keys: Sequence[str], captions: Sequence[str]) -> str:
    """sha256 of a shard's sample keys and captions, in order."""
    return hashlib.sha256(json.dumps([list(keys), list(captions)]).encode()).hexdigest()


def cache_path(tar_path: str | Path, identity: Mapping[str, str] | str, cache_dir: str | Path | None = None) -> Path:
    """FOLDER/STEM.ENCODER.safetensors, where FOLDER is `cache_dir` or the folder of the tar.

    identity: of the encoder, or its "encoder" entry.
    """
    encoder = identity if isinstance(identity, str) else identity["encoder"]
    slug = re.sub(r"[^\w.-]", "-", encoder.replace("/", "--"))
    folder = Path(tar_path).parent if cache_dir is None else Path(cache_dir)
    return folder / f"{Path(tar_path).stem}.{slug}.safetensors"


# ---- writing


def write_cache(
    path: str | Path, keys: Sequence[str], captions: Sequence[str], encoder: Encoder, batch_size: int
) -> None:
    """Encode the captions of a shard, each distinct one once, and write them to `path` atomically.

    keys, captions: S each. Raises ValueError if their numbers differ or an embedding is not finite.
    """
    if len(keys) != len(captions):
        raise ValueError(f"{len(keys)} sample keys but {len(captions)} captions for {path}")
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    texts = list(distinct)
    tokens: list[Tensor] = [torch.empty(0, encoder.dim)] * len(texts)
    already_truncated = encoder.truncated
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths: little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        encoded = encoder.encode([texts[row] for row in batch], batch_size)
        for row, caption_tokens in zip(batch, encoded.to(device="cpu", dtype=torch.bfloat16).unpadded()):
            if not caption_tokens.isfinite().all():
                raise ValueError(f"the text encoder gave infinite or NaN embeddings for {texts[row]!r:.80}")
            tokens[row] = caption_tokens.clone()  # (L, E); a copy, because a view keeps the padded batch in memory
    lengths = torch.tensor([len(caption_tokens) for caption_tokens in tokens], dtype=torch.int64)  # (number,)
    tensors = {
        "tokens": torch.cat([torch.empty(0, encoder.dim, dtype=torch.bfloat16), *tokens]),  # (sum of lengths, E)
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),  # (number + 1,)
        "rows": torch.tensor([distinct[caption] for caption in captions], dtype=torch.int64),  # (S,)
        "keys": torch.from_numpy(np.frombuffer(json.dumps(list(keys)).encode(), dtype=np.uint8).copy()),
    }
    write_safetensors(
        path,
        tensors,
        encoder.identity()
        | {
            "schema": SCHEMA,
            "samples": captions_hash(keys, captions),
            "dim": str(encoder.dim),
            "truncated": str(encoder.truncated - already_truncated),
        },
    )


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_shards` did; the last four count written and kept shards."""

    written: int = 0
    """Shards encoded."""
    kept: int = 0
    """Shards whose cache was complete already."""
    captions: int = 0
    """Samples."""
    truncated: int = 0
    """Distinct captions cut to the encoder's max_length."""
    empty: int = 0
    """Samples with an empty caption."""
    tokens: int = 0
    """Tokens stored."""


def embed_shards(
    shards: Sequence[Shard],
    encoder: Encoder,
    *,
    cache_dir: str | Path | None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """Write the caches of shards rank, rank + world_size, ... of `shards`; caches that match are kept.

    A cache of the same encoder name that does not match is replaced; the log says why. To resume, call it again.
    progress(done, total) counts this rank's shards. Raises ValueError if two shards share a cache file, or as
    `write_cache` does.
    """
    identity = encoder.identity()
    paths = [cache_path(shard.path, identity, cache_dir) for shard in shards]
    _refuse_collisions(shards, paths)
    counts = dict.fromkeys(EmbedReport.__dataclass_fields__, 0)
    mine = range(rank, len(shards), world_size)
    for done, index in enumerate(mine, start=1):
        keys, captions = list(shards[index].keys), list(shards[index].captions())
        samples_hash = captions_hash(keys, captions)
        cache = _open_matching(paths[index], identity, keys, samples_hash)
        counts["written" if cache is None else "kept"] += 1
        if cache is None:
            write_cache(paths[index], keys, captions, encoder, batch_size)
            cache = open_cache(paths[index], identity=identity, keys=keys, captions_hash=samples_hash)
        empty = sum(not caption.strip() for caption in captions)
        if empty:
            logger.warning("%s: %d of %d captions are empty", shards[index].path, empty, len(captions))
        for name, more in (
            ("captions", len(keys)),
            ("truncated", cache.truncated),
            ("empty", empty),
            ("tokens", int(cache.offsets[-1])),
        ):
            counts[name] += more
        if progress:
            progress(done, len(mine))
    return EmbedReport(**counts)


def _refuse_collisions(shards: Sequence[Shard], paths: Iterable[Path]) -> None:
    owner: dict[Path, Shard] = {}
    for shard, path in zip(shards, paths):
        other = owner.setdefault(path, shard)
        if other is not shard:
            raise ValueError(
                f"shards {other.path} and {shard.path} would share the embedding cache "
                f"{path}: give them different names, or set text.cache to null"
            )


def _open_matching(
    path: Path, identity: Mapping[str, str], keys: Sequence[str], samples_hash: str
) -> EmbeddingCache | None:
    """The cache if it is complete and belongs to these samples; None if it must be written."""
    if not path.exists():
        return None
    try:
        return open_cache(path, identity=identity, keys=keys, captions_hash=samples_hash)
    except ValueError as error:
        logger.info("replacing %s: %s", path, error)
        return None


# ---- reading


class EmbeddingCache:
    """Embeddings of a shard's samples, memory-mapped: cache[i] reads the tokens of sample i only.

    Threads may share it; unpickling opens the file again. `open_cache` constructs it after checking the file.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import safe_open

        self.path = Path(path)
        file = safe_open(os.fspath(path), framework="pt")
        self.metadata: dict[str, str] = file.metadata() or {}
        if self.metadata.get("schema") != SCHEMA:
            raise ValueError(f"{self.path} is not an embedding cache of schema {SCHEMA}")
        self.tokens = file.get_slice("tokens")
        self.offsets: np.ndarray = file.get_tensor("offsets").numpy()
        self.rows: np.ndarray = file.get_tensor("rows").numpy()
        self._file = file

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Path]]:
        return EmbeddingCache, (self.path,)

    @property
    def dim(self) -> int:
        """Width E of the embeddings."""
        return int(self.metadata["dim"])

    @property
    def truncated(self) -> int:
        """Distinct captions that were cut to the encoder's max_length."""
        return int(self.metadata["truncated"])

    def keys(self) -> list[str]:
        """The names of the samples."""
        return json.loads(self._file.get_tensor("keys").numpy().tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Embeddings (L, E) of sample `index`, bfloat16, without padding. Raises IndexError beyond the last sample."""
        row = self.rows[index]
        # A copy: a view would take the whole mapped file along when a batch goes to another process.
        return self.tokens[int(self.offsets[row]) : int(self.offsets[row + 1])].clone()  # (L, E)


def open_cache(
    path: str | Path, *, identity: Mapping[str, str], keys: Sequence[str], captions_hash: str, rebuild: str = REBUILD
) -> EmbeddingCache:
    """Open a shard's cache after checking that it is complete and belongs to this encoder and these captions.

    identity: `T5Encoder.identity()` or `encoder_identity(...)`; keys, captions_hash: of the shard now. Raises
    ValueError with one line that says what differs and which command rebuilds the cache (`rebuild`)."""
    from safetensors import SafetensorError

    advice = f"; rebuild it with: {rebuild}"
    try:
        cache = EmbeddingCache(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no embedding cache {path}{advice}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"embedding cache {path} is damaged ({error}){advice}") from error
    except ValueError as error:
        raise ValueError(f"{error}{advice}") from error
    for name, wanted in identity.items():
        found = cache.metadata.get(name, "none")
        if found != wanted:
            raise ValueError(f"embedding cache {path} was made with {name} {found}, this run has {wanted}{advice}")
    if cache.metadata.get("samples") != captions_hash:
        difference = _difference(cache.keys(), keys)
        raise ValueError(f"embedding cache {path} belongs to other samples: {difference}{advice}")
    if not _is_consistent(cache):
        raise ValueError(f"embedding cache {path} is damaged: its tables contradict each other{advice}")
    return cache


def _difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    if len(found) != len(wanted):
        return f"it has {len(found)}, the shard has {len(wanted)}"
    for old, new in zip(found, wanted):
        if old != new:
            return f'sample "{new}" of the shard was "{old}"'
    return "captions of the shard have changed"


def _is_consistent(cache: EmbeddingCache) -> bool:
    offsets, rows = cache.offsets, cache.rows
    return (
        cache.tokens.get_shape() == [int(offsets[-1]), cache.dim]
        and offsets[0] == 0
        and bool((np.diff(offsets) >= 0).all())
        and cache.tokens.get_dtype() == "BF16"
        and (rows.size == 0 or (rows.min() >= 0 and rows.max() < len(offsets) - 1))
    )
