"""The cache of text embeddings: one safetensors file per shard and encoder, next to the tar.

A shard of S samples has U distinct captions. The file contains
    tokens (sum of lengths, E) bfloat16: the tokens of all distinct captions, without padding
    offsets (U + 1,) int64: distinct caption n is tokens[offsets[n]:offsets[n + 1]]
    sums (U,) int64: the checksum of each distinct caption's tokens, verified whenever they are read
    rows (C,) int64: the distinct caption of each of C captions, those of a sample after each other; C = S in general
    starts (S + 1,) int64: those of sample i begin at starts[i]; only where a sample has several
    keys: the names of the samples, JSON as uint8
and, in its header, the encoder's identity, the hash of keys and captions, that of all tensors but the tokens, and the
schema. Reading a file that differs
from what is expected is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..files import first_line, remove_abandoned, write_safetensors
from ..text.embeddings import TextEmbeddings

logger = logging.getLogger(__name__)

SCHEMA = "fastimagen.embeddings.1"
ADVICE = "; rebuild it with: fastimagen embed --config CONFIG"


class Encoder(Protocol):
    """The part of a text encoder that the cache uses; T5Encoder is one."""

    dim: int

    @property
    def truncated(self) -> int: ...

    @property
    def unknown(self) -> int: ...

    def encode(self, captions: Sequence[str], batch_size: int) -> TextEmbeddings: ...

    def count_tokens(self, captions: Sequence[str]) -> list[int]: ...

    def identity(self) -> dict[str, str]: ...


class Shard(Protocol):
    """The part of a shard that the cache uses; data.shards.Shard is one."""

    @property
    def path(self) -> str: ...

    @property
    def keys(self) -> list[str]: ...

    @property
    def counts(self) -> np.ndarray | None: ...

    def captions(self) -> list[str]: ...


def captions_hash(keys: Sequence[str], captions: Sequence[str]) -> str:
    """sha256 of a shard's sample keys and captions, in order."""
    return hashlib.sha256(json.dumps([list(keys), list(captions)]).encode()).hexdigest()


def cache_path(tar_path: str | Path, identity: Mapping[str, str], cache_dir: str | Path | None = None) -> Path:
    """FOLDER/STEM.ENCODER.safetensors, where FOLDER is `cache_dir` or the folder of the tar.

    identity: of the encoder.
    """
    slug = re.sub(r"[^\w.-]", "-", identity["encoder"].replace("/", "--"))
    folder = Path(tar_path).parent if cache_dir is None else Path(cache_dir)
    return folder / f"{Path(tar_path).stem}.{slug}.safetensors"


# ---- writing


