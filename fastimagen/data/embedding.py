"""Filling the embedding caches that a configuration names, checking them, and what filling them takes."""

from __future__ import annotations

import os
import time

import torch

from ..config import FastimagenConfig
from ..text.t5 import T5Encoder
from ..words import counted
from .embedding_cache import EmbedReport, embed_shards, write_cache
from .listed import ListedShard
from .listed_embeddings import list_embeddings
from .prepare import check_data, check_encoder, refuse_unreadable
from .source import (
    Say,
    empty_caption_path,
    empty_text,
    identity_of,
    open_source,
    open_split,
)

MAX_PLANNED = 10000
"""Captions whose lengths `plan_embedding` looks at: up to 100 of each shard."""


def embed_all(config: FastimagenConfig, *, say: Say, rank: int = 0, world_size: int = 1) -> EmbedReport:
    """Fill the embedding caches of training and validation shards; complete ones are kept.

    Raises ValueError as `check_data` does, and for missing shards.
    """
    check_data(config)
    check_encoder(config)  # also for a cascade without text
    text = config.text
    shards = _sources(config, rank, world_size)
    encoder = _encoder(config)
    refuse_unreadable(config, shards, encoder.tokens)
    if rank == 0 and text.encoding == "if":
        write_cache(empty_caption_path(config), ["empty"], [""], encoder, batch_size=1)
    report = embed_shards(
        shards, encoder, cache_dir=text.cache, batch_size=text.batch_size, rank=rank, world_size=world_size
    )
    say(
        f"embedding cache: {counted(report.written, 'shard')} written, {report.kept} kept, "
        f"{counted(report.captions, 'caption')}, "
        f"{report.truncated} truncated to {text.max_length} tokens, {_unknown_tokens(report)}"
    )
    return report


def check_embeddings(config: FastimagenConfig, *, say: Say) -> None:
    """Read the embedding caches in full and compare their checksums.

    Raises ValueError that names damaged and missing caches, and says what rebuilds them.
    """
    problems, checked, unchecked = [], 0, 0
    identity = identity_of(config)
    for shard in _sources(config):
        try:
            cache = list_embeddings(shard, identity, config.text.cache, trust=True).opened()
            cache.check()
        except ValueError as error:
            problems.append(str(error).partition(";")[0])
        else:
            checked += 1
            unchecked += cache.sums is None
    try:
        checked += empty_text(config) is not None
    except ValueError as error:
        problems.append(str(error).partition(";")[0])
    if problems:
        total = counted(checked + len(problems), "embedding cache")
        raise ValueError(
            f"{len(problems)} of {total} not intact: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}: delete them and rerun fastimagen embed"
        )
    older = f"; {unchecked} of them written without checksums" if unchecked else ""
    say(f"{counted(checked, 'embedding cache')} intact{older}")


def plan_embedding(config: FastimagenConfig, *, say: Say) -> None:
    """Say how many captions there are, and what embedding them takes in bytes and, on this device, in time.

    The lengths of MAX_PLANNED captions and the time of a batch of median ones stand for all.
    """
    check_data(config)
    check_encoder(config)
    shards = _sources(config)
    total = sum(shard.row.entry.captions for shard in shards)
    captions = [
        caption
        for shard in shards[: MAX_PLANNED // 100]
        for index in range(min(100, len(shard)))
        for caption in shard.captions_of(index)
    ]
    encoder, batch_size = _encoder(config), config.text.batch_size
    lengths = encoder.count_tokens(captions)
    mean = sum(lengths) / len(lengths)
    ranked = sorted(range(len(captions)), key=lengths.__getitem__)
    batch = [captions[index] for index in ranked[max(0, len(ranked) - batch_size) // 2 :][:batch_size]]
    encoder.encode(batch[:1])  # the first call is slow
    started = time.perf_counter()
    encoder.encode(batch, batch_size).embeds.sum().item()
    hours = (time.perf_counter() - started) / len(batch) * total / 3600
    say(
        f"{counted(total, 'caption')} of {mean:.1f} tokens on average: "
        f"{total * mean * encoder.dim * 2 / 1e9:.3g} GB at most (a caption that repeats in a shard is stored once), "
        f"and about {hours:.2g} hours on one {encoder.model.device.type} in {config.text.dtype}"
    )


def is_embedded(config: FastimagenConfig) -> bool:
    """Whether the embedding caches are complete; the text encoder is not loaded."""
    try:
        for source in config.data.data_sets:
            open_split(source, config, with_text=True)
        empty_text(config)
    except ValueError:
        return False
    return True


def _unknown_tokens(report: EmbedReport) -> str:
    """How many captions have unknown tokens, where that was counted."""
    if not report.uncounted:
        return f"{report.unknown} with unknown tokens"
    known = "" if report.uncounted == report.written + report.kept else f"{report.unknown} with unknown tokens, and "
    return (
        f"{known}an unknown number in {counted(report.uncounted, 'shard')}, which an earlier fastimagen embedded: "
        f"remove their caches and rerun the command to count them"
    )


def _sources(config: FastimagenConfig, rank: int = 0, world_size: int = 1) -> list[ListedShard]:
    """The shards of training and validation that can be read."""
    shards = [
        shard
        for source in config.data.data_sets
        for shard in open_source(source, config, captions=True, rank=rank, world_size=world_size)
    ]
    return [shard for shard in shards if not shard.lost]


def _encoder(config: FastimagenConfig) -> T5Encoder:
    """On the GPU that the launcher gives this process, if there is one."""
    text, local_rank = config.text, os.environ.get("LOCAL_RANK", "0")
    return T5Encoder(
        text.encoder,
        revision=text.revision,
        max_length=text.max_length,
        encoding=text.encoding,
        device=f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu",
        dtype=getattr(torch, text.dtype),
    )
