"""From the configuration to open data: shards with their embedding caches, and the built-in shapes made on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import FastimagenConfig
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5_NAMES, T5Encoder, encoder_identity, is_random_encoder, text_width
from ..text.tiny_t5 import build_tiny_t5
from .embedding_cache import EmbeddingCache, EmbedReport, cache_path, captions_hash, embed_shards, open_cache
from .loader import Batch, Loader
from .order import Order
from .shards import Shard, open_shards

Say = Callable[[str], None]
TINY_T5_WIDTH = 64
SHORT_NAMES = f"{next(iter(T5_NAMES))} ... {list(T5_NAMES)[-1]}, or a folder"


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


def check_data(config: FastimagenConfig) -> None:
    """Raise ValueError, with one line that says what to change, if data and text encoder do not belong together.

    data.shapes renders the built-in shapes, so the shards must be these; and only they work with the built-in text
    encoder, whose weights are random. Opens no shards.
    """
    data, encoder = config.data, config.text.encoder
    if data.shapes is not None:
        shards = data.shards if isinstance(data.shards, str) else ""
        if Path(shards).name != "train":
            raise ValueError(f"fastimagen.data.shapes renders FOLDER/train: set data.shards to it, not {data.shards!r}")
        if Path(shards).exists() and not _are_shapes(shards):
            raise ValueError(
                f"fastimagen.data.shapes renders the built-in shapes, but {shards} contains other shards: "
                f"set fastimagen.data.shapes to null and fastimagen.text.encoder to a trained T5 ({SHORT_NAMES})"
            )
    elif is_random_encoder(encoder) and not all(map(_are_shapes, _sources(config))):
        raise ValueError(
            f"the text encoder {encoder} has random weights and is for the built-in shapes only: "
            f"set fastimagen.text.encoder to a trained T5 ({SHORT_NAMES})"
        )


def _sources(config: FastimagenConfig) -> list[str]:
    """Where the training and validation shards are."""
    sources: list[str] = []
    for source in (config.data.shards, config.data.validation or ()):
        sources += [source] if isinstance(source, str) else source
    return sources


def _are_shapes(source: str) -> bool:
    """Whether a folder of shards is a split of the built-in shapes: shapes.json is written beside the splits."""
    return (Path(source).parent / "shapes.json").is_file()


def embed_all(config: FastimagenConfig, *, say: Say, rank: int = 0, world_size: int = 1) -> EmbedReport:
    """Fill the embedding caches of training and validation shards; complete ones are kept. Raises as `check_data`."""
    check_data(config)
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
    check_data(config)
    assert isinstance(config.data.shards, str)
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