def write_cache(
    path: str | Path,
    keys: Sequence[str],
    captions: Sequence[str],
    encoder: Encoder,
    batch_size: int,
    counts: np.ndarray | None = None,
) -> None:
    """Encode the captions of a shard, each distinct one once, and write them to `path` atomically.

    keys: S; captions: as many as `counts` (S,) adds up to, one for each sample by default. Batches hold captions of
    similar numbers of tokens. Raises ValueError if the numbers differ or an embedding is not finite.
    """
    expected = len(keys) if counts is None else int(counts.sum())
    if expected != len(captions):
        raise ValueError(
            f"{len(keys)} sample keys, {expected} captions expected, but {len(captions)} captions for {path}"
        )
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    distinct = list(rows)
    tokens: list[Tensor] = [torch.empty(0, encoder.dim)] * len(distinct)
    already_truncated, already_unknown = encoder.truncated, encoder.unknown
    tokens_of = encoder.count_tokens(distinct)
    order = sorted(range(len(distinct)), key=lambda row: tokens_of[row])  # similar lengths: little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        encoded = encoder.encode([distinct[row] for row in batch], batch_size)
        for row, caption_tokens in zip(batch, encoded.to(device="cpu", dtype=torch.bfloat16).unpadded()):
            if not caption_tokens.isfinite().all():
                raise ValueError(f"the text encoder returned infinite or NaN embeddings for {distinct[row]!r:.80}")
            tokens[row] = caption_tokens.clone()  # (L, E); a copy, because a view keeps the padded batch in memory
    lengths = torch.tensor([len(caption_tokens) for caption_tokens in tokens], dtype=torch.int64)  # (U,)
    tensors = {
        "tokens": torch.cat([torch.empty(0, encoder.dim, dtype=torch.bfloat16), *tokens]),  # (sum of lengths, E)
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),  # (U + 1,)
        "rows": torch.tensor([rows[caption] for caption in captions], dtype=torch.int64),  # (S,)
        "sums": torch.tensor([_checksum(caption_tokens) for caption_tokens in tokens], dtype=torch.int64),  # (U,)
        "keys": torch.from_numpy(np.frombuffer(json.dumps(list(keys)).encode(), dtype=np.uint8).copy()),
    }
    if counts is not None:
        tensors["starts"] = torch.from_numpy(np.concatenate([[0], counts.cumsum(dtype=np.int64)]))  # (S + 1,)
    header = encoder.identity() | {
        "schema": SCHEMA,
        "samples": captions_hash(keys, captions),
        "dim": str(encoder.dim),
        "truncated": str(encoder.truncated - already_truncated),
        "unknown": str(encoder.unknown - already_unknown),
        "tables": _hash_of_tables({name: tensor.numpy() for name, tensor in tensors.items() if name != "tokens"}),
    }
    write_safetensors(path, tensors, header)


def _checksum(tokens: Tensor) -> int:
    """The sum of the bytes, as 64-bit words, modulo 2**64, of contiguous bfloat16 tokens (L, E); signed.

    It finds every changed byte, and costs a fifth of a CRC: a caption of T5-XXL has 100 kB.
    """
    words = tokens.contiguous().view(torch.int16).numpy().reshape(-1)
    words = words.view(np.int64) if words.size % 4 == 0 else words
    return int(words.sum(dtype=np.int64))


def _hash_of_tables(tables: Mapping[str, np.ndarray]) -> str:
    """sha256 of the tensors that say which tokens are whose: all but the tokens."""
    found = hashlib.sha256()
    for name in sorted(tables):
        found.update(name.encode() + tables[name].tobytes())
    return found.hexdigest()


@dataclass
class EmbedReport:
    """What `embed_shards` did; all but the first two count the samples of written and of kept shards."""

    written: int = 0
    """Shards encoded."""
    kept: int = 0
    """Shards whose cache was complete already."""
    captions: int = 0
    """Captions of all samples."""
    truncated: int = 0
    """Distinct captions truncated to the encoder's max_length."""
    unknown: int = 0
    """Distinct captions with unknown tokens, in the shards that counted them."""
    uncounted: int = 0
    """Kept shards of an earlier fastimagen, which did not count unknown tokens."""
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
    for folder in {path.parent for path in paths} if rank == 0 else ():
        remove_abandoned(folder)
    report = EmbedReport()
    own_shards = range(rank, len(shards), world_size)
    others = [index for index in range(len(shards)) if index % world_size != rank]
    for done, index in enumerate([*own_shards, *others], start=1):
        if done > len(own_shards) and paths[index].exists():
            continue  # its rank has written it, or will check it
        with claim(paths[index]) as free:
            if not free or (done > len(own_shards) and paths[index].exists()):
                continue  # another rank encodes it now, because it had nothing left to do or this one is late
            keys, captions, counts = list(shards[index].keys), list(shards[index].captions()), shards[index].counts
            samples_hash = captions_hash(keys, captions)
            cache = _open_matching(paths[index], identity, keys, samples_hash, counts)
            if cache is None:
                write_cache(paths[index], keys, captions, encoder, batch_size, counts)
                cache = open_cache(
                    paths[index], identity=identity, keys=keys, captions_hash=samples_hash, counts=counts
                )
                report.written += 1
            else:
                report.kept += 1
        empty = sum(not caption.strip() for caption in captions)
        if empty:
            logger.warning("%s: %d of %d captions are empty", shards[index].path, empty, len(captions))
        report.captions += len(captions)
        report.truncated += cache.truncated
        report.unknown += cache.unknown or 0
        report.uncounted += cache.unknown is None
        report.empty += empty
        report.tokens += int(cache.offsets[-1])
        if progress:
            progress(done, len(own_shards))
    return report


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may write the cache `path`: no other one holds its lock. The kernel releases the lock of a
    process that dies, and another rank takes the shard."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "w")  # noqa: SIM115 - closed below
    except OSError:  # the folder is read-only: complete caches in it can still be checked
        yield True
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def _refuse_collisions(shards: Sequence[Shard], paths: Iterable[Path]) -> None:
    owners: dict[Path, Shard] = {}
    for shard, path in zip(shards, paths):
        other = owners.setdefault(path, shard)
        if other is shard:
            continue
        if other.path == shard.path:
            raise ValueError(f"shard {shard.path} is listed twice, for example for training and for validation")
        raise ValueError(
            f"shards {other.path} and {shard.path} would share the embedding cache {path}: "
            f"rename one of them, or set fastimagen.text.cache to null to keep each cache next to its shard"
        )


