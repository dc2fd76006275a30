"""`fastimagen embed`: the text embeddings of all captions, on one process or on all of a launcher."""

from __future__ import annotations

import argparse

from ..config_file import load_config
from ..data.embedding import check_embeddings, embed_all, plan_embedding
from ..data.prepare import builds_encoder, prepare_encoder, prepare_shapes
from ..sampling.distributed import rank_and_world_size


def embed(options: argparse.Namespace) -> None:
    """Fill the cache, check it, or say what it will take. The processes of a launcher share the shards.

    They need no network between them: another one, or the next run, takes the shards of one that dies.
    """
    config = load_config(options.config, options.overrides).fastimagen
    rank, world_size = rank_and_world_size()

    def say(line: str) -> None:
        print(line if world_size == 1 else f"process {rank} of {world_size}: {line}", flush=True)

    if options.check or options.dry_run:
        if rank == 0:
            (check_embeddings if options.check else plan_embedding)(config, say=say)
        return
    if world_size == 1:
        prepare_shapes(config, say=say)
        prepare_encoder(config, say=say)
    elif config.data.shapes is not None:
        raise ValueError("fastimagen.data.shapes renders the built-in shapes: run fastimagen embed on one process")
    elif builds_encoder(config):
        raise ValueError(
            f"fastimagen.text.encoder {config.text.encoder} does not exist, and would be built from the captions with "
            f"random weights: run fastimagen embed on one process"
        )
    embed_all(config, say=say, rank=rank, world_size=world_size)
