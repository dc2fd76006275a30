"""The data that a configuration names: shards and their embedding caches, for training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import CascadeConfig, FastimagenConfig
from ..data_config import DataConfig, HeldOutConfig
from ..text.embeddings import TextEmbeddings
from ..text.t5 import encoder_identity, hub_commit
from ..words import counted
from .embedding_cache import (
    EmbeddingCache,
    NoEmbeddings,
    cache_path,
    captions_hash,
    open_cache,
)
from .held_out import SelectedEmbeddings, choose_held_out, select_samples
from .loader import Batch, Embeddings, Loader
from .mixture import Mixture, Part
from .order import Order
from .shard import LOST, Reading, Shard
from .shards import list_shards, open_shards

Source = str | tuple[str, ...]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """Open shards and, for text-conditioned cascades, their embedding caches (else None).

    held_out: number of samples that were taken out of these shards for validation; mixture: the data sets that the
    shards belong to, in this order, if there are several with weights.
    """

    shards: list[Shard]
    caches: Sequence[Embeddings] | None
    held_out: int = 0
    mixture: Sequence[Part] = ()

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def order(self, seed: int) -> Order | Mixture:
        """The order of the samples. Raises ValueError if a data set of the mixture has none."""
        sizes = [len(shard) for shard in self.shards]
        return Mixture(self.mixture, sizes, seed) if self.mixture else Order(sizes, seed)

    def describe_mixture(self) -> list[str]:
        """A line for each data set of a mixture: its share and its samples."""
        lines, shards, weights = [], iter(self.shards), sum(part.weight for part in self.mixture)
        for part in self.mixture:
            samples = sum(map(len, islice(shards, part.shards)))
            lines.append(
                f"{part.name}: {part.weight / weights:.1%} of the samples, out of {samples} in "
                f"{counted(part.shards, 'shard')}"
            )
        return lines

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
        crop_seed: int,
        pin: bool = False,
    ) -> Loader:
        """A loader of training batches: images of `size`, or random crops of side `crop` from them.

        seed: of the order; crop_seed: of the crops, which differ between stages. pin: in pinned memory, which only a
        process with a GPU can allocate."""
        return Loader(
            self.shards,
            self.caches,
            self.order(seed),
            held_out=self.held_out,
            size=size,
            crop_size=crop,
            channels=image_channels(config),
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            threads=config.data.threads,
            max_bad_share=config.data.max_bad_share,
            flip=config.data.flip,
            crop_seed=crop_seed,
            pin=pin,
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
            crop_seed=0,
        )
        return loader.fixed_batch(indices)

    def examples(
        self, count: int, config: FastimagenConfig, *, size: int
    ) -> tuple[list[str], TextEmbeddings | None, Tensor]:
        """The first `count` samples: captions, embeddings, images (n, C, size, size) in [-1, 1]."""
        count = min(count, len(self))
        batch = self.fixed_batch(config, range(count), size=size, crop=None)
        captions = islice((shard.caption(index) for shard in self.shards for index in range(len(shard))), count)
        return list(captions), batch.text, batch.images_for(torch.device("cpu"))


def open_data(config: FastimagenConfig, *, with_text: bool) -> tuple[Split, Split | None]:
    """The training split and the validation split, None without validation.

    Raises ValueError as `open_split`, and if holding samples out leaves one of them empty.
    """
    everything, validation = _open_training(config, with_text=with_text), config.data.validation
    if isinstance(validation, HeldOutConfig):
        return _hold_out(everything, validation)
    return everything, None if validation is None else open_split(validation, config, with_text=with_text)


def _open_training(config: FastimagenConfig, *, with_text: bool) -> Split:
    """The samples of data.shards; of all data sets of a mixture."""
    splits = [open_split(source, config, with_text=with_text) for source in config.data.training]
    mixture = [
        Part(source.name, source.weight, len(split.shards)) for source, split in zip(config.data.mixture, splits)
    ]
    if not mixture:
        return splits[0]
    shards = [shard for split in splits for shard in split.shards]
    path, count = Counter(shard.path for shard in shards).most_common(1)[0]
    if count > 1:
        raise ValueError(f"fastimagen.data.shards: shard {path} is in two data sets of the mixture")
    caches = [cache for split in splits for cache in split.caches or ()]
    return Split(shards, caches if with_text else None, mixture=mixture)


def count_training_samples(config: FastimagenConfig) -> int:
    """The number of samples of data.shards without those that validation takes. Reads no captions."""
    splits = [_apply_where(Split(open_source(source, config), None)) for source in config.data.training]
    shards, validation = [shard for split in splits for shard in split.shards], config.data.validation
    held_out = choose_held_out(shards, validation) if isinstance(validation, HeldOutConfig) else []
    return sum(map(len, shards)) - sum(int(mask.sum()) for mask in held_out)


def _hold_out(everything: Split, config: HeldOutConfig) -> tuple[Split, Split]:
    """Divide a split into training and validation samples."""
    masks = choose_held_out(everything.shards, config)
    validation = _select(everything, masks)
    # The training split reports what the index excludes, in all shards.
    shards = [replace(shard, excluded={}, filtered={}) for shard in validation.shards]
    validation = replace(validation, shards=shards, mixture=())  # a fixed sequence, of whatever data set
    return replace(_select(everything, [~mask for mask in masks]), held_out=len(validation)), validation


def _select(split: Split, masks: Sequence[np.ndarray]) -> Split:
    """The samples of a mask (S,) for each shard."""
    caches = split.caches and [
        SelectedEmbeddings(cache, np.flatnonzero(mask)) for cache, mask in zip(split.caches, masks)
    ]
    shards = [select_samples(shard, mask) for shard, mask in zip(split.shards, masks)]
    return Split(shards, caches, mixture=split.mixture)


def open_split(source: Source, config: FastimagenConfig, *, with_text: bool) -> Split:
    """Open shards and caches. Raises ValueError that names the key to change or the command to run."""
    shards = open_source(source, config)
    if not with_text:
        return _apply_where(Split(shards, None))
    identity = identity_of(config)
    caches: list[Embeddings] = [
        NoEmbeddings() if shard.stamp == LOST else open_embeddings(shard, config, identity) for shard in shards
    ]
    return _apply_where(Split(shards, caches))


def identity_of(config: FastimagenConfig) -> dict[str, str]:
    """Of the text encoder: what its embeddings depend on."""
    text = config.text
    return encoder_identity(
        text.encoder, revision=text.revision, max_length=text.max_length, encoding=text.encoding, dtype=text.dtype
    )


def open_embeddings(shard: Shard, config: FastimagenConfig, identity: dict[str, str]) -> EmbeddingCache:
    """The cache of a shard. Raises ValueError that names the command that writes it."""
    return open_cache(
        cache_path(shard.path, identity, config.text.cache),
        identity=identity,
        keys=shard.keys,
        captions_hash=captions_hash(shard.keys, shard.captions()),
        counts=shard.counts,
    )


def _apply_where(split: Split) -> Split:
    """The samples that data.where takes."""
    masks = [shard.passes for shard in split.shards]
    if all(mask is None for mask in masks):
        return split
    kept = [np.ones(len(shard), dtype=bool) if mask is None else mask for shard, mask in zip(split.shards, masks)]
    if not any(mask.any() for mask in kept):
        filtered: Counter[str] = Counter()
        for shard in split.shards:
            filtered.update(shard.filtered)
        counts = ", ".join(f"{count} by {condition}" for condition, count in filtered.most_common())
        raise ValueError(f"fastimagen.data.where leaves no samples: {counts}")
    return _select(split, kept)


def open_source(source: Source, config: FastimagenConfig, *, captions: bool = False) -> list[Shard]:
    """The shards of one of `shard_sources`. captions: a sample needs one also if no stage is conditioned on text.

    Raises ValueError that names the key if there are none.
    """
    try:
        list_shards(source)
    except ValueError as error:
        if source == config.data.validation:
            raise ValueError(
                f"fastimagen.data.validation: {error}; set it to null to train without validation, or to "
                f'{{"share": 0.01}} to hold out samples of data.shards'
            ) from None
        raise ValueError(
            f"fastimagen.data.shards: {error}; pack a folder of images with: fastimagen shards folder"
        ) from None
    data = config.data
    reading = Reading(data.caption_key, data.where, captions=captions or uses_text(config))
    return open_shards(source, cache=data.cache, reading=reading, max_lost=data.max_bad_share)


def uses_text(config: FastimagenConfig) -> bool:
    """Whether a stage is conditioned on text; all presets are. Cascades with changes count as such until resolved."""
    if not isinstance(config.cascade, CascadeConfig):
        return True
    return any(stage.unet.text_dim for stage in config.cascade.stages)


def image_channels(config: FastimagenConfig) -> int:
    """Channels of the images that the stages take; 3 for a preset, and until a cascade with changes is resolved."""
    return config.cascade.channels if isinstance(config.cascade, CascadeConfig) else 3


def shard_sources(data: DataConfig) -> list[Source]:
    """The data sets of data.shards, and data.validation where it names shards of its own."""
    if data.validation is None or isinstance(data.validation, HeldOutConfig):
        return data.training
    return [*data.training, data.validation]


# ---- text


def empty_text(config: FastimagenConfig) -> TextEmbeddings | None:
    """The embeddings (1, L, E) of the empty caption, which stands for dropped ones with text.encoding "if"; else None.

    Raises ValueError if `embed_all` has not written them.
    """
    if config.text.encoding != "if":
        return None
    cache = open_cache(
        empty_caption_path(config),
        identity=identity_of(config),
        keys=["empty"],
        captions_hash=captions_hash(["empty"], [""]),
    )
    return TextEmbeddings.from_list([cache[0]])


def empty_caption_path(config: FastimagenConfig) -> Path:
    """Where the embeddings of the empty caption are: with those of the first training shard."""
    shard = open_source(config.data.training[0], config)[0]
    return cache_path(Path(shard.path).parent / "empty_caption.tar", identity_of(config), config.text.cache)


def pin_encoder(config: FastimagenConfig) -> FastimagenConfig:
    """The same with the commit of a text encoder on the hub as its revision: what it names cannot change.

    Raises ValueError and ImportError as `encoder_identity` does.
    """
    commit = hub_commit(config.text.encoder, config.text.revision) if uses_text(config) else None
    if commit is None:
        return config
    return config.model_copy(update={"text": config.text.model_copy(update={"revision": commit})})
