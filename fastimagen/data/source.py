"""The data that a configuration names: shards and their embedding caches, for training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import CascadeConfig, FastimagenConfig
from ..data_config import DataConfig, DataSet, HeldOutConfig
from ..sizes import ImageSize
from ..text.embeddings import TextEmbeddings
from ..text.t5 import encoder_identity, hub_commit
from ..words import counted
from .batch import Batch
from .buckets import BucketOrder, bucket_numbers
from .embedding_cache import cache_path, captions_hash, open_cache
from .held_out import choose_held_out
from .listed import ListedShard
from .listed_embeddings import ListedEmbeddings, list_embeddings
from .loader import Loader
from .mixture import Mixture, Part
from .order import Order
from .remote.ahead import Ahead
from .remote.cache import RemoteCache
from .shard import Reading
from .shards import list_shards, open_shards

Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """Shards and, for text-conditioned cascades, their embeddings (else None); both are opened when they are read.

    held_out: number of samples that were taken out of these shards for validation; mixture: the data sets that the
    shards belong to, in this order, if there are several with weights.
    """

    shards: list[ListedShard]
    caches: Sequence[ListedEmbeddings] | None
    held_out: int = 0
    mixture: Sequence[Part] = ()

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def order(self, seed: int, *, buckets: Sequence[ImageSize] = (), batch: int = 1) -> Order | Mixture | BucketOrder:
        """The order of the samples; with buckets every `batch` of them has one. Raises ValueError if a data set of the
        mixture has none."""
        if buckets:
            return BucketOrder(self.shards, buckets, batch, seed, self.mixture)
        sizes = [len(shard) for shard in self.shards]
        return Mixture(self.mixture, sizes, seed) if self.mixture else Order(sizes, seed)

    def describe_mixture(self) -> list[str]:
        """A line for each data set of a mixture: its share and its samples."""
        lines, shards, weights = [], iter(self.shards), sum(part.weight for part in self.mixture)
        for part in self.mixture:
            samples = sum(map(len, islice(shards, part.shards)))
            factor = "" if part.loss_weight == 1 else f", with {part.loss_weight:g} times their loss"
            lines.append(
                f"{part.name}: {part.weight / weights:.1%} of the samples, out of {samples} in "
                f"{counted(part.shards, 'shard')}{factor}"
            )
        return lines

    def loader(
        self,
        config: FastimagenConfig,
        *,
        size: int | ImageSize,
        buckets: Sequence[ImageSize] = (),
        crop: int | None,
        global_batch: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        seed: int,
        crop_seed: int,
        pin: bool = False,
    ) -> Loader:
        """A loader of training batches: images of `size`, or of the sizes of buckets; or random crops of side `crop`.

        seed: of the order; crop_seed: of the crops, which differ between stages. pin: in pinned memory, which only a
        process with a GPU can allocate."""
        order = self.order(seed, buckets=buckets, batch=global_batch)
        return Loader(
            self.shards,
            self.caches,
            order,
            held_out=self.held_out,
            size=size,
            buckets=buckets,
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
            ahead=Ahead(self.shards, self.caches, order) if any(shard.remote for shard in self.shards) else None,
        )

    def fixed_batch(
        self, config: FastimagenConfig, indices: Sequence[int], *, size: int | ImageSize, crop: int | None
    ) -> Batch:
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

    def in_chunks(self, count: int, length: int, buckets: Sequence[ImageSize] = ()) -> list[tuple[Sequence[int], int]]:
        """The numbers of the first `count` samples, at most `length` at a time, with the number of their bucket."""
        if not buckets:
            return [(range(first, min(first + length, count)), 0) for first in range(0, count, length)]
        sizes = np.concatenate([shard.image_sizes for shard in self._first_shards(count)])[:count]
        chunks: list[tuple[Sequence[int], int]] = []
        for bucket in range(len(buckets)):
            own = np.flatnonzero(bucket_numbers(sizes, buckets) == bucket).tolist()
            chunks += [(own[first : first + length], bucket) for first in range(0, len(own), length)]
        return chunks

    def _first_shards(self, count: int) -> list[ListedShard]:
        """The shards that have the first `count` samples."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        return self.shards[: int(np.searchsorted(ends, count)) + 1]

    def examples(
        self, count: int, config: FastimagenConfig, *, size: int | ImageSize
    ) -> tuple[list[str], TextEmbeddings | None, Tensor]:
        """The first `count` samples: captions, embeddings, images (n, C, H, W) of `size` in [-1, 1]."""
        count = min(count, len(self))
        batch = self.fixed_batch(config, range(count), size=size, crop=None)
        captions = islice((shard.caption(index) for shard in self.shards for index in range(len(shard))), count)
        return list(captions), batch.text, batch.images_for(torch.device("cpu"))


