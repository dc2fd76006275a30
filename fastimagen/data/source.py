"""From the configuration to open data: shards with their embedding caches, and the built-in shapes made on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import FastimagenConfig
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5Encoder, encoder_identity, text_width
from ..text.tiny_t5 import build_tiny_t5
from .embedding_cache import EmbeddingCache, EmbedReport, cache_path, captions_hash, embed_shards, open_cache
from .loader import Batch, Loader
from .order import Order
from .shards import Shard, open_shards

Say = Callable[[str], None]
TINY_T5_WIDTH = 64


@dataclass(frozen=True)
class Split:
    """Open shards and, for text-conditioned cascades, their embedding caches (else None)."""

    shards: list[Shard]
    caches: list[EmbeddingCache] | None

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def loader(
        self,
        config: FastimagenConfig,
        *,
        size: int,
        crop: int | None,
        global_batch: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        seed: int,
    ) -> Loader:
        """A loader of training batches: images of `size`, or random crops of side `crop` from them."""
        order = Order([len(shard) for shard in self.shards], seed)
        return Loader(
            self.shards,
            self.caches,
            order,
            size=size,
            crop_size=crop,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            threads=config.data.threads,
            max_bad_share=config.data.max_bad_share,
            seed=seed,
        )

    def fixed_batch(self, config: FastimagenConfig, indices: Sequence[int], *, size: int, crop: int | None) -> Batch:
        """Samples by number, always the same: for validation."""
        loader = self.loader(
            config,
            size=size,
            crop=crop,
            global_batch=len(indices),
            rank=0,
            world_size=1,
            micro_batch=len(indices),
            seed=0,
        )
        return loader.fixed_batch(indices)

    def examples(
        self, count: int, config: FastimagenConfig, *, size: int
    ) -> tuple[list[str], TextEmbeddings | None, Tensor]:
        """The first `count` samples: captions, embeddings, images (n, 3, size, size)."""
        count = min(count, len(self))
        batch = self.fixed_batch(config, range(count), size=size, crop=None)
        captions = [caption for shard in self.shards for caption in shard.captions()][:count]
        return captions, batch.text, batch.images


def open_split(source: str | tuple[str, ...], config: FastimagenConfig, *, with_text: bool) -> Split:
    """Open shards and caches. Raises ValueError naming the command that makes what is missing."""
    shards = open_shards(source, cache=config.data.cache)
    if not with_text:
        return Split(shards, None)
    text = config.text
    identity = encoder_identity(text.encoder, revision=text.revision, max_length=text.max_length)
    caches = [
        open_cache(
            cache_path(shard.path, identity, text.cache),
            identity=identity,
            keys=shard.keys,
            captions_hash=captions_hash(shard.keys, shard.captions()),
        )
        for shard in shards
    ]
    return Split(shards, caches)


def embed_all(config: FastimagenConfig, *, say: Say, rank: int = 0, world_size: int = 1) -> EmbedReport:
    """Fill the embedding caches of training and validation shards; what is complete is kept."""
    text = config.text
    sources = [source for source in (config.data.shards, config.data.validation) if source]
    shards = [shard for source in sources for shard in open_shards(source, cache=config.data.cache)]
    encoder = T5Encoder(text.encoder, revision=text.revision, max_length=text.max_length, device=_device())
    report = embed_shards(
        shards, encoder, cache_dir=text.cache, batch_size=text.batch_size, rank=rank, world_size=world_size
    )
    say(
        f"embedding cache: {report.written} shards written, {report.kept} kept, {report.captions} captions, "
        f"{report.truncated} cut to {text.max_length} tokens"
    )
    return report


def prepare_shapes(config: FastimagenConfig, *, say: Say) -> None:
    """Make the built-in shapes and their text encoder where the configuration asks for them and they are missing.

    Raises ValueError if the folder holds something else.
    """
    from .shapes import has_shards, write_shards

    shapes = config.data.shapes
    if shapes is None:
        return
    if not isinstance(config.data.shards, str) or Path(config.data.shards).name != "train":
        raise ValueError(
            f"data.shapes makes FOLDER/train, so data.shards must be one such folder, not {config.data.shards!r}"
        )
    folder, encoder = Path(config.data.shards).parent, Path(config.text.encoder)
    if not has_shards(folder, shapes.count, shapes.size, shapes.seed):
        say(f"{folder}: rendering {shapes.count} captioned shapes of {shapes.size}x{shapes.size}")
        write_shards(folder, shapes.count, shapes.size, shapes.seed)
    if not encoder.exists():
        say(f"{encoder}: building the small text encoder (random features, for the shapes only)")
        captions = [caption for shard in open_shards(config.data.shards) for caption in shard.captions()]
        build_tiny_t5(encoder, captions, dim=TINY_T5_WIDTH)


def is_embedded(config: FastimagenConfig) -> bool:
    """Whether the embedding caches are complete; looks at files only, the text encoder stays unloaded."""
    try:
        for source in (config.data.shards, config.data.validation):
            if source:
                open_split(source, config, with_text=True)
    except ValueError:
        return False
    return True


def encoder_width(config: FastimagenConfig) -> int:
    """Width of the text embeddings; the built-in encoder's is known before it is built."""
    if config.data.shapes is not None and not Path(config.text.encoder).exists():
        return TINY_T5_WIDTH
    return text_width(config.text.encoder)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