def _open_matching(
    path: Path, identity: Mapping[str, str], keys: Sequence[str], samples_hash: str, counts: np.ndarray | None
) -> EmbeddingCache | None:
    """The cache if it is complete and belongs to these samples; None if it must be written."""
    if not path.exists():
        return None
    try:
        return open_cache(path, identity=identity, keys=keys, captions_hash=samples_hash, counts=counts)
    except ValueError as error:
        logger.info("replacing %s: %s", path, error)
        return None


# ---- reading


class EmbeddingCache:
    """Embeddings of a shard's samples, memory-mapped: cache[i] reads only the tokens of sample i.

    Threads may share it; unpickling opens the file again. `open_cache` also checks that it belongs to the shard.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import safe_open

        self.path = Path(path)
        file = safe_open(os.fspath(path), framework="pt")
        self.metadata: dict[str, str] = file.metadata() or {}
        if self.metadata.get("schema") != SCHEMA:
            raise ValueError(f"{self.path} is not an embedding cache of schema {SCHEMA}")
        self.tokens: Tensor = file.get_tensor("tokens")  # (sum of lengths, E), a view of the mapped file
        self.offsets: np.ndarray = file.get_tensor("offsets").numpy()
        self.rows: np.ndarray = file.get_tensor("rows").numpy()
        names = set(file.keys())
        self.starts: np.ndarray | None = file.get_tensor("starts").numpy() if "starts" in names else None
        self.sums: np.ndarray | None = file.get_tensor("sums").numpy() if "sums" in names else None
        self._file = file

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Path]]:
        return EmbeddingCache, (self.path,)

    @property
    def dim(self) -> int:
        """Width E of the embeddings."""
        return int(self.metadata["dim"])

    @property
    def truncated(self) -> int:
        """Distinct captions that were truncated to the encoder's max_length."""
        return int(self.metadata["truncated"])

    @property
    def unknown(self) -> int | None:
        """Distinct captions with tokens that the encoder does not know; None in caches that did not count them."""
        return int(self.metadata["unknown"]) if "unknown" in self.metadata else None

    def keys(self) -> list[str]:
        """The names of the samples."""
        return json.loads(self._file.get_tensor("keys").numpy().tobytes())

    def __len__(self) -> int:
        return len(self.rows) if self.starts is None else len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        """Embeddings (L, E) of sample `index`, bfloat16, without padding; of its first caption. Raises IndexError
        beyond the last sample, and ValueError if the file's bytes have changed."""
        return self.caption(index, 0).clone()  # pickling a view for another process would pickle the whole file

    def caption(self, index: int, number: int) -> Tensor:
        """Embeddings (L, E) of caption `number` of sample `index`, a view of the file. Raises as cache[index]."""
        return self._distinct(int(self.rows[index if self.starts is None else self.starts[:-1][index] + number]))

    def _distinct(self, row: int) -> Tensor:
        tokens = self.tokens[int(self.offsets[row]) : int(self.offsets[row + 1])]  # (L, E)
        if self.sums is not None and _checksum(tokens) != self.sums[row]:
            raise ValueError(
                f"embedding cache {self.path} is damaged: bytes have changed; delete it and rerun fastimagen embed"
            )
        return tokens

    def check(self) -> None:
        """Read everything. Raises ValueError if bytes have changed; caches without checksums are not checked."""
        self.check_tables()
        for row in range(len(self.offsets) - 1):
            self._distinct(row)

    def check_tables(self) -> None:
        """Raises ValueError if other bytes than tokens have changed; caches without their hash are not checked."""
        from safetensors import safe_open

        with safe_open(
            os.fspath(self.path), framework="np"
        ) as file:  # with "pt", safetensors 0.8 keeps 32 bytes a call
            tables = {name: file.get_tensor(name) for name in file.keys() if name != "tokens"}  # noqa: SIM118
        if self.metadata.get("tables") not in (None, _hash_of_tables(tables)):
            raise ValueError(f"embedding cache {self.path} is damaged: bytes of its tables have changed")


