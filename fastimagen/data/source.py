"""The data that a configuration names: shards, their embedding caches, and the built-in shapes, rendered on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import CascadeConfig, DataConfig, FastimagenConfig, HeldOutConfig
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5_NAMES, encoder_identity, hub_commit, is_path, is_random_encoder, text_width
from ..text.tiny_t5 import build_tiny_t5
from .embedding_cache import (
    EmbeddingCache,
    NoEmbeddings,
    cache_path,
    captions_hash,
    open_cache,
)
from .held_out import SelectedEmbeddings, choose_held_out, select_samples
from .loader import Batch, Embeddings, Loader
from .order import Order
from .shard import LOST, Reading, Shard
from .shards import list_shards, open_shards
from .where import parse_conditions

Source = str | tuple[str, ...]
Say = Callable[[str], None]

TINY_T5_WIDTH = 64
TRAINED_T5 = f"a trained T5 ({next(iter(T5_NAMES))} ... {list(T5_NAMES)[-1]}, or a folder)"


@dataclass(frozen=True)
class Split:
    """Open shards and, for text-conditioned cascades, their embedding caches (else None).

    held_out: number of samples that were taken out of these shards for validation.
    """

    shards: list[Shard]
    caches: Sequence[Embeddings] | None
    held_out: int = 0

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
        crop_seed: int,
        pin: bool = False,
    ) -> Loader:
        """A loader of training batches: images of `size`, or random crops of side `crop` from them.

        seed: of the order; crop_seed: of the crops, which differ between stages. pin: in pinned memory, which only a
        process with a GPU can allocate."""
        order = Order([len(shard) for shard in self.shards], seed)
        return Loader(
            self.shards,
            self.caches,
            order,
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
    everything, validation = open_split(config.data.shards, config, with_text=with_text), config.data.validation
    if isinstance(validation, HeldOutConfig):
        return _hold_out(everything, validation)
    return everything, None if validation is None else open_split(validation, config, with_text=with_text)


def count_training_samples(config: FastimagenConfig) -> int:
    """The number of samples of data.shards without those that validation takes. Reads no captions."""
    shards, validation = (
        _apply_where(Split(open_source(config.data.shards, config), None)).shards,
        config.data.validation,
    )
    held_out = choose_held_out(shards, validation) if isinstance(validation, HeldOutConfig) else []
    return sum(map(len, shards)) - sum(int(mask.sum()) for mask in held_out)


def _hold_out(everything: Split, config: HeldOutConfig) -> tuple[Split, Split]:
    """Divide a split into training and validation samples."""
    masks = choose_held_out(everything.shards, config)
    validation = _select(everything, masks)
    # The training split reports what the index excludes, in all shards.
    validation = replace(validation, shards=[replace(shard, excluded={}, filtered={}) for shard in validation.shards])
    return replace(_select(everything, [~mask for mask in masks]), held_out=len(validation)), validation


def _select(split: Split, masks: Sequence[np.ndarray]) -> Split:
    """The samples of a mask (S,) for each shard."""
    caches = split.caches and [
        SelectedEmbeddings(cache, np.flatnonzero(mask)) for cache, mask in zip(split.caches, masks)
    ]
    return Split([select_samples(shard, mask) for shard, mask in zip(split.shards, masks)], caches)


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


# ---- which data and text encoder belong together


def check_data(config: FastimagenConfig) -> None:
    """Raise ValueError, with one line that says what to change, if data and text encoder do not belong together.

    data.shapes renders the built-in shapes, so that data.shards must be these; and only they work with the built-in
    text encoder, whose weights are random. Opens no shards.
    """
    parse_conditions(config.data.where)
    if config.data.shapes is not None:
        _check_shapes(config.data)
    if uses_text(config):
        check_encoder(config)


def _check_shapes(data: DataConfig) -> None:
    own_images = f"set fastimagen.data.shapes to null and fastimagen.text.encoder to {TRAINED_T5}"
    if not isinstance(data.shards, str) or Path(data.shards).name != "train":
        raise ValueError(
            f"fastimagen.data.shapes renders the built-in shapes into FOLDER/train, but fastimagen.data.shards is "
            f"{data.shards!r}: set it to FOLDER/train, or, for your own images, {own_images}"
        )
    if Path(data.shards).exists() and not _are_shapes(data.shards):
        raise ValueError(
            f"fastimagen.data.shapes renders the built-in shapes, but {data.shards} contains other shards: {own_images}"
        )


def check_encoder(config: FastimagenConfig) -> None:
    """Raise ValueError if the text encoder is missing, or has random weights and the data are not the shapes."""
    encoder = config.text.encoder
    built_in = _builds_encoder(config) or is_random_encoder(encoder)
    if not built_in and is_path(encoder) and not Path(encoder).is_dir():
        raise ValueError(f"fastimagen.text.encoder: there is no folder {encoder}: set it to {TRAINED_T5}")
    if not built_in:
        return
    for source in _sources(config):
        if not _are_shapes(source) and not _renders(source, config.data):
            raise ValueError(
                f"the text encoder {encoder} has random weights and works with the built-in shapes only, not with "
                f"{source}: set fastimagen.text.encoder to {TRAINED_T5}"
            )


def uses_text(config: FastimagenConfig) -> bool:
    """Whether a stage is conditioned on text; all presets are. Cascades with changes count as such until resolved."""
    if not isinstance(config.cascade, CascadeConfig):
        return True
    return any(stage.unet.text_dim for stage in config.cascade.stages)


def image_channels(config: FastimagenConfig) -> int:
    """Channels of the images that the stages take; 3 for a preset, and until a cascade with changes is resolved."""
    return config.cascade.channels if isinstance(config.cascade, CascadeConfig) else 3


def _sources(config: FastimagenConfig) -> list[str]:
    """Where the training and validation shards are."""
    return [path for source in shard_sources(config.data) for path in ([source] if isinstance(source, str) else source)]


def shard_sources(data: DataConfig) -> list[Source]:
    """data.shards, and data.validation where it names shards of its own."""
    if data.validation is None or isinstance(data.validation, HeldOutConfig):
        return [data.shards]
    return [data.shards, data.validation]


def _are_shapes(source: str) -> bool:
    """Whether shards are built-in shapes: shapes.json is written beside the folders of their splits."""
    folder = Path(source)
    if not folder.is_dir():  # a tar or a pattern
        folder = folder.parent
    return (folder.parent / "shapes.json").is_file()


def _renders(source: str, data: DataConfig) -> bool:
    """Whether `prepare_shapes` will write these shards."""
    return data.shapes is not None and Path(source).parent == _shapes_folder(data) and not Path(source).exists()


def _shapes_folder(data: DataConfig) -> Path:
    """The folder that contains the built-in shapes, for a configuration that `_check_shapes` accepts."""
    assert isinstance(data.shards, str)
    return Path(data.shards).parent


def _builds_encoder(config: FastimagenConfig) -> bool:
    """Whether `prepare_shapes` will build the built-in text encoder: text.encoder is a folder that is missing."""
    if config.data.shapes is None or not uses_text(config) or Path(config.text.encoder).exists():
        return False
    return is_path(config.text.encoder) or Path(config.text.encoder).parent == _shapes_folder(config.data)


# ---- the empty caption and the built-in shapes


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
    shard = open_source(config.data.shards, config)[0]
    return cache_path(Path(shard.path).parent / "empty_caption.tar", identity_of(config), config.text.cache)


def prepare_shapes(config: FastimagenConfig, *, say: Say) -> None:
    """Render the built-in shapes and build their text encoder, if the configuration asks for them and they are missing.

    Raises ValueError if the folder contains other files.
    """
    from .shapes import has_shards, write_shards

    shapes = config.data.shapes
    if shapes is None:
        return
    check_data(config)
    folder, encoder = _shapes_folder(config.data), config.text.encoder
    build_encoder = _builds_encoder(config)
    if not has_shards(folder, shapes.count, shapes.size, shapes.seed):
        say(f"{folder}: rendering {shapes.count} captioned shapes of {shapes.size}x{shapes.size}")
        write_shards(folder, shapes.count, shapes.size, shapes.seed)
    if build_encoder:
        say(f"{encoder}: building the built-in text encoder (random weights, for the shapes only)")
        captions = [caption for shard in open_shards(config.data.shards) for caption in shard.captions()]
        build_tiny_t5(encoder, captions, dim=TINY_T5_WIDTH)


def pin_encoder(config: FastimagenConfig) -> FastimagenConfig:
    """The same with the commit of a text encoder on the hub as its revision: what it names cannot change.

    Raises ValueError and ImportError as `encoder_identity` does.
    """
    commit = hub_commit(config.text.encoder, config.text.revision) if uses_text(config) else None
    if commit is None:
        return config
    return config.model_copy(update={"text": config.text.model_copy(update={"revision": commit})})


def encoder_width(config: FastimagenConfig) -> int:
    """Width of the text embeddings; that of the built-in encoder is known before it is built."""
    return TINY_T5_WIDTH if _builds_encoder(config) else text_width(config.text.encoder)
