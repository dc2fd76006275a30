"""Data and a text encoder that belong together; the built-in shapes and the built-in encoder are made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import FastimagenConfig
from ..data_config import DataConfig
from ..text.t5 import T5_NAMES, is_path, is_random_encoder, text_width
from ..text.tiny_t5 import build_tiny_t5
from ..text.tokens import CaptionTokens
from ..words import counted
from .listed import ListedShard
from .shards import open_shards
from .source import Say, open_source, uses_text
from .where import parse_conditions

TINY_T5_WIDTH = 64
MAX_PIECES = 8192
"""Of an encoder that is built from captions of one's own: words and single characters."""
TRAINED_T5 = f"a trained T5 ({next(iter(T5_NAMES))} ... {list(T5_NAMES)[-1]}, or a folder)"


def check_data(config: FastimagenConfig) -> None:
    """Raise ValueError, with one line that says what to change, if data and text encoder do not belong together.

    data.shapes renders the built-in shapes, so that data.shards must be these; and only they work with the built-in
    text encoder, whose weights are random, unless text.random_weights accepts it. Opens no shards.
    """
    for source in config.data.data_sets:
        parse_conditions(source.where)
    if config.data.shapes is not None:
        _check_shapes(config.data)
    if uses_text(config):
        check_encoder(config)


def _check_shapes(data: DataConfig) -> None:
    own_images = f"set fastimagen.data.shapes to null and fastimagen.text.encoder to {TRAINED_T5}"
    if not isinstance(data.shards, str) or Path(data.shards).name != "train":
        raise ValueError(
            f"fastimagen.data.shapes renders the built-in shapes into FOLDER/train, but fastimagen.data.shards is "
            f"{data.shards}: set it to FOLDER/train, or, for your own images, {own_images}"
        )
    if Path(data.shards).exists() and not _are_shapes(data.shards):
        raise ValueError(
            f"fastimagen.data.shapes renders the built-in shapes, but {data.shards} contains other shards: {own_images}"
        )


def check_encoder(config: FastimagenConfig) -> None:
    """Raise ValueError if the text encoder is missing, or has random weights, the data are not the shapes, and nobody
    said that this is meant."""
    encoder = config.text.encoder
    built_in = builds_encoder(config) or is_random_encoder(encoder)
    if not built_in and is_path(encoder) and not Path(encoder).is_dir():
        raise ValueError(f"fastimagen.text.encoder: there is no folder {encoder}: set it to {TRAINED_T5}")
    if not built_in or config.text.random_weights:
        return
    for source in _sources(config):
        if not _are_shapes(source) and not _renders(source, config.data):
            raise ValueError(
                f"the text encoder {encoder} has random weights and works with the built-in shapes only, not with "
                f"{source}: set fastimagen.text.encoder to {TRAINED_T5}; to try things out without one, "
                f"fastimagen.text.random_weights = true accepts it"
            )


def _sources(config: FastimagenConfig) -> list[str]:
    """Where the training and validation shards are."""
    listed = [source.shards for source in config.data.data_sets]
    return [path for shards in listed for path in ([shards] if isinstance(shards, str) else shards)]


def _are_shapes(source: str) -> bool:
    """Whether shards are built-in shapes: shapes.json is written beside the folders of their splits."""
    folder = Path(source)
    if not folder.is_dir():  # a tar or a pattern
        folder = folder.parent
    return (folder.parent / "shapes.json").is_file()


def _renders(source: str, data: DataConfig) -> bool:
    """Whether `prepare_shapes` will write these shards."""
    return data.shapes is not None and Path(source).parent == shapes_folder(data) and not Path(source).exists()


def shapes_folder(data: DataConfig) -> Path:
    """The folder that contains the built-in shapes, for a configuration that `_check_shapes` accepts."""
    assert isinstance(data.shards, str)
    return Path(data.shards).parent


def builds_encoder(config: FastimagenConfig) -> bool:
    """Whether the built-in text encoder will be built: text.encoder is a folder that is missing."""
    encoder = config.text.encoder
    if not uses_text(config) or Path(encoder).exists():
        return False
    if config.data.shapes is None:
        return config.text.random_weights and is_path(encoder)
    return is_path(encoder) or Path(encoder).parent == shapes_folder(config.data)


# ---- making them


def prepare_shapes(config: FastimagenConfig, *, say: Say) -> None:
    """Render the built-in shapes and build their text encoder, if the configuration asks for them and they are missing.

    Raises ValueError if the folder contains other files.
    """
    from .shapes import has_shards, write_shards

    shapes = config.data.shapes
    if shapes is None:
        return
    check_data(config)
    folder, encoder = shapes_folder(config.data), config.text.encoder
    build_encoder = builds_encoder(config)
    if not has_shards(folder, shapes.count, shapes.size, shapes.seed):
        say(f"{folder}: rendering {shapes.count} captioned shapes of {shapes.size}x{shapes.size}")
        write_shards(folder, shapes.count, shapes.size, shapes.seed)
    if build_encoder:
        say(f"{encoder}: building the built-in text encoder (random weights, for the shapes only)")
        captions = [caption for shard in open_shards(config.data.training[0].shards) for caption in shard.captions()]
        build_tiny_t5(encoder, captions, dim=TINY_T5_WIDTH)


def prepare_encoder(config: FastimagenConfig, *, say: Say) -> None:
    """Build the built-in text encoder from the captions of training and validation, if text.random_weights accepts it
    and its folder is missing. Raises ValueError if the data cannot be opened."""
    check_data(config)
    if not builds_encoder(config):
        return
    captions = [
        caption
        for source in config.data.data_sets
        for shard in open_source(source, config, captions=True)
        for caption in shard.captions()
    ]
    encoder = config.text.encoder
    say(f"{encoder}: building a text encoder from {counted(len(captions), 'caption')} (random weights)")
    build_tiny_t5(encoder, captions, dim=TINY_T5_WIDTH, vocab_size=MAX_PIECES)


def refuse_unreadable(config: FastimagenConfig, shards: Sequence[ListedShard], tokens: CaptionTokens) -> None:
    """Raise ValueError if an encoder with random weights has unknown tokens in captions: different ones would have the
    same embeddings."""
    if not config.text.random_weights or not is_random_encoder(config.text.encoder):
        return
    captions = [caption for shard in shards for caption in shard.captions()]
    unreadable = tokens.unreadable(captions)
    if unreadable:
        raise ValueError(
            f"the text encoder {config.text.encoder} has random weights, and no tokens for characters of "
            f"{len(unreadable)} of {counted(len(captions), 'caption')}, such as {unreadable[0]!r:.80}: remove its "
            f"folder and rerun fastimagen embed, which builds it from these captions, or set fastimagen.text.encoder "
            f"to {TRAINED_T5}"
        )


def encoder_width(config: FastimagenConfig) -> int:
    """Width of the text embeddings; that of the built-in encoder is known before it is built."""
    return TINY_T5_WIDTH if builds_encoder(config) else text_width(config.text.encoder)