def open_cache(
    path: str | Path,
    *,
    identity: Mapping[str, str],
    keys: Sequence[str],
    captions_hash: str,
    counts: np.ndarray | None = None,
) -> EmbeddingCache:
    """Open a shard's cache after checking that it is complete and belongs to this encoder and these captions.

    identity: `T5Encoder.identity()` or `encoder_identity(...)`; keys, captions_hash, counts: of the shard now. Raises
    ValueError with one line that says what differs and which command rebuilds the cache.
    """
    from safetensors import SafetensorError

    try:
        cache = EmbeddingCache(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no embedding cache {path}{ADVICE}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"embedding cache {path} is damaged ({first_line(error)}){ADVICE}") from error
    except ValueError as error:
        raise ValueError(f"{error}{ADVICE}") from error
    for name, expected in identity.items():
        found = cache.metadata.get(name, "none")
        if found != expected:
            raise ValueError(f"embedding cache {path} was written with {name} {found}, this run has {expected}{ADVICE}")
    if cache.metadata.get("samples") != captions_hash:
        difference = _difference(cache.keys(), keys)
        raise ValueError(f"embedding cache {path} belongs to other samples: {difference}{ADVICE}")
    if not _is_consistent(cache, counts):
        raise ValueError(f"embedding cache {path} is damaged: its tensors do not fit together{ADVICE}")
    try:
        cache.check_tables()
    except ValueError as error:
        raise ValueError(f"{error}{ADVICE}") from error
    return cache


def check_download(path: Path) -> None:
    """Read all of a cache that has been downloaded. Raises ValueError, one line without its temporary name, if it is
    damaged."""
    from safetensors import SafetensorError

    try:
        EmbeddingCache(path).check()
    except (SafetensorError, ValueError) as error:
        raise ValueError("it is damaged: bytes have changed") from error


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """How the samples of a cache differ from those of the shard."""
    if len(found) != len(expected):
        return f"it has {len(found)}, the shard has {len(expected)}"
    for old, new in zip(found, expected):
        if old != new:
            return f'sample "{new}" of the shard was "{old}"'
    return "captions of the shard have changed"


def _is_consistent(cache: EmbeddingCache, counts: np.ndarray | None) -> bool:
    """Whether shapes, dtype and indices of the tensors agree."""
    offsets, rows = cache.offsets, cache.rows
    tokens_fit = cache.tokens.shape == (int(offsets[-1]), cache.dim) and cache.tokens.dtype == torch.bfloat16
    offsets_ascend = offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
    rows_fit = rows.size == 0 or (rows.min() >= 0 and rows.max() < len(offsets) - 1)
    if counts is None or cache.starts is None:
        counts_fit = (counts is None) == (cache.starts is None)
    else:
        counts_fit = np.array_equal(np.diff(cache.starts), counts)
    return bool(tokens_fit and offsets_ascend and rows_fit and counts_fit)
