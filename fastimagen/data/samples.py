"""What the loader reads: the samples of a shard, and their text embeddings."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Samples(Protocol):
    """The samples of a shard; Shard and ListedShard are ones."""

    @property
    def path(self) -> str: ...

    @property
    def excluded(self) -> dict[str, int]: ...

    @property
    def filtered(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def image(self, index: int) -> bytes: ...

    def captions_of(self, index: int) -> list[str]: ...

    def number_of_captions(self, index: int) -> int: ...


class Embeddings(Protocol):
    """The text embeddings of a shard's samples; EmbeddingCache is one."""

    def __len__(self) -> int: ...

    def caption(self, index: int, number: int) -> Tensor: ...  # (L, E), not padded, of caption `number` of the sample