def open_data(config: FastimagenConfig, *, with_text: bool, trust: bool = False) -> tuple[Split, Split | None]:
    """The training split and the validation split, None without validation.

    trust: take what manifests say, because another process has compared them with the shards. Raises ValueError as
    `open_split`, and if holding samples out leaves one of them empty.
    """
    everything = _open_training(config, with_text=with_text, trust=trust)
    validation = config.data.validation
    if isinstance(validation, HeldOutConfig):
        return _hold_out(everything, validation)
    if validation is None:
        return everything, None
    return everything, open_split(config.data.data_sets[-1], config, with_text=with_text, trust=trust)


def _open_training(config: FastimagenConfig, *, with_text: bool, trust: bool) -> Split:
    """The samples of data.shards; of all data sets of a mixture."""
    splits = [open_split(source, config, with_text=with_text, trust=trust) for source in config.data.training]
    mixture = [
        Part(source.name, source.weight, len(split.shards), source.loss_weight)
        for source, split in zip(config.data.mixture, splits)
    ]
    if not mixture:
        return splits[0]
    shards = [shard for split in splits for shard in split.shards]
    path, count = Counter(shard.path for shard in shards).most_common(1)[0]
    if count > 1:
        raise ValueError(f"fastimagen.data.shards: shard {path} is in two data sets of the mixture")
    caches = [cache for split in splits for cache in split.caches or ()]
    return Split(shards, caches if with_text else None, mixture=mixture)


def count_training_samples(config: FastimagenConfig, *, trust: bool = False) -> int:
    """The number of samples of data.shards without those that validation takes. Opens no shards."""
    everything, validation = _open_training(config, with_text=False, trust=trust), config.data.validation
    return len(_hold_out(everything, validation)[0] if isinstance(validation, HeldOutConfig) else everything)


def _hold_out(everything: Split, config: HeldOutConfig) -> tuple[Split, Split]:
    """Divide a split into training and validation samples."""
    largest = choose_held_out(everything.shards, config)
    # The training split reports what the index excludes, in all shards.
    validation = _select(everything, largest=largest, held_out=True, reports=False)
    validation = replace(validation, mixture=())  # a fixed sequence, of whatever data set
    return replace(_select(everything, largest=largest), held_out=len(validation)), validation


def _select(split: Split, *, reports: bool = True, **changes: Any) -> Split:
    """Some of the samples. reports: whether the shards keep their counts; changes: of the shards' Selection."""
    shards = [shard.select(replace(shard.selection, **changes), reports=reports) for shard in split.shards]
    caches = split.caches and [cache.select(shard) for cache, shard in zip(split.caches, shards)]
    return replace(split, shards=shards, caches=caches)


def open_split(source: DataSet, config: FastimagenConfig, *, with_text: bool, trust: bool = False) -> Split:
    """List shards and embeddings. trust: as in `open_data`. Raises ValueError that names the key to change or the
    command to run."""
    shards = open_source(source, config, trust=trust)
    if not with_text:
        return _apply_where(Split(shards, None), source)
    identity, folder = identity_of(config), config.text.cache
    caches = [list_embeddings(shard, identity, folder, trust=trust) for shard in shards]
    return _apply_where(Split(shards, caches), source)


def identity_of(config: FastimagenConfig) -> dict[str, str]:
    """Of the text encoder: what its embeddings depend on."""
    text = config.text
    return encoder_identity(
        text.encoder, revision=text.revision, max_length=text.max_length, encoding=text.encoding, dtype=text.dtype
    )


def _apply_where(split: Split, source: DataSet) -> Split:
    """The samples that the conditions of a data set take."""
    if all(shard.passes is None for shard in split.shards):
        return split
    kept = _select(split, where=True)
    if not len(kept):
        filtered: Counter[str] = Counter()
        for shard in split.shards:
            filtered.update(shard.filtered)
        counts = ", ".join(f"{count} by {condition}" for condition, count in filtered.most_common())
        of = f" of {source.name}" if source.name else ""
        raise ValueError(f"fastimagen.data.where leaves no samples{of}: {counts}")
    return kept


def open_source(
    source: DataSet,
    config: FastimagenConfig,
    *,
    captions: bool = False,
    rank: int = 0,
    world_size: int = 1,
    trust: bool = False,
) -> list[ListedShard]:
    """The shards of one of `data.data_sets`. captions: a sample needs one also if no stage is conditioned on text;
    rank, world_size, trust: as in `open_shards`.

    Raises ValueError that names the key if there are none.
    """
    try:
        list_shards(source.shards)
    except ValueError as error:
        if source.shards == config.data.validation:
            raise ValueError(
                f"fastimagen.data.validation: {error}; set it to null to train without validation, or to "
                f'{{"share": 0.01}} to hold out samples of data.shards'
            ) from None
        raise ValueError(
            f"fastimagen.data.shards: {error}; pack a folder of images with: fastimagen shards folder"
        ) from None
    return open_shards(
        source.shards,
        cache=remote_cache(config.data),
        reading=reading_of(source, config, captions=captions),
        max_lost=config.data.max_bad_share,
        rank=rank,
        world_size=world_size,
        trust=trust,
    )


def reading_of(source: DataSet, config: FastimagenConfig, *, captions: bool = False) -> Reading:
    """What counts as a sample of a data set, and what is read of it. captions: as in `open_source`."""
    captions = captions or uses_text(config)
    return Reading(source.caption_key, source.where, captions=captions, sizes=bool(config.data.buckets))


def remote_cache(data: DataConfig) -> RemoteCache | None:
    """Where remote shards are downloaded to; None if no folder is given."""
    if data.cache is None:
        return None
    return RemoteCache(data.cache, None if data.cache_gb is None else int(data.cache_gb * 1e9), data.remote)


def uses_text(config: FastimagenConfig) -> bool:
    """Whether a stage is conditioned on text; all presets are. Cascades with changes count as such until resolved."""
    if not isinstance(config.cascade, CascadeConfig):
        return True
    return any(stage.unet.text_dim for stage in config.cascade.stages)


def image_channels(config: FastimagenConfig) -> int:
    """Channels of the images that the stages take; 3 for a preset, and until a cascade with changes is resolved."""
    return config.cascade.channels if isinstance(config.cascade, CascadeConfig) else 3


# ---- text


def empty_text(config: FastimagenConfig) -> TextEmbeddings | None:
    """The embeddings (1, L, E) of the empty caption, which stands for dropped ones with text.encoding "if"; else None.

    Raises ValueError if `embed_all` has not written them.
    """
    if config.text.encoding != "if":
        return None
    path = empty_caption_path(config)
    shard = open_source(config.data.training[0], config, trust=True)[0]
    if shard.remote is not None and not path.exists():
        path = shard.remote.fetch_beside(path.name)
    cache = open_cache(
        path,
        identity=identity_of(config),
        keys=["empty"],
        captions_hash=captions_hash(["empty"], [""]),
    )
    return TextEmbeddings.from_list([cache[0]])


def empty_caption_path(config: FastimagenConfig) -> Path:
    """Where the embeddings of the empty caption are: with those of the first training shard."""
    shard = open_source(config.data.training[0], config, trust=True)[0]
    return cache_path(Path(shard.path).parent / "empty_caption.tar", identity_of(config), config.text.cache)


def pin_encoder(config: FastimagenConfig) -> FastimagenConfig:
    """The same with the commit of a text encoder on the hub as its revision: what it names cannot change.

    Raises ValueError and ImportError as `encoder_identity` does.
    """
    commit = hub_commit(config.text.encoder, config.text.revision) if uses_text(config) else None
    if commit is None:
        return config
    return config.model_copy(update={"text": config.text.model_copy(update={"revision": commit})})
